"""The report on the installation is complete, whatever is missing."""

import importlib.metadata
import json

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
            assert all(entry["others"].values()), name
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
    assert "pip install simplejpeg" in text


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
