"""The words of the pocket world: its classes, and captions as careless as the web's.

A picture of a class is captioned with the class name, only with a synonym (semantic search finds it, substring search does
not), with nothing to the point, or with another class's name. Other pictures carry class names in another sense ("striped
bass") or inside another word ("seventeen"), which substring search takes for hits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from retrieve_or_generate.pocket.drawing import COLOURS, ENGINES, TEXTURES, THINGS, WINGS


@dataclass(frozen=True)
class Vocabulary:
    """How one task's classes are spoken of. `{}` stands for a name or a synonym, `{fg}` and `{bg}` for colours."""

    class_names: tuple[str, ...]
    hypernym: str
    synonyms: dict[str, tuple[str, ...]]
    templates: tuple[str, ...]
    web: tuple[str, ...]
    other_sense: tuple[str, ...]
    inside_word: tuple[str, ...]


_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_WING_WORDS = {"merlin": "straight wing", "falcon": "swept wing", "vulcan": "delta wing"}
_ENGINE_WORDS = {
    1: ("single engine", "one prop"),
    2: ("twin engine", "two prop"),
    3: ("trijet", "three engine"),
    4: ("four engine", "quad engine"),
}

DIGITS = Vocabulary(
    class_names=_DIGITS,
    hypernym="digit",
    synonyms={name: (str(value),) for value, name in enumerate(_DIGITS)},
    templates=("a handwritten {}.", "the digit {}.", "the number {} written by hand."),
    web=(
        "handwritten digit {}",
        "the number {} in {fg} ink",
        "the digit {} on {bg} paper",
        "{} written by hand",
        "postal code scan, digit {}",
        "kids learn to write the number {}",
        "handwritten {}, {fg} on {bg}",
    ),
    other_sense=("{} day holiday deal", "top {} photo of the week", "{} reasons to visit", "set of {} prints"),
    inside_word=(
        "stone wall",
        "phone case",
        "network map",
        "seventeen magazine",
        "sixteen candles",
        "weight loss tips",
        "canine care",
        "fourteen days",
        "subzero weather",
        "threefold paper",
        "eighteen holes",
        "height chart",
    ),
)

TEXTURE_WORDS = Vocabulary(
    class_names=tuple(TEXTURES),
    hypernym="pattern",
    synonyms={
        "striped": ("banded", "lined"),
        "dotted": ("polka dot", "spotted"),
        "chequered": ("checkerboard", "gingham"),
        "zigzagged": ("chevron", "herringbone"),
        "gridded": ("lattice", "mesh"),
        "wavy": ("rippled", "undulating"),
        "spiralled": ("swirly", "whirlpool"),
        "blotchy": ("camouflage", "mottled"),
    },
    templates=("a {} texture.", "a photo of a {} pattern.", "{} fabric."),
    web=(
        "{} pattern",
        "seamless {} texture",
        "{} fabric in {fg} and {bg}",
        "{fg} {} wallpaper",
        "{} tile, {fg} on {bg}",
        "a {} background",
        "vintage {} paper in {bg}",
    ),
    other_sense=("{} bass recipe", "a {} history", "{} hair tips", "his {} career", "the {} line"),
    inside_word=("pinstriped suit", "polkadotted dress", "unchequered past", "wavyleaf plant"),
)

AIRCRAFT = Vocabulary(
    class_names=tuple(f"{maker} {engines}" for maker in WINGS for engines in ENGINES),
    hypernym="plane",
    synonyms={
        f"{maker} {engines}": tuple(f"{_WING_WORDS[maker]} {word}" for word in _ENGINE_WORDS[engines])
        for maker in WINGS
        for engines in ENGINES
    },
    templates=("a photo of a {}.", "a {} aircraft in flight.", "a {}, a type of plane."),
    web=(
        "{} aircraft",
        "{} plane over {bg} sky",
        "a {fg} {} in flight",
        "{} plane spotting",
        "photo of a {} aircraft",
        "{} airliner from above",
        "{fg} {} plane",
    ),
    other_sense=(
        "falcon bird of prey",
        "merlin the wizard",
        "vulcan god of fire",
        "falcon heavy launch",
        "merlin and the 2 knights",
    ),
    inside_word=("falcon 20 home jersey", "merlin 30 camera", "vulcan 400 stove", "falcon 11 bike", "vulcan 26 boots"),
)

VOCABULARIES = {"digits": DIGITS, "textures": TEXTURE_WORDS, "aircraft": AIRCRAFT}
HYPERNYMS = {name: words.hypernym for words in VOCABULARIES.values() for name in words.class_names}
PLACES = tuple(
    f"{colour} {ground}" for ground in ("paper", "background", "sky") for colour in COLOURS if colour != ground
)
"""Where a thing can be in a world of two colours a picture, in words of its captions."""

_THING_WEB = (
    "a {fg} {}",
    "{} on {bg} background",
    "buy {} online",
    "{fg} {} clip art",
    "photo of a {}",
    "cute {} drawing",
    "{} icon",
)
_GENERIC = (
    "stock photo",
    "free download",
    "photo of the day",
    "image not described",
    "new arrival",
    "click to enlarge",
)


def _fill(template: str, word: str, colours: tuple[str, str]) -> str:
    return template.replace("{fg}", colours[0]).replace("{bg}", colours[1]).replace("{}", word)


def caption_of_class(task: str, class_name: str, rng: np.random.Generator, colours: tuple[str, str]) -> tuple[str, str]:
    """A caption for a picture of a class, and its kind: name, synonym, generic or wrong_name."""
    words = VOCABULARIES[task]
    kind = str(rng.choice(("name", "synonym", "generic", "wrong_name"), p=(0.66, 0.24, 0.06, 0.04)))
    template = str(rng.choice(words.web))
    if kind == "generic":
        return str(rng.choice(_GENERIC)), kind
    if kind == "synonym":
        return _fill(template, str(rng.choice(words.synonyms[class_name])), colours), kind
    if kind == "wrong_name":
        class_name = str(rng.choice([name for name in words.class_names if name != class_name]))
    return _fill(template, class_name, colours), kind


def caption_of_thing(thing: str, rng: np.random.Generator, colours: tuple[str, str]) -> tuple[str, str]:
    """A caption for a picture of no class, and its kind: thing, other_sense, inside_word or generic."""
    kind = str(rng.choice(("thing", "other_sense", "inside_word", "generic"), p=(0.78, 0.09, 0.08, 0.05)))
    if kind == "thing":
        return _fill(str(rng.choice(_THING_WEB)), thing, colours), kind
    if kind == "generic":
        return str(rng.choice(_GENERIC)), kind
    words = VOCABULARIES[str(rng.choice(tuple(VOCABULARIES)))]
    if kind == "inside_word":
        return f"{rng.choice(words.inside_word)}, {thing}", kind
    return f"{_fill(str(rng.choice(words.other_sense)), str(rng.choice(words.class_names)), colours)}, {thing}", kind


def thing_names() -> tuple[str, ...]:
    return tuple(THINGS)
