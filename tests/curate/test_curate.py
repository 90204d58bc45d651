"""The whole of curation on the pocket world: what was planted is found, nothing is lost, and order and source change nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate.curate import perceptual, thumbnail
from retrieve_or_generate.curate.curation import Described, curate, decide
from retrieve_or_generate.curate.descriptor import find_descriptor
from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.image_set import (
    CANDIDATES,
    MANIFEST_TABLE,
    SEAL,
    ImageSet,
    ImageSetWriter,
    load_image_set,
)
from retrieve_or_generate.models import Clip, load_clip
from retrieve_or_generate.pixels import decode, encode_jpeg
from retrieve_or_generate.settings import CurateSettings
from retrieve_or_generate.tasks import Task, load_task

Candidate = tuple[str, int, bytes | None, str]


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("textures")


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip("pocket")


@pytest.fixture(scope="module")
def candidates(task: Task) -> list[Candidate]:
    """64 training images, 6 copies of some, 6 copies of evaluation images (half re-encoded), and some that never came."""
    train, val, test = (task.split(name) for name in ("train", "val", "test"))
    rows: list[Candidate] = [(f"train-{i:03d}", int(train.labels[i]), train.images[i], "") for i in range(64)]
    for i in range(3):
        rows.append((f"same-{i}", int(train.labels[i]), train.images[i], ""))
        rows.append((f"near-{i}", int(train.labels[i + 9]), encode_jpeg(decode(train.images[i + 9]), 70), ""))
        rows.append((f"val-{i}", int(val.labels[i]), val.images[i], ""))
        rows.append((f"test-{i}", int(test.labels[i]), encode_jpeg(decode(test.images[i]), 60 + 10 * i), ""))
    rows += [("dead", 0, None, "dead_link"), ("nsfw", 1, train.images[70], "nsfw"), ("html", 2, b"<html>", "")]
    return rows


def _write(folder: Path, task: Task, rows: Iterable[Candidate], source: str = "retrieved") -> Path:
    writer = ImageSetWriter(folder, task=task.name, source=source, key="k", class_names=task.class_names, config={})
    with writer:
        for key, label, image, reason in rows:
            writer.add(key=key, label=label, caption="", origin={}, query="", image=image, reason=reason)
        writer.finish()
    return folder


def _curated(folder: Path, task: Task, clip: Clip, rows: Iterable[Candidate], **settings: object) -> ImageSet:
    chosen = CurateSettings.model_validate({"keep_fraction": 0.5, **settings})
    return curate(_write(folder, task, rows), task=task, clip=clip, settings=chosen)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def _decisions(image_set: ImageSet) -> pd.DataFrame:
    columns = ["clip_score", "status", "reason", "rank"]
    return image_set.manifest.set_index("key").sort_index()[columns]


def test_what_was_planted_is_found(tmp_path: Path, task: Task, clip: Clip, candidates: list[Candidate]) -> None:
    image_set = _curated(tmp_path, task, clip, candidates)
    reasons = image_set.manifest.set_index("key")["reason"]
    assert (reasons[[f"{split}-{i}" for split in ("val", "test") for i in range(3)]] == "contaminated").all()
    assert (reasons == "contaminated").sum() == 6
    copies = image_set.record["evaluation_copies"]
    assert copies == {f"{split}-{i}": f"{split}/{i:06d}" for split in ("val", "test") for i in range(3)}
    for i in range(3):
        assert "duplicate" in (reasons[f"same-{i}"], reasons[f"train-{i:03d}"])
        assert "duplicate" in (reasons[f"near-{i}"], reasons[f"train-{i + 9:03d}"])
    assert (reasons == "duplicate").sum() == 6
    assert reasons[["dead", "nsfw", "html"]].tolist() == ["dead_link", "nsfw", "undecodable"]


def test_images_of_a_shift_go_too_and_a_set_made_before_it_is_looked_at_again(
    tmp_path: Path, task: Task, clip: Clip, candidates: list[Candidate]
) -> None:
    before = _curated(tmp_path, task, clip, candidates)
    assert "shifts" not in before.record["curation"]
    mirrored = SimpleNamespace(read=lambda: task.split("train").take(np.arange(20, 24)))
    shifted = dataclasses.replace(task, shifts={"mirrored": mirrored})
    settings = CurateSettings(keep_fraction=0.5)
    after = curate(tmp_path, task=shifted, clip=clip, settings=settings)
    reasons = after.manifest.set_index("key")["reason"]
    assert (reasons[[f"train-{i:03d}" for i in range(20, 24)]] == "contaminated").all()
    assert after.record["evaluation_copies"]["train-020"] == "mirrored/000020"
    assert after.record["curation"]["shifts"] == shifted.shift_fingerprints
    settings = CurateSettings(keep_fraction=0.5, decontaminate_against=("val",))
    assert "shifts" not in curate(tmp_path, task=shifted, clip=clip, settings=settings).record["curation"]


@pytest.mark.parametrize("score", ["mean", "max"])
def test_templates_may_ask_for_the_article(
    score: str, tmp_path: Path, task: Task, clip: Clip, candidates: list[Candidate]
) -> None:
    def scores(*templates: str) -> list[float]:
        said = dataclasses.replace(task, templates=templates)
        made = _curated(
            tmp_path / str(len(list(tmp_path.iterdir()))), said, clip, candidates[:9], score=score, least_per_class=0
        )
        return made.manifest["clip_score"].tolist()

    assert scores("{a} {} texture") == scores("a {} texture") != scores("the {} texture")


def test_candidates_are_the_kept_and_the_reasons(
    tmp_path: Path, task: Task, clip: Clip, candidates: list[Candidate]
) -> None:
    image_set = _curated(tmp_path, task, clip, candidates, class_cap=3)
    manifest = image_set.manifest
    assert len(manifest) == len(candidates)
    assert ((manifest["status"] == "kept") == (manifest["reason"] == "")).all()
    assert set(manifest["status"]) == {"kept", "dropped"}
    for counts in image_set.record["counts"].values():
        assert counts["candidates"] == sum(counts.values()) - counts["candidates"]
    assert image_set.counts().max() == 3
    assert "class_cap" in set(manifest["reason"])
    for _, kept in image_set.kept.groupby("label"):
        assert kept["rank"].tolist() == list(range(len(kept)))
    assert (manifest.loc[manifest["status"] == "dropped", "rank"] == -1).all()
    scored = manifest["clip_score"].notna()
    assert (scored == (manifest["shard"] != "")).all()


def test_the_best_share_of_each_class_stays(
    tmp_path: Path, task: Task, clip: Clip, candidates: list[Candidate]
) -> None:
    manifest = _curated(tmp_path, task, clip, candidates).manifest
    judged = manifest[manifest["reason"].isin(["", "clip_score"])]
    for _, rows in judged.groupby("label"):
        kept = rows["status"] == "kept"
        assert kept.sum() == np.ceil(0.5 * len(rows))
        assert rows[kept]["clip_score"].min() >= rows[~kept]["clip_score"].max()


def test_neither_order_nor_source_changes_a_decision(
    tmp_path: Path, task: Task, clip: Clip, candidates: list[Candidate]
) -> None:
    first = _curated(tmp_path / "a", task, clip, candidates)
    shuffled = [candidates[i] for i in np.random.default_rng(0).permutation(len(candidates))]
    folder = _write(tmp_path / "b", task, shuffled, source="synthetic")
    second = curate(folder, task=task, clip=clip, settings=CurateSettings(keep_fraction=0.5))
    assert second.source == "synthetic"
    pd.testing.assert_frame_equal(_decisions(first), _decisions(second))
    assert first.kept["key"].tolist() == second.kept["key"].tolist()


def test_two_runs_give_the_same_bytes_and_a_third_does_nothing(
    tmp_path: Path, task: Task, clip: Clip, candidates: list[Candidate]
) -> None:
    for name in ("a", "b"):
        _curated(tmp_path / name, task, clip, candidates)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")
    before = _stamps(tmp_path / "a")
    again = curate(tmp_path / "a", task=task, clip=clip, settings=CurateSettings(keep_fraction=0.5))
    assert again.counts().sum() > 0
    assert _stamps(tmp_path / "a") == before


def test_curation_that_was_cut_short_is_done_again_to_the_same_bytes(
    tmp_path: Path, task: Task, clip: Clip, candidates: list[Candidate]
) -> None:
    _curated(tmp_path, task, clip, candidates)
    before = _files(tmp_path)
    (tmp_path / SEAL).unlink()
    curate(tmp_path, task=task, clip=clip, settings=CurateSettings(keep_fraction=0.5))
    assert _files(tmp_path) == before


def test_other_settings_decide_anew_from_the_same_candidates(
    tmp_path: Path, task: Task, clip: Clip, candidates: list[Candidate]
) -> None:
    _curated(tmp_path, task, clip, candidates)
    loose = CurateSettings(keep_fraction=1, decontaminate=False, deduplicate=False)
    everything = curate(tmp_path, task=task, clip=clip, settings=loose)
    assert everything.counts().sum() == len(candidates) - 3
    assert load_image_set(tmp_path).record["curation"]["settings"]["decontaminate"] is False


def test_candidates_of_nothing_make_an_empty_set(tmp_path: Path, task: Task, clip: Clip) -> None:
    image_set = _curated(tmp_path, task, clip, [("dead", 0, None, "dead_link")], least_per_class=0)
    assert image_set.counts().tolist() == [0] * len(task.class_names)
    assert image_set.record["counts"][task.class_names[0]] == {"candidates": 1, "kept": 0, "dead_link": 1}


def test_what_cannot_be_curated_is_named(tmp_path: Path, task: Task, clip: Clip, candidates: list[Candidate]) -> None:
    with pytest.raises(UsageError, match="no finished candidates"):
        curate(tmp_path / "nowhere", task=task, clip=clip, settings=CurateSettings())
    folder = _write(tmp_path / "set", task, candidates)
    with pytest.raises(UsageError, match="candidates for task 'textures', not for 'digits'"):
        curate(folder, task=load_task("digits"), clip=clip, settings=CurateSettings())
    data = (folder / "00000.tar").read_bytes()
    (folder / "00000.tar").write_bytes(data[:-1] + b"x")
    with pytest.raises(IntegrityError, match=r"00000\.tar"):
        curate(folder, task=task, clip=clip, settings=CurateSettings())
    assert not (folder / SEAL).exists()
    assert not (folder / MANIFEST_TABLE).exists()
    (folder / "00000.tar").write_bytes(data)
    (folder / CANDIDATES).unlink()
    with pytest.raises(IntegrityError, match=r"candidates\.parquet: missing"):
        curate(folder, task=task, clip=clip, settings=CurateSettings())


_PICTURES = np.random.default_rng(1).integers(0, 256, (6, 3, 8, 8)).repeat(4, 2).repeat(4, 3).astype(np.uint8)
_rows = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 5)), max_size=24)


def _described(drawn: list[tuple[int, int, int]]) -> Described:
    """Rows of (picture, label, score in sixths)."""
    shown, labels, scores = np.array(drawn, np.int64).reshape(-1, 3).T
    return Described(
        keys=np.array([f"k{i:02d}" for i in range(len(drawn))], dtype="<U3"),
        labels=labels,
        sha256=np.array([f"h{i % 7}{picture}" for i, picture in enumerate(shown)], dtype="<U4"),
        features=np.eye(6, dtype=np.float32)[shown],
        descriptors=thumbnail.describe(_PICTURES[shown]),
        hashes=perceptual.describe(_PICTURES[shown]),
        scores=(scores / 6).astype(np.float32),
    )


_chosen = st.builds(
    CurateSettings,
    keep_fraction=st.none() | st.floats(0.01, 1),
    least_score=st.none() | st.floats(0, 1),
    class_cap=st.integers(1, 5),
    deduplicate=st.booleans(),
    perceptual_hash_bits=st.none() | st.just(2),
    semantic_cosine=st.none() | st.just(0.9),
)
THUMBNAIL = find_descriptor(CurateSettings())


@settings(deadline=None, max_examples=50)
@given(_rows, _chosen)
def test_deciding_again_on_what_was_kept_drops_nothing(
    drawn: list[tuple[int, int, int]], chosen: CurateSettings
) -> None:
    described = _described(drawn)
    reasons, copied = decide(described, None, chosen, THUMBNAIL)
    assert not copied
    assert set(reasons) <= {"", "duplicate", "clip_score", "class_cap"}
    for label in set(described.labels.tolist()):
        judged = (described.labels == label) & (reasons != "duplicate")
        best = int(np.ceil(np.round((chosen.keep_fraction or 1) * judged.sum(), 9)))
        reaching = int((described.scores[judged] >= (chosen.least_score or 0)).sum())
        assert (reasons[judged] == "").sum() == min(chosen.class_cap, best, reaching)
    left = described.take(np.flatnonzero(reasons == ""))
    again, _ = decide(left, None, chosen.model_copy(update={"keep_fraction": None}), THUMBNAIL)
    assert (again == "").all()


@settings(deadline=None, max_examples=50)
@given(_rows, _chosen, st.randoms())
def test_rows_may_come_in_any_order(drawn: list[tuple[int, int, int]], chosen: CurateSettings, random: object) -> None:
    described, order = _described(drawn), list(range(len(drawn)))
    random.shuffle(order)  # type: ignore[attr-defined]
    reasons, _ = decide(described, None, chosen, THUMBNAIL)
    moved, _ = decide(described.take(np.array(order, np.int64)), None, chosen, THUMBNAIL)
    assert np.array_equal(moved, reasons[order])
