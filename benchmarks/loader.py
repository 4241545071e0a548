"""Suite ``loader``: images per second of fastmim's loader and of a DataLoader with Pillow.

Both make the crops of MAE's recipe: random area and aspect, bicubic, flipped half of the time.
fastmim gives uint8, which the GPU or the patch embedding normalises; the peer does what a usual
training script does: decode, crop, resize, flip, to float, normalise, collate. The pictures are
those in ``$FASTMIM_SHARED/data``; without that folder JPEGs are drawn.
"""

import contextlib
import io
import itertools
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import libraries
from measure import Lost, attempt, judged, peak_of_call, status_of
from PIL import Image
from suite import Column, Options
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastmim.data import PretrainLoader, open_source
from fastmim.nn.patch_embed import IMAGENET_MEAN, IMAGENET_STD

NAME = "loader"
# Shape to path in the shared folder, side of the crops in pixels, images per step.
SHAPES = {
    "tiny32": ("data/cifar10-test-5k.parquet", 32, 256),
    "small224": ("data/imagenet-sample", 224, 32),
}
DEFAULT = {"cpu": list(SHAPES), "cuda": list(SHAPES)}
# fmt: off
COLUMNS: list[Column] = [
    ("shape", "shape", ""), ("pictures", "pictures", ""), ("program", "kernel_provider", ""),
    ("workers", "x_value", "d"), ("batch", "batch", "d"), ("ms", "y_value_50", ".2f"),
    ("p20", "y_value_20", ".2f"), ("p80", "y_value_80", ".2f"),
    ("img/s", "images_per_second", ".0f"), ("% of copy", "percent_of_floor", ".1f"),
    ("waited ms", "waited_ms", ".2f"), ("vs pillow", "vs_peer", ".2f"),
    ("match", "match", ""), ("status", "status", ""),
]
# fmt: on
WORDS: dict[str, list[str]] = {"peer": ["pillow"]}
_AHEAD = 2  # batches that a worker of either loader prepares in advance
_DRAWN = {32: 512, 224: 48}  # pictures drawn, by the side of the crops
_NO_PEAK = dict(peak_memory_gib=None, peak_reserved_gib=None)
_DECODERS = {"fastmim": "simplejpeg", "pillow": "pillow"}
_SAME_PIXELS = 3.0  # of 255: mean difference of two JPEG decoders


def describe() -> list[str]:
    return [
        f"suite {NAME}   pictures to batches; programs fastmim, pillow",
        *(f"  {n:10} {path}, {s} px, batch {b}" for n, (path, s, b) in SHAPES.items()),
    ]


def run(options: Options) -> Iterator[dict]:
    """A row for every kind of pictures, program and number of workers."""
    for shape in options.shapes:
        path, side, batch = SHAPES[shape]
        batch = 8 if options.smoke else (options.batch or [batch])[0]
        with _pictures(path, side) as folder:
            yield from _compare(shape, folder, side, batch, options)


def _compare(shape: str, folder: Path, side: int, batch: int, options: Options) -> Iterator[dict]:
    programs = [p for p in ("fastmim", "pillow") if options.wants(p)]
    counts = _worker_counts(options.smoke)
    options.say(f"{NAME} {shape}: {len(programs)} programs with {counts} workers")
    checks = {
        "fastmim": (_same_batches, folder, side, batch, counts),
        "pillow": (_same_pixels, folder),
    }
    right = {program: attempt(*check) is True for program, check in checks.items()}
    makers = {"fastmim": _fastmim, "pillow": _pillow}
    found: dict[tuple[str, int], _Rate | Lost] = {}
    for workers, program in itertools.product(counts, programs):
        case = (makers[program], folder, side, batch, workers, options)
        found[program, workers] = attempt(_rate, *case)
    for (program, workers), rate in found.items():
        lost = rate if isinstance(rate, Lost) else None
        p20, p50, p80 = (None,) * 3 if lost else np.quantile(rate.seconds, [0.2, 0.5, 0.8]) * 1e3
        peer = found.get(("pillow", workers))
        compared = lost is None and isinstance(peer, _Rate)
        least = batch * 3 * side**2  # of uint8: the crops are written once
        floor = options.ceilings.floor(least)
        yield dict(
            suite=NAME,
            shape=shape,
            kernel_name="load",
            kernel_provider=program,
            kernel_operation_mode="forward",
            metric_name="ms",
            dtype="uint8" if program == "fastmim" else "fp32",
            x_name="workers",
            x_value=workers,
            batch=batch,
            pictures=folder.name,
            **_decoder(program),
            **status_of(lost),
            y_value_20=p20,
            y_value_50=p50,
            y_value_80=p80,
            block_ms=[] if lost else [1e3 * seconds for seconds in rate.seconds],
            n=0 if lost else len(rate.seconds),
            images_per_second=None if lost else batch / rate.median,
            waited_ms=None if lost else rate.waited * 1e3,
            vs_peer=peer.median / rate.median if compared else None,
            **(_NO_PEAK if lost else rate.peak),
            **options.against_floor(p50, floor, least, 0, "fp32"),
            **judged(lost, 0.0 if right[program] else math.inf, 0.0),
        )


def _decoder(program: str) -> dict:
    """Fields of a row: what decodes, and its version."""
    name = _DECODERS[program]
    return dict(backend=name, libraries=libraries([name]))


@dataclass
class _Rate:
    """Of a loader.

    Attributes:
        seconds: Of each batch.
        waited: Seconds that a step of twice that length waited for a batch.
        peak: Fields of a row: of this process while a batch is fetched.
    """

    seconds: list[float]
    waited: float
    peak: dict

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def _rate(
    maker: Callable, folder: Path, side: int, batch: int, workers: int, options: Options
) -> _Rate:
    """Time batches in blocks of so many as all workers hold, the first block aside."""
    with maker(folder, side, batch, workers) as batches:
        block = max(1, workers * _AHEAD)
        for _ in range(2 * block):
            next(batches)
        seconds: list[float] = []
        begin = time.perf_counter()
        least = options.rounds * options.block_seconds / 2
        while len(seconds) < 2 or time.perf_counter() - begin < least:
            start = time.perf_counter()
            for _ in range(block):
                next(batches)
            seconds.append((time.perf_counter() - start) / block)
        step = 2 * statistics.median(seconds)
        waits = []
        for _ in range(max(2, min(block, round(2 / step)))):
            time.sleep(step)
            start = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - start)
        peak = peak_of_call(lambda: next(batches), torch.device("cpu"))
    return _Rate(seconds, statistics.median(waits), peak)


def _worker_counts(smoke: bool) -> list[int]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [0, 1] if smoke else sorted({0, 1, cores})


@contextlib.contextmanager
def _fastmim(folder: Path, side: int, batch: int, workers: int) -> Iterator[Iterator]:
    source = open_source(folder)
    with PretrainLoader(
        source, batch_size=batch, image_size=(side, side), seed=0, workers=workers
    ) as loader:
        yield iter(loader)


@contextlib.contextmanager
def _pillow(folder: Path, side: int, batch: int, workers: int) -> Iterator[Iterator]:
    loader = DataLoader(
        _PillowCrops(_encoded(folder), side),
        batch_size=batch,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        prefetch_factor=_AHEAD if workers else None,
        persistent_workers=workers > 0,
    )
    yield itertools.chain.from_iterable(itertools.repeat(loader))


@dataclass
class _PillowCrops(Dataset):
    """Random resized crops, as float32 and normalised: (3, side, side)."""

    encoded: Sequence[bytes]
    side: int

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Tensor:
        image = Image.open(io.BytesIO(self.encoded[index])).convert("RGB")
        image = image.crop(self._box(*image.size)).resize((self.side,) * 2, Image.BICUBIC)
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
        return pixels.sub_(_MEAN).div_(_STD)

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * float(torch.empty(()).uniform_(0.2, 1.0))
            aspect = float(torch.empty(()).uniform_(*np.log((3 / 4, 4 / 3))).exp())
            w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                x, y = (int(torch.randint(n + 1, ())) for n in (width - w, height - h))
                return x, y, x + w, y + h
        side = min(width, height)
        x, y = (width - side) // 2, (height - side) // 2
        return x, y, x + side, y + side


_MEAN, _STD = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))


def _encoded(path: Path) -> list[bytes]:
    """Files of a folder, or the pictures of a parquet file."""
    if path.is_dir():
        files = (f for f in sorted(path.iterdir()) if f.suffix.lower() in (".jpeg", ".jpg"))
        return [file.read_bytes() for file in files]
    import pyarrow.parquet

    return [img["bytes"] for img in pyarrow.parquet.read_table(path)["img"].to_pylist()]


@contextlib.contextmanager
def _pictures(path: str, side: int) -> Iterator[Path]:
    """The shared pictures, or a folder of drawn ones."""
    shared = os.environ.get("FASTMIM_SHARED")
    if shared and (Path(shared) / path).exists():
        yield Path(shared) / path
        return
    with tempfile.TemporaryDirectory() as folder:
        generator = np.random.default_rng(0)
        height, width = (side, side) if side < 64 else (375, 500)
        for i in range(_DRAWN[side]):
            coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((width, height), Image.BICUBIC)
            image.save(Path(folder) / f"{i:04}.jpg", quality=90)
        yield Path(folder)


def _same_batches(folder: Path, side: int, batch: int, counts: Sequence[int]) -> bool:
    """Whether the first batch is the same with any number of workers."""
    made = []
    for workers in counts:
        with _fastmim(folder, side, batch, workers) as batches:
            made.append(next(batches).imgs)
    return all(torch.equal(imgs, made[0]) for imgs in made)


def _same_pixels(folder: Path) -> bool:
    """Whether Pillow decodes the first picture as fastmim does."""
    ours = open_source(folder).read(0).float()
    theirs = np.array(Image.open(io.BytesIO(_encoded(folder)[0])).convert("RGB"))
    theirs = torch.from_numpy(theirs).permute(2, 0, 1).float()
    return ours.shape == theirs.shape and float((ours - theirs).abs().mean()) <= _SAME_PIXELS
