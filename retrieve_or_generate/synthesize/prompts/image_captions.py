"""Captions that a model gives the retrieved images, after the class name (appendix B.3 of 2406.05184)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.kept_texts import CAPTIONS, KeptTexts
from retrieve_or_generate.pixels import decode
from retrieve_or_generate.store import content_key
from retrieve_or_generate.synthesize.prompts.base import Prompt, PromptSource
from retrieve_or_generate.synthesize.prompts.naming import names_class
from retrieve_or_generate.synthesize.prompts.pretrained import load_text_model, quietly
from retrieve_or_generate.synthesize.prompts.rounds import Rounds
from retrieve_or_generate.synthesize.prompts.text import clean
from retrieve_or_generate.text_models import TextModelFiles, find_text_model
from retrieve_or_generate.weights import first_line

BATCH = 32
"""Images at once. The last batch is filled up, so that a caption depends on nothing beside its image."""

MOST_TOKENS = 40
_FAMILY = ("blip", "blip-2")
_VERSION = 1  # part of every key: raise when the same image gets another caption


class Captioner:
    """A BLIP or BLIP-2 on its device: the likeliest word first, and then the next."""

    def __init__(self, files: TextModelFiles, dtype: str, device: str):
        self._model, folder = load_text_model(files, AutoModelForImageTextToText, dtype, device, _FAMILY)
        try:
            with quietly():
                self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise IntegrityError(f"{folder}: its processor cannot be loaded ({first_line(error)[:200]})") from error
        self._dtype, self._device = getattr(torch, dtype), device

    @torch.inference_mode()
    def captions(self, images: Sequence[bytes]) -> list[str]:
        """One line for each of up to `BATCH` encoded images."""
        pictures = [Image.fromarray(decode(image)) for image in images]
        filled = pictures + pictures[:1] * (BATCH - len(pictures))
        pixels = self._processor(images=filled, return_tensors="pt")["pixel_values"].to(self._device, self._dtype)
        ids = self._model.generate(pixel_values=pixels, max_new_tokens=MOST_TOKENS, do_sample=False, num_beams=1)  # type: ignore[operator]
        texts = self._processor.batch_decode(ids, skip_special_tokens=True)
        return [clean(text) for text in texts[: len(images)]]


class ImageCaptions:
    """`class name, caption` for each kept image of the class, in the order of its ranks, and round again.

    Captions are kept by image and captioner, so no image is captioned twice. An image without a caption is passed over.
    """

    uses_real_captions = True

    def __init__(self, source: PromptSource):
        settings, kept = source.settings, source.like.kept
        self._files = find_text_model(settings.model, "captioner")
        self.fingerprint = content_key(["image_captions", self._files.fingerprint, _VERSION])
        self._names, self._like = source.task.class_names, source.like
        self._images = {int(label): rows[["key", "sha256"]] for label, rows in kept.groupby("label")}
        self._dtype, self._device, self._progress = settings.dtype, source.device, source.progress
        key = content_key([_VERSION, self._files.fingerprint, settings.dtype, MOST_TOKENS])
        self._texts = KeptTexts(CAPTIONS, key)
        self._captioner: Captioner | None = None
        self._given: dict[int, list[Prompt]] = {}
        self._rounds = Rounds(self._of)

    def prompts(self, label: int, count: int) -> list[Prompt]:
        return self._rounds.take(label, count)

    def _of(self, label: int) -> list[Prompt]:
        name = self._names[label]
        rows = self._images.get(label)
        pairs = [] if rows is None else list(zip(rows["key"], rows["sha256"], strict=True))
        captions = self._captions(pairs)
        given = [
            Prompt(f"{name}, {captions[sha256]}", {"caption_of": key}) for key, sha256 in pairs if captions[sha256]
        ]
        if not given:
            raise UsageError(
                f"{self._like.folder}: {self._files.name} has no caption for any of its {len(pairs)} images of {name!r}; "
                "choose another synthesize.prompts"
            )
        self._given[label] = given
        return given

    def _captions(self, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
        """By hash, of images given as (key, sha256)."""
        wanted = {sha256: key for key, sha256 in reversed(pairs)}
        if wanted.keys() - self._texts.known.keys():
            with self._texts.making() as known:
                missing = [(key, sha256) for sha256, key in wanted.items() if sha256 not in known]
                for start in range(0, len(missing), BATCH):
                    part = missing[start : start + BATCH]
                    images = self._like.images([key for key, _ in part])
                    texts = self._loaded().captions(images)
                    self._texts.add({sha256: text for (_, sha256), text in zip(part, texts, strict=True)})
                    self._tell(len(wanted) - len(missing) + start + len(part))
        return {sha256: self._texts.known[sha256] for sha256 in wanted}

    def _loaded(self) -> Captioner:
        if self._captioner is None:
            self._captioner = Captioner(self._files, self._dtype, self._device)
        return self._captioner

    def _tell(self, here: int) -> None:
        """How far captioning is, of the kept images of all classes; `here`: of the class at hand."""
        if self._progress:
            before = sum(len(self._images[label]) for label in self._given)
            self._progress("images captioned", before + here, len(self._like.kept))

    def rest(self) -> None:
        self._captioner = None

    def record(self) -> dict[str, Any]:
        captions = [(label, prompt) for label, given in self._given.items() for prompt in given]
        naming = sum(
            names_class(prompt.text.removeprefix(f"{self._names[label]}, "), self._names[label])
            for label, prompt in captions
        )
        return {
            "model": self._files.name,
            "captions": len(captions),
            "without_caption": sum(len(self._images[label]) - len(given) for label, given in self._given.items()),
            "naming_the_class": naming,
            **self._rounds.record(),
        }
