"""What retrieval from LAION-2B costs, stage by stage, worked out from rates that were measured on a small machine.

    python experiments/scale.py                                            # one box of 64 cores
    python experiments/scale.py --boxes 10 --cores 64 --disk 3 --dollars-per-core-hour 0.05

Prints the tables of docs/scale.md. A stage takes the longer of its arithmetic, spread over all cores, and its reading, spread over
the boxes' disks (or, for a download, their network). Rates are per core; docs/scale.md says where each comes from. Memory is per
process. Nothing here was run at this size.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

ROWS = 2.13e9  # image embeddings that LAION published for laion2B-en
EMBEDDINGS = ROWS * 768 * 2  # bytes, float16
CAPTIONS = ROWS * 60  # bytes of text

VERIFY_BYTES = 336e6  # per core-second: rog verify on hard-linked shards of 400 rows, loaded machine
SCAN_PAIRS = 1e6 * 1000 / 12.2  # rows × queries per core-second: experiments/benchmarks/scan.py
MATCH_CAPTIONS = 2.7e6  # per core-second, from parquet, hyperscan, 998 names
FETCH_IMAGES = 300  # per core-second: fetched from loopback, checked and decoded, JPEGs of 67 kB
EMBED_IMAGES = 8.1  # per core-second: ViT-B/32 on a CPU, experiments/benchmarks/embed.py
CURATE_IMAGES = 100_000 / 8.4  # per core-second: duplicates and decontamination against 20,000 images, thumbnails
IMAGE_BYTES = 67e3


@dataclass(frozen=True)
class Stage:
    """`core_seconds` of arithmetic over `read_bytes` of input; `memory` in bytes, where it was measured or follows."""

    name: str
    core_seconds: float
    read_bytes: float = 0.0
    memory: float = 0.0
    over_network: bool = False

    def hours(self, given: argparse.Namespace) -> float:
        rate = given.network / 8 if self.over_network else given.disk
        return max(self.core_seconds / given.cores, self.read_bytes / (rate * 1e9)) / given.boxes / 3600

    def row(self, given: argparse.Namespace) -> str:
        hours = self.hours(given)
        dollars = hours * given.cores * given.boxes * given.dollars_per_core_hour
        wall = f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
        read = f"{self.read_bytes / 1e9:,.0f} GB" if self.read_bytes else "–"
        memory = f"{self.memory / 2**30:.1f} GiB" if self.memory else "–"
        return f"| {self.name} | {self.core_seconds / 3600:,.1f} | {read} | {memory} | {wall} | {dollars:,.2f} |"


def scan(name: str, classes: int, templates: int, k: int) -> Stage:
    """Memory: 1.1 GiB measured with a thousand queries and k of a thousand, and 24 bytes for each further answer."""
    queries = classes * templates
    answers = max(0, queries * k - 10**6)
    return Stage(
        f"scan for {name}: {queries:,} queries",
        ROWS * queries / SCAN_PAIRS,
        EMBEDDINGS,
        1.12 * 2**30 + 24 * answers,
    )


def stages(images: float) -> list[Stage]:
    """`images` are the candidates that are fetched."""
    return [
        Stage("verify every row of the pool", EMBEDDINGS / VERIFY_BYTES, EMBEDDINGS),
        scan("Flowers", 102, 1, k=2000),
        scan("DTD", 47, 8, k=2000),
        scan("Cars", 196, 8, k=2000),
        scan("ImageNet", 1000, 80, k=500),
        Stage("match captions, all names at once", ROWS / MATCH_CAPTIONS, CAPTIONS),
        Stage(
            f"download {images:,.0f} images",
            images / FETCH_IMAGES,
            images * IMAGE_BYTES,
            0.17 * 2**30,
            over_network=True,
        ),
        Stage("their CLIP features (ViT-B/32, no GPU)", images / EMBED_IMAGES, images * IMAGE_BYTES),
        Stage("their duplicates and evaluation copies", images / CURATE_IMAGES),
    ]


def table(given: argparse.Namespace) -> str:
    head = ["| stage | core-hours | read | memory | wall | $ |", "|---|---|---|---|---|---|"]
    return "\n".join([*head, *(stage.row(given) for stage in stages(given.images))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boxes", type=int, default=1)
    parser.add_argument("--cores", type=int, default=64, help="of each box")
    parser.add_argument("--disk", type=float, default=3.0, help="GB that each box reads in a second")
    parser.add_argument("--network", type=float, default=1.0, help="Gbit that each box receives in a second")
    parser.add_argument("--images", type=float, default=1e6, help="candidates that are fetched")
    parser.add_argument("--dollars-per-core-hour", type=float, default=0.05)
    print(table(parser.parse_args()))


if __name__ == "__main__":
    main()
