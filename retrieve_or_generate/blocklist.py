"""What must never be fetched or kept: URLs, hashes and row ids, one a line.

A line is a URL (http or https), an md5 (32 hex digits) or sha256 (64) of an image's bytes, or a row id (a whole number: the
`mmh3.hash64` of URL and caption, as LAION's tables have it, signed or not). Blank lines and lines that begin with # are passed
over. The user's own list lies in the cache folder and always counts; `rog takedown` adds to it.
"""

from __future__ import annotations

import hashlib
import re
import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.store import cache_folder, content_key, locked, write_bytes

_DIGEST = re.compile(r"[0-9a-fA-F]{32}|[0-9a-fA-F]{64}")
_ROW_ID = re.compile(r"[+-]?\d{1,20}")
_ESCAPED = re.compile(r"%[0-9a-fA-F]{2}")
_PORTS = {"http": 80, "https": 443}
_FILE = "blocklist.txt"


def default_blocklist() -> Path:
    """The list that always counts, whether or not it is there."""
    return cache_folder() / _FILE


@dataclass(frozen=True)
class Blocklist:
    """The entries, brought to one spelling each. Pickles, so that a worker process can have it."""

    urls: frozenset[str] = frozenset()
    digests: frozenset[str] = frozenset()
    ids: frozenset[int] = frozenset()
    fingerprint: str = field(init=False, default="", compare=False)

    def __post_init__(self) -> None:
        told = [sorted(self.urls), sorted(self.digests), [str(one) for one in sorted(self.ids)]]
        object.__setattr__(self, "fingerprint", content_key(told))

    def __len__(self) -> int:
        return len(self.urls) + len(self.digests) + len(self.ids)

    @classmethod
    def load(cls, path: Path | str | None = None) -> Blocklist:
        """The default list, where there is one, and the list in `path`. Raises `UsageError` naming the line that is no entry."""
        paths = [default_blocklist()] if default_blocklist().is_file() else []
        return cls._holding(entry for one in [*paths, *([Path(path)] if path else [])] for entry in _read(one))

    @classmethod
    def of(cls, entries: Iterable[str]) -> Blocklist:
        """A list of these entries. Raises `UsageError` for what is none."""
        return cls._holding(_parsed(entry) for entry in entries)

    @classmethod
    def _holding(cls, entries: Iterable[tuple[str, str]]) -> Blocklist:
        kinds: dict[str, set[str]] = {"url": set(), "digest": set(), "id": set()}
        for kind, value in entries:
            kinds[kind].add(value)
        return cls(frozenset(kinds["url"]), frozenset(kinds["digest"]), frozenset(int(one) for one in kinds["id"]))

    def blocks(
        self,
        *,
        url: str | None = None,
        sha256: str | None = None,
        md5: str | None = None,
        id: int | str | None = None,
    ) -> bool:
        """Whether any of what is given is listed. `id` is a row id, or a hash that stands for one (DataComp's uid)."""
        digests = [one.lower() for one in (sha256, md5, id if isinstance(id, str) else None) if one]
        return (
            (bool(self.urls) and bool(url) and spelled(url or "") in self.urls)
            or any(one in self.digests for one in digests)
            or (bool(self.ids) and id is not None and _row_id(id) in self.ids)
        )

    def blocks_bytes(self, data: bytes) -> bool:
        """Whether the hash of these bytes is listed."""
        if not self.digests:
            return False
        md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
        return md5 in self.digests or hashlib.sha256(data).hexdigest() in self.digests


def add_to_blocklist(entries: Iterable[str], path: Path | None = None) -> list[str]:
    """Append what is not listed yet to `path` (the default list), durably; those entries, in their order.

    Raises `UsageError` for what is no entry; nothing is written then.
    """
    path = path or default_blocklist()
    with locked(path.parent / f".{path.name}.lock", wait=True):
        listed = set(_read(path)) if path.is_file() else set()
        fresh = {_parsed(entry): entry.strip() for entry in entries}
        new = [entry for parsed, entry in fresh.items() if parsed not in listed]
        if new:
            before = path.read_bytes() if path.is_file() else b""
            gap = b"\n" if before and not before.endswith(b"\n") else b""
            write_bytes(path, before + gap + "".join(entry + "\n" for entry in new).encode())
    return new


def spelled(url: str) -> str:
    """One spelling for the URLs that lead to one place: no scheme, user, default port or fragment; host in lower case."""
    try:
        parts = urllib.parse.urlsplit(url.strip())
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        return url.strip()
    place = host if port in (None, _PORTS.get(parts.scheme)) else f"{host}:{port}"
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return place + _ESCAPED.sub(
        lambda found: _unescaped(found.group()), urllib.parse.quote(target, safe="%/?&=:;@+$,!~*'()")
    )


def _unescaped(escape: str) -> str:
    """What needs no escape as itself (RFC 3986, 6.2.2), the rest in capitals."""
    letter = chr(int(escape[1:], 16))
    return letter if letter.isascii() and (letter.isalnum() or letter in "-._~") else escape.upper()


def _row_id(value: int | str) -> int:
    """A row id in [0, 2⁶⁴), whichever sign it was written with; −1 for what is none."""
    if isinstance(value, str) and not _ROW_ID.fullmatch(value):
        return -1
    return int(value) % 2**64


def _parsed(entry: str) -> tuple[str, str]:
    """Kind and one spelling of an entry."""
    entry = entry.strip()
    if _DIGEST.fullmatch(entry):
        return "digest", entry.lower()
    if _ROW_ID.fullmatch(entry) and -(2**63) <= int(entry) < 2**64:
        return "id", str(_row_id(entry))
    if entry.lower().startswith(("http://", "https://")) and len(entry.split()) == 1:
        return "url", spelled(entry)
    raise UsageError(
        f"blocklist entry {entry[:80]!r}: neither a URL nor an md5 (32 hex digits), a sha256 (64) or a row id (a whole number)"
    )


def _read(path: Path) -> list[tuple[str, str]]:
    """The entries of a file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such blocklist") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not readable as a blocklist ({error})") from error
    entries = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                entries.append(_parsed(line))
            except UsageError as error:
                raise UsageError(f"{path}, line {number}: {error}") from None
    return entries
