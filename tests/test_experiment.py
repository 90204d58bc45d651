from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from retrieve_or_generate.api import compare
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.experiment import Experiment, dump_experiment, load_experiment, parse_experiment
from retrieve_or_generate.tasks import task_names

SHIPPED = sorted((Path(__file__).parents[1] / "experiments").rglob("*.yaml"))
_MAIN = "from retrieve_or_generate.cli import main; main()"


def test_the_pocket_file_says_what_no_file_means() -> None:
    pocket = Path(__file__).parents[1] / "experiments" / "pocket.yaml"
    assert load_experiment(pocket) == load_experiment() == Experiment()


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_file_is_valid_and_says_how_to_run_it(path: Path) -> None:
    assert load_experiment(path).name == path.stem
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("command:", "machine:", "time:", "quick:", "expected:"):
        assert any(line.startswith(f"# {word}") for line in head), f"{path.name}: no '# {word}' in its head"


PAPER = [path for path in SHIPPED if path.parent.name == "unmet_promise"]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_settings_are_those_of_the_paper(path: Path) -> None:
    e = load_experiment(path)
    assert (e.model, e.retrieve.model) == ("ViT-B-16/laion2b_s34b_b88k", "ViT-L-14-quickgelu/openai")
    assert e.generator == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    how = e.synthesize
    assert (how.scheduler, how.num_inference_steps, how.guidance_scale, how.eta) == ("DDIMScheduler", 50, 2.0, 0.0)
    assert (how.resolution, how.stored_size, how.prompts.strategy) == (512, 256, "llm")
    assert (how.prompts.temperature, how.prompts.top_p) == (0.8, 0.9)
    assert (e.curate.keep_fraction, e.curate.class_cap) == (0.3, 10_000)
    assert (e.finetune.recipe, e.finetune.batch_size, e.finetune.weight_decay) == ("paper", 512, 0.1)
    assert e.finetune.learning_rates == (5e-4, 1e-5, 1e-6)
    assert e.finetune.epochs == e.finetune.evaluations == (10 if path.stem == "imagenet" else 30)
    probe = e.linear_probe
    assert (probe.recipe, probe.batch_size) == ("paper", 256)
    expected = (1e-3, 0, 40) if path.stem == "imagenet" else (1e-2, 0.1, 200)
    assert (probe.learning_rate, probe.weight_decay, probe.epochs) == expected
    assert e.seeds == 3
    assert {"none", "retrieved", "synthetic"} <= set(e.sources)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_quick_form_is_of_the_pocket_world(path: Path) -> None:
    whole, e = load_experiment(path), load_experiment(path, quick=True)
    assert f"rog compare {path.relative_to(SHIPPED[0].parents[1])} --quick" in path.read_text()
    assert {e.pool, e.model, e.generator, e.retrieve.model or "pocket", e.finetuned_model} == {"pocket"}
    assert set(e.tasks) <= set(task_names())
    assert (e.name, e.seeds, len(e.tasks), len(e.scales)) == (f"{whole.name}-quick", 1, 1, 1)
    assert (e.finetune.recipe, e.linear_probe.recipe) == (whole.finetune.recipe, whole.linear_probe.recipe)
    assert (e.retrieve.strategy, e.retrieve.modalities) == (whole.retrieve.strategy, whole.retrieve.modalities)
    assert set(e.sources) <= set(whole.sources)


def test_the_quick_form_lies_between_the_file_and_the_overrides(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nseeds: 5\nfinetune: {updates: 9, batch_size: 8}\nquick: {seeds: 2, finetune: {updates: 1}}\n"
    )
    whole, short = load_experiment(path), load_experiment(path, ("finetune.batch_size=4",), quick=True, seeds=3)
    assert (whole.name, whole.seeds, whole.finetune.updates) == ("mine", 5, 9)
    assert (short.name, short.seeds, short.finetune.updates, short.finetune.batch_size) == ("mine-quick", 3, 1, 4)
    assert load_experiment(quick=True).tasks == ("digits",)
    assert load_experiment().name == "pocket"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seeds: 2\n", r"mine.yaml: has no quick form; a section `quick:` says what it does otherwise$"),
        ("quick: 3\n", r"mine.yaml: quick: input should be a mapping of keys to values, not '3'$"),
        ("quick: {seedz: 3}\n", r"mine.yaml: unknown key 'seedz'; did you mean 'seeds'"),
    ],
)
def test_a_wrong_quick_form_is_explained_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_experiment(tmp_path / "mine.yaml", quick=True)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_quick_forms_end_with_a_verdict(path: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", _MAIN, "compare", str(path), "--quick"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "No claim" in done.stdout  # one seed carries none
    assert (tmp_path / f"runs/{path.stem}-quick/report.html").is_file()


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    experiment = load_experiment(overrides=("finetune.learning_rates=[1e-4, 3e-4]", "tasks=[digits]", "seeds=5"))
    path = tmp_path / "experiment.yaml"
    path.write_text(dump_experiment(experiment))
    assert load_experiment(path) == experiment


@given(st.integers(1, 1000), st.floats(0.001, 1), st.lists(st.integers(1, 10**6), min_size=1, max_size=4, unique=True))
def test_any_valid_values_survive_the_round_trip(seeds: int, keep: float, scales: list[int]) -> None:
    values = {"seeds": seeds, "scales": scales, "curate": {"keep_fraction": keep}}
    experiment = parse_experiment(values)
    assert parse_experiment(experiment.model_dump(mode="json")) == experiment


def test_an_experiment_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Experiment().seeds = 4  # type: ignore[misc]


def test_overrides_then_fields_on_top() -> None:
    experiment = load_experiment(overrides=("seeds=5", "finetune.updates=7"), seeds=2, tasks=None)
    assert (experiment.seeds, experiment.finetune.updates, experiment.tasks) == (2, 7, Experiment().tasks)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seedz=3", r"experiment: unknown key 'seedz'; did you mean 'seeds'\? \(known: name, pool, "),
        ("finetune.update=3", r"unknown key 'finetune.update'; did you mean 'updates'\?"),
        ("seeds=0", r"seeds: input should be greater than or equal to 1, not '0'"),
        ("seeds=three", r"seeds: input should be a valid integer.*not 'three'"),
        ("seeds=", r"seeds: input should be a valid integer, not 'None'"),
        ("curate.keep_fraction=1.5", r"curate.keep_fraction: input should be less than or equal to 1, not '1.5'"),
        ("curate.keep_fraction=.nan", r"curate.keep_fraction: "),
        (
            "sources=[retrieved, sintetic]",
            r"^experiment: sources: unknown source 'sintetic'; did you mean 'synthetic'\?",
        ),
        ("sources=[none, retrieved-x]", r"sources: 'retrieved-x': there is one retrieved source; call it 'retrieved'"),
        (
            "sources=[none, synthetic-fast]",
            r"sources: 'synthetic-fast' says nothing of how it differs; add it to variants",
        ),
        (
            "sources=[none, perturbed-2]",
            r"variants.perturbed-2.perturb: strength: input should be less than or equal to 1",
        ),
        ("variants.synthetic-a={}", r"variants: 'synthetic-a' is not among the sources; list it there, too"),
        ("primary=[retrieved, synthetic-llm]", r"primary: .* are not both among the sources"),
        ("scales=[50, 50]", r"scales lists one value twice: \[50, 50\]"),
        ("scales=[]", r"scales: input should be a list with at least one value, not '\[\]'"),
        ("name=../x", r"name: string should match pattern"),
        ("finetune=3", r"finetune: input should be a mapping of keys to values, not '3'"),
        ("finetune.updates.x=3", r"finetune.updates: "),
        ("retrieve.modalities=image", r"retrieve.modalities: input should be a list, such as \[a, b\], not 'image'"),
        ("retrieve.templates=7", r"retrieve.templates: input should be a list, such as \[a, b\], not '7'"),
        ("retrieve.engine=remote", r"give its URL as retrieve.service$"),
        ("seeds", r"--set 'seeds': write KEY=VALUE, for instance --set finetune.updates=100"),
        ("=3", r"--set '=3': write KEY=VALUE"),
        ("seeds=[3", r"--set 'seeds=\[3': '\[3' is not a YAML value"),
        ("seeds=!!python/object:os.system x", r"is not a YAML value"),
    ],
)
def test_a_wrong_override_is_explained_in_one_line(override: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load_experiment(overrides=(override,))
    assert "\n" not in str(caught.value)


def test_an_override_below_a_value_is_explained() -> None:
    with pytest.raises(UsageError, match=r"--set 'seeds.x=3': 'seeds' holds a value, not keys"):
        load_experiment(overrides=("seeds=4", "seeds.x=3"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "an experiment file is a mapping of keys to values"),
        ("", "an experiment file is a mapping of keys to values"),
        ("a: [1\n", "not readable as YAML"),
        ("name: !!python/object/apply:os.getcwd []\n", "not readable as YAML"),
        ("taskz: [digits]\n", r"unknown key 'taskz'; did you mean 'tasks'\?"),
        ("seeds: 99999\n", "seeds: input should be less than or equal to 1000, not '99999'"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=rf"wrong.yaml: .*{message}") as caught:
        load_experiment(path)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"gone.yaml: no such experiment file"):
        load_experiment(tmp_path / "gone.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UsageError, match=r"binary.yaml: not readable as YAML"):
        load_experiment(tmp_path / "binary.yaml")
    with pytest.raises(UsageError, match="not readable as YAML"):
        load_experiment(tmp_path)


def test_a_variant_is_the_experiment_with_what_differs_on_top() -> None:
    experiment = parse_experiment(
        {
            "sources": ["synthetic", "synthetic-class_name", "synthetic-far", "synthetic-drawn", "perturbed-0.2"],
            "synthesize": {"num_inference_steps": 3, "prompts": {"strategy": "file", "file": "a.tsv"}},
            "variants": {
                "synthetic-far": {
                    "generator": "other",
                    "synthesize": {"selection": {"rule": "low_density", "over": 3, "neighbours": 9}},
                },
                "synthetic-drawn": {"generator": "other", "synthesize": {"selection": {"rule": "random", "over": 3}}},
            },
        }
    )
    assert experiment.variant("synthetic") is experiment
    named, far = experiment.variant("synthetic-class_name"), experiment.variant("synthetic-far")
    assert (named.synthesize.prompts.strategy, named.synthesize.num_inference_steps) == ("class_name", 3)
    assert (far.generator, far.synthesize.selection.over, far.synthesize.prompts.file) == ("other", 3, "a.tsv")
    assert far.at_random() == experiment.variant("synthetic-drawn")
    experiment.check_selection()
    assert experiment.variant("perturbed-0.2").perturb.strength == 0.2
    assert experiment.variant("perturbed-0.2").perturb.shown == experiment.perturb.shown


def test_what_selects_is_compared_with_random_selection_but_may_be_made_alone(tmp_path: Path) -> None:
    alone = load_experiment(overrides=("synthesize.selection=hardest",))
    with pytest.raises(UsageError, match="sources: synthetic selects, so random selection of equal size stands beside"):
        compare(tmp_path / "run", alone)
    assert not (tmp_path / "run").exists()


def test_a_variant_is_validated_before_anything_runs() -> None:
    values = {"sources": ["synthetic-x"], "variants": {"synthetic-x": {"synthesize": {"num_inference_step": 3}}}}
    with pytest.raises(
        UsageError, match=r"variants.synthetic-x.synthesize: unknown key 'num_inference_step'; did you mean"
    ):
        parse_experiment(values)


def test_the_preset_of_the_paper_gives_way_to_what_is_said() -> None:
    settings = parse_experiment({"synthesize": {"preset": "paper", "num_inference_steps": 20}}).synthesize
    assert (settings.guidance_scale, settings.resolution, settings.stored_size) == (2.0, 512, 256)
    assert (settings.num_inference_steps, settings.scheduler) == (20, "DDIMScheduler")


def test_a_mixture_is_a_variant_that_names_its_two_sources() -> None:
    of = ["retrieved", "synthetic"]
    values = {
        "sources": ["retrieved", "synthetic", "mixed-half", "mixed-more"],
        "variants": {"mixed-half": {"mix": {"of": of}}, "mixed-more": {"mix": {"of": of, "counts": [9, None]}}},
    }
    experiment = parse_experiment(values)
    assert experiment.set_sources == ("retrieved", "synthetic")
    mix = experiment.mix("mixed-half")
    assert mix is not None
    assert (mix.first_share, mix.counts, mix.gamma) == (0.5, None, None)
    assert experiment.mix("retrieved") is None
    assert "mixed" not in str(Experiment().sources)
    assert parse_experiment(yaml.safe_load(dump_experiment(experiment))) == experiment


@pytest.mark.parametrize(
    ("variants", "words"),
    [
        ({}, "'mixed-half' says nothing of what is mixed"),
        ({"mixed-half": {}}, "'mixed-half' says nothing of what is mixed"),
        (
            {"mixed-half": {"mix": {"of": ["retrieved", "synthetic"]}, "synthesize": {"eta": 1}}},
            "variants.mixed-half: synthesize is nothing to mixed images; they take mix",
        ),
        ({"mixed-half": {"mix": {"of": ["retrieved", "perturbed"]}}}, "unknown source 'perturbed'"),
        ({"mixed-half": {"mix": {"of": ["retrieved", "mixed-half"]}}}, "unknown source 'mixed-half'"),
        ({"mixed-half": {"mix": {"of": ["retrieved", "retrieved"]}}}, "names 'retrieved' twice"),
        (
            {"mixed-half": {"mix": {"of": ["retrieved", "synthetic"], "share": 0.5, "counts": [3, None]}}},
            "give share or counts, not both",
        ),
    ],
)
def test_a_mixture_that_says_too_little_or_too_much_is_one_line(variants: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse_experiment({"sources": ["retrieved", "synthetic", "mixed-half"], "variants": variants})


@pytest.mark.parametrize(
    ("source", "variant", "words"),
    [
        ("synthetic", {"generator": "x"}, "'synthetic' is as the experiment says; variants are called synthetic-NAME"),
        ("none", {}, "'none' is as the experiment says"),
        ("retrieved", {"synthesize": {"eta": 1}}, "'retrieved' is as the experiment says"),
        (
            "synthetic-a",
            {"perturb": {"strength": 0.2}},
            "perturb is nothing to synthetic images; they take generator and synth",
        ),
        ("synthetic-a", {"mix": {"of": ["retrieved", "synthetic"]}}, "mix is nothing to synthetic images"),
        (
            "perturbed-0.4",
            {"perturb": {"strength": 0.2}},
            "variants.perturbed-0.4: perturb.strength is not what the name says",
        ),
        (
            "synthetic-llm",
            {"synthesize": {"prompts": {"strategy": "file"}}},
            "variants.synthetic-llm: synthesize.prompts is not what the name says",
        ),
    ],
)
def test_nothing_that_a_variant_says_is_passed_over(source: str, variant: dict[str, object], words: str) -> None:
    values = {"sources": list(dict.fromkeys(["none", "retrieved", "synthetic", source])), "variants": {source: variant}}
    with pytest.raises(UsageError, match=words):
        parse_experiment(values)


def test_a_strength_may_be_said_twice_and_have_a_name() -> None:
    perturb = {"perturb": {"strength": 0.2}}
    values = {"sources": ["retrieved", "perturbed-0.20", "perturbed-low"]}
    values |= {"variants": {"perturbed-0.20": perturb, "perturbed-low": perturb}}
    experiment = parse_experiment(values)
    assert [experiment.variant(source).perturb.strength for source in values["sources"][1:]] == [0.2, 0.2]


def test_two_sources_are_compared() -> None:
    with pytest.raises(UsageError, match="primary: 'retrieved' twice; name two sources"):
        parse_experiment({"primary": ["retrieved", "retrieved"]})


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_numbers_are_finite(value: str) -> None:
    with pytest.raises(UsageError, match=r"finetune\.weight_decay: input should be a finite number"):
        load_experiment(None, (f"finetune.weight_decay={value}",))


def test_a_name_counts_where_its_variant_says_more() -> None:
    values: dict[str, Any] = {"sources": ["retrieved", "synthetic-llm", "synthetic-places", "perturbed-0.2"]}
    values["variants"] = {
        "synthetic-llm": {"synthesize": {"prompts": {"temperature": 0.5}}},
        "synthetic-places": {"synthesize": {"guidance_scale": 1.5}},
        "perturbed-0.2": {"synthesize": {"guidance_scale": 1.5}},
    }
    llm, places, perturbed = map(parse_experiment(values).variant, values["sources"][1:])
    assert (llm.synthesize.prompts.strategy, llm.synthesize.prompts.temperature) == ("llm", 0.5)
    assert (places.synthesize.prompts.strategy, places.synthesize.guidance_scale) == ("places", 1.5)
    assert (perturbed.perturb.strength, perturbed.synthesize.guidance_scale) == (0.2, 1.5)
