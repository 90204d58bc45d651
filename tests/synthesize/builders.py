"""Pipelines of every supported family, tiny and randomly initialised: the same classes as the published ones, no weights of theirs.

All share the pocket tokenizer (CLIP's byte pairs, 16 tokens) and make images of at least 16 pixels. `BUILDERS[family]()` gives one;
`save(family, folder)` writes it as a user has it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from retrieve_or_generate.weights import POCKET_WEIGHTS

WIDTH = 32
# What the published SD 1.x and 2.x configurations say of noise.
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_LEADING = {"steps_offset": 1, "set_alpha_to_one": False}


def _tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(POCKET_WEIGHTS / "stable-diffusion" / "tokenizer")


def _t5_tokenizer() -> T5Tokenizer:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789.,"]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=16)


def _text_config(**changes: Any) -> CLIPTextConfig:
    given = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": 711, "bos_token_id": 709, "eos_token_id": 710, "pad_token_id": 710}
    return CLIPTextConfig(**(given | ids | {"max_position_embeddings": 16, "projection_dim": WIDTH} | changes))


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=64,
            d_model=2 * WIDTH,
            d_kv=8,
            d_ff=WIDTH,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )


def _vae(latent_channels: int = 4, blocks: int = 3, **changes: Any) -> AutoencoderKL:
    """Sides divided by 2 to the power of `blocks` - 1."""
    return AutoencoderKL(
        block_out_channels=(16,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=32,
        **changes,
    )


def _unet(**changes: Any) -> UNet2DConditionModel:
    """SD 1.5's plan with two levels: cross-attention above, none below."""
    given: dict[str, Any] = {
        "block_out_channels": (16, WIDTH),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
        "sample_size": 8,
    }
    return UNet2DConditionModel(**(given | changes))


def safety_checker() -> StableDiffusionSafetyChecker:
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        vision_config=vision | {"image_size": 32, "patch_size": 8, "projection_dim": 8}, projection_dim=8
    )
    checker = StableDiffusionSafetyChecker(config)
    with torch.no_grad():
        checker.concept_embeds.copy_(torch.randn(17, 8))
        checker.special_care_embeds.copy_(torch.randn(3, 8))
        checker.concept_embeds_weights.fill_(0.5)
    return checker


def sd1(checker: bool = False) -> StableDiffusionPipeline:
    """Stable Diffusion 1.1 to 1.5."""
    processor = (
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}) if checker else None
    )
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config()),
        tokenizer=_tokenizer(),
        unet=_unet(),
        scheduler=PNDMScheduler(**_BETAS, **_LEADING, skip_prk_steps=True),
        safety_checker=safety_checker() if checker else None,
        feature_extractor=processor,
        requires_safety_checker=checker,
    )


def sd2() -> StableDiffusionPipeline:
    """Stable Diffusion 2.1: predicts v, OpenCLIP's text tower (exact gelu), a head size per level, linear projections."""
    return StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=CLIPTextModel(_text_config(hidden_act="gelu", pad_token_id=0)),
        tokenizer=_tokenizer(),
        unet=_unet(attention_head_dim=(2, 4), use_linear_projection=True, upcast_attention=True),
        scheduler=DDIMScheduler(**_BETAS, **_LEADING, prediction_type="v_prediction", clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL: two text towers, size and crop as further conditions, a VAE that float16 overflows."""
    return StableDiffusionXLPipeline(
        vae=_vae(force_upcast=True),
        text_encoder=CLIPTextModel(_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(hidden_act="gelu")),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=_unet(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + WIDTH,
            cross_attention_dim=2 * WIDTH,
        ),
        scheduler=EulerDiscreteScheduler(**_BETAS, steps_offset=1, timestep_spacing="leading"),
    )


def sd3() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 and 3.5: a transformer of two streams, three text towers, flow matching."""
    return StableDiffusion3Pipeline(
        vae=_vae(latent_channels=16, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModelWithProjection(_text_config()),
        text_encoder_2=CLIPTextModelWithProjection(_text_config(hidden_act="gelu")),
        text_encoder_3=_t5(),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        tokenizer_3=_t5_tokenizer(),
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=2 * WIDTH,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux() -> FluxPipeline:
    """FLUX.1-dev: packed latents, a CLIP and a T5 tower, guidance as a condition. Trained at 128 latents a side, by its class."""
    return FluxPipeline(
        vae=_vae(shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=CLIPTextModel(_text_config()),
        text_encoder_2=_t5(),
        tokenizer=_tokenizer(),
        tokenizer_2=_t5_tokenizer(),
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


BUILDERS: dict[str, Callable[[], DiffusionPipeline]] = {"sd1": sd1, "sd2": sd2, "sdxl": sdxl, "sd3": sd3, "flux": flux}


def build(family: str, **arguments: Any) -> DiffusionPipeline:
    """The pipeline of a family in evaluation mode, the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = BUILDERS[family](**arguments)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipeline


def save(family: str, folder: Path, **arguments: Any) -> Path:
    """Write the pipeline of a family to `folder`, which is given back."""
    build(family, **arguments).save_pretrained(folder)
    return folder


def as_published(folder: Path) -> Path:
    """Give a saved `sd1` with a checker the names of 2022's libraries, as Stable Diffusion 1.1 to 1.5 are published with."""
    ids = torch.arange(16).unsqueeze(0)
    text, checker = folder / "text_encoder/model.safetensors", folder / "safety_checker/model.safetensors"
    _rename(text, lambda key: f"text_model.{key}", {"text_model.embeddings.position_ids": ids})
    _rename(
        checker,
        lambda key: key.replace("vision_model.", "vision_model.vision_model."),
        {"vision_model.vision_model.embeddings.position_ids": ids},
    )
    _rename(folder / "vae/diffusion_pytorch_model.safetensors", _old_attention, {})
    _edit(
        folder / "model_index.json",
        feature_extractor=["transformers", "CLIPFeatureExtractor"],
        _diffusers_version="0.6.0",
    )
    (folder / "feature_extractor/preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": 32,
                "do_center_crop": True,
                "do_convert_rgb": True,
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "resample": 3,
                "size": 32,
            }
        )
    )
    _edit(folder / "vae/config.json", _diffusers_version="0.6.0")
    _spread_tokenizer(folder / "tokenizer")
    return folder


def _spread_tokenizer(folder: Path) -> None:
    """As vocabulary, merges and special tokens, each in a file of its own."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    for path in folder.iterdir():
        path.unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{one} {other}\n" for one, other in model["merges"])
    )
    word = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special = {name: word | {"content": content} for name, content in names.items()} | {"pad_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    own = {name: word | {"__type": "AddedToken", "content": content} for name, content in names.items()}
    settings = {"add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 16}
    named = {
        "name_or_path": "openai/clip-vit-large-patch14",
        "tokenizer_class": "CLIPTokenizer",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(own | settings | named))


def _old_attention(key: str) -> str:
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        key = key.replace(f".{new}.", f".{old}.")
    return key


def _rename(path: Path, old: Callable[[str], str], more: dict[str, torch.Tensor]) -> None:
    tensors = {old(key): value.clone() for key, value in load_file(path).items()}
    save_file(tensors | more, path, {"format": "pt"})


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
