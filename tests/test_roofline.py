"""The least time of a step: against the published FLOPs of the methods and by hand."""

import pytest

from tests.conftest import benchmark_module

roofline = benchmark_module("roofline")
BASE, LARGE, HUGE = (
    f"mae_vit_{size}" for size in ("base_patch16", "large_patch16", "huge_patch14")
)


@pytest.mark.parametrize(
    ("model", "method", "gflop"),
    [
        ("rc_vit_small_patch16", "mae", 3.77),
        ("rc_vit_small_patch16", "rc_mae", 7.54),
        (BASE, "mae", 19.56),
        (BASE, "rc_mae", 39.12),
        (BASE, "dbot", 54.69),
        (BASE, "sdae", 45.55),
        (LARGE, "dbot", 164.67),
        (LARGE, "sdae", 133.21),
        (HUGE, "rc_mae", 194.25),
        (HUGE, "dbot", 431.89),
        (HUGE, "sdae", 345.13),
    ],
)
def test_forward_flops_of_an_image_are_those_of_the_networks(model, method, gflop):
    forward = roofline.step_parts(model, method, 1, "bf16", lean=False)[0]
    assert forward.flops / 1e9 == pytest.approx(gflop, abs=0.006)


@pytest.mark.parametrize(("method", "ratio"), [("mae", 1.0), ("rc_mae", 1.333)])
def test_a_step_is_three_times_the_student_and_once_the_teacher(method, ratio):
    parts = roofline.step_parts(LARGE, method, 1, "bf16", lean=False)
    assert sum(part.flops for part in parts) / 124.5e9 == pytest.approx(ratio, rel=0.005)


@pytest.mark.parametrize(
    ("model", "method", "batch", "tflop", "floors"),
    [
        (BASE, "mae", 256, 14.4, (29.6, 27.4)),
        (LARGE, "mae", 256, 31.1, (58.7, 55.3)),
        (LARGE, "mae", 1024, 124.5, (227, 214)),
        (HUGE, "mae", 256, 73.1, (128, 122)),
        (BASE, "rc_mae", 1024, 77, (152, 141)),
        (LARGE, "rc_mae", 256, 41.5, (77, 73)),
        (HUGE, "rc_mae", 256, 97.5, (170, 162)),
    ],
)
def test_the_floor_of_a_step_on_an_h200(model, method, batch, tflop, floors):
    parts = roofline.step_parts(model, method, batch, "bf16", lean=False)
    assert sum(part.matmul_flops for part in parts) / 1e12 == pytest.approx(tflop, rel=0.005)
    for residual, milliseconds in zip(("fp32", "bf16"), floors, strict=True):
        parts = roofline.step_parts(model, method, batch, "bf16", residual=residual)
        floor = roofline.step_total(parts, roofline.H200, "bf16").floor
        assert floor * 1e3 == pytest.approx(milliseconds, rel=0.01)


@pytest.mark.parametrize(
    ("shape", "forward", "backward"),
    [((1024, 16, 50, 64), 98, 171), ((1024, 16, 197, 32), 192, 336), ((64, 16, 785, 64), 204, 511)],
)
def test_the_floor_of_attention_on_an_h200(shape, forward, backward):
    floors = roofline.attention_floor(*shape, roofline.H200)
    assert [seconds * 1e6 for seconds in floors] == pytest.approx([forward, backward], abs=0.6)


def test_bytes_of_a_value_and_block():
    traffic = [roofline.Traffic.of(2, residual) for residual in (4, 2)]
    assert [t[:2] for t in traffic] == [(48, 90), (40, 70)]


@pytest.mark.parametrize("model", [BASE, "rc_vit_small_patch16", "mae_vit_micro_patch4"])
def test_parameters_are_counted_as_the_model_has_them(model):
    import torch

    from fastmim import create_model

    with torch.device("meta"):
        trained = [p.numel() for p in create_model(model).parameters() if p.requires_grad]
    assert roofline.Network(model, "mae", 1).parameters == sum(trained)


def test_saved_bytes_of_the_memory_modes():
    saved = {m: roofline.saved_bytes_per_image(LARGE, m) / 1e6 for m in ("lean", "checkpoint")}
    assert saved == pytest.approx({"lean": 48.9, "checkpoint": 8.1}, abs=0.05)


def test_a_faster_machine_has_a_lower_floor_and_a_larger_batch_a_higher_one():
    def floor(batch, **ceilings):
        machine = roofline.Ceilings(**{"copy": 1e11, "matmul": {"fp32": 1e12}, **ceilings})
        parts = roofline.step_parts("mae_vit_micro_patch4", "rc_mae", batch, "fp32")
        return roofline.step_total(parts, machine, "fp32").floor

    assert floor(64, copy=2e11) < floor(64) < floor(128) < 2 * floor(64)


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="vit_gigantic"):
        roofline.step_parts("vit_gigantic", "mae", 1, "fp32")
