"""The sampling loop against diffusers' own calls: the same images, for every UNet that it takes, and no others taken."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch import Tensor

from retrieve_or_generate.settings import SynthesizeSettings
from retrieve_or_generate.synthesize.unet import Unet
from retrieve_or_generate.synthesize.unet_loop import UnetLoop, fits_loop

from .builders import build

PROMPTS = ["a striped texture.", "the digit two.", "a striped texture."]
SEEDS = [7, 8, 9]
SIDE = 32
QUICK = SynthesizeSettings(num_inference_steps=4, guidance_scale=4.0)


@cache
def loaded(family: str) -> StableDiffusionPipeline:
    made = build(family)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(params=["sd1", "sd2"])
def pipeline(request: pytest.FixtureRequest) -> StableDiffusionPipeline:
    return loaded(request.param)


def sources() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


def asked(settings: SynthesizeSettings) -> dict[str, Any]:
    return {
        "generator": sources(),
        "num_inference_steps": settings.num_inference_steps,
        "guidance_scale": settings.guidance_scale,
        "eta": settings.eta,
        "negative_prompt": [settings.negative_prompt] * len(PROMPTS),
        "output_type": "pt",
    }


@torch.inference_mode()
def same(pipeline: StableDiffusionPipeline, settings: SynthesizeSettings) -> None:
    theirs = pipeline(PROMPTS, height=SIDE, width=SIDE, **asked(settings)).images
    ours = UnetLoop(pipeline).draw(PROMPTS, SEEDS, SIDE, settings)
    assert ours.shape == theirs.shape == (3, 3, SIDE, SIDE)
    assert theirs.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


def test_the_images_of_the_pipeline_itself(pipeline: StableDiffusionPipeline) -> None:
    same(pipeline, QUICK)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0, 1.5])
def test_without_guidance_and_with_little(pipeline: StableDiffusionPipeline, guidance_scale: float) -> None:
    same(pipeline, QUICK.model_copy(update={"guidance_scale": guidance_scale}))


def test_away_from_a_negative_prompt(pipeline: StableDiffusionPipeline) -> None:
    same(pipeline, QUICK.model_copy(update={"negative_prompt": "dotted fabric."}))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers and numpy 2
@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "DPMSolverMultistepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "UniPCMultistepScheduler",
    ],
)
def test_every_kind_of_scheduler(name: str) -> None:
    pipeline = loaded("sd1")
    before = pipeline.scheduler
    pipeline.scheduler = getattr(diffusers, name).from_config(dict(before.config) | {"clip_sample": False})
    try:
        same(pipeline, QUICK)
        image_to_image(pipeline, 0.6)
    finally:
        pipeline.scheduler = before


def test_noise_within_the_steps_comes_from_the_images_own_generators(pipeline: StableDiffusionPipeline) -> None:
    before = pipeline.scheduler
    pipeline.scheduler = DDIMScheduler.from_config(dict(before.config) | {"clip_sample": False})
    try:
        same(pipeline, QUICK.model_copy(update={"eta": 1.0}))
    finally:
        pipeline.scheduler = before


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_image_to_image(pipeline: StableDiffusionPipeline, strength: float) -> None:
    image_to_image(pipeline, strength)


@torch.inference_mode()
def image_to_image(pipeline: StableDiffusionPipeline, strength: float) -> None:
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    images = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    theirs = other(PROMPTS, image=images, strength=strength, **asked(QUICK)).images
    ours = UnetLoop(pipeline).redraw(images, PROMPTS, SEEDS, strength, QUICK)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


@torch.inference_mode()
def test_what_precedes_the_first_prompt_is_done_once(
    pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[str, int] = {}
    first = pipeline.unet.down_blocks[0]
    watched = {
        "conv_in": pipeline.unet.conv_in,
        "first convolution": first.resnets[0].conv1,
        "self-attention": first.attentions[0].transformer_blocks[0].attn1.to_out[0],
        "cross-attention": first.attentions[0].transformer_blocks[0].attn2.to_out[0],
        "keys": first.attentions[0].transformer_blocks[0].attn2.to_k,
    }
    calls = dict.fromkeys(watched, 0)
    handles = []
    for name, module in watched.items():

        def see(_: Any, given: tuple[Tensor, ...], name: str = name) -> None:
            rows[name] = len(given[0])
            calls[name] += 1

        handles.append(module.register_forward_pre_hook(see))
    try:
        UnetLoop(pipeline).draw(PROMPTS, SEEDS, SIDE, QUICK)
    finally:
        for handle in handles:
            handle.remove()
    steps = calls["conv_in"]
    assert steps >= QUICK.num_inference_steps
    assert rows == {"conv_in": 3, "first convolution": 3, "self-attention": 3, "cross-attention": 6, "keys": 16}
    assert calls["cross-attention"] == steps
    assert calls["keys"] == 2  # of the empty prompt, and of all others; not once a step


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_other_families_are_not_taken(family: str) -> None:
    assert not fits_loop(build(family))


def test_a_unet_with_anything_more_is_not_taken() -> None:
    assert fits_loop(build("sd1"))
    for change in (
        {"time_cond_proj_dim": 8},
        {"class_embed_type": "identity"},
        {"resnet_time_scale_shift": "scale_shift"},
    ):
        made = build("sd1")
        made.unet = type(made.unet)(**(dict(made.unet.config) | change))
        assert not fits_loop(made), change
    adapted = build("sd1")
    adapted.unet.set_attn_processor(diffusers.models.attention_processor.SlicedAttnProcessor(1))
    assert not fits_loop(adapted)
    subclass = build("sd1")
    subclass.__class__ = type("Other", (StableDiffusionPipeline,), {})
    assert not fits_loop(subclass)


@torch.inference_mode()
def test_half_the_bits_stay_near(pipeline: StableDiffusionPipeline) -> None:
    exact = UnetLoop(pipeline).draw(PROMPTS, SEEDS, SIDE, QUICK)
    halved = copy.deepcopy(pipeline).to(torch.bfloat16)
    rough = UnetLoop(halved).draw(PROMPTS, SEEDS, SIDE, QUICK)
    assert rough.dtype == torch.float32
    assert not torch.equal(rough, exact)
    assert (rough - exact).norm() / exact.norm() < 0.05


@torch.inference_mode()
def test_prompts_pass_through_a_memory_of_bounded_size(
    pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("retrieve_or_generate.synthesize.unet_loop._PROMPTS_KEPT", 4)
    loop = UnetLoop(pipeline)
    many = [f"picture {i}" for i in range(20)]
    states = loop._embed(many)
    assert len(loop._states) == 4
    torch.testing.assert_close(loop._embed(many[-1:]), states[-1:], rtol=0, atol=0)
    torch.testing.assert_close(loop._embed(many[3:5]), states[3:5], rtol=0, atol=1e-5)


@pytest.mark.slow
@torch.inference_mode()
def test_compiled_it_gives_the_same(pipeline: StableDiffusionPipeline) -> None:
    plain = UnetLoop(pipeline).draw(PROMPTS, SEEDS, SIDE, QUICK)
    torch.testing.assert_close(
        UnetLoop(pipeline, compiled=True).draw(PROMPTS, SEEDS, SIDE, QUICK), plain, rtol=0, atol=2e-4
    )


@pytest.mark.gpu
@torch.inference_mode()
def test_a_gpu_starts_from_the_noise_of_the_cpu(pipeline: StableDiffusionPipeline) -> None:
    here = UnetLoop(pipeline).draw(PROMPTS, SEEDS, SIDE, QUICK)
    try:
        there = UnetLoop(pipeline.to("cuda")).draw(PROMPTS, SEEDS, SIDE, QUICK).cpu()
    finally:
        pipeline.to("cpu")
    torch.testing.assert_close(there, here, rtol=0, atol=1e-2)


@pytest.mark.parametrize("side", [8, 9])  # 9 is halved to 5 and has to come back
def test_the_network_alone(pipeline: StableDiffusionPipeline, side: int) -> None:
    """Against `UNet2DConditionModel.forward`, both branches and one."""
    random = torch.Generator().manual_seed(3)
    x = torch.randn(2, 4, side, side, generator=random)
    states, empty = torch.randn(2, 16, 32, generator=random), torch.randn(1, 16, 32, generator=random)
    with torch.inference_mode():
        unet, time = Unet(pipeline.unet), torch.tensor([801])
        for nothing in (empty, None):
            contexts = states if nothing is None else torch.cat([empty, empty, states])
            rows = x if nothing is None else torch.cat([x, x])
            theirs = pipeline.unet(rows, time, contexts, return_dict=False)[0]
            ours = unet(x, unet.times(time), unet.guide(states, torch.arange(2), nothing))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
