"""A causal language model that completes texts, one line each, by nucleus sampling with numbers of each text's own.

transformers' own sampling draws for a whole batch from one stream, so that a sentence would depend on its neighbours. Here each
text brings its own uniform numbers, one a token, and the token that a number falls on is all that `generate` may choose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from retrieve_or_generate.errors import IntegrityError, UsageError
from retrieve_or_generate.synthesize.prompts.pretrained import load_text_model, quietly
from retrieve_or_generate.text_models import TextModelFiles
from retrieve_or_generate.weights import first_line

MOST_TOKENS = 100
"""Of a completion (appendix C.1 of 2406.05184)."""


class Nucleus(LogitsProcessor):
    """Leaves the one token that each row's next number falls on among the likeliest, as many as hold `top_p` of the probability.

    `numbers` (rows, tokens) in [0, 1).
    """

    def __init__(self, numbers: np.ndarray, temperature: float, top_p: float):
        self._numbers, self._temperature, self._top_p = torch.from_numpy(numbers), temperature, top_p
        self._token = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) scores to 0 at the token chosen and -inf elsewhere."""
        ordered, places = torch.sort(scores.double() / self._temperature, descending=True, stable=True)
        reached = ordered.softmax(-1).cumsum(-1)
        inside = (
            (reached < self._top_p).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
        )  # the last one that counts
        number = self._numbers[:, self._token, None].to(scores.device) * reached.gather(-1, inside)
        self._token += 1
        chosen = torch.minimum((reached <= number).sum(-1, keepdim=True), inside)
        return torch.full_like(scores, -torch.inf).scatter(-1, places.gather(-1, chosen), 0.0)


class _LineEnds(StoppingCriteria):
    """A row is done once its last token holds a line break."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._known: dict[int, bool] = {}

    def _breaks(self, token: int) -> bool:
        if token not in self._known:
            self._known[token] = "\n" in self._tokenizer.decode([token])
        return self._known[token]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([self._breaks(token) for token in input_ids[:, -1].tolist()], device=input_ids.device)


class LineModel:
    """Any causal language model of transformers, on its device."""

    def __init__(self, files: TextModelFiles, dtype: str, device: str):
        self._model, folder = load_text_model(files, AutoModelForCausalLM, dtype, device)
        self._name, self._device = files.name, device
        try:
            with quietly():
                self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, padding_side="left")
        except Exception as error:
            raise IntegrityError(f"{folder}: its tokenizer cannot be loaded ({first_line(error)[:200]})") from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token
        own: Any = self._model.generation_config
        self._model.generation_config = GenerationConfig(
            do_sample=False,  # `Nucleus` has chosen; what the model's authors recommend besides is not asked for
            bos_token_id=own.bos_token_id,
            eos_token_id=own.eos_token_id,
            pad_token_id=self._tokenizer.pad_token_id,
            max_new_tokens=MOST_TOKENS,
        )
        self._context = getattr(self._model.config, "max_position_embeddings", None)

    @torch.inference_mode()
    def complete(
        self, texts: Sequence[str], rngs: Sequence[np.random.Generator], temperature: float, top_p: float
    ) -> list[str]:
        """What the model says after each text up to the end of the line, `MOST_TOKENS` at most, drawn with its own generator."""
        given = self._tokenizer(list(texts), padding=True, return_tensors="pt", return_token_type_ids=False)
        length = given["input_ids"].shape[1]
        if self._context is not None and length + MOST_TOKENS > self._context:
            raise UsageError(
                f"{self._name}: reads {self._context} tokens, but a query takes {length} and its answer {MOST_TOKENS}; choose "
                "another synthesize.prompts.model, or shorter examples"
            )
        numbers = np.stack([rng.random(MOST_TOKENS) for rng in rngs])
        try:
            ids = self._model.generate(  # type: ignore[operator]
                **given.to(self._device),
                logits_processor=LogitsProcessorList([Nucleus(numbers, temperature, top_p)]),
                stopping_criteria=StoppingCriteriaList([_LineEnds(self._tokenizer)]),
            )
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise UsageError(
                f"{self._name}: {len(texts)} sentences at once take more than the memory of {self._device}; try "
                "synthesize.prompts.dtype=bfloat16, or a smaller model"
            ) from error
        said = self._tokenizer.batch_decode(ids[:, length:], skip_special_tokens=True)
        return [text.split("\n")[0] for text in said]
