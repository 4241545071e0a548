"""Checkpoints under kills, full disks, flipped bits and hostile files."""

import ast
import errno
import hashlib
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmim.train import checkpoint
from fastmim.train.checkpoint import CheckpointError, CheckpointWriteError

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 60  # seconds a child process may take on two busy cores
BOUNDARIES = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")

# Runs in a process of its own that has no threads, so it can fork without care.
CHILD = """
import errno, json, os, random, resource, select, shutil, signal, sys, time
from pathlib import Path
import torch
from fastmim.train import checkpoint
torch.set_num_threads(1)
root = Path(sys.argv[1])

def parts(step, size=1000):
    return {"student": {"w": torch.full((size,), float(step)), "b": torch.tensor(step)},
            "optimizer": {"m": torch.full((size,), -float(step))}}

def refused(path, reason):
    pass

def valid_step():
    '''Step of the newest valid checkpoint, proven by its content.'''
    found = checkpoint.latest(root, on_invalid=refused)
    assert found is not None, sorted(map(str, root.iterdir()))
    student, optimizer = found.parts["student"], found.parts["optimizer"]
    assert (student["w"] == found.step).all() and int(student["b"]) == found.step
    assert (optimizer["m"] == -found.step).all() and found.state == {"step": found.step}
    return found.step

def temporaries():
    return [name for name in os.listdir(root) if name.startswith(".step-")]
"""


@pytest.fixture(autouse=True)
def bounded():
    """No fault may end in a hang, nor its test."""

    def stop(number, frame):
        raise TimeoutError(f"still running after {TIMEOUT} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIMEOUT)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def parts(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return {
        "student": {
            "w": torch.randn(16, 9, generator=generator),
            "b": torch.randn(5, generator=generator).bfloat16(),
        },
        "optimizer": {"step": torch.tensor(step), "m": torch.randn(99, generator=generator)},
    }


def refuse_none(path: Path, reason: str) -> None:
    raise AssertionError(f"{path}: {reason}")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(raw(a), raw(b))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def assert_holds(found: checkpoint.Checkpoint | None, step: int) -> None:
    assert found is not None
    assert found.step == step
    assert found.state == {"step": step}
    for part, tensors in parts(step).items():
        assert found.parts[part].keys() == tensors.keys()
        assert all(same_bits(found.parts[part][name], tensors[name]) for name in tensors)


def save(root: Path, step: int, **options: int) -> Path:
    return checkpoint.save(root, step, parts(step), {"step": step}, **options)


def names(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if name != ".lock")


def run_child(root: Path, script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", CHILD + script, str(root)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_dtype_comes_back_bitwise(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, dtype in checkpoint._DTYPES.items():
        bits = torch.randint(0, 256, (3, 5, 16), generator=generator, dtype=torch.uint8)
        tensors[name] = bits > 127 if dtype == torch.bool else bits.view(dtype)  # NaN payloads too
    checkpoint.save(tmp_path, 0, {"all": tensors}, {})
    found = checkpoint.load(tmp_path / "step-00000000").parts["all"]
    assert found.keys() == tensors.keys()
    assert [n for n in tensors if not same_bits(found[n], tensors[n])] == []


def test_odd_tensors_come_back_bitwise(tmp_path):
    base = torch.randn(8, 12)
    odd = {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": torch.randn(1, 4).expand(3, 4),
        "shared": base,
        "shared again": base.view(-1),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "needs grad": (torch.randn(3, requires_grad=True) * 2),
        "conjugate": torch.randn(4, dtype=torch.complex64).conj(),
        "negative": torch.randn(4, dtype=torch.complex64).conj().imag,
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        'ünïcode \N{SNOWMAN} "quoted"\n': torch.ones(1),
        "one byte": torch.ones(1, dtype=torch.uint8),
        "": torch.zeros(1),
        "large": torch.randn((9 << 20) // 4 + 1),  # more than one chunk
    }
    checkpoint.save(tmp_path, 7, {"odd": odd, "none": {}}, {})
    found = checkpoint.latest(tmp_path, on_invalid=refuse_none)
    assert found.parts["none"] == {}
    assert found.parts["odd"].keys() == odd.keys()
    assert [n for n in odd if not same_bits(found.parts["odd"][n], odd[n])] == []
    assert all(tensor.is_contiguous() for tensor in found.parts["odd"].values())


def test_files_are_plain_safetensors(tmp_path):
    path = save(tmp_path, 3)
    for part, tensors in parts(3).items():
        found = safetensors.torch.load_file(path / f"{part}.safetensors")
        assert all(same_bits(found[name], tensors[name]) for name in tensors)
        assert (path / f"{part}.safetensors").read_bytes() == safetensors.torch.save(tensors)


def test_state_comes_back_as_json(tmp_path):
    state = {"betas": (0.9, 0.95), "best": float("inf"), "name": "\ud800é", "none": None, "d": {}}
    found = checkpoint.load(checkpoint.save(tmp_path, 0, {}, state))
    assert found.state == {**state, "betas": [0.9, 0.95]}


def test_saving_twice_gives_the_same_bytes(tmp_path):
    one, two = save(tmp_path / "a", 4), save(tmp_path / "b" / "c", 4)
    assert all((one / n).read_bytes() == (two / n).read_bytes() for n in names(one))
    assert names(one) == [
        "manifest.json", "optimizer.safetensors", "state.json", "student.safetensors"
    ]  # fmt: skip


def test_a_renamed_folder_loads_but_is_not_the_latest_of_its_name(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "step-00000009")
    assert_holds(checkpoint.load(tmp_path / "step-00000009"), 2)
    refused = []
    assert_holds(checkpoint.latest(tmp_path, on_invalid=lambda *why: refused.append(why)), 1)
    assert [(path.name, "holds step 2" in why) for path, why in refused] == [
        ("step-00000009", True)
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((-1, {}, {}), ValueError, "step"),
        ((True, {}, {}), ValueError, "step"),
        ((0, {"a/b": {}}, {}), ValueError, "part name"),
        ((0, {"../a": {}}, {}), ValueError, "part name"),
        ((0, {"a": {"w": [1.0]}}, {}), TypeError, r"a\.w"),
        ((0, {"a": {"__metadata__": torch.ones(1)}}, {}), ValueError, "__metadata__"),
        ((0, {"a": {"\ud800": torch.ones(1)}}, {}), ValueError, "surrogates"),
        ((0, {"a": {"w": torch.ones(1, device="meta")}}, {}), ValueError, r"a\.w.*dense"),
        ((0, {"a": {"w": torch.eye(2).to_sparse()}}, {}), ValueError, r"a\.w.*dense"),
        ((0, {"a": {"w": torch.ones(1, dtype=torch.complex128)}}, {}), ValueError, r"a\.w"),
        ((0, {}, {"a": {"b": [torch.ones(1)]}}), TypeError, r"state\.a\.b\[0\] is a Tensor"),
        ((0, {}, {"a": {1: 2}}), TypeError, r"state\.a has the key 1"),
        ((0, {}, [1]), TypeError, "dict"),
    ],
)
def test_arguments_are_refused_before_anything_is_written(tmp_path, arguments, error, match):
    with pytest.raises(error, match=match):
        checkpoint.save(tmp_path / "root", *arguments)
    assert not (tmp_path / "root").exists()


def test_a_tensor_without_bytes_of_its_own_is_refused(tmp_path):
    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, *args, **kwargs):
            raise NotImplementedError

    wrapper = torch.Tensor._make_wrapper_subclass(Wrapper, (4,))
    with pytest.raises(ValueError, match=r"a\.w is a Wrapper; gather"):
        checkpoint.save(tmp_path, 0, {"a": {"w": wrapper}}, {})


def test_a_circular_state_is_refused(tmp_path):
    state = {}
    state["self"] = state
    with pytest.raises(ValueError, match="nested deeper"):
        checkpoint.save(tmp_path, 0, {}, state)


def test_old_checkpoints_are_pruned(tmp_path):
    for step in range(5):
        save(tmp_path, step, keep=3)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]
    save(tmp_path, 5, keep=1)
    assert names(tmp_path) == ["step-00000005"]
    with pytest.raises(ValueError, match="keep"):
        save(tmp_path, 6, keep=0)


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, step, keep=3)
    assert_holds(checkpoint.latest(tmp_path, on_invalid=refuse_none), 100_000_000)


def test_damaged_checkpoints_do_not_count_when_pruning(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, keep=9)
    os.truncate(tmp_path / "step-00000003" / "student.safetensors", 10)
    save(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]


def test_later_steps_are_left_alone(tmp_path):
    save(tmp_path, 9)
    save(tmp_path, 1, keep=1)
    assert names(tmp_path) == ["step-00000001", "step-00000009"]


@pytest.mark.parametrize("damaged", [False, True])
def test_the_same_step_is_replaced(tmp_path, damaged):
    save(tmp_path, 1)
    path = checkpoint.save(tmp_path, 2, {"student": {"old": torch.ones(1)}}, {})
    if damaged:
        (path / "manifest.json").unlink()
    assert save(tmp_path, 2) == path
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert_holds(checkpoint.latest(tmp_path, on_invalid=refuse_none), 2)


def test_foreign_files_are_left_alone(tmp_path):
    (tmp_path / "log.txt").touch()
    (tmp_path / ".step-notes").touch()
    (tmp_path / "step-00000000-best").mkdir()
    stale = tmp_path / ".step-00000001.tmp-12-0123abcd"
    stale.mkdir()
    (stale / "student.safetensors").touch()
    (save(tmp_path, 1, keep=1) / "notes.txt").write_text("the good one")
    save(tmp_path, 2, keep=2)
    assert names(tmp_path) == [
        ".step-notes", "log.txt", "step-00000000-best", "step-00000001", "step-00000002"
    ]  # fmt: skip
    assert_holds(checkpoint.load(tmp_path / "step-00000001"), 1)


def test_a_second_saver_is_refused_and_does_not_wait(tmp_path):
    with checkpoint._lock(tmp_path), pytest.raises(CheckpointWriteError, match="another process"):
        save(tmp_path, 1)
    save(tmp_path, 1)


def test_a_kill_at_a_random_instant_loses_no_finished_save(tmp_path):
    """100 SIGKILLs during repeated saves: 0 unusable, no acknowledged step lost."""
    output = run_child(
        tmp_path / "root",
        """
random.seed(0)
checkpoint.save(root, 0, parts(0, 1 << 18), {"step": 0})
acknowledged = inside = 0
for trial in range(100):
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        step = valid_step()
        while True:
            step += 1
            checkpoint.save(root, step, parts(step, 1 << 18), {"step": step})
            os.write(writer, step.to_bytes(8, "little"))
    os.close(writer)
    time.sleep(random.uniform(0.002, 0.05))  # the instant is what is tested
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with open(reader, "rb") as file:
        finished = file.read()
    if finished:
        acknowledged = int.from_bytes(finished[-8:], "little")
    assert valid_step() >= acknowledged
    inside += bool(temporaries())
checkpoint.save(root, 10**9, parts(10**9), {"step": 10**9})
assert valid_step() == 10**9 and not temporaries()
print(acknowledged, inside)
""",
    )
    acknowledged, inside = map(int, output.split())
    assert acknowledged > 0  # some saves ended, and
    assert inside > 10  # many were cut: otherwise the test shows nothing


@pytest.mark.parametrize("step", [2, 3], ids=["replaced", "new"])
def test_a_kill_at_each_system_call_leaves_a_whole_checkpoint(tmp_path, step):
    """Before each call, and in the middle of each write; on top of steps 1 and 2."""
    output = run_child(
        tmp_path / "root",
        f"""
NEW = {step}
checkpoint._CHUNK = 1000
for old in (1, 2):
    checkpoint.save(root, old, parts(old), {{"step": old}})
pristine = root.with_name("pristine")
shutil.copytree(root, pristine)

def die_at(k):
    calls = 0
    def wrap(name):
        real = getattr(os, name)
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == k:
                if name == "write":
                    real(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(os, name, call)
    for name in {BOUNDARIES!r}:
        wrap(name)

k, steps = 0, []
while True:
    k += 1
    child = os.fork()
    if not child:
        die_at(k)
        checkpoint.save(root, NEW, parts(NEW), {{"step": NEW}}, keep=1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    steps.append(valid_step())
    # whatever is left does not stand in the way of the next save
    checkpoint.save(root, 4, parts(4), {{"step": 4}}, keep=1)
    assert valid_step() == 4 and not temporaries()
    assert os.listdir(root / "step-00000004") and len(os.listdir(root)) == 2, os.listdir(root)
    if status == 0:
        break
    assert status == -signal.SIGKILL
    shutil.rmtree(root)
    shutil.copytree(pristine, root)
assert steps == sorted(steps) and steps[0] == 2 and steps[-1] == NEW, steps
print(k)
""",
    )
    assert int(output) > 40  # boundaries tried


def test_all_is_on_disk_before_the_rename_and_the_rename_before_the_removal(tmp_path, monkeypatch):
    """A kill cannot show what fsync is for; the order of the calls can."""
    save(tmp_path, 1)
    events = []
    fsync, rename = os.fsync, os.rename

    def traced_fsync(descriptor):
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def traced_rename(source, target):
        present = {source, *source.iterdir()}
        events.append(("rename", Path(source), Path(target), present))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", traced_rename)
    path = save(tmp_path / ".", 2, keep=1)
    placed = next(i for i, event in enumerate(events) if event[0] == "rename")
    _, _, target, present = events[placed]
    assert target == path
    assert {event[1] for event in events[:placed]} >= present
    assert [event[:2] for event in events[placed + 1 :]] == [
        ("fsync", tmp_path),
        ("rename", tmp_path / "step-00000001"),
    ]
    made = tmp_path / "new" / "root"
    events.clear()
    save(made, 1)
    assert [("fsync", tmp_path), ("fsync", made.parent)] == [event[:2] for event in events[:2]]


@pytest.mark.parametrize("step", [2, 3], ids=["replaced", "new"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output"), KeyboardInterrupt()])
def test_an_error_at_each_system_call_leaves_a_whole_checkpoint(tmp_path, error, step):
    pristine, root = tmp_path / "pristine", tmp_path / "root"
    save(pristine, 1)
    save(pristine, 2)
    for k in range(1, 1000):
        shutil.copytree(pristine, root)
        calls = 0
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # pruning failed

            def wrap(real):
                def call(*args, **kwargs):
                    nonlocal calls
                    calls += 1
                    if calls == k:  # noqa: B023
                        raise error
                    return real(*args, **kwargs)

                return call

            for name in BOUNDARIES:
                patch.setattr(os, name, wrap(getattr(os, name)))
            try:
                save(root, step, keep=1)
                finished = True
            except (CheckpointWriteError, KeyboardInterrupt):
                finished = False
        found = checkpoint.latest(root, on_invalid=refuse_none)
        assert_holds(found, step if finished else found.step)
        save(root, 4, keep=1)
        assert names(root) == ["step-00000004"]
        if calls < k:
            break
        shutil.rmtree(root)
    assert k > 30


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EFBIG"])
def test_an_error_while_writing_names_itself_and_leaves_nothing(tmp_path, monkeypatch, code):
    save(tmp_path, 1)

    def fail(descriptor, data):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fail)
        with pytest.raises(CheckpointWriteError, match=f"{code}.*step-00000002.*MiB") as caught:
            save(tmp_path, 2)
    assert caught.value.errno == getattr(errno, code)
    assert caught.value.path == tmp_path / "step-00000002"
    assert caught.value.needed > 0
    assert caught.value.free > 0
    assert names(tmp_path) == ["step-00000001"]
    assert_holds(checkpoint.load(tmp_path / "step-00000001"), 1)


def test_a_root_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "root").touch()
    with pytest.raises(CheckpointWriteError, match=r"ENOTDIR|EEXIST"):
        save(tmp_path / "root", 1)
    with pytest.raises(CheckpointError, match="Not a directory"):
        checkpoint.latest(tmp_path / "root", on_invalid=refuse_none)


def test_a_failed_removal_of_old_ones_warns_and_does_not_fail_the_save(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def fail(path):
        raise PermissionError(errno.EACCES, "denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        with pytest.warns(RuntimeWarning, match="not removed.*denied"):
            save(tmp_path, 2, keep=1)
    assert_holds(checkpoint.latest(tmp_path, on_invalid=refuse_none), 2)
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["step-00000003"]


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        patch.setattr(os, "mkdir", refuse_none)
        with pytest.raises(
            CheckpointWriteError, match=r"ENOSPC.*needs .* MiB, free 0\.0"
        ) as caught:
            save(tmp_path, 2)
    assert caught.value.free == 1000 < caught.value.needed
    assert names(tmp_path) == ["step-00000001"]


FULL = """
checkpoint.save(root, 1, parts(1), {"step": 1})
fill()
try:
    checkpoint.save(root, 2, parts(2, 1 << 19), {"step": 2})
except checkpoint.CheckpointWriteError as error:
    print(errno.errorcode[error.errno])
assert sorted(os.listdir(root)) == [".lock", "step-00000001"] and valid_step() == 1
release()
checkpoint.save(root, 3, parts(3, 1 << 19), {"step": 3})
assert valid_step() == 3
"""


def test_a_file_size_limit_is_survived(tmp_path):
    limit = """
def fill():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
def release():
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    assert run_child(tmp_path / "root", limit + FULL) == "EFBIG\n"


def test_a_full_disk_is_survived(tmp_path):
    """A tmpfs of 8 MiB that fills up after the free-space check."""
    root = tmp_path / "disk" / "root"
    root.parent.mkdir()
    mount = f"mount -t tmpfs -o size=8m tmpfs {root.parent}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a tmpfs")
    ballast = """
usage = shutil.disk_usage
def fill():
    (root.parent / "ballast").write_bytes(bytes(6 << 20))
    shutil.disk_usage = lambda path: usage(path)._replace(free=1 << 40)
def release():
    (root.parent / "ballast").unlink()
"""
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$0" -c "$1" "$2"',
         sys.executable, CHILD + ballast + FULL, str(root)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=TIMEOUT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "ENOSPC\n"


@pytest.fixture
def two(tmp_path):
    save(tmp_path, 1)
    return tmp_path, save(tmp_path, 2)


def assert_falls_back(root: Path, path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(name)):
        checkpoint.load(path)
    refused = []
    found = checkpoint.latest(root, on_invalid=lambda *why: refused.append(why))
    assert_holds(found, 1)
    assert [where for where, _ in refused] == [path]
    assert name in refused[0][1]


def test_truncation_at_every_64th_is_found(two):
    root, path = two
    for name in names(path):
        good = (path / name).read_bytes()
        for cut in sorted({len(good) * part // 64 for part in range(64)}):
            (path / name).write_bytes(good[:cut])
            assert_falls_back(root, path, name)
        (path / name).write_bytes(good)
    assert_holds(checkpoint.load(path), 2)


def test_flipped_bits_are_found(two):
    """1000 flips, as many in each file; 0 load."""
    root, path = two
    generator = random.Random(0)
    for name in names(path):
        good = (path / name).read_bytes()
        for _ in range(1000 // len(names(path))):
            bad = bytearray(good)
            bad[generator.randrange(len(bad))] ^= 1 << generator.randrange(8)
            (path / name).write_bytes(bad)
            assert_falls_back(root, path, name)
        (path / name).write_bytes(good)
    assert_holds(checkpoint.load(path), 2)


def test_every_byte_of_the_manifest_counts(two):
    _, path = two
    manifest = path / "manifest.json"
    good, silent = manifest.read_bytes(), []
    for place in range(len(good)):
        bad = bytearray(good)
        bad[place] ^= 1 << place % 8
        manifest.write_bytes(bad)
        try:
            checkpoint.load(path)
            silent.append(place)
        except CheckpointError:
            pass
    assert silent == []


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "student.safetensors"])
def test_a_missing_or_odd_file_is_found(two, name):
    root, path = two
    size = (path / name).stat().st_size
    (path / name).unlink()
    assert_falls_back(root, path, name)
    (path / name).mkdir()
    assert_falls_back(root, path, name)
    (path / name).rmdir()
    os.mkfifo(path / name)
    assert_falls_back(root, path, name)  # and does not wait for a writer
    (path / name).unlink()
    with open(path / name, "wb") as file:
        file.truncate(1 << 40)  # sparse: must not be read
    assert_falls_back(root, path, name)
    os.truncate(path / name, size)
    assert_falls_back(root, path, name)


def test_files_of_two_checkpoints_do_not_mix(two):
    root, path = two
    shutil.copy(root / "step-00000001" / "student.safetensors", path)
    assert_falls_back(root, path, "student.safetensors")


def test_no_checkpoint_is_none_and_all_damaged_says_so(tmp_path):
    assert checkpoint.latest(tmp_path / "absent", on_invalid=refuse_none) is None
    assert checkpoint.latest(tmp_path, on_invalid=refuse_none) is None
    (save(tmp_path, 1) / "state.json").unlink()
    refused = []
    assert checkpoint.latest(tmp_path, on_invalid=lambda *why: refused.append(why)) is None
    assert len(refused) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.float8_e5m2]
)
def test_nonfinite_tensors_are_refused_by_name(tmp_path, dtype, bad):
    fine = torch.arange(40.0)
    save(tmp_path, 1)
    poisoned = fine.clone()
    poisoned[17] = bad
    teacher = {"fine": fine.to(dtype), "block.3": poisoned.to(dtype), "count": torch.arange(3)}
    checkpoint.save(tmp_path, 2, {"teacher": teacher}, {})
    assert checkpoint.latest(tmp_path, on_invalid=refuse_none).step == 2
    refused = []
    found = checkpoint.latest(
        tmp_path, on_invalid=lambda *why: refused.append(why), refuse_nonfinite=True
    )
    assert_holds(found, 1)
    assert "teacher.safetensors: block.3 holds NaN" in refused[0][1]


def forge(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    listed = {}
    for name, data in files.items():
        (path / name).write_bytes(data)
        listed[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_bytes(checkpoint._manifest(1, listed))
    return path


def part(header: object, data: bytes = b"", *, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_dtype_off_the_list_is_named(tmp_path):
    evil = part({"a": entry("F4", [8])}, bytes(4))
    with pytest.raises(CheckpointError, match="'a' has the dtype 'F4'"):
        checkpoint.load(forge(tmp_path, {"state.json": b"{}", "student.safetensors": evil}))


class Gadget:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize(
    "evil",
    [
        b"",
        b"\0" * 7,
        part({}, size=2**63),
        part({}, size=2**64 - 1),
        part({}, size=9),
        part(b"[" * 1_000_000),
        part(b'{"a":' * 100_000),
        part(b"[]"),
        part(b"null"),
        part(b"\xff\xfe"),
        part(b"{}" + b" " * (8 << 20)),
        part({"a" * (9 << 20): entry()}, bytes(4)),
        part({str(i): entry("U8", [0], [0, 0]) for i in range(100_001)}),
        part({"a": entry("F128")}, bytes(4)),
        part({"a": entry("F4", [8])}, bytes(4)),
        part({"a": entry(None)}, bytes(4)),
        part({"a": entry(["F32"])}, bytes(4)),
        part({"a": entry(shape=[-1])}, bytes(4)),
        part({"a": entry(shape=[1.0])}, bytes(4)),
        part({"a": entry(shape=[True])}, bytes(4)),
        part({"a": entry(shape=[2**64])}, bytes(4)),
        part({"a": entry(shape=[2**62, 2**62])}, bytes(4)),
        part({"a": entry(shape=[2**62, 2**62, 0], offsets=[0, 0])}),
        part({"a": entry(shape=[2**40])}, bytes(4)),
        part({"a": entry(shape=[1] * 100_000)}, bytes(2)),
        part({"a": entry(offsets=[0, 2**63])}, bytes(4)),
        part({"a": entry(offsets=[4, 0])}, bytes(4)),
        part({"a": entry(offsets=[-4, 0])}, bytes(4)),
        part({"a": entry(), "b": entry()}, bytes(4)),
        part({"a": entry()}, bytes(8)),
        part({"a": [1, 2]}, bytes(4)),
        part({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)),
        part({"__metadata__": {"a": 1}}),
    ],
    ids=range(33),
)
def test_a_hostile_header_is_refused_at_once(tmp_path, evil):
    path = forge(tmp_path / "evil", {"state.json": b"{}", "student.safetensors": evil})
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"student\.safetensors"):
        checkpoint.load(path)
    assert time.perf_counter() - start < 10


def test_a_pickle_under_another_name_is_refused_and_not_run(tmp_path):
    marker = tmp_path / "executed"
    torch.save({"w": Gadget(marker)}, tmp_path / "zipped")
    torch.save({"w": Gadget(marker)}, tmp_path / "bare", _use_new_zipfile_serialization=False)
    for evil in (
        (tmp_path / "zipped").read_bytes(),
        (tmp_path / "bare").read_bytes(),
        *(pickle.dumps(Gadget(marker), protocol) for protocol in range(6)),
    ):
        for name in ("state.json", "student.safetensors", "manifest.json"):
            path = forge(tmp_path / "evil", {"state.json": b"{}", name: evil})
            if name == "manifest.json":
                (path / name).write_bytes(evil)
            with pytest.raises(CheckpointError, match=name):
                checkpoint.load(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "evil", [b"", b"[]", b"1", b"{", b"[" * 100_000, b"\xff", b'{"a":' * 50_000, b"9" * 5000]
)
def test_hostile_json_is_refused(tmp_path, evil):
    with pytest.raises(CheckpointError, match=r"state\.json"):
        checkpoint.load(forge(tmp_path / "evil", {"state.json": evil}))
    (tmp_path / "evil" / "manifest.json").write_bytes(evil)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        checkpoint.load(tmp_path / "evil")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", ".safetensors", "x.pt", ""]
)
def test_a_manifest_leads_nowhere_else(tmp_path, name):
    path = forge(tmp_path / "evil", {"state.json": b"{}"})
    listed = {n: {"bytes": 0, "sha256": hashlib.sha256().hexdigest()} for n in (name, "state.json")}
    (path / "manifest.json").write_bytes(checkpoint._manifest(1, listed))
    with pytest.raises(CheckpointError, match="lists a file"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "files", [[], {}, {"state.json": 3}, {"state.json": {}}, {"state.json": {"bytes": -1}}]
)
def test_an_odd_manifest_is_refused(tmp_path, files):
    path = forge(tmp_path / "evil", {"state.json": b"{}"})
    (path / "manifest.json").write_bytes(checkpoint._manifest(1, files))
    with pytest.raises(CheckpointError, match=r"\.json"):
        checkpoint.load(path)


def test_another_format_version_is_named(two, monkeypatch):
    _, path = two
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    with pytest.raises(CheckpointError, match="version 1, this fastmim reads 2"):
        checkpoint.load(path)


@pytest.mark.parametrize("folder", [ROOT / "fastmim"])
def test_no_source_file_unpickles(folder):
    """Foreign weights may pass through torch.load with a literal weights_only=True, no other."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            if {m.split(".")[0] for m in modules} & {"pickle", "dill", "cloudpickle", "joblib"}:
                found.append(f"{path}:{node.lineno}: import")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only")
                if safe != "True" or path.name == "checkpoint.py":
                    found.append(f"{path}:{node.lineno}: torch.load")
            if isinstance(node, ast.keyword) and ast.unparse(node) == "weights_only=False":
                found.append(f"{path}:{node.lineno}: weights_only=False")
    assert found == []


def test_difference_names_the_fields():
    saved = {"method": "mae", "model": {"depth": 12, "width": 768}, "betas": [0.9, 0.95], "old": 1}
    wanted = {"method": "rcmae", "model": {"depth": 24, "width": 768, "drop": 0.1}, "betas": (0.9, 0.95)}  # noqa: E501  # fmt: skip
    assert checkpoint.difference(saved, wanted) == [
        "method: checkpoint 'mae', run 'rcmae'",
        "model.depth: checkpoint 12, run 24",
        "model.drop: checkpoint has none, run 0.1",
        "old: checkpoint 1, run has none",
    ]


@pytest.mark.parametrize(
    ("saved", "wanted", "equal"),
    [
        (1, 1.0, True),
        (1, True, False),
        (0, False, False),
        (None, False, False),
        (float("nan"), float("nan"), True),
        ([1, [2, 3]], (1, (2, 3)), True),
        ([1, 2], [1, 2, 3], False),
        ("1", 1, False),
        ({}, None, False),
        ({}, {"a": 1}, False),
        ([{"a": 1}], ({"a": 1},), True),
        ([{"a": 1}], ({"a": True},), False),
    ],
)
def test_difference_compares_values_as_json_keeps_them(saved, wanted, equal):
    assert (checkpoint.difference({"x": saved}, {"x": wanted}) == []) is equal
    assert (checkpoint.difference({"x": wanted}, {"x": saved}) == []) is equal


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_no_config_differs_from_its_stored_self(config):
    data = next(checkpoint._plan_state(config).chunks())
    assert checkpoint.difference(json.loads(data), config) == []


def test_check_parts_passes_what_fits():
    checkpoint.check_parts(parts(1)["student"], parts(2)["student"], "student")


def test_check_parts_lists_what_does_not_fit():
    wanted = {f"blocks.{i}.w": torch.zeros(4, 4) for i in range(12)}
    saved = {f"blocks.{i}.w": torch.zeros(4, 4) for i in range(6)}
    saved["blocks.0.w"] = torch.zeros(4, 8)
    saved["blocks.1.w"] = torch.zeros(4, 4, dtype=torch.bfloat16)
    saved["decoder"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.check_parts(saved, wanted, "student")
    assert str(caught.value) == (
        "student: the checkpoint does not fit: 6 missing: blocks.6.w, blocks.7.w, blocks.8.w, "
        "blocks.9.w, blocks.10.w, ...; 1 unexpected: decoder; 2 of another shape or dtype: "
        "blocks.0.w (checkpoint (4, 8) float32, run (4, 4) float32), "
        "blocks.1.w (checkpoint (4, 4) bfloat16, run (4, 4) float32)"
    )
