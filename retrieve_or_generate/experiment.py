"""The one typed experiment file: YAML in, frozen models out. Unknown keys are refused with the nearest name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from pydantic import Field, model_validator

from retrieve_or_generate.errors import UsageError, unknown_name
from retrieve_or_generate.settings import (
    PAPER_GENERATOR,
    CurateSettings,
    FinetuneSettings,
    MixSettings,
    PerturbSettings,
    ProbeSettings,
    PromptSettings,
    RetrieveSettings,
    SelectionSettings,
    Settings,
    SynthesizeSettings,
)
from retrieve_or_generate.yaml_files import read_mapping, validated

KINDS = ("none", "retrieved", "synthetic", "perturbed", "mixed")
"""Where training images come from. A source is one of these, or `KIND-NAME`: one more set of a kind that can have several.

`none` and `mixed` have no image set of their own: off the shelf needs no images, a mixture draws from two others' sets.
"""

_VARIED: dict[str, frozenset[str]] = {
    "synthetic": frozenset({"generator", "synthesize"}),
    "perturbed": frozenset({"generator", "synthesize", "perturb"}),
    "mixed": frozenset({"mix"}),
}
"""What one of several sources of a kind may do otherwise. Other kinds have one source alone."""
_SOURCE = re.compile(r"[a-z]+(-[A-Za-z0-9_.]+)?")


def kind_of(source: str) -> str:
    """`synthetic` of `synthetic-llm`."""
    return source.partition("-")[0]


class Variant(Settings):
    """What one more set of a source does otherwise than the experiment says."""

    generator: str | None = Field(None, description="another generator")
    synthesize: dict[str, Any] = Field({}, description="keys of synthesize that differ")
    perturb: dict[str, Any] = Field({}, description="keys of perturb that differ")
    mix: MixSettings | None = Field(None, description="of a mixed source: what is drawn from which two")


class Experiment(Settings):
    """One whole comparison."""

    name: str = Field("pocket", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    pool: str = Field("pocket", description="the pocket pool, or a folder in LAION's layout")
    model: str = Field(
        "pocket", description="CLIP to search, filter and fine-tune with: pocket, a folder, or ARCH/tag of open_clip"
    )
    generator: str = Field(
        "pocket",
        description="the pocket Stable Diffusion, or a folder or Hub id (ORG/NAME, ORG/NAME@REVISION) of a diffusers pipeline",
    )
    tasks: tuple[str, ...] = Field(("digits", "textures", "aircraft"), min_length=1)
    sources: tuple[str, ...] = Field(
        ("none", "retrieved", "synthetic", "perturbed"),
        min_length=1,
        description="none (off the shelf), retrieved, synthetic, perturbed; synthetic-STRATEGY, perturbed-STRENGTH, and variants, "
        "among them mixed-NAME",
    )
    variants: dict[str, Variant] = Field({}, description="by source, such as synthetic-fast: what it does otherwise")
    primary: tuple[str, str] = Field(
        ("retrieved", "synthetic"), description="the two sources whose difference may make a claim, named beforehand"
    )
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

    @model_validator(mode="before")
    @classmethod
    def _generator_of_the_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "generator" in given:
            return given
        settings = given.get("synthesize")
        preset = settings.get("preset") if isinstance(settings, dict) else getattr(settings, "preset", None)
        return given | {"generator": PAPER_GENERATOR} if preset == "paper" else given

    @model_validator(mode="after")
    def _no_repeats(self) -> Experiment:
        for name in ("tasks", "sources", "scales"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} lists one value twice: {list(values)}")
        return self

    @model_validator(mode="after")
    def _sources_are_known(self) -> Experiment:
        for source in self.sources:
            if not _SOURCE.fullmatch(source) or kind_of(source) not in KINDS:
                raise ValueError(f"sources: {unknown_name('source', source, KINDS)}")
        unused = sorted(set(self.variants) - set(self.sources))
        if unused:
            raise ValueError(f"variants: {unused[0]!r} is not among the sources; list it there, too")
        if self.primary[0] == self.primary[1]:
            raise ValueError(f"primary: {self.primary[0]!r} twice; name two sources")
        if self.primary != Experiment.model_fields["primary"].default and not set(self.primary) <= set(self.sources):
            raise ValueError(f"primary: {list(self.primary)} are not both among the sources")
        self._variants_are_meant()
        for source in self.sources:
            self.variant(source)
        return self

    def _variants_are_meant(self) -> None:
        """Nothing that a variant says is passed over."""
        for source, given in self.variants.items():
            kind, _, name = source.partition("-")
            if kind not in _VARIED or not (name or kind == "mixed"):
                called = ", ".join(f"{one}-NAME" for one in _VARIED)
                raise ValueError(f"variants: {source!r} is as the experiment says; variants are called {called}")
            told = {key for key, field in Variant.model_fields.items() if getattr(given, key) != field.default}
            if odd := sorted(told - _VARIED[kind]):
                takes = " and ".join(sorted(_VARIED[kind]))
                raise ValueError(f"variants.{source}: {odd[0]} is nothing to {kind} images; they take {takes}")
            for one in given.mix.of if given.mix else ():
                if one not in self.set_sources:
                    raise ValueError(f"variants.{source}.mix.of: {unknown_name('source', one, self.set_sources)}")

    @property
    def set_sources(self) -> tuple[str, ...]:
        """The sources that have an image set of their own."""
        return tuple(source for source in self.sources if kind_of(source) not in ("none", "mixed"))

    def mix(self, source: str) -> MixSettings | None:
        """What a mixed source is drawn from; None of any other."""
        given = self.variants.get(source)
        return given.mix if given else None

    def check_selection(self) -> None:
        """What is compared: `UsageError` unless every selecting source stands beside random selection of equal size.

        A single set may select without (`rog synthesize` makes one at a time).
        """
        seen = {source: self.variant(source) for source in self.sources if kind_of(source) == "synthetic"}
        drawn = [one.at_random() for one in seen.values() if one.synthesize.selection.rule == "random"]
        for source, one in seen.items():
            if one.synthesize.selection.rule in ("low_density", "hardest") and one.at_random() not in drawn:
                raise UsageError(
                    f"sources: {source} selects, so random selection of equal size stands beside it; add a variant that differs "
                    "only in synthesize: {selection: {rule: random}}"
                )

    def variant(self, source: str) -> Experiment:
        """The experiment as this source's image sets follow from it.

        `synthetic-STRATEGY` and `perturbed-STRENGTH` need no entry in `variants`. Raises `ValueError` for a source that does.
        """
        kind, _, name = source.partition("-")
        if kind == "mixed" and not self.mix(source):
            raise ValueError(
                f"sources: {source!r} says nothing of what is mixed; add variants.{source}: {{mix: {{of: [...]}}}}"
            )
        if not name or kind == "mixed":
            return self
        if kind not in _VARIED:
            raise ValueError(f"sources: {source!r}: there is one {kind} source; call it {kind!r}")
        given, named = self.variants.get(source), _named(kind, name)
        if given is None and named is None:
            raise ValueError(f"sources: {source!r} says nothing of how it differs; add it to variants")
        given = _as_named(given or Variant(), named, source)
        return self.model_copy(
            update={
                "generator": given.generator or self.generator,
                "synthesize": _merged(self.synthesize, given.synthesize, f"variants.{source}.synthesize"),
                "perturb": _merged(self.perturb, given.perturb, f"variants.{source}.perturb"),
            }
        )

    @property
    def finetuned_model(self) -> str:
        """The model that trials adapt and measure."""
        return self.finetune.model or self.model

    def at_random(self) -> Experiment:
        """The same, but for synthetic images that are selected at random."""
        selection = SelectionSettings(rule="random", over=self.synthesize.selection.over)
        return self.model_copy(update={"synthesize": self.synthesize.model_copy(update={"selection": selection})})


def _named(kind: str, name: str) -> tuple[str, str, Any] | None:
    """What a source's name says by itself, a prompt strategy or a strength: part, key and value."""
    if kind == "synthetic" and name in get_args(PromptSettings.model_fields["strategy"].annotation):
        return "synthesize", "prompts", name
    try:
        return ("perturb", "strength", float(name)) if kind == "perturbed" else None
    except ValueError:
        return None


def _as_named(given: Variant, named: tuple[str, str, Any] | None, source: str) -> Variant:
    """A variant with what its name says of it; `ValueError` where it says otherwise itself."""
    if named is None:
        return given
    part, key, value = named
    values = getattr(given, part)
    told = values.get(key, value)
    if isinstance(told, dict):
        told = {"strategy": value} | told
    if (told["strategy"] if isinstance(told, dict) else told) != value:
        raise ValueError(f"variants.{source}: {part}.{key} is not what the name says; call it otherwise")
    return given.model_copy(update={part: values | {key: told}})


T = TypeVar("T", bound=Settings)


def _merged(settings: T, given: dict[str, Any], where: str) -> T:
    """`settings` with what is `given` on top, validated anew."""
    return validated(type(settings), _on_top(settings.model_dump(exclude_unset=True), given), where)


def _on_top(values: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _on_top(values[key], given[key]) for key in values.keys() & given.keys() if _nest(values[key], given[key])
    }
    return values | given | both


def _nest(one: Any, other: Any) -> bool:
    return isinstance(one, dict) and isinstance(other, dict)


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
    return validated(Experiment, values, where)


def load_experiment(
    path: Path | None = None, overrides: tuple[str, ...] = (), *, quick: bool = False, **fields: Any
) -> Experiment:
    """The experiment in `path` (the pocket one if None), with `a.b=c` overrides and then `fields` that are not None on top.

    A file's section `quick` holds what its quick form does otherwise: it takes a minute, on the pocket world. With `quick` it lies
    below the overrides, and the name, after which the run's folder is called, ends in `-quick`.

    Raises:
        UsageError: what is wrong with the file, an override or a field, or that there is no quick form.
    """
    values = read_mapping(path, "an experiment file") if path else {QUICK: _QUICK_POCKET}
    shorter = _quick_section(values, path)
    if quick:
        values = _quick_form(values, shorter, path)
    for assignment in overrides:
        _set(values, assignment)
    values.update({name: value for name, value in fields.items() if value is not None})
    return parse_experiment(values, str(path) if path else "experiment")


QUICK = "quick"
_QUICK_POCKET: dict[str, Any] = {"tasks": ["digits"], "scales": [40], "seeds": 1}


def _quick_section(values: dict[str, Any], path: Path | None) -> dict[str, Any] | None:
    """What stands under `quick`, taken out of `values`: it is no part of the experiment."""
    shorter = values.pop(QUICK, None)
    if not isinstance(shorter, dict | None):
        raise UsageError(f"{path}: {QUICK}: input should be a mapping of keys to values, not {str(shorter)[:60]!r}")
    return shorter


def _quick_form(values: dict[str, Any], shorter: dict[str, Any] | None, path: Path | None) -> dict[str, Any]:
    if shorter is None:
        raise UsageError(f"{path}: has no quick form; a section `{QUICK}:` says what it does otherwise")
    whole = values.get("name", Experiment.model_fields["name"].default)
    return {"name": f"{whole}-{QUICK}"} | _on_top({key: values[key] for key in values if key != "name"}, shorter)


def dump_experiment(experiment: Experiment) -> str:
    """The resolved experiment as YAML that `load_experiment` reads back to an equal one."""
    return yaml.safe_dump(experiment.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
