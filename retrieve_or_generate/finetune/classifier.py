"""CLIP as a classifier: a copy of the image tower, unit features, and a linear head that starts as the zero-shot classifier."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from retrieve_or_generate.finetune.data import Pixels
from retrieve_or_generate.finetune.distributed import ALONE, World
from retrieve_or_generate.finetune.feed import in_order
from retrieve_or_generate.models import ImageModel, plain_attention
from retrieve_or_generate.precision import native


class Classifier(nn.Module):
    """Logits = unit features · (class weights × logit scale) + bias, with bias 0 at first: open_clip's zero-shot logits.

    The tower stays in evaluation mode while it is trained: no dropout, and batch norms keep CLIP's statistics, which a small
    training set would spoil. With `precision` bfloat16, products inside the tower are taken in that type (`native`), weights stay
    float32.
    """

    def __init__(self, clip: ImageModel, class_weights: Tensor, precision: str = "float32"):
        super().__init__()
        self.tower = copy.deepcopy(clip.tower).eval().requires_grad_(True)
        dim, classes = class_weights.shape
        self.head = nn.Linear(dim, classes, device=class_weights.device)
        with torch.no_grad():
            self.head.weight.copy_(class_weights.T * clip.logit_scale)
            self.head.bias.zero_()
        self.normalise, self.image_size = clip.normalise, clip.image_size
        self.precision = native(precision, clip.device)
        self.embedding = class_token_embedding

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def features(self, pixels: Tensor, once: bool = False) -> Tensor:
        """(b, 3, s, s) uint8 or float in [0, 1] to (b, d) float32, unit length. So many images are seen `once`: not compiled."""
        embedding = class_token_embedding if once else self.embedding
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            embedded = embedding(self.tower, self.normalise(pixels))
        return F.normalize(embedded.float(), dim=1)

    def compile_tower(self) -> None:
        """From now on the tower runs compiled, once for each number of images; it is compiled when it is first used."""
        self.embedding = torch.compile(class_token_embedding, dynamic=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(b, 3, s, s) uint8 or float in [0, 1] to (b, k) float32 logits."""
        return self.head(self.features(pixels))


def class_token_embedding(tower: nn.Module, pixels: Tensor) -> Tensor:
    """What `tower(pixels)` gives, (b, d), without the last block's work on tokens that nothing reads.

    A vision transformer pooled at its class token reads one token of its last block; the others serve there as keys and values
    only. With four blocks that is a fifth of all arithmetic. Other towers run as they are.
    """
    if not _reads_class_token_only(tower):
        output = tower(pixels)
        return output[0] if isinstance(output, tuple) else output
    assert isinstance(tower, VisionTransformer)
    tokens = tower._embeds(pixels)  # (b, t, width)
    *blocks, last = tower.transformer.resblocks
    for block in blocks:
        tokens = block(tokens)
    normed = last.ln_1(tokens)
    token = tokens[:, :1] + last.ls_1(last.attention(normed[:, :1], normed, normed))
    token = token + last.ls_2(last.mlp(last.ln_2(token)))
    return tower.ln_post(token[:, 0]) @ tower.proj


def _reads_class_token_only(tower: nn.Module) -> bool:
    """Whether `tower` is the plain open_clip transformer whose parts `class_token_embedding` calls one by one."""
    return (
        isinstance(tower, VisionTransformer)
        and tower.pool_type == "tok"
        and tower.attn_pool is None
        and tower.proj is not None
        and not tower.output_tokens
        and tower.transformer.batch_first
        and all(type(block) is ResidualAttentionBlock for block in tower.transformer.resblocks)
    )


@torch.inference_mode()
def features_of(classifier: Classifier, images: Pixels, batch_size: int = 128, world: World = ALONE) -> Tensor:
    """(n, 3, s, s) uint8 to (n, d) float32, unit length, on the classifier's device, in row order.

    In a `world` each process takes whole batches, so the bits are those of one process. The rows come to lie on the first; the
    others have none.
    """
    lengths = [min(batch_size, len(images) - start) for start in range(0, len(images), batch_size)]
    rows = [torch.zeros(0, classifier.head.in_features, device=classifier.device)]
    with plain_attention(classifier.device):
        batches = in_order(images, batch_size, classifier.device, world.part(len(lengths)))
        rows += [classifier.features(batch, once=len(batch) < batch_size) for batch in batches]
    shares = [sum(lengths[world.part(len(lengths), rank)]) for rank in range(world.size)]
    return world.on_first(torch.cat(rows), shares)
