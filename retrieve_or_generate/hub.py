"""Model hubs, which libraries ask on their own: what they log meanwhile, and a hub that is not there."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """No library logs anything meanwhile: each retry of a hub takes lines, and what matters comes as an exception.

    Bars of downloads stay, and so do Python's warnings.
    """
    root = logging.getLogger()
    handlers, disabled = root.handlers[:], root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers  # `logging.error` of a library adds one that prints all that follows


def is_unreachable(error: BaseException) -> bool:
    """Whether an error came of a hub that does not answer, or may not be asked (HF_HUB_OFFLINE), and of nothing else."""
    from httpx import TransportError
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, TransportError | LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        seen = seen.__cause__ or seen.__context__
    return False
