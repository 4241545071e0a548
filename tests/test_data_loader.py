"""The loader: the same pixels for any workers, micro-batches, start; bad pictures; dead workers."""

import contextlib
import io
import itertools
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from fastmim.data import (
    Augmentation,
    BadImage,
    PretrainLoader,
    Source,
    StepSampler,
    TooManyBadImages,
    augment,
    eval_batches,
    eval_transform,
    open_source,
)


class Pixels(Source):
    """n random pictures, some of them bad; label = index."""

    def __init__(self, count, bad=(), size=(20, 24), labelled=True):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randint(0, 256, (count, 3, *size), generator=generator).to(torch.uint8)
        self.bad = frozenset(bad)
        self.labels = torch.arange(count) if labelled else None

    def __len__(self):
        return len(self.images)

    def read(self, index):
        if index in self.bad:
            raise BadImage(self.name(index), "made bad")
        return self.images[index]

    def name(self, index):
        return f"pixels[{index}]"

    def describe(self):
        return "pixels"


class WorkerKiller(Pixels):
    """Picture 30 kills the process that reads it."""

    def read(self, index):
        if index == 30:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(index)


def take(source, count, **options):
    """The first ``count`` batches."""
    options = {"batch_size": 12, "image_size": (16, 18), "seed": 7, **options}
    with PretrainLoader(source, **options) as loader:
        return list(itertools.islice(loader, count))


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.imgs, b.imgs)
        assert torch.equal(a.sample_ids, b.sample_ids)
        assert torch.equal(a.labels, b.labels)
        assert (a.step, a.micro_step, a.epoch, a.bad) == (b.step, b.micro_step, b.epoch, b.bad)


def test_every_sample_once_an_epoch():
    sampler = StepSampler(103, 10, seed=5)
    assert sampler.steps_per_epoch == 10
    orders = []
    for epoch in range(3):
        steps = [sampler.indices(epoch * 10 + i) for i in range(10)]
        assert all(
            e == epoch and ids.shape == (10,) and ids.dtype == torch.int64 for e, ids in steps
        )
        order = torch.cat([ids for _, ids in steps])
        assert len(order.unique()) == 100  # 3 are dropped
        assert 0 <= order.min() <= order.max() < 103
        orders.append(order.tolist())
    assert orders[0] != orders[1] != orders[2]
    whole = StepSampler(60, 6, seed=5)
    order = torch.cat([whole.indices(i)[1] for i in range(10)])
    assert order.sort().values.tolist() == list(range(60))


def test_steps_may_be_asked_in_any_order():
    forward = [StepSampler(40, 7, seed=1).indices(i)[1] for i in range(20)]
    sampler = StepSampler(40, 7, seed=1)
    for i in (19, 0, 7, 6, 19):
        ids = sampler.indices(i)[1]
        assert torch.equal(ids, forward[i])
        ids.zero_()  # the caller's own
    assert not torch.equal(StepSampler(40, 7, seed=2).indices(0)[1], forward[0])


def test_order_stays_what_it_is():
    # recorded here with NumPy 2.4; a change would break the resume of every run
    sampler = StepSampler(10, 5, seed=0)
    ids = [sampler.indices(i)[1].tolist() for i in range(4)]
    assert ids == [[6, 7, 2, 9, 1], [3, 5, 0, 4, 8], [1, 8, 4, 0, 6], [9, 2, 3, 7, 5]]


def test_batch_is_what_its_parts_say():
    source = Pixels(50)
    sampler = StepSampler(50, 12, 7)
    options = Augmentation(scale=(0.5, 1.0), hflip=1.0)
    for step, batch in enumerate(take(source, 6, augmentation=options)):
        epoch, ids = sampler.indices(step)
        assert (batch.step, batch.micro_step, batch.epoch) == (step, 0, epoch)
        assert torch.equal(batch.sample_ids, ids)
        assert torch.equal(batch.labels, ids)
        assert batch.imgs.shape == (12, 3, 16, 18)
        assert batch.imgs.dtype == torch.uint8
        assert batch.imgs.is_contiguous()
        assert batch.bad == []
        for img, index in zip(batch.imgs, ids.tolist(), strict=True):
            draw = {"seed": 7, "epoch": epoch, "index": index}
            assert torch.equal(img, augment(source.read(index), (16, 18), options, **draw))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    source = Pixels(50, bad=(3, 17))
    generator_state = torch.get_rng_state()
    assert_same(take(source, 15, workers=workers, micro_batch=4), take(source, 15, micro_batch=4))
    assert torch.equal(torch.get_rng_state(), generator_state)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_in_the_middle_changes_nothing(workers):
    source = Pixels(50, bad=(3, 17))
    whole = take(source, 21, micro_batch=4)
    resumed = take(source, 9, micro_batch=4, start_step=4, workers=workers)
    assert resumed[0].step == 4
    assert_same(resumed, whole[12:])


def test_micro_batches_change_nothing():
    source = Pixels(50, bad=(3, 17))
    whole = take(source, 5)
    for micro_batch in (1, 3, 6):
        parts = take(source, 5 * 12 // micro_batch, micro_batch=micro_batch)
        assert [p.micro_step for p in parts[: 12 // micro_batch]] == list(range(12 // micro_batch))
        for name in ("imgs", "sample_ids", "labels"):
            joined = torch.cat([getattr(part, name) for part in parts])
            assert torch.equal(joined, torch.cat([getattr(batch, name) for batch in whole]))
        assert [bad for p in parts for bad in p.bad] == [bad for b in whole for bad in b.bad]


def test_seed_and_epoch_change_the_pixels():
    source = Pixels(12)
    first, second = take(source, 2)
    assert (first.epoch, second.epoch) == (0, 1)
    position = second.sample_ids.tolist().index(first.sample_ids[0].item())
    assert not torch.equal(first.imgs[0], second.imgs[position])
    assert not torch.equal(take(source, 1, seed=8)[0].imgs, first.imgs)


def test_digits_and_a_source_without_labels():
    digits = take(open_source(), 1, image_size=(32, 32))[0]
    assert digits.imgs.shape == (12, 1, 32, 32)
    assert torch.equal(digits.labels, open_source().labels[digits.sample_ids])
    assert take(Pixels(20, labelled=False), 1)[0].labels is None


def test_each_iteration_starts_anew_and_waiting_is_counted():
    loader = PretrainLoader(Pixels(20), batch_size=5, image_size=(8, 8), seed=0)
    assert loader.wait_seconds == 0
    assert_same(list(itertools.islice(loader, 3)), list(itertools.islice(loader, 3)))
    assert 0 < loader.wait_seconds < 60
    assert (loader.sampler.steps_per_epoch, loader.micro_steps) == (4, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_pictures_are_replaced_counted_and_reported_once(workers):
    source = Pixels(48, bad=(3, 17, 40))
    reports = []
    loader = PretrainLoader(
        source,
        batch_size=12,
        image_size=(16, 18),
        seed=0,
        workers=workers,
        on_bad=lambda name, reason: reports.append((name, reason)),
    )
    sampler = StepSampler(48, 12, 0)
    replaced = 0
    with loader:
        for batch in itertools.islice(loader, 12):  # three epochs
            assert torch.equal(batch.sample_ids, sampler.indices(batch.step)[1])
            for i, index in enumerate(batch.sample_ids.tolist()):
                used = int(batch.labels[i])
                assert used not in source.bad
                assert (used != index) == (index in source.bad)
                replaced += used != index
                draw = {"seed": 0, "epoch": batch.epoch, "index": index}
                expected = augment(source.read(used), (16, 18), Augmentation(), **draw)
                assert torch.equal(batch.imgs[i], expected)
            assert {name for name, _ in batch.bad} >= {
                source.name(i) for i in batch.sample_ids.tolist() if i in source.bad
            }
    assert replaced == 9
    assert sorted(reports) == [(f"pixels[{i}]", "made bad") for i in (17, 3, 40)]
    assert loader.bad_count == 3


def test_substitutes_differ_between_epochs():
    batches = take(Pixels(48, bad=(3,)), 32)
    used = {int(b.labels[i]) for b in batches for i in (b.sample_ids == 3).nonzero()}
    assert len(used) > 3


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_pictures_stop_the_run(workers):
    with pytest.raises(TooManyBadImages) as caught:
        take(Pixels(1000, bad=range(0, 1000, 10)), 100, workers=workers)
    message = str(caught.value)
    assert "9 of 1000 images cannot be used, 8 are allowed" in message
    assert "pixels[" in message
    assert "made bad" in message
    assert "raise max_bad_fraction" in message


@pytest.mark.parametrize(
    ("count", "fraction", "allowed"),
    [
        (100, 0.0, 0),
        (100, 1e-9, 8),
        (20_000, 1e-3, 20),
        (20_001, 1e-3, 21),
        (10, 1.0, 5),
        (1, 1.0, 0),
        (100, 0.3, 30),
    ],
)
def test_how_many_may_be_bad(count, fraction, allowed):
    loader = PretrainLoader(
        Pixels(count, size=(1, 1), bad=range(allowed)),
        batch_size=count,
        image_size=(1, 1),
        seed=0,
        max_bad_fraction=fraction,
        on_bad=lambda *_: None,
    )
    assert len(next(iter(loader)).bad) >= allowed
    loader.source.bad |= {allowed}
    with pytest.raises(TooManyBadImages, match=f"{allowed} are allowed"):
        list(itertools.islice(loader, 2))


def test_nothing_but_bad_pictures():
    with pytest.raises(TooManyBadImages):
        take(Pixels(24, bad=range(24)), 1, on_bad=lambda *_: None)


def test_bad_pictures_are_logged_by_default(caplog):
    take(Pixels(24, bad=(5,)), 4)
    assert caplog.messages == ["skipped pixels[5]: made bad"]


def test_damaged_files_of_every_kind(tmp_path):
    def encoded(value, format):
        buffer = io.BytesIO()
        Image.new("RGB", (30, 30), (value, 0, 0)).save(buffer, format)
        return buffer.getvalue()

    for i in range(40):
        (tmp_path / f"good{i:02}.jpg").write_bytes(encoded(i, "JPEG"))
    damaged = {
        "bad-cut.jpg": encoded(1, "JPEG")[:-40],
        "bad-empty.jpg": b"",
        "bad-html.jpg": b"<html>403</html>",
        "bad-cut.png": encoded(1, "PNG")[:60],
    }
    for name, data in damaged.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "bad-vanished.png").write_bytes(encoded(1, "PNG"))
    source = open_source(tmp_path)
    (tmp_path / "bad-vanished.png").unlink()
    reports = {}
    options = {"batch_size": 45, "image_size": (8, 8), "seed": 0, "on_bad": reports.__setitem__}
    with PretrainLoader(source, workers=2, **options) as loader:
        batch = next(iter(loader))
        assert batch.imgs.shape == (45, 3, 8, 8)
        assert loader.bad_count == 5
    assert sorted(reports) == sorted([*damaged, "bad-vanished.png"])
    assert len(set(reports.values())) >= 4


def test_leaving_the_loop_ends_the_workers():
    before = len(multiprocessing.active_children())
    loader = PretrainLoader(Pixels(40), batch_size=8, image_size=(8, 8), seed=0, workers=2)
    for _ in loader:
        assert len(multiprocessing.active_children()) == before + 2
        break
    assert len(multiprocessing.active_children()) == before
    stream = iter(loader)
    next(stream)
    loader.close()
    loader.close()
    assert len(multiprocessing.active_children()) == before
    with pytest.raises(StopIteration):
        next(stream)


def test_an_error_in_the_source_ends_everything():
    class Broken(Pixels):
        def read(self, index):
            raise ZeroDivisionError("a bug, not a bad picture")

    before = len(multiprocessing.active_children())
    for workers in (0, 1):
        with pytest.raises(ZeroDivisionError, match="a bug, not a bad picture"):
            take(Broken(40), 1, workers=workers)
    assert len(multiprocessing.active_children()) == before


def test_killed_worker_is_an_error_and_no_hang():
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"killed by signal|exited unexpectedly"):
        take(WorkerKiller(40), 100, workers=2)
    assert time.monotonic() - begin < 30


SCRIPT = """
import multiprocessing, os, signal, sys, time
from fastmim.data import PretrainLoader, open_source

loader = PretrainLoader(open_source(), batch_size=64, image_size=(32, 32), seed=0, workers=2)
if sys.argv[1] == "graceful":
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    signal.signal(signal.SIGINT, lambda *_: asked.append(1))
for batch in loader:
    if batch.step == 3:
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    if sys.argv[1] == "graceful" and len(asked) == 2:
        last = batch.step
        if last >= 3:
            break
more = [b.step for b, _ in zip(loader, range(3))]
print("left in order", more, flush=True)
"""


@pytest.fixture
def start():
    """Starts a process with two workers in a group of their own, which ends with the test."""
    processes = []

    def started(mode):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process, [int(pid) for pid in process.stdout.readline().split()]

    yield started
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def assert_gone(pids, seconds):
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        ended, _, _ = select.select([descriptor], [], [], seconds)
        os.close(descriptor)
        assert ended, f"process {pid} lives on"


needs_pidfd = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="waits by pidfd: Linux")


@needs_pidfd
def test_signals_to_the_whole_group_leave_the_decision_to_the_main_process(start):
    process, pids = start("graceful")
    assert len(pids) == 2
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "left in order [0, 1, 2]" in out
    assert_gone(pids, 5)


@needs_pidfd
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_main_process(start, kind):
    process, pids = start("plain")
    assert len(pids) == 2
    if kind == signal.SIGINT:
        os.killpg(process.pid, kind)  # as Ctrl-C does
    else:
        process.kill()
    process.wait(timeout=30)
    process.stdout.close()
    process.stderr.close()
    assert process.returncode != 0
    assert_gone(pids, 20)  # orphans look for their parent every 5 s


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 51}, ValueError, r"50 samples are fewer than one batch of 51.*at most 50"),
        ({"batch_size": 0}, ValueError, "batch_size of at least 1, got 0"),
        ({"batch_size": 4.0}, TypeError, "an int for batch_size, got 4.0"),
        ({"micro_batch": 5}, ValueError, "micro_batch 5 does not divide batch_size 12"),
        ({"micro_batch": 0}, ValueError, "micro_batch of at least 1"),
        ({"workers": -1}, ValueError, "workers of at least 0"),
        ({"start_step": -1}, ValueError, "start_step of at least 0"),
        ({"seed": -1}, ValueError, "seed of at least 0"),
        ({"image_size": 32}, ValueError, r"image_size \(h, w\), got 32"),
        ({"image_size": (0, 32)}, ValueError, "image_size of at least 1, got 0"),
        ({"max_bad_fraction": 2.0}, ValueError, r"max_bad_fraction in \[0, 1\], got 2.0"),
    ],
)
def test_impossible_options_are_refused_at_construction(options, error, message):
    options = {"batch_size": 12, "image_size": (8, 8), "seed": 0, **options}
    with pytest.raises(error, match=message):
        PretrainLoader(Pixels(50, size=(1, 1)), **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_batches_are_every_picture_in_order(workers):
    source = Pixels(23, bad=(4, 9, 10, 11))
    reports = []
    batches = list(
        eval_batches(
            source,
            image_size=(10, 12),
            batch_size=3,
            workers=workers,
            on_bad=lambda name, reason: reports.append(name),
        )
    )
    indices = torch.cat([ids for _, _, ids in batches])
    assert indices.tolist() == [i for i in range(23) if i not in source.bad]
    assert torch.equal(torch.cat([labels for _, labels, _ in batches]), indices)
    assert reports == [f"pixels[{i}]" for i in (4, 9, 10, 11)]
    imgs = torch.cat([imgs for imgs, _, _ in batches])
    for img, index in zip(imgs, indices.tolist(), strict=True):
        assert torch.equal(img, eval_transform(source.read(index), (10, 12)))
    assert all(len(ids) for _, _, ids in batches)  # 9, 10, 11 would be an empty one


def test_eval_limit_is_spread_over_the_source():
    def ids(**options):
        found = eval_batches(Pixels(100), image_size=(4, 4), batch_size=8, **options)
        return np.concatenate([i.numpy() for _, _, i in found]).tolist()

    assert ids(limit=10) == list(range(0, 100, 10))
    assert ids(limit=1000) == ids() == list(range(100))


def test_eval_without_labels():
    _, labels, _ = next(eval_batches(Pixels(5, labelled=False), image_size=(4, 4), batch_size=2))
    assert labels is None


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"limit": 0}, {"crop_ratio": 0.0}, {"image_size": (4,)}]
)
def test_impossible_eval_options_are_refused_at_the_call(options):
    with pytest.raises(ValueError, match="eval_batches: expected"):
        eval_batches(Pixels(5), **{"image_size": (4, 4), "batch_size": 2, **options})


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_processes_share_each_micro_batch_of_a_step(micro_batch):
    source = Pixels(40)
    whole = take(source, 8, micro_batch=micro_batch and 3 * micro_batch)
    parts = [take(source, 8, micro_batch=micro_batch, rank=i, world_size=3) for i in range(3)]
    for expected, *got in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([batch.imgs for batch in got]), expected.imgs)
        assert torch.equal(torch.cat([batch.sample_ids for batch in got]), expected.sample_ids)
        places = {(batch.step, batch.micro_step, batch.epoch) for batch in got}
        assert places == {(expected.step, expected.micro_step, expected.epoch)}


def test_bad_pictures_of_several_processes_count_when_all_know_of_them():
    named = []
    loader = PretrainLoader(
        Pixels(40, bad=range(20)),
        batch_size=12,
        image_size=(16, 18),
        seed=7,
        world_size=2,
        max_bad_fraction=0.1,
        on_bad=lambda name, _reason: named.append(name),
    )
    met = [bad for batch in itertools.islice(loader, 8) for bad in batch.bad]
    assert len(set(met)) > 8
    assert (loader.bad_count, named) == (0, [])
    with pytest.raises(TooManyBadImages, match="9 of 40 images cannot be used, 8 are allowed"):
        loader.count_bad(met)
    assert len(named) == 9


def test_batch_that_does_not_fit_the_processes_is_refused():
    source = Pixels(40)
    with pytest.raises(ValueError, match=r"batch_size 10 cannot be divided among 3 .* use 9, or"):
        take(source, 1, batch_size=10, world_size=3)
    with pytest.raises(ValueError, match="3 does not divide batch_size 12 / 3 processes = 4; use"):
        take(source, 1, micro_batch=3, world_size=3)
