"""Generators of every family from folders and from a hub; what is refused, in one line and before anything is unpickled or run."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.experiment import Experiment
from retrieve_or_generate.hub import quiet
from retrieve_or_generate.settings import SynthesizeSettings
from retrieve_or_generate.synthesize.pipelines import Pipeline, load_pipeline
from retrieve_or_generate.synthesize.unsaid import unsaid
from retrieve_or_generate.weights import find_generator, pinned_generator

from .builders import BUILDERS, as_published, build, save
from .hub import Hub, Repository, commit_of, hub, point_at

SMALL = SynthesizeSettings(dtype="float32", resolution=32, num_inference_steps=2)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    with unsaid():
        return {name: save(name, folder / name) for name in BUILDERS} | {
            "checked": save("sd1", folder / "checked", checker=True)
        }


@pytest.fixture
def sd1(families: dict[str, Path], tmp_path: Path) -> Path:
    """One to spoil."""
    return shutil.copytree(families["sd1"], tmp_path / "sd1")


def drawn(pipeline: Any, **arguments: Any) -> np.ndarray:
    """Two pictures of two steps."""
    seeds = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    given = {"num_inference_steps": 2, "height": 32, "width": 32, "output_type": "np", "generator": seeds} | arguments
    with torch.inference_mode(), unsaid():
        return pipeline(["a cat", "a dog"], **given).images


@pytest.mark.parametrize("family", BUILDERS)
def test_every_family_is_loaded_and_draws_what_it_drew_before_it_was_saved(
    family: str, families: dict[str, Path]
) -> None:
    loaded = load_pipeline(str(families[family]), SMALL)
    before = build(family)
    before.set_progress_bar_config(disable=True)
    assert type(loaded.text) is type(before)
    assert np.abs(drawn(loaded.text) - drawn(before)).max() < 1e-5
    assert loaded.name == f"{family}@{loaded.fingerprint}"
    assert (loaded.size, loaded.multiple) == {"sd3": (32, 8), "flux": (512, 8)}.get(family, (32, 4))


@pytest.mark.parametrize("family", BUILDERS)
def test_every_family_has_an_image_to_image_pipeline_of_the_same_weights(
    family: str, families: dict[str, Path]
) -> None:
    loaded = load_pipeline(str(families[family]), SMALL)
    assert loaded.image is not None
    assert loaded.image.vae is loaded.text.vae
    arguments = {"image": torch.rand(2, 3, 32, 32), "strength": 0.5, "num_inference_steps": 4}
    if "height" not in type(loaded.image).__call__.__annotations__:
        made = drawn_from(loaded.image, arguments)
    else:
        made = drawn(loaded.image, **arguments)
    assert made.shape == (2, 32, 32, 3)


def drawn_from(pipeline: Any, arguments: dict[str, Any]) -> np.ndarray:
    with torch.inference_mode(), unsaid():
        return pipeline(["a cat", "a dog"], output_type="np", **arguments).images


def test_names_of_the_libraries_of_2022(families: dict[str, Path], tmp_path: Path) -> None:
    """Weights and configurations under the names that published repositories still have, read as what they are today."""
    old = load_pipeline(str(as_published(shutil.copytree(families["checked"], tmp_path / "old"))), SMALL)
    new = load_pipeline(str(families["checked"]), SMALL)
    assert old.size == new.size
    assert np.array_equal(drawn(old.text), drawn(new.text))
    assert old.checker is not None
    assert new.checker is not None
    before, after = (dict(one.checker.network.named_parameters()) for one in (old, new))
    assert all(torch.equal(before[name], after[name]) for name in after)
    assert old.checker(pictures()).tolist() == new.checker(pictures()).tolist()


@pytest.mark.gpu
def test_the_checker_says_the_same_on_a_gpu(families: dict[str, Path]) -> None:
    there, here = (load_pipeline(str(families["checked"]), SMALL, device).checker for device in ("cuda", "cpu"))
    assert there is not None
    assert here is not None
    assert there(pictures()).tolist() == here(pictures()).tolist()


def test_the_generator_of_the_package() -> None:
    pipeline = load_pipeline("pocket", SynthesizeSettings())
    assert pipeline.name == f"pocket@{pipeline.fingerprint}"
    assert (pipeline.size, pipeline.multiple, pipeline.checker) == (32, 4, None)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_of_the_dtype_that_was_asked_for(dtype: str, families: dict[str, Path]) -> None:
    pipeline = load_pipeline(str(families["sd1"]), SMALL.model_copy(update={"dtype": dtype}))
    assert {
        one.dtype for part in ("unet", "vae", "text_encoder") for one in getattr(pipeline.text, part).parameters()
    } == {getattr(torch, dtype)}
    assert np.isfinite(drawn(pipeline.text)).all()


# Schedulers, sides


def test_a_scheduler_takes_over_what_the_pipelines_own_is_configured_with(families: dict[str, Path]) -> None:
    asked = SMALL.model_copy(update={"scheduler": "EulerDiscreteScheduler"})
    scheduler = load_pipeline(str(families["sd2"]), asked).text.scheduler
    assert type(scheduler).__name__ == "EulerDiscreteScheduler"
    assert (scheduler.config.prediction_type, scheduler.config.beta_end) == ("v_prediction", 0.012)


def test_an_unknown_scheduler(families: dict[str, Path]) -> None:
    with pytest.raises(
        UsageError, match=r"unknown scheduler 'DIMScheduler'; did you mean 'DDIMScheduler'\? \(known: DDIM"
    ):
        load_pipeline(str(families["sd1"]), SMALL.model_copy(update={"scheduler": "DIMScheduler"}))


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [("sd3", "DDIMScheduler"), ("sd1", "FlowMatchEulerDiscreteScheduler"), ("sd1", "DPMSolverSDEScheduler")],
)
def test_a_scheduler_that_does_not_go_with_the_pipeline(family: str, scheduler: str, families: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=f"unknown scheduler '{scheduler}'"):
        load_pipeline(str(families[family]), SMALL.model_copy(update={"scheduler": scheduler}))


@pytest.mark.parametrize(
    ("family", "side", "near"), [("sd1", 30, "28 or 32"), ("flux", 36, "32 or 40"), ("sd3", 20, "16 or 24")]
)
def test_a_side_that_the_autoencoder_cannot_make(family: str, side: int, near: str, families: dict[str, Path]) -> None:
    with pytest.raises(
        UsageError, match=rf"synthesize\.resolution: {side} is no multiple of \d, as .* needs it; take {near}"
    ):
        load_pipeline(str(families[family]), SMALL.model_copy(update={"resolution": side}))


def test_without_a_resolution_the_side_is_the_one_that_it_was_trained_at(families: dict[str, Path]) -> None:
    assert load_pipeline(str(families["flux"]), SynthesizeSettings()).side(SynthesizeSettings()) == 512


def test_the_preset_of_the_paper() -> None:
    """2406.05184, appendix C.1 and its scripts; no safety checker, no negative prompt."""
    preset = SynthesizeSettings.model_validate({"preset": "paper"})
    assert (preset.scheduler, preset.num_inference_steps, preset.eta) == ("DDIMScheduler", 50, 0.0)
    assert (preset.guidance_scale, preset.negative_prompt) == (2.0, "")
    assert (preset.resolution, preset.stored_size, preset.safety_checker) == (512, 256, False)
    assert SynthesizeSettings.model_validate({"preset": "paper", "guidance_scale": 7.5}).guidance_scale == 7.5


def test_the_preset_of_the_paper_stands_for_its_generator_where_none_is_named() -> None:
    def generator(**fields: Any) -> str:
        return Experiment.model_validate(fields).generator

    assert generator(synthesize={"preset": "paper"}) == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert generator(synthesize=SynthesizeSettings(preset="paper")) == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert generator(synthesize={"preset": "paper"}, generator="pocket") == generator() == "pocket"


# Safety checkers


def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (11, 40, 40, 3)).astype(np.uint8)


def test_the_checker_says_what_the_pipeline_would_have_said(families: dict[str, Path]) -> None:
    checker = load_pipeline(str(families["checked"]), SMALL).checker
    assert checker is not None
    images = pictures() // np.linspace(1, 8, 11).astype(np.uint8).reshape(-1, 1, 1, 1)
    with torch.no_grad(), unsaid():  # thresholds between the pictures' own scores, so that some go and some stay
        pixels = checker.extractor([Image.fromarray(one) for one in images], return_tensors="pt").pixel_values
        embedded = checker.network.visual_projection(checker.network.vision_model(pixels)[1])
        scores = torch.nn.functional.cosine_similarity(embedded[:, None], checker.network.concept_embeds[None], dim=2)
        checker.network.concept_embeds_weights.copy_(scores.sort(0).values[-2:].mean(0))
        original = build("sd1", checker=True)
        original.safety_checker = checker.network
        _, theirs = original.run_safety_checker(
            torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1, "cpu", torch.float32
        )
    ours = checker(images)
    assert ours.dtype == bool
    assert 0 < ours.sum() < len(ours)
    assert ours.tolist() == theirs
    assert checker(images[3:4]).tolist() == ours[3:4].tolist()
    assert checker(images[:0]).shape == (0,)


def test_the_pipelines_own_call_blackens_nothing(families: dict[str, Path]) -> None:
    pipeline = load_pipeline(str(families["checked"]), SMALL)
    assert pipeline.text.safety_checker is None
    assert np.abs(drawn(pipeline.text) - drawn(load_pipeline(str(families["sd1"]), SMALL).text)).max() < 1e-5


def test_a_checker_that_is_not_wanted_is_not_read(families: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(families["checked"], tmp_path / "checked")
    (folder / "safety_checker/model.safetensors").unlink()
    assert load_pipeline(str(folder), SMALL.model_copy(update={"safety_checker": False})).checker is None
    with pytest.raises(IntegrityError, match="safety_checker"):
        load_pipeline(str(folder), SMALL)


# What is refused


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"no model_index\.json; a generator is a folder that diffusers' save_pretrained wrote"
    ):
        load_pipeline(str(tmp_path), SMALL)


def test_one_file(tmp_path: Path) -> None:
    (tmp_path / "sd.ckpt").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"sd\.ckpt: one file; a generator is a folder"):
        load_pipeline(str(tmp_path / "sd.ckpt"), SMALL)
    with pytest.raises(
        UsageError, match=r"pickled weights \(sd\.ckpt\), which are never read, and no model_index\.json"
    ):
        load_pipeline(str(tmp_path), SMALL)


class _Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize(
    ("part", "name"), [("unet", "diffusion_pytorch_model.bin"), ("text_encoder", "pytorch_model.bin")]
)
def test_pickled_weights_are_refused_and_not_unpickled(sd1: Path, tmp_path: Path, part: str, name: str) -> None:
    for path in (sd1 / part).glob("*.safetensors"):
        path.unlink()
    (sd1 / part / name).write_bytes(pickle.dumps(_Trap(str(tmp_path / "sprung"))))
    with pytest.raises(UsageError, match=rf"{part}: pickled weights \({name}\), which can run code and are never read"):
        load_pipeline(str(sd1), SMALL)
    assert not (tmp_path / "sprung").exists()


def test_pickled_weights_beside_safetensors_are_passed_over(sd1: Path, tmp_path: Path) -> None:
    (sd1 / "unet/diffusion_pytorch_model.bin").write_bytes(pickle.dumps(_Trap(str(tmp_path / "sprung"))))
    (sd1 / "v1-5.ckpt").write_bytes(pickle.dumps(_Trap(str(tmp_path / "sprung"))))
    assert load_pipeline(str(sd1), SMALL).size == 32
    assert not (tmp_path / "sprung").exists()


def test_an_index_of_shards_that_leads_to_a_pickle(sd1: Path) -> None:
    weights = sd1 / "unet/diffusion_pytorch_model.safetensors"
    index = {"metadata": {}, "weight_map": {"conv_in.bias": "diffusion_pytorch_model.bin"}}
    weights.with_name(weights.name + ".index.json").write_text(json.dumps(index))
    with pytest.raises(
        UsageError, match=r"names 'diffusion_pytorch_model\.bin', which is no safetensors file beside it"
    ):
        load_pipeline(str(sd1), SMALL)


def test_shards(families: dict[str, Path], sd1: Path) -> None:
    for path in (sd1 / "unet").iterdir():
        path.unlink()
    with unsaid():
        build("sd1").unet.save_pretrained(sd1 / "unet", max_shard_size="100KB")
    assert len(list((sd1 / "unet").glob("*.safetensors"))) > 1
    whole = load_pipeline(str(families["sd1"]), SMALL)
    assert np.array_equal(drawn(load_pipeline(str(sd1), SMALL).text), drawn(whole.text))
    next((sd1 / "unet").glob("*-00002-of-*")).unlink()
    with pytest.raises(
        IntegrityError, match=r"00002-of-\d+\.safetensors: missing, though diffusion_pytorch_model.* names it"
    ):
        load_pipeline(str(sd1), SMALL)


def test_variants_beside_the_weights_are_passed_over(sd1: Path) -> None:
    index = {"metadata": {}, "weight_map": {"conv_in.bias": "diffusion_pytorch_model.fp16-00001-of-00001.safetensors"}}
    (sd1 / "unet/diffusion_pytorch_model.fp16.safetensors.index.json").write_text(json.dumps(index))
    (sd1 / "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors").write_bytes(b"never read")
    assert load_pipeline(str(sd1), SMALL).size == 32


def test_a_truncated_file(sd1: Path) -> None:
    path = sd1 / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(IntegrityError, match=r"diffusion_pytorch_model\.safetensors: damaged \(.*\); get it anew"):
        load_pipeline(str(sd1), SMALL)
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(IntegrityError, match=r"diffusion_pytorch_model\.safetensors: damaged"):
        load_pipeline(str(sd1), SMALL)


@pytest.mark.parametrize(("part", "kind"), [("unet", "UNet2DConditionModel"), ("text_encoder", "CLIPTextModel")])
def test_weights_that_lack_a_tensor_are_not_filled_up_at_random(sd1: Path, part: str, kind: str) -> None:
    from safetensors.torch import load_file, save_file

    path = next((sd1 / part).glob("*.safetensors"))
    tensors = load_file(path)
    tensors.pop(max(tensors))
    save_file(tensors, path, {"format": "pt"})
    for context in (nullcontext, quiet):  # the libraries only log it
        with pytest.raises(IntegrityError, match=rf"sd1: weights of its {kind} are missing"), context():
            load_pipeline(str(sd1), SMALL)


def test_weights_of_another_shape(sd1: Path) -> None:
    config = sd1 / "unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"cross_attention_dim": 48}))
    with pytest.raises(IntegrityError, match=r"sd1: diffusers cannot load it \(.*shape"):
        load_pipeline(str(sd1), SMALL)


def changed_index(folder: Path, **changes: Any) -> str:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(folder)


def test_a_checker_without_what_feeds_it_is_not_left_out_silently(families: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(families["checked"], tmp_path / "checked")
    with pytest.raises(UsageError, match=r"a safety checker without its feature_extractor.*safety_checker=false"):
        load_pipeline(changed_index(folder, feature_extractor=[None, None]), SMALL)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"_class_name": "StableDiffusionInpaintPipeline"},
            r"a StableDiffusionInpaintPipeline, which makes no images of text alone",
        ),
        ({"_class_name": "StableDiffusionControlNetPipeline"}, r"makes no images of text alone"),
        ({"_class_name": ["pipeline", "Mine"]}, r"no pipeline of diffusers' own"),
        (
            {"unet": ["os", "system"]},
            r"unet: of library 'os'; parts of diffusers and transformers are loaded, no others",
        ),
        (
            {"scheduler": ["diffusers", "NoScheduler"]},
            r"a scheduler 'NoScheduler', which diffusers [\d.]+ does not have",
        ),
        (
            {"image_encoder": ["transformers", "CLIPVisionModel"]},
            r"image_encoder: missing, though model_index\.json names it",
        ),
    ],
)
def test_an_index_that_names_something_else(sd1: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load_pipeline(changed_index(sd1, **changes), SMALL)


def test_code_that_a_folder_brings_along_is_not_run(sd1: Path, tmp_path: Path) -> None:
    (sd1 / "unet/own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    (sd1 / "unet/own.py").rename(sd1 / "unet/diffusers.py")
    with pytest.raises(UsageError, match="cannot load it"):
        load_pipeline(str(sd1), SMALL)
    with pytest.raises(UsageError, match="of library 'own'"):
        load_pipeline(changed_index(sd1, unet=["own", "Own"]), SMALL)
    assert not (tmp_path / "ran").exists()


def test_a_damaged_index(sd1: Path) -> None:
    (sd1 / "model_index.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"model_index\.json: not readable as JSON"):
        load_pipeline(str(sd1), SMALL)


@pytest.mark.parametrize("name", ["pockt", "./no/folder", "/no/folder", "a/b/c", "a/b@"])
def test_an_unknown_name(name: str) -> None:
    what = "no folder" if "/" in name else "unknown generator"
    with pytest.raises(UsageError, match=rf"{what} '{name}': give 'pocket', a folder, or a Hub id"):
        load_pipeline(name, SMALL)


def test_nothing_is_printed_whatever_happens(sd1: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_pipeline(str(sd1), SMALL).text
    loaded("a cat " * 50, num_inference_steps=1, height=32, width=32)  # of which the text tower takes 16 tokens
    (sd1 / "text_encoder/model.safetensors").unlink()
    with pytest.raises(IntegrityError):
        load_pipeline(str(sd1), SMALL)
    assert capfd.readouterr() == ("", "")


# A hub

OLD, NEW = commit_of("old"), commit_of("new")


@pytest.fixture(scope="module")
def served(families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    pickled = shutil.copytree(families["sd1"], tmp_path_factory.mktemp("hub") / "pickled")
    (pickled / "unet/diffusion_pytorch_model.safetensors").rename(pickled / "unet/diffusion_pytorch_model.bin")
    other = tmp_path_factory.mktemp("hub-other")
    (other / "config.json").write_text("{}")
    repositories = {
        "org/sd": Repository({OLD: families["sd1"], NEW: families["sd2"]}, {"main": NEW, "v1": OLD}),
        "org/checked": Repository({NEW: families["checked"]}, {"main": NEW}),
        "org/pickled": Repository({NEW: pickled}, {"main": NEW}),
        "org/other": Repository({NEW: other}, {"main": NEW}),
        "org/gated": Repository({NEW: other}, {"main": NEW}, closed="GatedRepo"),
    }
    with hub(repositories) as one:
        yield one


@pytest.fixture
def online(served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """This process asks that hub, with an empty cache."""
    point_at(served.url, tmp_path / "cache", monkeypatch)
    served.asked.clear()
    return served


def same(pipeline: Pipeline, folder: Path) -> bool:
    return np.array_equal(drawn(pipeline.text), drawn(load_pipeline(str(folder), SMALL).text))


def test_a_hub_id_is_pinned_to_its_commit(online: Hub, families: dict[str, Path]) -> None:
    newest, tagged = load_pipeline("org/sd", SMALL), load_pipeline("org/sd@v1", SMALL)
    assert (newest.name, tagged.name) == (f"org/sd@{NEW}", f"org/sd@{OLD}")
    assert newest.fingerprint != tagged.fingerprint
    assert same(newest, families["sd2"])
    assert same(tagged, families["sd1"])
    assert load_pipeline(newest.name, SMALL).fingerprint == newest.fingerprint
    assert pinned_generator("org/sd") == newest.name
    assert pinned_generator("pocket") == "pocket"


def test_a_commit_that_is_here_asks_the_hub_for_nothing(online: Hub) -> None:
    name = load_pipeline("org/sd", SMALL).name
    online.asked.clear()
    assert load_pipeline(name, SMALL).name == name
    assert online.asked == []


def test_a_hub_that_went_away_and_what_is_here(online: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = load_pipeline("org/sd", SMALL).name
    point_at("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    assert load_pipeline("org/sd", SMALL).name == name
    with pytest.raises(
        UsageError, match=r"org/checked: no such folder, not in .*cache, and http://127.0.0.1:9 does not answer"
    ):
        load_pipeline("org/checked", SMALL)
    with pytest.raises(
        UsageError, match=rf"org/sd@{OLD}: no such folder, not in .*cache, and http://127.0.0.1:9 does not answer"
    ):
        load_pipeline(f"org/sd@{OLD}", SMALL)


def test_offline(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match=r"org/sd: not in .*cache, and HF_HUB_OFFLINE forbids to ask http://127"):
        load_pipeline("org/sd", SMALL)
    with pytest.raises(
        UsageError, match=rf"org/sd@{NEW}: not in .*cache, and HF_HUB_OFFLINE forbids to ask http://127"
    ):
        load_pipeline(f"org/sd@{NEW}", SMALL)
    assert online.asked == []


def test_a_checker_is_downloaded_only_where_it_is_wanted(online: Hub) -> None:
    without = load_pipeline("org/checked", SMALL.model_copy(update={"safety_checker": False}))
    assert without.checker is None
    assert not any("safety_checker/model" in asked for asked in online.asked)
    assert load_pipeline("org/checked", SMALL).checker is not None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/none", r"org/none: no such folder, and no such model at http://127"),
        ("org/sd@v9", r"org/sd: no revision 'v9' at http://127"),
        (f"org/sd@{commit_of('x')}", r"org/sd: no revision '[0-9a-f]{40}' at http://127"),
        ("org/gated", r"org/gated: its owner asks for consent; give it at http://127.*/org/gated"),
        ("org/other", r"no model_index\.json, so it is no pipeline of diffusers"),
        ("org/pickled", r"weights that are pickled, which are never read"),
    ],
)
def test_what_a_hub_does_not_give(online: Hub, name: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=said):
        load_pipeline(name, SMALL)
    assert not any(asked.startswith("GET") and asked.endswith((".bin", ".safetensors")) for asked in online.asked)
    assert capfd.readouterr() == ("", "")


def test_the_fingerprint_is_of_what_is_read(sd1: Path) -> None:
    before = find_generator(str(sd1)).fingerprint
    (sd1 / "README.md").write_text("words")
    (sd1 / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    assert find_generator(str(sd1)).fingerprint == before
    tokenizer = sd1 / "tokenizer/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert find_generator(str(sd1)).fingerprint != before
