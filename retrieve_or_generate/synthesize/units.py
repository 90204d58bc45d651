"""The units of work of an image set: one shard each, made in this process, in local workers, or by several ranks; kept when made.

A shard's requests, and what the images follow from besides, name it. It lies in the set's folder as it will stay there, beside
what is known of it until all are there (`.unit-00000.parquet`, and `.unit-00000.json` last): a run that is killed goes on with the
shards that are missing, and one that is damaged is made again. Which process makes which shard, and when, changes no byte.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from retrieve_or_generate.errors import IncompleteError, IntegrityError, UsageError
from retrieve_or_generate.executors import Unit, run_units, tell
from retrieve_or_generate.image_set import (
    MANIFEST,
    UNIT_FILES,
    ImageSet,
    ShardWriter,
    begun_under,
    candidates_record,
    load_image_set,
    read_table,
    seal_candidates,
    start_candidates,
    write_table,
)
from retrieve_or_generate.pixels import UndecodableImage, decode, encode_jpeg
from retrieve_or_generate.precision import one_thread
from retrieve_or_generate.progress import Progress
from retrieve_or_generate.settings import SynthesizeSettings
from retrieve_or_generate.store import content_key, locked, read_seal, remove_leftovers, seal
from retrieve_or_generate.synthesize.prompts.length import unread_tokens
from retrieve_or_generate.synthesize.requests import TRIES, Request, told_of
from retrieve_or_generate.synthesize.sampler import Drawn, Generator, load_generator, steps_at
from retrieve_or_generate.weights import find_generator, pinned_generator

_FINISHING, _STARTING = ".finishing.lock", ".starting.lock"


class OtherRanksError(IncompleteError):
    """This rank has made all that is its own; other ranks have not, and one of them will finish the set."""


@dataclass(frozen=True)
class Share:
    """Which of the shards are made here: every `world`-th from the `rank`-th on."""

    rank: int
    world: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise UsageError(f"rank {self.rank} of {self.world}: ranks go from 0 to one less than there are")


@runtime_checkable
class Maker(Protocol):
    """A generator, and where it makes images."""

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    def loads(self, settings: SynthesizeSettings, shards: int) -> list[Callable[[], Generator]]:
        """What gives each worker its generator, for as many as so many shards can use; a single one works in this process."""


@dataclass(frozen=True)
class Here:
    """A generator that is loaded already makes all images itself."""

    generator: Generator

    @property
    def name(self) -> str:
        return self.generator.name

    @property
    def fingerprint(self) -> str:
        return self.generator.fingerprint

    def loads(self, settings: SynthesizeSettings, shards: int) -> list[Callable[[], Generator]]:
        return [lambda: self.generator]


class Workers:
    """A generator by its name, loaded once by each worker: one on each of several devices, or `jobs` on the CPU.

    A single shard is made in this process. It is for sets of equal settings. Raises `UsageError` where there is no such generator;
    loads nothing.
    """

    def __init__(self, generator: str, devices: Sequence[str] = ("cpu",), jobs: int = 1):
        files = find_generator(generator)
        self.name, self.fingerprint = files.name, files.fingerprint
        self._pinned = pinned_generator(generator)
        self._loaded: Generator | None = None
        self._devices = [devices[0]] * jobs if len(devices) == 1 and devices[0] == "cpu" else list(devices)

    def loads(self, settings: SynthesizeSettings, shards: int) -> list[Callable[[], Generator]]:
        devices = self._devices[:shards]
        if len(devices) == 1:
            return [partial(self._once, devices[0], settings)]
        return [partial(load_generator, self._pinned, device, settings) for device in devices]

    def _once(self, device: str, settings: SynthesizeSettings) -> Generator:
        """Kept for what is missing after the first round."""
        if self._loaded is None:
            self._loaded = load_generator(self._pinned, device, settings)
        return self._loaded


@dataclass(frozen=True)
class Making:
    """What all shards of one set share. It pickles."""

    out: Path
    source: str
    class_names: tuple[str, ...]
    generator: str
    settings: SynthesizeSettings
    strength: float = math.nan
    init: Path | None = None

    @property
    def tries(self) -> int:
        """An image that is not noised comes out the same however often it is drawn."""
        noised = math.isnan(self.strength) or steps_at(self.strength, self.settings) > 0
        return TRIES if noised else 1


@dataclass(frozen=True)
class Shard:
    """One unit of work: the requests of one shard, and its key."""

    number: int
    key: str
    requests: tuple[Request, ...]

    @property
    def name(self) -> str:
        return f"{self.number:05d}.tar"

    @property
    def table(self) -> str:
        return f"{UNIT_FILES[:-1]}{self.number:05d}.parquet"

    @property
    def seal(self) -> str:
        return f"{UNIT_FILES[:-1]}{self.number:05d}.json"


def cut(requests: Sequence[Request], size: int, first: int, of: Mapping[str, Any]) -> list[Shard]:
    """Requests as shards of `size`, numbered from `first` on. `of` is what the images follow from beside their requests."""
    parts = [tuple(requests[start : start + size]) for start in range(0, len(requests), size)]
    return [
        Shard(number, content_key([of, number, told_of(part)]), part) for number, part in enumerate(parts, start=first)
    ]


def is_made(out: Path, shard: Shard, verify: bool = True) -> bool:
    """Whether the shard is there, as it was written; one that is damaged is not."""
    try:
        return read_seal(out, shard.seal, shard.key, verify) is not None
    except IntegrityError:
        return False


def fill(
    making: Making, shards: Sequence[Shard], maker: Maker, share: Share | None = None, progress: Progress | None = None
) -> None:
    """Make those of `shards` that are not there yet and, with a `share`, are its own. `progress` hears of images, in all."""
    mine = [shard for shard in shards if share is None or shard.number % share.world == share.rank]
    left = [shard for shard in mine if not is_made(making.out, shard)]
    if not left:
        return
    loads = maker.loads(making.settings, len(left))
    tally = _Tally(progress, f"{making.source} images", mine, left)
    units = [Unit(shard.name, shard, cost=len(shard.requests)) for shard in left]
    with one_thread():
        for _ in run_units(units, [partial(_studio, making, load) for load in loads], len(loads), progress=tally):
            pass


class _Tally:
    """What is told of single shards, added up."""

    def __init__(self, progress: Progress | None, what: str, mine: Sequence[Shard], left: Sequence[Shard]):
        self._progress, self._what = progress, what
        self._total = sum(len(shard.requests) for shard in mine)
        self._before = self._total - sum(len(shard.requests) for shard in left)
        self._done: dict[str, int] = {}

    def __call__(self, shard: str, done: int, total: int) -> None:
        self._done[shard] = done
        if self._progress:
            self._progress(self._what, self._before + sum(self._done.values()), self._total)


def _studio(making: Making, load: Callable[[], Generator]) -> Callable[[Shard], None]:
    """What a worker does once."""
    init = load_image_set(making.init, verify=False) if making.init else None
    return partial(_make, making, load(), init)


def _make(making: Making, generator: Generator, init: ImageSet | None, shard: Shard) -> None:
    out = making.out
    with ShardWriter(out / shard.name, making.source, making.class_names) as writer:
        _draw(_Draw(making, generator, init), writer, shard)
    write_table(out / shard.table, pa.Table.from_pylist(writer.rows, schema=MANIFEST))
    seal(out, shard.seal, shard.key, [*writer.files, out / shard.table])


@dataclass(frozen=True)
class _Draw:
    making: Making
    generator: Generator
    init: ImageSet | None

    def __call__(self, requests: Sequence[Request], attempt: int) -> Drawn:
        making, prompts = self.making, [request.prompt for request in requests]
        seeds = [request.seed_at(attempt) for request in requests]
        if self.init is None:
            return self.generator.generate(prompts, seeds, making.settings)
        return self.generator.perturb(self._before(requests), prompts, seeds, making.strength, making.settings)

    def unread(self, requests: Sequence[Request]) -> list[int]:
        """Tokens at the end of each prompt that the generator does not read."""
        return unread_tokens(self.generator.pipeline.text, [request.prompt for request in requests])

    def _before(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """The images that are perturbed, (h, w, 3) uint8 each."""
        assert self.init is not None
        keys = [str(request.init_key) for request in requests]
        images = []
        for key, data in zip(keys, self.init.images(keys), strict=True):
            try:
                images.append(decode(data))
            except UndecodableImage as error:
                raise IntegrityError(f"{self.init.folder}: image {key} cannot be decoded ({error})") from error
        return images


def _draw(draw: _Draw, writer: ShardWriter, shard: Shard) -> None:
    """Draw every image of a shard; those that are flagged again, from other noise. Encoding and writing go on meanwhile."""
    size, total = draw.making.settings.batch_size, len(shard.requests)
    waiting, done = list(shard.requests), 0
    with _Behind() as behind:
        for attempt in range(draw.making.tries):
            flagged: list[Request] = []
            for start in range(0, len(waiting), size):
                part = waiting[start : start + size]
                drawn = draw(part, attempt)
                behind.run(partial(_store, writer, draw.making, part, drawn, draw.unread(part), attempt))
                again = [request for request, unsafe in zip(part, drawn.unsafe.tolist(), strict=True) if unsafe]
                flagged += again
                done += len(part) - len(again)
                tell(shard.name, done, total)
            waiting = flagged
    if done < total:  # flagged at every try
        tell(shard.name, total, total)


def _store(
    writer: ShardWriter, making: Making, requests: Sequence[Request], drawn: Drawn, unread: Sequence[int], attempt: int
) -> None:
    for request, image, unsafe, beyond in zip(requests, drawn.images, drawn.unsafe.tolist(), unread, strict=True):
        origin: dict[str, Any] = {"generator": making.generator, "seed": request.seed_at(attempt)}
        origin |= {"prompt": dict(request.origin)} if request.origin else {}
        origin |= {"init_key": request.init_key} if request.init_key is not None else {}
        origin |= {"unread_tokens": beyond} if beyond else {}
        writer.add(
            key=f"{request.key}-u{attempt}" if unsafe else request.key,
            label=request.label,
            caption=request.prompt,
            origin=origin,
            query=request.prompt,
            image=None if unsafe else encode_jpeg(image),
            strength=making.strength,
            reason="unsafe" if unsafe else "",
        )


class _Behind(AbstractContextManager["_Behind"]):
    """Runs one thing at a time in a thread, in order; what went wrong there comes out at the next."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def run(self, work: Callable[[], None]) -> None:
        self._wait()
        self._last = self._thread.submit(work)

    def _wait(self) -> None:
        if self._last:
            self._last.result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._wait()
        finally:
            self._thread.shutdown(cancel_futures=True)


def read_rows(out: Path, shards: Sequence[Shard]) -> pa.Table:
    """What is known of the candidates in `shards`, in their order."""
    tables = [read_table(out / shard.table) for shard in shards]
    return pa.concat_tables([MANIFEST.empty_table(), *tables])


def count_cut(out: Path, shards: Sequence[Shard]) -> int:
    """Candidates whose prompt was longer than the generator reads."""
    return sum("unread_tokens" in json.loads(origin) for origin in read_rows(out, shards)["origin"].to_pylist())


def seal_shards(out: Path, key: str, shards: Sequence[Shard], **record: Any) -> None:
    """The candidates' table and seal, last; then what is needed no more goes."""
    files: dict[str, dict[str, Any]] = {}
    for shard in shards:
        made = read_seal(out, shard.seal, shard.key, verify=False)
        assert made is not None
        files |= {name: told for name, told in made["files"].items() if name == shard.name}
    for path in out.glob("*.tar"):
        if path.name not in files:
            path.unlink()
    seal_candidates(out, key, read_rows(out, shards), files, **record)
    for path in out.glob(UNIT_FILES):
        path.unlink()


@contextmanager
def claimed(out: Path, begun: str, key: str, share: Share | None) -> Iterator[None]:
    """Hold `out` for the set that `key` names, alone or, with a `share`, together with other ranks.

    Shards of images that `begun` names stay: another curation of the same images goes on with them. Raises `UsageError` where
    another run holds the folder, or it is finished or not a set's.
    """
    if share is None:
        with locked(out):
            _begin(out, begun, key)
            yield
        return
    with ExitStack() as held:
        with locked(out, wait=True, name=_STARTING):
            if begun_under(out) != begun and candidates_record(out, key, verify=False) is None:
                with locked(out):  # what another set left is dropped only while nobody is at work
                    _begin(out, begun, key)
            held.enter_context(locked(out, shared=True))
        held.enter_context(locked(out, name=f".rank-{share.rank}.lock"))
        yield
    with (
        locked(out, wait=True, name=_STARTING),
        suppress(UsageError),
        locked(out),
    ):  # the last to leave; nobody arrives meanwhile
        remove_leftovers(out)


def _begin(out: Path, begun: str, key: str) -> None:
    remove_leftovers(out)
    if candidates_record(out, key, verify=False) is None:
        start_candidates(out, begun)


def finishing(out: Path) -> AbstractContextManager[None]:
    """What one rank alone may do, the others wait for."""
    return locked(out, wait=True, name=_FINISHING)


def others_left(out: Path, shards: Sequence[Shard], share: Share) -> None:
    """Raise `OtherRanksError` unless every shard is there."""
    left = sum(not is_made(out, shard, verify=False) for shard in shards)
    if left:
        mine = len(range(share.rank, len(shards), share.world))
        raise OtherRanksError(
            f"{out}: rank {share.rank} of {share.world} has made its {mine} shards; {left} of other ranks are not there yet, and "
            "the rank that finds all of them finishes the set"
        )
