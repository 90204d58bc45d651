"""The one typed experiment file: YAML in, frozen models out. Unknown keys are refused with the nearest name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.settings import (
    CurateSettings,
    FinetuneSettings,
    PerturbSettings,
    ProbeSettings,
    RetrieveSettings,
    Settings,
    SynthesizeSettings,
)

Source = Literal["none", "retrieved", "synthetic", "perturbed"]


class Experiment(Settings):
    """One whole comparison."""

    name: str = Field("pocket", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    pool: str = Field("pocket", description="the pocket pool, or a folder in LAION's layout")
    model: str = Field(
        "pocket", description="CLIP to search, filter and fine-tune with: pocket, a folder, or ARCH/tag of open_clip"
    )
    generator: str = Field(
        "pocket", description="the pocket Stable Diffusion, or a folder or Hub id of a diffusers pipeline"
    )
    tasks: tuple[str, ...] = Field(("digits", "textures", "aircraft"), min_length=1)
    sources: tuple[Source, ...] = Field(("none", "retrieved", "synthetic", "perturbed"), min_length=1)
    scales: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (40, 80, 160), min_length=1, description="images per training set"
    )
    seeds: int = Field(3, ge=1, le=1000, description="trials per cell of the grid")
    retrieve: RetrieveSettings = RetrieveSettings()
    synthesize: SynthesizeSettings = SynthesizeSettings()
    perturb: PerturbSettings = PerturbSettings()
    curate: CurateSettings = CurateSettings()
    finetune: FinetuneSettings = FinetuneSettings()
    linear_probe: ProbeSettings = ProbeSettings()

    @model_validator(mode="after")
    def _no_repeats(self) -> Experiment:
        for name in ("tasks", "sources", "scales"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} lists one value twice: {list(values)}")
        return self


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Keys allowed where an unknown one was found."""
    model: Any = Experiment
    for part in location:
        field = model.model_fields.get(str(part)) if isinstance(model, type) and issubclass(model, BaseModel) else None
        if field is None:
            return []
        model = field.annotation
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


_PLAINLY = {  # what pydantic says in words of Python
    "tuple_type": "input should be a list, such as [a, b]",
    "too_short": "input should be a list with at least one value",
    "model_type": "input should be a mapping of keys to values",
}


def _explain(error: ValidationError, where: str) -> UsageError:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"] if "[" not in str(part)) or "experiment"  # which of several types
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return UsageError(f"{where}: unknown key {key!r}{hint} (known: {', '.join(known)})")
    given = first.get("input")
    whole = isinstance(given, dict | list | BaseModel) and first["type"] == "value_error"  # the message says what of it
    shown = "" if whole or first["type"] == "missing" else f", not {str(given)[:60]!r}"
    message = _PLAINLY.get(first["type"], first["msg"].removeprefix("Value error, "))
    return UsageError(f"{where}: {key}: {message[0].lower() + message[1:]}{shown}")


def _set(values: dict[str, Any], assignment: str) -> None:
    key, found, text = assignment.partition("=")
    if not found or not key:
        raise UsageError(f"--set {assignment!r}: write KEY=VALUE, for instance --set finetune.updates=100")
    *parents, last = key.strip().split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise UsageError(f"--set {assignment!r}: {parent!r} holds a value, not keys")
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--set {assignment!r}: {text!r} is not a YAML value") from error


def parse_experiment(values: dict[str, Any], where: str = "experiment") -> Experiment:
    """A validated `Experiment` from plain values; `UsageError` names the key, the problem and what is allowed."""
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        raise _explain(error, where) from None


def _in_a_line(error: Exception) -> str:
    """What is wrong and, of YAML, in which line."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: {problem}" if problem and mark else str(error).splitlines()[0]


def load_experiment(path: Path | None = None, overrides: tuple[str, ...] = (), **fields: Any) -> Experiment:
    """The experiment in `path` (the pocket one if None), with `a.b=c` overrides and then `fields` that are not None on top."""
    values: Any = {}
    if path is not None:
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UsageError(f"{path}: no such experiment file") from error
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UsageError(f"{path}: not readable as YAML ({_in_a_line(error)})") from error
        if not isinstance(values, dict):
            raise UsageError(f"{path}: an experiment file is a mapping of keys to values")
    for assignment in overrides:
        _set(values, assignment)
    values.update({name: value for name, value in fields.items() if value is not None})
    return parse_experiment(values, str(path) if path else "experiment")


def dump_experiment(experiment: Experiment) -> str:
    """The resolved experiment as YAML that `load_experiment` reads back to an equal one."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
