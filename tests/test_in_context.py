"""What a language model is shown."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.in_context import EXAMPLES, SHARES, Example, asked, in_context, read_lists


def test_a_query_by_hand() -> None:
    shown = [Example("fox", "a fox waits"), Example("cow, meadow", "a cow grazes in a meadow")]
    assert in_context(shown, asked("merlin 2 aircraft", "beach")).splitlines()[1:] == [
        "fox => a fox waits",
        "cow, meadow => a cow grazes in a meadow",
        "merlin 2 aircraft, beach =>",
    ]


def test_our_lists_name_what_they_ask_for() -> None:
    lists = read_lists()
    for kind in ("object", "background", "relation"):
        for example in lists.examples[kind]:
            assert example.asked.split(", ")[0] in example.caption, example
            assert not example.caption.endswith(".")
    for example in lists.examples["relation"]:
        assert example.asked.split(", ")[1] in lists.relations
        assert example.asked.split(", ")[1] in example.caption
    assert len(lists.backgrounds[""]) >= 30


def test_kinds_are_drawn_in_their_shares_and_examples_are_of_the_kind() -> None:
    lists, n = read_lists(), 4000
    queries = [lists.query("zebra", "zebra", False, np.random.default_rng(seed)) for seed in range(n)]
    counts = Counter(query.kind for query in queries)
    for kind, share in SHARES.items():
        assert counts[kind] == pytest.approx(share * n, abs=4 * (share * (1 - share) * n) ** 0.5)
    for query in queries[:200]:
        *shown, last = query.text.splitlines()[1:]
        assert len(set(shown)) == EXAMPLES
        assert set(shown) <= {example.line for example in lists.examples[query.kind]}
        assert last == (f"zebra, {query.beside} =>" if query.beside else "zebra =>")
        assert bool(query.beside) == (query.kind in ("relation", "background"))


def test_no_example_is_of_the_class_itself() -> None:
    lists = read_lists()
    queries = [lists.query("Fox", "fox", False, np.random.default_rng(seed)) for seed in range(400)]
    assert not any("fox" in line for query in queries for line in query.text.splitlines()[1:-1])
    few = replace(lists, examples=dict.fromkeys(lists.examples, lists.examples["object"][:3]))
    assert len(few.query("snail", "snail", False, np.random.default_rng(0)).text.splitlines()) == EXAMPLES + 2


def test_textures_are_asked_for_as_textures_alone() -> None:
    lists = read_lists()
    queries = [lists.query("striped", "striped", True, np.random.default_rng(seed)) for seed in range(20)]
    assert {(query.kind, query.beside) for query in queries} == {("texture", "")}


def test_a_folder_replaces_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "backgrounds.txt").write_text("# for all\nmoon\nfox\tden\nfox\thenhouse\n")
    lists = read_lists(tmp_path)
    assert lists.backgrounds == {"": ("moon",), "fox": ("den", "henhouse")}
    assert lists.examples == read_lists().examples
    assert lists.fingerprint != read_lists().fingerprint
    beside = {
        name: {lists.query(name, name, False, np.random.default_rng(i)).beside for i in range(60)}
        for name in ("fox", "cow")
    }
    assert {"den", "henhouse"} <= beside["fox"]
    assert "moon" not in beside["fox"]
    assert "moon" in beside["cow"]
    assert not {"den", "henhouse"} & beside["cow"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("object.tsv", "fox a fox waits\n", r"object.tsv, line 1: 2 columns with tabs"),
        ("relation.tsv", "fox\tunder\n", r"relation.tsv, line 1: 3 columns with tabs"),
        ("object.tsv", "fox\ta fox\nfox\ta fox\ncow\ta cow\n", r"object.tsv: 2 examples; a query shows 3"),
        ("relations.txt", "# none\n", r"relations.txt: empty"),
        ("backgrounds.txt", "\n", r"backgrounds.txt: empty"),
        ("backgrounds.txt", "fox\tden\tdark\n", r"backgrounds.txt, line 1: a background, or a class"),
        ("notes.txt", "hello", r"none of object.tsv, "),
    ],
)
def test_lists_that_are_not_understood(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=told):
        read_lists(tmp_path)


def test_lists_that_are_no_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "relations.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"relations.txt: not UTF-8 text"):
        read_lists(tmp_path)
    with pytest.raises(UsageError, match=r"nowhere: no such folder; it is to hold"):
        read_lists(tmp_path / "nowhere")
