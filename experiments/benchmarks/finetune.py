"""Updates of fine-tuning: the data road and trainer of `rog finetune` against loops over ImageFolder and DataLoader.

    python experiments/benchmarks/finetune.py                     # pocket CLIP, CPU, one thread: two minutes
    python experiments/benchmarks/finetune.py --device cuda       # ViT-B/16 of random weights, batch 512: under eight minutes
    python experiments/benchmarks/finetune.py --tower tiny --rivals paper amp --repeats 2     # the form of the line above, small

`paper` is the configuration of 2406.05184: float32, DataParallel, AdamW, clipped; `amp` the same under autocast to bfloat16 without
DataParallel. Both decode each JPEG anew for each pass, crop it with Pillow and normalise it in the loader. Ours decodes once, which
is counted, spread over the repeats. All arms share the order of the images, their crops, the start and the schedule, so losses are
compared first: at each of `--curve` updates, which are the warm-up, too. Then arms alternate. Seconds are of CPU on a CPU (wall
seconds beside them), of the clock on a GPU.

`of_matrix_product` is the share that ours reaches of the rate of a large product in its type, measured in the same call, in three
passes of the whole tower an image. `stall` is how much longer an update takes with images as they are fed than with one batch that
is there already: of a set that lives on the device, and of one that is gathered from memory. One JSON object comes last: `ratio` is
the first rival's median over ours.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip.model import set_model_preprocess_cfg
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as V

from retrieve_or_generate.executors import core_count
from retrieve_or_generate.finetune import LabelledImages, recipe
from retrieve_or_generate.finetune.augment import drawn_boxes
from retrieve_or_generate.finetune.classifier import Classifier
from retrieve_or_generate.finetune.distributed import ALONE
from retrieve_or_generate.finetune.draws import Draws
from retrieve_or_generate.finetune.feed import Feed
from retrieve_or_generate.finetune.learner import Learner, shares
from retrieve_or_generate.models import Clip, load_clip
from retrieve_or_generate.pixels import decode_into
from retrieve_or_generate.seeds import seed_for
from retrieve_or_generate.settings import FinetuneSettings

SEED, CLASSES, RATE = 1, 10, 1e-5
TINY = (
    {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
)
SIZES: dict[str, dict[str, Any]] = {
    "pocket": {"images": 1024, "side": 32, "batch_size": 128, "steps": 8, "curve": 8},
    "tiny": {"images": 64, "side": 36, "batch_size": 16, "steps": 2, "curve": 2},
    "ViT-B-16": {"images": 20_000, "side": 256, "batch_size": 512, "steps": 40, "curve": 50},
}


def write_images(folder: Path, count: int, side: int) -> None:
    """JPEGs in folders of ten classes: waves whose directions are the class's, 18 kB each at 256 pixels."""
    place = np.arange(side) / side

    def write(number: int) -> None:
        rng, label = np.random.default_rng(number), number % CLASSES
        angle, waves = np.pi * label / CLASSES, rng.uniform(4, 12, 3)
        phase = np.cos(angle) * place[:, None] + np.sin(angle) * place
        grey = np.sin(2 * np.pi * (phase[..., None] * waves + rng.uniform(size=3))) + rng.normal(
            0, 0.2, (side, side, 1)
        )
        path = folder / f"class{label}" / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((127 + 60 * grey).clip(0, 255).astype(np.uint8)).save(path, quality=90)

    with ThreadPoolExecutor(core_count()) as threads:
        list(threads.map(write, range(count)))


def load_tower(name: str, device: str) -> Clip:
    torch.manual_seed(0)
    if name == "pocket":
        return load_clip("pocket", device)
    network = open_clip.CLIP(32, *TINY) if name == "tiny" else open_clip.create_model(name)
    if name == "tiny":
        set_model_preprocess_cfg(network, {"size": (32, 32), "mean": (0.5,) * 3, "std": (0.28,) * 3})
    return Clip(name, network.eval(), lambda texts: torch.ones(len(texts), network.context_length).long(), "0" * 16).to(
        device
    )


class Cropped(ImageFolder):
    """ImageFolder, each image cropped to the box that comes with its number, and normalised."""

    def __init__(self, folder: Path, clip: Clip):
        super().__init__(str(folder))
        self.size, self.mean, self.std = clip.image_size, clip.mean.flatten().tolist(), clip.std.flatten().tolist()

    def __getitem__(self, wanted: tuple[int, tuple[int, int, int, int]]) -> tuple[Tensor, int]:  # type: ignore[override]
        image, label = super().__getitem__(wanted[0])
        top, height, left, width = wanted[1]
        square = V.resized_crop(image, top, left, height, width, [self.size] * 2, InterpolationMode.BICUBIC)
        return V.normalize(V.to_dtype(V.to_image(square), torch.float32, scale=True), self.mean, self.std), label


class Boxed:
    """Batches of numbers and boxes: the order and the crops that ours draws."""

    def __init__(self, bench: Bench):
        self.order = recipe.batches(bench.settings, bench.given.images, SEED)
        self.draw = torch.Generator().manual_seed(seed_for("finetune", "augmentation", SEED))
        self.side = bench.given.side

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
        for rows in self.order:
            boxes = torch.stack(drawn_boxes(self.side, Draws(self.draw, len(rows))), 1).int().tolist()
            yield list(zip(rows.tolist(), map(tuple, boxes), strict=True))


class Rival:
    """A training loop as it is usually written. `name` is paper or amp."""

    def __init__(self, bench: Bench, name: str):
        self.device, self.amp = bench.clip.device, name == "amp"
        tower = copy.deepcopy(bench.clip.network.visual).train()
        head = nn.Linear(bench.weights.shape[0], CLASSES).to(self.device)
        with torch.no_grad():
            head.weight.copy_(bench.weights.T * bench.clip.logit_scale)
            head.bias.zero_()
        self.parameters = [*tower.parameters(), *head.parameters()]
        self.tower = tower if self.amp else nn.DataParallel(tower)
        self.head, self.plan, self.update = head, bench.plan, 0
        self.optimizer = torch.optim.AdamW(self.parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
        loader = DataLoader(
            Cropped(bench.folder, bench.clip),
            batch_sampler=Boxed(bench),
            num_workers=bench.given.workers,  # type: ignore[arg-type]
        )
        self.batches = iter(loader)

    def step(self) -> Tensor:
        images, labels = (part.to(self.device) for part in next(self.batches))
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * self.plan.rate(self.update)
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            features = F.normalize(self.tower(images), dim=-1)
            loss = F.cross_entropy(self.head(features), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.update += 1
        return loss.detach()


class Ours:
    """A trial as `rog finetune` trains it, its looks at validation left out."""

    def __init__(self, bench: Bench, precision: str):
        given, files = bench.given, [Path(path) for path, _ in ImageFolder(str(bench.folder)).samples]
        pixels = np.empty((len(files), 3, given.side, given.side), np.uint8)
        started, wall = time.process_time(), time.perf_counter()
        decode_into(
            pixels,
            lambda row: files[row].read_bytes(),
            threads=core_count() if given.device != "cpu" else given.threads,
        )
        self.decode_seconds = time.process_time() - started, time.perf_counter() - wall
        labels = np.array([int(path.parent.name.removeprefix("class")) for path in files])
        classifier = Classifier(bench.clip, bench.weights, precision)
        if given.compiled:
            classifier.compile_tower()
        train = LabelledImages(pixels, labels)
        self.learner = Learner(classifier, train, bench.settings, bench.plan, RATE, SEED)
        self.pixels, self.device = pixels, classifier.device

    def step(self) -> Tensor:
        self.learner.step()
        return self.learner.last_loss

    def shares(self) -> Iterator[np.ndarray]:
        return shares(self.learner.order, ALONE, self.learner.counts)

    def held(self) -> None:
        """From now on the same batch, which is there already."""
        order = self.learner.order
        self.learner.order = itertools.repeat(next(order))
        self.gathered()
        one = next(self.learner.feed)
        self.learner.feed = (one for _ in self.shares())
        self.learner.counts.clear()

    def gathered(self) -> None:
        """From now on a set that does not live on the device."""
        self.learner.counts.clear()
        self.learner.feed = Feed(self.pixels, self.shares(), self.device, resident=False)


class Bench:
    """What all arms share."""

    def __init__(self, given: argparse.Namespace, folder: Path):
        self.given, self.folder = given, folder
        given.images -= given.images % given.batch_size  # full batches only
        write_images(folder, given.images, given.side)
        self.clip = load_tower(given.tower, given.device)
        generator = torch.Generator().manual_seed(0)
        self.weights = F.normalize(torch.randn(self.clip.embed_dim, CLASSES, generator=generator), dim=0).to(
            given.device
        )
        updates = given.curve + given.steps * given.repeats
        epochs = -(-updates * given.batch_size // given.images)
        self.settings = FinetuneSettings(
            recipe="paper", batch_size=given.batch_size, epochs=epochs, working_size=given.side
        )
        self.plan = recipe.Plan(10 * updates, updates // 4, ())  # longer than any arm gets

    def seconds(self, step: Callable[[], Any], steps: int) -> tuple[float, float]:
        """Of CPU and of the clock, for so many updates."""
        self._wait()
        started, wall = time.process_time(), time.perf_counter()
        for _ in range(steps):
            step()
        self._wait()
        return time.process_time() - started, time.perf_counter() - wall

    def counted(self, step: Callable[[], Any], steps: int) -> float:
        """Seconds of CPU on a CPU, of the clock on a GPU."""
        return self.seconds(step, steps)[self.given.device != "cpu"]

    def make_room(self, step: Callable[[], Any]) -> None:
        """On a GPU, give back what other arms took, which all of them together might not have, and take what this one needs."""
        if self.given.device != "cpu":
            torch.cuda.empty_cache()
            step()

    def _wait(self) -> None:
        if self.given.device != "cpu":
            torch.cuda.synchronize()

    def ceiling(self, precision: str) -> float:
        """FLOP/s of a large product in this type, random numbers, the best of five."""
        size = 8192 if self.given.device != "cpu" else 1024
        a, b = (torch.randn(size, size, device=self.given.device).to(getattr(torch, precision)) for _ in range(2))
        times = [self.counted(lambda: a @ b, 3) / 3 for _ in range(6)]
        return 2 * size**3 / min(times[1:])

    def work(self) -> float:
        """FLOP of training on an image: three times the whole tower's."""
        size = self.clip.image_size
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            self.clip.network.visual(torch.zeros(1, 3, size, size, device=self.given.device))
        return 3.0 * counter.get_total_flops()


def compare(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    bench = Bench(given, folder)
    ceiling = bench.ceiling(given.precision)
    ours = Ours(bench, given.precision)
    arms: dict[str, Ours | Rival] = {"rog": ours, **{name: Rival(bench, name) for name in given.rivals}}
    if given.device == "cpu" and given.precision != "float32":
        arms["rog_float32"] = Ours(bench, "float32")
    compiling = bench.seconds(ours.step, 1)[1]  # counted among the updates of the curve
    first = {"rog": [ours.learner.last_loss.item()]}
    curves = {
        name: first.get(name, []) + [arm.step().item() for _ in range(given.curve - len(first.get(name, [])))]
        for name, arm in arms.items()
    }
    rival = given.rivals[0]
    pairs = {name: zip(curve, curves[rival], strict=True) for name, curve in curves.items()}
    apart = {name: max(abs(ours / theirs - 1) for ours, theirs in pair) for name, pair in pairs.items()}
    print(f"losses are at most {max(apart.values()):.4f} from those of {rival}", flush=True)
    cpu: dict[str, list[float]] = {name: [] for name in arms}
    wall: dict[str, list[float]] = {name: [] for name in arms}
    for repeat, (name, arm) in itertools.product(range(given.repeats), arms.items()):
        bench.make_room(arm.step)
        steps = min(given.steps, given.float32_steps) if name == "paper" else given.steps
        spread = [one / given.repeats for one in arm.decode_seconds] if isinstance(arm, Ours) else (0.0, 0.0)
        spent = [(one + more) / steps for one, more in zip(bench.seconds(arm.step, steps), spread, strict=True)]
        cpu[name].append(spent[0])
        wall[name].append(spent[1])
        print(f"{repeat + 1}/{given.repeats} {name}: {spent[0]:.3f} s of CPU, {spent[1]:.3f} s an update", flush=True)
    counted = cpu if given.device == "cpu" else wall
    medians = {name: median(values) for name, values in counted.items()}
    rate = given.batch_size / medians["rog"]
    ratios = [theirs / own for own, theirs in zip(counted["rog"], counted[rival], strict=True)]
    return {
        "name": "finetune",
        "ratio": medians[rival] / medians["rog"],
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "outputs_equal": max(apart.values()) <= 0.02,
        "ratios": {name: value / medians["rog"] for name, value in medians.items() if name != "rog"},
        "ratios_wall": {name: median(values) / median(wall["rog"]) for name, values in wall.items() if name != "rog"},
        "losses_apart": apart,
        "images_per_second": {name: given.batch_size / value for name, value in medians.items()},
        "of_matrix_product": rate * bench.work() / ceiling,
        "matrix_product_tflops": ceiling / 1e12,
        "stall": stalls(bench, ours),
        "decode_seconds": ours.decode_seconds[1],
        "compile_seconds": compiling if given.compiled else None,
        "size": {name: value for name, value in vars(given).items() if name != "out"},
    }


def stalls(bench: Bench, ours: Ours) -> dict[str, float]:
    """Share of an update that is waiting for images."""
    steps, ways = (
        max(1, bench.given.steps // 2),
        {"on_device": lambda: None, "gathered": ours.gathered, "held": ours.held},
    )
    seconds = {}
    for name, change in ways.items():
        change()
        bench.seconds(ours.step, 2)
        seconds[name] = min(bench.seconds(ours.step, steps)[1] for _ in range(3))
    return {name: 1 - seconds["held"] / value for name, value in seconds.items() if name != "held"}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tower", choices=list(SIZES), help="pocket on a CPU, ViT-B-16 on a GPU")
    parser.add_argument("--rivals", nargs="+", choices=["paper", "amp"], help="paper on a CPU, both on a GPU")
    parser.add_argument("--precision", default="bfloat16", help="of our products")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, help="on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument(
        "--workers", type=int, help="of the rivals' loader; 0 on a CPU, where it would be two processes to count"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--float32-steps", type=int, default=8, help="most updates a repeat of the arm in float32")
    for name in SIZES["pocket"]:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="depends on the tower")
    given = parser.parse_args()
    cuda = given.device != "cpu"
    defaults = {
        "tower": "ViT-B-16" if cuda else "pocket",
        "rivals": ["paper", "amp"] if cuda else ["paper"],
        "compiled": cuda,
        "workers": core_count() if cuda else 0,
    }
    for name, value in (defaults | SIZES[given.tower or defaults["tower"]]).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    return given


def main() -> None:
    given = parsed()
    torch.set_num_threads(given.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(given.threads))
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(compare(given, Path(folder))))


if __name__ == "__main__":
    main()
