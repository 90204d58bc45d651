"""Retrieved image sets: a pool is searched for a task's classes, and what is found is fetched and curated.

Reads a pool and a task; writes an image set folder (`image_set.py`). Each stage keeps what it has done (the search in `.search/`,
the download in `.downloads/`), so that the same call goes on with a killed one. Images come from the pool's own shards or are
downloaded anew from their URLs; either way the same bytes give the same set. What became of every URL is told in
`.downloads/status.parquet`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from retrieve_or_generate.experiment import CurateSettings, RetrieveSettings
from retrieve_or_generate.image_set import ImageSet, ImageSetWriter, candidates_record, check_free
from retrieve_or_generate.progress import Progress
from retrieve_or_generate.retrieve.download import download as download_urls
from retrieve_or_generate.retrieve.download import downloaded
from retrieve_or_generate.retrieve.guard import DownloadPolicy
from retrieve_or_generate.store import content_key, durable_file, locked, remove_leftovers

if TYPE_CHECKING:  # a download worker imports this package, and has no use for what loads a model
    from retrieve_or_generate.models import Clip
    from retrieve_or_generate.pool.layout import Pool
    from retrieve_or_generate.retrieve.engines import Engine
    from retrieve_or_generate.tasks.base import Task

__all__ = ["DownloadPolicy", "retrieve"]

_VERSION = 1  # part of every key: raise when the same settings find other candidates
_BATCH = 1000
_UNSAFE_FROM = 0.5  # of punsafe, LAION's probability that a picture is unsafe: more likely than not
_SEARCH, _DOWNLOADS = ".search", ".downloads"
_TOLD = ("url", "caption", "NSFW", "punsafe", "md5")


def retrieve(
    task: Task,
    pool: Pool,
    clip: Clip,
    out: Path,
    settings: RetrieveSettings,
    curation: CurateSettings,
    *,
    index_folder: Path | None = None,
    search_folder: Path | None = None,
    policy: DownloadPolicy | None = None,
    progress: Progress | None = None,
) -> ImageSet:
    """The retrieved image set of `task`, in folder `out`; a finished one with the same inputs is opened as it is.

    `clip` scores the images that were found, and searches where the settings name no other model. `index_folder` is where the
    FAISS index lies or is built (beside the pool by default), `search_folder` where the search of this task was or will be kept
    (in `out` by default), `policy` what a download may do (fetch: http).

    Raises:
        UsageError: pool and model do not fit, or `out` holds something else. IntegrityError: the pool is damaged.
        IncompleteError: a download worker died; the same call continues.
    """
    from retrieve_or_generate.curate.curation import curate
    from retrieve_or_generate.retrieve.engines import choose_engine

    engine = choose_engine(pool, settings, index_folder)
    config = _config(task, pool, clip, settings, engine)
    key = content_key(config)
    if candidates_record(out, key) is None:
        from retrieve_or_generate.retrieve.search import Search, check_search, search_model

        search = Search(pool, search_model(clip, settings), settings, engine)
        check_search(search)
        check_free(out)
        with locked(out):
            remove_leftovers(out)
            rows, facts = _candidates(search, task, search_folder or out / _SEARCH, progress)
            with ImageSetWriter(
                out,
                task=task.name,
                source="retrieved",
                key=key,
                class_names=task.class_names,
                config=config | {"search": facts},
            ) as writer:
                _write(writer, pool.name, rows, _images(pool, rows, out / _DOWNLOADS, settings, policy), progress)
    _clear(out)
    return curate(out, task=task, clip=clip, settings=curation)


def _config(task: Task, pool: Pool, clip: Clip, settings: RetrieveSettings, engine: Engine) -> dict[str, Any]:
    """What the candidates follow from."""
    from retrieve_or_generate.retrieve.search import identified
    from retrieve_or_generate.weights import clip_fingerprint

    model = settings.model or clip.name
    return {
        "version": _VERSION,
        "task": task.fingerprint,
        "pool": {"name": pool.name, "fingerprint": pool.fingerprint},
        "model": {"name": model, "fingerprint": clip_fingerprint(model)},
        "retrieve": identified(settings) | {"engine": engine.name, "index": engine.identity},
    }


def _candidates(search: Any, task: Task, folder: Path, progress: Progress | None) -> tuple[pa.Table, dict[str, Any]]:
    """The candidates with what the pool says of them, and how they were found."""
    from retrieve_or_generate.retrieve.queries import class_queries
    from retrieve_or_generate.retrieve.search import read_found, run_search
    from retrieve_or_generate.retrieve.semantic import find_candidates

    found = read_found(search, task, folder)
    if found is None:
        run_search(search, {folder: task}, folder, progress)
        found = read_found(search, task, folder)
        assert found is not None
    queries = class_queries(task, search.clip, search.settings)
    table = find_candidates(task, search.pool, queries, found, search.settings)
    told = search.pool.metadata(table["row"].to_numpy(), _TOLD)
    for name in _TOLD:
        table = table.append_column(name, told[name])
    return table.append_column("reason", pa.array(_unfit(told, search.settings), pa.string())), found.facts


def _unfit(told: pa.Table, settings: RetrieveSettings) -> list[str]:
    """Why rows are dropped before anything is fetched, "" for those that are not."""
    if settings.nsfw == "keep":
        return [""] * told.num_rows
    tags = [str(tag or "").upper() == "NSFW" for tag in told["NSFW"].to_pylist()]
    unsafe = told["punsafe"].cast(pa.float64()).fill_null(0.0).to_numpy() >= _UNSAFE_FROM
    return np.where(tags, "nsfw", np.where(unsafe, "unsafe", "")).tolist()


def _images(
    pool: Pool, rows: pa.Table, scratch: Path, settings: RetrieveSettings, policy: DownloadPolicy | None
) -> Iterator[tuple[bytes | None, str]]:
    """For each row that is not dropped: its image, or None and why there is none."""
    wanted = rows.filter(pa.compute.equal(rows["reason"], ""))
    if settings.fetch == "shards":
        return _from_shards(pool, wanted["row"].to_pylist())
    return _from_web(wanted, scratch, policy or DownloadPolicy())


def _write(
    writer: ImageSetWriter,
    pool_name: str,
    rows: pa.Table,
    images: Iterator[tuple[bytes | None, str]],
    progress: Progress | None,
) -> None:
    done = 0
    for batch in rows.to_batches(_BATCH):
        for row in batch.to_pylist():
            image, reason = (None, row["reason"]) if row["reason"] else next(images)
            writer.add(
                key=f"{row['row']:010d}",
                label=row["label"],
                caption=row["caption"] or "",
                origin={"pool": pool_name, "row": row["row"], "url": row["url"]},
                query=row["query"],
                image=image,
                reason=reason,
            )
        done += batch.num_rows
        if progress:
            progress("images", done, rows.num_rows)
    writer.finish()


def _from_shards(pool: Pool, rows: list[int]) -> Iterator[tuple[bytes | None, str]]:
    """The image of each row, None where the pool has none."""
    for start in range(0, len(rows), _BATCH):
        part = rows[start : start + _BATCH]
        images = pool.image_bytes(part)
        for row in part:
            yield (images[row], "") if row in images else (None, "dead_link")


def _from_web(rows: pa.Table, scratch: Path, policy: DownloadPolicy) -> Iterator[tuple[bytes | None, str]]:
    """The image of each row, None where its URL gave none, or another than the pool was made of."""
    asked = rows.select(["url", "md5"]).append_column("key", rows["row"].cast(pa.string()))
    status = download_urls(asked, scratch, policy)
    with durable_file(scratch / "status.parquet") as temporary:
        pq.write_table(status.drop_columns(["part"]), temporary)
    fetched = downloaded(scratch, status)
    for what in status["status"].to_pylist():
        yield (next(fetched)[1], "") if what == "ok" else (None, "dead_link")


def _clear(out: Path) -> None:
    """Drop what only an unfinished set needs."""
    for path in (out / _DOWNLOADS).glob("[0-9]*"):
        path.unlink()
    shutil.rmtree(out / _SEARCH, ignore_errors=True)
