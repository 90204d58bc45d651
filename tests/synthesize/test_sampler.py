"""The sampler: an image follows from its prompt and seed alone, and bad pipelines end in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.synthesize import Generator, load_generator
from retrieve_or_generate.weights import POCKET_WEIGHTS, check_pocket_weights, generator_fingerprint

from .conftest import QUICK

PROMPTS = ["a striped texture.", "the digit two.", "a photo of a falcon 2.", "dotted fabric."] * 8
SEEDS = list(range(32))


def test_batch_1_and_batch_32_give_the_same_images(generator: Generator) -> None:
    together = generator.generate(PROMPTS, SEEDS, QUICK.model_copy(update={"batch_size": 32}))
    alone = generator.generate(PROMPTS, SEEDS, QUICK.model_copy(update={"batch_size": 1}))
    assert together.shape == (32, 32, 32, 3)
    assert together.dtype == np.uint8
    assert np.abs(together.astype(int) - alone).max() <= 1  # rounding to 8 bits of floats that agree


def test_perturbed_images_do_not_depend_on_the_batch_either(generator: Generator) -> None:
    images = generator.generate(PROMPTS[:5], SEEDS[:5], QUICK)
    together = generator.perturb(images, PROMPTS[:5], SEEDS[:5], 0.5, QUICK)
    alone = generator.perturb(images, PROMPTS[:5], SEEDS[:5], 0.5, QUICK.model_copy(update={"batch_size": 1}))
    assert np.abs(together.astype(int) - alone).max() <= 1


def test_equal_calls_give_equal_bits_and_other_seeds_other_images(generator: Generator) -> None:
    first = generator.generate(PROMPTS[:4], SEEDS[:4], QUICK)
    assert np.array_equal(first, generator.generate(PROMPTS[:4], SEEDS[:4], QUICK))
    assert not np.array_equal(first, generator.generate(PROMPTS[:4], [9, 8, 7, 6], QUICK))


def test_order_does_not_matter(generator: Generator) -> None:
    forward = generator.generate(PROMPTS[:6], SEEDS[:6], QUICK)
    backward = generator.generate(PROMPTS[:6][::-1], SEEDS[:6][::-1], QUICK)
    assert np.abs(forward.astype(int) - backward[::-1]).max() <= 1


def test_strength_moves_images_away(generator: Generator) -> None:
    images = generator.generate(PROMPTS[:8], SEEDS[:8], QUICK)
    distances = [
        np.abs(generator.perturb(images, PROMPTS[:8], SEEDS[:8], s, QUICK).astype(int) - images).mean()
        for s in (0.0, 0.5, 1.0)
    ]
    assert distances[0] < 4  # the autoencoder alone
    assert distances == sorted(distances)


def test_progress_counts_images(generator: Generator) -> None:
    told: list[int] = []
    generator.generate(PROMPTS[:20], SEEDS[:20], QUICK, told.append)
    assert told == [16, 4]


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no model_index.json; a generator is a folder"):
        load_generator(str(tmp_path))


def test_an_unknown_name() -> None:
    with pytest.raises(UsageError, match=r"unknown generator 'pockt': give 'pocket', a folder, or a Hub id"):
        load_generator("pockt")


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = shutil.copytree(POCKET_WEIGHTS / "stable-diffusion", tmp_path / "sd")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(IntegrityError, match="diffusers cannot load it"):
        load_generator(str(folder))


def test_a_changed_byte_of_the_package_weights_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = shutil.copytree(POCKET_WEIGHTS, tmp_path / "weights")
    monkeypatch.setattr("retrieve_or_generate.weights.POCKET_WEIGHTS", folder)
    check_pocket_weights("stable-diffusion")
    path = folder / "stable-diffusion/unet/diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"diffusion_pytorch_model.safetensors: its bytes changed"):
        load_generator("pocket")


def test_the_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    folder = shutil.copytree(POCKET_WEIGHTS / "stable-diffusion", tmp_path / "sd")
    assert generator_fingerprint(str(folder)) == generator_fingerprint("pocket")
    scheduler = folder / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"beta_end": 0.03}))
    assert generator_fingerprint(str(folder)) != generator_fingerprint("pocket")
