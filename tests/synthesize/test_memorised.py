"""Copies of the pool among generated images: what is planted is found, in one pass, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retrieve_or_generate.cli.options import emit_set
from retrieve_or_generate.curate.curation import curate
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.experiment import load_experiment
from retrieve_or_generate.image_set import ImageSet, ImageSetWriter
from retrieve_or_generate.models import Clip
from retrieve_or_generate.pixels import decode, encode_jpeg
from retrieve_or_generate.pocket.world import planted as planted_in_pool
from retrieve_or_generate.pool.layout import Pool, open_pool
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.settings import CurateSettings
from retrieve_or_generate.store import write_bytes
from retrieve_or_generate.synthesize import Generator, memorised, synthesize
from retrieve_or_generate.synthesize.memorised import KnownPool, memorised_step
from retrieve_or_generate.tasks import Task
from retrieve_or_generate.weights import POCKET_WEIGHTS

from .conftest import QUICK

ALL = CurateSettings(keep_fraction=None, decontaminate=False, least_per_class=0)
ROWS = (40, 41, 700, 1500)
"""Rows of the pool that are planted."""


@pytest.fixture(scope="module")
def pool() -> Pool:
    return open_pool("pocket")


@pytest.fixture(scope="module")
def planted(pool: Pool, task: Task) -> list[bytes]:
    """Four pictures of the pool re-encoded, as they are, brighter by a little or smaller; then pictures that are not in it."""
    copies = [decode(data) for data in pool.image_bytes(ROWS).values()]
    assert len(copies) == len(ROWS)
    drawn = np.random.default_rng(0).integers(0, 255, (8, 4, 4, 3), dtype=np.uint8)
    new = [np.kron(picture, np.ones((8, 8, 1), np.uint8)) for picture in drawn]
    return [
        *(encode_jpeg(copy, quality) for copy, quality in zip(copies, (95, 80, 70, 90), strict=True)),
        *map(encode_jpeg, new),
    ]


def _write(folder: Path, task: Task, images: Sequence[bytes]) -> Path:
    names: dict[str, Any] = {"task": task.name, "source": "synthetic", "class_names": task.class_names}
    with ImageSetWriter(folder, key="k", config={}, **names) as writer:
        for i, image in enumerate(images):
            writer.add(key=f"{i:06d}", label=i % 3, caption="", origin={}, query="", image=image)
        writer.finish()
    return folder


@pytest.fixture
def look(task: Task, clip: Clip, retrieved: ImageSet, pool: Pool) -> Any:
    """Curates a folder with the search for copies as its only step."""

    def curated(folder: Path, rule: Any = "report", known: KnownPool | None = None, **settings: object) -> ImageSet:
        chosen = ALL.model_copy(update=settings)
        step = memorised_step(rule, known or KnownPool(pool, "pocket"), retrieved, chosen, folder)
        return curate(folder, task=task, clip=clip, settings=chosen, steps=[step] if step else [])

    return curated


def test_planted_copies_are_found_and_reported(look: Any, task: Task, planted: list[bytes], tmp_path: Path) -> None:
    made = look(_write(tmp_path / "s", task, planted))
    told = made.record["memorised"]
    assert {pair["key"]: pair["row"] for pair in told["pairs"]} == {f"{i:06d}": row for i, row in enumerate(ROWS)}
    assert all(pair["cosine"] >= 0.98 for pair in told["pairs"])
    assert (told["rule"], told["checked"], told["found"], told["unseen"]) == ("report", len(planted), len(ROWS), 0)
    assert told["nearest_cosine"]["max"] >= told["nearest_cosine"]["p99"] >= told["nearest_cosine"]["median"]
    assert (made.manifest["status"] == "kept").all()


def test_a_user_is_told(
    look: Any, task: Task, planted: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    emit_set(look(_write(tmp_path / "s", task, planted), "drop"), as_json=True)
    text, last = capsys.readouterr().out.rsplit("\n", 2)[:2]
    assert "(dropped: 4 memorised)" in text
    assert text.endswith("copies of the pool: 4 of 12 images looked for")
    assert len(json.loads(last)["memorised"]["pairs"]) == 4


def test_they_are_dropped_when_asked_for(look: Any, task: Task, planted: list[bytes], tmp_path: Path) -> None:
    made = look(_write(tmp_path / "s", task, planted), "drop")
    dropped = made.manifest[made.manifest["reason"] == "memorised"]
    assert dropped["key"].tolist() == [f"{i:06d}" for i in range(len(ROWS))]
    assert (dropped["rank"] == -1).all()
    assert len(made.kept) == len(planted) - len(ROWS)
    assert made.record["memorised"]["found"] == len(ROWS)
    assert made.record["curation"]["steps"]["memorised"]["rule"] == "drop"


def test_only_what_is_kept_is_reported_on(look: Any, task: Task, planted: list[bytes], tmp_path: Path) -> None:
    made = look(_write(tmp_path / "s", task, planted), class_cap=1)
    kept = set(made.kept["key"])
    assert made.record["memorised"]["checked"] == len(kept) == 3
    assert {pair["key"] for pair in made.record["memorised"]["pairs"]} == {f"{i:06d}" for i in range(4)} & kept


def test_it_is_off_where_that_is_asked_for(look: Any, task: Task, planted: list[bytes], tmp_path: Path) -> None:
    made = look(_write(tmp_path / "s", task, planted), "off")
    assert "memorised" not in made.record
    assert not (tmp_path / "s" / ".memorised").exists()


def test_without_a_pool_the_record_says_so(
    task: Task, clip: Clip, retrieved: ImageSet, planted: list[bytes], tmp_path: Path
) -> None:
    step = memorised_step("report", None, retrieved, ALL, tmp_path)
    assert step is not None
    made = curate(_write(tmp_path / "s", task, planted), task=task, clip=clip, settings=ALL, steps=[step])
    assert made.record["memorised"] == {
        "rule": "report", "checked": 0, "found": 0, "pairs": [], "why": "the pool is not at hand"
    }  # fmt: skip


def test_the_pool_is_passed_once_and_only_for_images_that_are_new(
    look: Any, task: Task, planted: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = memorised.scan_pool
    monkeypatch.setattr(
        memorised, "scan_pool", lambda pool, xq, *a, **k: asked.append(len(xq)) or real(pool, xq, *a, **k)
    )
    first = look(_write(tmp_path / "s", task, planted[:10])).record["memorised"]
    (tmp_path / "s" / "image_set.json").unlink()
    assert look(tmp_path / "s").record["memorised"] == first
    assert asked == [10]
    (tmp_path / "s" / "image_set.json").unlink()
    more = look(_write(tmp_path / "s", task, planted)).record["memorised"]
    assert asked == [10, 2]
    write_bytes(tmp_path / "s" / ".memorised" / "nearest.npz", b"damaged")
    (tmp_path / "s" / "image_set.json").unlink()
    assert look(tmp_path / "s").record["memorised"] == more
    assert asked == [10, 2, 12]
    assert sorted(path.name for path in (tmp_path / "s" / ".memorised").iterdir()) == ["nearest.json", "nearest.npz"]


def test_a_pool_without_pictures_is_compared_by_those_that_were_retrieved(
    look: Any, task: Task, clip: Clip, planted: list[bytes], pool: Pool, tmp_path: Path
) -> None:
    bare = replace(pool, shards=tuple(replace(shard, images=None) for shard in pool.shards))
    names: dict[str, Any] = {"task": task.name, "source": "retrieved", "class_names": task.class_names}
    with ImageSetWriter(tmp_path / "r", key="k", config={}, **names) as writer:
        for row in ROWS[:2]:
            told = {"pool": pool.name, "row": row, "url": ""}
            image = pool.image_bytes([row])[row]
            writer.add(key=f"{row:010d}", label=0, caption="", origin=told, query="", image=image)
        writer.finish()
    like = curate(tmp_path / "r", task=task, clip=clip, settings=ALL)
    step = memorised_step("report", KnownPool(bare, "pocket"), like, ALL, tmp_path / "s")
    assert step is not None
    folder = _write(tmp_path / "s", task, planted)
    told = curate(folder, task=task, clip=clip, settings=ALL, steps=[step]).record["memorised"]
    assert [pair["row"] for pair in told["pairs"]] == list(ROWS[:2])
    assert told["unseen"] == 2


def test_a_pool_that_another_model_embedded_is_searched_with_it(
    look: Any, task: Task, planted: list[bytes], pool: Pool, tmp_path: Path
) -> None:
    folder = str(POCKET_WEIGHTS / "clip")
    elsewhere = replace(pool, model=folder)
    made = look(_write(tmp_path / "s", task, planted), known=KnownPool(elsewhere, folder))
    assert [pair["row"] for pair in made.record["memorised"]["pairs"]] == list(ROWS)


def test_a_pool_of_another_model_is_refused(pool: Pool) -> None:
    with pytest.raises(
        UsageError, match=r"holds embeddings of model 'pocket', not of 'ViT-B-32/openai'.*retrieve\.model"
    ):
        KnownPool(pool, "ViT-B-32/openai")


def test_off_is_a_word_though_yaml_takes_it_for_a_truth_value() -> None:
    assert load_experiment(overrides=("synthesize.memorised=off",)).synthesize.memorised == "off"
    with pytest.raises(
        UsageError, match=r"synthesize\.memorised: input should be 'report', 'drop' or 'off', not 'True'"
    ):
        load_experiment(overrides=("synthesize.memorised=on",))


def test_a_pool_of_other_dimensions_is_refused(
    look: Any, task: Task, planted: list[bytes], pool: Pool, tmp_path: Path
) -> None:
    other = replace(pool, dim=pool.dim + 1, model="unknown")
    with pytest.raises(UsageError, match=rf"of {pool.dim + 1} dimensions, but 'pocket' gives {pool.dim}"):
        look(_write(tmp_path / "s", task, planted), known=KnownPool(other, "pocket"))


class Parrot(Generator):
    """A generator that gives back a picture of the pool where it is asked with one of these seeds."""

    def __init__(self, generator: Generator, pictures: dict[int, np.ndarray]):
        self.__dict__.update(vars(generator))
        self._pictures = pictures

    def generate(self, prompts: Sequence[str], seeds: Sequence[int], *more: Any, **named: Any) -> Any:
        drawn = super().generate(prompts, seeds, *more, **named)
        images = drawn.images.copy()
        for place, seed in enumerate(seeds):
            if seed in self._pictures:
                images[place] = self._pictures[seed]
        return replace(drawn, images=images)


@pytest.mark.parametrize("rule", ["report", "drop"])
def test_a_generator_that_repeats_its_pool_is_caught(
    rule: Any, task: Task, retrieved: ImageSet, generator: Generator, clip: Clip, pool: Pool, tmp_path: Path
) -> None:
    """What is dropped is made anew, so that the classes have the numbers of the retrieved set all the same."""
    settings = QUICK.model_copy(update={"memorised": rule, "num_inference_steps": 1})
    first = [seed_for("synthesize", "noise", task.name, name, 0) for name in task.class_names[:3]]
    rows = _rows_of(task, 3)
    pictures = dict(zip(first, (decode(pool.image_bytes([row])[row]) for row in rows), strict=True))
    parrot = Parrot(generator, pictures)
    made = synthesize(task, retrieved, parrot, clip, tmp_path / "s", settings, ALL, known=KnownPool(pool, "pocket"))
    told = made.record["memorised"]
    assert [pair["row"] for pair in told["pairs"]] == rows
    seeds = {row.key: json.loads(row.origin)["seed"] for row in made.manifest.itertuples()}
    assert [seeds[pair["key"]] for pair in told["pairs"]] == first
    assert (made.counts() == retrieved.counts()).all()
    assert (made.manifest["reason"] == "memorised").sum() == (3 if rule == "drop" else 0)


def _rows_of(task: Task, count: int) -> list[int]:
    """Rows of the pool that show the first classes of the task and copy no evaluation image."""
    truth = planted_in_pool().to_pandas()
    mine = truth[(truth["task"] == task.name) & (truth["kind"] != "evaluation_copy")]
    return [int(mine.loc[mine["class_name"] == name, "row"].iloc[4]) for name in task.class_names[:count]]
