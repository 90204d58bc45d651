"""The verbs of `rog index`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieve_or_generate.cli.options import AsJson, Pool, emit
from retrieve_or_generate.endings import DamageFoundError
from retrieve_or_generate.errors import IntegrityError


def build(
    recipe: Annotated[str, typer.Argument(help="recipe in indexes/, or a file of your own")],
    pool: Pool = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="default: indices/RECIPE beside the pool", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Build the FAISS index of a recipe over a pool.

    Beside the pool, rog retrieve --set retrieve.engine=index finds it.

    \b
    Example:  rog index build pocket --out runs/indexes/pocket
    """
    from retrieve_or_generate import api

    folder = api.build_index(recipe, out, pool)
    emit(str(folder), {"out": folder}, as_json)


def verify(
    folder: Annotated[Path, typer.Argument(metavar="INDEX", help="folder that rog index build wrote")],
    pool: Pool = None,
    k: Annotated[int, typer.Option("-k", min=1, metavar="K", help="neighbours per query")] = 100,
    queries: Annotated[int, typer.Option(min=100, metavar="N", help="captions of the pool to search for")] = 200,
    as_json: AsJson = False,
) -> None:
    """Check an index's bytes and measure its recall.

    Recall is the share of the true K nearest that the index finds, against exact search.

    \b
    Example:  rog index verify runs/indexes/pocket -k 100
    """
    from retrieve_or_generate import api

    try:
        recall = api.index_recall(folder, pool, k, queries)
    except IntegrityError as error:
        raise DamageFoundError(str(error)) from error
    text = f"{folder}: as recorded; it finds {recall:.1%} of the true {k} nearest, over {queries} captions"
    emit(text, {"recall_at_k": recall, "k": k, "queries": queries}, as_json)


def search(
    folder: Annotated[Path, typer.Argument(metavar="INDEX", help="folder that rog index build wrote")],
    query: Annotated[str, typer.Argument(help="words to search for")],
    pool: Pool = None,
    k: Annotated[int, typer.Option("-k", min=1, metavar="K", help="neighbours")] = 10,
    nprobe: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="lists to visit; default: the recipe's", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Search a pool through its index.

    Prints similarity (cosine, scored exactly), row, caption and URL of the nearest rows.

    \b
    Example:  rog index search runs/indexes/pocket "a photo of a falcon" -k 5
    """
    from retrieve_or_generate import api

    rows = api.search_index(folder, query, pool, k, nprobe)
    lines = ["{similarity:.4f}  {row:>10}  {caption}  {url}".format(**row) for row in rows]
    emit("\n".join(lines), {"results": rows}, as_json)
