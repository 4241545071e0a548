"""The order of samples, and micro-batches of cropped uint8 pictures, from (seed, step) alone.

Whatever the number of worker processes, the size of a micro-batch and the step that was started
from, step s holds the same samples with the same pixels. So nothing of the loader needs to be
saved: resume with ``start_step``.
"""

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from weakref import WeakSet

import numpy as np
import torch
from torch import LongTensor, Tensor
from torch.utils.data import DataLoader, Dataset

from fastmim.data.augment import Augmentation, augment, eval_transform, philox
from fastmim.data.decode import BadImage
from fastmim.data.sources import Source

_ORDER_STREAM, _SUBSTITUTE_STREAM = 2, 3  # second word of the Philox key; 1 is augment's
_SUBSTITUTE_TRIES = 64  # with half of all pictures bad, 2**-64 of the samples find no substitute

_logger = logging.getLogger("fastmim.data")


class TooManyBadImages(RuntimeError):
    """More distinct pictures were unusable than the loader may replace."""


@dataclass
class Batch:
    """One micro-batch.

    Attributes:
        imgs: (b, C, H, W), uint8, contiguous.
        sample_ids: (b,), int64: the samples the order asked for. A bad one keeps its id here, so
            that masks drawn by id stay the same, while its pixels and label are its substitute's.
        labels: (b,), int64, or None.
        step, micro_step, epoch: Global step; micro-batch within it; pass over the data, from 0.
        bad: (name, reason) of each picture that failed while this micro-batch was made.
    """

    imgs: Tensor
    sample_ids: LongTensor
    labels: LongTensor | None
    step: int
    micro_step: int
    epoch: int
    bad: list[tuple[str, str]] = field(default_factory=list)


class StepSampler:
    """Which samples a step holds: a new permutation each epoch, the incomplete last batch dropped.

    The permutation sorts n 64-bit Philox words with the key (seed, 2) and the counter (0, epoch, 0,
    0): a pure function of (seed, epoch), the same with every version of NumPy.

    Args:
        num_samples: n, at least ``batch_size``.
        batch_size: Samples a step, at least 1.
        seed: In [0, 2**64).

    Raises:
        ValueError: If there are fewer samples than one batch.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int):
        _check_int("StepSampler", "batch_size", batch_size, 1)
        _check_int("StepSampler", "seed", seed, 0, 2**64 - 1)
        if num_samples < batch_size:
            raise ValueError(
                f"StepSampler: {num_samples} samples are fewer than one batch of {batch_size}, so "
                f"an epoch would have 0 steps; use a batch size of at most {num_samples} or more "
                "images"
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = num_samples // batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> tuple[int, LongTensor]:
        """(epoch, sample ids (batch_size,) int64) of a global step >= 0, in any order of steps."""
        _check_int("StepSampler.indices", "step", step, 0)
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            words = philox(self.seed, _ORDER_STREAM, epoch, 0).random_raw(self.num_samples)
            self._epoch, self._order = epoch, torch.from_numpy(np.argsort(words, kind="stable"))
        first = position * self.batch_size
        return epoch, self._order[first : first + self.batch_size].clone()


class PretrainLoader:
    """Micro-batches of random resized crops, from ``start_step`` on, without end.

    Iterating yields, for step = start_step, start_step + 1, ..., the ``batch_size // micro_batch``
    micro-batches of that step as ``Batch``. Each ``iter()`` starts anew at ``start_step``. Leaving
    the loop, an exception or ``close`` ends the worker processes; a killed worker raises
    RuntimeError here. Workers ignore SIGINT and SIGTERM, which concern the process that began them.

    A bad picture is replaced by another one, drawn by (seed, epoch, sample id), cropped as the
    sample it replaces.

    One of several processes yields its part of each step: of ``micro_batch * world_size`` samples
    after one another the ``rank``-th ``micro_batch``.

    Args:
        source: The pictures.
        batch_size: Samples an optimizer step, of all processes.
        micro_batch: Samples a ``Batch``; must divide ``batch_size / world_size``; None: all of
            them.
        image_size: (h, w) of the crops.
        seed: In [0, 2**64); of order, crops and substitutes.
        augmentation: What crops are drawn from.
        workers: Processes that read and decode; 0: this one. Each prepares whole micro-batches, two
            ahead.
        start_step: First step to yield.
        max_bad_fraction: Part of the source that may be bad, in [0, 1]; 0: none. Any other allows
            at least 8 pictures but never more than half.
        on_bad: Called with (name, reason) once for each distinct bad picture; None: a warning is
            logged.
        pin_memory: Give ``imgs`` in page-locked memory, for asynchronous copies to a GPU.
        rank: Of this process.
        world_size: Number of processes; of several, bad pictures count once ``count_bad`` is given
            what all of them met.

    Attributes:
        sampler: The ``StepSampler``; ``steps_per_epoch`` is there.
        micro_steps: Micro-batches a step.
        bad_count: Distinct bad pictures met so far.
        wait_seconds: Time spent waiting for micro-batches so far.

    Raises:
        ValueError: At construction, if a number is out of range or there are fewer samples than one
            batch, or ``world_size`` does not divide a batch.
        TooManyBadImages: While iterating.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        micro_batch: int | None = None,
        image_size: tuple[int, int],
        seed: int,
        augmentation: Augmentation | None = None,
        workers: int = 0,
        start_step: int = 0,
        max_bad_fraction: float = 1e-3,
        on_bad: Callable[[str, str], None] | None = None,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        name = type(self).__name__
        self.sampler = StepSampler(len(source), batch_size, seed)
        if batch_size % world_size:
            fits = max(1, round(batch_size / world_size)) * world_size
            raise ValueError(
                f"{name}: batch_size {batch_size} cannot be divided among {world_size} processes; "
                f"use {fits}, or a number of processes that divides it"
            )
        part = batch_size // world_size
        micro_batch = part if micro_batch is None else micro_batch
        _check_int(name, "micro_batch", micro_batch, 1)
        _check_int(name, "workers", workers, 0)
        _check_int(name, "start_step", start_step, 0)
        if part % micro_batch:
            among = f" / {world_size} processes = {part}" if world_size > 1 else ""
            raise ValueError(
                f"{name}: micro_batch {micro_batch} does not divide batch_size "
                f"{batch_size}{among}; use a divisor"
            )
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"{name}: expected max_bad_fraction in [0, 1], got {max_bad_fraction}")
        self.source = source
        self.batch_size = batch_size
        self.micro_batch = micro_batch
        self.micro_steps = part // micro_batch
        self.rank = rank
        self.world_size = world_size
        self.start_step = start_step
        self.workers = workers
        self.pin_memory = pin_memory
        self.wait_seconds = 0.0
        self._crops = _Crops(
            source, _check_size(name, image_size), seed, augmentation or Augmentation()
        )
        self._bad = _BadImages(source, max_bad_fraction, on_bad)
        self._streams: WeakSet[Iterator] = WeakSet()  # weak: leaving the loop is enough to end one

    @property
    def bad_count(self) -> int:
        return len(self._bad.reasons)

    def count_bad(self, bad: list[tuple[str, str]]) -> None:
        """Count bad pictures that processes met, as ``Batch.bad`` tells them.

        Raises:
            TooManyBadImages: If they are too many now.
        """
        self._bad.add(bad)

    def __iter__(self) -> Iterator[Batch]:
        stream = self._iterate()
        self._streams.add(stream)
        return stream

    def close(self) -> None:
        """End every iteration begun so far, and its workers. Harmless if there is none."""
        for stream in list(self._streams):
            stream.close()

    def __enter__(self) -> "PretrainLoader":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _requests(self) -> Iterator[tuple]:
        """(ids, step, micro_step, epoch) of each micro-batch; here, so workers hold no order."""
        step = self.start_step
        while True:
            epoch, ids = self.sampler.indices(step)
            parts = ids.numpy().reshape(self.micro_steps, self.world_size, -1)[:, self.rank]
            for micro_step, part in enumerate(parts):
                yield part, step, micro_step, epoch
            step += 1

    def _iterate(self) -> Iterator[Batch]:
        stream = _stream(self._crops, self._requests(), self.workers, self.pin_memory)
        try:
            while True:
                begin = time.perf_counter()
                imgs, used, bad, (ids, step, micro_step, epoch) = next(stream)
                self.wait_seconds += time.perf_counter() - begin
                if self.world_size == 1:
                    self._bad.add(bad)
                if len(used) < len(ids):
                    raise TooManyBadImages(
                        f"PretrainLoader: no usable substitute in {_SUBSTITUTE_TRIES} tries for "
                        f"{self.source.name(int(ids[len(used)]))}; {self._bad.summary()}"
                    )
                labels = self.source.labels
                yield Batch(
                    imgs=imgs,
                    sample_ids=torch.from_numpy(ids),
                    labels=None if labels is None else labels[torch.from_numpy(used)],
                    step=step,
                    micro_step=micro_step,
                    epoch=epoch,
                    bad=bad,
                )
        finally:
            stream.close()


def eval_batches(
    source: Source,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    crop_ratio: float = 0.875,
    limit: int | None = None,
    workers: int = 0,
    on_bad: Callable[[str, str], None] | None = None,
) -> Iterator[tuple[Tensor, LongTensor | None, LongTensor]]:
    """Every picture once, in order, as ``eval_transform`` cuts it; bad ones are left out.

    Args:
        source: The pictures.
        image_size: (h, w).
        batch_size: Pictures a batch, before bad ones are left out; the last batch may be smaller.
        crop_ratio: As in ``eval_transform``.
        limit: Use this many pictures, evenly spaced over the source (the first ones of a folder
            would all be of the first classes); None: all.
        workers: As in ``PretrainLoader``.
        on_bad: Called with (name, reason) for each bad picture; None: a warning is logged.

    Returns:
        Iterator of (imgs (b, C, h, w) uint8, labels (b,) int64 or None, indices (b,) int64); no
        empty batches.

    Raises:
        ValueError: At the call, if a number is out of range.
    """
    name = "eval_batches"
    _check_int(name, "batch_size", batch_size, 1)
    _check_int(name, "workers", workers, 0)
    total = count = len(source)
    if limit is not None:
        _check_int(name, "limit", limit, 1)
        count = min(limit, total)
    if not 0 < crop_ratio <= 1:
        raise ValueError(f"{name}: expected crop_ratio in (0, 1], got {crop_ratio}")
    indices = np.arange(count, dtype=np.int64) * total // count
    centres = _Centres(source, _check_size(name, image_size), crop_ratio)
    return _eval_iterate(source, centres, indices, batch_size, workers, on_bad or _log_bad)


def _eval_iterate(source, centres, indices, batch_size, workers, on_bad):
    requests = ((indices[i : i + batch_size],) for i in range(0, len(indices), batch_size))
    for imgs, used, bad, _ in _stream(centres, requests, workers, pin_memory=False):
        for name, reason in bad:
            on_bad(name, reason)
        if len(used):
            ids = torch.from_numpy(used)
            yield imgs, None if source.labels is None else source.labels[ids], ids


@dataclass
class _Crops(Dataset):
    """Request (ids, step, micro_step, epoch) -> (imgs, ids of the pixels, bad, request)."""

    source: Source
    size: tuple[int, int]
    seed: int
    augmentation: Augmentation

    def __getitem__(self, request: tuple):
        ids, _, _, epoch = request
        imgs = torch.empty(len(ids), self.source.channels, *self.size, dtype=torch.uint8)
        used, bad = [], []
        for i, index in enumerate(ids.tolist()):
            found = self._read(index, epoch, bad)
            if found is None:
                break
            img, substitute = found
            imgs[i] = augment(
                img, self.size, self.augmentation, seed=self.seed, epoch=epoch, index=index
            )
            used.append(substitute)
        return imgs, np.array(used, dtype=np.int64), bad, request

    def _read(self, index: int, epoch: int, bad: list) -> tuple[Tensor, int] | None:
        """The picture and its index, or the first usable substitute's; None if all tries fail."""
        img = _try_read(self.source, index, bad)
        if img is not None:
            return img, index
        words = philox(self.seed, _SUBSTITUTE_STREAM, epoch, index).random_raw(_SUBSTITUTE_TRIES)
        for substitute in (words % np.uint64(len(self.source))).tolist():
            img = _try_read(self.source, substitute, bad)
            if img is not None:
                return img, substitute
        return None


@dataclass
class _Centres(Dataset):
    """Request (ids,) -> (imgs, usable ids, bad, request)."""

    source: Source
    size: tuple[int, int]
    crop_ratio: float

    def __getitem__(self, request: tuple):
        (ids,) = request
        imgs = torch.empty(len(ids), self.source.channels, *self.size, dtype=torch.uint8)
        used, bad = [], []
        for index in ids.tolist():
            img = _try_read(self.source, index, bad)
            if img is not None:
                imgs[len(used)] = eval_transform(img, self.size, self.crop_ratio)
                used.append(index)
        return imgs[: len(used)], np.array(used, dtype=np.int64), bad, request


def _try_read(source: Source, index: int, bad: list[tuple[str, str]]) -> Tensor | None:
    try:
        return source.read(index)
    except BadImage as error:
        bad.append((error.name, error.reason))
        return None


class _BadImages:
    """Distinct bad pictures, their report and their limit."""

    def __init__(
        self, source: Source, max_fraction: float, on_bad: Callable[[str, str], None] | None
    ):
        self.total = len(source)
        least = 8 if max_fraction else 0
        self.allowed = min(max(math.ceil(max_fraction * self.total), least), self.total // 2)
        self.on_bad = on_bad or _log_bad
        self.reasons: dict[str, str] = {}

    def add(self, bad: list[tuple[str, str]]) -> None:
        for name, reason in bad:
            if name in self.reasons:
                continue
            self.reasons[name] = reason
            self.on_bad(name, reason)
            if len(self.reasons) > self.allowed:
                raise TooManyBadImages(f"PretrainLoader: {self.summary()}")

    def summary(self) -> str:
        first = "; ".join(f"{name}: {reason}" for name, reason in list(self.reasons.items())[:5])
        return (
            f"{len(self.reasons)} of {self.total} images cannot be used, {self.allowed} are "
            f"allowed (max_bad_fraction); the first: {first}; mend or remove them, or raise "
            "max_bad_fraction"
        )


def _log_bad(name: str, reason: str) -> None:
    _logger.warning("skipped %s: %s", name, reason)


def _stream(dataset: Dataset, requests: Iterable, workers: int, pin_memory: bool) -> Iterator:
    """``dataset[request]`` for each request, in order; made here or by worker processes."""
    if workers == 0:
        for request in requests:
            imgs, *rest = dataset[request]
            yield imgs.pin_memory() if pin_memory else imgs, *rest
        return
    stop = torch.zeros(1, dtype=torch.uint8).share_memory_()
    iterator = iter(
        DataLoader(
            _InWorker(dataset, stop),
            sampler=requests,
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            worker_init_fn=_set_signals,
            pin_memory=pin_memory,
            # forked workers share the source's memory, others get a copy; macOS cannot fork safely
            multiprocessing_context="fork" if sys.platform == "linux" else None,
            # else the DataLoader draws a seed from the global generator and so changes its state
            generator=torch.Generator(),
        )
    )
    try:
        yield from iterator
    finally:
        stop.fill_(1)
        iterator._shutdown_workers()  # `del` would wait for tracebacks that hold the iterator


@dataclass
class _InWorker(Dataset):
    """A dataset whose workers begin no request, and may be terminated, once ``stop`` is set."""

    dataset: Dataset
    stop: Tensor

    def __getitem__(self, request):
        return None if self.stop.item() else self.dataset[request]


def _as_it_is(sample):
    return sample


def _set_signals(_worker: int) -> None:
    """Ctrl-C or a scheduler's SIGTERM reaches the whole process group; the main one decides."""
    stop = torch.utils.data.get_worker_info().dataset.stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if stop.item() else None)


def _check_int(function: str, name: str, value: int, low: int, high: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{function}: expected an int for {name}, got {value!r}")
    if value < low or (high is not None and value > high):
        upper = "" if high is None else f" and at most {high}"
        raise ValueError(f"{function}: expected {name} of at least {low}{upper}, got {value}")


def _check_size(function: str, size: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(size, tuple | list) or len(size) != 2:
        raise ValueError(f"{function}: expected image_size (h, w), got {size!r}")
    for side in size:
        _check_int(function, "image_size", side, 1)
    return tuple(size)
