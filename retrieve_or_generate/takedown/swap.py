"""Several files of a folder exchanged at once: after a kill at any point, `settle` leaves all of the old or all of the new ones.

New files are written whole under `.takedown/`. The list of their names, written last, is the moment of change; then each is
renamed into place, and the list goes.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from retrieve_or_generate.store import read_json, sync_folder, write_json

_STAGED, _NAMES = ".takedown", "names.json"


def staging(folder: Path) -> Path:
    """An empty folder for the new files, on the same disk."""
    settle(folder)
    staged = folder / _STAGED
    staged.mkdir()
    return staged


def swap(folder: Path, names: Sequence[str]) -> None:
    """Exchange the files with these names for those in `staging`; they appear in this order."""
    write_json(folder / _STAGED / _NAMES, list(names))
    settle(folder)


def settle(folder: Path) -> None:
    """Finish an exchange that was decided on; forget one that was not."""
    staged = folder / _STAGED
    if not staged.is_dir():
        return
    if (staged / _NAMES).is_file():
        for name in read_json(staged / _NAMES):
            if (staged / name).is_file():
                (staged / name).replace(folder / name)
                sync_folder((folder / name).parent)
        (staged / _NAMES).unlink()
    shutil.rmtree(staged)
