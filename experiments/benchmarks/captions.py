"""A task's class names in captions: `match_captions` against `any(name in caption)` in Python and polars' `find_many`.

    python experiments/benchmarks/captions.py                      # a million captions, ImageNet's 998 names: minutes
    python experiments/benchmarks/captions.py --captions 20000     # seconds

Captions are made by seed: five to twelve words of a vocabulary of 20,000 with the frequencies of English, every seventh with one of
the names in it, one in twenty with a letter or sign beyond ASCII. Five repeats, arms alternating; seconds are of CPU, one thread.
The naive arm looks for every name in every lower-cased caption. It searches `--naive` captions, and its time is multiplied up to
all: its cost per caption is the same everywhere (`--naive 0` searches all of them, over a minute a repeat). All arms start from the
same Arrow array. Ours and polars (`extract_many`) end with row and label of every pair in order, `find_many` with places only, the
naive arm with captions only. One JSON object comes last: `ratio` is the naive median over ours with the fastest engine installed,
`ratios` has the others, and `outputs_equal` says that all gave the same pairs (the naive ones are made outside its time), and that
`find_many` counted as many places or more.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

os.environ.setdefault("POLARS_MAX_THREADS", "1")

import numpy as np
import polars as pl
import pyarrow as pa
from open_clip import IMAGENET_CLASSNAMES

from retrieve_or_generate.retrieve.captions import match_captions

Pairs = np.ndarray  # (n, 2) int64, ordered: row, label

_SYLLABLES = (
    *("ba", "ka", "lo", "mi", "ter", "en", "sha", "do", "ri", "va"),
    *("pu", "sing", "ton", "el", "ar", "co", "ne", "ti", "ous", "ment"),
)
_COMMON = (
    *("the", "of", "a", "and", "in", "with", "for", "photo", "new", "black"),
    *("white", "sale", "vintage", "image", "free", "by", "on", "to", "art", "home"),
)
_BEYOND_ASCII = ("®", "–", "café", "“quoted”", "naïve", "鳥")


def corpus(captions: int, names: list[str], seed: int = 2406) -> pa.Array:
    rng = np.random.default_rng(seed)
    syllables = np.array(_SYLLABLES)
    made = ["".join(rng.choice(syllables, length)) for length in rng.integers(1, 5, 20_000)]
    words = np.array([*_COMMON, *made])
    often = 1 / np.arange(2.7, len(words) + 2.7)  # Zipf–Mandelbrot
    lengths = rng.integers(5, 13, captions)
    text = words[rng.choice(len(words), lengths.sum(), p=often / often.sum())]
    named, odd = rng.random(captions) < 1 / 7, rng.random(captions) < 1 / 20
    out, first = [], 0
    for caption in range(captions):
        said = text[first : first + lengths[caption]].tolist()
        first += lengths[caption]
        if named[caption]:
            said.insert(2, names[rng.integers(len(names))])
        if odd[caption]:
            said.insert(1, _BEYOND_ASCII[rng.integers(len(_BEYOND_ASCII))])
        out.append(" ".join(said).capitalize())
    return pa.array(out)


def ours(captions: pa.Array, names: list[str], engine: Any) -> Pairs:
    found = match_captions(captions, {label: [name] for label, name in enumerate(names)}, "substring", engine)
    return np.stack([found["row"].to_numpy(), found["label"].to_numpy()], axis=1)


def find_many(captions: pa.Array, names: list[str]) -> int:
    """What the issue names: it tells where names begin, not which they are, so no pairs come of it."""
    found = pl.Series(captions).str.find_many(names, ascii_case_insensitive=True, overlapping=True)
    return int(found.list.len().sum())


def with_polars(captions: pa.Array, names: list[str]) -> Pairs:
    """`extract_many` is the same search as `find_many` and tells the names that were found; the rest makes pairs of them."""
    labels = pl.DataFrame({"name": names, "label": np.arange(len(names))})
    found = (
        pl.DataFrame({"caption": pl.Series(captions)})
        .with_row_index("row")
        .select("row", name=pl.col("caption").str.extract_many(names, ascii_case_insensitive=True, overlapping=True))
        .filter(pl.col("name").list.len() > 0)
        .explode("name")
        .with_columns(pl.col("name").str.to_lowercase())
        .join(labels, on="name")
        .select("row", "label")
        .unique()
        .sort("row", "label")
    )
    return found.to_numpy().astype(np.int64)


def naive(captions: pa.Array, names: list[str]) -> list[bool]:
    """What one writes first. It tells which captions name a class, not which class."""
    return [any(name in lower for name in names) for lower in map(str.lower, captions.to_pylist())]


def naive_pairs(captions: pa.Array, names: list[str]) -> Pairs:
    lower = [caption.lower() for caption in captions.to_pylist()]
    pairs = [(row, label) for row, caption in enumerate(lower) for label, name in enumerate(names) if name in caption]
    return np.array(pairs, np.int64).reshape(-1, 2)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=1_000_000)
    parser.add_argument("--names", type=int, default=998)
    parser.add_argument("--naive", type=int, default=20_000, help="captions that the naive arm searches; 0 is all")
    parser.add_argument("--repeats", type=int, default=5)
    print(json.dumps(compare(parser.parse_args())))


def compare(given: argparse.Namespace) -> dict[str, Any]:
    names = sorted({name.lower() for name in IMAGENET_CLASSNAMES})[: given.names]
    captions = corpus(given.captions, names)
    sample = min(given.naive or given.captions, given.captions)
    engines = ["aho_corasick", *(["hyperscan"] if importlib.util.find_spec("hyperscan") else [])]
    arms: dict[str, Callable[[], Any]] = {
        **{engine: (lambda engine=engine: ours(captions, names, engine)) for engine in engines},  # type: ignore[misc]
        "find_many": lambda: find_many(captions, names),
        "polars_pairs": lambda: with_polars(captions, names),
        "naive": lambda: naive(captions.slice(0, sample), names),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    found: dict[str, Any] = {}
    for repeat in range(given.repeats):
        for name, work in arms.items():
            spent, found[name] = timed(work)
            seconds[name].append(spent * (given.captions / sample if name == "naive" else 1))
            print(f"{repeat + 1}/{given.repeats} {name}: {seconds[name][-1]:.3f} s", flush=True)
    mine = engines[-1]
    reference = found[mine]
    medians = {name: median(spent) for name, spent in seconds.items()}
    ratios = [theirs / own for own, theirs in zip(seconds[mine], seconds["naive"], strict=True)]
    text_bytes = captions.buffers()[2].size
    return {
        "name": "captions",
        "ratio": medians["naive"] / medians[mine],
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "outputs_equal": found["find_many"] >= len(reference)
        and np.array_equal(naive_pairs(captions.slice(0, sample), names), reference[reference[:, 0] < sample])
        and np.array_equal(np.flatnonzero(found["naive"]), np.unique(reference[reference[:, 0] < sample, 0]))
        and all(np.array_equal(found[name], reference) for name in (*engines, "polars_pairs")),
        "ratios": {
            f"{theirs}_over_{own}": medians[theirs] / medians[own]
            for theirs in ("naive", "find_many", "polars_pairs")
            for own in engines
        },
        "engine": mine,
        "seconds": medians,
        "captions_per_second": given.captions / medians[mine],
        "megabytes_per_second": text_bytes / 1e6 / medians[mine],
        "pairs": len(reference),
        "naive_captions": sample,
        "size": {name: getattr(given, name) for name in ("captions", "names", "repeats")},
    }


if __name__ == "__main__":
    main()
