"""Rebuilds the pocket weights from nothing: `python -m retrieve_or_generate.pocket.train --out FOLDER`.

Reads nothing but the pool that this package draws. Writes `FOLDER/clip` (open_clip), `FOLDER/captioner` and `FOLDER/language`
(transformers) and `FOLDER/stable-diffusion` (diffusers), in this order, and while it works `FOLDER/generator.pt`, from which a
stopped training goes on, and `FOLDER/samples.png`. What is there is not made again. One core needs three hours or so;
docs/pocket.md has the minutes and the final numbers.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from retrieve_or_generate.pocket import captions, train_captioner, train_language
from retrieve_or_generate.pocket.patch_vae import fit_patch_vae
from retrieve_or_generate.pocket.tokenizer import train_tokenizer
from retrieve_or_generate.pocket.train_clip import train_clip
from retrieve_or_generate.pocket.train_generator import Trainer, hidden_states, make_pipeline, text_tower
from retrieve_or_generate.pocket.training_pool import training_pool
from retrieve_or_generate.store import sha256_of, write_json

PARTS = ("captioner", "clip", "language", "stable-diffusion")


def write_samples(trainer: Trainer, rate: float, tower: object, tokenizer: object, path: Path) -> None:
    """A row of eight samples a class, each task's classes in order: to be looked at while it trains."""
    pipeline = make_pipeline(trainer.average, trainer.vae, tower, tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    rows = []
    for words in captions.VOCABULARIES.values():
        for name in words.class_names:
            prompts = [words.templates[i % len(words.templates)].replace("{}", name) for i in range(8)]
            noise = [torch.Generator().manual_seed(i) for i in range(8)]
            images = pipeline(
                prompts,
                height=32,
                width=32,
                num_inference_steps=8,
                guidance_scale=3.0,
                generator=noise,
                output_type="np",
            ).images
            rows.append(np.concatenate(list(images), axis=1))
    half = len(rows) // 2
    sheet = np.concatenate([np.concatenate(rows[:half]), np.concatenate(rows[half : 2 * half])], axis=1)
    Image.fromarray(np.uint8(sheet * 255)).resize((sheet.shape[1] * 2, sheet.shape[0] * 2), 0).save(path)


def write_checksums(folder: Path) -> None:
    """`checksums.json`: size and sha256 of every file of the models, compared whenever they are loaded."""
    files = [path for part in PARTS for path in sorted((folder / part).rglob("*")) if path.is_file()]
    records = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files
    }
    write_json(folder / "checksums.json", records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights")
    parser.add_argument(
        "--clip-epochs", type=int, default=6, help="passes of the pocket CLIP over the pool (default 6)"
    )
    parser.add_argument("--generator-steps", type=int, default=15700, help="updates of 64 images (default 15700)")
    parser.add_argument("--every", type=int, default=1000, help="updates between checkpoints (default 1000)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    pool = training_pool()
    clip_folder = arguments.out / "clip"
    if not (clip_folder / "open_clip_model.safetensors").exists():
        train_clip(
            pool.images, pool.captions, train_tokenizer(pool.captions), clip_folder, epochs=arguments.clip_epochs
        )
    if not (arguments.out / "captioner").exists():
        train_captioner.train(arguments.out / "captioner", clip=str(clip_folder))
    if not (arguments.out / "language").exists():
        train_language.train(arguments.out / "language")
    vae = fit_patch_vae(pool.images)
    tower, tokenizer = text_tower(clip_folder, pool.captions)
    context = torch.cat(
        [hidden_states(tower, tokenizer, pool.captions[i : i + 1000]) for i in range(0, len(pool.captions), 1000)]
    )
    nothing = hidden_states(tower, tokenizer, [""])[0]
    trainer = Trainer(pool.images, context, nothing, pool.weights, vae, steps=arguments.generator_steps)
    look = partial(write_samples, tower=tower, tokenizer=tokenizer, path=arguments.out / "samples.png")
    trainer.run(arguments.out / "generator.pt", arguments.every, look)
    pipeline = make_pipeline(trainer.average, vae, tower, tokenizer).to(dtype=torch.float16)
    pipeline.save_pretrained(arguments.out / "stable-diffusion", safe_serialization=True)
    write_checksums(arguments.out)


if __name__ == "__main__":
    main()
