"""Trains the pocket captioner, a small BLIP: `python -m retrieve_or_generate.pocket.train_captioner --out FOLDER`.

Reads the pool that this package draws, evaluation copies left out, and the pocket CLIP, with whose image tower it begins. Writes
`FOLDER`, which `transformers` loads: weights in half precision, image processor and tokenizer. docs/pocket.md has the minutes, and
what `experiments/judge_prompts.py` reads.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
)

from retrieve_or_generate.models import load_clip
from retrieve_or_generate.pocket.drawing import SIZE
from retrieve_or_generate.pocket.places import SEED_STUDY
from retrieve_or_generate.pocket.train_clip import MEAN, STD, shifted
from retrieve_or_generate.pocket.training_pool import training_pool
from retrieve_or_generate.seeds import seed_for

MOST_TOKENS = 20
STEPS = 3000
_WIDTH, _PATCH, _LAYERS, _TEXT_LAYERS = 128, 8, 4, 2
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")
_PAD, _END, _BEGIN = _SPECIAL.index("[PAD]"), _SPECIAL.index("[SEP]"), _SPECIAL.index("[DEC]")


def make_tokenizer(captions: Iterable[str]) -> BertTokenizer:
    """BERT's, with a token for every word of the captions: it need not read others, and writes these."""
    words = sorted({word for caption in captions for word in re.findall(r"\w+|[^\w\s]", caption.lower())})
    vocabulary = {piece: number for number, piece in enumerate((*_SPECIAL, *words))}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=MOST_TOKENS)
    tokenizer.add_special_tokens({"bos_token": "[DEC]", "eos_token": "[SEP]"})
    return tokenizer


def make_captioner(vocabulary_size: int) -> BlipForConditionalGeneration:
    """1.3 million parameters: an image tower of the pocket CLIP's shape, and two layers that write."""
    vision = {
        "hidden_size": _WIDTH,
        "intermediate_size": 4 * _WIDTH,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": _PATCH,
        "initializer_range": 0.02,
    }
    text = {
        "vocab_size": vocabulary_size,
        "hidden_size": _WIDTH,
        "intermediate_size": 2 * _WIDTH,
        "num_hidden_layers": _TEXT_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 2 * MOST_TOKENS,
        "bos_token_id": _BEGIN,
        "eos_token_id": _END,
        "sep_token_id": _END,
        "pad_token_id": _PAD,
    }
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=_WIDTH, image_text_hidden_size=_WIDTH)
    return BlipForConditionalGeneration(config)


@torch.no_grad()
def begin_with_clip(captioner: BlipForConditionalGeneration, clip: str) -> None:
    """Copy the pocket CLIP's image tower. BLIP's has no norm before its layers; CLIP's goes into the embeddings, on average."""
    source = load_clip(clip).network.visual
    target = captioner.vision_model
    positions = source.positional_embedding.float()
    start = torch.cat([source.class_embedding[None].float(), torch.zeros(len(positions) - 1, _WIDTH)]) + positions
    scale = source.ln_pre.weight.float() / _typical_deviation(source)
    centring = torch.eye(_WIDTH) - 1 / _WIDTH
    fold = scale[:, None] * centring
    embeddings = target.embeddings
    embeddings.patch_embedding.weight.copy_(torch.einsum("ij,jchw->ichw", fold, source.conv1.weight.float()))
    embeddings.patch_embedding.bias.zero_()
    embeddings.class_embedding.zero_()
    embeddings.position_embedding.copy_((start @ fold.T + source.ln_pre.bias.float())[None])
    target.post_layernorm.load_state_dict(source.ln_post.state_dict())
    for ours, theirs in zip(target.encoder.layers, source.transformer.resblocks, strict=True):
        ours.layer_norm1.load_state_dict(theirs.ln_1.state_dict())
        ours.layer_norm2.load_state_dict(theirs.ln_2.state_dict())
        ours.self_attn.qkv.weight.copy_(theirs.attn.in_proj_weight)
        ours.self_attn.qkv.bias.copy_(theirs.attn.in_proj_bias)
        ours.self_attn.projection.load_state_dict(theirs.attn.out_proj.state_dict())
        ours.mlp.fc1.load_state_dict(theirs.mlp.c_fc.state_dict())
        ours.mlp.fc2.load_state_dict(theirs.mlp.c_proj.state_dict())


def _typical_deviation(tower: torch.nn.Module) -> float:
    """Of what CLIP's first norm divides by, over pixels as they are normalised for it."""
    pixels = torch.randn(64, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    patches = tower.conv1(pixels).flatten(2).transpose(1, 2) + tower.positional_embedding[1:]  # type: ignore[operator,index]
    return float(patches.std(-1).mean())


class Trainer:
    """One run over the pool's pairs, drawn by their weights."""

    def __init__(self, steps: int, clip: str = "pocket", batch_size: int = 64, learning_rate: float = 1.5e-3):
        seed = seed_for(SEED_STUDY, "train captioner")
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        pool = training_pool()
        self.tokenizer = make_tokenizer(pool.captions)
        self.pixels = torch.from_numpy(pool.images).permute(0, 3, 1, 2).contiguous()
        self.tokens = self._tokens(pool.captions)
        self.weights = torch.from_numpy(pool.weights).double()
        self.model = make_captioner(len(self.tokenizer))
        begin_with_clip(self.model, clip)
        self.steps, self.batch_size = steps, batch_size
        vision = list(self.model.vision_model.parameters())
        text = list(self.model.text_decoder.parameters())
        groups = [{"params": vision, "lr": 0.4 * learning_rate}, {"params": text, "lr": learning_rate}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, [0.4 * learning_rate, learning_rate], total_steps=steps + 1, pct_start=0.05
        )
        self.mean, self.std = (torch.tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))

    def _tokens(self, captions: list[str]) -> torch.Tensor:
        """(n, length) ids: begin, words, end, padding."""
        ids = [
            [_BEGIN, *self.tokenizer(caption, add_special_tokens=False)["input_ids"][: MOST_TOKENS - 2], _END]
            for caption in captions
        ]
        padded = np.full((len(ids), max(map(len, ids))), _PAD)
        for row, line in zip(padded, ids, strict=True):
            row[: len(line)] = line
        return torch.from_numpy(padded)

    def step(self) -> float:
        """One update; the loss in nats a token."""
        rows = torch.multinomial(self.weights, self.batch_size, replacement=True, generator=self.generator)
        pixels = (shifted(self.pixels[rows], self.generator) / 255 - self.mean) / self.std
        tokens = self.tokens[rows]
        tokens = tokens[:, : int((tokens != _PAD).sum(1).max())]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = self.model.vision_model(pixel_values=pixels).last_hidden_state
            logits = self.model.text_decoder(
                input_ids=tokens[:, :-1],
                attention_mask=(tokens[:, :-1] != _PAD).long(),
                encoder_hidden_states=states,
                encoder_attention_mask=torch.ones(states.shape[:2], dtype=torch.long),
            ).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=_PAD)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return loss.item()

    def run(self, every: int = 200) -> None:
        self.model.train()
        started, total = time.monotonic(), 0.0
        for done in range(1, self.steps + 1):
            total += self.step()
            if done % every == 0 or done == self.steps:
                rate = done * self.batch_size / (time.monotonic() - started)
                print(f"captioner step {done}/{self.steps}  loss {total / every:.4f}  {rate:.0f} images/s", flush=True)
                total = 0.0

    def save(self, folder: Path) -> None:
        images = BlipImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=MEAN, image_std=STD)
        self.model.eval().half().save_pretrained(folder)
        BlipProcessor(images, self.tokenizer).save_pretrained(folder)


def train(folder: Path, steps: int = STEPS, clip: str = "pocket") -> None:
    """Train with the image tower of `clip` to begin with, and write the folder."""
    trainer = Trainer(steps, clip)
    trainer.run()
    unfinished = folder.with_name(folder.name + ".part")
    trainer.save(unfinished)
    unfinished.replace(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the captioner")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"updates of 64 pairs (default {STEPS})")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
