"""Captions that models give images: the pocket captioner, and random ones of both families."""

from __future__ import annotations

import gc
import io
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    OPTConfig,
)

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.image_set import ImageSet, ImageSetWriter
from retrieve_or_generate.pixels import encode_jpeg
from retrieve_or_generate.pocket import drawing
from retrieve_or_generate.settings import PromptSettings
from retrieve_or_generate.store import cache_folder
from retrieve_or_generate.synthesize.prompts import HoldsModel, PromptSource, Strategy, load_strategy
from retrieve_or_generate.synthesize.prompts.image_captions import Captioner
from retrieve_or_generate.synthesize.prompts.naming import names_class
from retrieve_or_generate.tasks import Task, load_task
from retrieve_or_generate.text_models import find_text_model
from retrieve_or_generate.weights import POCKET_WEIGHTS

from ..hub import Repository, commit_of, hub, point_at

Load = Callable[..., Strategy]


def _picture(name: str, seed: int) -> bytes:
    return encode_jpeg(drawing.texture(name, np.random.default_rng(seed), ("red", "white")))


@pytest.fixture(scope="module")
def textures() -> Task:
    return load_task("textures")


@pytest.fixture(scope="module")
def pictures(textures: Task, tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Five pictures a class, four of them different, all kept; none of the last class."""
    from retrieve_or_generate.curate.curation import curate
    from retrieve_or_generate.models import load_clip
    from retrieve_or_generate.settings import CurateSettings

    folder: Path = tmp_path_factory.mktemp("sets") / "retrieved"
    names = {"task": textures.name, "source": "retrieved", "class_names": textures.class_names}
    with ImageSetWriter(folder, key="k", config={}, **names) as writer:  # type: ignore[arg-type]
        for label, name in enumerate(textures.class_names[:-1]):
            for i in range(5):
                common = {"label": label, "caption": "", "origin": {}, "query": ""}
                writer.add(key=f"{label}-{i}", image=_picture(name, i % 4), **common)  # type: ignore[arg-type]
        writer.finish()
    keep = CurateSettings(keep_fraction=None, decontaminate=False, deduplicate=False, least_per_class=0)
    return curate(folder, task=textures, clip=load_clip("pocket"), settings=keep)


@pytest.fixture
def load(textures: Task, pictures: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """The strategy with a cache of the test's own."""
    monkeypatch.setenv("ROG_CACHE", str(tmp_path / "cache"))

    def make(**given: object) -> Strategy:
        settings = PromptSettings.model_validate({"strategy": "image_captions", **given})
        return load_strategy(PromptSource(textures, pictures, settings))

    return make


def test_captions_after_the_class_name_in_rank_order_and_round_again(load: Load, pictures: ImageSet) -> None:
    strategy = load()
    assert strategy.uses_real_captions
    prompts = strategy.prompts(2, 7)
    assert all(prompt.text.startswith("chequered, ") for prompt in prompts)
    kept = pictures.kept
    assert [prompt.origin["caption_of"] for prompt in prompts[:5]] == kept[kept["label"] == 2]["key"].tolist()
    assert prompts[5:] == prompts[:2]
    record = strategy.record()
    assert (record["captions"], record["given"], record["given_again"]) == (5, 7, 2)


def test_the_pocket_captioner_sees_what_is_there(load: Load, textures: Task) -> None:
    """Each class was drawn in red and white; a synonym ("banded") is as good as the name."""
    strategy = load()
    rightly = 0
    for label, name in enumerate(textures.class_names[:-1]):
        words = (name, *textures.synonyms[name])
        said = [prompt.text.removeprefix(f"{name}, ") for prompt in strategy.prompts(label, 5)]
        rightly += sum(any(names_class(text, word) for word in words) for text in said)
    assert rightly >= 28  # of 35


def test_no_image_is_captioned_twice(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load().prompts(1, 5)
    loaded = []
    monkeypatch.setattr(Captioner, "__init__", lambda self, *_: loaded.append(self))
    again = load()
    assert again.prompts(1, 5) == first
    assert not loaded
    file = next((cache_folder() / "prompts").rglob("*.json"))
    file.write_bytes(file.read_bytes()[:-5])
    monkeypatch.undo()
    monkeypatch.setenv("ROG_CACHE", str(file.parent.parent.parent))
    assert load().prompts(1, 5) == first


def test_a_caption_depends_on_its_image_alone() -> None:
    captioner = Captioner(find_text_model("pocket", "captioner"), "float32", "cpu")
    images = [_picture(name, seed) for seed, name in enumerate(drawing.TEXTURES)]
    together = captioner.captions(images)
    assert [captioner.captions([image])[0] for image in images] == together
    assert captioner.captions(images[::-1]) == together[::-1]


def test_a_class_without_images_is_told_of(load: Load) -> None:
    strategy = load()
    assert strategy.prompts(7, 0) == []
    with pytest.raises(UsageError, match=r"has no caption for any of its 0 images of 'blotchy'; choose another"):
        strategy.prompts(7, 1)


def _random_blip(folder: Path) -> None:
    config = BlipConfig.from_pretrained(POCKET_WEIGHTS / "captioner")
    config.vision_config.num_hidden_layers = config.text_config.num_hidden_layers = 1
    BlipForConditionalGeneration(config).save_pretrained(folder)


def _random_blip2(folder: Path) -> None:
    """With an OPT that reads the query tokens, as the published ones do."""
    words = AutoProcessor.from_pretrained(POCKET_WEIGHTS / "captioner").tokenizer
    vision = Blip2VisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    querying = Blip2QFormerConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        encoder_hidden_size=16,
    )
    language = OPTConfig(
        vocab_size=len(words),
        hidden_size=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=16,
        max_position_embeddings=64,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    config = Blip2Config(
        vision_config=vision.to_dict(),
        qformer_config=querying.to_dict(),
        text_config=language.to_dict(),
        num_query_tokens=4,
        image_token_index=words.mask_token_id,
    )
    Blip2ForConditionalGeneration(config).save_pretrained(folder)


@pytest.mark.parametrize("make", [_random_blip, _random_blip2])
def test_either_family_in_the_shape_of_a_published_one(tmp_path: Path, make: Callable[[Path], None]) -> None:
    """Against the library's own call for one image."""
    torch.manual_seed(0)
    make(tmp_path)
    processor = AutoProcessor.from_pretrained(POCKET_WEIGHTS / "captioner")
    processor.save_pretrained(tmp_path)
    captioner = Captioner(find_text_model(str(tmp_path), "captioner"), "float32", "cpu")
    images = [_picture("striped", 1), _picture("spiralled", 2)]
    model = captioner._model
    for image, caption in zip(images, captioner.captions(images), strict=True):
        pixels = processor(images=Image.open(io.BytesIO(image)), return_tensors="pt")["pixel_values"]
        ids = model.generate(pixel_values=pixels, max_new_tokens=40)
        assert caption == " ".join(processor.decode(ids[0], skip_special_tokens=True).split())


def test_models_that_are_no_captioners(load: Load, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"text_encoder: a model of type 'clip_text_model'; synthesize.prompts.model takes blip or"
    ):
        load(model=str(POCKET_WEIGHTS / "stable-diffusion" / "text_encoder")).prompts(0, 1)
    _random_blip(tmp_path / "wordless")
    with pytest.raises(IntegrityError, match=r"wordless: its processor cannot be loaded \("):
        load(model=str(tmp_path / "wordless")).prompts(0, 1)
    lacking = BlipConfig.from_pretrained(POCKET_WEIGHTS / "captioner")
    _random_blip(tmp_path / "lacking")
    lacking.save_pretrained(tmp_path / "lacking")  # says two layers, but the weights are of one
    with pytest.raises(IntegrityError, match=r"lacking: lacks weights of the model, such as text_decoder.bert"):
        load(model=str(tmp_path / "lacking")).prompts(0, 1)


def test_a_captioner_from_a_hub_is_pinned_and_read_once(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a hub on loopback, with pickled weights beside the plain ones, and then without the hub."""
    commit = commit_of("new")
    folder = tmp_path / "published"
    shutil.copytree(POCKET_WEIGHTS / "captioner", folder)
    (folder / "pytorch_model.bin").write_bytes(b"never asked for")
    with hub({"org/captioner": Repository({commit: folder}, {"main": commit})}) as served:
        point_at(served.url, tmp_path / "hub-cache", monkeypatch)
        strategy = load(model="org/captioner")
        prompts = strategy.prompts(0, 5)
        assert strategy.record()["model"] == f"org/captioner@{commit}"
        assert not [path for path in served.asked if "pytorch_model" in path]
    assert [prompt.text for prompt in prompts] == [prompt.text for prompt in load().prompts(0, 5)]
    shutil.rmtree(cache_folder())
    assert load(model=f"org/captioner@{commit}").prompts(0, 5) == prompts


def test_a_captioner_rests_and_tells_how_far_it_is(
    textures: Task, pictures: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROG_CACHE", str(tmp_path / "cache"))
    told: list[tuple[str, int, int]] = []
    settings = PromptSettings(strategy="image_captions")
    strategy = load_strategy(
        PromptSource(textures, pictures, settings, progress=lambda what, done, total: told.append((what, done, total)))
    )
    assert isinstance(strategy, HoldsModel)
    strategy.prompts(0, 1)
    held = weakref.ref(strategy._captioner)  # type: ignore[attr-defined]
    strategy.rest()
    gc.collect()
    assert held() is None
    strategy.prompts(1, 1)
    assert told == [("images captioned", 4, 35), ("images captioned", 9, 35)]  # one picture of five is another's copy
