"""What curation looks at: a row for each candidate that has an image."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from retrieve_or_generate.curate import perceptual
from retrieve_or_generate.curate.descriptor import Descriptor
from retrieve_or_generate.curate.near import Comparison, cosine_comparison, cosines
from retrieve_or_generate.settings import CurateSettings


@dataclass(frozen=True)
class Described:
    """Rows sorted by key. `features` are embeddings of unit length, `descriptors` what finds copies, `hashes` perceptual ones."""

    keys: np.ndarray
    labels: np.ndarray
    sha256: np.ndarray
    features: np.ndarray
    descriptors: np.ndarray
    hashes: np.ndarray
    scores: np.ndarray

    def take(self, rows: np.ndarray) -> Described:
        return Described(*(getattr(self, field.name)[rows] for field in fields(self)))

    def comparisons(self, settings: CurateSettings, descriptor: Descriptor, rows: np.ndarray) -> list[Comparison]:
        """Everything that can find copies among these rows, in this order. What is not precise needs the embeddings to agree."""
        features, descriptors = self.features[rows], self.descriptors[rows]
        confirming = cosines(features, features, settings.duplicate_cosine)
        by_descriptor = descriptor.comparison(descriptors, descriptors)
        found = [by_descriptor if descriptor.is_precise else by_descriptor.confirmed(confirming)]
        if settings.perceptual_hash_bits is not None:
            hashes = self.hashes[rows]
            by_hash = perceptual.comparison(hashes, hashes, settings.perceptual_hash_bits)
            found.append(by_hash.confirmed(confirming))
        if settings.semantic_cosine is not None:
            found.append(cosine_comparison(features, features, settings.semantic_cosine))
        return found
