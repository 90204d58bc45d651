"""What curation found of what was planted in the pocket pool: `python -m retrieve_or_generate.pocket.planted runs/pocket`.

Reads the retrieved sets of a run and the pool's record of the truth. Prints, for each task: evaluation copies planted, those
among the set's candidates, removed, and still in the set; other pictures removed as copies; and how many of those kept are of
their class.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

from retrieve_or_generate.image_set import ImageSet, load_image_set
from retrieve_or_generate.pocket.pictures import TASKS
from retrieve_or_generate.pocket.world import planted


def compare_with_planted(image_set: ImageSet, truth: pd.DataFrame) -> dict[str, int | float]:
    """Counts for one retrieved set; `truth` is `planted()`, one row for each row of the pool."""
    rows = image_set.manifest.assign(row=[json.loads(origin)["row"] for origin in image_set.manifest["origin"]])
    found = rows.merge(truth, on="row", suffixes=("", "_true"))
    copy = (found["kind"] == "evaluation_copy") & (found["task"] == image_set.task)
    contaminated, kept = found["reason"] == "contaminated", found["status"] == "kept"
    fetched = ~found["reason"].isin(["nsfw", "dead_link"])
    of_task = truth[(truth["kind"] == "evaluation_copy") & (truth["task"] == image_set.task)]
    of_class = (found["class_name"] == found["class_name_true"]) & (found["task"] == image_set.task)
    return {
        "planted": len(of_task),
        "among_candidates": int((copy & fetched).sum()),
        "removed": int((copy & contaminated).sum()),
        "removed_identical": int((copy & contaminated & found["identical"].fillna(False).astype(bool)).sum()),
        "left_in_the_set": int((copy & kept).sum()),
        "falsely_removed": int((~copy & contaminated).sum()),
        "kept": int(kept.sum()),
        "kept_of_their_class": round(float(of_class[kept].mean()), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished pocket run")
    arguments = parser.parse_args()
    truth = planted().to_pandas()
    for task in TASKS:
        image_set = load_image_set(arguments.run / "sets" / task / "retrieved", task)
        print(task, json.dumps(compare_with_planted(image_set, truth)))


if __name__ == "__main__":
    main()
