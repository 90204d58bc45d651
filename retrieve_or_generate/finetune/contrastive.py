"""Fine-tuning as CLIP was pretrained: images against captions of their classes, both towers trained (FLYP, arXiv 2212.00638).

The head takes no part in it. It is re-built from the text tower whenever somebody looks, so zero-shot always is open_clip's own
classifier of the two towers as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.finetune.classifier import Classifier
from retrieve_or_generate.finetune.distributed import ALONE, World
from retrieve_or_generate.finetune.draws import Draws, sent
from retrieve_or_generate.models import Clip, ImageModel, plain_attention
from retrieve_or_generate.tasks.templates import as_functions

_LARGEST_LOGIT_SCALE = math.log(100)  # CLIP's own bound (2103.00020, section 2.5)


class Paired(Classifier):
    """A classifier with a copy of the text tower, whose state it holds under `text.`.

    Raises:
        UsageError: a model without a text tower, or no class names.
    """

    def __init__(
        self,
        clip: ImageModel,
        class_weights: Tensor,
        class_names: Sequence[str],
        templates: Sequence[str],
        precision: str = "float32",
    ):
        if not isinstance(clip, Clip):
            raise UsageError(f"finetune.loss=contrastive trains a text tower, and {clip.name} has none: cross_entropy")
        if not class_names or not templates:
            raise UsageError("finetune.loss=contrastive needs the class names and templates of the task")
        super().__init__(clip, class_weights, precision)
        network = clip.network
        self.text = copy.deepcopy(network, {id(network.visual): nn.Identity()}).requires_grad_(True)
        self.tokenizer, self.class_names, self.templates = clip.tokenizer, list(class_names), as_functions(templates)
        captions = [template(name) for name in self.class_names for template in self.templates]
        self.tokens = clip.tokenizer(captions).view(len(self.class_names), len(self.templates), -1)  # type: ignore[operator]

    def drawn_captions(self, labels: Tensor, draws: Draws) -> Tensor:
        """(b, l) int64 on the device: of each label, on the CPU, a caption of its class, by a template drawn there."""
        which = draws.integers(0, len(self.templates))
        return sent(self.tokens[labels, which], self.device)

    def caption_features(self, tokens: Tensor) -> Tensor:
        """(b, l) int64 to (b, d) float32, unit length."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            embedded = self.text.encode_text(tokens)
        return F.normalize(embedded.float(), dim=1)

    def contrast(
        self, images: Tensor, captions: Tensor, weights: Tensor | None = None, tune_scale: bool = True
    ) -> Tensor:
        """CLIP's loss on (b, d) unit features: each image finds its caption among the batch's, and each caption its image.

        `weights` (b,) say what each pair counts, by default all the same. Of processes that add up their gradients, one is to
        `tune_scale`: all of them have the whole loss.
        """
        scale = self.text.logit_scale if tune_scale else self.text.logit_scale.detach()
        logits = scale.exp() * images @ captions.T
        own = torch.arange(len(images), device=images.device)
        if weights is None:
            return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
        each = F.cross_entropy(logits, own, reduction="none") + F.cross_entropy(logits.T, own, reduction="none")
        return each @ weights / 2

    def losses_in_passes(
        self,
        pixels: Tensor,
        tokens: Tensor,
        most: int,
        parts: list[Tensor],
        count: int,
        weights: Tensor | None = None,
        world: World = ALONE,
    ) -> Iterator[Tensor]:
        """Losses whose gradients add up to that of the whole batch, with at most `most` images in the network at once.

        The loss looks across images, so features of all come first, then the gradient through them pass by pass (GradCache,
        arXiv 2101.06983). Of a batch of `count`, `pixels` and `tokens` are the share of this process; the features of the
        others are as constant to it as its own are to them. The value of the loss goes to `parts` of the first.
        """
        whole = 0 < len(pixels) <= most
        with nullcontext() if whole else torch.no_grad():
            images, captions = self._rows(self.features, pixels, most), self._rows(self.caption_features, tokens, most)
        if not whole:
            images.requires_grad_()
            captions.requires_grad_()
        loss = self.contrast(world.among(images, count), world.among(captions, count), weights, world.first)
        if world.first:
            parts.append(loss.detach())
        yield loss
        if whole or not len(pixels):
            return
        assert images.grad is not None
        assert captions.grad is not None
        for part, gradient in zip(pixels.split(most), images.grad.split(most), strict=True):
            yield (self.features(part) * gradient).sum()
        for part, gradient in zip(tokens.split(most), captions.grad.split(most), strict=True):
            yield (self.caption_features(part) * gradient).sum()

    def _rows(self, encode: Callable[[Tensor], Tensor], inputs: Tensor, most: int) -> Tensor:
        """(b, d) features of `inputs`, of which there may be none, `most` at once."""
        if not len(inputs):
            return torch.zeros(0, self.head.in_features, device=self.device)
        return torch.cat([encode(part) for part in inputs.split(most)])

    @torch.no_grad()
    def bound_scale(self) -> None:
        """After an update, as CLIP does: logits are multiplied by 100 at most."""
        self.text.logit_scale.clamp_(max=_LARGEST_LOGIT_SCALE)

    @torch.no_grad()
    def rebuild_head(self) -> None:
        """Make the head the zero-shot classifier of the text tower as it is."""
        with plain_attention(self.device):
            weights = open_clip.build_zero_shot_classifier(
                self.text, self.tokenizer, self.class_names, self.templates, device=self.device
            )
        self.head.weight.copy_(weights.float().T * self.text.logit_scale.exp())
