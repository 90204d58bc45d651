"""Sentences of a language model: the pocket one, and random ones of other families."""

from __future__ import annotations

import gc
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.in_context import read_lists
from retrieve_or_generate.pocket.places import task_place
from retrieve_or_generate.pocket.train_language import make_tokenizer
from retrieve_or_generate.settings import PromptSettings
from retrieve_or_generate.store import cache_folder
from retrieve_or_generate.synthesize.prompts import HoldsModel, PromptSource, Strategy, load_strategy
from retrieve_or_generate.synthesize.prompts.llm import BLOCK
from retrieve_or_generate.synthesize.prompts.naming import names_class
from retrieve_or_generate.synthesize.prompts.nucleus import LineModel
from retrieve_or_generate.tasks import Task, load_task
from retrieve_or_generate.text_models import find_text_model
from retrieve_or_generate.weights import POCKET_WEIGHTS

SourceOf = Callable[..., PromptSource]
Load = Callable[..., Strategy]


@pytest.fixture
def textures() -> Task:
    return load_task("textures")


@pytest.fixture
def load(textures: Task, source_of: SourceOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """The strategy for the pocket textures, with a cache of the test's own."""
    base = source_of(strategy="llm")
    monkeypatch.setenv("ROG_CACHE", str(tmp_path / "cache"))

    def make(**given: object) -> Strategy:
        like = given.pop("like", base.like)
        task = given.pop("task", base.task)
        return load_strategy(PromptSource(task, like, base.settings.model_copy(update=given)))  # type: ignore[arg-type]

    return make


@pytest.fixture
def random_models(tmp_path: Path) -> Path:
    """`llama` and `gpt2`: the shapes of published ones, small. They say nothing to the point, and have no word for a class."""
    tokenizer = make_tokenizer(example.line for example in read_lists().examples["object"])
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, eos_token_id=2))
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=400, eos_token_id=2, bos_token_id=1
        )
    )
    gpt2.generation_config.update(
        do_sample=True, temperature=0.1, repetition_penalty=9.0
    )  # its authors' advice: not taken
    for name, model in {"llama": llama, "gpt2": gpt2}.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("retrieve_or_generate.synthesize.prompts.llm.LineModel", refuse)


def test_sentences_name_the_class_no_two_alike_and_say_where_they_come_from(load: Load) -> None:
    strategy = load()
    assert not strategy.uses_real_captions
    prompts = strategy.prompts(2, 30)
    assert all("chequered" in prompt.text for prompt in prompts)
    assert len({prompt.text for prompt in prompts}) == 30
    assert {prompt.origin["kind"] for prompt in prompts} == {"texture"}
    draws = [prompt.origin["draw"] for prompt in prompts]
    assert draws == sorted(set(draws))
    record = strategy.record()
    assert record["given"] == 30
    assert record["drawn"] % BLOCK == 0
    assert record["drawn"] >= 30 + record["rejected"] + record["duplicate"]
    assert record["form"] == "texture"
    assert re.fullmatch(r"pocket@[0-9a-f]{16}", record["model"])


def test_object_classes_are_asked_for_in_three_ways(load: Load) -> None:
    strategy = load(form="object", lacking_class="keep")
    prompts = strategy.prompts(0, 60)
    assert {prompt.origin["kind"] for prompt in prompts} == {"object", "relation", "background"}
    assert all(("beside" in prompt.origin) == (prompt.origin["kind"] != "object") for prompt in prompts)
    assert strategy.record()["form"] == "object"


def test_a_second_run_asks_no_model_and_has_the_same(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load().prompts(0, 20)
    _no_model(monkeypatch)
    again = load()
    assert again.prompts(0, 20) == first
    with pytest.raises(AssertionError, match="a model was loaded"):
        load(temperature=0.7).prompts(0, 1)
    with pytest.raises(AssertionError, match="a model was loaded"):
        again.prompts(1, 1)


def test_what_was_kept_and_is_damaged_is_drawn_anew(load: Load) -> None:
    first = load().prompts(0, 20)
    files = list((cache_folder() / "prompts").rglob("*.json"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:-20])
    assert load().prompts(0, 20) == first


def test_no_class_depends_on_what_was_asked_before(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = load()
    expected = [one.prompts(label, 12) for label in (0, 1)]
    monkeypatch.setenv("ROG_CACHE", str(tmp_path / "another"))
    other = load()
    assert [other.prompts(1, 12), other.prompts(0, 12)] == expected[::-1]


def test_a_sentence_does_not_depend_on_its_neighbours() -> None:
    """To float tolerance, which turns no word here; blocks are of one size, so even that never shows."""
    model = LineModel(find_text_model("pocket", "language"), "float32", "cpu")
    texts = [
        "a => b\nzebra =>",
        "For each line, write a short caption of a picture.\nfox => a fox\nmerlin 2, beach =>",
        "x =>",
    ]

    def said(rows: list[int]) -> list[str]:
        return model.complete([texts[i] for i in rows], [np.random.default_rng(i) for i in rows], 0.8, 0.9)

    together = said([0, 1, 2])
    assert [said([i])[0] for i in range(3)] == together
    assert said([2, 0, 1, 2]) == [together[i] for i in (2, 0, 1, 2)]
    assert not any("\n" in line for line in together)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_never_names_the_class_is_told_of(load: Load, random_models: Path, family: str) -> None:
    with pytest.raises(UsageError, match=rf"{family}@\w+: none of 128 sentences names 'dotted'; take another"):
        load(model=str(random_models / family)).prompts(1, 2)


def test_sentences_that_lack_the_class_are_counted_and_on_wish_kept(load: Load, random_models: Path) -> None:
    strategy = load(model=str(random_models / "llama"), lacking_class="keep")
    prompts = strategy.prompts(1, 40)
    assert len(prompts) == 40
    record = strategy.record()
    assert (record["rejected"], record["given_again"]) == (0, 0)
    assert record["lacking_class"] + record["empty"] == record["drawn"] == 2 * BLOCK
    assert not any(names_class(prompt.text, "dotted") for prompt in prompts)


def test_a_model_with_little_to_say_is_asked_no_further(load: Load) -> None:
    """Nearly without chance it says nearly the same always: the same sentences come round again, however many are asked for."""
    strategy = load(temperature=0.01)
    many = strategy.prompts(0, 200)
    distinct = list(dict.fromkeys(many_prompt.text for many_prompt in many))
    assert len(distinct) < 60
    assert [prompt.text for prompt in many] == (distinct * 200)[:200]
    assert load(temperature=0.01).prompts(0, 300)[:200] == many
    record = strategy.record()
    assert record["given_again"] == 200 - len(distinct)
    assert record["drawn"] <= BLOCK * (4 + len(distinct))


def test_a_model_rests_until_it_is_needed(load: Load) -> None:
    strategy = load()
    assert isinstance(strategy, HoldsModel)
    first = strategy.prompts(0, 4)
    held = weakref.ref(strategy._model)  # type: ignore[attr-defined]
    strategy.rest()
    gc.collect()
    assert held() is None
    assert strategy.prompts(0, 40)[:4] == first


def test_how_a_class_is_called(load: Load) -> None:
    def query(**given: object) -> str:
        return load(**given)._query(0, 0).text.splitlines()[-1]  # type: ignore[attr-defined]

    assert query() == "striped =>"
    assert query(called="{} cloth") == "striped cloth =>"
    with pytest.raises(ValueError, match=r"called needs \{\} where the class name goes, not 'cloth'"):
        PromptSettings(called="cloth")


def test_lists_of_the_user_and_classes_without_a_background(load: Load, tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "backgrounds.txt").write_text("striped\tmoon\n")
    common = {"form": "object", "examples": str(tmp_path / "lists")}
    with pytest.raises(UsageError, match=r"backgrounds.txt has none for class 'dotted'"):
        load(**common)
    base = load()
    excluded = [name for name in base._names if name != "striped"]  # type: ignore[attr-defined]
    like = type("Like", (), {"excluded": tuple(excluded)})
    prompts = load(**common, like=like, lacking_class="keep").prompts(0, 40)
    assert {prompt.origin.get("beside") for prompt in prompts if prompt.origin["kind"] == "background"} == {"moon"}
    assert load(**common, like=like).fingerprint != base.fingerprint


def test_templates_say_whether_classes_are_textures(load: Load, textures: Task) -> None:
    assert load().record()["form"] == "texture"
    task = replace(textures, templates=("a photo of a {}.",))
    assert load(task=task).record()["form"] == "object"
    assert load(task=task, form="texture").record()["form"] == "texture"


def test_models_that_cannot_be_used_are_told_of_in_one_line(load: Load, random_models: Path, tmp_path: Path) -> None:
    def problem(model: Path | str, kind: type[UsageError] = UsageError) -> str:
        with pytest.raises(kind) as caught:
            load(model=str(model)).prompts(0, 1)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "unknown model 'no where': give synthesize.prompts.model as 'pocket'" in problem("no where")
    (tmp_path / "empty").mkdir()
    assert "empty: no config.json; a model is a folder" in problem(tmp_path / "empty")
    pickled = tmp_path / "pickled"
    shutil.copytree(random_models / "llama", pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "pickled: its weights are pickled (pytorch_model.bin), which are never read" in problem(pickled)
    (pickled / "pytorch_model.bin").unlink()
    assert "pickled: no weights in it; safetensors are wanted" in problem(pickled)
    damaged = tmp_path / "damaged"
    shutil.copytree(random_models / "llama", damaged)
    whole = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "damaged: transformers cannot load it (" in problem(damaged, IntegrityError)
    wordless = tmp_path / "wordless"
    shutil.copytree(random_models / "llama", wordless)
    for file in wordless.glob("tokenizer*"):
        file.unlink()
    assert "wordless: its tokenizer cannot be loaded (" in problem(wordless, IntegrityError)
    assert "captioner: no model for this (" in problem(POCKET_WEIGHTS / "captioner")
    short = tmp_path / "short"
    shutil.copytree(random_models / "gpt2", short)
    text = (short / "config.json").read_text().replace('"n_positions": 400', '"n_positions": 120')
    (short / "config.json").write_text(text)
    assert "short" in problem(short)


_RUN = """
import sys
from pathlib import Path
from retrieve_or_generate.image_set import load_image_set
from retrieve_or_generate.settings import PromptSettings
from retrieve_or_generate.synthesize.prompts import PromptSource, load_strategy
from retrieve_or_generate.tasks import load_task

task, like = load_task(sys.argv[1]), load_image_set(Path(sys.argv[2]))
strategy = load_strategy(PromptSource(task, like, PromptSettings(strategy="llm")))
for label in range(8):
    strategy.prompts(label, 60)
"""


@pytest.fixture
def textures_folder(textures: Task) -> Path:
    """Of the pocket world, wherever a test's own cache is."""
    return task_place("textures")


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(textures_folder: Path, load: Load, tmp_path: Path) -> None:
    base = load()
    expected = [base.prompts(label, 60) for label in range(8)]
    folder = next((cache_folder() / "prompts").iterdir())
    blocks = len(list(folder.glob("*.json")))
    shutil.rmtree(folder)
    run = subprocess.Popen([sys.executable, "-c", _RUN, str(textures_folder), str(tmp_path / "retrieved")])
    while len(list(folder.glob("*.json"))) < 3:
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    made = {path.name for path in folder.glob("*.json")}
    assert 3 <= len(made) < blocks
    again = load()
    assert [again.prompts(label, 60) for label in range(8)] == expected
    after = {path.name for path in folder.glob("*.json")}
    assert made < after
    assert len(after) == blocks
