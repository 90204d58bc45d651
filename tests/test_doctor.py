from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from retrieve_or_generate import doctor


def versions(**found: str) -> object:
    return lambda name: found.get(name.replace("-", "_"))


def test_this_environment_is_sound(tmp_path: Path) -> None:
    checks = doctor.examine(tmp_path / "not" / "there" / "yet", tmp_path)
    assert [check for check in checks if not check.ok] == []
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(("running", "ok"), [((3, 10), False), ((3, 11), True), ((3, 12), True), ((3, 13), False)])
def test_python_versions(running: tuple[int, int], ok: bool) -> None:
    assert doctor.python_check(running).ok is ok


def test_a_missing_package_is_a_fault() -> None:
    faults = [check.name for check in doctor.package_checks(versions(torch="2")) if not check.ok]  # type: ignore[arg-type]
    assert "torch" not in faults
    assert "diffusers" in faults


def test_both_faiss_packages_are_a_fault() -> None:
    check = doctor.faiss_check(versions(faiss_gpu="1.15.1", faiss_cpu="1.15.1"))  # type: ignore[arg-type]
    assert not check.ok
    assert "uninstall" in check.advice


def test_no_faiss_is_a_fault() -> None:
    assert not doctor.faiss_check(versions()).ok  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("package", "has_gpu_code", "ok"), [("gpu", True, True), ("gpu", False, False), ("cpu", False, True)]
)
def test_faiss_code_must_be_that_of_the_package(
    monkeypatch: pytest.MonkeyPatch, package: str, has_gpu_code: bool, ok: bool
) -> None:
    code = SimpleNamespace(StandardGpuResources=object) if has_gpu_code else SimpleNamespace()
    monkeypatch.setitem(sys.modules, "faiss", code)
    assert doctor.faiss_check(versions(**{f"faiss_{package}": "1.15.1"})).ok is ok  # type: ignore[arg-type]


def test_a_torchvision_without_operators_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist\nmore")

    monkeypatch.setattr("torchvision.ops.nms", missing)
    check = doctor.torch_check()
    assert (check.ok, check.found) == (False, "operator torchvision::nms does not exist")


def test_a_full_disk_is_a_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    assert not doctor.disk_check("cache", tmp_path).ok


def test_advice_stands_under_what_is_broken() -> None:
    text = doctor.as_text([doctor.Check("a", True, "fine", "unused"), doctor.Check("b", False, "broken", "mend it")])
    assert "unused" not in text
    assert text.splitlines()[1].startswith("FAULT  b")
    assert text.splitlines()[2].strip() == "mend it"


def test_decoded_images_are_told_of(tmp_path: Path) -> None:
    assert doctor.decoded_check(tmp_path).found == "none"
    (tmp_path / "decoded").mkdir()
    (tmp_path / "decoded/a.npy").write_bytes(bytes(1 << 20))
    (tmp_path / "decoded/a.json").write_bytes(b"{}")
    check = doctor.decoded_check(tmp_path)
    assert check.ok
    assert check.found.startswith("1 sets and splits, 0.0 GiB in")
