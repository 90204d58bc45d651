"""The verbs of `rog index`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieve_or_generate.cli.options import AsJson, Device, Pool, emit
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

    Says first what memory and disk it takes, and refuses where this machine has less. Beside the pool, rog retrieve --set
    retrieve.engine=index finds it. An interrupted build goes on where it was.

    \b
    Example:  rog index build pocket --out runs/indexes/pocket
    """
    from retrieve_or_generate import api
    from retrieve_or_generate.progress import ProgressLine

    folder = api.build_index(
        recipe, out, pool, ProgressLine(), lambda stated: typer.echo(f"{recipe}: {stated}", err=True)
    )
    emit(str(folder), {"out": folder}, as_json)


IndexPlace = Annotated[
    Path, typer.Argument(metavar="INDEX", help="folder that rog index build wrote, or a published index")
]
PublishedRecipe = Annotated[
    str | None,
    typer.Option("--recipe", metavar="RECIPE", help="what a published index is: recipe or file", show_default=False),
]
Nprobe = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="lists to visit; default: the recipe's", show_default=False)
]


def verify(
    folder: IndexPlace,
    pool: Pool = None,
    recipe: PublishedRecipe = None,
    k: Annotated[int, typer.Option("-k", min=1, metavar="K", help="neighbours per query")] = 100,
    queries: Annotated[int, typer.Option(min=100, metavar="N", help="captions of the pool to search for")] = 200,
    texts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="search for its lines instead, a hundred at least", show_default=False),
    ] = None,
    nprobe: Nprobe = None,
    device: Device = "cpu",
    as_json: AsJson = False,
) -> None:
    """Check an index and measure its recall, which its answers then carry.

    Every byte of an index of ours is compared with its checksum; one that was published is read in a process of its own. Its
    rows must be the pool's: as many, and found by their own embeddings. Recall is the share of the true K nearest that it finds,
    against exact search.

    \b
    Example:  rog index verify runs/indexes/pocket -k 100
              rog index verify /data/laion2B-en-imagePQ128 --recipe laion2b-image --pool /data/laion2B-en --texts prompts.txt
    """
    from retrieve_or_generate import api
    from retrieve_or_generate.progress import ProgressLine

    try:
        found = api.index_recall(folder, pool, k, queries, nprobe, recipe, texts, device, ProgressLine())
    except IntegrityError as error:
        raise DamageFoundError(str(error)) from error
    over = "lines" if texts else "captions"
    state = "readable (nobody recorded its checksums)" if found["published"] else "as recorded"
    text = (
        f"{folder}: {state}; {found['rows_found']:.0%} of its rows are found by their own embeddings; it finds "
        f"{found['recall_at_k']:.1%} of the true {k} nearest, over {found['queries']} {over}"
    )
    emit(text, found, as_json)


def search(
    folder: IndexPlace,
    query: Annotated[str, typer.Argument(help="words to search for")],
    pool: Pool = None,
    recipe: PublishedRecipe = None,
    k: Annotated[int, typer.Option("-k", min=1, metavar="K", help="neighbours")] = 10,
    nprobe: Nprobe = None,
    as_json: AsJson = False,
) -> None:
    """Search a pool through its index.

    Prints similarity (cosine, scored exactly), row, caption and URL of the nearest rows, and last the recall that goes with them.

    \b
    Example:  rog index search runs/indexes/pocket "a photo of a falcon" -k 5
    """
    from retrieve_or_generate import api

    found = api.search_index(folder, query, pool, k, nprobe, recipe)
    lines = ["{similarity:.4f}  {row:>10}  {caption}  {url}".format(**row) for row in found["results"]]
    recall = "the index finds {recall_at_k:.1%} of the true {k} nearest, measured over {queries} queries".format(
        **found["recall"]
    )
    emit("\n".join([*lines, recall]), found, as_json)
