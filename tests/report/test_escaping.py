import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieve_or_generate.report.escaping import csv_cell, file_stem, shortened, visible


def test_control_codes_terminal_escapes_and_bidi_marks_are_written_out() -> None:
    assert visible("a\x1b[31mred\x07\x00") == r"a\x1b[31mred\x07\x00"
    assert visible("safe\u202egnp.exe\u2066\ufeff\u061c") == r"safe\u202egnp.exe\u2066\ufeff\u061c"
    assert visible("line\nbreak\ttab\x9b") == r"line\x0abreak\x09tab\x9b"


def test_ordinary_text_of_any_script_is_left_alone() -> None:
    for text in ("retrieved − synthetic", "γ × 2", "猫 кот", "Boeing 737-800", "<b>", "naïve"):
        assert visible(text) == text


@given(st.text())
def test_visible_text_is_stable_and_can_be_encoded(text: str) -> None:
    shown = visible(text)
    assert visible(shown) == shown
    assert shown.encode().decode() == shown
    assert "\x1b" not in shown


def test_shortened_never_exceeds_its_length() -> None:
    assert shortened("textures", 8) == "textures"
    assert shortened("a very long name", 7) == "a very…"
    assert len(shortened("\x1b" * 50, 20)) == 20


@pytest.mark.parametrize("payload", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "\nx", "\0x", "'quoted"])
def test_cells_that_a_spreadsheet_would_run_are_quoted(payload: str) -> None:
    assert csv_cell(payload) == "'" + payload


def test_numbers_and_plain_text_stay_what_they_are() -> None:
    assert csv_cell(-3.2) == -3.2
    assert csv_cell("digits") == "digits"


@given(st.lists(st.text(max_size=60), max_size=8))
def test_file_stems_are_safe_and_distinct(names: list[str]) -> None:
    taken: set[str] = set()
    stems = [file_stem(name, taken) for name in names]
    assert len(set(stems)) == len(stems)
    assert all(re.fullmatch(r"[a-z0-9-]+", stem) for stem in stems)


def test_file_stems_read_like_the_name() -> None:
    assert file_stem("digits", set()) == "digits"
    assert file_stem("../../etc/passwd", set()) == "etc-passwd"
    assert file_stem("DIGITS", {"digits"}) == "digits-2"
