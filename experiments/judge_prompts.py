"""What the pocket captioner and the pocket language model say: `python experiments/judge_prompts.py [--out docs/pocket]`.

The captioner reads every test picture of each task, none of which it was trained on: a caption is right if it has the class's name
or a synonym and no other class's. The language model is asked as `synthesize.prompts=llm` asks it, 128 times a class. Prints JSON;
with `--out` it is written to `judged_prompts.json` there.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import torch

from retrieve_or_generate.in_context import read_lists
from retrieve_or_generate.pocket.captions import VOCABULARIES, Vocabulary
from retrieve_or_generate.pocket.pictures import TASKS, evaluation_split
from retrieve_or_generate.pocket.train_language import colour_of
from retrieve_or_generate.seeds import generator_for
from retrieve_or_generate.store import write_json
from retrieve_or_generate.synthesize.prompts.image_captions import BATCH, Captioner
from retrieve_or_generate.synthesize.prompts.llm import BLOCK
from retrieve_or_generate.synthesize.prompts.naming import names_class
from retrieve_or_generate.synthesize.prompts.nucleus import LineModel
from retrieve_or_generate.text_models import find_text_model
from retrieve_or_generate.weights import POCKET_WEIGHTS


def named_classes(text: str, words: Vocabulary) -> set[str]:
    """The classes whose name or synonym stands in a text."""
    return {
        name
        for name in words.class_names
        if any(names_class(text, word) for word in (name, *words.synonyms.get(name, ())))
    }


def judge_captions(captioner: Captioner, task: str) -> dict[str, float]:
    """Shares of the test pictures whose caption names the class alone, another, or none."""
    words, pictures = VOCABULARIES[task], evaluation_split(task, "test")
    told: Counter[str] = Counter()
    captions = []
    for start in range(0, len(pictures), BATCH):
        part = pictures[start : start + BATCH]
        captions += captioner.captions([picture.jpeg for picture in part])
        for picture, caption in zip(part, captions[start:], strict=True):
            named = named_classes(caption, words)
            right = named == {words.class_names[picture.label]}
            told["right" if right else "wrong" if named else "no_class"] += 1
    shares = {name: round(told[name] / len(pictures), 4) for name in ("right", "wrong", "no_class")}
    return shares | {"distinct": len(set(captions)), "pictures": len(pictures)}


def judge_sentences(model: LineModel, task: str, count: int = 128) -> dict[str, float]:
    """Shares of the sentences that name the class, are new, and have the colour that the background asked for has."""
    words, lists = VOCABULARIES[task], read_lists()
    told: Counter[str] = Counter()
    for name in words.class_names:
        queries = [
            lists.query(name, name, task == "textures", generator_for("judge", "query", name, i)) for i in range(count)
        ]
        rngs = [generator_for("judge", "words", name, i) for i in range(count)]
        said = []
        for start in range(0, count, BLOCK):
            part = slice(start, start + BLOCK)
            said += model.complete([query.text for query in queries[part]], rngs[part], 0.8, 0.9)
        naming = [names_class(text, name) for text in said]
        told.update(sentences=count, naming_the_class=sum(naming), distinct=len(set(said)))
        for query, text in zip(queries, said, strict=True):
            colour = colour_of(query.beside) if query.kind == "background" else None
            told.update(coloured=colour is not None, rightly_coloured=colour is not None and f" {colour}" in text)
            told.update(
                related=query.kind == "relation", rightly_related=query.kind == "relation" and query.beside in text
            )
    shares = {name: round(told[name] / told["sentences"], 4) for name in ("naming_the_class", "distinct")}
    for asked, done in (("coloured", "rightly_coloured"), ("related", "rightly_related")):
        if told[asked]:
            shares[done] = round(told[done] / told[asked], 4)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captioner", default=str(POCKET_WEIGHTS / "captioner"), help="folder (default the pocket's)")
    parser.add_argument("--language", default=str(POCKET_WEIGHTS / "language"), help="folder (default the pocket's)")
    parser.add_argument("--out", type=Path, help="folder for judged_prompts.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    captioner = Captioner(find_text_model(arguments.captioner, "captioner"), "float32", "cpu")
    model = LineModel(find_text_model(arguments.language, "language"), "float32", "cpu")
    judged = {
        "captions": {task: judge_captions(captioner, task) for task in TASKS},
        "sentences": {task: judge_sentences(model, task) for task in TASKS},
    }
    if arguments.out:
        write_json(arguments.out / "judged_prompts.json", judged)
    print(json.dumps(judged, indent=1))


if __name__ == "__main__":
    main()
