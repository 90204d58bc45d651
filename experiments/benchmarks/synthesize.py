"""Images of prompts: the sampler of `rog synthesize` against diffusers, the same scheduler, steps, guidance and noise.

    python experiments/benchmarks/synthesize.py                              # pocket generator, CPU, one thread: a minute
    python experiments/benchmarks/synthesize.py --shape sd15 --device cuda   # Stable Diffusion 1.5's shape, random weights
    python experiments/benchmarks/synthesize.py --shape tiny --compiled      # the form of the line above, small, on a CPU

The rival named first is one prompt per call, in float32 on a CPU and float16 on a GPU; the other is diffusers at the best of the
`--rival-batches`, in the same type as the first. Ours runs in `--dtype`. The text tower, the autoencoder and the copy to the host
count on both sides. Arms alternate in one process; seconds are of CPU on a CPU, of the clock on a GPU; compiling is told apart.

Outputs are compared before times, as latents against diffusers in float32 from the same noise: `errors` are norms of differences
over norms of the reference. Ours is to have at most 1.25 times the error of diffusers itself in our type, and in float32 at most
1e-4. `of_matrix_product` is the share that ours reaches of the rate of a large product in our type, measured in the same call, in
diffusers' work for an image: two passes a step and the decoder. One JSON object comes last.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from retrieve_or_generate.models import plain_attention
from retrieve_or_generate.settings import SynthesizeSettings
from retrieve_or_generate.synthesize.pipelines import Pipeline, load_pipeline
from retrieve_or_generate.synthesize.sampler import Generator
from retrieve_or_generate.synthesize.unet_loop import UnetLoop
from retrieve_or_generate.weights import POCKET_WEIGHTS

NAMES = ("falcon", "digit two", "striped texture", "dotted fabric", "airliner", "digit nine", "woven basket", "glider")
TEMPLATES = (
    "a photo of the {}.",
    "a {}.",
    "a small {}.",
    "a blurry {}.",
    "the {} on grey.",
    "one {}.",
    "a large {}.",
    "{}",
)
SIZES: dict[str, dict[str, Any]] = {
    "pocket": {"side": 32, "steps": 8, "guidance": 3.0},
    "sd15": {"side": 512, "steps": 50, "guidance": 7.5},
    "tiny": {"side": 32, "steps": 5, "guidance": 7.5},
}


def build(shape: str) -> StableDiffusionPipeline:
    """The pocket generator, or one of random weights: of Stable Diffusion 1.5's shape, or of its plan with few channels."""
    if shape == "pocket":
        return load_pipeline("pocket", SynthesizeSettings()).text
    torch.manual_seed(0)
    large = shape == "sd15"
    width = 768 if large else 32
    unet = UNet2DConditionModel(
        sample_size=64 if large else 8,
        cross_attention_dim=width,
        block_out_channels=(320, 640, 1280, 1280) if large else (32, 32, 64, 64),
        norm_num_groups=32 if large else 8,
    )
    channels = (128, 256, 512, 512) if large else (16, 16, 16)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=32 if large else 8,
    )
    tower = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12 if large else 2,
        num_attention_heads=12 if large else 4,
        vocab_size=49408,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(tower).eval(),
        tokenizer=CLIPTokenizer.from_pretrained(POCKET_WEIGHTS / "stable-diffusion/tokenizer", model_max_length=77),
        unet=unet.eval(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class Bench:
    """Both sides, of the same weights."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.device = given, torch.device(given.device)
        self.settings = SynthesizeSettings(
            num_inference_steps=given.steps,
            guidance_scale=given.guidance,
            batch_size=given.batch_size,
            dtype=given.dtype,
            compile=given.compiled,
        )
        names = [template.format(name) for template in TEMPLATES for name in NAMES]
        self.prompts = [names[i % len(names)] for i in range(max(given.images, given.rival_images))]
        self.seeds = list(range(len(self.prompts)))
        self.rival = self._pipeline("float32" if self.device.type == "cpu" else "float16")
        self.ours = self._generator(given.dtype, given.compiled)

    def _pipeline(self, dtype: str) -> StableDiffusionPipeline:
        made = build(self.given.shape).to(self.device, getattr(torch, dtype))
        made.set_progress_bar_config(disable=True)
        return made

    def _generator(self, dtype: str, compiled: bool = False) -> Generator:
        settings = self.settings.model_copy(update={"dtype": dtype, "resolution": self.given.side, "compile": compiled})
        text = self._pipeline(dtype)
        return Generator(Pipeline(self.given.shape, "", text, None, self.given.side, 1, self.device, None), settings)

    def theirs(self, pipeline: StableDiffusionPipeline, rows: Sequence[int], output: str) -> Tensor:
        """diffusers' own call, from the noise of the images' seeds in float32."""
        side = self.given.side // pipeline.vae_scale_factor
        shape = (1, pipeline.unet.config.in_channels, side, side)
        noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(self.seeds[i])) for i in rows])
        return pipeline(
            [self.prompts[i] for i in rows],
            height=self.given.side,
            width=self.given.side,
            num_inference_steps=self.given.steps,
            guidance_scale=self.given.guidance,
            latents=noise.to(self.device, pipeline.unet.dtype),
            output_type=output,
        ).images.cpu()

    def calls(self, size: int) -> None:
        """The rival's images, `size` a call."""
        for start in range(0, self.given.rival_images, size):
            self.theirs(self.rival, range(start, min(start + size, self.given.rival_images)), "pt")

    def sampled(self) -> None:
        settings = self.ours.loaded_with
        self.ours.generate(self.prompts[: self.given.images], self.seeds[: self.given.images], settings)

    def seconds(self, work: Callable[[], None]) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        clock = time.process_time if self.device.type == "cpu" else time.perf_counter
        started = clock()
        work()
        return clock() - started

    @torch.inference_mode()
    def errors(self) -> dict[str, float]:
        """Latents of ours, and of diffusers in our type, against diffusers in float32."""
        count = min(self.given.exact_images, self.given.images)
        reference = self._pipeline("float32")
        exact = torch.cat([self.theirs(reference, [i], "latent").float() for i in range(count)])
        del reference
        eager = self._pipeline(self.given.dtype)
        arms = {"diffusers": self.theirs(eager, range(count), "latent").float()}
        del eager
        for name, generator in (("rog", self.ours), ("rog_float32", self._generator("float32"))):
            loop = generator._sampler
            assert isinstance(loop, UnetLoop)
            rows = [min(i, count - 1) for i in range(self.given.batch_size)] if name == "rog" else range(count)
            chosen = [self.prompts[i] for i in rows], [self.seeds[i] for i in rows]
            arms[name] = loop.latents(*chosen, self.given.side, self.settings)[:count].float().cpu()
        return {name: ((made - exact).norm() / exact.norm()).item() for name, made in arms.items()}

    @torch.inference_mode()
    def operations(self) -> float:
        """Of diffusers for one image: two passes a step, and the decoder."""
        unet, vae = self.rival.unet, self.rival.vae
        side, dtype = self.given.side // self.rival.vae_scale_factor, unet.dtype
        noise = torch.randn(2, unet.config.in_channels, side, side, device=self.device, dtype=dtype)
        words = torch.randn(2, 16, unet.config.cross_attention_dim, device=self.device, dtype=dtype)
        branches = 2 if self.given.guidance > 1 else 1
        with plain_attention(self.device):  # the counter knows products, not every fused kernel of a CPU
            with FlopCounterMode(display=False) as steps:
                unet(noise, 500, words)
            with FlopCounterMode(display=False) as decoded:
                vae.decode(noise[:1])
        return steps.get_total_flops() / 2 * branches * self.given.steps + decoded.get_total_flops()

    def ceiling(self, side: int) -> float:
        """Operations a second of a product of random matrices in our type."""
        a, b = (torch.randn(side, side, device=self.device).to(getattr(torch, self.given.dtype)) for _ in range(2))
        spent = [self.seconds(lambda: self._product(a, b)) for _ in range(8)][3:]
        return 2 * side**3 / median(spent)

    def _product(self, a: Tensor, b: Tensor) -> None:
        torch.mm(a, b)
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def compare(given: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(given)
    compiling = bench.seconds(bench.sampled)  # the first call
    errors = bench.errors()
    equal = errors["rog"] <= 1.25 * errors["diffusers"] and errors["rog_float32"] <= 1e-4
    print(f"errors {errors}: {'equal' if equal else 'FAIL, not equal'}", flush=True)
    tried = {size: bench.seconds(lambda size=size: bench.calls(size)) for size in given.rival_batches for _ in range(2)}
    best = min(tried, key=lambda size: tried[size])
    arms: dict[str, tuple[Callable[[], None], int]] = {
        "rog": (bench.sampled, given.images),
        "one_prompt_per_call": (lambda: bench.calls(1), given.rival_images),
        "best_batch": (lambda: bench.calls(best), given.rival_images),
    }
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(given.repeats):
        for name, (work, images) in arms.items():
            spent[name].append(bench.seconds(work) / images)
            print(f"{repeat + 1}/{given.repeats} {name}: {1e3 * spent[name][-1]:.1f} ms an image", flush=True)
    typical = {name: median(values) for name, values in spent.items()}
    ratios = [theirs / own for own, theirs in zip(spent["rog"], spent["one_prompt_per_call"], strict=True)]
    ceiling, operations = bench.ceiling(8192 if given.device == "cuda" else 1024), bench.operations()
    return {
        "name": "synthesize",
        "ratio": typical["one_prompt_per_call"] / typical["rog"],
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "outputs_equal": equal,
        "ratios": {name: typical[name] / typical["rog"] for name in arms if name != "rog"},
        "seconds_an_image": typical,
        "errors": errors,
        "rival_batch": best,
        "seconds_of_first_call": compiling,
        "matrix_product_per_second": ceiling,
        "operations_an_image": operations,
        "of_matrix_product": operations / typical["rog"] / ceiling,
        "size": vars(given),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SIZES, default="pocket")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", help="ours")
    parser.add_argument("--compiled", action="store_true", help="ours: torch compiles the UNet")
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--rival-batches", type=int, nargs="+", default=[8, 32])
    for name, default in (
        ("side", None),
        ("steps", None),
        ("images", 64),
        ("rival_images", 32),
        ("exact_images", 16),
        ("batch_size", 64),
        ("repeats", 5),
        ("threads", 1),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    given = parser.parse_args()
    for name, value in SIZES[given.shape].items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    torch.set_num_threads(given.threads)
    print(json.dumps(compare(given)))


if __name__ == "__main__":
    main()
