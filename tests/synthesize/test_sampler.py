"""The sampler: an image follows from its prompt and seed alone, in batches that memory holds, for every family of generators."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.pixels import to_square
from retrieve_or_generate.settings import SynthesizeSettings
from retrieve_or_generate.synthesize import Generator, load_generator
from retrieve_or_generate.synthesize.pipelines import load_pipeline
from retrieve_or_generate.synthesize.sampler import steps_at
from retrieve_or_generate.weights import POCKET_WEIGHTS, check_pocket_weights

from .builders import save

PROMPTS = ["a striped texture.", "the digit two.", "a photo of a falcon 2.", "dotted fabric."] * 8
SEEDS = list(range(32))
QUICK = SynthesizeSettings(num_inference_steps=4, batch_size=16, dtype="float32")
FEW = QUICK.model_copy(update={"batch_size": 4})
TINY = SynthesizeSettings(num_inference_steps=2, resolution=32, batch_size=3, dtype="float32")

_OF_DIFFUSERS = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # Euler's steps, numpy 2


def apart(one: np.ndarray, other: np.ndarray) -> int:
    """The largest difference in levels of 255."""
    return int(np.abs(one.astype(int) - other).max())


def changed(generator: Generator, **parts: object) -> Generator:
    """The same pipeline with other parts around it."""
    pipeline = dataclasses.replace(generator.pipeline, **parts)  # type: ignore[arg-type]
    return Generator(pipeline, generator.loaded_with)


@pytest.fixture(scope="session")
def generator() -> Generator:
    return load_generator("pocket", settings=QUICK)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Generator]:
    @cache
    def load(name: str) -> Generator:
        return load_generator(str(save(name, tmp_path_factory.mktemp("families") / name)), settings=TINY)

    return load


def test_batch_1_and_batch_16_give_the_same_images(generator: Generator) -> None:
    together = generator.generate(PROMPTS[:16], SEEDS[:16], QUICK).images
    alone = generator.generate(PROMPTS[:6], SEEDS[:6], QUICK.model_copy(update={"batch_size": 1})).images
    assert together.shape == (16, 32, 32, 3)
    assert together.dtype == np.uint8
    assert apart(together[:6], alone) <= 1  # rounding to 8 bits of floats that agree


def test_perturbed_images_do_not_depend_on_the_batch_either(generator: Generator) -> None:
    images = generator.generate(PROMPTS[:5], SEEDS[:5], QUICK).images
    together = generator.perturb(images, PROMPTS[:5], SEEDS[:5], 0.5, QUICK).images
    alone = generator.perturb(images, PROMPTS[:5], SEEDS[:5], 0.5, QUICK.model_copy(update={"batch_size": 1})).images
    assert apart(together, alone) <= 1


@pytest.fixture(scope="session")
def rough() -> Generator:
    return load_generator("pocket", settings=SynthesizeSettings(dtype="bfloat16"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_one_batch_size_no_bit_depends_on_order_neighbours_or_number(
    generator: Generator, rough: Generator, dtype: str
) -> None:
    chosen = generator if dtype == "float32" else rough
    how = FEW.model_copy(update={"dtype": dtype})
    whole = chosen.generate(PROMPTS[:8], SEEDS[:8], how).images
    for rows in ([7, 5, 0, 2, 1], [3], [6, 6, 4]):
        part = chosen.generate([PROMPTS[i] for i in rows], [SEEDS[i] for i in rows], how).images
        assert np.array_equal(part, whole[rows])


@settings(max_examples=8, deadline=None)
@given(rows=st.lists(st.integers(0, 7), min_size=1, max_size=7))
def test_any_rows_in_any_order(family: Callable[[str], Generator], rows: list[int]) -> None:
    whole = family("sd1").generate(PROMPTS[:8], SEEDS[:8], TINY).images
    part = family("sd1").generate([PROMPTS[i] for i in rows], [SEEDS[i] for i in rows], TINY).images
    assert np.array_equal(part, whole[rows])


def test_seeds_and_prompts_both_count(generator: Generator) -> None:
    first = generator.generate(PROMPTS[:4], SEEDS[:4], FEW).images
    assert not np.array_equal(first, generator.generate(PROMPTS[:4], [9, 8, 7, 6], FEW).images)
    assert not np.array_equal(first, generator.generate(PROMPTS[1:5], SEEDS[:4], FEW).images)


def test_half_the_bits_give_nearly_the_same_pictures(generator: Generator, rough: Generator) -> None:
    exact = generator.generate(PROMPTS[:8], SEEDS[:8], QUICK).images.astype(int)
    near = rough.generate(PROMPTS[:8], SEEDS[:8], QUICK.model_copy(update={"dtype": "bfloat16"})).images
    assert 0 < np.abs(exact - near).mean() < 3
    assert np.abs(exact - exact[::-1]).mean() > 30  # what another prompt and seed change


def test_progress_counts_images(generator: Generator) -> None:
    told: list[int] = []
    generator.generate(PROMPTS[:20], SEEDS[:20], QUICK, told.append)
    assert told == [16, 4]


def test_nothing_asked_nothing_made(generator: Generator) -> None:
    drawn = generator.generate([], [], QUICK)
    assert (drawn.images.shape, drawn.unsafe.shape) == ((0, 32, 32, 3), (0,))


# ---- strengths


def test_strength_moves_images_away(generator: Generator) -> None:
    images = generator.generate(PROMPTS[:8], SEEDS[:8], QUICK).images
    distances = [
        np.abs(generator.perturb(images, PROMPTS[:8], SEEDS[:8], s, QUICK).images.astype(int) - images).mean()
        for s in (0.0, 0.5, 1.0)
    ]
    assert distances[0] < 4  # the autoencoder alone
    assert distances == sorted(distances)


@torch.inference_mode()
def test_strength_0_is_the_round_trip_of_the_autoencoder_alone(generator: Generator) -> None:
    images = generator.generate(PROMPTS[:5], SEEDS[:5], QUICK).images
    made = generator.perturb(images, PROMPTS[:5], SEEDS[:5], 0.0, QUICK).images
    vae = generator.pipeline.text.vae
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    there_and_back = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    expected = ((there_and_back + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    assert apart(made, expected) <= 1
    other = generator.perturb(images, PROMPTS[5:10], SEEDS[5:10], 0.0, QUICK).images
    assert np.array_equal(made, other)  # neither prompt nor seed has a part in it


def test_less_than_one_step_is_the_round_trip_too_and_says_so(
    generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    images = generator.generate(PROMPTS[:3], SEEDS[:3], FEW).images
    nothing = generator.perturb(images, PROMPTS[:3], SEEDS[:3], 0.0, FEW).images
    assert not caplog.messages
    assert np.array_equal(generator.perturb(images, PROMPTS[:3], SEEDS[:3], 0.2, FEW).images, nothing)
    assert caplog.messages == [
        "strength 0.2 of 4 steps is less than one: images go through the autoencoder alone, as at strength 0"
    ]
    generator.perturb(images, PROMPTS[:3], SEEDS[:3], 0.2, FEW)
    assert len(caplog.messages) == 1  # once for each strength, not for every batch


def test_steps_are_counted_as_diffusers_counts_them() -> None:
    eight = SynthesizeSettings(num_inference_steps=8)
    assert [steps_at(s, eight) for s in (0.0, 0.1, 0.125, 0.2, 0.4, 0.99, 1.0)] == [0, 0, 1, 1, 3, 7, 8]


def test_strength_1_begins_near_noise_and_strangers_seeds_part(generator: Generator) -> None:
    """The image still shows where the schedule's first step is not pure noise; the seed decides more."""
    images = generator.generate(PROMPTS[:4], SEEDS[:4], FEW).images
    once = generator.perturb(images, PROMPTS[:4], SEEDS[4:8], 1.0, FEW).images
    assert not np.array_equal(once, generator.perturb(images, PROMPTS[:4], SEEDS[8:12], 1.0, FEW).images)


def test_every_shape_goes_the_one_road_to_a_square(generator: Generator) -> None:
    random = np.random.default_rng(0)
    shapes = [(32, 32), (48, 64), (20, 11), (200, 33)]
    images = [random.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    made = generator.perturb(images, PROMPTS[:4], SEEDS[:4], 0.5, FEW).images
    squares = np.stack([to_square(image, 32) for image in images])
    assert np.array_equal(made, generator.perturb(squares, PROMPTS[:4], SEEDS[:4], 0.5, FEW).images)


# ---- what is stored, and what is unsafe


def test_stored_images_are_resized_with_antialiasing(generator: Generator) -> None:
    whole = generator.generate(PROMPTS[:4], SEEDS[:4], FEW).images
    half = generator.generate(PROMPTS[:4], SEEDS[:4], FEW.model_copy(update={"stored_size": 16})).images
    assert half.shape == (4, 16, 16, 3)
    pillow = [np.asarray(Image.fromarray(image).resize((16, 16), Image.Resampling.BICUBIC)) for image in whole]
    assert np.abs(half.astype(int) - np.stack(pillow)).mean() < 0.6
    assert apart(half, np.stack(pillow)) <= 3
    assert (
        generator.perturb(whole, PROMPTS[:4], SEEDS[:4], 0.5, FEW.model_copy(update={"stored_size": 16})).images.shape
        == half.shape
    )


def test_what_the_checker_flags_is_told_of_and_left_as_it_is(family: Callable[[str], Generator]) -> None:
    generator, four = family("sd1"), TINY.model_copy(update={"batch_size": 4})
    seen: list[tuple[int, ...]] = []

    def dark(images: np.ndarray) -> np.ndarray:
        seen.append(images.shape)
        return images.mean((1, 2, 3)) < 128

    checked = changed(generator, checker=dark)
    plain = generator.generate(PROMPTS[:6], SEEDS[:6], four)
    assert not plain.unsafe.any()
    drawn = checked.generate(PROMPTS[:6], SEEDS[:6], four.model_copy(update={"stored_size": 16}))
    assert seen == [(4, 32, 32, 3), (2, 32, 32, 3)]  # at the size it was made, not the one that is stored
    assert np.array_equal(drawn.unsafe, plain.images.mean((1, 2, 3)) < 128)
    assert np.array_equal(checked.generate(PROMPTS[:6], SEEDS[:6], four).images, plain.images)


# ---- memory


class Short:
    """A sampler with memory for `most` images."""

    def __init__(self, inner: object, most: int, error: Callable[[], BaseException]):
        self.inner, self.most, self.error = inner, most, error
        self.asked: list[int] = []

    def draw(self, prompts: list[str], *others: object) -> torch.Tensor:
        self.asked.append(len(prompts))
        if len(prompts) > self.most:
            raise self.error()
        return self.inner.draw(prompts, *others)  # type: ignore[attr-defined]


SHORTAGES = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError,
    lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
]


def short(generator: Generator, most: int, error: Callable[[], BaseException]) -> tuple[Generator, Short]:
    made = changed(generator)
    made._sampler = Short(made._sampler, most, error)  # type: ignore[assignment]
    return made, made._sampler  # type: ignore[return-value]


@pytest.mark.parametrize("error", SHORTAGES)
def test_out_of_memory_halves_the_batch_and_changes_no_image(
    family: Callable[[str], Generator], error: Callable[[], BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    many = TINY.model_copy(update={"batch_size": 16})
    expected = family("sd1").generate(PROMPTS[:21], SEEDS[:21], many).images
    small, sampler = short(family("sd1"), 5, error)
    told: list[int] = []
    made = small.generate(PROMPTS[:21], SEEDS[:21], many, told.append).images
    assert apart(made, expected) <= 1
    assert sampler.asked == [16, 8, 4, 4, 4, 4, 4, 4]
    assert sum(told) == 21
    assert caplog.messages == ["out of memory with 16 images at once: on with fewer, which changes no image"]
    assert np.array_equal(small.generate(PROMPTS[:21], SEEDS[:21], many).images, made)
    assert sampler.asked[8:] == [4] * 6  # it is remembered
    assert len(caplog.messages) == 1


def test_no_memory_for_a_single_image_is_one_line(family: Callable[[str], Generator]) -> None:
    small, sampler = short(family("sd1"), 0, SHORTAGES[0])
    with pytest.raises(UsageError, match=r"does not hold one image of 32 pixels; give a smaller synthesize.resolution"):
        small.generate(PROMPTS[:4], SEEDS[:4], TINY.model_copy(update={"batch_size": 4}))
    assert sampler.asked == [4, 2, 1]


def test_other_errors_are_not_taken_for_lack_of_memory(family: Callable[[str], Generator]) -> None:
    broken, sampler = short(family("sd1"), 0, lambda: RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        broken.generate(PROMPTS[:4], SEEDS[:4], TINY)
    assert sampler.asked == [3]


# ---- families


@_OF_DIFFUSERS
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "sd3", "flux"])
def test_every_family(name: str, family: Callable[[str], Generator]) -> None:
    generator = family(name)
    made = generator.generate(PROMPTS[:4], SEEDS[:4], TINY).images
    assert made.shape == (4, 32, 32, 3)
    assert made.std() > 2
    assert np.array_equal(generator.generate(PROMPTS[2:4], SEEDS[2:4], TINY).images, made[2:])
    alone = generator.generate(PROMPTS[:2], SEEDS[:2], TINY.model_copy(update={"batch_size": 1})).images
    assert apart(alone, made[:2]) <= 2
    for strength in (0.0, 0.5, 1.0):
        perturbed = generator.perturb(made, PROMPTS[:4], SEEDS[:4], strength, TINY).images
        assert perturbed.shape == made.shape
        again = generator.perturb(made[1:2], PROMPTS[1:2], SEEDS[1:2], strength, TINY).images
        assert np.array_equal(again, perturbed[1:2])


@_OF_DIFFUSERS
def test_negative_prompts_where_there_is_a_branch_for_them(family: Callable[[str], Generator]) -> None:
    away = TINY.model_copy(update={"negative_prompt": "dotted fabric."})
    for name in ("sd1", "sdxl", "sd3"):
        with_it, without = (family(name).generate(PROMPTS[:1], SEEDS[:1], how).images for how in (away, TINY))
        assert not np.array_equal(with_it, without), name
    with pytest.raises(UsageError, match=r"takes no negative prompt; leave synthesize.negative_prompt empty"):
        family("flux").generate(PROMPTS[:1], SEEDS[:1], away)


def test_a_pipeline_without_a_way_from_images(family: Callable[[str], Generator]) -> None:
    pipeline = dataclasses.replace(family("sdxl").pipeline, image=None)
    images = np.zeros((1, 32, 32, 3), np.uint8)
    with pytest.raises(UsageError, match="no image-to-image pipeline for it, so it perturbs nothing"):
        Generator(pipeline, TINY).perturb(images, PROMPTS[:1], SEEDS[:1], 0.5, TINY)


def test_a_generator_serves_what_it_was_loaded_for(generator: Generator) -> None:
    assert generator.serves(QUICK.model_copy(update={"num_inference_steps": 9, "batch_size": 2}))
    assert not generator.serves(QUICK.model_copy(update={"dtype": "bfloat16"}))
    assert not generator.serves(QUICK.model_copy(update={"scheduler": "EulerDiscreteScheduler"}))


def test_float16_on_a_cpu_is_refused() -> None:
    with pytest.raises(UsageError, match=r"synthesize\.dtype: float16 takes hours on a CPU; take bfloat16 or float32"):
        load_generator("pocket", settings=SynthesizeSettings(dtype="float16"))


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


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux"])
def test_a_gpu_gives_the_pictures_of_the_cpu(name: str, family: Callable[[str], Generator], tmp_path: Path) -> None:
    here = family(name).generate(PROMPTS[:4], SEEDS[:4], TINY).images
    there = Generator(load_pipeline(str(save(name, tmp_path / name)), TINY, "cuda"), TINY)
    assert np.abs(there.generate(PROMPTS[:4], SEEDS[:4], TINY).images.astype(int) - here).mean() < 1
    assert logging.getLogger("retrieve_or_generate").level == logging.NOTSET
