"""Fine-tuning CLIP's image tower and a head that starts from class names, and what is measured on the result.

Reads images in memory and gives a `TrialOutcome`; `write_trial` makes a trial folder of it (what that
holds: `finetune/trial.py`). Nothing here knows which source the training images came from.
"""

from retrieve_or_generate.finetune.data import LabelledImages, TaskImages, task_images
from retrieve_or_generate.finetune.measured import Measured, metrics_of
from retrieve_or_generate.finetune.train import finetune
from retrieve_or_generate.finetune.trial import Trial, TrialOutcome, read_trial, write_trial

__all__ = [
    "LabelledImages",
    "Measured",
    "TaskImages",
    "Trial",
    "TrialOutcome",
    "finetune",
    "metrics_of",
    "read_trial",
    "task_images",
    "write_trial",
]
