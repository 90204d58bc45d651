"""Pictures of image sets for the page: strips of thumbnails as `data:` URIs.

Which pictures are shown is never chosen by eye: the first by rank of each class, which is a seeded random order.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from retrieve_or_generate.image_set import ImageSet
from retrieve_or_generate.pixels import decode, encode_jpeg, to_square
from retrieve_or_generate.report.escaping import visible
from retrieve_or_generate.report.tables import in_order, label_of, name_of

PER_STRIP, STRIPS, CLASSES, COLUMNS = 4, 2, 12, 12
"""Thumbnails side by side, strips a class (they stack on a narrow screen), most classes and sources shown of a task."""
_GAP = 2
_SHOWABLE = (
    "",
    "duplicate",
    "clip_score",
    "not_selected",
    "class_cap",
)  # of the dropped, only those dropped for no fault of content


@dataclass(frozen=True)
class Strip:
    """Thumbnails side by side in one picture."""

    uri: str
    width: int
    height: int
    words: str


@dataclass(frozen=True)
class ClassRow:
    """One class: its name, and the strips of each set in the order of the heading."""

    class_name: str
    strips: tuple[tuple[Strip, ...], ...]


@dataclass(frozen=True)
class Gallery:
    """Retrieved beside synthetic pictures of one task, class by class."""

    labels: tuple[str, ...]
    rows: tuple[ClassRow, ...]
    classes: int


@dataclass(frozen=True)
class StrengthStrip:
    """One picture of each of some classes, as retrieved and at growing strength."""

    class_names: tuple[str, ...]
    rows: tuple[tuple[str, Strip], ...]


def data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _thumbnail_size(image_set: ImageSet) -> int:
    """32 for pictures that small, 96 for all others: a page of a thousand pictures stays within some megabytes."""
    return 32 if image_set.manifest[["width", "height"]].to_numpy().max(initial=0) <= 32 else 96


def _strip(images: Sequence[bytes | None], size: int, words: str, least: int = 0) -> Strip:
    """Thumbnails from left to right, a blank for None, and blanks up to `least` of them."""
    blank = np.full((size, size, 3), 255, np.uint8)
    tiles = [blank if image is None else to_square(decode(image), size) for image in images]
    tiles += [blank] * (least - len(tiles))
    gap = np.full((size, _GAP, 3), 255, np.uint8)
    joined = np.concatenate([part for tile in tiles for part in (tile, gap)][:-1], axis=1)
    return Strip(data_uri(encode_jpeg(joined, 92), "image/jpeg"), joined.shape[1], size, visible(words))


def _class_strips(image_set: ImageSet, labels: Sequence[int]) -> dict[int, tuple[Strip, ...]]:
    """Strips of the first kept pictures of each label, all read in one pass over the shards."""
    kept = image_set.kept[image_set.kept["label"].isin(labels)].groupby("label").head(PER_STRIP * STRIPS)
    images, size = image_set.images(kept["key"].tolist()), _thumbnail_size(image_set)
    by_label: dict[int, list[bytes]] = {label: [] for label in labels}
    for label, image in zip(kept["label"], images, strict=True):
        by_label[label].append(image)
    return {
        label: tuple(
            _strip(
                mine[start : start + PER_STRIP],
                size,
                f"{image_set.class_names[label]}, {label_of(image_set)}",
                PER_STRIP,
            )
            for start in range(0, len(mine), PER_STRIP)
        )
        for label, mine in by_label.items()
    }


def gallery(sets: Sequence[ImageSet]) -> Gallery | None:
    """The first set of each source of one task, side by side; None when there is none."""
    first = {name_of(image_set): image_set for image_set in reversed(sets)}
    shown = [first[source] for source in in_order(first)][:COLUMNS]
    if not shown:
        return None
    class_names = shown[0].class_names
    labels = list(range(min(CLASSES, len(class_names))))
    strips = [_class_strips(image_set, labels) for image_set in shown]
    rows = tuple(ClassRow(visible(class_names[label]), tuple(mine[label] for mine in strips)) for label in labels)
    return Gallery(tuple(visible(label_of(image_set)) for image_set in shown), rows, len(class_names))


def _showable(image_set: ImageSet) -> pd.DataFrame:
    """Rows whose picture is stored and was not dropped for its content."""
    rows = image_set.manifest
    return rows[(rows["shard"] != "") & rows["reason"].isin(_SHOWABLE)]


def _perturbed(sets: Sequence[ImageSet]) -> pd.DataFrame:
    """Showable pictures that were made from another: columns key, label, strength, set (its index), init_key."""
    parts = []
    for index, image_set in enumerate(sets):
        rows = _showable(image_set)
        rows = rows[rows["strength"].notna()]
        init = [json.loads(origin).get("init_key") for origin in rows["origin"]]
        parts.append(rows[["key", "label", "strength"]].assign(set=index, init_key=init))
    made = pd.concat(parts)
    return made[made["init_key"].notna()].drop_duplicates(["init_key", "strength"])


def strength_strip(sets: Sequence[ImageSet], most: int = 8) -> StrengthStrip | None:
    """For up to `most` classes of one task: the retrieved picture that is there at most strengths, and what became of it."""
    origins = next((image_set for image_set in sets if image_set.source == "retrieved"), None)
    if origins is None:
        return None
    rows, made = _showable(origins).set_index("key"), _perturbed(sets)
    made = made[made["init_key"].isin(rows.index)]
    found = made.groupby("init_key").agg(label=("label", "first"), strengths=("strength", "size"))
    found["rank"] = rows["rank"].reindex(found.index).replace(-1, len(rows))
    chosen = found.reset_index().sort_values(
        ["label", "strengths", "rank", "init_key"], ascending=[True, False, True, True]
    )
    chosen = chosen.drop_duplicates("label").head(most)
    if chosen.empty:
        return None
    return _strength_rows(sets, origins, made[made["init_key"].isin(chosen["init_key"])], chosen)


def _strength_rows(
    sets: Sequence[ImageSet], origins: ImageSet, made: pd.DataFrame, chosen: pd.DataFrame
) -> StrengthStrip:
    keys, size = chosen["init_key"].tolist(), _thumbnail_size(origins)
    names = tuple(visible(origins.class_names[label]) for label in chosen["label"])
    rows = [("retrieved", _strip(origins.images(keys), size, "retrieved pictures: " + ", ".join(names)))]
    for strength, group in made.groupby("strength", sort=True):
        pictures: dict[str, bytes] = {}
        for index, mine in group.groupby("set"):
            pictures.update(zip(mine["init_key"], sets[index].images(mine["key"].tolist()), strict=True))
        words = f"the same at strength {strength:.3g}"
        rows.append((f"{strength:.3g}", _strip([pictures.get(key) for key in keys], size, words)))
    return StrengthStrip(names, tuple(rows))
