"""What a generator is asked for, and which of its images are taken."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from retrieve_or_generate.settings.base import Settings, Strength


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
