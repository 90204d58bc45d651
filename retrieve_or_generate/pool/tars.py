"""Webdataset shards: which bytes of a tar are which member.

Headers of plain members are read directly, a tenth of what tarfile takes; a tar that holds anything else (long names, pax records)
is left to tarfile.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from retrieve_or_generate.errors import IntegrityError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_BLOCK = 512
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)")


class Member(NamedTuple):
    """A regular file in a tar: its name, and where its bytes are."""

    name: str
    offset: int
    size: int


def sample_key(name: str) -> tuple[str, str]:
    """Key and extension, lower case, of a webdataset member: cut at the first dot of its last part; empty where there is none."""
    match = _NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match else (name, "")


def members(path: Path) -> list[Member]:
    """The regular files of a tar in their order. Raises `IntegrityError` naming a tar that is truncated or none."""
    found = list(_plain_members(path))
    if found and found[-1] is None:
        try:
            with tarfile.open(path, "r:") as tar:
                found = [Member(one.name, one.offset_data, one.size) for one in tar if one.isreg()]
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise IntegrityError(f"{path}: not a whole tar ({error})") from error
    plain = [member for member in found if member is not None]
    size = path.stat().st_size
    if plain and plain[-1].offset + plain[-1].size > size:
        raise IntegrityError(f"{path}: not a whole tar (it ends within {plain[-1].name})")
    return plain


def _plain_members(path: Path) -> Iterator[Member | None]:
    """Members up to the first header that is not a plain one; None stands for that."""
    try:
        with path.open("rb", buffering=0) as file:
            size, at = os.fstat(file.fileno()).st_size, 0
            while at + _BLOCK <= size:
                header = os.pread(file.fileno(), _BLOCK, at)
                if not header.strip(b"\0"):
                    return
                member = _plain(header, at)
                yield member
                if member is None:
                    return
                at = member.offset + -(-member.size // _BLOCK) * _BLOCK
        yield None  # no end mark: tarfile says whether it is whole
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read ({error.strerror or error})") from error


def _plain(header: bytes, at: int) -> Member | None:
    """The regular file that a ustar header at byte `at` announces; None for every other kind of entry and for damage."""
    try:
        size, told = int(header[124:136].rstrip(b" \0"), 8), int(header[148:156].rstrip(b" \0"), 8)
        name, prefix = (part.partition(b"\0")[0].decode() for part in (header[:100], header[345:500]))
    except ValueError:
        return None
    if header[156:157] not in (b"0", b"\0") or sum(header) - sum(header[148:156]) + 256 != told or not name:
        return None
    joined = f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name
    return Member(joined, at + _BLOCK, size)


@lru_cache(maxsize=4096)
def image_members(path: Path) -> dict[str, Member]:
    """The images of a webdataset shard by key."""
    named = ((sample_key(member.name), member) for member in members(path))
    return {key: member for (key, suffix), member in named if suffix in IMAGE_SUFFIXES}
