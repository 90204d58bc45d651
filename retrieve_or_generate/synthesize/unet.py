"""Stable Diffusion's UNet as sampling needs it: the values of diffusers' `UNet2DConditionModel`, with nothing worked out twice.

What a prompt gives the network (keys and values of every cross-attention) is computed once per prompt and not once per step; the
empty prompt's once for all images; what a time step gives, once for all images. Both branches of classifier-free guidance are one
tensor until the prompt first enters. Layouts follow the device: normalisations over contiguous planes and convolutions over
channels last on a CPU, channels last throughout elsewhere. The weights stay those of the module that was given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UNetMidBlock2DCrossAttn", "UpBlock2D", "CrossAttnUpBlock2D"}
_PROMPTS_AT_ONCE = 16
_FEW_POSITIONS = 64  # up to here two products are faster on a CPU than the fused kernel
# Options of a UNet2DConditionModel that change what its forward pass does, with the values that this file knows.
_KNOWN: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu",),
    "addition_embed_type": (None, "text"),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim_type": (None, "text_proj"),
    "mid_block_only_cross_attention": (None, False),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "resnet_skip_time_act": (False,),
    "resnet_time_scale_shift": ("default",),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",),
    "timestep_post_act": (None,),
}


def fits(network: Any) -> bool:
    """Whether `network` is a UNet of Stable Diffusion 1's or 2's family, without adapters: whether `Unet` gives its values."""
    if type(network) is not UNet2DConditionModel or network.mid_block is None:
        return False
    options = all(network.config.get(name, known[0]) in known for name, known in _KNOWN.items())
    blocks = (*network.down_blocks, network.mid_block, *network.up_blocks)
    attention = {type(processor) for processor in network.attn_processors.values()}
    plain = all(type(m).__module__.startswith(("diffusers.", "torch.")) for m in network.modules())
    return (
        options
        and plain
        and {type(b).__name__ for b in blocks} <= _BLOCKS
        and attention <= {AttnProcessor, AttnProcessor2_0}
    )


@dataclass(frozen=True)
class Guide:
    """What the prompts of a batch give the network at every step. The unguided branch, where there is one, comes first."""

    branches: int  # 2 with classifier-free guidance, else 1
    added: Tensor | None  # (branches × n, time width): what the prompts add to the time embedding
    keys: tuple[
        tuple[Tensor, ...], ...
    ]  # of each cross-attention: keys and values (images or 1, heads, tokens, d) of each branch


class Unet:
    """The network of `module`, which must fit; weights of any type, on any device."""

    def __init__(self, module: UNet2DConditionModel):
        assert fits(module)
        self._module = module
        self._adds = module.config.addition_embed_type is not None
        self._down = [_Block(block) for block in module.down_blocks]
        self._mid = _Block(module.mid_block)
        self._up = [_Block(block) for block in module.up_blocks]
        residuals = [residual for block in self._blocks for residual in block.residuals]
        self._shift_weight = torch.cat([residual.module.time_emb_proj.weight for residual in residuals])
        self._shift_bias = torch.cat([residual.module.time_emb_proj.bias for residual in residuals])
        self._shift_sizes = [residual.module.out_channels for residual in residuals]

    @property
    def _blocks(self) -> Iterator[_Block]:
        yield from (*self._down, self._mid, *self._up)

    def guide(self, states: Tensor, rows: Tensor, empty: Tensor | None) -> Guide:
        """Of `states` (prompts, tokens, width), each image's prompt being a row of it in `rows` (n,); `empty` (1, tokens, width)
        is what guidance leads away from, None without guidance."""
        parts = [self._of_prompts(states, rows)]
        if empty is not None:
            parts.insert(0, self._of_prompts(empty, rows.new_zeros(1)))
        added = torch.cat([part[0].expand(len(rows), -1) for part in parts])
        keys = tuple(tuple(given for part in parts for given in part[i : i + 2]) for i in range(1, len(parts[0]), 2))
        return Guide(len(parts), added if self._adds else None, keys)

    def _of_prompts(self, states: Tensor, rows: Tensor) -> list[Tensor]:
        """For each of `rows`, what its prompt adds to the time, then keys and values of every cross-attention in turn.

        So many prompts at once as always, repeating the last: a prompt's bits do not depend on how many stand beside it.
        """
        filled = torch.cat([states, states[-1:].expand(-len(states) % _PROMPTS_AT_ONCE, -1, -1)])
        parts = [self._of_a_few(part) for part in filled.split(_PROMPTS_AT_ONCE)]
        return [torch.cat(part)[rows] for part in zip(*parts, strict=True)]

    def _of_a_few(self, states: Tensor) -> list[Tensor]:
        added = self._module.add_embedding(states) if self._adds else states.new_zeros(len(states), 0)
        if self._module.encoder_hid_proj is not None:
            states = self._module.encoder_hid_proj(states)
        layers = [layer for block in self._blocks for transformer in block.transformers for layer in transformer.layers]
        return [added, *(part for layer in layers for part in layer.keys(states))]

    def times(self, timesteps: Tensor) -> Tensor:
        """(steps,) of a scheduler to (steps, time width), what the network makes of each."""
        embedded = self._module.time_proj(timesteps).to(self._shift_weight.dtype)
        return self._module.time_embedding(embedded)

    def __call__(self, x: Tensor, time: Tensor, guide: Guide) -> Tensor:
        """(n, channels, h, w) latents and one row (1, time width) of `times` to the prediction, (branches × n, channels, h, w)."""
        shifts = self._shifts(time, guide)
        keys = iter(guide.keys)
        x = self._module.conv_in(_channels_last(x.to(self._shift_weight.dtype)))
        skips = [x]
        for block in self._down:
            x = block.down(x, shifts, keys, guide.branches, skips)
        x = self._mid.middle(x, shifts, keys, guide.branches)
        for block in self._up:
            x = block.up(x, shifts, keys, guide.branches, skips)
        x = _normed(self._module.conv_norm_out, x, activate=True)
        return self._module.conv_out(x)

    def _shifts(self, time: Tensor, guide: Guide) -> Iterator[Tensor]:
        """What the time adds to the channels of each residual block, (1 or branches × n, channels) each."""
        embedded = F.silu(time if guide.added is None else time + guide.added)
        return iter(F.linear(embedded, self._shift_weight, self._shift_bias).split(self._shift_sizes, dim=1))


class _Block:
    """A down, middle or up block: residual blocks, each but the middle's first followed by a transformer where there are any."""

    def __init__(self, module: Any):
        self.residuals = [_Residual(residual) for residual in module.resnets]
        self.transformers = [_Transformer(transformer) for transformer in getattr(module, "attentions", ())]
        self._smaller = getattr(module, "downsamplers", None)
        self._larger = getattr(module, "upsamplers", None)

    def down(
        self, x: Tensor, shifts: Iterator[Tensor], keys: Iterator[Any], branches: int, skips: list[Tensor]
    ) -> Tensor:
        for i, residual in enumerate(self.residuals):
            x = residual(x, next(shifts))
            if self.transformers:
                x = self.transformers[i](x, keys, branches)
            skips.append(x)
        for smaller in self._smaller or ():
            x = smaller(x)
            skips.append(x)
        return x

    def middle(self, x: Tensor, shifts: Iterator[Tensor], keys: Iterator[Any], branches: int) -> Tensor:
        x = self.residuals[0](x, next(shifts))
        for transformer, residual in zip(self.transformers, self.residuals[1:], strict=True):
            x = residual(transformer(x, keys, branches), next(shifts))
        return x

    def up(
        self, x: Tensor, shifts: Iterator[Tensor], keys: Iterator[Any], branches: int, skips: list[Tensor]
    ) -> Tensor:
        for i, residual in enumerate(self.residuals):
            x = residual(torch.cat([x, _in_rows(skips.pop(), len(x))], dim=1), next(shifts))
            if self.transformers:
                x = self.transformers[i](x, keys, branches)
        for larger in self._larger or ():
            x = larger.conv(F.interpolate(x, size=skips[-1].shape[-2:], mode="nearest"))
        return x


class _Residual:
    """A `ResnetBlock2D`."""

    def __init__(self, module: Any):
        self.module = module

    def __call__(self, x: Tensor, shift: Tensor) -> Tensor:
        """`shift` (1 or rows, channels); a row for each branch and image where `x` has one for each image spreads it."""
        h = self.module.conv1(_normed(self.module.norm1, x, activate=True))
        rows = max(len(x), len(shift))
        h = _in_rows(h, rows) + shift[:, :, None, None]
        h = self.module.conv2(_normed(self.module.norm2, h, activate=True))
        if self.module.conv_shortcut is not None:
            x = self.module.conv_shortcut(x)
        return _in_rows(x, rows) + h


class _Transformer:
    """A `Transformer2DModel`: layers of self-attention, cross-attention and a gated product over all positions."""

    def __init__(self, module: Any):
        self.module = module
        self.layers = [_Layer(layer) for layer in module.transformer_blocks]
        self._into, self._out = (_as_linear(conv) for conv in (module.proj_in, module.proj_out))

    def __call__(self, x: Tensor, keys: Iterator[Any], branches: int) -> Tensor:
        _, channels, height, width = x.shape
        t = _normed(self.module.norm, x).permute(0, 2, 3, 1).reshape(len(x), height * width, channels)
        t = F.linear(t, *self._into)
        for layer in self.layers:
            t = layer(t, next(keys), branches)
        t = F.linear(t, *self._out).view(len(t), height, width, channels)
        return t.permute(0, 3, 1, 2) + _in_rows(x, len(t))


class _Layer:
    """A `BasicTransformerBlock`."""

    def __init__(self, module: Any):
        self._module = module
        own, gate = module.attn1, module.ff.net[0].proj
        self._qkv = torch.cat([own.to_q.weight, own.to_k.weight, own.to_v.weight])
        self._value, self._gate = zip(gate.weight.chunk(2), gate.bias.chunk(2), strict=True)

    def keys(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `states` (prompts, tokens, width) for cross-attention, (prompts, heads, tokens, d) each."""
        attention = self._module.attn2
        parts = (attention.to_k(states), attention.to_v(states))
        return tuple(part.unflatten(-1, (attention.heads, -1)).transpose(1, 2).contiguous() for part in parts)

    def __call__(self, t: Tensor, keys: Sequence[Tensor], branches: int) -> Tensor:
        t = t + self._attend_to_itself(self._module.norm1(t))
        t = _in_rows(t, len(t) * branches // _branches_in(t, keys, branches))
        t = t + self._attend_to_prompt(self._module.norm2(t), keys)
        normed = self._module.norm3(t)
        gated = F.linear(normed, *self._value).mul_(F.gelu(F.linear(normed, *self._gate)))
        return t + self._module.ff.net[2](gated)

    def _attend_to_itself(self, t: Tensor) -> Tensor:
        own = self._module.attn1
        q, k, v = (
            F.linear(t, self._qkv).unflatten(-1, (3, own.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (n, heads, positions, d)
        return own.to_out[0](_attention(q, k, v).transpose(1, 2).flatten(2))

    def _attend_to_prompt(self, t: Tensor, keys: Sequence[Tensor]) -> Tensor:
        """Queries that share their keys, as those of the unguided branch do, are one long row of queries."""
        attention = self._module.attn2
        queries = attention.to_q(t).unflatten(-1, (attention.heads, -1))  # (rows, positions, heads, d)
        images = len(keys[-1])
        found = [self._of_prompt(queries[-images:], *keys[-2:])]
        if len(keys) == 4:
            alike = queries[:-images].flatten(0, 1)[None]  # (1, n × positions, heads, d)
            found.insert(0, self._of_prompt(alike, *keys[:2]).unflatten(1, (images, -1))[0])
        return attention.to_out[0](torch.cat(found).flatten(2))

    @staticmethod
    def _of_prompt(queries: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attention(queries.transpose(1, 2), k, v).transpose(1, 2)


def _branches_in(t: Tensor, keys: Sequence[Tensor], branches: int) -> int:
    """How many branches `t` holds already: its rows over the number of images."""
    return len(t) // len(keys[-1]) if branches > 1 else 1


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v of (n, heads, positions, d)."""
    if q.device.type != "cpu" or k.shape[2] > _FEW_POSITIONS:
        return F.scaled_dot_product_attention(q, k, v)
    shape, scale = q.shape, q.shape[-1] ** -0.5
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    if shape[2] > k.shape[1]:  # many queries of few keys: the long side last, along which a CPU works at once
        scores = torch.baddbmm(q.new_empty(()), k, q.transpose(1, 2), beta=0, alpha=scale)
        return torch.bmm(scores.softmax(1).transpose(1, 2), v).view(shape)
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    return torch.bmm(scores.softmax(-1, dtype=torch.float32).to(q.dtype), v).view(shape)


def _normed(norm: nn.GroupNorm, x: Tensor, activate: bool = False) -> Tensor:
    """Group normalisation, then SiLU if asked. On a CPU torch's kernel for channels last takes ten times that for planes."""
    planes = x.contiguous() if x.device.type == "cpu" else x
    normed = F.group_norm(planes, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return _channels_last(F.silu(normed) if activate else normed)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _in_rows(x: Tensor, rows: int) -> Tensor:
    """`x` once for every branch, where there are more branches than it holds."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))


def _as_linear(module: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a linear map, or of a convolution of one pixel."""
    return module.weight.flatten(1), module.bias
