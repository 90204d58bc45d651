"""Trials that trained on an image: found from what they recorded, and marked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from retrieve_or_generate.compare.plan import TrialPlan, chosen_rows
from retrieve_or_generate.errors import IntegrityError
from retrieve_or_generate.finetune.trial import RESULT
from retrieve_or_generate.image_set import ImageSet
from retrieve_or_generate.store import read_json, write_json
from retrieve_or_generate.takedown.sets import SetFolder

STALE = "stale.json"


def mark_stale(
    folders: Sequence[Path], affected: Mapping[SetFolder, frozenset[str]], shas: frozenset[str]
) -> list[Path]:
    """Write `stale.json` into each trial that was trained on one of the images, beside its numbers; those trials."""
    versions = {sha: (one, path) for one in affected for sha, path in one.manifests.items()}
    opened: dict[str, ImageSet | None] = {}
    stale = []
    for trial, config in _trials(folders):
        for source, sha in _sets_of(config).items():
            if sha not in versions:
                continue
            image_set, manifest = versions[sha]
            if sha not in opened:
                opened[sha] = _opened(image_set, manifest)
            if _trained_on(opened[sha], affected[image_set], config, source):
                _mark(trial, shas)
                stale.append(trial)
                break
    return stale


def _sets_of(config: dict[str, Any]) -> dict[str, str]:
    """The manifests of the image sets that a trial drew from, by source: two of a mixture."""
    if "image_sets" in config:
        return dict(config["image_sets"])
    return {config["source"]: config["image_set"]} if "image_set" in config else {}


def _opened(image_set: SetFolder, manifest: Path) -> ImageSet | None:
    """The set as the trial knew it; None where that is damaged."""
    try:
        return image_set.version(manifest)
    except IntegrityError:
        return None


def _trained_on(image_set: ImageSet | None, keys: frozenset[str], config: dict[str, Any], source: str) -> bool:
    """Whether one of the keys is among the trial's; so it is taken to be where nobody can tell."""
    if image_set is None:
        return True
    plan = TrialPlan(config["task"]["name"], config["source"], config["scale"], config["seed"], config)
    return not keys.isdisjoint(chosen_rows(image_set, plan, source))


def _trials(folders: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    places = {path.parent.resolve() for folder in folders for path in folder.rglob(RESULT)}
    for place in sorted(places):
        if (place / "config.json").is_file():
            yield place, read_json(place / "config.json")


def _mark(trial: Path, shas: frozenset[str]) -> None:
    path = trial / STALE
    before = read_json(path)["takedown"] if path.is_file() else []
    write_json(path, {"takedown": sorted({*before, *shas})})
