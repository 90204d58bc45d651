"""Names of models, and what cannot be loaded: one line that says what to do."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path

import open_clip
import pytest
import timm
import torch
from kinds import OPEN_CLIP, make_model, save_weights
from safetensors.torch import load_file

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.models import TimmModel, load_clip, load_model
from retrieve_or_generate.models.loading import _preprocessing
from retrieve_or_generate.weights import clip_fingerprint, find_model


@pytest.fixture(autouse=True, scope="module")
def _tiny(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Architectures of open_clip that load in a moment: `tiny`, and `tiny-wide` and `tiny-large` that are not it."""
    folder = tmp_path_factory.mktemp("architectures")
    vit = OPEN_CLIP["vit"]
    (folder / "tiny.json").write_text(json.dumps(vit))
    (folder / "tiny-wide.json").write_text(json.dumps(vit | {"vision_cfg": vit["vision_cfg"] | {"width": 48}}))
    (folder / "tiny-large.json").write_text(json.dumps(vit | {"vision_cfg": vit["vision_cfg"] | {"image_size": 48}}))
    open_clip.add_model_config(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        network = open_clip.create_model("tiny")
    path = tmp_path_factory.mktemp("checkpoints") / "clip.safetensors"
    save_weights(network, path)
    return path


def test_a_checkpoint_file_with_its_sha256(checkpoint: Path) -> None:
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    clip = load_clip(f"tiny/{checkpoint}#{sha256}")
    assert torch.equal(clip.network.visual.proj, load_file(checkpoint)["visual.proj"])
    assert clip.fingerprint == clip_fingerprint(f"tiny/{checkpoint}") != clip_fingerprint(f"tiny-wide/{checkpoint}")


def test_a_training_checkpoint_is_read_without_running_it(checkpoint: Path, tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in load_file(checkpoint).items()}
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "epoch_3.pt")
    clip = load_clip(f"tiny/{tmp_path / 'epoch_3.pt'}")
    assert torch.equal(clip.network.visual.proj, state["module.visual.proj"])


class _Program:
    """What a pickle can do to whoever loads it."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("run",))


def test_a_checkpoint_that_runs_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": _Program()}, tmp_path / "clip.pt")
    with pytest.raises(IntegrityError, match=r"clip.pt: holds more than weights, and what else may be a program"):
        load_clip(f"tiny/{tmp_path / 'clip.pt'}")
    assert capsys.readouterr().out == ""


def test_an_archive_of_a_program_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "clip.pt")
    with pytest.raises(UsageError, match=r"clip.pt: a TorchScript archive, which is a program; give the published tag"):
        load_clip(f"tiny/{tmp_path / 'clip.pt'}")


def test_another_sha256(checkpoint: Path) -> None:
    with pytest.raises(IntegrityError, match=rf"^{checkpoint}: its sha256 is [0-9a-f]{{64}}, not {'0' * 64}$"):
        load_clip(f"tiny/{checkpoint}#{'0' * 64}")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tiny/no-such-file.pt", r"^model 'tiny/no-such-file.pt': no file no-such-file.pt$"),
        ("tiny/FILE#123", r"what follows # is no sha256 \(64 hexadecimal digits\)$"),
        ("FILE", r"a file does not say what architecture it is of; write ARCH//.*clip.safetensors$"),
        ("huge/FILE", r"^unknown model 'huge/"),
    ],
)
def test_a_name_that_does_not_fit(name: str, told: str, checkpoint: Path) -> None:
    with pytest.raises(UsageError, match=told):
        load_clip(name.replace("FILE", str(checkpoint)))


@pytest.mark.parametrize(
    ("architecture", "problem"),
    [
        ("tiny-wide", r"visual\.\S+ is .* there, .* here"),
        ("tiny-large", r"visual.positional_embedding is \(17, 32\) there"),
    ],
)
def test_a_checkpoint_of_another_architecture(architecture: str, problem: str, checkpoint: Path) -> None:
    with pytest.raises(
        IntegrityError, match=rf"weights of another architecture than {architecture} \({problem}"
    ) as told:
        load_clip(f"{architecture}/{checkpoint}")
    assert "\n" not in str(told.value)


def test_a_checkpoint_of_a_timm_model_is_none_of_a_clip(checkpoint: Path, tmp_path: Path) -> None:
    name = make_model("test_resnet", tmp_path)
    with pytest.raises(IntegrityError, match=r"of another architecture than tiny \(\S+ is not there"):
        load_clip(f"tiny/{tmp_path / 'test_resnet.safetensors'}")
    with pytest.raises(IntegrityError, match=r"weights of another architecture than test_resnet"):
        load_model(f"timm:test_resnet/{checkpoint}")
    with pytest.raises(IntegrityError, match=r"weights of another architecture than test_vit"):
        load_model(name.replace("timm:test_resnet", "timm:test_vit"))


@pytest.mark.parametrize(("key", "prefix"), [("model", ""), ("state_dict", "module."), (None, "_orig_mod.")])
def test_a_training_checkpoint_of_timm_has_its_head_however_it_was_saved(
    key: str | None, prefix: str, tmp_path: Path
) -> None:
    network = timm.create_model("test_resnet", num_classes=7)
    state = {prefix + name: value for name, value in network.state_dict().items()}
    torch.save({key: state, "epoch": 3} if key else state, tmp_path / "last.pth.tar")
    model = load_model(f"timm:test_resnet/{tmp_path / 'last.pth.tar'}")
    assert isinstance(model, TimmModel)
    assert model.n_classes == 7
    assert torch.equal(model.head.weight, network.fc.weight)


def test_a_checkpoint_of_timm_that_runs_code_is_refused(tmp_path: Path) -> None:
    torch.save({"model": _Program()}, tmp_path / "last.pt")
    with pytest.raises(IntegrityError, match=r"last.pt: holds more than weights, and what else may be a program"):
        load_model(f"timm:test_resnet/{tmp_path / 'last.pt'}")


def test_a_truncated_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:-1000])
    with pytest.raises(IntegrityError, match=r"cut.safetensors: open_clip cannot load it \(.+\)$"):
        load_clip(f"tiny/{tmp_path / 'cut.safetensors'}")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ViT-B-16/openai", "trained with QuickGELU, which ViT-B-16 does not have; give ViT-B-16-quickgelu/openai$"),
        ("RN50/yfcc15m", "trained with QuickGELU, which RN50 does not have; give RN50-quickgelu/yfcc15m$"),
        ("ViT-B-32/laion400m_e32", "give ViT-B-32-quickgelu/laion400m_e32$"),
        (
            "ViT-B-16-quickgelu/laion2b_s34b_b88k",
            "not of ViT-B-16-quickgelu, whose activation is another; give ViT-B-16/laion2b_s34b_b88k$",
        ),
        ("ViT-B-16/laion2b_s34b_b88", "unknown weights of ViT-B-16 .* did you mean 'laion2b_s34b_b88k'"),
        ("timm:resnet5", "unknown timm model 'resnet5'; did you mean 'resnet50"),
        ("timm:resnet50/a1_in1", "unknown weights of resnet50 'a1_in1'; did you mean 'a1_in1k'"),
        ("timm:", "unknown model 'timm:'"),
    ],
)
def test_weights_that_do_not_go_with_the_architecture(name: str, told: str) -> None:
    with pytest.raises(UsageError, match=told) as said:
        load_model(name)
    assert "\n" not in str(said.value)


def test_every_published_name_is_taken_or_has_a_twin_that_is() -> None:
    from retrieve_or_generate.models.loading import check_names

    refused = []
    for architecture, tag in open_clip.list_pretrained():
        try:
            check_names(find_model(f"{architecture}/{tag}"))
        except UsageError as error:
            refused.append((f"{architecture}/{tag}", str(error).rsplit("give ", 1)[1]))
    assert ("ViT-L-14/openai", "ViT-L-14-quickgelu/openai") in refused
    for _, twin in refused:
        check_names(find_model(twin))


def test_a_file_of_weights_is_normalised_as_its_architecture_is() -> None:
    assert _preprocessing("ViT-B-16-SigLIP") == {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    assert _preprocessing("ViT-B-16")["image_mean"] == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert _preprocessing("tiny") == {}
    assert _preprocessing("ViT-L-14") == {}, "its published weights do not agree"


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match=r"no open_clip_config.json; a model folder is what"):
        load_model(str(tmp_path))


def test_a_folder_without_its_weights(tmp_path: Path) -> None:
    folder = Path(make_model("vit", tmp_path))
    (folder / "open_clip_model.safetensors").rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(
        UsageError, match=r"no open_clip_model.safetensors; a model folder has its weights as safetensors"
    ):
        load_model(str(folder))


def test_names_that_stay_what_they_are(tmp_path: Path) -> None:
    """Fingerprints are parts of keys of finished work."""
    assert clip_fingerprint("ViT-B-16/laion2b_s34b_b88k") == "c1fd35e6b618e4db"
    assert clip_fingerprint("hf-hub:laion/CLIP") == "fa5a039c7ae1f6be"
    folder = Path(make_model("vit", tmp_path))
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert clip_fingerprint(str(copy)) == clip_fingerprint(str(folder))
