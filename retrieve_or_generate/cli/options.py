"""Options that mean the same in every verb, and how verbs print."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from retrieve_or_generate.errors import visible

if TYPE_CHECKING:
    from retrieve_or_generate.experiment import Experiment
    from retrieve_or_generate.image_set import ImageSet


def _name_data_folder(folder: Path | None) -> Path | None:
    """`--data` as the variable that tasks look at, so that worker processes see it, too."""
    if folder is not None:
        os.environ["ROG_DATA"] = str(folder.absolute())
    return folder


ExperimentFile = Annotated[
    Path | None,
    typer.Argument(metavar="EXPERIMENT", help="experiment file (YAML); left out: the pocket world", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="override a field of the experiment; repeatable", show_default=False
    ),
]
Quick = Annotated[
    bool,
    typer.Option("--quick", help="the experiment's quick form: its section `quick`, a minute on the pocket world"),
]
Pool = Annotated[
    str | None, typer.Option(metavar="POOL", help="pocket, or a folder in LAION's layout", show_default=False)
]
Task = Annotated[
    str | None, typer.Option(metavar="TASK", help="name (rog tasks) or folder of the task", show_default=False)
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        callback=_name_data_folder,
        help="where published data sets lie (rog tasks); default: ROG_DATA",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None, typer.Option(metavar="FOLDER", help="folder to write to; default: under runs/", show_default=False)
]
IndexFolder = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="FAISS index to search or build; default: beside the pool", show_default=False),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="cpu, cuda or cuda:N")]
AsJson = Annotated[bool, typer.Option("--json", help="print one machine-readable object last")]


def read_experiment(path: Path | None, overrides: list[str] | None, quick: bool, **fields: Any) -> Experiment:
    """The experiment of a command line."""
    from retrieve_or_generate.experiment import load_experiment

    return load_experiment(path, tuple(overrides or ()), quick=quick, **fields)


def emit(text: str, record: dict[str, Any], as_json: bool) -> None:
    """Print `text`, in which names and captions of others' may stand: what would steer the terminal is written out."""
    typer.echo("\n".join(visible(line) for line in text.split("\n")))
    if as_json:
        typer.echo(json.dumps(record, ensure_ascii=False, default=str))


def emit_set(image_set: ImageSet, as_json: bool) -> None:
    counts, manifest = image_set.counts(), image_set.manifest
    reasons = {str(reason): int(count) for reason, count in manifest["reason"].value_counts().items() if reason}
    dropped = ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none"
    text = (
        f"{image_set.folder}: {counts.sum()} {image_set.source} images of {len(counts)} classes "
        f"({counts.min()} to {counts.max()} a class), of {len(manifest)} candidates (dropped: {dropped})"
    )
    left_out = f"\n  classes left out: {', '.join(image_set.excluded)}" if image_set.excluded else ""
    config = image_set.record["config"]
    search, few = config.get("search", {}), config.get("few_examples", {})
    record = {"out": image_set.folder, "source": image_set.source, "task": image_set.task, "kept": int(counts.sum())}
    record |= {"candidates": len(manifest), "dropped": reasons, "excluded": list(image_set.excluded)}
    record |= {"search": search} if search else {}
    record |= {"few_examples": few} if few else {}
    record |= {"prompts_cut": config["prompts_cut"]} if "prompts_cut" in config else {}
    record |= {name: image_set.record[name] for name in ("selection", "memorised") if name in image_set.record}
    told = [*_searched(search), *_few_examples(few), *_besides(image_set.record)]
    emit("\n".join([text + left_out, *told]), record, as_json)


def _besides(record: dict[str, Any]) -> Iterator[str]:
    """Of generated images: whose prompts were cut, what was chosen among them, and which copy the pool."""
    if cut := record["config"].get("prompts_cut"):
        yield f"  prompts longer than the generator reads: those of {cut} candidates"
    if selection := record.get("selection"):
        images = selection["images"]
        yield f"  selected by {selection['rule']}: {images['chosen']} of {images['all']}"
    if memorised := record.get("memorised"):
        why = f": {memorised['why']}" if "why" in memorised else ""
        yield f"  copies of the pool: {memorised['found']} of {memorised['checked']} images looked for{why}"


def _few_examples(few: dict[str, int]) -> Iterator[str]:
    """Where classes have fewer training images than were to be queries: how many classes, and which has the fewest."""
    if few:
        name = min(few, key=few.__getitem__)
        yield (
            f"  fewer training images to search with than retrieve.examples_per_class in {len(few)} classes "
            f"({few[name]} of {name!r})"
        )


def _searched(search: dict[str, Any]) -> Iterator[str]:
    """How the candidates were found, in words: a line for each half of the search."""
    for half in search.values():
        how = f"captions by {half['semantics']}" if "semantics" in half else f"embeddings by {half['engine']}"
        exact = {True: ", exactly", False: ", approximately"}.get(half.get("exact"), "")
        recall = half.get("recall")
        found = "; finds {:.1%} of the true {} nearest".format(recall["recall_at_k"], recall["k"]) if recall else ""
        left_out = ", ".join(f"{count} {reason}" for reason, count in half.get("excluded", {}).items())
        yield f"  searched {how}{exact}{found}" + (f"; rows left out: {left_out}" if left_out else "")
