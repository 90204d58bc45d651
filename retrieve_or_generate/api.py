"""The verbs as functions: names, folders and an experiment in; stages are called with what those names stand for.

A function takes an `Experiment` (the pocket one by default), of which its stage reads its own part, and writes to `out`. Finished
work with the same inputs is read back, not done again. `progress` is called with what is being done, how many of it are done,
and how many there are. `device` is cpu, cuda or cuda:N.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retrieve_or_generate.errors import UsageError
from retrieve_or_generate.experiment import Experiment
from retrieve_or_generate.progress import Progress, bytes_of

if TYPE_CHECKING:
    from retrieve_or_generate.finetune import Trial
    from retrieve_or_generate.image_set import ImageSet
    from retrieve_or_generate.pool.footprint import Footprint
    from retrieve_or_generate.pool.index import Index
    from retrieve_or_generate.pool.layout import Pool
    from retrieve_or_generate.pool.verify import PoolCheck
    from retrieve_or_generate.takedown import Takedown

POCKET = Experiment()


def check_device(device: str) -> str:
    """`device` if work can run on it; `UsageError` says what there is."""
    if device == "cpu":  # known without loading torch: a repeated call has nothing to run
        return device
    import torch

    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"unknown device {device!r}: give cpu, cuda or cuda:N") from error
    there = torch.cuda.device_count()
    if asked.type == "cpu" or (asked.type == "cuda" and (asked.index or 0) < there):
        return device
    gpus = f"cuda:0 to cuda:{there - 1} and " if there else "only "
    raise UsageError(f"device {device!r} is not there; there is {gpus}cpu")


def check_devices(devices: str) -> tuple[str, ...]:
    """`cuda:0,cuda:1` as what it lists, each checked; `UsageError` for one that is listed twice, or stands beside the CPU."""
    listed = tuple(check_device(device.strip()) for device in devices.split(","))
    if len(set(listed)) < len(listed) or (len(listed) > 1 and not all(one.startswith("cuda:") for one in listed)):
        raise UsageError(f"--device {devices}: several are GPUs by number, each once, such as cuda:0,cuda:1")
    return listed


def compare(
    out: Path,
    experiment: Experiment = POCKET,
    device: str = "cpu",
    jobs: int | None = None,
    progress: Progress | None = None,
    index_folder: Path | None = None,
) -> dict[str, Any]:
    """Run the whole experiment into folder `out`, or what is missing of it, and give the verdict that `verdict.json` holds.

    `jobs` worker processes of one thread each, by default one a core; `index_folder` as for `retrieve`.

    Raises:
        UsageError: `out` holds something else, or an input is not there. IntegrityError: a file changed since it was written.
    """
    from retrieve_or_generate.compare import compare as run

    return run(experiment, out, check_device(device), jobs, progress, index_folder)


def retrieve(
    task: str,
    out: Path,
    experiment: Experiment = POCKET,
    device: str = "cpu",
    progress: Progress | None = None,
    index_folder: Path | None = None,
) -> ImageSet:
    """Search the experiment's pool for the classes of `task` (a name or a folder), curate, and write the image set to `out`.

    `index_folder` is where a FAISS index lies or is built, where that cannot be beside the pool.

    Raises:
        UsageError: unknown task, pool or model, or `out` holds something else. IntegrityError: a damaged pool.
    """
    from retrieve_or_generate.models import load_clip
    from retrieve_or_generate.pool.layout import open_pool
    from retrieve_or_generate.retrieve import retrieve as search
    from retrieve_or_generate.tasks import load_task

    wanted, clip = load_task(task), load_clip(experiment.model, check_device(device))
    how, curation = experiment.retrieve, experiment.curate
    pool = None if how.engine == "remote" else open_pool(experiment.pool)
    return search(wanted, pool, clip, out, how, curation, index_folder=index_folder, progress=progress)


def synthesize(
    out: Path,
    like: Path | None = None,
    init: Path | None = None,
    strength: float | None = None,
    task: str | None = None,
    experiment: Experiment = POCKET,
    device: str = "cpu",
    progress: Progress | None = None,
    jobs: int | None = None,
    rank: int = 0,
    world: int | None = None,
) -> ImageSet:
    """Generate as many images of each class as the image set `like` has, or perturb the image set `init` by `strength`.

    `strength` is in [0, 1], by default the experiment's. `task` is needed only where it is a folder: else the set knows it. Images
    are made by `jobs` processes of one thread each (one a core), or one process on each of several devices: `cuda:0,cuda:1`. With
    a `world`, so many calls fill one folder, this one as the `rank`-th; whoever finds everything there finishes the set.

    Raises:
        UsageError: both or neither of `like` and `init`, an unknown generator, or an image set of another task.
        OtherRanksError: this rank has made what is its own, others have not.
    """
    from retrieve_or_generate.compare.sets import known_pool
    from retrieve_or_generate.executors import core_count
    from retrieve_or_generate.image_set import load_image_set
    from retrieve_or_generate.models import load_clip
    from retrieve_or_generate.synthesize import Share, Workers, perturb
    from retrieve_or_generate.synthesize import synthesize as generate
    from retrieve_or_generate.tasks import load_task

    given = like or init
    if given is None or (like and init):
        raise UsageError("give either the image set to match (--like SET) or the one to perturb (--init SET)")
    devices = check_devices(device)
    share = None if world is None else Share(rank, world)
    image_set = load_image_set(given)
    wanted = load_task(task or image_set.task)
    generator = Workers(experiment.generator, devices, jobs or core_count())
    clip = load_clip(experiment.model, devices[0])
    how, curation = experiment.synthesize, experiment.curate
    if like:
        known = known_pool(experiment, image_set)
        return generate(wanted, image_set, generator, clip, out, how, curation, progress, known=known, share=share)
    amount, prompt = experiment.perturb.strength if strength is None else strength, experiment.perturb.prompt
    return perturb(wanted, image_set, generator, clip, out, amount, how, curation, progress, prompt=prompt, share=share)


def finetune(
    out: Path,
    train: Path | Sequence[Path] | None = None,
    task: str | None = None,
    scale: int | None = None,
    seed: int = 0,
    experiment: Experiment = POCKET,
    device: str = "cpu",
    save_model: bool = False,
    gamma: float | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> Trial:
    """Train on `scale` images of the image set `train` (all by default), measure on `task`, and write a trial to `out`.

    Two sets are mixed: all images of both, or half of `scale` from each; with `gamma` half of each batch comes from each, and the
    loss is γ · L(the first's) + (1 − γ) · L(the second's). Without `train`, the model is measured off the shelf. Seeds, order and
    settings are those of `compare`. With `save_model` the fine-tuned model lies in `out/model` (`finetune/saved.py`), which plain
    open_clip loads, and every verb as a model. A call that was terminated is gone on with by the same call. `processes` share the
    work, with `device` cuda on a GPU each; so do those that torchrun started with this one (`finetune/processes.py`).

    Raises:
        UsageError: neither `train` nor `task`, a scale that a class cannot fill, or `out` holds something else or is in use.
    """
    from retrieve_or_generate.compare.single import SingleTrial
    from retrieve_or_generate.executors import listening
    from retrieve_or_generate.finetune.processes import together

    folders = (train,) if isinstance(train, Path) else tuple(train or ())
    asked = SingleTrial(out, folders, task, scale, seed, experiment, gamma, save_model)
    call = partial(asked.run, check_device(device))
    if processes > 1:
        return together(call, processes, progress)
    with listening(progress):
        return call()


def _named(progress: Progress | None, what: str) -> Any:
    return partial(progress, what) if progress else None


def status(run: Path) -> dict[str, Any]:
    """What is finished of a run: `{"experiment", "sets", "trials", "report"}`, sets and trials as [done, all].

    A trial counts when its files are as recorded. Until all image sets are there, no trial can be named, and none counts.

    Raises:
        UsageError: no run there. IntegrityError: a finished trial or image set was changed.
    """
    from retrieve_or_generate.compare import sets
    from retrieve_or_generate.compare.folder import EXPERIMENT, SEAL, load_tasks
    from retrieve_or_generate.compare.plan import plan_trials
    from retrieve_or_generate.compare.trials import is_done
    from retrieve_or_generate.experiment import load_experiment
    from retrieve_or_generate.weights import clip_fingerprint

    if not (run / EXPERIMENT).is_file():
        raise UsageError(f"{run}: not a run (no {EXPERIMENT}); rog compare --out {run} makes one")
    experiment = load_experiment(run / EXPERIMENT)
    named = load_tasks(experiment)
    trained = [source for source in experiment.sources if source != "none"]
    left = sum(len(units) for _, units in sets.missing(run, named, experiment))
    shelf = len(named) * ("none" in experiment.sources)
    done, total = 0, shelf + len(named) * len(trained) * len(experiment.scales) * experiment.seeds
    if not left:
        drawn = sets.open_sets(run, named, experiment)
        done = sum(
            is_done(run, trial)
            for trial in plan_trials(experiment, named, drawn, clip_fingerprint(experiment.finetuned_model))
        )
    made = len(named) * len(experiment.set_sources)
    return {
        "experiment": experiment.name,
        "sets": [made - left, made],
        "trials": [done, total],
        "report": (run / SEAL).is_file() and done == total,
    }


def embed(
    source: Path,
    out: Path,
    model: str = "pocket",
    device: str = "cpu",
    jobs: int | None = None,
    batch_size: int = 256,
    captions: bool | None = None,
    images: bool = True,
    precision: str = "float32",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make a pool in `out` of webdataset shards, a folder of images, or tables of what was downloaded; what its seal records.

    `captions` None embeds them where the source has some. Without `images` the pool keeps no copy of them. `precision` of the
    model's products: float32, bfloat16 or float16.

    Raises:
        UsageError: nothing to embed, unknown model, or `out` holds something else. IntegrityError: a damaged tar or table.
    """
    from retrieve_or_generate.models import load_clip
    from retrieve_or_generate.pool.embed import EmbedSettings, embed_pool

    settings = EmbedSettings(captions=captions, images=images, precision=precision)
    clip = load_clip(model, check_device(device))
    told = bytes_of(progress, f"embed {source.name}")
    return embed_pool(source, out, clip, settings=settings, batch_size=batch_size, jobs=jobs, progress=told)


def build_index(
    recipe: str,
    out: Path | None = None,
    pool: str | None = None,
    progress: Progress | None = None,
    told: Callable[[Footprint], None] | None = None,
) -> Path:
    """Build the index of a recipe (a name in `indexes/`, or a file) over `pool`, by default the recipe's; its folder.

    Without `out` it lies beside the pool, where `retrieve` with `engine: index` looks for it. `told` hears what memory and disk it
    takes before anything is built. A build that was interrupted goes on where it was.

    Raises:
        UsageError: unknown recipe or pool, one that is not for the other, too little memory or disk, or `out` holds something else.
    """
    from retrieve_or_generate.pool import index
    from retrieve_or_generate.pool.footprint import pool_footprint
    from retrieve_or_generate.pool.layout import open_pool

    wanted = index.load_recipe(recipe)
    over = open_pool(pool or wanted.pool)
    wanted.check(over)
    if told:
        told(pool_footprint(wanted, over))
    rows = _named(progress, f"index {wanted.name}")
    return index.build_index(over, wanted, out or over.folder / "indices" / wanted.name, rows)


def search_index(
    folder: Path,
    query: str,
    pool: str | None = None,
    k: int = 10,
    nprobe: int | None = None,
    recipe: str | None = None,
) -> dict[str, Any]:
    """`results`: the `k` rows nearest to the words of `query` among those the index finds, best first, with caption and URL.

    `recall`: what share of the true neighbours this index was measured to find. `recipe` says what a published index is.

    Raises:
        UsageError: no such index or pool, or its recall is unknown and takes long to measure.
    """
    from retrieve_or_generate.models import load_clip, text_features
    from retrieve_or_generate.pool import index, planner

    opened, searched = _open_index(folder, pool, recipe)
    clip = load_clip(opened.recipe.model)
    recall = planner.known_recall(
        opened, searched, k, lambda: text_features(clip, _drawn_captions(searched, index.LEAST_QUERIES)), nprobe
    )
    D, I = index.search_index(opened, searched, text_features(clip, [query]), k, nprobe=nprobe)  # noqa: E741
    rows = I[0][I[0] >= 0]
    told = searched.metadata(rows, ("caption", "url")).to_pylist()
    found = [{"row": int(row), "similarity": float(d), **more} for row, d, more in zip(rows, D[0], told, strict=False)]
    return {"results": found, "recall": recall.model_dump()}


def index_recall(
    folder: Path,
    pool: str | None = None,
    k: int = 100,
    queries: int = 200,
    nprobe: int | None = None,
    recipe: str | None = None,
    texts: Path | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`recall_at_k`: share of the true `k` nearest rows that the index finds, over captions drawn from the pool or `texts`' lines.

    A pool of fewer than `k` rows has no more nearest ones than that, and `k` says so. The number is kept with the index.
    `rows_found`: share of sampled rows that are found by their own embeddings. Every byte of an index of ours is compared with its
    checksum first.

    Raises:
        UsageError: no such index or pool, or the index numbers other rows. IntegrityError: a file changed, or cannot be read.
    """
    from retrieve_or_generate.models import load_clip, text_features
    from retrieve_or_generate.pool import index

    opened, searched = _open_index(folder, pool, recipe, verify=True)
    own = index.self_found(opened, searched)
    if own < _ROWS_FOUND:
        raise UsageError(
            f"{folder}: finds {own:.0%} of the rows of {searched.folder} by their own embeddings: it numbers other rows, or in "
            "another order"
        )
    asked = _lines(texts) if texts else _drawn_captions(searched, queries)
    xq = text_features(load_clip(opened.recipe.model, check_device(device)), asked)
    told = _named(progress, "exact search")
    recall = index.measure_recall(opened, searched, xq, k, nprobe, device=device, progress=told)
    return recall.model_dump(exclude={"nprobe"}) | {"rows_found": own, "published": not opened.built}


_ROWS_FOUND = 0.2  # of those asked for by their own embedding; with rows in another order next to none are


def _open_index(folder: Path, pool: str | None, recipe: str | None, verify: bool | None = None) -> tuple[Index, Pool]:
    from retrieve_or_generate.pool.index import INDEX_SEAL, load_recipe, open_index
    from retrieve_or_generate.pool.layout import open_pool
    from retrieve_or_generate.store import read_seal

    wanted = load_recipe(recipe) if recipe else None
    record = read_seal(folder, INDEX_SEAL, verify=False)
    known = pool or (wanted.pool if wanted else record and record.get("recipe", {}).get("pool"))
    if not known:
        raise UsageError(f"{folder}: no finished index (no {INDEX_SEAL}); of a published one name the pool with --pool")
    searched = open_pool(known)
    opened = open_index(folder, searched, wanted, verify)
    if opened.recipe.model == "unknown":
        raise UsageError(
            f"{folder}: which model embedded {searched.folder} is not recorded; name a recipe that says so (--recipe)"
        )
    return opened, searched


def _drawn_captions(pool: Pool, count: int) -> list[str]:
    """Captions of the pool, drawn by seed from equal stretches of it. `UsageError` for a pool with too few."""
    from retrieve_or_generate.pool.index import LEAST_QUERIES
    from retrieve_or_generate.seeds import generator_for

    if pool.rows < LEAST_QUERIES:
        raise UsageError(
            f"{pool.folder}: {pool.rows} captions are too few to measure recall with; give {LEAST_QUERIES} lines or more to "
            "rog index verify --texts FILE, with the -k of your search"
        )
    count = min(count, pool.rows)
    edges = [pool.rows * place // count for place in range(count + 1)]
    drawn = generator_for("index", "recall").integers(edges[:-1], edges[1:])
    return [caption or "" for caption in pool.metadata(drawn, ("caption",))["caption"].to_pylist()]


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a text file ({error})") from None


def takedown(
    hash: str, folders: tuple[Path, ...], pool: str | None = None, progress: Progress | None = None
) -> Takedown:
    """Remove the image with this sha256 or md5, or all that came from this URL, from all below `folders` and from `pool`.

    Raises:
        UsageError: no hash, or a folder that is not there or in use.
    """
    from retrieve_or_generate.takedown import takedown as take

    return take(hash, folders, pool, progress)


def verify(path: Path) -> tuple[int, int]:
    """Compare all finished work below `path` with its recorded checksums; the numbers of units and of files that agree.

    Raises:
        UsageError: nothing finished there, and no pool. IntegrityError: the first file that is missing or differs.
    """
    from retrieve_or_generate.pool.parts import find_parts
    from retrieve_or_generate.store import check_files, read_json

    units = files = 0
    is_pool = find_parts(path) is not None
    if not path.is_dir() and not is_pool:
        raise UsageError(f"{path}: no such folder")
    for seal in sorted(path.rglob("*.json")):
        record = read_json(seal)
        if isinstance(record, dict) and "key" in record and isinstance(record.get("files"), dict):
            check_files(seal.parent, record["files"])
            units, files = units + 1, files + len(record["files"])
    if not units and not is_pool:
        raise UsageError(
            f"{path}: nothing with recorded checksums; give a finished pool, index, image set, trial or run"
        )
    return units, files


def verify_pool(path: Path, progress: Progress | None = None) -> PoolCheck | None:
    """Look at every row of the pool in `path`, sealed or not; None where `path` is no pool.

    Raises:
        IntegrityError: which files do not fit, and where. IncompleteError: a pool that is not finished.
    """
    from retrieve_or_generate.pool.parts import find_parts

    if find_parts(path) is None:
        return None
    from retrieve_or_generate.pool.layout import open_pool
    from retrieve_or_generate.pool.verify import verify_pool as look

    return look(open_pool(str(path)), _named(progress, f"verify {path.name}"))
