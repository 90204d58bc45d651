"""What is done to the images of every source alike."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from retrieve_or_generate.settings.base import Fraction, Settings


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
