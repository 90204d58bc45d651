"""Where many byte strings end in one text: hyperscan where it is installed (extra `fast`), else Aho–Corasick.

Both give every occurrence, overlapping ones too, with ASCII letters taken as equal whatever their case; so they give equal results,
and nothing that is kept depends on which of them ran.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from ahocorasick_rs import BytesAhoCorasick, Implementation

EngineName = Literal["hyperscan", "aho_corasick"]

_DFA_BYTES = 1 << 16  # of patterns: above, a state machine with a full table grows past a processor's caches


class Engine(Protocol):
    """Looks for patterns that were given when it was made."""

    def find(self, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) int64 ends, exclusive, and (n,) int64 pattern numbers of all occurrences in uint8 `text`, in any order."""
        ...


class AhoCorasick:
    """The Rust crate that polars uses too."""

    def __init__(self, patterns: Sequence[bytes]):
        small = sum(map(len, patterns)) <= _DFA_BYTES
        self._machine = BytesAhoCorasick(
            [pattern.lower() for pattern in patterns],
            implementation=Implementation.DFA if small else Implementation.ContiguousNFA,
        )

    def find(self, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        hits = self._machine.find_matches_as_indexes(text.tobytes().lower(), overlapping=True)
        table = np.array(hits, np.int64).reshape(-1, 3)  # pattern, start, end
        return table[:, 2], table[:, 0]


class Hyperscan:
    """Intel's literal matcher, several times faster."""

    def __init__(self, patterns: Sequence[bytes]):
        import hyperscan

        self._database: Any = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)  # its stubs know no buffers
        self._database.compile(
            expressions=list(patterns),
            ids=list(range(len(patterns))),
            elements=len(patterns),
            flags=hyperscan.HS_FLAG_CASELESS,
            literal=True,
        )

    def find(self, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        numbers, ends = array("q"), array("q")
        add_number, add_end = numbers.append, ends.append

        def found(number: int, start: int, end: int, flags: int, context: object) -> None:
            add_number(number)
            add_end(end)

        self._database.scan(text, match_event_handler=found)
        return np.frombuffer(ends, np.int64), np.frombuffer(numbers, np.int64)


def fastest_engine(patterns: Sequence[bytes], name: EngineName | None = None) -> Engine:
    """The engine of that name, else the fastest that is installed and takes these patterns; one or more, distinct, none empty."""
    if name == "aho_corasick":
        return AhoCorasick(patterns)
    try:
        import hyperscan
    except ImportError:
        if name:
            raise
        return AhoCorasick(patterns)
    try:
        return Hyperscan(patterns)
    except hyperscan.error:  # a processor without SSSE3, a pattern of thousands of letters
        return AhoCorasick(patterns)
