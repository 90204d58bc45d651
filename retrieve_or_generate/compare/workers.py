"""How many workers memory bears: what one takes for its trials is estimated before anything is run.

A worker loads the model and says what it holds then; the images and what training adds are worked out. Images that are mapped
(`finetune/decoded.py`) are shared and may leave memory at any time, so they do not count.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, get_args

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.executors import Unit, core_count, run_units
from retrieve_or_generate.experiment import Experiment
from retrieve_or_generate.memory import available_bytes, own_bytes, said
from retrieve_or_generate.tasks import Task
from retrieve_or_generate.tasks.base import SplitName

if TYPE_CHECKING:
    from retrieve_or_generate.models import ImageModel

_COPIES = (
    9  # of the weights: trained, gradient, two moments, start, what is looked at, best for each use, and between them
)
_KEPT_FEATURES = 6  # of the task's images: as found, on the device, and those of the looks that are kept
_FEATURE_BYTES, _PIXEL_BYTES = 4, 4
_MARGIN = 1.25  # what allocators leave unused
_FIRST_USED = 64 * 2**20  # what libraries load, and keep, when they are first used


def fitting_jobs(experiment: Experiment, tasks: Mapping[str, Task], device: str, jobs: int | None) -> int:
    """`jobs` workers, by default one a core, or as many as fit where nobody asked for a number.

    Raises:
        UsageError: so many were asked for, and memory is too small for them.
    """
    wanted = jobs or core_count()
    at_once = min(wanted, _cells(experiment))
    if at_once == 1:
        return wanted
    needed, free = worker_bytes(experiment, tasks, device), available_bytes()
    fit = free // needed
    if fit >= at_once:
        return wanted
    told = f"a worker takes about {said(needed)} and {said(free)} of memory are free"
    if not fit:
        raise UsageError(f"{told}; choose a smaller finetune.batch_size or model, or try --jobs 1")
    if jobs:
        raise UsageError(f"--jobs {jobs}: {told}; --jobs {fit} fits")
    print(f"rog: {told}: {fit} at a time instead of {wanted}", file=sys.stderr)
    return int(fit)


def _cells(experiment: Experiment) -> int:
    """Trials of the grid: never are more workers at work on them."""
    trained = sum(source != "none" for source in experiment.sources)
    shelf = "none" in experiment.sources
    return len(experiment.tasks) * (shelf + trained * len(experiment.scales) * experiment.seeds)


def worker_bytes(experiment: Experiment, tasks: Mapping[str, Task], device: str) -> int:
    """What a worker takes for the largest trial on `device` in this machine's memory, about."""
    images = {
        name: [len(task.split(split)) for split in get_args(SplitName)]
        + [len(task.shift(shift)) for shift in task.shifts]
        for name, task in tasks.items()
    }
    classes = max(len(task.class_names) for task in tasks.values())
    unit = Unit("what a worker takes", (images, classes))
    ((_, needed),) = run_units([unit], partial(_prepare, experiment, device), jobs=2, apart=True)
    return needed


def _prepare(experiment: Experiment, device: str) -> Callable[[tuple[dict[str, list[int]], int]], int]:
    return partial(_needed, experiment, device)


def _needed(experiment: Experiment, device: str, sizes: tuple[dict[str, list[int]], int]) -> int:
    """In a worker: all of it."""
    import torch

    from retrieve_or_generate.models import load_model

    torch.set_num_threads(1)
    how, (images, classes) = experiment.finetune, sizes
    model = load_model(experiment.finetuned_model)
    held = own_bytes()
    shown, kept = model.image_size, how.working_size or model.image_size
    sets = [_decoded_bytes(max(experiment.scales), kept)] * len(experiment.set_sources) * len(images)
    splits = [_decoded_bytes(count, shown) for counts in images.values() for count in counts]
    # cut out of its set, a trial has its images once more
    needed = held + sum(sets) + sum(splits) + max(sets, default=0)
    features = max(sum(counts) for counts in images.values()) * (model.embed_dim + classes)
    needed += _KEPT_FEATURES * _FEATURE_BYTES * features
    if device == "cpu":
        trained = model if how.loss == "contrastive" else model.tower
        needed += _COPIES * sum(one.numel() * one.element_size() for one in trained.parameters())
        batch = min(how.batch_size, max(experiment.scales))
        needed += batch * (activation_bytes(model) + 3 * _PIXEL_BYTES * 3 * kept**2)
    return int(_MARGIN * needed) + _FIRST_USED


def _decoded_bytes(count: int, side: int) -> int:
    """Of images in memory; none of those that are mapped."""
    from retrieve_or_generate.finetune.decoded import KEPT_FROM_BYTES

    size = count * 3 * side**2
    return size if size < KEPT_FROM_BYTES else 0


def activation_bytes(model: ImageModel) -> int:
    """What one image leaves in memory on its way through the tower, for the way back."""
    import torch

    from retrieve_or_generate.models import plain_attention

    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    pixels = torch.zeros(2, 3, model.image_size, model.image_size)  # some networks make of one image a case of its own
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, torch.enable_grad(), plain_attention(model.device):
        output = model.tower(model.normalise(pixels))
    del output
    return sum(size for place, size in kept.items() if place not in own) // len(pixels)
