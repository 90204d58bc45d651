"""Whether a sentence names a class."""

from __future__ import annotations

import re
from functools import lru_cache

_BETWEEN = r"[\s_-]+"


@lru_cache(maxsize=4096)
def _pattern(name: str) -> re.Pattern[str]:
    words = [re.escape(word) for word in re.split(_BETWEEN, name.casefold()) if word]
    return re.compile(rf"(?<!\w){_BETWEEN.join(words)}(?:s|es)?(?!\w)")


def names_class(sentence: str, name: str) -> bool:
    """Whether the class name stands in it as whole words, whatever its case, its hyphens, or a plural's s: not "one" in "stone"."""
    return _pattern(name).search(sentence.casefold()) is not None
