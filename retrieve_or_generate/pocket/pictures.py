"""Which pictures the pocket world holds: evaluation splits of three tasks, and the 20,000 rows of its pool.

Everything follows from `SEED_STUDY` and names; nothing is drawn from a running count, so one task's pictures do not move when
another's number changes. What was planted is recorded with every row, for tests to compare with what a stage found.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from retrieve_or_generate.pocket import captions, drawing
from retrieve_or_generate.pocket.places import SEED_STUDY
from retrieve_or_generate.seeds import generator_for

TASKS = ("digits", "textures", "aircraft")
SPLITS = ("train", "val", "test")
POOL_ROWS = 20_000

_POOL_CLASS_ROWS = {"digits": 2400, "textures": 2800, "aircraft": 4200}
_SPLIT_ROWS = {"textures": {"train": 480, "val": 240, "test": 480}, "aircraft": {"train": 600, "val": 240, "test": 600}}
_DUPLICATES = {"exact_duplicate": 200, "near_duplicate": 200}
_EVALUATION_COPIES = {("val", True): 8, ("val", False): 8, ("test", True): 16, ("test", False): 16}  # per task


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """(h, w, 3) uint8 to JPEG bytes without chroma subsampling (at 32 pixels it would smear the colours)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=0)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    """Image bytes to (h, w, 3) uint8 RGB."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@dataclass(frozen=True)
class Labelled:
    """A picture of an evaluation split."""

    jpeg: bytes
    label: int


@dataclass(frozen=True)
class PoolRow:
    """A picture of the pool as the web knows it, and in `planted` the truth about it."""

    jpeg: bytes
    caption: str
    nsfw: str
    punsafe: float
    dead: bool = False
    planted: dict[str, Any] = field(default_factory=dict)


@cache
def _scans() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """UCI digits by split, as (n, 8, 8) scans and (n,) labels; the pool's digits are the training half."""
    digits = load_digits()
    order = generator_for(SEED_STUDY, "split digits").permutation(len(digits.images))
    half, test = order[:899], order[899:]
    parts = {"train": half, "val": test[:299], "test": test[299:]}
    return {split: (digits.images[rows], digits.target[rows]) for split, rows in parts.items()}


def evaluation_scans(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The handwriting behind one split of the digits: (n, 8, 8) scans and (n,) labels, in the order of its pictures."""
    return _scans()[split]


def _draw(
    task: str, label: int, rng: np.random.Generator, scan: np.ndarray | None
) -> tuple[np.ndarray, tuple[str, str]]:
    """A picture of class `label` and the colours it was given."""
    class_name = captions.VOCABULARIES[task].class_names[label]
    if task == "aircraft":
        colours = drawing.pick_aircraft_colours(rng)
        maker, engines = class_name.split(" ")
        return drawing.aircraft(maker, int(engines), rng, colours), colours
    if task == "digits":
        assert scan is not None
        colours = drawing.pick_ink_and_paper(rng)
        return drawing.digit(scan, rng, colours), colours
    colours = drawing.pick_colours(rng)
    return drawing.texture(class_name, rng, colours), colours


@cache
def evaluation_split(task: str, split: str) -> tuple[Labelled, ...]:
    """The pictures of one split, in the order of their keys. Classes are balanced but for the real digits'."""
    rng = generator_for(SEED_STUDY, "evaluation", task, split)
    if task == "digits":
        scans, labels = _scans()[split]
    else:
        classes = len(captions.VOCABULARIES[task].class_names)
        labels = rng.permutation(np.arange(_SPLIT_ROWS[task][split]) % classes)
        scans = np.full(len(labels), None)
    return tuple(
        Labelled(encode_jpeg(_draw(task, int(label), rng, scan)[0]), int(label))
        for scan, label in zip(scans, labels, strict=True)
    )


def _long_tail(task: str, rows: int) -> np.ndarray:
    """Labels (rows,) with frequencies that fall off as 1/(rank + 3)^0.8, the ranks in a seeded order."""
    rng = generator_for(SEED_STUDY, "long tail", task)
    classes = len(captions.VOCABULARIES[task].class_names)
    weights = 1 / (np.arange(classes) + 3) ** 0.8
    counts = np.floor(weights / weights.sum() * rows).astype(int)
    counts[: rows - counts.sum()] += 1
    return np.repeat(rng.permutation(classes), counts)


def _tags(rng: np.random.Generator) -> dict[str, Any]:
    nsfw = str(rng.choice(("UNLIKELY", "UNSURE", "NSFW", ""), p=(0.93, 0.03, 0.02, 0.02)))
    punsafe = {"NSFW": 0.97, "UNSURE": 0.4}.get(nsfw, 0.01) + float(rng.uniform(0, 0.02))
    return {"nsfw": nsfw, "punsafe": round(punsafe, 4), "dead": bool(rng.random() < 0.05)}


def _class_rows(task: str) -> Iterator[PoolRow]:
    rng = generator_for(SEED_STUDY, "pool", task)
    names = captions.VOCABULARIES[task].class_names
    for label in _long_tail(task, _POOL_CLASS_ROWS[task]):
        scan = None
        if task == "digits":
            scans, labels = _scans()["train"]
            scan = scans[rng.choice(np.flatnonzero(labels == label))]
        image, colours = _draw(task, int(label), rng, scan)
        caption, kind = captions.caption_of_class(task, names[label], rng, colours)
        planted = {"kind": "class", "task": task, "class_name": names[label], "caption_kind": kind}
        yield PoolRow(encode_jpeg(image), caption, planted=planted, **_tags(rng))


def _thing_rows(rows: int) -> Iterator[PoolRow]:
    rng = generator_for(SEED_STUDY, "pool", "things")
    for _ in range(rows):
        name, colours = str(rng.choice(captions.thing_names())), drawing.pick_colours(rng)
        caption, kind = captions.caption_of_thing(name, rng, colours)
        planted = {"kind": "distractor", "class_name": name, "caption_kind": kind}
        yield PoolRow(encode_jpeg(drawing.thing(name, rng, colours)), caption, planted=planted, **_tags(rng))


def _reencode(jpeg: bytes, rng: np.random.Generator) -> bytes:
    return encode_jpeg(decode(jpeg), quality=int(rng.integers(60, 91)))


def _duplicates(rows: list[PoolRow]) -> Iterator[PoolRow]:
    rng = generator_for(SEED_STUDY, "pool", "duplicates")
    for kind, count in _DUPLICATES.items():
        for source in rng.choice(len(rows), count, replace=False):
            row = rows[source]
            jpeg = row.jpeg if kind == "exact_duplicate" else _reencode(row.jpeg, rng)
            planted = {**row.planted, "kind": kind, "of": row.planted["id"]}
            yield replace(row, jpeg=jpeg, planted=planted, dead=False)


def _evaluation_copies() -> Iterator[PoolRow]:
    for task in TASKS:
        rng = generator_for(SEED_STUDY, "pool", "evaluation copies", task)
        names = captions.VOCABULARIES[task].class_names
        for (split, identical), count in _EVALUATION_COPIES.items():
            pictures = evaluation_split(task, split)
            for index in rng.choice(len(pictures), count, replace=False):
                picture = pictures[index]
                template = str(rng.choice(captions.VOCABULARIES[task].templates)).rstrip(".")
                yield PoolRow(
                    picture.jpeg if identical else _reencode(picture.jpeg, rng),
                    template.replace("{}", names[picture.label]),
                    nsfw="UNLIKELY",
                    punsafe=0.01,
                    planted={
                        "kind": "evaluation_copy",
                        "task": task,
                        "class_name": names[picture.label],
                        "caption_kind": "name",
                        "of": f"{task}/{split}/{index:06d}",
                        "identical": identical,
                    },
                )


@cache
def pool_rows() -> tuple[PoolRow, ...]:
    """All rows of the pool in their final order (about eight seconds on one core)."""
    rows = [row for task in TASKS for row in _class_rows(task)]
    copies = list(_evaluation_copies())
    rows += _thing_rows(POOL_ROWS - len(rows) - sum(_DUPLICATES.values()) - len(copies))
    rows = [replace(row, planted={**row.planted, "id": index}) for index, row in enumerate(rows)]
    rows += [*_duplicates(rows), *copies]
    order = generator_for(SEED_STUDY, "pool order").permutation(len(rows))
    place = {rows[i].planted["id"]: f"pool/{row:06d}" for row, i in enumerate(order) if "of" not in rows[i].planted}
    return tuple(_placed(rows[i], place) for i in order)


def _placed(row: PoolRow, place: dict[int, str]) -> PoolRow:
    """The row with the number of its original in the final order, in place of the one it had while the pool was made."""
    planted = {name: value for name, value in row.planted.items() if name != "id"}
    if isinstance(planted.get("of"), int):
        planted["of"] = place[planted["of"]]
    return replace(row, planted=planted)
