"""How `rog` ends: each way has its exit code and, where it is not success, one line on stderr.

0 complete, 2 usage or bad input, 3 incomplete but resumable, 4 `rog verify` found damage, 130 interrupted, 143 terminated. A bug of
ours keeps its traceback and ends with 1. The environment variable ROG_TRACEBACK=1 shows where a user's mistake came from.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import typer

from retrieve_or_generate.errors import FULL, IncompleteError, IntegrityError, UsageError, visible

_GOES_ON = "{}; what is finished is kept, and the same command goes on from there"


class DamageFoundError(IntegrityError):
    """What `rog verify` was asked to find."""

    exit_code = 4


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command line to its end and give its code. SIGTERM unwinds like an interrupt, so workers and temporary files go."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = command() or 0
    except (UsageError, IncompleteError) as error:
        return _fail(str(error), error.exit_code)
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        verb = context.command_path if context else "rog"
        return _fail(f"{error.format_message()} (see {verb} --help)", UsageError.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail("out of memory; use fewer --jobs or smaller batches and run it again", IncompleteError.exit_code)
    except OSError as error:
        where = error.filename or "output"
        if error.errno in FULL:
            return _fail(f"no space left for {where}; free some and run it again", IncompleteError.exit_code)
        return _fail(f"{where}: {error.strerror or error}", UsageError.exit_code)
    except SystemExit as ended:
        first = os.environ.get("RANK", "0") == "0"  # of processes that torchrun started, one says it for all
        if ended.code != 128 + signal.SIGTERM or not first:
            raise
        return _fail(_GOES_ON.format("terminated"), ended.code)
    return _fail(_GOES_ON.format("interrupted"), code) if code == 128 + signal.SIGINT else code


def _fail(message: str, code: int) -> int:
    if os.environ.get("ROG_TRACEBACK"):
        traceback.print_exc()
    sys.stdout.flush()
    print(f"rog: {visible(' '.join(message.split()))}", file=sys.stderr)
    return code


def is_out_of_memory(error: Exception) -> bool:
    """Also torch's three ways to say so, without loading torch: a type of its own for CUDA, words of cuBLAS, words for the CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
        or "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
