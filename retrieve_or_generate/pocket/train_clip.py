"""Trains the pocket CLIP: open_clip's own model and loss on the pool's pictures and captions, evaluation copies left out."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from safetensors.torch import save_file
from transformers import CLIPTokenizer

from retrieve_or_generate.pocket.places import SEED_STUDY
from retrieve_or_generate.pocket.tokenizer import CONTEXT_LENGTH
from retrieve_or_generate.seeds import seed_for

MEAN, STD = (0.5, 0.5, 0.5), (0.28, 0.28, 0.28)


def model_config(vocabulary_size: int) -> dict[str, Any]:
    """open_clip's description of the pocket CLIP: ViT-(4 layers, 128 wide)/8 at 32 pixels, three text layers."""
    return {
        "embed_dim": 128,
        "vision_cfg": {"image_size": 32, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8},
        "text_cfg": {
            "context_length": CONTEXT_LENGTH,
            "vocab_size": vocabulary_size,
            "width": 128,
            "heads": 4,
            "layers": 3,
            "hf_tokenizer_name": "rog/pocket-clip",
        },
    }


def write_folder(
    folder: Path, config: dict[str, Any], state: dict[str, torch.Tensor], tokenizer: CLIPTokenizer
) -> None:
    """A folder that `open_clip.create_model_and_transforms('local-dir:…')` loads, weights in half precision."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=1)
    (folder / "open_clip_config.json").write_text(text + "\n")
    half = {name: value.half().contiguous() for name, value in state.items()}
    save_file(half, folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(folder)


def shifted(images: torch.Tensor, generator: torch.Generator, most: int = 2) -> torch.Tensor:
    """Each of (b, 3, h, w) uint8 images moved by up to `most` pixels, edges repeated."""
    b, _, h, w = images.shape
    padded = F.pad(images.float(), (most,) * 4, mode="replicate")
    top, left = torch.randint(0, 2 * most + 1, (2, b, 1), generator=generator)
    rows = (top + torch.arange(h))[:, None, :, None]
    columns = (left + torch.arange(w))[:, None, None, :]
    return padded[torch.arange(b)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, columns]


def train_clip(
    images: np.ndarray,
    captions: list[str],
    tokenizer: CLIPTokenizer,
    folder: Path,
    epochs: int = 12,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    report: Callable[[int, open_clip.CLIP], None] | None = None,
) -> None:
    """`images` (n, 32, 32, 3) uint8 and their captions to a model folder. `report` sees the model after each epoch."""
    seed = seed_for(SEED_STUDY, "train clip")
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    config = model_config(len(tokenizer.get_vocab()))
    text_cfg = {key: value for key, value in config["text_cfg"].items() if not key.startswith("hf_")}
    model = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], text_cfg)
    encoded = tokenizer(captions, padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt")
    tokens, pixels = encoded["input_ids"], torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))

    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)
    steps = epochs * (len(captions) // batch_size)
    warmup = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    loss_of, started = ClipLoss(), time.monotonic()
    for epoch in range(epochs):
        model.train()
        order, total = torch.randperm(len(captions), generator=generator), 0.0
        for rows in order[: len(order) // batch_size * batch_size].split(batch_size):
            batch = (shifted(pixels[rows], generator) / 255 - mean) / std
            loss = loss_of(*model(batch, tokens[rows]))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            total += loss.item()
        print(
            f"clip epoch {epoch + 1}/{epochs}  loss {total / (steps / epochs):.3f}  {time.monotonic() - started:.0f} s",
            flush=True,
        )
        if report:
            report(epoch, model.eval())
    write_folder(folder, config, model.state_dict(), tokenizer)
