"""What the libraries under a generator log, warn of and draw bars for: kept from the terminal, and kept to be looked at."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import diffusers
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

_LIBRARIES = ("diffusers", "transformers", "huggingface_hub", "accelerate")


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@contextmanager
def unsaid() -> Iterator[list[str]]:
    """Nothing that the libraries log, warn of or draw bars for reaches the user; gives what they logged.

    Bars of downloads stay on a terminal. What was switched off by `logging.disable` is heard nevertheless.
    """
    kept, loggers = _Kept(), [logging.getLogger(name) for name in _LIBRARIES]
    before = [(one.handlers[:], one.propagate, one.level) for one in loggers]
    bars = [one for one in (diffusers.utils.logging, transformers.utils.logging) if one.is_progress_bar_enabled()]
    disabled = logging.root.manager.disable
    downloads = not sys.stderr.isatty() and not are_progress_bars_disabled()
    logging.disable(logging.NOTSET)
    for one in loggers:
        one.handlers[:], one.propagate = [kept], False
        one.setLevel(logging.WARNING)
    for library in bars:
        library.disable_progress_bar()
    if downloads:
        disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield kept.messages
    finally:
        logging.disable(disabled)
        for one, (handlers, propagate, level) in zip(loggers, before, strict=True):
            one.handlers[:], one.propagate = handlers, propagate
            one.setLevel(level)
        for library in bars:
            library.enable_progress_bar()
        if downloads:
            enable_progress_bars()
