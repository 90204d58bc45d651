"""Learned descriptors from files of the published forms: the right preprocessing, the right numbers, a line for other files."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from retrieve_or_generate.curate.descriptor import find_descriptor
from retrieve_or_generate.curate.kinds import View
from retrieve_or_generate.curate.learned import load_isc, load_sscd
from retrieve_or_generate.curate.near import copies
from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.settings import CurateSettings

ARCHITECTURE, SIZE = "test_efficientnet", 64


class _Patches(torch.nn.Module):
    """Stands in for SSCD: 48 numbers that a crop keeps and a colour changes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 48, 32, 32)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.conv(pixels).mean((2, 3))


class _Flat(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean()


def _script(module: torch.nn.Module, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(module.eval()).save(str(path))
    return path


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 3, 320, 320)).astype(np.uint8)


def test_sscd_sees_imagenet_normalised_pixels_of_320(tmp_path: Path, pixels: np.ndarray) -> None:
    network = _Patches()
    descriptor = load_sscd(_script(network, tmp_path / "sscd.torchscript.pt"), "cpu")
    assert (descriptor.size, descriptor.dimension) == (320, 48)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = F.normalize(network((torch.from_numpy(pixels) / 255 - mean) / std))
    found = descriptor.describe(pixels)
    assert found.dtype == np.float32
    assert np.allclose(found, expected.numpy(), atol=1e-5)
    assert descriptor.describe(pixels[:0]).shape == (0, 48)


def _isc(path: Path, architecture: str = ARCHITECTURE) -> dict[str, torch.Tensor]:
    backbone = timm.create_model(ARCHITECTURE, features_only=True, pretrained=False)
    parts = {"backbone": backbone, "fc": torch.nn.Linear(backbone.feature_info.channels()[-1], 256, bias=False)}
    parts["bn"] = torch.nn.BatchNorm1d(256)
    state = {f"module.{name}.{key}": v for name, part in parts.items() for key, v in part.state_dict().items()}
    state["module.bn.running_mean"] = torch.randn(256)
    torch.save({"arch": architecture, "args": argparse.Namespace(input_size=SIZE), "state_dict": state}, path)
    return state


def test_isc_is_the_published_network(tmp_path: Path, pixels: np.ndarray) -> None:
    state = _isc(tmp_path / "isc_ft_v107.pth.tar")
    descriptor = load_isc(tmp_path / "isc_ft_v107.pth.tar", "cpu")
    assert (descriptor.size, descriptor.dimension) == (SIZE, 256)
    backbone = timm.create_model(ARCHITECTURE, features_only=True, pretrained=False).eval()
    backbone.load_state_dict({k.removeprefix("module.backbone."): v for k, v in state.items() if ".backbone." in k})
    mean, std = (torch.tensor(backbone.default_cfg[part]).view(3, 1, 1) for part in ("mean", "std"))
    small = pixels[:, :, :SIZE, :SIZE]
    with torch.no_grad():
        last = backbone((torch.from_numpy(small) / 255 - mean) / std)[-1]
        pooled = F.avg_pool2d(last.clamp(min=1e-6), last.shape[-2:])[:, :, 0, 0]  # GeM with p = 1
        raw = pooled @ state["module.fc.weight"].T - state["module.bn.running_mean"]
        expected = F.normalize(raw / (state["module.bn.running_var"] + 1e-5).sqrt())
    assert np.allclose(descriptor.describe(np.ascontiguousarray(small)), expected.numpy(), atol=1e-4)


def test_the_record_names_the_weights_never_the_path(tmp_path: Path) -> None:
    path = _script(_Patches(), tmp_path / "weights.pt")
    found = find_descriptor(CurateSettings(descriptor=str(path)))
    assert found.record == {"name": "sscd", "weights": found.record["weights"], "threshold": 0.75}
    assert len(found.record["weights"]) == 16
    assert find_descriptor(CurateSettings(descriptor=f"sscd:{path}")).record == found.record
    isc = find_descriptor(CurateSettings(descriptor=f"isc:{path}")).record
    assert isc == found.record | {"name": "isc", "threshold": 0.604169}
    other = CurateSettings(descriptor=f"isc:{path}", descriptor_threshold=0.5)
    assert find_descriptor(other).record["threshold"] == 0.5
    assert find_descriptor(CurateSettings()).record == {"name": "thumbnail-1"}


def test_copies_are_what_reaches_the_threshold(tmp_path: Path, pixels: np.ndarray) -> None:
    settings = CurateSettings(descriptor=str(_script(_Patches(), tmp_path / "weights.pt")))
    descriptor = find_descriptor(settings)
    vectors = np.array([[1, 0], [0.76, 0.65], [0.74, 0.6726]], np.float32)
    i, j = copies(descriptor.comparison(vectors[:1], vectors))
    assert (i.tolist(), j.tolist()) == ([0, 0], [0, 1])
    kind = descriptor.kind(32, "cpu")
    assert kind.view == View("whole", 320)
    wide = np.zeros((100, 300, 3), np.uint8)
    wide[:, :150] = 255
    assert (
        View("whole", 320).of(wide)[:, :150].min() == 255
    )  # skewed, not cropped: half of the picture is half of the square
    assert kind.compute(pixels).shape == (3, 48)


@pytest.mark.parametrize(
    ("descriptor", "words"),
    [
        ("nowhere.pt", r"curate\.descriptor: nowhere\.pt: no such file; give 'thumbnail', the path of an SSCD model"),
        ("isc:nowhere.tar", r"curate\.descriptor: nowhere\.tar: no such file"),
        ("thumbnails", r"curate\.descriptor: thumbnails: no such file; give 'thumbnail'"),
    ],
)
def test_weights_that_are_not_there(descriptor: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        find_descriptor(CurateSettings(descriptor=descriptor))


def test_thumbnails_have_no_threshold() -> None:
    with pytest.raises(UsageError, match=r"curate\.descriptor_threshold: only a learned descriptor"):
        find_descriptor(CurateSettings(descriptor_threshold=0.7))


def test_files_that_are_no_weights_are_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    cases = {b"": "not a", b"<html>": "not a", bytes(1000): "not a"}
    for data, words in cases.items():
        path.write_bytes(data)
        for load in (load_sscd, load_isc):
            with pytest.raises(IntegrityError, match=f"weights: {words}") as caught:
                load(path, "cpu")
            assert "\n" not in str(caught.value)
    with pytest.raises(IntegrityError, match=r"weights: (gives no finite vector|the network does not run)"):
        load_sscd(_script(_Flat(), path), "cpu")
    _isc(path, architecture="no_such_network")
    with pytest.raises(IntegrityError, match="weights: its weights do not fit its architecture"):
        load_isc(path, "cpu")
    _isc(path, architecture="test_vit")
    with pytest.raises(IntegrityError, match="weights: its weights do not fit its architecture"):
        load_isc(path, "cpu")


class _Canary:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("canary"),))  # type: ignore[return-value]


def test_a_checkpoint_cannot_run_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(
        {"arch": _Canary(), "args": argparse.Namespace(input_size=SIZE), "state_dict": {}}, tmp_path / "evil.tar"
    )
    with pytest.raises(IntegrityError, match=r"evil\.tar: not an ISC21 checkpoint"):
        load_isc(tmp_path / "evil.tar", "cpu")
    assert not Path("canary").exists()
