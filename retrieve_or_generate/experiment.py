"""The one typed experiment file: YAML in, frozen models out. Unknown keys are refused with the nearest name.

A stage takes the part that is its own (`RetrieveSettings`, `CurateSettings`, …), never the whole. What identifies a result goes
into its content key through `model_dump`; machines, paths and progress never stand here.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from retrieve_or_generate.errors import UsageError

Source = Literal["none", "retrieved", "synthetic", "perturbed"]
Strength = Annotated[float, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Settings(BaseModel):
    """Base of every part: immutable, strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class RowSettings(Settings):
    """Which rows of a pool a search may find; all of them by default."""

    punsafe_below: float | None = Field(None, ge=0, le=1, description="only rows whose predicted unsafety is lower")
    similarity_from: float | None = Field(
        None, ge=-1, le=1, description="only rows whose recorded similarity is as high"
    )
    least_side: int = Field(0, ge=0, description="only rows whose recorded width and height are as large, in pixels")
    allow: tuple[str, ...] = Field(
        (),
        description="only these rows: files or folders of ids, md5 or sha256 hashes or URLs; FILE#COLUMN of a parquet",
    )
    block: tuple[str, ...] = Field((), description="none of these rows: files or folders as for allow")


class DownloadSettings(Settings):
    """What decides which downloaded images are used (fetch: http)."""

    least_success: float = Field(
        0.1, ge=0, le=1, description="share of the URLs that must give an image, else exit code 3"
    )
    max_bytes: int = Field(20_000_000, ge=1, description="largest file that is read")
    least_pixels: int = Field(
        256, ge=1, description="smallest width × height that is used: trackers and spacers have fewer"
    )
    most_pixels: int = Field(2**26, ge=1, le=2**26, description="largest width × height that is decoded")
    unverified: Literal["keep", "drop"] = Field("keep", description="images for which the pool records no hash")
    placeholder_urls: int = Field(
        10, ge=2, description="one image under so many URLs is a placeholder, not the picture"
    )
    blocklist: str | None = Field(None, description="file of URLs, hashes or ids that are never asked for")


class ServiceSettings(Settings):
    """A clip-retrieval service that searches in our place. What it would add of its own is off."""

    url: str | None = Field(None, description="its address, such as http://127.0.0.1:1234")
    index: str | None = Field(None, description="one of its indexes, where it has several")
    aesthetic: tuple[Annotated[int, Field(ge=0, le=9)], float] | None = Field(
        None, description="bend queries towards a rating, with a weight"
    )
    deduplicate: bool = Field(False, description="the service leaves out near copies")
    safety: bool = Field(False, description="the service leaves out what its safety model flags")
    violence: bool = Field(False, description="the service leaves out what its violence detector flags")


class RetrieveSettings(Settings):
    """How a pool is searched for a task's classes."""

    model: str | None = Field(None, description="CLIP that embedded the pool; null: the experiment's model")
    strategy: Literal["semantic", "substring", "both"] = Field(
        "semantic", description="search embeddings, captions, or both"
    )
    modalities: tuple[Literal["image", "text"], ...] = Field(
        ("text",), min_length=1, description="text→image and/or text→caption search; what either finds is taken"
    )
    k: int = Field(300, ge=1, description="neighbours per query")
    templates: tuple[str, ...] | Literal["imagenet"] | None = Field(
        None, description="queries around each class name ({} is the name); imagenet: CLIP's 80; null: the task's own"
    )
    examples_per_class: int = Field(0, ge=0, description="training images of each class that are queries, too")
    engine: Literal["auto", "scan", "index", "remote"] = Field(
        "scan", description="exact streaming scan, FAISS index, whichever the planner says, or a service"
    )
    index: str = Field(
        "pocket", description="recipe in indexes/, its file, or the folder of an index (engine: index, auto)"
    )
    service: ServiceSettings = Field(ServiceSettings(), description="the service (engine: remote); its URL is enough")
    caption_semantics: Literal["substring", "token", "word"] = Field(
        "substring", description="what counts as a caption match"
    )
    candidates_per_class: int = Field(84, ge=1, description="best-scoring candidates kept per class before curation")
    rows: RowSettings = RowSettings()
    nsfw: Literal["drop", "keep"] = Field(
        "drop", description="drop rows tagged NSFW, and those with punsafe from 0.5 on"
    )
    fetch: Literal["shards", "http"] = Field("shards", description="images from the pool's shards, or downloaded anew")
    download: DownloadSettings = DownloadSettings()

    @field_validator("service", mode="before")
    @classmethod
    def _url_alone(cls, given: Any) -> Any:
        return {"url": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _fits(self) -> RetrieveSettings:
        if len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"modalities lists one value twice: {list(self.modalities)}")
        if self.engine == "remote" and not self.service.url:
            raise ValueError("engine: remote asks a service; give its URL as retrieve.service")
        wrong = [t for t in self.templates or () if "{}" not in t] if self.templates != "imagenet" else []
        if self.templates == () or wrong:
            raise ValueError(f"templates need {{}} where the class name goes, not {wrong[:1]}")
        return self


class SynthesizeSettings(Settings):
    """How a generator is asked for a task's classes."""

    prompts: Literal["class_name", "templates"] = Field("templates", description="prompt strategy")
    num_inference_steps: int = Field(8, ge=1, le=1000, description="DDIM steps")
    guidance_scale: float = Field(3.0, ge=0, le=50, description="classifier-free guidance; 1 is none")
    eta: float = Field(0.0, ge=0, le=1, description="DDIM noise")
    batch_size: int = Field(64, ge=1, description="images per call; changes speed, never images")


class PerturbSettings(Settings):
    """Image-to-image generation from retrieved images (section 5.1 of 2406.05184)."""

    strength: Strength = Field(0.4, description="the γ of the paper, of the set that is trained on")
    shown: tuple[Strength, ...] = Field(
        (0.2, 0.6, 0.8), description="further strengths, one image a class, for the report"
    )


class CurateSettings(Settings):
    """What is done to every source alike."""

    score: Literal["mean", "max"] = Field(
        "mean", description="CLIP score: against the mean of a class's templates, or the best of them"
    )
    keep_fraction: Fraction | None = Field(0.3, description="share of each class kept by CLIP score; null keeps all")
    least_score: float | None = Field(
        None, ge=-1, le=1, description="CLIP score (cosine) below which an image goes, whatever its class keeps"
    )
    deduplicate: bool = Field(True, description="drop copies within the set: equal bytes, and what the next four find")
    descriptor: str = Field(
        "thumbnail", description="what finds copies: thumbnail, the path of an SSCD torchscript, or isc:PATH"
    )
    descriptor_threshold: Fraction | None = Field(
        None, description="similarity from which a learned descriptor sees a copy; null: 0.75 (SSCD), 0.604169 (ISC)"
    )
    duplicate_cosine: Fraction = Field(
        0.98, description="embedding cosine that copies for thumbnails or perceptual hashes must reach too"
    )
    perceptual_hash_bits: int | None = Field(
        None, ge=0, le=31, description="bits of 64 in which perceptual hashes of copies may differ; null: no such hash"
    )
    semantic_cosine: Fraction | None = Field(
        None, description="embedding cosine that alone makes two images copies; null: no such test"
    )
    decontaminate: bool = Field(True, description="drop copies of the task's own images, of these splits:")
    decontaminate_against: tuple[Literal["train", "val", "test"], ...] = Field(
        ("val", "test"), min_length=1, description="splits that no image may copy"
    )
    class_cap: int = Field(10_000, ge=1, description="most images kept per class")
    least_per_class: int = Field(1, ge=0, description="images that each class must keep; 0: a class may end empty")
    on_short_class: Literal["error", "exclude"] = Field(
        "error", description="what a class with fewer is: an error, or left out by name, for every source"
    )

    @field_validator("decontaminate_against")
    @classmethod
    def _splits_once(cls, splits: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(splits)) < len(splits):
            raise ValueError("names one split twice")
        return splits


class FinetuneSettings(Settings):
    """How CLIP is adapted to a training set."""

    recipe: Literal["equal_updates", "paper"] = Field(
        "equal_updates", description="equal updates at all scales, or 30 epochs"
    )
    updates: int = Field(32, ge=0, description="optimizer steps, whatever the scale (recipe: equal_updates)")
    epochs: int = Field(30, ge=1, description="passes over the set (recipe: paper)")
    batch_size: int = Field(48, ge=1, description="images per update")
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (3e-4,), min_length=1, description="tried in turn, chosen on val"
    )
    head_learning_rate_factor: float = Field(1.0, gt=0, description="head's rate relative to the tower's")
    weight_decay: float = Field(0.1, ge=0, description="AdamW")
    warmup_fraction: float = Field(
        0.1, ge=0, lt=1, description="share of updates with rising rate (recipe: paper: 500 steps)"
    )
    evaluations: int = Field(2, ge=1, description="evenly spaced looks at val; the best is kept")
    precision: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="type of the tower's products; weights are float32"
    )


class ProbeSettings(Settings):
    """Multinomial regression on frozen features of the task's own training images."""

    inverse_regularisation: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.1, 1.0, 10.0, 100.0, 1000.0),
        min_length=1,
        description="C of scikit-learn's LogisticRegression, chosen on val",
    )


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
