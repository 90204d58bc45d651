"""Where this version of the pocket world lies. Loads nothing, so that a finished run can be recognised in a moment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from retrieve_or_generate.store import cache_folder, content_key, read_json
from retrieve_or_generate.weights import POCKET_WEIGHTS

SEED_STUDY = "pocket-world-2"
POOL = "pool"
POOL_SEAL, TASK_SEAL = "pool.json", "task.json"
FORMAT = 1  # raise when what is written below `world_folder` changes


def world_folder() -> Path:
    """The folder of this version of the pocket world: other pictures or other weights have another."""
    weights = read_json(POCKET_WEIGHTS / "checksums.json")["clip/open_clip_model.safetensors"]["sha256"]
    return cache_folder() / f"pocket-{content_key([SEED_STUDY, FORMAT, weights])}"


def pool_place() -> Path:
    return world_folder() / "pool"


def task_place(name: str) -> Path:
    return world_folder() / "tasks" / name


def is_pool_there() -> bool:
    return (pool_place() / POOL_SEAL).is_file()


def is_task_there(name: str) -> bool:
    return (task_place(name) / TASK_SEAL).is_file()


def world_builder() -> Callable[[str], None]:
    """A function that builds `POOL` or a task by name. It loads torch; a finished world does not need it."""
    from retrieve_or_generate.pocket.world import build_pool, build_task

    return lambda name: build_pool() if name == POOL else build_task(name)
