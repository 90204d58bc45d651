"""How much of a prompt a generator reads: text towers cut what is too long for them, CLIP's after 77 tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from inspect import signature

from diffusers import DiffusionPipeline
from transformers import CLIPTokenizer, PreTrainedTokenizerBase


def unread_tokens(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> list[int]:
    """Tokens at the end of each prompt that no text tower of the pipeline is given; 0 where one of them reads it whole."""
    beyond = [
        [max(0, len(ids) - most) for ids in tokenizer(list(prompts), verbose=False)["input_ids"]]
        for tokenizer, most in _towers(pipeline)
    ]
    return [min(counts) for counts in zip(*beyond, strict=True)] if beyond else [0] * len(prompts)


def _towers(pipeline: DiffusionPipeline) -> Iterator[tuple[PreTrainedTokenizerBase, int]]:
    """The tokenizer of each text tower that is there, and how many tokens it is given.

    diffusers cuts for CLIP at what its tokenizer says, for any other tower at the `max_sequence_length` of the pipeline's call.
    """
    asked = signature(type(pipeline).__call__).parameters.get("max_sequence_length")
    for name, tokenizer in pipeline.components.items():
        tower = name.replace("tokenizer", "text_encoder")
        if not isinstance(tokenizer, PreTrainedTokenizerBase) or pipeline.components.get(tower) is None:
            continue
        by_call = asked is not None and isinstance(asked.default, int) and not isinstance(tokenizer, CLIPTokenizer)
        yield tokenizer, asked.default if asked is not None and by_call else int(tokenizer.model_max_length)
