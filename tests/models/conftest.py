from __future__ import annotations

from collections.abc import Iterator

import pytest
from kinds import words_read_once


@pytest.fixture(autouse=True, scope="session")
def _words() -> Iterator[None]:
    with words_read_once():
        yield
