"""The byte-pair tokenizer that the pocket CLIP and the pocket Stable Diffusion share, learned from the pool's captions."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, models, trainers
from transformers import CLIPTokenizer

CONTEXT_LENGTH = 16
_MERGES = 480


def train_tokenizer(captions: Iterable[str]) -> CLIPTokenizer:
    """CLIP's byte-pair scheme with a small vocabulary; the end-of-text id is the highest, as both text towers pool there."""
    empty = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    letters = empty.pre_tokenizer.pre_tokenize_str("".join(map(chr, range(33, 127))))
    alphabet = sorted({letter for piece, _ in letters for letter in piece})
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + _MERGES,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in _merges(learner)]
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(merge) for merge in merges)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    return json.loads(tokenizer.to_str())["model"]["merges"]
