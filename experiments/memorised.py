"""How much a copy may be changed until it is no longer found: images of the pocket pool, changed and looked for in it.

    python experiments/memorised.py runs/pocket

Reads the retrieved sets of a run on the pocket world. Prints, for each task and change, the share of images whose own row is among
the ten nearest, that reach the cosine, whose thumbnails agree, and that are found (all three). Last, how many of all images that
were generated for the task, kept or not, reach the cosine with a row of the pool, and how many of them are taken for a copy.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from retrieve_or_generate.curate import thumbnail
from retrieve_or_generate.image_set import ImageSet, load_image_set
from retrieve_or_generate.models import Clip, image_features, load_clip
from retrieve_or_generate.pixels import decode, decode_all, encode_jpeg
from retrieve_or_generate.pool.layout import Pool, open_pool
from retrieve_or_generate.pool.scan import scan_pool
from retrieve_or_generate.settings import CurateSettings, SynthesizeSettings
from retrieve_or_generate.synthesize import Generator, load_generator
from retrieve_or_generate.synthesize.memorised import NEIGHBOURS

STRENGTHS = (0.0, 0.13, 0.25, 0.4)
COSINE = CurateSettings().duplicate_cosine

Change = Callable[[np.ndarray], np.ndarray]
"""(s, s, 3) uint8 to the same."""


def resized(side: int) -> Change:
    """Down to `side` pixels and back."""

    def change(image: np.ndarray) -> np.ndarray:
        small = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
        return np.asarray(small.resize((image.shape[1], image.shape[0]), Image.Resampling.BICUBIC))

    return change


def cropped(image: np.ndarray) -> np.ndarray:
    """A sixteenth off every edge, then back to size."""
    edge = len(image) // 16
    inner = Image.fromarray(image[edge:-edge, edge:-edge])
    return np.asarray(inner.resize((image.shape[1], image.shape[0]), Image.Resampling.BICUBIC))


CHANGES: dict[str, Change] = {
    "none": lambda image: image,
    "JPEG 60": lambda image: decode(encode_jpeg(image, 60)),
    "half size and back": resized(16),
    "cropped": cropped,
}


def shares(changed: np.ndarray, original: np.ndarray, rows: np.ndarray, pool: Pool, clip: Clip) -> list[str]:
    """Of (n, 3, s, s) images and their originals, the pool's `rows`."""
    cosines, found = scan_pool(pool, image_features(clip, changed), NEIGHBOURS)["image"]
    own = found == rows[:, None]
    near = (own & (cosines >= COSINE)).any(1)
    alike = thumbnail.agree(thumbnail.describe(changed), thumbnail.describe(original))
    return [f"{share.mean():.3f}" for share in (own.any(1), near, alike, near & alike)]


def seen(images: np.ndarray, clip: Clip) -> np.ndarray:
    """(n, s, s, 3) images as they are stored and looked at, (n, 3, s, s)."""
    return decode_all([encode_jpeg(image) for image in images], clip.image_size)


def report(retrieved: ImageSet, pool: Pool, clip: Clip, generator: Generator) -> None:
    kept = retrieved.kept
    rows = np.array([json.loads(origin)["row"] for origin in kept["origin"]])
    original = decode_all(retrieved.images(kept["key"].tolist()), clip.image_size)
    images = original.transpose(0, 2, 3, 1)
    for name, change in CHANGES.items():
        changed = seen(np.stack([change(image) for image in images]), clip)
        print(f"| {retrieved.task} | {name} | {' | '.join(shares(changed, original, rows, pool, clip))} |", flush=True)
    prompts = [f"a photo of a {name}" for name in kept["class_name"]]
    for strength in STRENGTHS:
        drawn = generator.perturb(list(images), prompts, range(len(rows)), strength, SynthesizeSettings())
        told = shares(seen(drawn.images, clip), original, rows, pool, clip)
        print(f"| {retrieved.task} | strength {strength:g} | {' | '.join(told)} |", flush=True)


def report_generated(synthetic: ImageSet, pool: Pool, clip: Clip) -> None:
    keys = synthetic.manifest.loc[synthetic.manifest["shard"] != "", "key"].tolist()
    images = decode_all(synthetic.images(keys), clip.image_size)
    cosines, found = scan_pool(pool, image_features(clip, images), NEIGHBOURS)["image"]
    place, column = (cosines >= COSINE).nonzero()
    rows = found[place, column]
    there = pool.image_bytes(np.unique(rows).tolist())
    place, rows = place[np.isin(rows, list(there))], rows[np.isin(rows, list(there))]
    others = decode_all([there[row] for row in rows.tolist()], clip.image_size)
    copies = thumbnail.agree(thumbnail.describe(images[place]), thumbnail.describe(others))
    near, taken = len(set(place.tolist())), len(set(place[copies].tolist()))
    print(f"{synthetic.task}: of {len(keys)} generated images {near} reach the cosine, {taken} are taken for copies")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run on the pocket world")
    arguments = parser.parse_args()
    pool, clip, generator = open_pool("pocket"), load_clip("pocket"), load_generator("pocket")
    print("| task | change | own row near | cosine | thumbnails | found |\n|---|---|---|---|---|---|")
    for folder in sorted((arguments.run / "sets").glob("*/retrieved")):
        report(load_image_set(folder), pool, clip, generator)
    for folder in sorted((arguments.run / "sets").glob("*/synthetic")):
        report_generated(load_image_set(folder), pool, clip)


if __name__ == "__main__":
    main()
