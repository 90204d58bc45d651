"""Which files make up a pool: the layouts that clip-retrieval, LAION and DataComp published, found as they lie on disk.

- `img_emb/img_emb_0000.npy`, optional `text_emb/text_emb_0000.npy`, `metadata/metadata_0000.parquet` (clip-retrieval; LAION
  published its tables in a folder such as `laion2B-en-metadata/`), optional `images/00000.tar`. A number names one shard with
  however many zeros it is written, and shards are ordered by number.
- `NAME.npz` with `l14_img` and `l14_txt` (or `b32_…`) beside `NAME.parquet` (DataComp), ordered by name.
- several such folders in one, or named in `pool.yaml` (`name`, `model`, `parts`: folders relative to it, in the order in which
  their rows are counted).
"""

from __future__ import annotations

import ast
import re
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.yaml_files import read_mapping, validated

Modality = Literal["image", "text"]

POOL_LIST = "pool.yaml"
_PUBLISHED = ("en", "multi", "nolang")  # the order of LAION-5B's sub-sets, in which its indexes count their rows
_SUFFIX = {"image": "img", "text": "txt"}  # of the arrays in DataComp's npz files
_MAGIC = b"\x93NUMPY"
_HEADER_BYTES = 4096  # far more than the header of an array of numbers takes


class PoolList(BaseModel):
    """`pool.yaml`: the parts of a pool in the order in which its rows are counted."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    name: str | None = None
    model: str = "unknown"
    parts: tuple[str, ...]


@dataclass(frozen=True)
class ShardFiles:
    """The files of one shard, not yet opened."""

    image_embeddings: Path
    text_embeddings: Path | None
    metadata: Path
    images: Path | None


def find_parts(place: Path) -> tuple[PoolList, tuple[Path, ...]] | None:
    """What `pool.yaml` says or the folder shows, with the folders of the parts; None where there is no pool."""
    listed = place if place.is_file() else place / POOL_LIST
    if listed.is_file():
        told = _read_list(listed)
        parts = tuple(listed.parent / part for part in told.parts)
        for part in parts:
            if not _is_part(part):
                raise UsageError(f"{listed}: part {part} has neither img_emb/ nor npz files beside parquet files")
        return told, parts
    if _is_part(place):
        return PoolList(parts=(".",)), (place,)
    parts = tuple(sorted((p for p in place.iterdir() if _is_part(p)), key=_published_order)) if place.is_dir() else ()
    return (PoolList(parts=tuple(part.name for part in parts)), parts) if parts else None


def _read_list(path: Path) -> PoolList:
    told = validated(PoolList, read_mapping(path, "a list of a pool's parts"), str(path))
    if not told.parts:
        raise UsageError(f"{path}: parts is empty; name the folders of the pool in the order of their rows")
    return told


def _is_part(folder: Path) -> bool:
    return (folder / "img_emb").is_dir() or bool(_npz_files(folder))


def _published_order(folder: Path) -> tuple[int, str]:
    """`laion2B-en`, `laion2B-multi`, `laion1B-nolang`: not the order of the alphabet."""
    kind = re.split(r"[-_]", folder.name)[-1]
    return (_PUBLISHED.index(kind) if kind in _PUBLISHED else len(_PUBLISHED), folder.name)


def find_shards(part: Path) -> list[ShardFiles]:
    """The shards of one part in their order. Raises `IntegrityError` naming a file that should be there and is not."""
    if not (part / "img_emb").is_dir():
        return [
            ShardFiles(path, path if _array_name(path, "text") else None, path.with_suffix(".parquet"), None)
            for path in _npz_files(part)
        ]
    tables, texts = _metadata_files(part), _numbered(part / "text_emb", r"text_emb_(\d+)\.npy")
    images = _numbered(part / "images", r"(\d+)\.tar")
    shards = []
    for number, path in sorted(_numbered(part / "img_emb", r"img_emb_(\d+)\.npy").items()):
        digits = path.stem.rpartition("_")[2]
        if number not in tables:
            raise IntegrityError(f"{part}/metadata/metadata_{digits}.parquet: missing, but {path.name} is there")
        if texts and number not in texts:
            raise IntegrityError(
                f"{part}/text_emb/text_emb_{digits}.npy: missing, but {path.name} is there and other shards have theirs"
            )
        shards.append(ShardFiles(path, texts.get(number), tables[number], images.get(number)))
    return shards


def _metadata_files(part: Path) -> dict[int, Path]:
    """By number, from `metadata/` or the folder ending in `-metadata`, in the part or beside it."""
    named = [part / "metadata", *sorted(part.glob("*-metadata")), part.with_name(f"{part.resolve().name}-metadata")]
    for folder in named:
        if found := _numbered(folder, r"metadata_(\d+)\.parquet"):
            return found
    return {}


def _numbered(folder: Path, pattern: str) -> dict[int, Path]:
    found: dict[int, Path] = {}
    if not folder.is_dir():
        return found
    for path in sorted(folder.iterdir()):
        if match := re.fullmatch(pattern, path.name):
            twin = found.setdefault(int(match[1]), path)
            if twin is not path:
                raise IntegrityError(f"{path}: the same shard as {twin.name}; keep one of them")
    return found


def _npz_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in sorted(folder.glob("*.npz")) if path.with_suffix(".parquet").is_file()]


def open_embeddings(path: Path, modality: Modality) -> np.ndarray:
    """(rows, dim) float16, memory-mapped (read into memory only where an npz is compressed).

    Raises `IntegrityError` naming the file if it is truncated, damaged, or of another kind.
    """
    try:
        if path.suffix == ".npz":
            return _open_npz(path, modality)
        offset, shape = _read_header(path, 0)
        if (whole := offset + 2 * shape[0] * shape[1]) != (there := path.stat().st_size):
            raise IntegrityError(f"{path}: not a whole npy file ({there} bytes, where its header says {whole})")
        return np.memmap(path, np.float16, "r", offset, shape)
    except OSError as error:
        raise IntegrityError(f"{path}: cannot be read ({error.strerror or error})") from error


def _read_header(path: Path, start: int) -> tuple[int, tuple[int, int]]:
    """Where the numbers of an npy at byte `start` begin, and their shape.

    Read here and not by numpy, which answers damage with many types and accepts any dtype and order.
    """
    with path.open("rb") as file:
        file.seek(start)
        head = file.read(_HEADER_BYTES)
    wide = head[6:7] > b"\x01"
    length_at, header_at = 8, 12 if wide else 10
    if not head.startswith(_MAGIC) or len(head) < header_at:
        raise IntegrityError(f"{path}: not a whole npy file (it does not begin as one)")
    (length,) = struct.unpack("<I" if wide else "<H", head[length_at:header_at])
    try:
        told = ast.literal_eval(head[header_at : header_at + length].decode("latin1").strip())
        kind, columns_first, shape = told["descr"], told["fortran_order"], tuple(told["shape"])
    except (ValueError, SyntaxError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise IntegrityError(f"{path}: not a whole npy file (its header cannot be read)") from error
    if len(shape) != 2 or not all(type(n) is int and 0 < n < 2**40 for n in shape):
        raise IntegrityError(f"{path}: shape {shape}, expected (rows, dim) with at least one row")
    if kind not in ("<f2", "=f2", "|f2") or columns_first:
        order = ", column by column" if columns_first else ""
        raise IntegrityError(f"{path}: numbers of type {kind!r}{order}; a pool holds float16 row by row (np.float16)")
    return start + header_at + length, (shape[0], shape[1])


def _open_npz(path: Path, modality: Modality) -> np.ndarray:
    name = _array_name(path, modality)
    if name is None:
        raise IntegrityError(f"{path}: neither l14_{_SUFFIX[modality]} nor b32_{_SUFFIX[modality]} in it")
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            member = archive.getinfo(name)
            if member.compress_type == zipfile.ZIP_STORED:
                file.seek(member.header_offset + 26)
                start = member.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
                offset, shape = _read_header(path, start)
                if offset + 2 * shape[0] * shape[1] > start + member.file_size:
                    raise IntegrityError(f"{path}: {name} is not a whole npy file")
                return np.memmap(path, np.float16, "r", offset, shape)
        array: np.ndarray = np.load(path, allow_pickle=False)[name.removesuffix(".npy")]
    except IntegrityError:
        raise
    except Exception as error:  # zipfile and numpy answer damage with many types, NotImplementedError among them
        raise IntegrityError(f"{path}: not a whole npz file ({error})") from error
    if array.ndim != 2 or not len(array) or array.dtype != np.float16:
        raise IntegrityError(f"{path}: {name} is {array.dtype} {array.shape}, expected float16 (rows, dim)")
    return array


def _array_name(path: Path, modality: Modality) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = set(archive.namelist())
    except Exception as error:  # as above
        raise IntegrityError(f"{path}: not a whole npz file ({error})") from error
    known = (f"{model}_{_SUFFIX[modality]}.npy" for model in ("l14", "b32"))
    return next((name for name in known if name in names), None)
