"""What a generator reads of a long prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from retrieve_or_generate.cli.options import emit_set
from retrieve_or_generate.image_set import ImageSet
from retrieve_or_generate.models import Clip
from retrieve_or_generate.settings import CurateSettings, SynthesizeSettings
from retrieve_or_generate.synthesize import Generator, synthesize
from retrieve_or_generate.synthesize.prompts.length import unread_tokens
from retrieve_or_generate.tasks import Task

from ..builders import build

SHORT = "a wavy fabric."
LONG = " ".join(["wavy"] * 20)  # and a token at each end


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_what_clip_does_not_read(family: str) -> None:
    assert unread_tokens(build(family), [SHORT, LONG, ""]) == [0, 22 - 16, 0]


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_one_tower_that_reads_it_whole_is_enough(family: str) -> None:
    assert unread_tokens(build(family), [SHORT, LONG]) == [0, 0]


def test_beyond_every_tower() -> None:
    pipeline = build("sd3")
    longest = " ".join(["wavy"] * 400)
    whole = pipeline.tokenizer_3([longest], verbose=False)["input_ids"][0]
    assert unread_tokens(pipeline, [longest]) == [min(400 + 2 - 16, len(whole) - 256)]


def test_a_tower_that_was_left_out_reads_nothing() -> None:
    pipeline = build("sd3")
    pipeline.text_encoder_3 = None
    assert unread_tokens(pipeline, [LONG]) == [22 - 16]


def test_words_that_are_not_read_change_no_embedding() -> None:
    pipeline = build("sd1")
    words = LONG.split()[:14]  # as many as it takes
    states = [
        pipeline.encode_prompt([" ".join([*words, *more])], "cpu", 1, do_classifier_free_guidance=False)[0]
        for more in ([], ["striped", "dotted"])
    ]
    assert unread_tokens(pipeline, [" ".join(words), " ".join([*words, "striped", "dotted"])]) == [0, 2]
    assert torch.equal(states[0], states[1])


def test_images_of_prompts_that_were_cut_are_marked_and_counted(
    task: Task,
    retrieved: ImageSet,
    generator: Generator,
    clip: Clip,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [f"{name}\t{LONG if name == 'wavy' else name}" for name in task.class_names]
    (tmp_path / "prompts.tsv").write_text("\n".join(lines))
    prompts = {"strategy": "file", "file": str(tmp_path / "prompts.tsv")}
    settings = SynthesizeSettings.model_validate({"prompts": prompts, "num_inference_steps": 2})
    curation = CurateSettings(keep_fraction=None, deduplicate=False, decontaminate=False)
    made = synthesize(task, retrieved, generator, clip, tmp_path / "made", settings, curation)
    origins = [json.loads(origin) for origin in made.manifest["origin"]]
    told = {name: o.get("unread_tokens") for name, o in zip(made.manifest["class_name"], origins, strict=True)}
    assert told == {name: 6 if name == "wavy" else None for name in task.class_names}
    cut = int((made.manifest["class_name"] == "wavy").sum())
    assert made.record["config"]["prompts_cut"] == cut > 0
    emit_set(made, as_json=True)
    text, record = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert f"\n  prompts longer than the generator reads: those of {cut} candidates" in text
    assert json.loads(record)["prompts_cut"] == cut
