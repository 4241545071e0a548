"""What fastmim convert writes, loaded by timm and transformers; skipped where they are not."""

import importlib
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from fastmim.interop import convert, load_weights
from tests import accuracy
from tests.test_convert import CHECKPOINTS, TINY, assert_equal, recorded, tiny

__all__ = ["tiny"]  # the fixture, for every test here


@pytest.fixture
def peer(monkeypatch):
    """Import a library, or skip: a broken one fails in its own ways."""
    # transformers looks for Hugging Face's `kernels` and would find this checkout's folder.
    monkeypatch.setitem(sys.modules, "kernels", None)

    def load(name: str) -> ModuleType:
        try:
            return importlib.import_module(name)
        except Exception as error:
            pytest.skip(f"{name}: {error}")

    return load


@recorded
def test_vitmae_of_hugging_face_predicts_what_the_authors_code_did(tmp_path, peer):
    transformers = peer("transformers")
    convert(CHECKPOINTS / "mae" / "checkpoint-0.pth", tmp_path / "hf", to="hf")
    model, report = transformers.ViTMAEForPreTraining.from_pretrained(
        tmp_path / "hf", output_loading_info=True
    )
    assert not any(report.values())
    expected = load_file(CHECKPOINTS / "mae" / "expected.safetensors")
    with torch.no_grad():
        got = model(expected["imgs"], noise=expected["noise"])
    accuracy.golden(got.logits, expected["pred"])
    accuracy.golden(got.loss.reshape(1), expected["loss"])
    model.save_pretrained(tmp_path / "saved")
    torch.save(model.state_dict(), tmp_path / "state.pth")
    state = load_weights(CHECKPOINTS / "mae" / "checkpoint-0.pth")[0]
    for path in ("saved", "state.pth"):
        assert_equal(load_weights(tmp_path / path)[0], state)


@recorded
def test_vit_of_hugging_face_takes_the_encoder(tmp_path, peer):
    transformers = peer("transformers")
    path = CHECKPOINTS / "mae" / "pretrain_encoder.pth"
    convert(path, tmp_path / "hf", to="hf")
    model, report = transformers.ViTModel.from_pretrained(
        tmp_path / "hf", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report.values())
    model.save_pretrained(tmp_path / "saved")
    assert_equal(load_weights(tmp_path / "saved")[0], load_weights(path)[0])


@recorded
def test_timm_takes_the_encoder(tmp_path, peer):
    timm = peer("timm.models.vision_transformer")
    out = tmp_path / "vit.safetensors"
    convert(CHECKPOINTS / "rc_mae" / "checkpoint-0.pth", out, to="timm", encoder_only=True)
    sizes = {name: value for name, value in TINY.items() if not name.startswith("decoder")}
    model = timm.VisionTransformer(**sizes, num_classes=0)
    model.load_state_dict(load_file(out), strict=True)


@pytest.mark.parametrize("options", [
    dict(num_classes=0), dict(num_classes=7), dict(num_classes=7, global_pool="avg"),
])  # fmt: skip
def test_a_vit_of_timm_comes_back_strict(tmp_path, peer, options):
    timm = peer("timm.models.vision_transformer")
    sizes = {name: value for name, value in TINY.items() if not name.startswith("decoder")}
    model = timm.VisionTransformer(**sizes, **options)
    torch.save(model.state_dict(), tmp_path / "vit.pth")
    convert(tmp_path / "vit.pth", tmp_path / "out.safetensors", to="timm")
    model.load_state_dict(load_file(tmp_path / "out.safetensors"), strict=True)
