"""Embedding a folder of 256² JPEGs: `rog index embed` against open_clip + ImageFolder + DataLoader, on the same cores.

    python experiments/benchmarks/embed.py                        # light tower, 4,000 images: a minute on two cores
    python experiments/benchmarks/embed.py --tower ViT-B-32 --images 600 --repeats 3
    python experiments/benchmarks/embed.py --tower pocket         # trained weights: cosines that mean something

The light tower (one layer, patches of 32 pixels, random weights) costs next to nothing, so loading decides; ViT-B-32 has random
weights, too. Pictures are smooth noise, 18 kB each at JPEG quality 90 (4:2:0). The naive arm is open_clip's own validation
transform under `torchvision.datasets.ImageFolder` and a DataLoader with a worker a core; ours writes a whole pool (embeddings,
metadata with md5, checksums), theirs an array. Arms alternate in one process.

Seconds are of CPU, children's included, because they depend little on what else the machine does; wall seconds stand beside
them. One JSON object comes last: `ratio` is their median over ours, `outputs_equal` that every image's cosine between the arms is
at least 0.999. Random towers put all images close together, so `cosine_centred_min` is the same after the mean image was taken
out, and `cosine_of_neighbours` what two different images have.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from retrieve_or_generate.executors import core_count
from retrieve_or_generate.models import Clip, load_clip
from retrieve_or_generate.pool.embed import EmbedSettings, embed_pool
from retrieve_or_generate.pool.layout import open_pool

LIGHT = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "head_width": 32, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
}


def write_images(folder: Path, count: int, side: int, canvas: int = 2048) -> None:
    """Cuttings, in two classes, of noise so smooth that a file takes 18 kB, as ImageNet's do at 256 pixels [FFCV's benchmarks]."""
    rng = np.random.default_rng(2406)
    frequency = np.hypot(np.fft.fftfreq(canvas)[:, None], np.fft.rfftfreq(canvas)[None])
    frequency[0, 0] = 1
    grey, *colours = (
        np.fft.irfft2(rng.normal(size=(*frequency.shape, 2)) @ (1, 1j) / frequency**1.5, (canvas, canvas))
        for _ in range(4)
    )
    waves = np.stack([grey + colour / 2 for colour in colours], 2)  # channels that agree in part
    waves = 127 + 55 * (waves - waves.mean()) / waves.std()
    for number in range(count):
        top, left = rng.integers(0, canvas - side, 2)
        cutting = waves[top : top + side, left : left + side] * rng.uniform(0.7, 1.2)
        path = folder / f"class{number % 2}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(cutting.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def load_tower(name: str, folder: Path) -> tuple[Clip, Any]:
    """A model, and open_clip's transform for it."""
    torch.manual_seed(0)
    if name == "pocket":
        clip = load_clip("pocket")
        return clip, open_clip.transform.image_transform_v2(
            open_clip.transform.PreprocessCfg(**open_clip.get_model_preprocess_cfg(clip.network)), is_train=False
        )
    if name == "light":
        (folder / "light.json").write_text(json.dumps(LIGHT))
        open_clip.add_model_config(folder / "light.json")
    network, _, transform = open_clip.create_model_and_transforms(name)
    return Clip(name, network.eval(), open_clip.get_tokenizer("ViT-B-32"), name), transform


@torch.no_grad()
def naive(source: Path, clip: Clip, transform: Any, workers: int, batch_size: int) -> np.ndarray:
    loader = DataLoader(ImageFolder(str(source), transform), batch_size=batch_size, num_workers=workers)
    return torch.cat([F.normalize(clip.network.encode_image(images), dim=-1) for images, _ in loader]).numpy()


def ours(source: Path, out: Path, clip: Clip, workers: int, batch_size: int, precision: str) -> np.ndarray:
    shutil.rmtree(out, ignore_errors=True)
    settings = EmbedSettings(captions=False, images=False, precision=precision)
    embed_pool(source, out, clip, settings=settings, batch_size=batch_size, jobs=workers)
    pool = open_pool(str(out))
    return np.concatenate([pool.embeddings(shard, "image") for shard in pool.shards]).astype(np.float32)


def cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def timed(work: Callable[[], np.ndarray]) -> tuple[float, float, np.ndarray]:
    """CPU seconds, wall seconds, result."""
    started, wall = cpu_seconds(), time.monotonic()
    result = work()
    return cpu_seconds() - started, time.monotonic() - wall, result


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", default="light", help="light, pocket, or an architecture of open_clip")
    parser.add_argument("--precision", default="float32", help="of our products; theirs is float32")
    for name, default in (
        ("images", 4000),
        ("side", 256),
        ("batch_size", 256),
        ("repeats", 5),
        ("workers", core_count()),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(given.workers)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(given, Path(folder))))


def compare(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    source = folder / "images"
    write_images(source, given.images, given.side)
    clip, transform = load_tower(given.tower, folder)
    arms: dict[str, Callable[[], np.ndarray]] = {
        "rog": lambda: ours(source, folder / "pool", clip, given.workers, given.batch_size, given.precision),
        "naive": lambda: naive(source, clip, transform, given.workers, given.batch_size),
    }
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    wall: dict[str, list[float]] = {name: [] for name in arms}
    results: dict[str, np.ndarray] = {}
    for repeat in range(given.repeats):
        for name, work in arms.items():
            used, passed, results[name] = timed(work)
            cpu[name].append(used)
            wall[name].append(passed)
            print(f"{repeat + 1}/{given.repeats} {name}: {used:.2f} s of CPU, {passed:.2f} s", flush=True)
    mean = results["naive"].mean(0)
    equal = cosines(results["rog"], results["naive"])
    ratios = [theirs / own for own, theirs in zip(cpu["rog"], cpu["naive"], strict=True)]
    return {
        "name": "embed",
        "ratio": median(cpu["naive"]) / median(cpu["rog"]),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "outputs_equal": bool(len(equal) == given.images and equal.min() >= 0.999),
        "cosine_min": float(equal.min()),
        "cosine_centred_min": float(cosines(results["rog"] - mean, results["naive"] - mean).min()),
        "cosine_of_neighbours": float(np.median(cosines(results["naive"][1:], results["naive"][:-1]))),
        "ratio_wall": median(wall["naive"]) / median(wall["rog"]),
        "cpu_seconds": {name: median(values) for name, values in cpu.items()},
        "wall_seconds": {name: median(values) for name, values in wall.items()},
        "images_per_cpu_second": {name: given.images / median(values) for name, values in cpu.items()},
        "size": vars(given),
    }


if __name__ == "__main__":
    main()
