"""The report on the installation is complete, whatever is missing."""

import importlib.metadata
import json
import re

import pytest
import torch

from fastmim import info, use_backend
from fastmim.ops import OPS
from fastmim.ops._registry import PREFERENCE


def test_json_names_every_operator_and_a_reason_for_each_other_backend(capsys):
    info.main(["--json"])
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["operators"]) == set(OPS)
    for name, devices in facts["operators"].items():
        assert "cpu" in devices
        for entry in devices.values():
            assert entry["backend"] in PREFERENCE
            assert set(entry["others"]) == set(PREFERENCE) - {entry["backend"]}
            for backend, other in entry["others"].items():
                assert other["reason"], (name, backend)
                assert (other["status"] == "absent") == (backend not in OPS[name].backends)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["cpu"]["threads"] >= 1
    assert facts["cuda"]["gpus"] or facts["cuda"]["problem"]


def test_text_names_every_operator_in_aligned_columns(capsys):
    info.main([])
    lines = capsys.readouterr().out.splitlines()
    for name in OPS:
        assert any(line.startswith(name + " ") for line in lines)
    header = next(line for line in lines if line.startswith("operator "))
    row = next(line for line in lines if line.startswith("sample_masks "))
    assert row[header.index("cuda") - 1] == row[header.index("reference") - 1] == " "


def test_a_backend_that_cannot_serve_is_told_and_not_raised(capsys):
    if torch.cuda.is_available():
        pytest.skip("the CUDA backend serves here")
    with use_backend("cuda"):
        entry = info.report()["operators"]["gather_tokens"]["cpu"]
        info.print_report()
    assert entry["backend"] is None
    assert "was requested" in entry["error"]
    assert set(entry["others"]) == set(PREFERENCE)
    assert "'cuda' was asked for and cannot serve" in capsys.readouterr().out


def test_nothing_is_required(monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    complete = info.report()
    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(info, "extension_problem", lambda: "built without it")
    monkeypatch.setattr(info, "_read", lambda path: "")
    monkeypatch.setattr(info.os, "sysconf_names", {})
    facts = info.report()
    info.print_report()
    assert _keys(facts) == _keys(complete)
    assert facts["extension"]["problem"] == "built without it"
    text = capsys.readouterr().out
    assert "built without it" in text
    assert re.search(r"^simplejpeg +not installed$", text, re.M)


def test_a_broken_driver_is_told(monkeypatch):
    def broken():
        raise RuntimeError("driver too old")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert info.report()["cuda"]["problem"] == "driver too old"


def test_variables_of_the_library_are_listed(monkeypatch):
    monkeypatch.setenv("FASTMIM_SOMETHING", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    variables = info.report()["environment"]
    assert variables["FASTMIM_SOMETHING"] == "1"
    assert variables["TRITON_INTERPRET"] is None
    assert "TORCH_CUDA_ARCH_LIST" in variables


@pytest.mark.parametrize("name", ["ATEN_CPU_CAPABILITY", "MAX_JOBS", "NVCC_THREADS", "CUDAFLAGS"])
def test_a_variable_is_printed_when_it_is_set(monkeypatch, capsys, name):
    monkeypatch.delenv(name, raising=False)
    info.print_report()
    assert name not in capsys.readouterr().out
    monkeypatch.setenv(name, "seen")
    info.print_report()
    assert re.search(rf"^{name} +'seen'$", capsys.readouterr().out, re.M)


def test_the_table_is_made_of_states_and_not_of_wording():
    others = {b: {"status": "unavailable", "reason": "can serve, ready"} for b in PREFERENCE}
    others["cpp"] = {"status": "absent", "reason": "another wording"}
    entry = {"backend": None, "error": None, "others": others}
    row, note = (list(info._operators("cpu", {"an_op": entry}))[i] for i in (1, 3))
    assert row.split() == ["an_op", "nothing", "no", "[1]", "no", "[1]", "-", "no", "[1]"]
    assert note == "[1] can serve, ready"


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("physical id\t: 0\ncore id\t\t: 0\n\nphysical id\t: 0\ncore id\t\t: 0\n", 1),
        ("physical id\t: 0\ncore id\t\t: 0\n\nphysical id\t: 1\ncore id\t\t: 0\n", 2),
        ("processor\t: 0\nFeatures\t: fp bf16\n", None),  # Arm
    ],
)
def test_cores_are_counted_once(monkeypatch, text, cores):
    monkeypatch.setattr(info, "_read", lambda path: text if path.endswith("cpuinfo") else "")
    cpu = info.report()["cpu"]
    assert cpu["cores"] == cores
    assert cpu["bf16_instructions"] == (["bf16"] if "bf16" in text else None)


def _keys(facts: dict) -> dict:
    """The names in a report, less those of the backends, which depend on what serves."""
    inner = {name: value for name, value in facts.items() if isinstance(value, dict)}
    return dict.fromkeys(facts) | {k: _keys(v) for k, v in inner.items() if k != "others"}
