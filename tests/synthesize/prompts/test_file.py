"""A prompt file of the user's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.synthesize.prompts import PromptSource, load_strategy

SourceOf = Callable[..., PromptSource]


@pytest.fixture
def written(tmp_path: Path, source_of: SourceOf) -> Callable[..., PromptSource]:
    """The settings that name a file with a line for each class, these lines before."""

    def write(*lines: str, without: tuple[str, ...] = (), **given: object) -> PromptSource:
        path = tmp_path / "prompts.tsv"
        source = source_of(strategy="file", file=str(path), **given)
        own = [f"{name}\tsome {name}" for name in source.task.class_names if name not in without]
        path.write_text("\n".join([*lines, *own]), encoding="utf-8")
        return source

    return write


def test_prompts_come_in_file_order_and_round_again(written: Callable[..., PromptSource]) -> None:
    strategy = load_strategy(
        written("# mine", "", "wavy\t sand\x07 dunes ", "wavy\tsea,\tfrom above", without=("wavy",))
    )
    prompts = strategy.prompts(5, 5)
    assert [prompt.text for prompt in prompts] == ["sand dunes", "sea, from above"] * 2 + ["sand dunes"]
    assert [prompt.origin["line"] for prompt in prompts] == [3, 4, 3, 4, 3]
    assert strategy.record() == {"prompts": 9, "given": 5, "given_again": 3, "classes_given_again": 1}


def test_the_fingerprint_is_of_what_the_file_says(written: Callable[..., PromptSource], tmp_path: Path) -> None:
    source = written("wavy\tsand")
    before = load_strategy(source).fingerprint
    path = tmp_path / "prompts.tsv"
    path.write_text(path.read_text() + "\n\n# a remark\n")
    assert load_strategy(source).fingerprint == before
    path.write_text(path.read_text().replace("sand", "sea"))
    assert load_strategy(source).fingerprint != before


def test_the_user_says_whether_captions_of_real_images_are_in_it(written: Callable[..., PromptSource]) -> None:
    assert load_strategy(written(real_captions=True)).uses_real_captions


def test_no_prompts_are_needed_of_a_class_that_the_set_leaves_out(written: Callable[..., PromptSource]) -> None:
    assert load_strategy(written(without=("wavy",), excluded=["wavy"])).prompts(0, 1)[0].text == "some striped"


@pytest.mark.parametrize(
    ("line", "without", "told"),
    [
        ("", ("wavy",), r"prompts\.tsv: no prompt for class 'wavy'; put a line for each class$"),
        ("", ("wavy", "dotted"), r"no prompt for class 'dotted' \(and 1 more\)"),
        ("wavey\tsand", (), r"line 1: unknown class 'wavey'; did you mean 'wavy'\?"),
        ("wavy sand", (), r"line 1: no tab; a line is a class name, a tab and one prompt$"),
        ("wavy\t \x07", (), r"line 1: no prompt after 'wavy'$"),
    ],
)
def test_a_line_that_is_wrong_is_named(
    line: str, without: tuple[str, ...], told: str, written: Callable[..., PromptSource]
) -> None:
    source = written(line, without=without)
    with pytest.raises(UsageError, match=told):
        load_strategy(source)


def test_a_file_that_is_not_there_is_named(source_of: SourceOf, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.tsv: no such file; it should be lines of class name, tab, prompt"):
        load_strategy(source_of(strategy="file", file=str(tmp_path / "none.tsv")))


def test_a_folder_is_no_file(source_of: SourceOf, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not readable \(Is a directory\)"):
        load_strategy(source_of(strategy="file", file=str(tmp_path)))


def test_without_a_file_it_is_asked_for(source_of: SourceOf) -> None:
    with pytest.raises(UsageError, match=r"say which as synthesize\.prompts\.file"):
        load_strategy(source_of(strategy="file"))


def test_bytes_that_are_no_text_are_told(written: Callable[..., PromptSource], tmp_path: Path) -> None:
    source = written()
    (tmp_path / "prompts.tsv").write_bytes(b"wavy\t\xff\xfe")
    with pytest.raises(UsageError, match="not UTF-8 text"):
        load_strategy(source)
