"""One generator for all tests of synthesis, and a small retrieved set to match."""

from __future__ import annotations

from pathlib import Path

import pytest

from retrieve_or_generate.image_set import ImageSet, ImageSetWriter
from retrieve_or_generate.models import Clip, load_clip
from retrieve_or_generate.pocket.pictures import evaluation_split
from retrieve_or_generate.settings import CurateSettings, SynthesizeSettings
from retrieve_or_generate.synthesize import Generator, load_generator
from retrieve_or_generate.tasks import Task, load_task

QUICK = SynthesizeSettings(num_inference_steps=4, batch_size=16)
HALF = CurateSettings(keep_fraction=0.5, decontaminate=False)


@pytest.fixture(scope="session")
def generator() -> Generator:
    return load_generator("pocket")


@pytest.fixture(scope="session")
def clip() -> Clip:
    return load_clip("pocket")


@pytest.fixture(scope="session")
def task() -> Task:
    return load_task("textures")


@pytest.fixture(scope="session")
def retrieved(task: Task, clip: Clip, tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Four candidates a class, of which two are kept (three and two for the first class)."""
    from retrieve_or_generate.curate.curation import curate

    folder: Path = tmp_path_factory.mktemp("sets") / "retrieved"
    left = [5] + [4] * (len(task.class_names) - 1)
    names = {"task": task.name, "source": "retrieved", "class_names": task.class_names}
    with ImageSetWriter(folder, key="k", config={}, **names) as writer:  # type: ignore[arg-type]
        for i, picture in enumerate(evaluation_split("textures", "train")):
            if left[picture.label]:
                left[picture.label] -= 1
                writer.add(key=f"{i:06d}", label=picture.label, caption="", origin={}, query="", image=picture.jpeg)
        writer.finish()
    return curate(folder, task=task, clip=clip, settings=HALF)
