"""Libraries are quiet while models load, and only then; a hub that is not there is told from other failures."""

from __future__ import annotations

import logging

import httpx
import pytest

from retrieve_or_generate.hub import is_unreachable, quiet


def test_nothing_is_logged_meanwhile_and_everything_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        logging.getLogger("some.library").critical("meanwhile")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), quiet():
        fail()
    logging.getLogger("some.library").warning("afterwards")
    assert [record.message for record in caplog.records] == ["afterwards"]


def test_a_handler_that_a_library_adds_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    with quiet():
        logging.error("a module's function adds a handler where there is none")
        assert root.handlers
    assert root.handlers == []


def test_what_came_of_the_network_is_found_below_other_errors() -> None:
    def wrapped(cause: Exception) -> Exception:
        try:
            try:
                raise cause
            except Exception as error:
                raise RuntimeError("cannot load it") from error
        except RuntimeError as error:
            return error

    assert is_unreachable(wrapped(httpx.ConnectError("no route")))
    assert not is_unreachable(wrapped(OSError("damaged")))
