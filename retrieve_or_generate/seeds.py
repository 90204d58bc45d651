"""Seeds derived from names, so that adding an arm, a scale or a worker changes no other number."""

from __future__ import annotations

import hashlib

import numpy as np

Name = str | int | float


def seed_for(study: str, purpose: str, *names: Name) -> int:
    """A 63-bit seed that depends on nothing but the names given, in their order."""
    text = "\x1f".join([study, purpose, *(repr(name) for name in names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator_for(study: str, purpose: str, *names: Name) -> np.random.Generator:
    """A numpy generator seeded by `seed_for`."""
    return np.random.default_rng(seed_for(study, purpose, *names))
