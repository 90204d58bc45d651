"""`queries.tsv`: what captions must say of a class, and the ways in which a line can be wrong."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.retrieve.captions import match_captions
from retrieve_or_generate.tasks import load_task, task_names
from retrieve_or_generate.tasks.queries import CaptionQuery, read_queries

NAMES = ("rose", "colt's foot", "banded", "black-eyed susan")
SYNONYMS = {"banded": ("striped", "lined"), "rose": ("rosa",)}


def read(tmp_path: Path, text: str) -> dict[str, CaptionQuery]:
    path = tmp_path / "queries.tsv"
    path.write_text(text, encoding="utf-8")
    return read_queries(path, NAMES, SYNONYMS)


def test_columns_are_all_met_by_any_term_and_lines_are_alternatives(tmp_path: Path) -> None:
    queries = read(
        tmp_path, "# of the paper\n\nrose\t{}\tflower | petal\nrose\trosebud\ncolt's foot\tcolt's foot|coltsfoot\n"
    )
    assert set(queries) == {"rose", "colt's foot"}
    assert queries["rose"].alternatives() == [("rose", "flower"), ("rose", "petal"), ("rosebud",)]
    assert queries["colt's foot"].alternatives() == [("colt's foot",), ("coltsfoot",)]


def test_the_example_of_the_page_is_understood(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs/captions.md").read_text(encoding="utf-8")
    queries = read(tmp_path, page.split("```")[1])
    assert queries["rose"].alternatives() == [("rose", "flower")]
    assert len(queries["banded"].alternatives()) == 4


def test_a_star_is_every_class_without_a_line_of_its_own(tmp_path: Path) -> None:
    queries = read(tmp_path, '*\t"{} texture" | "{} pattern"\nrose\trose\n')
    assert queries["rose"] == CaptionQuery.any_of(["rose"])
    assert queries["banded"].alternatives() == [('"banded texture"',), ('"banded pattern"',)]
    assert set(queries) == set(NAMES)


def test_synonyms_are_looked_for_where_they_are_asked_for(tmp_path: Path) -> None:
    queries = read(tmp_path, "*\t{} | {synonym}\nrose\t{synonym} flower\t{synonym}|{}\n")
    assert queries["banded"].alternatives() == [("banded",), ("striped",), ("lined",)]
    assert queries["colt's foot"].alternatives() == [("colt's foot",)]
    assert queries["rose"].alternatives() == [("rosa flower", "rosa"), ("rosa flower", "rose")]


def test_every_word_of_a_name_as_a_column(tmp_path: Path) -> None:
    queries = read(tmp_path, "*\t{words}\tplant\n")
    assert queries["black-eyed susan"].lines == ((("black-eyed",), ("susan",), ("plant",)),)
    found = match_captions(
        pa.array(["susan, a black eyed plant", "susan, a plant of eyed black"]),
        {0: queries["black-eyed susan"]},
        "token",
    )
    assert found.to_pylist() == [{"row": 0, "label": 0, "query": "black-eyed + susan + plant"}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rose\trose\nrsoe\tx", r"queries.tsv, line 2: unknown class 'rsoe'; did you mean 'rose'\?"),
        ("rose", "line 1: nothing to look for; put a tab"),
        ("rose\t ", "line 1: nothing to look for"),
        ("rose\trose | ", r"line 1: term '' has no letter or digit"),
        ("rose\trose\t\tflower", "line 1: term '' has no letter or digit"),
        ('rose\t"rose', "line 1: double quotes go around a whole term"),
        ('rose\tred "rose"', "line 1: double quotes go around a whole term"),
        ("*\t{synonym}", r"line 1: \"colt's foot\" has no synonym in synonyms.tsv"),
        ("rose" + ("\t" + "|".join("abcdefghij")) * 5, "'rose' has 100000 alternatives, 10000 are the most"),
    ],
)
def test_a_line_that_is_not_understood_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        read(tmp_path, text)


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "queries.tsv").write_bytes(b"rose\t\xff")
    with pytest.raises(UsageError, match=r"queries.tsv: not UTF-8 text \(invalid start byte at byte 5\)"):
        read_queries(tmp_path / "queries.tsv", NAMES, SYNONYMS)


def test_a_task_takes_the_file_beside_its_class_names(tmp_path: Path) -> None:
    source = load_task("textures")
    folder = shutil.copytree(source.folder, tmp_path / "textures")
    assert load_task(str(folder)).caption_queries == {
        label: CaptionQuery.any_of([name]) for label, name in enumerate(source.class_names)
    }
    (folder / "queries.tsv").write_text("striped\tstriped\tfabric\n")
    task = load_task(str(folder))
    label = task.class_names.index("striped")
    assert task.caption_queries[label].alternatives() == [("striped", "fabric")]
    assert task.caption_queries[1 - label] == CaptionQuery.any_of([task.class_names[1 - label]])
    assert task.fingerprint != source.fingerprint, "a set that was retrieved with other queries is another set"


def test_a_class_without_its_synonym(tmp_path: Path) -> None:
    folder = shutil.copytree(load_task("textures").folder, tmp_path / "textures")
    (folder / "synonyms.tsv").write_text("striped")
    with pytest.raises(UsageError, match=r"synonyms.tsv: no synonym after 'striped'; a line is"):
        load_task(str(folder))


PUBLISHED = sorted((Path(__file__).parents[2] / "experiments/unmet_promise/queries").glob("*.tsv"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_the_published_rewrites_are_understood(path: Path) -> None:
    own = [line.split("\t")[0] for line in path.read_text().splitlines() if line and line[0] not in "#*"]
    names = list(dict.fromkeys([*own, "banded", "Audi TT RS Coupe 2012"]))
    queries = read_queries(path, names, {})
    assert set(own) <= set(queries)
    for query in queries.values():
        assert match_captions(
            pa.array([" ".join(terms) for terms in query.alternatives()]), {0: query}, "token"
        ).num_rows


def test_there_are_published_rewrites() -> None:
    assert {path.stem for path in PUBLISHED} == {"cars", "dtd", "flowers", "imagenet"}
    assert task_names()
