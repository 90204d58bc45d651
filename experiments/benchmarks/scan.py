"""The exact scan against blocked `faiss.knn` + `ResultHeap`, over the same float16 files on disk.

    python experiments/benchmarks/scan.py                                    # 1M × 768 in 8 files, 1,000 queries, k = 1,000
    python experiments/benchmarks/scan.py --rows 100000 --queries 200 --k 100 --repeats 3                       # a minute
    python experiments/benchmarks/scan.py --device cuda --rows 8000000       # our scan alone, against the rates of the machine

Arms alternate, each call in a process of its own, so that peak memory is the arm's; seconds are of CPU, on one thread unless
`--threads` says otherwise, of the search alone. faiss takes `--rival-rows` rows at a time as float32; the default, a whole file, is
the fastest for it. Vectors are unit length, their files in the page cache. One JSON object comes last: `ratio` is faiss's median
over ours; `outputs_equal` says that both found the same rows for every query, in all repeats. Where two rows score so alike that
float32 sums cannot tell (`tied`: within 1e-6 of the k-th score), faiss may keep either, and such rows are not held against it.
On a GPU the object holds our rate beside that of a copy to the device and of the matrix product, measured in the same call.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

GIB = 2**30


def write_pool(folder: Path, rows: int, dim: int, files: int) -> list[Path]:
    """Unit vectors around a few hundred directions, as of a pool with subjects; float16, as LAION's."""
    rng = np.random.default_rng(2406)
    centres = rng.standard_normal((300, dim), np.float32)
    paths = []
    for number, part in enumerate(np.array_split(np.arange(rows), files)):
        xb = 0.35 * centres[rng.integers(len(centres), size=len(part))]
        xb += rng.standard_normal(xb.shape, np.float32)
        xb /= np.linalg.norm(xb, axis=1, keepdims=True)
        paths.append(folder / f"img_emb_{number:04d}.npy")
        np.save(paths[-1], xb.astype(np.float16))
    return paths


def queries(number: int, dim: int) -> np.ndarray:
    """(q, d) unit vectors, each near one of the pool's directions."""
    centres = np.random.default_rng(2406).standard_normal((300, dim), np.float32)
    rng = np.random.default_rng(1)
    xq = centres[np.arange(number) % len(centres)] + rng.standard_normal((number, dim), np.float32)
    return (xq / np.linalg.norm(xq, axis=1, keepdims=True)).astype(np.float32)


def rog(paths: list[Path], xq: np.ndarray, given: argparse.Namespace) -> Any:
    import torch

    from retrieve_or_generate.pool.scan import scan

    torch.set_num_threads(given.threads)
    return lambda: scan(xq, [np.load(path, mmap_mode="r") for path in paths], given.k, device=given.device)


def faiss_blocks(paths: list[Path], xq: np.ndarray, given: argparse.Namespace) -> Any:
    import faiss

    faiss.omp_set_num_threads(given.threads)

    def search() -> tuple[np.ndarray, np.ndarray]:
        heap, first = faiss.ResultHeap(len(xq), given.k, keep_max=True), 0
        for path in paths:
            shard = np.load(path, mmap_mode="r")
            for start in range(0, len(shard), given.rival_rows or len(shard)):
                block = shard[start : start + (given.rival_rows or len(shard))].astype(np.float32)
                D, I = faiss.knn(xq, block, given.k, metric=faiss.METRIC_INNER_PRODUCT)  # noqa: E741
                heap.add_result(D, I.astype(np.int64) + first)
                first += len(block)
        heap.finalize()
        return heap.D, heap.I

    return search


def measured(arm: str, folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """One call of an arm, in this process: CPU and wall seconds, peak memory; its answer is saved."""
    work = {"rog": rog, "faiss": faiss_blocks}[arm](
        sorted(folder.glob("*.npy")), queries(given.queries, given.dim), given
    )
    cpu, wall = time.process_time(), time.perf_counter()
    D, I = work()  # noqa: E741
    spent = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
    np.savez(folder / arm, D=D, I=I)
    return spent | {"peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB}


def same_rows(folder: Path) -> tuple[bool, int]:
    """Whether both arms found the same rows for every query, and how many rows differ only within rounding of the k-th score."""
    ours, theirs = (np.load(folder / f"{arm}.npz") for arm in ("rog", "faiss"))
    equal, tied = True, 0
    for D, mine, other in zip(ours["D"], ours["I"], theirs["I"], strict=True):
        odd = ~np.isin(mine, other)
        tied += int(odd.sum())
        equal &= bool((D[odd] - D[-1] < 1e-6).all())
    return equal, tied


def ceilings(folder: Path, given: argparse.Namespace) -> dict[str, float]:
    """Rows per second that a copy from memory to the GPU and the bf16 product could pass, each alone."""
    import torch

    host = torch.zeros(131072, given.dim, dtype=torch.float16).pin_memory()
    xq = torch.randn(given.queries, given.dim, device=given.device).bfloat16()
    xb = torch.randn(131072, given.dim, device=given.device).bfloat16()

    def rate(work: Any) -> float:
        for _ in range(3):
            work()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(20):
            work()
        torch.cuda.synchronize()
        return 20 * 131072 / (time.perf_counter() - started)

    started, data = time.perf_counter(), 0
    for path in sorted(folder.glob("img_emb_*.npy")):
        data += len(path.read_bytes())
    read = data / (2 * given.dim) / (time.perf_counter() - started)
    return {
        "read_rows_per_second": read,
        "copy_rows_per_second": rate(lambda: host.to(given.device, non_blocking=True)),
        "product_rows_per_second": rate(lambda: xq @ xb.T),
    }


def compare(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    write_pool(folder, given.rows, given.dim, given.files)
    spawn = multiprocessing.get_context("spawn")
    results: dict[str, list[dict[str, Any]]] = {"rog": [], "faiss": []}
    equal, tied = True, 0
    for repeat in range(given.repeats):
        for arm, measurements in results.items():
            with spawn.Pool(1) as process:
                measurements.append(process.apply(measured, (arm, folder, given)))
            print(f"{repeat + 1}/{given.repeats} {arm}: {json.dumps(measurements[-1])}", flush=True)
        same, odd = same_rows(folder)
        equal, tied = equal and same, max(tied, odd)
    seconds = {arm: [one["cpu_seconds"] for one in measurements] for arm, measurements in results.items()}
    ratios = [theirs / own for own, theirs in zip(seconds["rog"], seconds["faiss"], strict=True)]
    return {
        "name": "scan",
        "ratio": median(seconds["faiss"]) / median(seconds["rog"]),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "outputs_equal": equal,
        "tied": tied,
        "cpu_seconds": {arm: median(spent) for arm, spent in seconds.items()},
        "peak_memory_gib": {arm: max(one["peak_memory_gib"] for one in found) for arm, found in results.items()},
        "size": vars(given),
    }


def on_gpu(folder: Path, given: argparse.Namespace) -> dict[str, Any]:
    """Our scan's rate over the smaller of the rates at which the machine could read the rows and multiply them."""
    write_pool(folder, given.rows, given.dim, given.files)
    rates = ceilings(folder, given)
    work = rog(sorted(folder.glob("*.npy")), queries(given.queries, given.dim), given)
    ours = []
    for _ in range(given.repeats + 1):
        started = time.perf_counter()
        D, I = work()  # noqa: E741
        ours.append(given.rows / (time.perf_counter() - started))
    np.savez(folder / "rog", D=D, I=I)
    measured("faiss", folder, given)
    ratios = [rate / min(rates.values()) for rate in ours[1:]]
    return {
        "name": "scan",
        "ratio": median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "outputs_equal": same_rows(folder)[0],
        "rows_per_second": median(ours[1:]),
        **rates,
        "size": vars(given),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"rows": 1_000_000, "dim": 768, "files": 8, "queries": 1000, "k": 1000, "repeats": 5, "threads": 1}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rival-rows", type=int, default=0, help="rows that faiss takes at a time; 0 is a whole file")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--scratch", type=Path, help="folder for the files of the pool (3.3 bytes per number); temporary otherwise"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
        given.scratch = None
        print(json.dumps((on_gpu if given.device.startswith("cuda") else compare)(Path(folder), given)))


if __name__ == "__main__":
    main()
