"""The verb `rog models`: names that can be given, and what stands behind one."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from kinds import make_model

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.models.listing import describe, model_names
from retrieve_or_generate.weights import clip_fingerprint


def test_names_are_those_that_are_taken() -> None:
    names = model_names()
    assert names[0] == "pocket"
    assert {"ViT-B-16/laion2b_s34b_b88k", "ViT-L-14-quickgelu/openai", "timm:resnet50.a1_in1k"} <= set(names)
    assert "ViT-L-14/openai" not in names
    assert len(names) == len(set(names))


def test_a_clip(tmp_path: Path) -> None:
    name = make_model("quickgelu", tmp_path)
    found = describe(name)
    weights = tmp_path / "quickgelu/open_clip_model.safetensors"
    assert (found["image_size"], found["embed_dim"], found["text_tower"], found["quick_gelu"]) == (32, 24, True, True)
    assert found["mean"] == [0.4, 0.5, 0.6]
    assert found["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert found["fingerprint"] == clip_fingerprint(name)


def test_a_classifier(tmp_path: Path) -> None:
    found = describe(make_model("test_resnet", tmp_path))
    assert (found["library"], found["text_tower"], found["classes"], found["image_size"]) == ("timm", False, 5, 160)


def test_what_is_no_model() -> None:
    with pytest.raises(UsageError, match="unknown model 'ViT-B-16'"):
        describe("ViT-B-16")
