"""A task whose folder holds no split, a retrieved set with captions, and a WordNet of a dozen lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from retrieve_or_generate.image_set import (
    CANDIDATES,
    MANIFEST,
    ImageSet,
    ImageSetWriter,
    load_image_set,
    read_table,
    seal_image_set,
)
from retrieve_or_generate.pixels import encode_jpeg
from retrieve_or_generate.pocket import drawing
from retrieve_or_generate.settings import PromptSettings
from retrieve_or_generate.synthesize.prompts import PromptSource
from retrieve_or_generate.tasks import Task, load_task

Retrieved = Callable[..., ImageSet]


@pytest.fixture
def splitless(tmp_path: Path) -> Task:
    """The pocket textures, where whoever opens a split ends in an error."""
    (tmp_path / "task").mkdir()
    textures = load_task("textures")
    return Task(textures.name, textures.class_names, textures.templates, tmp_path / "task", textures.synonyms)


@pytest.fixture
def retrieved_with(tmp_path: Path) -> Retrieved:
    """A retrieved set that keeps an image for every caption given, in their order; one more is dropped in each class."""

    def make(task: Task, captions: Mapping[int, Sequence[str]], excluded: Sequence[str] = ()) -> ImageSet:
        rng = np.random.default_rng(0)
        picture = encode_jpeg(drawing.texture("striped", rng, ("red", "white")))
        folder = tmp_path / "retrieved"
        names = {"task": task.name, "source": "retrieved", "class_names": task.class_names}
        with ImageSetWriter(folder, key="k", config={}, **names) as writer:  # type: ignore[arg-type]
            for label, own in captions.items():
                for i, caption in enumerate(own):
                    common = {"label": label, "caption": caption, "origin": {}, "query": "", "image": picture}
                    writer.add(key=f"{label}-{i}", **common)  # type: ignore[arg-type]
                common = {"label": label, "caption": "dropped", "origin": {}, "query": "", "image": picture}
                writer.add(key=f"{label}-dropped", reason="nsfw", **common)  # type: ignore[arg-type]
            writer.finish()
        table = read_table(folder / CANDIDATES).to_pandas()
        kept = table["reason"] == ""
        table["status"] = np.where(kept, "kept", "dropped")
        table["rank"] = table[kept].groupby("label").cumcount().reindex(table.index).fillna(-1).astype(np.int64)
        manifest = pa.Table.from_pandas(table, MANIFEST, preserve_index=False)
        seal_image_set(folder, manifest, excluded=list(excluded))
        return load_image_set(folder)

    return make


@pytest.fixture
def source_of(splitless: Task, retrieved_with: Retrieved) -> Callable[..., PromptSource]:
    """What a strategy is given, with these settings: the textures, three captions of each class that name it."""

    def make(
        task: Task = splitless, captions: Mapping[int, Sequence[str]] | None = None, **given: object
    ) -> PromptSource:
        if captions is None:
            captions = {i: [f"{name} cloth {n}" for n in range(3)] for i, name in enumerate(task.class_names)}
        excluded = given.pop("excluded", ())
        like = retrieved_with(task, captions, excluded)
        return PromptSource(task, like, PromptSettings.model_validate(given))

    return make


_NOUNS = (  # words, pointers (symbol, the first word that they lead to), gloss; a lemma's senses stand in the order of its index
    ("entity", (), "that which is"),
    ("bird", (("@", "entity"),), "a warm-blooded animal with feathers; it lays eggs"),
    ("wading_bird wader", (("@", "bird"),), "a bird with long legs"),
    ("game_bird", (("@", "bird"),), "a bird that is hunted"),
    ("writer author", (("@", "entity"),), "one who writes"),
    ("machine", (("@", "entity"),), "a thing that does work"),
    ("Crane Stephen_Crane", (("@i", "writer"),), "a writer of novels (1871-1900)"),
    ("crane grus", (("#m", "bird"), ("@", "wading_bird")), "large bird of marshes"),
    ("crane", (("@", "machine"),), "lifts heavy objects"),
    ("quail", (("@", "game_bird"), ("@", "bird")), "small round bird"),
    ("Poe", (("@i", "writer"),), "a writer of tales"),
    ("finch", (("@", "bird"), ("~", "quail")), "bird that eats seeds"),
)
_LICENCE = "  1 This software and database is being provided to you, the LICENSEE, by  \n  2 someone.  \n"


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    """A folder with `data.noun` and `index.noun` in the format of WordNet 3.0."""
    folder = tmp_path / "wordnet"
    folder.mkdir()
    lines = [_noun(noun, {}) for noun in _NOUNS]  # an offset is eight digits, so lines are as long without them
    starts = np.cumsum([len(_LICENCE)] + [len(line) for line in lines])
    first = {noun[0].split()[0]: int(start) for noun, start in reversed(list(zip(_NOUNS, starts, strict=False)))}
    text = _LICENCE + "".join(_noun(noun, first, int(start)) for noun, start in zip(_NOUNS, starts, strict=False))
    (folder / "data.noun").write_text(text)
    senses: dict[str, list[int]] = {}
    for (words, *_), start in zip(_NOUNS, starts, strict=False):
        for word in words.split():
            senses.setdefault(word.lower(), []).append(int(start))
    index = [
        f"{lemma} n {len(own)} 2 @ ~ {len(own)} 0 {' '.join(f'{start:08d}' for start in own)}  \n"
        for lemma, own in sorted(senses.items())
    ]
    (folder / "index.noun").write_text(_LICENCE + "".join(index))
    return folder


def _noun(noun: tuple[str, tuple[tuple[str, str], ...], str], starts: Mapping[str, int], start: int = 0) -> str:
    words, pointers, gloss = noun
    spelled = " ".join(f"{word} 0" for word in words.split())
    leading = "".join(f"{symbol} {starts.get(to, 0):08d} n 0000 " for symbol, to in pointers)
    return f"{start:08d} 05 n {len(words.split()):02x} {spelled} {len(pointers):03d} {leading}| {gloss}  \n"


@pytest.fixture
def offset_of(wordnet: Path) -> Callable[[str], int]:
    """Where the line of `data.noun` with these words begins."""
    data = (wordnet / "data.noun").read_bytes()

    def find(words: str) -> int:
        return data.rindex(b"\n", 0, data.index(words.encode())) + 1

    return find
