"""Trains the pocket Stable Diffusion: a text-conditional UNet over `PatchVAE` latents, on the pool's pictures and captions.

The text tower is the pocket CLIP's, frozen: trained jointly it lets the prompts of the digits collapse into one. The UNet
predicts the clean latents (`prediction_type="sample"`), which learned fastest of what was tried (docs/pocket.md).
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from retrieve_or_generate.pocket.patch_vae import PatchVAE
from retrieve_or_generate.pocket.places import SEED_STUDY
from retrieve_or_generate.pocket.tokenizer import CONTEXT_LENGTH
from retrieve_or_generate.pocket.train_clip import shifted
from retrieve_or_generate.seeds import seed_for


def text_tower(clip_folder: Path, captions: list[str]) -> tuple[CLIPTextModel, CLIPTokenizer]:
    """The pocket CLIP's text tower as a `CLIPTextModel` whose hidden states have mean 0 and variance 1 over `captions`.

    The standardisation is folded into the last layer norm, so it is part of the weights.
    """
    config = json.loads((clip_folder / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    state = {name: value.float() for name, value in load_file(clip_folder / "open_clip_model.safetensors").items()}
    tokenizer = CLIPTokenizer.from_pretrained(clip_folder)
    end = tokenizer.eos_token_id
    tower = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["width"],
            intermediate_size=4 * config["width"],
            num_hidden_layers=config["layers"],
            num_attention_heads=config["heads"],
            max_position_embeddings=config["context_length"],
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    ).eval()
    tower.load_state_dict(_as_transformers(state, config["layers"], tower.state_dict().keys()))
    with torch.no_grad():
        hidden = torch.cat([hidden_states(tower, tokenizer, part) for part in _parts(captions[:8192], 1024)]).flatten(
            0, 1
        )
        norm = next(module for name, module in tower.named_modules() if name.endswith("final_layer_norm"))
        deviation = hidden.std(0)
        norm.weight.div_(deviation)
        norm.bias.sub_(hidden.mean(0)).div_(deviation)
    return tower, tokenizer


def _as_transformers(state: dict[str, torch.Tensor], layers: int, expected: object) -> dict[str, torch.Tensor]:
    """open_clip's names and fused projections to those of `CLIPTextModel`."""
    prefix = "text_model." if any(str(name).startswith("text_model.") for name in expected) else ""  # type: ignore[attr-defined]
    out = {
        "embeddings.token_embedding.weight": state["token_embedding.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
        "final_layer_norm.weight": state["ln_final.weight"],
        "final_layer_norm.bias": state["ln_final.bias"],
    }
    renamed = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    renamed["attn.out_proj"] = "self_attn.out_proj"
    for layer in range(layers):
        source, target = f"transformer.resblocks.{layer}.", f"encoder.layers.{layer}."
        for kind in ("weight", "bias"):
            for theirs, ours in renamed.items():
                out[f"{target}{ours}.{kind}"] = state[f"{source}{theirs}.{kind}"]
            for part, value in zip("qkv", state[f"{source}attn.in_proj_{kind}"].chunk(3), strict=True):
                out[f"{target}self_attn.{part}_proj.{kind}"] = value
    return {prefix + name: value for name, value in out.items()}


def _parts(items: list[str], size: int) -> list[list[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@torch.inference_mode()
def hidden_states(tower: CLIPTextModel, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """(n, context, width) float32: what the UNet attends to."""
    tokens = tokenizer(captions, padding="max_length", max_length=CONTEXT_LENGTH, truncation=True, return_tensors="pt")
    return tower(tokens["input_ids"])[0].clone()


def whitening(context: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight (width, width) and bias of the linear map that gives (n, context, width) states covariance 1.

    The words of one task lie close together in CLIP's space; in the whitened one they are as far apart as any two words.
    """
    states = context.flatten(0, 1).double()
    mean = states.mean(0)
    variance, axes = torch.linalg.eigh((states - mean).T @ (states - mean) / len(states))
    weight = (axes / (variance + 1e-3 * variance.mean()).sqrt()).T
    return weight.float(), -(weight @ mean).float()


def make_unet(width: int) -> UNet2DConditionModel:
    """6.8 million parameters over 32×8×8 latents; attention only at 4×4, where it is cheap."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=32,
        out_channels=32,
        layers_per_block=1,
        block_out_channels=(96, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=5,  # diffusers' name for the number of heads
        norm_num_groups=16,
        use_linear_projection=True,
        addition_embed_type="text",
        encoder_hid_dim=width,
        encoder_hid_dim_type="text_proj",
    )


def make_scheduler() -> DDIMScheduler:
    """Cosine schedule that ends in pure noise, so that sampling may start there."""
    return DDIMScheduler(
        beta_schedule="squaredcos_cap_v2",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="sample",
        clip_sample=False,
        steps_offset=1,
    )


def make_pipeline(
    unet: UNet2DConditionModel, vae: PatchVAE, tower: CLIPTextModel, tokenizer: CLIPTokenizer
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=tower,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


class Trainer:
    """One training run of the UNet. `step` is a pure function of the state, so a checkpoint resumes where it stopped."""

    def __init__(
        self,
        images: np.ndarray,
        context: torch.Tensor,
        nothing: torch.Tensor,
        weights: np.ndarray,
        vae: PatchVAE,
        steps: int,
        batch_size: int = 64,
        learning_rate: float = 5e-4,
    ):
        """`images` (n, 32, 32, 3) uint8; `context` (n, context, width); `nothing` (context, width), the empty prompt's;
        `weights` (n,) how often each row is drawn relative to the others."""
        seed = seed_for(SEED_STUDY, "train generator")
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
        self.context, self.nothing, self.vae = context, nothing, vae
        self.weights = torch.from_numpy(weights).double()
        self.steps, self.batch_size, self.learning_rate, self.done = steps, batch_size, learning_rate, 0
        self.unet = make_unet(context.shape[-1]).to(memory_format=torch.channels_last)
        weight, bias = whitening(context[:4096])
        self.unet.encoder_hid_proj.load_state_dict({"weight": weight, "bias": bias})
        self.unet.set_attn_processor(AttnProcessor())  # fused attention is slower on a CPU for 16 positions
        self.average = copy.deepcopy(self.unet).requires_grad_(False).eval()
        self.optimizer = torch.optim.AdamW(
            self.unet.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.alphas = make_scheduler().alphas_cumprod

    def _rate(self) -> float:
        """Linear warm-up, a plateau, and a linear fall to zero over the last 35 %."""
        return self.learning_rate * min(
            (self.done + 1) / 200, 1.0, max((self.steps - self.done) / (0.35 * self.steps), 0.0)
        )

    def step(self) -> float:
        """One update of `batch_size` images; the loss."""
        g, b = self.generator, self.batch_size
        rows = torch.multinomial(self.weights, b, replacement=True, generator=g)
        pixels = shifted(self.pixels[rows], g, most=1) / 127.5 - 1
        with torch.no_grad():
            clean = self.vae.encode(pixels).latent_dist.mode()
        context = self.context[rows]
        context[torch.rand(b, generator=g) < 0.1] = self.nothing
        timesteps = torch.randint(0, len(self.alphas), (b,), generator=g)
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1)
        noise = torch.randn(clean.shape, generator=g)
        noisy = (alpha.sqrt() * clean + (1 - alpha).sqrt() * noise).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = self.unet(noisy, timesteps, encoder_hidden_states=context, return_dict=False)[0]
        weight = (1 / (1 - alpha)).clamp(max=5)
        loss = (weight * (predicted.float() - clean).square()).mean()
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        keep = min(0.999, (1 + self.done) / (10 + self.done))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.unet.parameters()), 1 - keep)
        return loss.item()

    def save(self, path: Path) -> None:
        """Everything that `step` depends on, so that a stopped training goes on as if it had not stopped."""
        state = {
            "unet": self.unet.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "done": self.done,
        }
        temporary = path.with_suffix(".part")
        torch.save(state, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.unet.load_state_dict(state["unet"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.done = state["done"]

    def run(self, checkpoint: Path, every: int, report: Callable[[Trainer, float], None]) -> None:
        """Train to the end, from `checkpoint` where it exists; save there and call `report` every `every` steps."""
        if checkpoint.exists():
            self.load(checkpoint)
        total, started, first = 0.0, time.monotonic(), self.done
        while self.done < self.steps:
            total += self.step()
            if self.done % every == 0 or self.done == self.steps:
                rate = (self.done - first) * self.batch_size / (time.monotonic() - started)
                print(
                    f"generator step {self.done}/{self.steps}  loss {total / every:.4f}  {rate:.0f} images/s",
                    flush=True,
                )
                total = 0.0
                self.save(checkpoint)
                report(self, rate)
