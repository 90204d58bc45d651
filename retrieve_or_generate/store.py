"""Durable files: written under a temporary name, synced, renamed; done means a recorded checksum that still matches.

A folder of work is sealed by one JSON file, written last, that names every file in it with size and sha256. The seal's key is
a hash of the work's inputs and parameters, never of paths, dates or devices: a folder whose seal carries another key holds
other work, and a folder without a seal is unfinished.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from retrieve_or_generate.errors import FULL, IntegrityError, UsageError

TEMPORARY_PREFIX, LOCK = ".tmp-", ".lock"
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def cache_folder() -> Path:
    """What belongs to no run lies here (`ROG_CACHE`, or `~/.cache/rog`): what can be made again, and the blocklist."""
    return Path(os.environ.get("ROG_CACHE") or Path.home() / ".cache" / "rog")


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no white space."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_key(value: Any) -> str:
    """16 hex digits that name a JSON-like value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(folder: Path) -> None:
    """Make what was renamed or removed in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    """Where `folder` cannot be written to, that is a mistake of the user's, who is told to name another."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNWRITABLE:
            raise
        cached = folder.resolve().is_relative_to(cache_folder().resolve())
        instead = "set ROG_CACHE to a folder that can be" if cached else "choose another --out"
        raise UsageError(f"{folder}: cannot be written to ({error.strerror}); {instead}") from error


@contextmanager
def durable_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the final name when the block ends well, and vanishes when not."""
    with _writable(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, suffix="-" + path.name, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except Exception as error:
        if not isinstance(error, UsageError) and (full := _full(error, temporary)):
            raise OSError(full, os.strerror(full), getattr(error, "filename", None) or str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _full(error: Exception, temporary: Path) -> int | None:
    """The number of a full disk, where that is behind an error of writing `temporary`.

    safetensors says it in words. torch and numpy do not say why they stopped, so a further write finds out.
    """
    said = re.search(r"\(os error (\d+)\)", str(error))
    number = int(said[1]) if said else getattr(error, "errno", None)
    if number is None:
        try:
            with temporary.open("ab") as file:
                file.write(bytes(2**16))
        except OSError as found:
            number = found.errno
    return number if number in FULL else None


def write_bytes(path: Path, data: bytes) -> None:
    with durable_file(path) as temporary:
        temporary.write_bytes(data)


def write_tar(path: Path, named: Iterable[tuple[str, bytes]]) -> None:
    """A tar of named bytes, written as they come; equal members give equal files (no owner, no time)."""
    with durable_file(path) as temporary, tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in named:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_json(path: Path, value: Any) -> None:
    """Sorted keys, so equal values give equal bytes."""
    write_bytes(path, (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{path}: no such file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise IntegrityError(f"{path}: not readable as JSON ({error})") from error


def remove_leftovers(folder: Path) -> None:
    """Drop the temporary files and folders of a run that was killed. Call it only while holding the folder's lock."""
    for left in folder.rglob(TEMPORARY_PREFIX + "*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def checksums(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and sha256 of each of `files`, by its path in `folder`."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(files)
    }


def seal(folder: Path, name: str, key: str, files: Iterable[Path], **record: Any) -> dict[str, Any]:
    """Write `folder/name` last: the key, what else is to be said, and size and sha256 of each of `files`."""
    value = {"key": key, "files": checksums(folder, files), **record}
    write_json(folder / name, value)
    return value


def check_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Raise `IntegrityError` naming the first file that is missing, resized or changed since it was recorded."""
    for relative, recorded in files.items():
        path = folder / relative
        if not path.is_file():
            raise IntegrityError(f"{path}: missing; it was there when {folder} was finished. Make {folder} anew")
        if path.stat().st_size != recorded["bytes"]:
            size = path.stat().st_size
            raise IntegrityError(f"{path}: {size} bytes, but {recorded['bytes']} were recorded. Make {folder} anew")
        if sha256_of(path) != recorded["sha256"]:
            raise IntegrityError(f"{path}: its bytes changed since it was written (sha256 differs). Make {folder} anew")


def read_seal(folder: Path, name: str, key: str | None = None, verify: bool = True) -> dict[str, Any] | None:
    """The seal of finished work, its files verified; None while unfinished, or when its key is not `key`."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except IntegrityError as error:
        raise IntegrityError(f"{error}. Make {folder} anew") from error
    if not isinstance(value, dict) or not isinstance(value.get("files"), dict) or "key" not in value:
        raise IntegrityError(f"{path}: not a seal (no key or file list). Make {folder} anew")
    if key is not None and value["key"] != key:
        return None
    if verify:
        check_files(folder, value["files"])
    return value


@contextmanager
def locked(folder: Path, wait: bool = False, name: str = LOCK, shared: bool = False) -> Iterator[None]:
    """Hold `folder` for this process; when another holds it, wait, or raise `UsageError` naming that process.

    `shared`: together with others that share it, and with nobody who does not. A folder has one lock of each `name`. The lock dies
    with the process, so a killed run leaves nothing to clean up.
    """
    with _writable(folder):
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder}: a file, where a folder is to be written; choose another --out")
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            holder = os.pread(descriptor, 64, 0).decode(errors="replace").strip() or "unknown"
            raise UsageError(
                f"{folder}: in use by another run (process {holder}); wait for it or choose another --out"
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        with suppress(OSError):
            os.close(descriptor)
