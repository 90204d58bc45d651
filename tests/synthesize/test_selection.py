"""Adaptive selection: each rule on a case that can be seen, equal numbers for all rules, nothing but the images decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieve_or_generate.curate.curation import CACHE, curate
from retrieve_or_generate.curate.features import kept_features
from retrieve_or_generate.curate.kinds import ArrayCache
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.image_set import ImageSet, ImageSetWriter
from retrieve_or_generate.models import Clip, image_features
from retrieve_or_generate.pixels import decode_all
from retrieve_or_generate.settings import CurateSettings, SelectionSettings, SynthesizeSettings
from retrieve_or_generate.synthesize import Generator, synthesize
from retrieve_or_generate.synthesize.selection import Embedded, cross_fitted, density, left_over, select, selection_step
from retrieve_or_generate.tasks import Task

from .conftest import QUICK


def _embedded(features: Any, labels: Any = None, prefix: str = "k") -> Embedded:
    features = np.asarray(features, np.float32)
    labels = np.zeros(len(features), np.int64) if labels is None else np.asarray(labels, np.int64)
    return Embedded(np.array([f"{prefix}{i:03d}" for i in range(len(features))], np.str_), labels, features)


def _select(
    rule: Any, made: Embedded, real: Embedded, quotas: list[int], **more: Any
) -> tuple[np.ndarray, dict[str, Any]]:
    return select(made, real, np.array(quotas), SelectionSettings(rule=rule, **more), "t")


def _on_circle(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_density_by_hand() -> None:
    """Real images at 0, 10, 20 and 60 degrees: with one neighbour the balls reach 10, 10, 10 and 40 degrees."""
    distance, outside = density(_on_circle(5, 40, 101, 0), _on_circle(0, 10, 20, 60), neighbours=1)
    chord = [2 * np.sin(np.radians(angle) / 2) for angle in (5, 20, 41, 0)]
    assert distance == pytest.approx(chord, abs=1e-6)
    assert outside == pytest.approx([5 / 10, 20 / 40, 41 / 40, 0], abs=0.02)


def test_few_real_images_are_all_the_neighbours_there_are() -> None:
    distance, outside = density(_on_circle(0, 60), _on_circle(0), neighbours=5)
    assert distance == pytest.approx([0, 1], abs=1e-6)
    assert (outside <= 1).all()  # one image spans no ball
    distance, outside = density(_on_circle(0), _on_circle(0, 0, 60), neighbours=5)
    assert distance == pytest.approx([1 / 3], abs=1e-6)
    assert outside == pytest.approx([0])


def test_low_density_takes_what_is_far_but_not_outside() -> None:
    real = _embedded(_on_circle(0, 10, 20, 60))
    made = _embedded(_on_circle(1, 40, 180, 150, 11))
    for quota, expected in ((1, [1]), (2, [1, 0]), (4, [1, 0, 4, 3]), (5, [0, 1, 2, 3, 4])):
        chosen, told = _select("low_density", made, real, [quota], neighbours=1)
        assert set(np.flatnonzero(chosen)) == set(expected)  # 150 degrees lies outside, but nearer than 180
        assert told["images"] == {"all": 5, "chosen": quota, "random": quota}
    assert told["measured"]["on_manifold"]["all"] == 0.6


def _two_clouds(n: int, apart: float, seed: int = 0) -> tuple[Embedded, Embedded]:
    """Real and made images of two classes; made ones lie along the second axis, from among the real ones on."""
    draw = np.random.default_rng(seed)
    labels = np.arange(n) % 2
    real, made = draw.normal(size=(n, 6)), draw.normal(size=(n, 6))
    made[:, 1] += apart * np.arange(n) / n
    for side in (real, made):
        side[:, 0] += 9 * labels
    return _embedded(real, labels, "r"), _embedded(made, labels, "m")


def test_hardest_takes_what_is_like_the_real() -> None:
    real, made = _two_clouds(400, apart=8)
    chosen, told = _select("hardest", made, real, [40, 40])
    assert np.flatnonzero(chosen).mean() < 80  # among 400 in order of their distance
    at_random, _ = _select("random", made, real, [40, 40])
    assert np.flatnonzero(at_random).mean() == pytest.approx(200, abs=50)
    assert 0.85 < told["auc"] < 1
    means = told["measured"]["log_odds_real"]
    assert means["chosen"] > means["random"]
    assert means["chosen"] > 0 > means["all"]


def test_what_cannot_be_told_apart_has_no_order_of_its_own() -> None:
    """The null: the discriminator has not seen what it judges, so on equal distributions it is right half of the time."""
    real, made = _two_clouds(600, apart=0)
    for_real, of_made = cross_fitted(real, made, "t")
    assert (for_real[:, None] > of_made).mean() == pytest.approx(0.5, abs=0.05)


def test_classes_alone_do_not_tell_real_from_made() -> None:
    """Of one class twice as many are made: that does not make its images look made."""
    draw, labels = np.random.default_rng(1), np.arange(300) % 2
    real, made = (draw.normal(size=(300, 4)) + 9 * labels[:, None] for _ in range(2))
    few = (labels == 0) | (np.arange(300) < 150)
    for_real, of_made = cross_fitted(_embedded(real[few], labels[few], "r"), _embedded(made, labels, "m"), "t")
    assert (for_real[:, None] > of_made).mean() == pytest.approx(0.5, abs=0.07)
    assert abs(of_made[labels == 0].mean() - of_made[labels == 1].mean()) < 0.1


def test_too_few_to_tell_apart() -> None:
    with pytest.raises(UsageError, match=r"selection\.rule=hardest: 3 real and 3 synthetic images are too few"):
        _select("hardest", _embedded(np.eye(3)), _embedded(np.eye(3)), [1])


_sides = st.integers(10, 30).flatmap(
    lambda n: st.tuples(st.just(n), st.integers(0, 99), st.lists(st.integers(0, 12), min_size=3, max_size=3))
)


@settings(deadline=None, max_examples=25)
@given(_sides, st.sampled_from(["random", "low_density", "hardest"]))
def test_every_rule_leaves_equal_numbers_whatever_the_order(drawn: tuple[int, int, list[int]], rule: str) -> None:
    n, seed, quotas = drawn
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, n)
    real, made = _embedded(draw.normal(size=(n, 4)), labels, "r"), _embedded(draw.normal(size=(n, 4)), labels, "m")
    chosen, _ = _select(rule, made, real, quotas)
    held = np.bincount(labels, minlength=3)
    assert (np.bincount(labels[chosen], minlength=3) == np.minimum(held, quotas)).all()
    order = draw.permutation(n)
    moved = Embedded(made.keys[order], made.labels[order], made.features[order])
    assert np.array_equal(_select(rule, moved, real, quotas)[0], chosen[order])


def test_a_random_choice_is_of_the_names_alone() -> None:
    made, other = _embedded(np.eye(8)), _embedded(np.eye(8)[::-1])
    first, told = _select("random", made, made, [3])
    second, _ = _select("random", other, made, [3])
    assert np.array_equal(first, second)
    assert told == {"rule": "random", "images": {"all": 8, "chosen": 3, "random": 3}, "measured": {}}


def test_how_many_are_needed() -> None:
    assert left_over(np.array([7, 0]), SelectionSettings()).tolist() == [7, 0]
    assert left_over(np.array([7, 0]), SelectionSettings(rule="hardest", over=1.5)).tolist() == [11, 0]
    eleven = left_over(np.array([10]), SelectionSettings(rule="random", over=1.1))  # not of 11.000000000000002
    assert eleven.tolist() == [11]


def test_a_rule_by_its_name_alone() -> None:
    settings = SynthesizeSettings.model_validate({"selection": "hardest"})
    assert settings.selection == SelectionSettings(rule="hardest")


def test_within_curation_what_is_left_out_keeps_its_row(
    task: Task, retrieved: ImageSet, clip: Clip, tmp_path: Path
) -> None:
    """Twelve candidates of each class, two of which the retrieved set has (three of the first)."""
    train = task.split("train")
    names: dict[str, Any] = {"task": task.name, "source": "synthetic", "class_names": task.class_names}
    counts = {}
    chosen = CurateSettings(keep_fraction=0.5, decontaminate=False, class_cap=2)
    for rule in ("random", "low_density", "hardest"):
        folder = tmp_path / rule
        with ImageSetWriter(folder, key="k", config={}, **names) as writer:
            for label in range(len(task.class_names)):
                for row in np.flatnonzero(train.labels == label)[:12].tolist():
                    image = train.images[row]
                    writer.add(key=f"{row:06d}", label=label, caption="", origin={}, query="", image=image)
            writer.finish()
        step = selection_step(SelectionSettings(rule=rule), task.name, retrieved)  # type: ignore[arg-type]
        assert step is not None
        made = curate(folder, task=task, clip=clip, settings=chosen, steps=[step])
        scored = made.manifest["reason"].isin(["", "not_selected", "class_cap"]).groupby(made.manifest["label"]).sum()
        assert (made.manifest["reason"] == "class_cap").sum() == 1  # the third of the first class
        assert made.record["selection"]["images"]["all"] == scored.sum()
        assert made.record["selection"]["images"]["chosen"] == retrieved.counts().sum()
        assert (made.manifest.loc[made.manifest["reason"] == "not_selected", "rank"] == -1).all()
        assert made.record["curation"]["steps"]["selection"]["rule"] == rule
        counts[rule] = made.counts().tolist()
    assert counts["random"] == counts["low_density"] == counts["hardest"]


def test_every_rule_chooses_from_the_same_images(
    task: Task, retrieved: ImageSet, generator: Generator, clip: Clip, tmp_path: Path
) -> None:
    made = {}
    for rule in ("random", "low_density"):
        how = QUICK.model_copy(update={"selection": SelectionSettings(rule=rule), "num_inference_steps": 1})
        loose = CurateSettings(keep_fraction=0.5, decontaminate=False, deduplicate=False)
        made[rule] = synthesize(task, retrieved, generator, clip, tmp_path / rule, how, loose)
        assert (made[rule].counts() == retrieved.counts()).all()
        assert (made[rule].manifest["reason"] == "not_selected").sum() == retrieved.counts().sum()
    shown = ["key", "sha256", "clip_score"]
    assert made["random"].manifest[shown].equals(made["low_density"].manifest[shown])
    assert set(made["random"].kept["key"]) != set(made["low_density"].kept["key"])


def test_all_is_no_step_at_all(task: Task, retrieved: ImageSet) -> None:
    assert selection_step(SelectionSettings(), task.name, retrieved) is None


def test_embeddings_of_a_set_come_from_its_curation_or_are_made_anew(
    retrieved: ImageSet, clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in (retrieved.folder / CACHE).iterdir()}
    images = decode_all(retrieved.images(retrieved.kept["key"].tolist()), clip.image_size)
    expected = image_features(clip, images)
    known = kept_features(retrieved, clip, ArrayCache(tmp_path / "unused"))
    assert known == pytest.approx(expected, abs=1e-5)
    assert not (tmp_path / "unused").exists()
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in retrieved.folder.iterdir():
        if path.is_file():
            (moved / path.name).write_bytes(path.read_bytes())
    alone = ImageSet(moved, retrieved.record)
    assert kept_features(alone, clip, ArrayCache(tmp_path / "made")) == pytest.approx(expected, abs=1e-5)
    assert not (moved / CACHE).exists()
    assert {path.name: path.stat().st_mtime_ns for path in (retrieved.folder / CACHE).iterdir()} == before
