"""The linear probe of 2406.05184 (section D.3 and its released code): a linear layer trained by AdamW.

Betas (0.9, 0.95), gradients clipped to norm 1, batches of 256, 200 warm-up updates, then half a cosine to zero over all others.
The released code counts batches of 512 for the schedule and trains on 256, so that its rate starts anew twice and runs past
the end of the cosine; here the schedule counts the batches that are trained on.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retrieve_or_generate.evaluate.probe import Features, Probe, check_training
from retrieve_or_generate.seeds import generator_for
from retrieve_or_generate.settings import ProbeSettings

WARMUP_UPDATES = 200


def fit_adamw(x: Features, y: np.ndarray, n_classes: int, settings: ProbeSettings, seed: int) -> Probe:
    """A layer for all `n_classes`, from `initial` weights, after `settings.epochs` passes over (n, d) features and their labels.

    `seed` gives the first weights and the order. Raises UsageError for what cannot be fitted.
    """
    check_training(x, y, n_classes)
    rows = x.float() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float32)
    labels = torch.tensor(y, dtype=torch.int64, device=rows.device)
    layer = [part.to(rows.device).requires_grad_() for part in initial(rows.shape[1], n_classes, seed)]
    decay, peak = settings.weight_decay, settings.learning_rate
    optimizer = torch.optim.AdamW(layer, lr=peak, betas=(0.9, 0.95), weight_decay=decay, fused=True)
    updates = settings.epochs * math.ceil(len(rows) / settings.batch_size)
    with torch.enable_grad():
        for update, batch in enumerate(_order(len(rows), settings, seed)):
            optimizer.param_groups[0]["lr"] = peak * share_of_peak(update, updates)
            optimizer.zero_grad()
            chosen = batch.to(rows.device)
            F.cross_entropy(torch.addmm(layer[1], rows[chosen], layer[0]), labels[chosen]).backward()
            torch.nn.utils.clip_grad_norm_(layer, 1.0)
            optimizer.step()
    weights, intercepts = (part.detach().double().cpu().numpy() for part in layer)
    return Probe(weights, intercepts, None)


def share_of_peak(update: int, updates: int) -> float:
    """Of the learning rate at `update` (0-based) of `updates`."""
    if update < WARMUP_UPDATES:
        return (update + 1) / WARMUP_UPDATES
    return (1 + math.cos(math.pi * (update - WARMUP_UPDATES) / (updates - WARMUP_UPDATES))) / 2


def initial(width: int, n_classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights (d, k) and intercepts (k,), uniform within 1/√d of 0, as torch's linear layers start."""
    rng, bound = generator_for("linear probe", "first weights", seed), width**-0.5
    weights, intercepts = (rng.uniform(-bound, bound, shape) for shape in ((width, n_classes), (n_classes,)))
    return torch.tensor(weights, dtype=torch.float32), torch.tensor(intercepts, dtype=torch.float32)


def _order(images: int, settings: ProbeSettings, seed: int) -> list[Tensor]:
    """Row numbers of one batch after another; every pass ends in what is left."""
    rng = generator_for("linear probe", "data order", seed)
    passes = (torch.from_numpy(rng.permutation(images)) for _ in range(settings.epochs))
    return [batch for order in passes for batch in order.split(settings.batch_size)]
