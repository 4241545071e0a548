"""What fastmim convert must not do: run a pickle, load damage, drop or bend a tensor silently."""

import argparse
import functools
import importlib
import io
import json
import operator
import os
import pathlib
import pickle
import runpy
import subprocess
import tarfile
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from safetensors.torch import save_file

from fastmim import create_model
from fastmim.cli import main
from fastmim.interop import convert, load_weights
from fastmim.models import MODELS
from fastmim.train import checkpoint
from fastmim.train.checkpoint import CheckpointError
from tests import accuracy
from tests.test_convert import TINY


class Call:
    """Pickles to a call."""

    def __init__(self, function, *arguments) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def touch(marker: pathlib.Path) -> str:
    return f"open({str(marker)!r}, 'w')"


def rebuilt(marker: pathlib.Path) -> Call:
    """Through a function that torch's restricted loader does allow."""
    state = (os.system, torch.Tensor, (f"touch {marker}",), {})
    return Call(torch._tensor._rebuild_from_type_v2, *state)


def with_state(marker: pathlib.Path) -> argparse.Namespace:
    args = argparse.Namespace(lr=1.0)
    args.model = Call(os.system, f"touch {marker}")
    return args


class Disguised(argparse.Namespace):
    """A Namespace by name, whose reconstruction is a call."""

    def __reduce__(self):
        return (eval, (self.code,))


# Each leaves the marker when it is unpickled; the control below shows that they do.
GADGETS = {
    "os.system": lambda m: Call(os.system, f"touch {m}"),
    "eval": lambda m: Call(eval, touch(m)),
    "exec": lambda m: Call(exec, touch(m)),
    "compile and exec": lambda m: Call(exec, Call(compile, touch(m), "a", "exec")),
    "open": lambda m: Call(open, str(m), "w"),
    "method": lambda m: Call(pathlib.Path.touch, m),
    "partial": lambda m: Call(functools.partial(os.system, f"touch {m}")),
    "reduce": lambda m: Call(functools.reduce, eval, [touch(m), {}]),
    "map": lambda m: Call(list, Call(map, os.system, [f"touch {m}"])),
    "methodcaller": lambda m: Call(operator.methodcaller("touch"), m),
    "subprocess": lambda m: Call(subprocess.call, ["touch", str(m)]),
    "getoutput": lambda m: Call(subprocess.getoutput, f"touch {m}"),
    "runpy": lambda m: Call(runpy._run_code, touch(m), {}),
    "nested pickle": lambda m: Call(pickle.loads, pickle.dumps(Call(eval, touch(m)))),
    "nested torch.load": lambda m: Call(
        functools.partial(torch.load, weights_only=False),
        Call(io.BytesIO, saved(Call(eval, touch(m)))),
    ),
    "namespace attribute": with_state,
    "namespace subclass": lambda m: Disguised(code=touch(m)),
    "rebuild from type": rebuilt,
    "import": lambda m: Call(eval, f"__import__('os').system('touch {m}')"),
    "popen": lambda m: Call(os.popen, f"touch {m}"),
    "importlib": lambda m: [Call(importlib.import_module, "this"), Call(eval, touch(m))],
    "ordered dict": lambda m: OrderedDict(a=Call(eval, touch(m))),
}  # fmt: skip


def saved(value: object, **options) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


def in_tar(data: bytes) -> bytes:
    """The oldest layout of torch.save."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return stream.getvalue()


@pytest.fixture
def state(monkeypatch) -> dict[str, torch.Tensor]:
    monkeypatch.setitem(MODELS, "golden_tiny", TINY)
    return dict(create_model("golden_tiny").state_dict())


def refusal(path: pathlib.Path, data: bytes | None = None, **choice) -> str:
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(CheckpointError) as error:
        load_weights(path, **choice)
    return str(error.value)


@pytest.mark.parametrize("gadget", GADGETS)
def test_a_malicious_file_is_refused_and_not_run(tmp_path, gadget, state):
    marker = tmp_path / "executed"
    evil = GADGETS[gadget](marker)
    forms = {
        "value.pth": saved(evil),
        "in args.pth": saved({"model": state, "args": evil}),
        "in optimizer.pth": saved({"model": state, "optimizer": {"state": {0: evil}}}),
        "as tensor.pth": saved({**state, "norm.bias": evil}),
        "legacy.pth": saved({"model": evil}, _use_new_zipfile_serialization=False),
        "tar.pth": in_tar(pickle.dumps(evil)),
        **{f"bare {n}.pth": pickle.dumps(evil, n) for n in range(6)},
        "renamed.safetensors": saved(evil),
    }
    for name, data in forms.items():
        message = refusal(tmp_path / name, data)
        assert name in message
        assert "\n" not in message
        assert "weights_only" not in message
        assert not marker.exists(), name


@pytest.mark.parametrize("gadget", GADGETS)
def test_the_corpus_is_dangerous(tmp_path, gadget):
    marker = tmp_path / "executed"
    data = saved(GADGETS[gadget](marker))
    try:
        torch.load(io.BytesIO(data), weights_only=False)
    except Exception as error:  # after the call, as the result is of no use
        print(error)
    for _ in range(100):
        if marker.exists():
            break
        subprocess.run(["sleep", "0.01"], check=True)  # popen does not wait
    assert marker.exists()


def test_the_refusal_names_the_class(tmp_path):
    message = refusal(tmp_path / "a.pth", saved({"model": Call(os.system, "true")}))
    assert "refused, nothing in it was run: it holds posix.system" in message


def test_a_torchscript_file_is_refused(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "a.pth")
    refusal(tmp_path / "a.pth")


# --- damage ---


def test_a_truncated_file_is_refused(tmp_path, state):
    for name, data in (
        ("a.pth", saved({"model": state})),
        ("a.safetensors", safetensors_bytes(state)),
    ):
        for part in range(64):
            refusal(tmp_path / name, data[: len(data) * part // 64])


def test_a_flipped_bit_is_found(tmp_path, state):
    """In a zip file by its sums; bits that mean nothing, such as times, may differ."""
    data = saved({"model": state})
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for place in torch.randint(8 * len(data), (200,), generator=generator).tolist():
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        (tmp_path / "a.pth").write_bytes(damaged)
        try:
            got = load_weights(tmp_path / "a.pth")[0]
        except CheckpointError:
            refused += 1
            continue
        for name, tensor in state.items():
            accuracy.exact(got[name], tensor)
    assert refused > 100


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"PK\x03\x04",
        b"\x80\x02",
        b"\x80\x04.",
        b"text",
        bytes(1000),
        saved([1]),
        saved(torch.zeros(1)),
        saved(argparse.Namespace(a=1)),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, data):
    refusal(tmp_path / "a.pth", data)


def test_files_that_are_not_there(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "a.pth")
    assert "expected a folder with model.safetensors" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.pth")
    assert "no such file or folder" in refusal(tmp_path / "pipe.pth")


@pytest.mark.parametrize("config", [b"", b"[1]", b"{", b"[" * 100_000, b"{}" + b" " * 2_000_000])
def test_a_hostile_config_is_refused(tmp_path, config, state):
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(config)
    assert "config.json" in refusal(tmp_path)


@pytest.mark.parametrize("header", ["", "[]", "{", "[" * 100_000])
def test_a_hostile_header_is_refused(tmp_path, header, state):
    save_file(state, tmp_path / "a.safetensors", {"fastmim": header})
    assert "header" in refusal(tmp_path / "a.safetensors")


@pytest.mark.parametrize("value", [[], {}, 3, "x", None, [[1]], {"a": {}}])
@pytest.mark.parametrize("key", ["converted", "identity", "epoch", "args", "groups", "method"])
@pytest.mark.parametrize("whole", [True, False])
def test_odd_folders_are_refused_with_a_message(tmp_path, whole, key, value, state):
    claims = {"converted": {"method": "mae", "epoch": 3}, "identity": {}}
    (claims if key in claims else claims["converted"])[key] = value
    moments = {f"{m}.{n}": t for m in ("exp_avg", "exp_avg_sq") for n, t in state.items() if whole}
    moments["step"] = torch.tensor(3)
    checkpoint.save(tmp_path / "run" / "checkpoints", 3, {"student": state, "optimizer": moments},
                    claims)  # fmt: skip
    load_weights(tmp_path / "run")[1].lines()
    for options in (dict(to="authors"), dict(data="digits")):
        with pytest.raises((CheckpointError, ValueError)):
            convert(
                tmp_path / "run", tmp_path / f"out{'.pth' if 'to' in options else ''}", **options
            )
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("value", [[], {}, 3, "x", None, 1.5, [[]], {"a": {}}])
def test_odd_claims_are_not_believed(tmp_path, value, state):
    keys = ("method", "model", "network", "norm_pix_loss", "num_heads", "num_attention_heads",
            "layer_norm_eps")  # fmt: skip
    claims = dict.fromkeys(keys, value)
    save_file(state, tmp_path / "a.safetensors", {"fastmim": json.dumps(claims)})
    load_weights(tmp_path / "a.safetensors")[1].lines()
    args = argparse.Namespace(**claims, shrink_num=value)
    torch.save({"model": state, "epoch": value, "args": args, "scaler": value}, tmp_path / "a.pth")
    load_weights(tmp_path / "a.pth")[1].lines()
    torch.save({"model": state, "args": value, "optimizer": value}, tmp_path / "b.pth")
    load_weights(tmp_path / "b.pth")[1].lines()
    (tmp_path / "hf").mkdir()
    save_file(state, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text(json.dumps(claims))
    load_weights(tmp_path / "hf")[1].lines()


def test_a_tensor_larger_than_its_file_is_refused(tmp_path, state):
    state["norm.bias"] = torch.zeros(1).expand(2**40)
    assert "norm.bias has the shape (1099511627776,)" in refusal(tmp_path / "a.pth", saved(state))


def test_a_compressed_file_is_refused_before_it_is_inflated(tmp_path, state, monkeypatch):
    stored = zipfile.ZipFile(io.BytesIO(saved({"model": state})))
    with zipfile.ZipFile(tmp_path / "a.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in stored.namelist():
            archive.writestr(name, stored.read(name))
    monkeypatch.setattr(zipfile.ZipFile, "open", None)  # as reading a record would
    assert "data.pkl is compressed; expected a file of torch.save" in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("odd", [torch.zeros(32).to_sparse(), torch.zeros(32, device="meta")])
def test_a_tensor_without_its_values_is_refused(tmp_path, odd, state):
    assert "norm.bias" in refusal(tmp_path / "a.pth", saved({**state, "norm.bias": odd}))


# --- the wrong tensors ---


@pytest.mark.parametrize("contents", [
    {}, {"weights": {}}, {"model": {}}, {"model": {"a": 1}}, {"model": 3},
    {"fc.weight": torch.zeros(1)}, {1: torch.zeros(1)}, {"model": {1: torch.zeros(1)}},
    {"state_dict": {"conv1.weight": torch.zeros(1)}},
])  # fmt: skip
def test_an_unknown_layout_lists_its_keys_and_what_was_expected(tmp_path, contents):
    message = refusal(tmp_path / "a.pth", saved(contents))
    assert "unknown layout" in message
    assert "xpected" in message
    inner = next((value for value in contents.values() if isinstance(value, dict)), {})
    assert any(str(key) in message for key in [*contents, *inner, "none"])


def test_missing_and_unexpected_tensors_are_all_listed(tmp_path, state):
    names = [name for name in state if name.startswith("blocks.1.") or name == "mask_token"]
    kept = {name: tensor for name, tensor in state.items() if name not in names[:-1]}
    kept |= {f"blocks.{i}.ls1.gamma": torch.ones(32) for i in range(2)}
    message = refusal(tmp_path / "a.pth", saved(kept))
    for name in [*names[:-1], "blocks.0.ls1.gamma", "blocks.1.ls1.gamma"]:
        assert name in message
    got, found = load_weights(tmp_path / "a.pth", partial=True)
    assert (found.missing, len(found.unexpected)) == (names[:-1], 2)
    assert list(got) == [name for name in state if name in kept]


@pytest.mark.parametrize(("name", "shape"), [
    ("blocks.1.attn.qkv.weight", (90, 32)),
    ("decoder_pred.weight", (100, 32)),
    ("decoder_pos_embed", (1, 5, 32)),
    ("norm.bias", ()),
    ("mask_token", (1, 1, 16)),
])  # fmt: skip
def test_a_wrong_size_is_named(tmp_path, name, shape, state):
    right = tuple(state[name].shape)
    state[name] = torch.zeros(shape)
    message = refusal(tmp_path / "a.pth", saved(state))
    assert f"{name} is {shape}, expected {right}" in message
    assert "1 tensors do not fit embed_dim 32, patch_size 8" in message


@pytest.mark.parametrize(("name", "tensor"), [
    ("blocks.999999999.norm1.weight", torch.zeros(32)),
    (f"blocks.{'9' * 5000}.norm1.weight", torch.zeros(32)),
    ("blocks.9999.norm1.weight", torch.zeros(32)),
    ("head.weight", torch.zeros(())),
    ("pos_embed", torch.zeros(1, 0, 32)),
    ("patch_embed.proj.weight", torch.zeros(32, 3, 0, 0)),
    ("patch_embed.proj.weight", torch.zeros(32, 3, 8, 4)),
    ("cls_token", torch.zeros(32)),
])  # fmt: skip
def test_absurd_tensors_are_refused(tmp_path, name, tensor, state):
    assert "a.pth: " in refusal(tmp_path / "a.pth", saved({**state, name: tensor}))


def test_sizes_of_another_model_are_named(tmp_path, state):
    torch.save(state, tmp_path / "a.pth")
    message = refusal(tmp_path / "a.pth", model="mae_vit_micro_patch4")
    assert message.endswith(
        "is no mae_vit_micro_patch4, they differ in\n  patch_size: file 8, model 4\n  embed_dim: "
        "file 32, model 128\n  depth: file 2, model 4\n  decoder_embed_dim: file 32, model 64\n  "
        "decoder_depth: file 1, model 2"
    )
    with pytest.raises(ValueError, match="did you mean golden_tiny"):
        load_weights(tmp_path / "a.pth", model="golden_tin")


def test_copies_that_differ_are_not_dropped_silently(tmp_path, state):
    other = {**state, "norm.bias": torch.ones(32)}
    torch.save({"student": state, "student_without_ddp": other, "best": 3}, tmp_path / "a.pth")
    found = load_weights(tmp_path / "a.pth")[1]
    assert found.left_out == ["student_without_ddp", "best"]


# --- the command line ---


@pytest.mark.parametrize(("options", "message"), [
    (["--out", "{tmp}/a.bin"], "expected --out to end in .safetensors, got a.bin"),
    (["--out", "{tmp}/a", "--to", "authors"], "expected --out to end in .pth, got a"),
    (["--out", "{tmp}/a.safetensors", "--to", "timm"], "pass --encoder-only"),
    (["--out", "{tmp}/a.pth", "--to", "pth"], "to"),
    (["--which", "teacher"], "the file holds no teacher, only student"),
    (["--out", "{tmp}/a", "--data", "digits"], "holds no optimizer state and epoch"),
    (["--out", "{tmp}/a.safetensors", "--data", "digits"], "--data makes a run to go on with"),
    (["--model", "golden_tin"], "did you mean golden_tiny"),
    (["--which", "both"], "which"),
    (["--image-size", "3"], "did you mean --img-size?"),
])  # fmt: skip
def test_bad_input_gets_a_message_and_leaves_nothing(tmp_path, options, message, state, capsys):
    torch.save({"model": state}, tmp_path / "in.pth")
    argv = [word.format(tmp=tmp_path) for word in options]
    assert main(["convert", str(tmp_path / "in.pth"), *argv]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


def test_the_table_is_printed(tmp_path, state, capsys):
    torch.save(
        {"model": state, "args": argparse.Namespace(norm_pix_loss=True)}, tmp_path / "in.pth"
    )
    assert main(["convert", str(tmp_path / "in.pth"), "--img-size", "[32,64]", "--out",
                 str(tmp_path / "out.safetensors")]) == 0  # fmt: skip
    printed = capsys.readouterr()
    for line in ("layout          MAE weights, encoder and decoder", "method          MAE",
                 "image           32 x 64, patches of 8, 3 channels", "norm_pix_loss   True",
                 "encoder         width 32, depth 2, heads 1, MLP 128"):  # fmt: skip
        assert line in printed.out.splitlines()
    assert "out.safetensors" in printed.err


def test_an_existing_run_is_not_overwritten(tmp_path, state):
    torch.save({"model": state}, tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "run")
    with pytest.raises(ValueError, match="holds a run already"):
        convert(tmp_path / "a.pth", tmp_path / "run")
