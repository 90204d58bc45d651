"""The parts of an experiment, a frozen model for each stage: every field with its meaning, unit and bounds.

A stage takes the part that is its own (`RetrieveSettings`, `CurateSettings`, …), never the whole. What identifies a result goes
into its content key through `model_dump`; machines, paths and progress never stand here.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

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


class PromptSettings(Settings):
    """What a generator is told of a class. A strategy's name alone stands for it with everything else as it is here."""

    strategy: Literal["class_name", "templates", "places", "alt_text", "image_captions", "llm", "file"] = Field(
        "templates",
        description="the class name; templates around it; with hypernym and place; captions of the retrieved images (alt text); "
        "captions that a model gives them; sentences of a language model; a file",
    )
    templates: tuple[str, ...] | Literal["imagenet"] | None = Field(
        None, description="around each class name (templates); imagenet: CLIP's 80; null: the task's own"
    )
    places: str | None = Field(
        None, description="file of places, one a line or as Places365 lists them (places); null: the pocket world's"
    )
    hypernyms: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None,
        description="file of class name, tab, hypernym, or folder with WordNet 3.0's data.noun; of several the first that knows a "
        "class counts (places); null: the pocket world's",
    )
    model: str = Field(
        "pocket", description="captioner or language model: pocket, a folder, or a Hub id (image_captions, llm)"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="type of that model's weights and products (image_captions, llm)"
    )
    called: str = Field(
        "{}", description="what the language model is told a class is called, such as '{} aircraft' (llm)"
    )
    form: Literal["object", "texture"] | None = Field(
        None, description="what the classes are of; null: texture where the task's templates say so (llm)"
    )
    examples: str | None = Field(
        None, description="folder of examples, relations and backgrounds in place of ours (llm); docs/prompts.md"
    )
    temperature: float = Field(0.8, gt=0, description="of what the language model says next (llm)")
    top_p: float = Field(0.9, gt=0, le=1, description="share of the likeliest words that it draws from (llm)")
    lacking_class: Literal["drop", "keep"] = Field(
        "drop", description="sentences of a language model that do not name the class (llm)"
    )
    file: str | None = Field(None, description="class name, tab, prompt on each line (file)")
    real_captions: bool = Field(False, description="the prompts of the file are made of real images' captions (file)")

    @field_validator("called")
    @classmethod
    def _has_name(cls, called: str) -> str:
        if "{}" not in called:
            raise ValueError(f"called needs {{}} where the class name goes, not {called!r}")
        return called

    @field_validator("hypernyms", mode="before")
    @classmethod
    def _one_source(cls, given: Any) -> Any:
        return (given,) if isinstance(given, str) else given


class SelectionSettings(Settings):
    """Which of more synthetic images than are needed are kept, after the curation that every source goes through."""

    rule: Literal["all", "random", "low_density", "hardest"] = Field(
        "all",
        description="all; at random; far from the real images of the class, but among them; hardest to tell from real ones",
    )
    over: float = Field(2.0, gt=1, le=100, description="images to choose from for each that is kept (not: rule all)")
    neighbours: int = Field(3, ge=1, description="nearest real images that say how thin they lie (rule: low_density)")


class SynthesizeSettings(Settings):
    """How a generator is asked for a task's classes."""

    preset: Literal["paper"] | None = Field(
        None,
        description="paper: DDIM, 50 steps, eta 0, guidance 2.0, 512 → 256 pixels, unchecked, unless said otherwise",
    )
    prompts: PromptSettings = Field(PromptSettings(), description="prompt strategy, by name or with its settings")
    scheduler: str | None = Field(
        None, description="diffusers' class, such as DDIMScheduler; null: the generator's own"
    )
    num_inference_steps: int = Field(8, ge=1, le=1000, description="denoising steps")
    guidance_scale: float = Field(3.0, ge=0, le=50, description="classifier-free guidance; 1 is none")
    eta: float = Field(0.0, ge=0, le=1, description="DDIM noise")
    negative_prompt: str = Field("", description="what guidance leads away from")
    resolution: int | None = Field(
        None,
        ge=8,
        description="side in pixels, a multiple of the VAE's factor; null: what the generator was trained at",
    )
    stored_size: int | None = Field(None, ge=8, description="side in pixels that is stored; null: as generated")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("bfloat16", description="type of weights and products")
    safety_checker: bool = Field(True, description="drop and draw again what the generator's own checker flags")
    selection: SelectionSettings = Field(
        SelectionSettings(), description="which of more images than are needed are kept, by rule or with its settings"
    )
    memorised: Literal["report", "drop", "off"] = Field(
        "report",
        description="generated images that copy one of the pool: counted and listed, dropped too, not looked for",
    )
    batch_size: int = Field(64, ge=1, description="images per call; changes speed, never images")
    shard_size: int = Field(
        256, ge=1, description="images of a unit of work, which becomes one file; best a multiple of batch_size"
    )
    compile: bool = Field(
        False, description="compile the UNet first: minutes, then faster (on a GPU); changes speed, never images"
    )

    @model_validator(mode="before")
    @classmethod
    def _preset_below(cls, given: Any) -> Any:
        return (
            _PRESETS[given["preset"]] | given if isinstance(given, dict) and given.get("preset") in _PRESETS else given
        )

    @field_validator("prompts", mode="before")
    @classmethod
    def _strategy_alone(cls, given: Any) -> Any:
        return {"strategy": given} if isinstance(given, str) else given

    @field_validator("memorised", mode="before")
    @classmethod
    def _off_is_a_word(cls, given: Any) -> Any:
        return "off" if given is False else given  # as YAML reads it without quotes

    @field_validator("selection", mode="before")
    @classmethod
    def _rule_alone(cls, given: Any) -> Any:
        return {"rule": given} if isinstance(given, str) else given


PAPER_GENERATOR = "stable-diffusion-v1-5/stable-diffusion-v1-5"
"""Stable Diffusion 1.5, which the preset `paper` stands for where an experiment names no generator."""
_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {  # 2406.05184, appendix C.1, and its scripts, which generate without a safety checker
        "scheduler": "DDIMScheduler",
        "num_inference_steps": 50,
        "guidance_scale": 2.0,
        "eta": 0.0,
        "resolution": 512,
        "stored_size": 256,
        "safety_checker": False,
    }
}


class PerturbSettings(Settings):
    """Image-to-image generation from retrieved images (section 5.1 of 2406.05184)."""

    strength: Strength = Field(0.4, description="the γ of the paper, of the set that is trained on")
    prompt: str | None = Field(
        None, description="for each image, {} is the class name; caption: its own; null: the task's first template"
    )
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
        ("val", "test"), min_length=1, description="splits that no image may copy; test: shifted test sets, too"
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


class MixSettings(Settings):
    """A training set drawn from two sources: at the scale's size, by count, or weighed in the loss."""

    of: tuple[str, str] = Field(..., description="the two sources, both of which the experiment lists")
    share: float | None = Field(
        None, gt=0, lt=1, description="of the first in a set of as many images as the scale says; null: half"
    )
    counts: tuple[Annotated[int, Field(ge=1)] | None, Annotated[int, Field(ge=1)] | None] | None = Field(
        None, description="in place of share: images of each, whatever the scale; null: as many as the scale says"
    )
    gamma: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="batches of equal halves, their loss γ of the first's and 1 − γ of the second's; null: one set, one loss",
    )

    @model_validator(mode="after")
    def _two(self) -> MixSettings:
        if self.of[0] == self.of[1]:
            raise ValueError(f"of names {self.of[0]!r} twice")
        if self.counts and self.share is not None:
            raise ValueError("give share or counts, not both")
        return self

    @property
    def first_share(self) -> float:
        """Of the first source, where the mixture goes by share."""
        return 0.5 if self.share is None else self.share

    @property
    def words(self) -> str:
        """What a training set of it holds, for the report."""
        first, second = self.of
        if self.counts is None:
            drawn = f"{self.first_share:.0%} of the images {first}, the others {second}"
        else:
            sizes = zip(self.counts, self.of, strict=True)
            drawn = " and ".join(f"{count:,} {one}" if count else f"n {one}" for count, one in sizes) + " images"
        if self.gamma is None:
            return drawn
        weighed = f"the loss {self.gamma:g} of the {first} half's and {1 - self.gamma:g} of the {second} half's"
        return f"{drawn}, half of each batch from each, {weighed}"


class AdversarialSettings(Settings):
    """Training on images that are changed so that the model errs (PGD)."""

    epsilon: float = Field(..., gt=0, le=255, description="most that a channel of a pixel changes, of 255")
    steps: int = Field(3, ge=1, description="of the attack; each costs as much as an update")
    step_size: float | None = Field(None, gt=0, description="of 255; null: 2.5 ε over the steps")

    @property
    def length(self) -> float:
        """Of one step, of 255."""
        return self.step_size or 2.5 * self.epsilon / self.steps


class FinetuneSettings(Settings):
    """How CLIP is adapted to a training set."""

    model: str | None = Field(
        None, description="what is fine-tuned, with a text tower or without (timm:NAME); null: the experiment's model"
    )
    recipe: Literal["equal_updates", "paper"] = Field(
        "equal_updates",
        description="equal updates at all scales; paper: 30 epochs, 500 warm-up steps, batch 512, rates 5e-4, 1e-5, 1e-6, a look "
        "at val each epoch, float32, unless said otherwise",
    )
    updates: int = Field(32, ge=0, description="optimizer steps, whatever the scale (recipe: equal_updates)")
    epochs: int = Field(30, ge=1, description="passes over the set (recipe: paper)")
    batch_size: int = Field(48, ge=1, description="images per update")
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (3e-4,), min_length=1, description="tried in turn, chosen on val"
    )
    loss: Literal["cross_entropy", "contrastive"] = Field(
        "cross_entropy",
        description="of the head; contrastive: images against captions of their classes, the text tower trained too (FLYP)",
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
    adversarial: AdversarialSettings | None = Field(
        None, description="train on attacked images: how far they are changed, or epsilon alone; null: on the images"
    )
    wise_ft: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (1.0,),
        min_length=1,
        description="share of the tuned weights, the rest being those before (WiSE-FT); several are chosen from on val",
    )
    checkpoint_every: int = Field(
        0, ge=0, description="updates between two savings of a trial under way; 0: it is saved when it is terminated"
    )
    preprocess: Literal["square", "paper"] = Field(
        "square",
        description="what of a picture is shown, of every source and the task: its central square; paper: all of it, with white "
        "borders",
    )
    working_size: int | None = Field(
        None,
        ge=8,
        description="side in pixels that training images are kept at; null: the model's (the paper: 256 for 224)",
    )
    flip: bool = Field(False, description="mirror half of the training images, drawn anew in each update")
    compile: bool = Field(
        False, description="compile the tower first: a minute, then faster (on a GPU); changes speed and last bits"
    )

    @field_validator("adversarial", mode="before")
    @classmethod
    def _epsilon_alone(cls, given: Any) -> Any:
        alone = isinstance(given, int | float) and not isinstance(given, bool)
        return {"epsilon": given} if alone else given

    @model_validator(mode="after")
    def _attacks_the_head(self) -> FinetuneSettings:
        if self.adversarial and self.loss != "cross_entropy":
            raise ValueError("adversarial goes with loss: cross_entropy, whose head it attacks")
        return self

    @field_validator("wise_ft", mode="before")
    @classmethod
    def _one_share(cls, given: Any) -> Any:
        return (given,) if isinstance(given, int | float) else given

    @model_validator(mode="before")
    @classmethod
    def _recipe_below(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("recipe") != "paper":
            return given
        return _PAPER_FINETUNE | {"evaluations": given.get("epochs", _PAPER_FINETUNE["evaluations"])} | given


_PAPER_FINETUNE: dict[str, Any] = {  # 2406.05184, section D.4, and its released configurations
    "batch_size": 512,
    "learning_rates": (5e-4, 1e-5, 1e-6),
    "evaluations": 30,
    "precision": "float32",
}


class ProbeSettings(Settings):
    """A linear classifier on frozen features of the task's own training images."""

    recipe: Literal["regression", "paper"] = Field(
        "regression", description="multinomial regression solved for each C; paper: a layer trained by AdamW"
    )
    inverse_regularisation: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (0.1, 1.0, 10.0, 100.0, 1000.0),
        min_length=1,
        description="C of scikit-learn's LogisticRegression, chosen on val",
    )
    learning_rate: float = Field(1e-2, gt=0, description="AdamW's peak (recipe: paper; 1e-3 for its ImageNet)")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's (recipe: paper; 0 for its ImageNet)")
    epochs: int = Field(200, ge=1, description="passes over the features (recipe: paper; 40 for its ImageNet)")
    batch_size: int = Field(256, ge=1, description="images per update (recipe: paper)")
