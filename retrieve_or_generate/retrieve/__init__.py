"""Retrieved image sets: a pool is searched for a task's classes, and what is found is fetched and curated.

Reads a pool and a task; writes an image set folder (`image_set.py`). Each stage keeps what it has done (the search in `.search/`,
the download in `.downloads/`), so that the same call goes on with a killed one. Images come from the pool's own shards or are
downloaded anew from their URLs; either way the same bytes give the same set. What became of every URL is told in
`.downloads/status.parquet`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from retrieve_or_generate.blocklist import Blocklist
from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.executors import core_count
from retrieve_or_generate.image_set import ImageSet, ImageSetWriter, candidates_record, check_free
from retrieve_or_generate.progress import Progress
from retrieve_or_generate.retrieve.download import download as download_urls
from retrieve_or_generate.retrieve.download import downloaded, image_set_reason
from retrieve_or_generate.retrieve.guard import DownloadPolicy
from retrieve_or_generate.settings import CurateSettings, RetrieveSettings
from retrieve_or_generate.store import content_key, durable_file, locked, read_json, remove_leftovers
from retrieve_or_generate.weights import clip_fingerprint

if TYPE_CHECKING:  # a download worker imports this package, and has no use for what loads a model
    from retrieve_or_generate.models import Clip
    from retrieve_or_generate.pool.layout import Pool
    from retrieve_or_generate.retrieve.engines import Engine
    from retrieve_or_generate.retrieve.search import Search
    from retrieve_or_generate.tasks.base import Task

__all__ = ["DownloadPolicy", "retrieve"]

_VERSION = 1  # part of every key: raise when the same settings find other candidates
_BATCH = 1000
_URLS_A_PROCESS = 10_000
_UNSAFE_FROM = 0.5  # of punsafe, LAION's probability that a picture is unsafe: more likely than not
_SEARCH, _DOWNLOADS = ".search", ".downloads"
_TOLD = ("url", "caption", "NSFW", "punsafe", "md5", "sha256", "hash")

Image = tuple[bytes | None, str]
"""An image, or None and why there is none."""


def retrieve(
    task: Task,
    pool: Pool | None,
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

    `pool` is None where a service searches its own (engine: remote). `clip` scores the images that were found, and searches where
    the settings name no other model. `index_folder` is where the FAISS index lies or is built (beside the pool by default),
    `search_folder` where the search of this task was or will be kept (in `out` by default), `policy` how a download is done
    (fetch: http).

    Raises:
        UsageError: pool and model do not fit, or `out` holds something else. IntegrityError: the pool is damaged.
        IncompleteError: too few URLs gave an image, or a worker or service failed; the same call continues.
    """
    from retrieve_or_generate.curate.curation import curate
    from retrieve_or_generate.retrieve.search import open_search

    found_in = search_folder or out / _SEARCH
    search = open_search(
        pool, clip, settings, [task], index_folder=index_folder, engine=_engine_before(out, found_in, settings)
    )
    config = _config(task, search, clip)
    key = content_key(config)
    if candidates_record(out, key) is None:
        check_free(out)
        with locked(out):
            remove_leftovers(out)
            rows, facts = _candidates(search, task, found_in, progress)
            images = _images(pool, rows, out / _DOWNLOADS, settings, policy, progress)
            record = config | facts
            with ImageSetWriter(
                out, task=task.name, source="retrieved", key=key, class_names=task.class_names, config=record
            ) as writer:
                _write(writer, _source(search), rows, images, progress)
    _clear(out)
    return curate(out, task=task, clip=clip, settings=curation)


def _engine_before(out: Path, found_in: Path, settings: RetrieveSettings) -> Engine | None:
    """With `engine: auto`, the engine that this set was begun with: the planner's measurements may say something else today."""
    from retrieve_or_generate.retrieve.engines import Engine

    if settings.engine != "auto":
        return None
    for path in (out / "candidates.json", found_in / "neighbours.json"):
        record = read_json(path) if path.is_file() else {}
        told = record.get("engine") or record.get("config", {}).get("retrieve", {}).get("engine")
        if told:
            return Engine(told[0], told[1], "begun with it")
    return None


def _source(search: Search) -> str:
    return search.pool.name if search.pool else str(search.settings.service.url)


def _config(task: Task, search: Search, clip: Clip) -> dict[str, Any]:
    """What the candidates follow from."""
    pool, model = search.pool, search.settings.model or clip.name
    return {
        "version": _VERSION,
        "task": task.fingerprint,
        "pool": {"name": _source(search), "fingerprint": pool.fingerprint if pool else None},
        "model": {"name": model, "fingerprint": clip_fingerprint(model)},
        "retrieve": search.identity,
    }


def _candidates(search: Search, task: Task, folder: Path, progress: Progress | None) -> tuple[pa.Table, dict[str, Any]]:
    """The candidates with what the pool says of them and why some are not fit; and how they were found, for the set's record."""
    from retrieve_or_generate.retrieve.queries import class_queries
    from retrieve_or_generate.retrieve.search import read_found, run_search
    from retrieve_or_generate.retrieve.semantic import answered_candidates, find_candidates

    found = read_found(search, task, folder)
    if found is None:
        run_search(search, {folder: task}, folder, progress)
        found = read_found(search, task, folder)
        assert found is not None
    facts: dict[str, Any] = {"search": found.facts}
    if search.pool is None:
        rows = answered_candidates(found, search.settings)
    else:
        queries = class_queries(task, search.clip, search.settings)
        if queries.few_examples:
            facts["few_examples"] = queries.few_examples
        rows = find_candidates(task, search.pool, queries, found, search.settings)
        told = search.pool.metadata(rows["row"].to_numpy(), _TOLD)
        for name in _TOLD:
            rows = rows.append_column(name, told[name])
    return rows.append_column("reason", pa.array(_unfit(rows, search.settings), pa.string())), facts


def _unfit(rows: pa.Table, settings: RetrieveSettings) -> list[str]:
    """Why rows are dropped before anything is fetched, "" for those that are not."""
    if settings.nsfw == "keep":
        return [""] * rows.num_rows
    tagged = np.array([str(tag or "").upper() == "NSFW" for tag in rows["NSFW"].to_pylist()], bool)
    unsafe = np.zeros(rows.num_rows, bool)
    if "punsafe" in rows.column_names:
        unsafe = pc.fill_null(rows["punsafe"].cast(pa.float64()), 0.0).to_numpy() >= _UNSAFE_FROM
    reasons: list[str] = np.where(tagged, "nsfw", np.where(unsafe, "unsafe", "")).tolist()
    return reasons


def _images(
    pool: Pool | None,
    rows: pa.Table,
    scratch: Path,
    settings: RetrieveSettings,
    policy: DownloadPolicy | None,
    progress: Progress | None,
) -> Iterator[Image]:
    """What comes of each row that is fit."""
    fit = rows.filter(pc.equal(rows["reason"], ""))
    if pool is not None and settings.fetch == "shards":
        return _from_shards(pool, fit, Blocklist.load(settings.download.blocklist))
    return _from_web(fit, scratch, settings, policy, progress)


def _write(
    writer: ImageSetWriter, pool_name: str, rows: pa.Table, images: Iterator[Image], progress: Progress | None
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


def _from_shards(pool: Pool, rows: pa.Table, blocklist: Blocklist) -> Iterator[Image]:
    """From the pool itself, which lacks what could not be had when it was made."""
    for batch in rows.select(["row", "url", "hash"]).to_batches(_BATCH):
        images = pool.image_bytes(batch["row"].to_pylist())
        for row in batch.to_pylist():
            image = images.get(row["row"])
            if blocklist and _is_blocked(blocklist, row, image):
                yield None, "blocked"
            else:
                yield image, "" if image else "dead_link"


def _is_blocked(blocklist: Blocklist, row: dict[str, Any], image: bytes | None) -> bool:
    return blocklist.blocks(url=row["url"], id=row["hash"]) or (image is not None and blocklist.blocks_bytes(image))


def _from_web(
    rows: pa.Table, scratch: Path, settings: RetrieveSettings, policy: DownloadPolicy | None, progress: Progress | None
) -> Iterator[Image]:
    """Downloaded, under the terms of the settings. Raises `UsageError` where not one row has a URL."""
    if rows.num_rows and not any(rows["url"].to_pylist()):
        raise UsageError(f"none of the {rows.num_rows} candidates has a URL to download (retrieve.fetch=http)")
    known = {name: rows[name] for name in ("url", "md5", "sha256") if name in rows.column_names}
    ids = {"id": rows["hash"]} if "hash" in rows.column_names else {}
    asked = pa.table({"key": rows["row"].cast(pa.string()), **known, **ids})
    told = partial(_of, progress, rows.num_rows) if progress else None
    processes = max(1, min(core_count(), rows.num_rows // _URLS_A_PROCESS))
    status = download_urls(asked, scratch, policy, settings=settings.download, processes=processes, progress=told)
    with durable_file(scratch / "status.parquet") as temporary:
        pq.write_table(status.drop_columns(["part"]), temporary)
    fetched = downloaded(scratch, status)
    for what in status["status"].to_pylist():
        yield (next(fetched)[1], "") if what == "ok" else (None, image_set_reason(what))


def _of(progress: Progress, total: int, done: int) -> None:
    progress("downloads", done, total)


def _clear(out: Path) -> None:
    """Drop what only an unfinished set needs."""
    for path in (out / _DOWNLOADS).glob("[0-9]*"):
        path.unlink()
    shutil.rmtree(out / _SEARCH, ignore_errors=True)
