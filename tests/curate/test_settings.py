"""What each setting of curation does to a set, and what is kept between two curations of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieve_or_generate.curate.curation import curate
from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.experiment import load_experiment
from retrieve_or_generate.image_set import MANIFEST_TABLE, SEAL, ImageSet, ImageSetWriter, read_table
from retrieve_or_generate.models import Clip, load_clip, text_features
from retrieve_or_generate.settings import CurateSettings
from retrieve_or_generate.tasks import Task, load_task

PER_CLASS = 6


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("textures")


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip("pocket")


def _write(
    folder: Path, task: Task, per_class: Sequence[int], source: str = "retrieved", dead: Sequence[int] = ()
) -> Path:
    """The first training images of each class, as many as `per_class` says, and a dead link of each class in `dead`."""
    train = task.split("train")
    with ImageSetWriter(
        folder, task=task.name, source=source, key="k", class_names=task.class_names, config={}
    ) as writer:
        for label, count in enumerate(per_class):
            for row in np.flatnonzero(train.labels == label)[:count].tolist():
                writer.add(key=f"i{row:04d}", label=label, caption="", origin={}, query="", image=train.images[row])
        for label in dead:
            writer.add(key=f"x{label}", label=label, caption="", origin={}, query="", image=None, reason="dead_link")
        writer.finish()
    return folder


def _curate(folder: Path, task: Task, clip: Clip, excluded: Sequence[str] = (), **chosen: object) -> ImageSet:
    settings = CurateSettings.model_validate(chosen)
    return curate(folder, task=task, clip=clip, settings=settings, excluded=excluded)


@pytest.fixture
def six(tmp_path: Path, task: Task) -> Path:
    return _write(tmp_path / "set", task, [PER_CLASS] * len(task.class_names))


def test_a_score_may_have_a_floor_a_share_both_or_neither(six: Path, task: Task, clip: Clip) -> None:
    everything = _curate(six, task, clip, keep_fraction=None)
    assert everything.counts().tolist() == [PER_CLASS] * len(task.class_names)
    scores = everything.manifest["clip_score"]
    floor = float(scores.sort_values().iloc[5])
    above = _curate(six, task, clip, keep_fraction=None, least_score=floor, least_per_class=0)
    assert len(above.kept) == len(scores) - 5
    assert above.kept["clip_score"].min() >= floor
    both = _curate(six, task, clip, keep_fraction=0.5, least_score=floor, least_per_class=0)
    half = _curate(six, task, clip, keep_fraction=0.5)
    assert set(both.kept["key"]) == set(half.kept["key"]) & set(above.kept["key"])
    assert half.counts().tolist() == [PER_CLASS / 2] * len(task.class_names)


def test_the_best_template_may_score(six: Path, task: Task, clip: Clip) -> None:
    mean = _curate(six, task, clip, keep_fraction=None).manifest
    best = _curate(six, task, clip, keep_fraction=None, score="max").manifest
    from retrieve_or_generate.models import image_features
    from retrieve_or_generate.pixels import decode_all

    shown = _curate(six, task, clip, keep_fraction=None).images(mean["key"].tolist())
    features = image_features(clip, decode_all(shown, clip.image_size))
    for row, name in enumerate(mean["class_name"]):
        texts = text_features(clip, [template.format(name) for template in task.templates])
        assert best["clip_score"][row] == pytest.approx((texts @ features[row]).max(), abs=1e-5)
    assert not np.allclose(mean["clip_score"], best["clip_score"]) or len(task.templates) == 1


def test_training_images_are_contamination_when_they_are_said_to_be(six: Path, task: Task, clip: Clip) -> None:
    assert len(_curate(six, task, clip, keep_fraction=None).kept)
    against = {"decontaminate_against": ["train"], "least_per_class": 0}
    nothing = _curate(six, task, clip, keep_fraction=None, **against)
    assert set(nothing.manifest["reason"]) == {"contaminated"}
    assert all(key.startswith("train/") for key in nothing.record["evaluation_copies"].values())


def test_a_class_that_ends_too_small_is_an_error_that_says_why(tmp_path: Path, task: Task, clip: Clip) -> None:
    counts = [PER_CLASS] * len(task.class_names)
    counts[2], counts[5] = 0, 2
    folder = _write(tmp_path / "set", task, counts, dead=[2])
    two, five = task.class_names[2], task.class_names[5]
    words = (
        rf"{two!r} keeps 0 of 1 candidates \(1 dead_link\); {five!r} keeps 1 of 2 candidates \(1 clip_score\), "
        "under .*least_per_class=2"
    )
    with pytest.raises(UsageError, match=words) as caught:
        _curate(folder, task, clip, keep_fraction=0.5, least_per_class=2)
    assert "curate.on_short_class=exclude" in str(caught.value)
    assert not (folder / SEAL).exists()
    assert (read_table(folder / MANIFEST_TABLE).to_pandas()["reason"] == "clip_score").sum() > 0
    with pytest.raises(UsageError, match=rf"{two!r} keeps 0 of 1 candidates \(1 dead_link\), under"):
        _curate(folder, task, clip, keep_fraction=0.5)


def test_a_class_left_out_is_named_and_no_label_moves(tmp_path: Path, task: Task, clip: Clip) -> None:
    counts = [PER_CLASS] * len(task.class_names)
    counts[2], counts[5] = 0, 2
    folder = _write(tmp_path / "set", task, counts)
    left = _curate(folder, task, clip, keep_fraction=0.5, least_per_class=2, on_short_class="exclude")
    assert left.excluded == (task.class_names[2], task.class_names[5])
    assert left.class_names == task.class_names
    assert left.counts().tolist() == [0 if label in (2, 5) else 3 for label in range(len(counts))]
    assert left.record["counts"][task.class_names[5]] == {"candidates": 2, "kept": 0, "clip_score": 1, "short_class": 1}
    train = task.split("train")
    for key, label in zip(left.kept["key"], left.kept["label"], strict=True):
        assert train.labels[int(key[1:])] == label
    for counts_of_class in left.record["counts"].values():
        assert counts_of_class["candidates"] == sum(counts_of_class.values()) - counts_of_class["candidates"]


def test_what_one_source_leaves_out_another_does_too(six: Path, task: Task, clip: Clip) -> None:
    out = task.class_names[1]
    followed = _curate(six, task, clip, excluded=[out], keep_fraction=None, least_per_class=3)
    assert followed.excluded == (out,)
    assert followed.counts()[1] == 0
    assert followed.record["counts"][out] == {"candidates": PER_CLASS, "kept": 0, "short_class": PER_CLASS}


def test_not_every_class_can_be_left_out(six: Path, task: Task, clip: Clip) -> None:
    with pytest.raises(
        UsageError, match=r"and 5 more classes, under .* no class keeps enough, so none can be left out"
    ):
        _curate(six, task, clip, least_per_class=100, on_short_class="exclude")


class _Blind(Clip):
    """Must not look."""

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        assert not len(pixels), "an image was described again"
        return super().encode_image(pixels)


@pytest.fixture
def blind(clip: Clip) -> Clip:
    looking = load_clip("pocket")
    looking.__class__ = _Blind
    return looking


def test_other_settings_look_at_no_image_again(six: Path, task: Task, clip: Clip, blind: Clip) -> None:
    first = _curate(six, task, clip, keep_fraction=None).manifest
    again = _curate(six, task, blind, keep_fraction=0.5, perceptual_hash_bits=2, semantic_cosine=0.999).manifest
    assert (again["status"] == "kept").sum() < (first["status"] == "kept").sum()
    assert again["clip_score"].equals(first["clip_score"])


@pytest.mark.parametrize("how", ["truncated", "flipped", "swapped"])
def test_a_damaged_cache_changes_no_decision(six: Path, task: Task, clip: Clip, blind: Clip, how: str) -> None:
    first = _curate(six, task, clip).manifest
    arrays = sorted((six / ".described").glob("*.npy"))
    data = [path.read_bytes() for path in arrays]
    for path, own, other in zip(arrays, data, [*data[1:], data[0]], strict=True):
        flipped = own[:-1] + bytes([own[-1] ^ 1])
        path.write_bytes({"truncated": own[:-100], "flipped": flipped, "swapped": other}[how])
    (six / SEAL).unlink()
    with pytest.raises(AssertionError, match="described again"):
        _curate(six, task, blind)
    assert _curate(six, task, clip).manifest.equals(first)
    assert [path.read_bytes() for path in arrays] == data


class _Killed(BaseException):
    """Not an error that anything handles."""


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_curation_killed_at_any_durable_step_is_gone_on_with_to_the_same_bytes(
    tmp_path: Path, task: Task, clip: Clip, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _write(tmp_path / "whole", task, [1] * len(task.class_names))
    _curate(whole, task, clip, keep_fraction=None, decontaminate=False)
    replace, steps = Path.replace, 0

    def replaced(self: Path, target: Path) -> Path:
        nonlocal steps
        steps -= 1
        if steps < 0:
            raise _Killed
        return replace(self, target)

    for kill_at in range(9):
        folder = _write(tmp_path / str(kill_at), task, [1] * len(task.class_names))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", replaced)
            steps = kill_at
            if kill_at < 8:  # three arrays and their seals, the manifest, and the set's seal
                with pytest.raises(_Killed):
                    _curate(folder, task, clip, keep_fraction=None, decontaminate=False)
                assert not (folder / SEAL).exists()
            else:
                _curate(folder, task, clip, keep_fraction=None, decontaminate=False)
        _curate(folder, task, clip, keep_fraction=None, decontaminate=False)
        assert _files(folder) == _files(whole)


def test_arrays_of_images_that_are_gone_are_dropped(six: Path, task: Task, clip: Clip) -> None:
    _curate(six, task, clip, keep_fraction=None)
    before = {path.name for path in (six / ".described").iterdir()}
    (six / SEAL).unlink()
    _write(six, task, [PER_CLASS - 1] * len(task.class_names))
    _curate(six, task, clip, keep_fraction=None)
    after = {path.name for path in (six / ".described").iterdir()}
    assert len(after) == len(before) == 6
    assert not before & after


def test_progress_is_told_in_images(six: Path, task: Task, clip: Clip) -> None:
    told: list[tuple[int, int]] = []
    settings = CurateSettings(keep_fraction=None)
    curate(six, task=task, clip=clip, settings=settings, progress=lambda done, total: told.append((done, total)))
    assert told == [(PER_CLASS * len(task.class_names),) * 2]


def test_a_learned_descriptor_decides_and_is_named(six: Path, task: Task, clip: Clip) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pooled = torch.nn.Sequential(torch.nn.AvgPool2d(320), torch.nn.Flatten())
        torch.jit.script(pooled.eval()).save(str(six.parent / "sscd.pt"))
    chosen = {"descriptor": str(six.parent / "sscd.pt"), "keep_fraction": None, "decontaminate": False}
    counts = [
        len(_curate(six, task, clip, least_per_class=0, descriptor_threshold=threshold, **chosen).kept)
        for threshold in (0.01, 0.9, 0.999999)
    ]
    assert sorted(counts) == counts
    assert counts[0] < counts[-1]
    left = _curate(six, task, clip, least_per_class=0, **chosen)
    assert left.record["curation"]["descriptor"]["name"] == "sscd"
    assert left.record["curation"]["descriptor"]["threshold"] == 0.75
    assert str(six.parent) not in (six / SEAL).read_text()
    (six.parent / "sscd.pt").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"sscd\.pt: not a TorchScript model"):
        _curate(six, task, clip, **chosen)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("curate.score=median", r"curate\.score: input should be 'mean' or 'max'"),
        ("curate.least_score=2", r"curate\.least_score: input should be less than or equal to 1"),
        ("curate.perceptual_hash_bits=40", r"curate\.perceptual_hash_bits: "),
        ("curate.decontaminate_against=[test,test]", r"curate\.decontaminate_against: names one split twice"),
        ("curate.decontaminate_against=[]", r"curate\.decontaminate_against: "),
        ("curate.least_per_class=-1", r"curate\.least_per_class: "),
        ("curate.on_short_class=skip", r"curate\.on_short_class: input should be 'error' or 'exclude'"),
    ],
)
def test_a_wrong_setting_is_named(override: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_experiment(overrides=(override,))
