"""`c, hypernym inside place`: places of a file, hypernyms of files and of WordNet."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.pocket.captions import PLACES
from retrieve_or_generate.synthesize.prompts import PromptSource, load_strategy
from retrieve_or_generate.synthesize.prompts.places import read_places
from retrieve_or_generate.synthesize.prompts.wordnet import WordNet
from retrieve_or_generate.tasks import Task, load_task

SourceOf = Callable[..., PromptSource]

PLACES365 = """/a/airfield 0
/a/airplane_cabin 1
/a/apartment_building/outdoor 8
/z/zen_garden 364
"""


@pytest.fixture
def places(tmp_path: Path) -> str:
    path = tmp_path / "categories_places365.txt"
    path.write_text(PLACES365)
    return str(path)


@pytest.fixture
def birds(tmp_path: Path) -> Task:
    (tmp_path / "birds").mkdir()
    return Task("birds", ("crane", "Quails"), ("a {}.",), tmp_path / "birds")


class TestPlaces:
    def test_published_and_plain_lines_alike(self, places: str, tmp_path: Path) -> None:
        expected = ("airfield", "airplane cabin", "apartment building outdoor", "zen garden")
        assert read_places(Path(places)) == expected
        plain = tmp_path / "plain.txt"
        plain.write_text("# places\nairfield\n\nairplane cabin \nairfield\napartment building outdoor\r\nzen garden")
        assert read_places(plain) == expected

    def test_a_file_without_any(self, tmp_path: Path) -> None:
        (tmp_path / "empty.txt").write_text("# nothing\n\x07\n")
        with pytest.raises(UsageError, match=r"empty\.txt: no place in it; put one a line"):
            read_places(tmp_path / "empty.txt")

    @pytest.mark.parametrize("name", ["digits", "textures", "aircraft"])
    def test_the_pocket_world_has_its_own(self, name: str, source_of: SourceOf) -> None:
        strategy = load_strategy(source_of(task=load_task(name), strategy="places"))
        prompts = strategy.prompts(1, len(PLACES) + 1)
        assert {prompt.origin["place"] for prompt in prompts} == set(PLACES)
        assert prompts[-1] == prompts[0]
        assert strategy.record()["given_again"] == 1

    def test_another_task_needs_a_file(self, birds: Task, source_of: SourceOf, wordnet: Path) -> None:
        with pytest.raises(
            UsageError, match=r"give synthesize\.prompts\.places a file with one a line, such as Places365"
        ):
            load_strategy(source_of(task=birds, strategy="places", hypernyms=str(wordnet)))

    def test_each_class_goes_through_them_in_an_order_of_its_own(self, source_of: SourceOf) -> None:
        strategy = load_strategy(source_of(strategy="places"))
        orders = [[p.origin["place"] for p in strategy.prompts(label, len(PLACES))] for label in (0, 1)]
        assert orders[0] != orders[1]
        assert sorted(orders[0]) == sorted(orders[1])


class TestHypernyms:
    def test_a_file_of_the_users(self, birds: Task, source_of: SourceOf, places: str, tmp_path: Path) -> None:
        (tmp_path / "h.tsv").write_text("Quails\tgame bird\ncrane\twading bird\n")
        given = {"strategy": "places", "places": places, "hypernyms": str(tmp_path / "h.tsv")}
        strategy = load_strategy(source_of(task=birds, **given))
        prompt = strategy.prompts(0, 1)[0]
        assert prompt.text == f"crane, wading bird inside {prompt.origin['place']}"
        assert strategy.record()["hypernyms"]["Quails"] == {"hypernym": "game bird", "from": "h.tsv"}

    def test_the_first_source_that_knows_a_class_counts(
        self, birds: Task, source_of: SourceOf, places: str, tmp_path: Path, wordnet: Path
    ) -> None:
        (tmp_path / "h.tsv").write_text("crane\tbuilding machine\n")
        given = {"strategy": "places", "places": places, "hypernyms": [str(tmp_path / "h.tsv"), str(wordnet)]}
        record = load_strategy(source_of(task=birds, **given)).record()
        assert {name: told["hypernym"] for name, told in record["hypernyms"].items()} == {
            "crane": "building machine",
            "Quails": "game bird",
        }

    @pytest.mark.parametrize(
        ("lines", "told"),
        [
            ("crane\tbird\n", r"h\.tsv: no hypernym for class 'Quails'; give synthesize\.prompts\.hypernyms"),
            ("crane\tbird\ncrane\tmachine\n", r"h\.tsv, line 2: 'crane' has a hypernym in line 1 already"),
            ("Quail\tbird\n", r"line 1: unknown class 'Quail'; did you mean 'Quails'\?"),
            ("crane\n", "line 1: no tab; a line is a class name, a tab and one hypernym"),
        ],
    )
    def test_a_file_that_is_wrong(
        self, lines: str, told: str, birds: Task, source_of: SourceOf, places: str, tmp_path: Path
    ) -> None:
        (tmp_path / "h.tsv").write_text(lines)
        source = source_of(task=birds, strategy="places", places=places, hypernyms=str(tmp_path / "h.tsv"))
        with pytest.raises(UsageError, match=told):
            load_strategy(source)

    def test_a_task_that_is_not_the_pocket_worlds_needs_one(
        self, birds: Task, source_of: SourceOf, places: str
    ) -> None:
        with pytest.raises(UsageError, match=r"^no hypernym for class 'crane' \(and 1 more\); give"):
            load_strategy(source_of(task=birds, strategy="places", places=places))

    def test_a_class_that_the_set_leaves_out_needs_none(
        self, birds: Task, source_of: SourceOf, places: str, tmp_path: Path
    ) -> None:
        (tmp_path / "h.tsv").write_text("crane\tbird\n")
        given = {"strategy": "places", "places": places, "hypernyms": str(tmp_path / "h.tsv"), "excluded": ["Quails"]}
        assert load_strategy(source_of(task=birds, **given)).prompts(1, 0) == []


class TestWordNet:
    def test_by_name_the_first_sense_that_is_a_kind_of_something(
        self, birds: Task, source_of: SourceOf, places: str, wordnet: Path, offset_of: Callable[[str], int]
    ) -> None:
        strategy = load_strategy(source_of(task=birds, strategy="places", places=places, hypernyms=str(wordnet)))
        told = strategy.record()
        assert told["hypernyms"]["crane"] == {
            "hypernym": "wading bird",
            "synset": f"n{offset_of(' crane 0 grus'):08d}",
            "hypernym_synset": f"n{offset_of(' wading_bird 0'):08d}",
            "meaning": "large bird of marshes",
            "other_senses": {
                f"n{offset_of(' Crane 0'):08d}": "a writer of novels (1871-1900)",
                f"n{offset_of(' crane 0 001'):08d}": "lifts heavy objects",
            },
        }
        assert told["ambiguous"] == 2

    def test_of_two_hypernyms_the_first_and_the_other_is_told(
        self, wordnet: Path, offset_of: Callable[[str], int]
    ) -> None:
        quail = WordNet(wordnet).by_name("quail")
        assert quail is not None
        assert quail.hypernym == "game bird"
        assert quail.choices["other_hypernyms"] == {f"n{offset_of(' bird 0'):08d}": "bird"}
        assert "other_senses" not in quail.choices

    @pytest.mark.parametrize(
        ("name", "hypernym"),
        [("finches", "bird"), ("Wading  Bird", "bird"), ("Poe", "writer"), ("entity", None), ("bicycle", None)],
    )
    def test_plurals_spaces_persons_and_the_root(self, name: str, hypernym: str | None, wordnet: Path) -> None:
        found = WordNet(wordnet).by_name(name)
        assert (found and found.hypernym) == hypernym

    def test_ids_of_the_task_decide(
        self, birds: Task, source_of: SourceOf, places: str, wordnet: Path, offset_of: Callable[[str], int]
    ) -> None:
        wnids = tuple(f"n{offset_of(words):08d}" for words in (" crane 0 001", " quail 0"))
        (wordnet / "index.noun").unlink()  # ids need no index
        source = source_of(
            task=dataclasses.replace(birds, wnids=wnids), strategy="places", places=places, hypernyms=str(wordnet)
        )
        told = load_strategy(source).record()["hypernyms"]
        assert [told[name]["hypernym"] for name in birds.class_names] == ["machine", "game bird"]

    def test_an_id_of_another_wordnet(self, wordnet: Path, offset_of: Callable[[str], int]) -> None:
        with pytest.raises(
            IntegrityError, match=r"no synset begins at byte \d+ \(n\d{8}\); is it the file of WordNet 3\.0, whole\?"
        ):
            WordNet(wordnet).by_wnid(f"n{offset_of(' quail 0') + 1:08d}")

    def test_a_line_that_is_cut(self, wordnet: Path, offset_of: Callable[[str], int]) -> None:
        data, start = (wordnet / "data.noun").read_bytes(), offset_of(" quail 0")
        (wordnet / "data.noun").write_bytes(data[: start + 40])
        with pytest.raises(IntegrityError, match=r"no synset begins at byte"):
            WordNet(wordnet).by_wnid(f"n{start:08d}")

    def test_a_folder_without_nouns(self, tmp_path: Path, birds: Task, source_of: SourceOf, places: str) -> None:
        with pytest.raises(UsageError, match=r"no data\.noun in it; give the folder of WordNet 3\.0"):
            load_strategy(source_of(task=birds, strategy="places", places=places, hypernyms=str(tmp_path)))

    def test_names_need_the_index(self, wordnet: Path) -> None:
        (wordnet / "index.noun").unlink()
        with pytest.raises(UsageError, match=r"index\.noun: missing; .* Put wnids\.txt beside classnames\.txt"):
            WordNet(wordnet).by_name("crane")

    def test_an_index_that_is_none(self, wordnet: Path) -> None:
        (wordnet / "index.noun").write_text("crane,bird\n")
        with pytest.raises(IntegrityError, match=r"'crane,bird' is no line of WordNet's index of nouns"):
            WordNet(wordnet).by_name("crane")
