from __future__ import annotations

import io

import pytest

from retrieve_or_generate.progress import Bytes, ProgressLine, bytes_of, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3600, "1 h 00 min"),
        (11220, "3 h 07 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_piped_output_is_plain_lines_now_and_then() -> None:
    out, clock = io.StringIO(), Clock()
    progress = ProgressLine(out, clock, every_seconds=10)
    for done in range(21):
        clock.now = done * 2.0
        progress("trials", done, 20)
    assert out.getvalue().splitlines() == [
        "trials: 0/20",
        "trials: 5/20, 0.5/s, 30 s left",
        "trials: 10/20, 0.5/s, 20 s left",
        "trials: 15/20, 0.5/s, 10 s left",
        "trials: 20/20, 40 s",
    ]


def test_a_resumed_run_counts_only_what_it_does_itself() -> None:
    out, clock = io.StringIO(), Clock()
    progress = ProgressLine(out, clock, every_seconds=0)
    progress("trials", 90, 100)
    clock.now = 5.0
    progress("trials", 95, 100)
    assert out.getvalue().splitlines()[-1] == "trials: 95/100, 1/s, 5 s left"


def test_a_terminal_has_one_line_that_ends_when_the_work_does() -> None:
    out, clock = Terminal(), Clock()
    progress = ProgressLine(out, clock)
    for done in range(3):
        clock.now = float(done)
        progress("images", done, 2)
    assert out.getvalue().count("\n") == 1
    assert "[############            ] images: 1/2, 1/s, 1 s left" in out.getvalue()


def test_new_work_starts_its_own_clock() -> None:
    out, clock = io.StringIO(), Clock()
    progress = ProgressLine(out, clock)
    progress("scan", 1, 1)
    clock.now = 100.0
    progress("trials", 0, 4)
    clock.now = 104.0
    progress("trials", 4, 4)
    assert out.getvalue().splitlines() == ["scan: 1/1, 0 s", "trials: 0/4", "trials: 4/4, 4 s"]


def test_bytes_are_shown_in_units_and_paced_by_the_second() -> None:
    out, clock = io.StringIO(), Clock()
    progress = ProgressLine(out, clock)
    for done in (0, 999_600, 1_500_000_000, 3_300_000_000_000):
        progress("scan", Bytes(done), Bytes(3_300_000_000_000))
        clock.now += 10.0
    assert out.getvalue().splitlines() == [
        "scan: 0 B/3.3 TB",
        "scan: 1 MB/3.3 TB, 100 kB/s, 9170 h 19 min left",
        "scan: 1.5 GB/3.3 TB, 75 MB/s, 12 h 13 min left",
        "scan: 3.3 TB/3.3 TB, 30 s",
    ]


def test_what_counts_bytes_is_told_in_bytes() -> None:
    out = io.StringIO()
    tell = bytes_of(ProgressLine(out, Clock()), "embed photos")
    assert tell
    tell(20_480_000, 20_480_000)
    assert out.getvalue() == "embed photos: 20.5 MB/20.5 MB, 0 s\n"
    assert bytes_of(None, "embed photos") is None
