"""The verb that takes an image out of everything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from retrieve_or_generate.cli.options import AsJson, Pool, emit
from retrieve_or_generate.errors import IncompleteError

if TYPE_CHECKING:
    from retrieve_or_generate.takedown import Takedown


def takedown(
    hash: Annotated[
        str, typer.Argument(metavar="HASH", help="sha256 or md5 of the image's bytes, or the URL it came from")
    ],
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="FOLDER", help="image sets and runs to clean, or folders of them; default: runs", show_default=False
        ),
    ] = None,
    pool: Pool = None,
    as_json: AsJson = False,
) -> None:
    """Remove an image everywhere, and list what was trained on it.

    From every image set below the folders, with pictures made of it, from downloads, and with --pool from that pool's own images.
    Its hashes and URLs go to the blocklist. Trials that trained on it are marked stale; rog compare runs them anew.

    \b
    Example:  rog takedown https://example.org/cat.jpg runs --pool /data/pool
    """
    from retrieve_or_generate import api

    done = api.takedown(hash, tuple(folders or (Path("runs"),)), pool)
    told = {
        "sha256": done.sha256,
        "listed": done.listed,
        "sets": {str(folder): count for folder, count in done.sets.items()},
        "pool_images": done.pool_images,
        "trials": done.trials,
        "runs": done.runs,
        "problems": done.problems,
    }
    emit("\n".join(_lines(done, pool)), told, as_json)
    if done.problems:
        raise IncompleteError("; ".join(done.problems))


def _lines(done: Takedown, pool: str | None) -> list[str]:
    lines = [f"sha256 {sha256}" for sha256 in done.sha256] or [
        "not found in what was searched; from now on it is not fetched"
    ]
    lines += [f"{folder}: {_images(count)} removed" for folder, count in done.sets.items()]
    if pool:
        lines.append(f"{pool}: {_images(done.pool_images)} removed")
    lines.append(f"blocklist: {len(done.listed)} new entries")
    lines += [f"{trial}: trained on it, its results are stale" for trial in done.trials]
    lines += [f"{run}: rog compare makes anew what followed from it" for run in done.runs]
    return lines


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"
