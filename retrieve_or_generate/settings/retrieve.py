"""Which images of a pool are found, and how they are fetched."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from retrieve_or_generate.settings.base import Settings


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
