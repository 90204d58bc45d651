"""Texts that were paid for once are there for good, and never taken for what they are not."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from retrieve_or_generate.kept_texts import KeptTexts, forget


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ROG_CACHE", str(tmp_path))
    return tmp_path / "prompts" / "words-k"


def test_what_was_added_is_there_for_others_of_the_same_key(folder: Path) -> None:
    one, other = KeptTexts("words", "k"), KeptTexts("words", "k")
    assert dict(other.read()) == {}
    one.add({"a": ["x", "é"]})
    one.add({"b": []})
    assert dict(other.read()) == dict(one.read()) == {"a": ["x", "é"], "b": []}
    assert dict(KeptTexts("words", "other").read()) == {}


@pytest.mark.parametrize("damage", ["truncated", "changed", "swapped", "other", "not_text"])
def test_a_damaged_file_is_passed_over_and_can_be_added_anew(folder: Path, damage: str) -> None:
    KeptTexts("words", "k").add({"a": "one"})
    KeptTexts("words", "k").add({"b": "two"})
    first, second = sorted(folder.glob("*.json"))
    held = first.read_bytes()
    first.write_bytes(
        {
            "truncated": held[:-4],
            "changed": held.replace(b"one", b"own").replace(b"two", b"too"),
            "swapped": second.read_bytes(),
            "other": b"[]",
            "not_text": b"\xff\x00",
        }[damage]
    )
    there = KeptTexts("words", "k")
    lost = ({"a": "one", "b": "two"}.items() - there.read().items()).pop()
    assert len(there.read()) == 1
    there.add(dict([lost]))
    assert dict(KeptTexts("words", "k").read()) == {"a": "one", "b": "two"}


def test_a_file_that_is_not_finished_counts_for_nothing(folder: Path) -> None:
    kept = KeptTexts("words", "k")
    kept.add({"a": "one"})
    (folder / ".tmp-x.json").write_text('{"b": "tw')
    assert dict(KeptTexts("words", "k").read()) == {"a": "one"}


def _make(number: int) -> None:
    with KeptTexts("words", "k").making() as known:
        if "a" not in known:
            KeptTexts("words", "k").add({"a": f"by {number}"})


def test_several_processes_make_one_thing_once(folder: Path) -> None:
    makers = [multiprocessing.get_context("fork").Process(target=_make, args=(n,)) for n in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
    assert [maker.exitcode for maker in makers] == [0] * 4
    assert len(list(folder.glob("*.json"))) == 1


def test_what_is_to_be_forgotten_is_nowhere_and_all_else_is(folder: Path) -> None:
    KeptTexts("words", "k").add({"a": "one", "b": "two"})
    KeptTexts("words", "k").add({"a": "uno"})
    KeptTexts("words", "other").add({"a": "eins", "c": "drei"})
    KeptTexts("others", "k").add({"a": "stays"})
    assert forget("words", {"a"}) == 3
    assert dict(KeptTexts("words", "k").read()) == {"b": "two"}
    assert dict(KeptTexts("words", "other").read()) == {"c": "drei"}
    assert dict(KeptTexts("others", "k").read()) == {"a": "stays"}
    held = b"".join(path.read_bytes() for path in folder.parent.glob("words-*/*.json"))
    assert not any(word in held for word in (b"one", b"uno", b"eins"))
    assert forget("words", {"a"}) == 0
