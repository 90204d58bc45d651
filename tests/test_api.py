"""The verbs as Python functions, on the pocket world."""

from __future__ import annotations

import importlib
import inspect

import pytest

import retrieve_or_generate
from retrieve_or_generate import api
from retrieve_or_generate.errors import UsageError


@pytest.mark.parametrize("verb", retrieve_or_generate.__all__)
def test_a_verb_is_a_function_and_its_package_at_once(verb: str) -> None:
    package = importlib.import_module(f"retrieve_or_generate.{verb}")
    function = getattr(retrieve_or_generate, verb)
    assert function is package
    assert callable(function)
    assert inspect.signature(function) == inspect.signature(getattr(api, verb))
    assert hasattr(package, "__path__")


def test_a_called_verb_is_the_function_of_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    for verb in retrieve_or_generate.__all__:
        monkeypatch.setattr(api, verb, lambda *given, verb=verb, **named: (verb, given, named))
        assert getattr(retrieve_or_generate, verb)("x", out="y") == (verb, ("x",), {"out": "y"})


def test_other_names_are_no_verbs() -> None:
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = retrieve_or_generate.train


def test_a_device_is_checked_before_anything_runs() -> None:
    assert api.check_device("cpu") == "cpu"
    with pytest.raises(UsageError, match="unknown device 'gpu0': give cpu, cuda or cuda:N"):
        api.check_device("gpu0")
    with pytest.raises(UsageError, match=r"device 'cuda:63' is not there; there is .*cpu"):
        api.check_device("cuda:63")
