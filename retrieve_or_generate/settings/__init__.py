"""The parts of an experiment, a frozen model for each stage: every field with its meaning, unit and bounds.

A stage takes the part that is its own (`RetrieveSettings`, `CurateSettings`, …), never the whole. What identifies a result goes
into its content key through `model_dump`; machines, paths and progress never stand here.
"""

from __future__ import annotations

from retrieve_or_generate.settings.base import Fraction, Settings, Strength
from retrieve_or_generate.settings.curate import CurateSettings
from retrieve_or_generate.settings.finetune import AdversarialSettings, FinetuneSettings, MixSettings, ProbeSettings
from retrieve_or_generate.settings.retrieve import DownloadSettings, RetrieveSettings, RowSettings, ServiceSettings
from retrieve_or_generate.settings.synthesize import (
    PAPER_GENERATOR,
    PerturbSettings,
    PromptSettings,
    SelectionSettings,
    SynthesizeSettings,
)

__all__ = [
    "PAPER_GENERATOR",
    "AdversarialSettings",
    "CurateSettings",
    "DownloadSettings",
    "FinetuneSettings",
    "Fraction",
    "MixSettings",
    "PerturbSettings",
    "ProbeSettings",
    "PromptSettings",
    "RetrieveSettings",
    "RowSettings",
    "SelectionSettings",
    "ServiceSettings",
    "Settings",
    "Strength",
    "SynthesizeSettings",
]
