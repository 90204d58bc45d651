"""Reads the pocket generator's pictures with classifiers trained on real ones.

Run as `python -m retrieve_or_generate.pocket.judge --out docs/pocket`. For each task a small convolutional network is trained on
the pool's pictures of the task and the task's own training split, and then reads test pictures, their round trips through the
autoencoder, and fresh samples of every class. Writes `judged.json` (shares read
right, mutual information, confusion matrices) and `samples.png`, a contact sheet. Accuracy alone flatters: a network calls anything
odd by one favourite name, which the mutual information between asked and read class shows.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image

from retrieve_or_generate.models import plain_attention
from retrieve_or_generate.pixels import decode_all
from retrieve_or_generate.pocket import patch_vae  # noqa: F401  (diffusers loads a class by name only if it is imported)
from retrieve_or_generate.pocket.captions import VOCABULARIES, Vocabulary
from retrieve_or_generate.pocket.pictures import TASKS, evaluation_split, pool_rows
from retrieve_or_generate.pocket.places import SEED_STUDY
from retrieve_or_generate.pocket.train_clip import shifted
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.store import write_json
from retrieve_or_generate.weights import POCKET_WEIGHTS

STEPS, GUIDANCE = 8, 3.0
_SIDE = 32


def _network(classes: int) -> torch.nn.Module:
    layers: list[torch.nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128)):
        layers += [torch.nn.Conv2d(before, after, 3, padding=1), torch.nn.BatchNorm2d(after), torch.nn.ReLU()]
        layers += [torch.nn.MaxPool2d(2)]
    return torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(128 * 16, classes))


def _real(task: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (n, 3, 32, 32) uint8 and labels that the task's network may learn from."""
    names = VOCABULARIES[task].class_names
    train = [(picture.jpeg, picture.label) for picture in evaluation_split(task, "train")]
    pool = [row for row in pool_rows() if row.planted.get("task") == task and row.planted["kind"] == "class"]
    train += [(row.jpeg, names.index(row.planted["class_name"])) for row in pool]
    pixels = decode_all([jpeg for jpeg, _ in train], _SIDE)
    return torch.from_numpy(pixels), torch.tensor([label for _, label in train])


def train_judge(task: str, epochs: int = 8, batch_size: int = 64) -> torch.nn.Module:
    """A network that reads the classes of `task`, trained on real pictures alone."""
    seed = seed_for(SEED_STUDY, "judge", task)
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    pixels, labels = _real(task)
    network = _network(len(VOCABULARIES[task].class_names))
    steps = epochs * (len(labels) // batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1)
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for rows in order[: len(order) // batch_size * batch_size].split(batch_size):
            loss = F.cross_entropy(network(shifted(pixels[rows], generator) / 127.5 - 1), labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
    return network.eval()


@torch.inference_mode()
def read(judge: torch.nn.Module, pixels: torch.Tensor) -> np.ndarray:
    """The class that the network names for each of (n, 3, 32, 32) pixels in [-1, 1]."""
    return torch.cat([judge(part).argmax(1) for part in pixels.split(256)]).numpy()


@torch.inference_mode()
def sample(pipeline: StableDiffusionPipeline, task: str, words: Vocabulary, label: int, count: int) -> torch.Tensor:
    """(count, 3, 32, 32) pixels in [0, 1] of one class, its templates in turn, each from its own seed."""
    name = words.class_names[label]
    prompts = [words.templates[i % len(words.templates)].replace("{}", name) for i in range(count)]
    noise = [torch.Generator().manual_seed(seed_for(SEED_STUDY, "judge", task, label, i)) for i in range(count)]
    with plain_attention(torch.device("cpu")):
        return pipeline(
            prompts,
            height=_SIDE,
            width=_SIDE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=noise,
            output_type="pt",
        ).images


def confusion_of(asked: np.ndarray, answered: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes) counts: rows what was asked for, columns what was read."""
    return np.bincount(asked * classes + answered, minlength=classes**2).reshape(classes, classes)


def mutual_information(confusion: np.ndarray) -> float:
    """Bits that the read class tells of the asked one; log2(classes) when each is read right."""
    joint = confusion / confusion.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / independent[seen])).sum())


def judge_task(task: str, pipeline: StableDiffusionPipeline, per_class: int) -> tuple[dict[str, Any], np.ndarray]:
    """What is to be said of one task, and the first eight samples of each class as a (classes · 32, 256, 3) sheet."""
    words, judge = VOCABULARIES[task], train_judge(task)
    split = evaluation_split(task, "test")
    labels = np.array([picture.label for picture in split])
    real = torch.from_numpy(decode_all([picture.jpeg for picture in split], _SIDE)).float() / 127.5 - 1
    with torch.inference_mode():
        round_trip = pipeline.vae.decode(pipeline.vae.encode(real).latent_dist.mode()).sample.clamp(-1, 1)
    classes = len(words.class_names)
    samples = [sample(pipeline, task, words, label, per_class) for label in range(classes)]
    asked = np.repeat(np.arange(classes), per_class)
    confusion = confusion_of(asked, read(judge, torch.cat(samples) * 2 - 1), classes)
    told = {
        "chance": 1 / classes,
        "real_test_read_right": float((read(judge, real) == labels).mean()),
        "round_trip_read_right": float((read(judge, round_trip) == labels).mean()),
        "round_trip_psnr": float(10 * torch.log10(4 / (round_trip - real).square().mean())),
        "samples_per_class": per_class,
        "samples_read_right": float(np.trace(confusion) / confusion.sum()),
        "times_chance": float(np.trace(confusion) / confusion.sum() * classes),
        "mutual_information_bits": mutual_information(confusion),
        "most_named_class_share": float(confusion.sum(0).max() / confusion.sum()),
        "class_names": list(words.class_names),
        "confusion": confusion.tolist(),
    }
    rows = [np.concatenate(list(images[:8].permute(0, 2, 3, 1).numpy()), axis=1) for images in samples]
    return told, np.concatenate(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for judged.json and samples.png")
    parser.add_argument(
        "--weights", type=Path, default=POCKET_WEIGHTS, help="folder with stable-diffusion/ (the package's)"
    )
    parser.add_argument("--per-class", type=int, default=60, help="samples a class (default 60)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pipeline = StableDiffusionPipeline.from_pretrained(
        arguments.weights / "stable-diffusion", use_safetensors=True, safety_checker=None, dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    told, sheets = {}, []
    for task in TASKS:
        told[task], sheet = judge_task(task, pipeline, arguments.per_class)
        sheets.append(sheet)
        shown = {name: round(value, 3) for name, value in told[task].items() if isinstance(value, float)}
        print(task, shown, flush=True)
    write_json(arguments.out / "judged.json", told)
    tall = max(len(sheet) for sheet in sheets)
    padded = [np.pad(sheet, ((0, tall - len(sheet)), (0, 8), (0, 0)), constant_values=1.0) for sheet in sheets]
    joined = Image.fromarray(np.uint8(np.concatenate(padded, axis=1) * 255))
    joined.resize((joined.width * 2, joined.height * 2), Image.Resampling.NEAREST).save(arguments.out / "samples.png")


if __name__ == "__main__":
    main()
