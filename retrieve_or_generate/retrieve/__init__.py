"""Retrieved image sets: a pool is searched for a task's classes, and what is found is fetched and curated.

Reads a pool and a task; writes an image set folder (`image_set.py`). Images come from the pool's own shards or are downloaded anew
from their URLs; either way the same bytes give the same set. What became of every URL is told in `.downloads/status.parquet`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from retrieve_or_generate.experiment import CurateSettings, RetrieveSettings
from retrieve_or_generate.image_set import ImageSet, ImageSetWriter, candidates_record
from retrieve_or_generate.retrieve.download import download as download_urls
from retrieve_or_generate.retrieve.download import downloaded
from retrieve_or_generate.retrieve.guard import DownloadPolicy
from retrieve_or_generate.store import content_key, durable_file

if TYPE_CHECKING:  # a download worker imports this package, and has no use for what loads a model
    from retrieve_or_generate.models import Clip
    from retrieve_or_generate.pool.layout import Pool
    from retrieve_or_generate.tasks.base import Task

__all__ = ["DownloadPolicy", "retrieve"]

Progress = Callable[[int, int], None]
_VERSION = 1  # part of every key: raise when the same settings find other candidates
_BATCH = 1000


def retrieve(
    task: Task,
    pool: Pool,
    clip: Clip,
    out: Path,
    settings: RetrieveSettings,
    curation: CurateSettings,
    *,
    index_folder: Path | None = None,
    policy: DownloadPolicy | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """The retrieved image set of `task`, in folder `out`; a finished one with the same inputs is opened as it is.

    `index_folder` is where the FAISS index lies or is built (engine: index; beside the pool by default), `policy` what a download
    may do (fetch: http). `progress` is called with images done and images in all.

    Raises:
        UsageError: pool and model do not fit, or `out` holds something else. IntegrityError: the pool is damaged.
        IncompleteError: a download worker died; the same call continues.
    """
    from retrieve_or_generate.curate.curation import curate
    from retrieve_or_generate.retrieve.semantic import check_search, find_candidates

    config = _config(task, pool, clip, settings)
    key = content_key(config)
    if candidates_record(out, key) is None:
        check_search(pool, clip, settings)
        with ImageSetWriter(
            out, task=task.name, source="retrieved", key=key, class_names=task.class_names, config=config
        ) as writer:
            rows = _described(find_candidates(task, pool, clip, settings, index_folder), pool, settings)
            wanted = [row for row in rows if not row["unsafe"]]
            scratch = out / ".downloads"
            from_shards = settings.fetch == "shards"
            images = (
                _from_shards(pool, wanted) if from_shards else _from_web(wanted, scratch, policy or DownloadPolicy())
            )
            for done, row in enumerate(rows, 1):
                _add(writer, pool.name, row, None if row["unsafe"] else next(images))
                if progress and (done % _BATCH == 0 or done == len(rows)):
                    progress(done, len(rows))
            writer.finish()
        for path in scratch.glob("[0-9]*"):
            path.unlink()
    return curate(out, task=task, clip=clip, settings=curation)


def _config(task: Task, pool: Pool, clip: Clip, settings: RetrieveSettings) -> dict[str, Any]:
    """What the candidates follow from."""
    config = {
        "version": _VERSION,
        "task": task.fingerprint,
        "pool": {"name": pool.name, "fingerprint": pool.fingerprint},
        "model": {"name": clip.name, "fingerprint": clip.fingerprint},
        "retrieve": settings.model_dump(mode="json"),
    }
    if settings.engine == "index":
        from retrieve_or_generate.pool.index import load_recipe

        config["index"] = load_recipe(settings.index).model_dump(mode="json")
    return config


def _described(found: pa.Table, pool: Pool, settings: RetrieveSettings) -> list[dict[str, Any]]:
    """The candidates with what the pool says of them, and whether they are too unsafe to look at."""
    rows: list[dict[str, Any]] = found.to_pylist()
    told = pool.metadata(found["row"].to_numpy(), ("url", "caption", "NSFW", "md5")).to_pylist()
    for row, more in zip(rows, told, strict=True):
        tag = str(more.pop("NSFW") or "").upper()
        row |= more | {"unsafe": settings.nsfw == "drop" and tag == "NSFW"}
    return rows


def _add(writer: ImageSetWriter, pool_name: str, row: dict[str, Any], image: bytes | None) -> None:
    writer.add(
        key=f"{row['row']:010d}",
        label=row["label"],
        caption=row["caption"] or "",
        origin={"pool": pool_name, "row": row["row"], "url": row["url"]},
        query=row["query"],
        image=image,
        reason="nsfw" if row["unsafe"] else "dead_link" if image is None else "",
    )


def _from_shards(pool: Pool, rows: list[dict[str, Any]]) -> Iterator[bytes | None]:
    """The image of each row, None where the pool has none."""
    for start in range(0, len(rows), _BATCH):
        part = [row["row"] for row in rows[start : start + _BATCH]]
        images = pool.image_bytes(part)
        for row in part:
            yield images.get(row)


def _from_web(rows: list[dict[str, Any]], scratch: Path, policy: DownloadPolicy) -> Iterator[bytes | None]:
    """The image of each row, None where its URL gave none, or another than the pool was made of."""
    asked = {
        "key": [str(row["row"]) for row in rows],
        "url": [row["url"] for row in rows],
        "md5": [row["md5"] for row in rows],
    }
    status = download_urls(
        pa.table({name: pa.array(values, pa.string()) for name, values in asked.items()}), scratch, policy
    )
    with durable_file(scratch / "status.parquet") as temporary:
        pq.write_table(status.drop_columns(["part"]), temporary)
    fetched = downloaded(scratch, status)
    for what in status["status"].to_pylist():
        yield next(fetched)[1] if what == "ok" else None
