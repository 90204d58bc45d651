"""`rog index embed`: a pool of one's own images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from retrieve_or_generate.cli.options import AsJson, Device, emit


def embed(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="folder of .tar shards, images, or .parquet or .csv tables; or one file"),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="the pool")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="CLIP model that embeds (rog models)")] = "pocket",
    device: Device = "cpu",
    jobs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="threads that decode; default: one a core", show_default=False),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="images a batch")] = 256,
    captions: Annotated[
        bool | None,
        typer.Option(
            "--captions/--no-captions", help="embed captions, too; default: where there are", show_default=False
        ),
    ] = None,
    images: Annotated[
        bool, typer.Option("--images/--no-images", help="keep the images in the pool; without, rows need URLs")
    ] = True,
    precision: Annotated[
        str, typer.Option(metavar="TYPE", help="of the model's products: float32, bfloat16 or float16")
    ] = "float32",
    as_json: AsJson = False,
) -> None:
    """Make a pool of images of your own.

    SOURCE is what img2dataset or webdataset wrote, a folder of pictures (captions in .txt beside them), or tables with a column
    image (bytes) or image_path. What cannot be read is listed in dropped/. The same command again goes on where it was left.

    \b
    Example:  rog index embed photos/ --model ViT-L-14/openai --device cuda --out pools/photos
    """
    from retrieve_or_generate import api
    from retrieve_or_generate.progress import ProgressLine

    made = api.embed(source, out, model, device, jobs, batch_size, captions, images, precision, ProgressLine())
    told = {name: made[name] for name in ("rows", "dropped", "dim", "model")}
    text = "{}: {rows} images of dimension {dim}, {dropped} dropped".format(out, **told)
    told["captions"] = any(name.startswith("text_emb/") for name in made["files"])
    if not told["captions"]:
        text += "; without embeddings of captions: search it with retrieve.modalities=[image]"
    emit(text, {"out": out, **told}, as_json)
