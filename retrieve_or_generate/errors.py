"""What can go wrong from the outside, each with the exit code that `rog` ends with. No traceback reaches a user for these."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a disk, or a share of it, that is full."""


class UsageError(ValueError):
    """The user asked for something that cannot be done; the message says what to do instead."""

    exit_code = 2


class IntegrityError(UsageError):
    """A file is missing, truncated or not what was recorded. Bad input like any other, but `rog verify` tells it apart."""


class IncompleteError(RuntimeError):
    """Work is left over; the same command continues it."""

    exit_code = 3


_HIDDEN = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def visible(text: str) -> str:
    """`text` with control codes, terminal escapes and bidi marks written out (`\\x1b`, `\\u202e`), so that they do nothing."""
    return _HIDDEN.sub(_shown, text)


def _shown(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def unknown_name(what: str, given: str, known: Iterable[str]) -> UsageError:
    """An error that names the nearest match and, where they are few, all that is allowed."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return UsageError(f"unknown {what} {given!r}{hint} (known: {listed})")
