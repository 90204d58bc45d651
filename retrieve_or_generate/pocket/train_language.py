"""Trains the pocket language model, a small Llama: `python -m retrieve_or_generate.pocket.train_language --out FOLDER`.

It learns one thing: to go on with a query as `in_context` writes it, in words that the pocket generator knows. Its training texts
are made without end from the lists of `in_context` and the words of `captions`; a background becomes the colour that it has where
there are only flat colours. Reads nothing else. Writes `FOLDER`, which `transformers` loads: weights in half precision and
tokenizer. docs/pocket.md has the minutes, and what `experiments/judge_prompts.py` reads.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from retrieve_or_generate.in_context import (
    ARROW,
    EXAMPLES,
    INSTRUCTION,
    SHARES,
    Example,
    Kind,
    Lists,
    asked,
    in_context,
    read_lists,
)
from retrieve_or_generate.pocket.captions import VOCABULARIES, thing_names
from retrieve_or_generate.pocket.drawing import DARK, LIGHT
from retrieve_or_generate.pocket.places import SEED_STUDY
from retrieve_or_generate.seeds import generator_for, seed_for

MOST_TOKENS = 160
STEPS = 1200
_VOCABULARY = 1400
_PAD, _BEGIN, _END = "<pad>", "<s>", "</s>"
_UNWEIGHED = -100

# What is said of a class: `{fg}` and `{bg}` are colours. More than the pool's captions say, in the same words.
_SAID = {
    "digits": (
        "handwritten digit {}",
        "handwritten {}, {fg} on {bg}",
        "the number {} in {fg} ink",
        "the digit {} in {fg} on {bg} paper",
        "{} written by hand in {fg} ink",
        "the number {} on {bg} paper",
        "handwritten digit {} in {fg}",
    ),
    "textures": (
        "{} pattern in {fg} and {bg}",
        "seamless {} texture in {fg}",
        "{} fabric in {fg} and {bg}",
        "{fg} {} wallpaper",
        "{} tile, {fg} on {bg}",
        "a {} background in {fg} and {bg}",
        "vintage {} paper in {bg}",
    ),
    "aircraft": (
        "a {fg} {} in flight",
        "a {fg} {} plane over {bg} sky",
        "{} plane over {bg} sky",
        "photo of a {fg} {} aircraft",
        "{fg} {} airliner from above",
        "{fg} {} plane",
        "{} aircraft, {fg} on {bg}",
    ),
    "": (
        "a {fg} {}",
        "{} on {bg} background",
        "photo of a {fg} {}",
        "{fg} {} on {bg} background",
        "cute {fg} {} drawing",
    ),
}

# The colour of a background, by a word in it; every other one may have any.
_COLOURED = {
    "white": ("snow", "ice", "white", "fog", "museum", "window"),
    "yellow": ("beach", "desert", "sand", "wheat", "savanna", "sunset", "road"),
    "sky": ("blue sky", "cloud", "mountains", "rooftop", "lake"),
    "green": ("forest", "meadow", "garden", "park", "lawn", "field", "orchard"),
    "blue": ("sea", "water", "harbour", "river", "pond"),
    "brown": ("table", "wood", "brick", "farmyard", "barn", "leaves", "rocks", "workshop", "library"),
    "black": ("night", "black", "stage", "attic", "station"),
    "red": ("market", "living room"),
    "purple": ("flower",),
}


def colour_of(background: str) -> str | None:
    """The colour that stands for a background where there are only flat colours; None where it has none."""
    for colour, words in _COLOURED.items():
        if any(word in background for word in words):
            return colour
    return None


def _pick(items: tuple[str, ...], rng: np.random.Generator) -> str:
    return items[int(rng.integers(len(items)))]


def _colours(background: str | None, rng: np.random.Generator) -> tuple[str, str]:
    """A foreground and a background colour that contrast."""
    light_ground = bool(rng.random() < 0.5) if background is None else background in LIGHT
    ground = background or _pick(LIGHT if light_ground else DARK, rng)
    return _pick(DARK if light_ground else LIGHT, rng), ground


def caption_of(task: str, name: str, kind: Kind, beside: str, rng: np.random.Generator) -> str:
    """A caption of class `name` of a pocket task, or of a thing (task "")."""
    templates = _SAID[task]
    ground = colour_of(beside) if kind == "background" else None
    if ground is not None:
        templates = tuple(template for template in templates if "{bg}" in template)
    elif kind == "relation":
        templates = tuple(template for template in templates if "{bg}" not in template)
    fg, bg = _colours(ground, rng)
    caption = _pick(templates, rng).replace("{fg}", fg).replace("{bg}", bg).replace("{}", name)
    return f"{caption} {beside} a {_pick(thing_names(), rng)}" if kind == "relation" else caption


class Texts:
    """Training texts, drawn without end: (what is given, what is to be learned) pairs that make up one text each."""

    def __init__(self, lists: Lists, rng: np.random.Generator):
        self._lists, self._rng = lists, rng
        self._named = [(task, name) for task, words in VOCABULARIES.items() for name in words.class_names]

    def _subject(self, kind: Kind) -> tuple[str, str]:
        """A task and a class of it; now and then a thing."""
        if kind != "texture" and self._rng.random() < 0.2:
            return "", _pick(thing_names(), self._rng)
        fitting = [(task, name) for task, name in self._named if (task == "textures") == (kind == "texture")]
        return fitting[int(self._rng.integers(len(fitting)))]

    def _example(self, kind: Kind) -> Example:
        """Of the pocket world."""
        task, name = self._subject(kind)
        beside = ""
        if kind == "relation":
            beside = _pick(self._lists.relations, self._rng)
        elif kind == "background":
            beside = _pick(self._lists.backgrounds[""], self._rng)
        return Example(asked(name, beside), caption_of(task, name, kind, beside, self._rng))

    def draw(self) -> list[tuple[str, bool]]:
        """One text in parts, each with whether it is to be learned. Every other one shows the lists' examples, as in use."""
        rng = self._rng
        kinds: list[Kind] = [*SHARES, "texture"]
        kind = kinds[int(rng.choice(len(kinds), p=[0.3, 0.14, 0.3, 0.26]))]
        query = self._example(kind)
        if rng.random() < 0.5:
            pool = self._lists.examples[kind]
            shown = [pool[i] for i in rng.choice(len(pool), EXAMPLES, replace=False)]
            return [(in_context(shown, query.asked), False), (f" {query.caption}\n", True)]
        parts = [(f"{INSTRUCTION}\n", False)]
        for example in (*(self._example(kind) for _ in range(EXAMPLES)), query):
            parts += [(example.asked + ARROW, False), (f" {example.caption}\n", True)]
        return parts


def make_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte pairs, so any text can be read; most words of the pocket world are one token, and so is every class name.

    (Half a million parameters learn to repeat one token of the query within minutes; the "2" of "merlin 2" by itself they do not.)
    """
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=[_PAD, _BEGIN, _END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    names = [name for words in VOCABULARIES.values() for name in words.class_names if " " in name]
    learner.add_tokens([AddedToken(name, single_word=True, normalized=False) for name in names])
    begin = (_BEGIN, learner.token_to_id(_BEGIN))
    learner.post_processor = processors.TemplateProcessing(single=f"{_BEGIN} $A", special_tokens=[begin])
    return PreTrainedTokenizerFast(
        tokenizer_object=learner,
        pad_token=_PAD,
        bos_token=_BEGIN,
        eos_token=_END,
        model_max_length=MOST_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Half a million parameters."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2 * MOST_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Trainer:
    """One run over texts as they are drawn."""

    def __init__(self, steps: int, batch_size: int = 32, learning_rate: float = 3e-3):
        torch.manual_seed(seed_for(SEED_STUDY, "train language"))
        lists = read_lists()
        self.texts = Texts(lists, generator_for(SEED_STUDY, "language texts"))
        sample = Texts(lists, generator_for(SEED_STUDY, "language vocabulary"))
        self.tokenizer = make_tokenizer("".join(part for part, _ in sample.draw()) for _ in range(4000))
        self.model = make_model(self.tokenizer)
        self.steps, self.batch_size = steps, batch_size
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, learning_rate, total_steps=steps + 1, pct_start=0.1
        )

    def _encoded(self, parts: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
        """Ids and what is to be learned of them, as many."""
        ids, learned = [self.tokenizer.bos_token_id], [_UNWEIGHED]
        for text, is_learned in parts:
            new = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += new
            learned += new if is_learned else [_UNWEIGHED] * len(new)
        return ids, learned

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (b, length) padded on the right, and targets."""
        rows = [self._encoded(self.texts.draw()) for _ in range(self.batch_size)]
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows])
        return ids, torch.tensor([learned + [_UNWEIGHED] * (length - len(learned)) for _, learned in rows])

    def step(self) -> float:
        """One update; the loss in nats a token that is to be learned."""
        ids, targets = self.batch()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = self.model.model(input_ids=ids).last_hidden_state[:, :-1]
            wanted = targets[:, 1:] != _UNWEIGHED
            logits = self.model.lm_head(states[wanted])
        loss = F.cross_entropy(logits.float(), targets[:, 1:][wanted])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        return loss.item()

    def run(self, every: int = 200) -> None:
        self.model.train()
        started, total = time.monotonic(), 0.0
        for done in range(1, self.steps + 1):
            total += self.step()
            if done % every == 0 or done == self.steps:
                rate = done * self.batch_size / (time.monotonic() - started)
                print(f"language step {done}/{self.steps}  loss {total / every:.4f}  {rate:.0f} texts/s", flush=True)
                total = 0.0

    def save(self, folder: Path) -> None:
        self.model.eval().half().save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def train(folder: Path, steps: int = STEPS) -> None:
    trainer = Trainer(steps)
    trainer.run()
    unfinished = folder.with_name(folder.name + ".part")
    trainer.save(unfinished)
    unfinished.replace(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the language model")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"updates of 32 texts (default {STEPS})")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments.out, arguments.steps)


if __name__ == "__main__":
    main()
