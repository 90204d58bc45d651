"""Equal numbers whatever is lost: flagged images are drawn again, copies made up for, and the filter keeps the same share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieve_or_generate.curate.curation import curate
from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.image_set import CANDIDATES, ImageSet, ImageSetWriter, ShardReader
from retrieve_or_generate.models import Clip
from retrieve_or_generate.pixels import decode
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.settings import CurateSettings, SelectionSettings, SynthesizeSettings
from retrieve_or_generate.synthesize import perturb, synthesize
from retrieve_or_generate.synthesize.requests import TRIES, fit_needed, missing
from retrieve_or_generate.tasks import Task

from .conftest import HALF
from .painter import Painter, patches

SMALL = SynthesizeSettings(num_inference_steps=4, batch_size=4, shard_size=8)
Make = Callable[..., ImageSet]


@pytest.fixture(scope="module")
def make(task: Task, retrieved: ImageSet, clip: Clip) -> Make:
    def of(
        out: Path, painter: Painter, settings: SynthesizeSettings = SMALL, curation: CurateSettings = HALF
    ) -> ImageSet:
        return synthesize(task, retrieved, painter, clip, out, settings, curation)  # type: ignore[arg-type]

    return of


def noise(task: Task, label: int, number: int) -> int:
    """The seed of an image of a class."""
    return seed_for("synthesize", "noise", task.name, task.class_names[label], number)


@given(st.lists(st.integers(0, 10**6), max_size=5), st.one_of(st.none(), st.integers(1, 1000).map(lambda n: n / 1000)))
def test_a_filter_that_rounds_up_keeps_what_is_wanted(kept: list[int], fraction: float | None) -> None:
    needed = fit_needed(np.array(kept, np.int64), fraction)
    assert [math.ceil(round((fraction or 1) * count, 9)) for count in needed.tolist()] == kept


def test_no_more_is_asked_for_than_is_missing() -> None:
    fit, needed, reaching, wanted = (np.array(n) for n in ([6, 8, 9, 7], [8, 8, 8, 8], [6, 1, 9, 0], [4, 4, 4, 4]))
    assert missing(fit, needed, reaching, wanted).tolist() == [2, 3, 0, 4]


def test_copies_are_made_up_for(make: Make, task: Task, retrieved: ImageSet, tmp_path: Path) -> None:
    """The first class paints one picture four times, the second one that copies itself in the round after, too."""
    same = {noise(task, 0, number): patches(1) for number in range(4)}
    same |= {noise(task, 1, number): patches(2) for number in (0, 1, 4)}
    made = make(tmp_path / "s", Painter(same))
    assert made.counts().tolist() == retrieved.counts().tolist()
    assert made.record["config"]["rounds"] == [34, 4, 1]
    reasons = made.manifest.groupby("label")["reason"].value_counts().unstack(fill_value=0)
    assert reasons["duplicate"].tolist()[:3] == [3, 2, 0]
    fit = (made.manifest["reason"] != "duplicate").groupby(made.manifest["label"]).sum()
    assert fit.tolist() == [6] + [4] * 7  # of which the filter keeps half, as it does of every source
    assert [key[:2] for key in sorted(made.manifest["key"])][-5:] == ["01"] * 4 + ["02"]


def test_what_is_asked_for_later_is_what_would_have_been_asked_for_at_first(
    make: Make, task: Task, tmp_path: Path
) -> None:
    made = make(tmp_path / "s", Painter({noise(task, 0, number): patches(1) for number in range(4)}))
    rows = made.manifest[made.manifest["label"] == 0].sort_values("key")
    seeds = [json.loads(origin)["seed"] for origin in rows["origin"]]
    assert seeds == [noise(task, 0, number) for number in range(9)]


def test_an_evaluation_image_among_the_generated_goes_and_is_made_up_for(
    make: Make, task: Task, retrieved: ImageSet, tmp_path: Path
) -> None:
    test = task.split("test")
    leaked = {noise(task, 2, 1): decode(test.images[5]), noise(task, 2, 4): decode(task.split("val").images[0])}
    clean = HALF.model_copy(update={"decontaminate": True})
    made = make(tmp_path / "s", Painter(leaked), curation=clean)
    assert made.counts().tolist() == retrieved.counts().tolist()
    contaminated = made.manifest[made.manifest["reason"] == "contaminated"]
    assert contaminated["key"].tolist() == ["00-0002-000001", "01-0002-000004"]
    assert list(made.record["evaluation_copies"]) == contaminated["key"].tolist()
    assert made.record["config"]["rounds"] == [34, 1, 1]


def test_flagged_images_are_dropped_counted_and_drawn_again_from_other_noise(
    make: Make, task: Task, retrieved: ImageSet, tmp_path: Path
) -> None:
    twice = noise(task, 3, 0)
    flagged = {noise(task, 0, 2), twice, seed_for("synthesize", "redraw", twice, 1)}
    made = make(tmp_path / "s", Painter(unsafe=lambda _, seed: seed in flagged))
    assert made.counts().tolist() == retrieved.counts().tolist()
    assert made.record["config"]["rounds"] == [34]
    unsafe = made.manifest[made.manifest["reason"] == "unsafe"].sort_values("key")
    assert unsafe["key"].tolist() == ["00-0000-000002-u0", "00-0003-000000-u0", "00-0003-000000-u1"]
    assert {json.loads(origin)["seed"] for origin in unsafe["origin"]} == flagged
    assert (unsafe["sha256"] == "").all()
    assert made.record["counts"][task.class_names[3]]["unsafe"] == 2
    drawn = made.manifest.set_index("key").loc["00-0003-000000"]
    seed = json.loads(drawn["origin"])["seed"]
    assert seed == seed_for("synthesize", "redraw", twice, 2)
    assert np.abs(decode(made.images(["00-0003-000000"])[0]).astype(int) - patches(seed)).mean() < 4


def test_a_class_that_cannot_be_filled_is_one_error(
    make: Make, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieve_or_generate.synthesize.matching.ROUNDS", 2)
    word = task.class_names[1]
    with pytest.raises(UsageError) as raised:
        make(tmp_path / "s", Painter(unsafe=lambda prompt, _: word in prompt))
    message = str(raised.value)
    assert f"{word!r} lacks 4 of 4 ({4 * 3 * TRIES} unsafe), after 2 rounds" in message
    assert "\n" not in message
    assert not (tmp_path / "s" / "image_set.json").exists()
    only = {noise(task, label, number): patches(label) for label in range(8) for number in range(60)}
    with pytest.raises(UsageError, match=r"lacks 5 of 6 \(15 duplicate\).* and 5 more classes, after"):
        make(tmp_path / "t", Painter(only))


def test_a_class_that_cannot_be_filled_is_left_out_where_that_is_allowed(
    make: Make, task: Task, retrieved: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieve_or_generate.synthesize.matching.ROUNDS", 1)
    painter = Painter(unsafe=lambda prompt, _: task.class_names[1] in prompt)
    with pytest.raises(
        UsageError, match=r"leave such classes out, for every source, with curate\.on_short_class=exclude"
    ):
        make(tmp_path / "s", painter)
    drawn = len(painter.calls)
    made = make(tmp_path / "s", painter, curation=HALF.model_copy(update={"on_short_class": "exclude"}))
    assert len(painter.calls) == drawn  # the images are the same, whatever the curation
    assert made.excluded == (task.class_names[1],)
    assert made.counts().tolist() == [*retrieved.counts()[:1], 0, *retrieved.counts()[2:]]
    assert make(tmp_path / "s", painter, curation=HALF.model_copy(update={"on_short_class": "exclude"})).key == made.key


def test_with_a_least_score_as_many_reach_it(
    make: Make, task: Task, retrieved: ImageSet, clip: Clip, tmp_path: Path
) -> None:
    made = make(tmp_path / "s", Painter())
    least = float(made.manifest["clip_score"].median())
    strict = make(tmp_path / "t", Painter(), curation=HALF.model_copy(update={"least_score": least}))
    assert strict.counts().tolist() == retrieved.counts().tolist()
    assert (strict.kept["clip_score"] >= least).all()
    assert len(strict.record["config"]["rounds"]) > 1
    assert strict.record["matching"]["over"] >= 0


def test_more_are_made_where_some_are_selected(make: Make, retrieved: ImageSet, tmp_path: Path) -> None:
    chosen = SMALL.model_copy(update={"selection": SelectionSettings(rule="random", over=2.0)})
    made = make(tmp_path / "s", Painter(), chosen)
    assert made.counts().tolist() == retrieved.counts().tolist()
    assert made.record["config"]["rounds"] == [68]
    assert (made.manifest["reason"] == "not_selected").sum() == 17


def test_the_record_says_how_prompts_came_about(make: Make, task: Task, tmp_path: Path) -> None:
    made = make(tmp_path / "s", Painter())
    assert made.record["uses_real_captions"] is False
    assert (
        made.record["config"]["prompts"].items() >= {"strategy": "templates", "templates": len(task.templates)}.items()
    )
    assert made.record["config"]["generator"] == {"name": "painter@1", "fingerprint": "0123456789abcdef"}
    lines = tmp_path / "prompts.tsv"
    lines.write_text("".join(f"{name}\tmy {name} {i}\n" for name in task.class_names for i in range(9)))
    settings = SynthesizeSettings.model_validate(
        SMALL.model_dump() | {"prompts": {"strategy": "file", "file": str(lines), "real_captions": True}}
    )
    real = make(tmp_path / "f", Painter(), settings)
    assert real.record["uses_real_captions"] is True
    assert json.loads(real.manifest["origin"][0])["prompt"] == {"line": 1}
    assert str(tmp_path) not in json.dumps(real.record)
    moved = lines.rename(tmp_path / "moved.tsv")
    other = settings.model_copy(update={"prompts": settings.prompts.model_copy(update={"file": str(moved)})})
    assert make(tmp_path / "f", Painter(), other).key == real.key  # named by its content


def test_perturbed_images_that_are_flagged_are_drawn_again_or_left_out(
    task: Task, retrieved: ImageSet, clip: Clip, tmp_path: Path
) -> None:
    whole = HALF.model_copy(update={"keep_fraction": None})

    def of(out: Path, strength: float, always: str) -> ImageSet:
        first = seed_for("perturb", "noise", task.name, retrieved.manifest["key"][0])
        painter: Any = Painter(unsafe=lambda prompt, seed: seed == first or always in prompt)
        return perturb(task, retrieved, painter, clip, out, strength, SMALL, whole, prompt="my {}, from afar")

    some = of(tmp_path / "some", 0.5, "nothing")
    assert some.counts().sum() == len(retrieved.manifest)
    assert (some.manifest["reason"] == "unsafe").sum() == 1
    assert some.manifest["caption"][0] == f"my {some.manifest['class_name'][0]}, from afar"
    none = whole.model_copy(update={"least_per_class": 0})
    painter: Any = Painter(unsafe=lambda prompt, _: task.class_names[1] in prompt)
    lost = perturb(task, retrieved, painter, clip, tmp_path / "lost", 0.0, SMALL, none)
    assert lost.counts()[1] == 0
    assert (lost.manifest["reason"] == "unsafe").sum() == 4  # once each: without noise they come out the same


def test_an_image_is_perturbed_under_its_own_caption(task: Task, clip: Clip, tmp_path: Path) -> None:
    train = task.split("train")
    rows = [int(np.flatnonzero(train.labels == label)[0]) for label in range(len(task.class_names))]
    names = {"task": task.name, "source": "retrieved", "class_names": task.class_names}
    with ImageSetWriter(tmp_path / "r", key="k", config={}, **names) as writer:  # type: ignore[arg-type]
        for label, row in enumerate(rows):
            words = "" if label == 1 else f"caption\n{label}"
            writer.add(key=f"{row}", label=label, caption=words, origin={}, query="", image=train.images[row])
        writer.finish()
    found = curate(tmp_path / "r", task=task, clip=clip, settings=HALF)
    painter: Any = Painter()
    made = perturb(task, found, painter, clip, tmp_path / "p", 0.5, SMALL, HALF, prompt="caption")
    told = made.manifest.sort_values("label")["caption"].tolist()
    assert told[0] == "caption 0"
    assert told[1] == task.templates[0].replace("{}", task.class_names[1])
    assert made.record["uses_real_captions"] is True


def test_an_image_that_does_not_decode_is_named(
    task: Task, retrieved: ImageSet, clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ShardReader.read

    def damaged(self: ShardReader, places: Any) -> list[bytes]:
        return [data[: len(data) // 2] for data in read(self, places)]

    monkeypatch.setattr(ShardReader, "read", damaged)
    painter: Any = Painter()
    with pytest.raises(IntegrityError, match=rf"{retrieved.folder}: image \d+ cannot be decoded"):
        perturb(task, retrieved, painter, clip, tmp_path / "p", 0.5, SMALL, HALF)
    assert not (tmp_path / "p" / CANDIDATES).exists()
