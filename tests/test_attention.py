"""Attention: the edges of the Triton tiles, extreme inputs, and who serves a call."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import fastmim.ops
from fastmim.ops import OPS, reference, use_backend
from fastmim.ops import _attention_libraries as libraries
from tests import accuracy
from tests.test_ops import assert_accurate, run, usable

module = sys.modules["fastmim.ops.attention"]  # the package's attribute is the function
ATTENTION, BACKWARD = OPS["attention"], OPS["attention_backward"]
TILE_EDGES = (
    *(1, 15, 16, 17, 49, 50, 51, 63, 64, 65, 66, 127, 128, 129),
    *(196, 197, 198, 207, 208, 209, 256, 257, 258, 272),
)
aten = torch.ops.aten


def assert_both_accurate(qkv, scale=None):
    """The Triton kernels, forward and backward, are as accurate as plain PyTorch."""
    scale = qkv.shape[-1] ** -0.5 if scale is None else scale
    grad = torch.randn_like(qkv[:, :, 0])
    backward = (grad, qkv, *reference.attention(qkv, scale), scale)
    for op, args in ((ATTENTION, (qkv, scale)), (BACKWARD, backward)):
        assert_accurate(op, run(op, "triton", args), args, qkv.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", TILE_EDGES)
def test_edges_of_the_tiles(tokens, dtype, device):
    assert_both_accurate(torch.randn(1, tokens, 3, 2, 16, device=device, dtype=dtype))


@pytest.mark.parametrize("tokens", [50, 65])
@pytest.mark.parametrize("head_dim", [1, 32, 48, 64, 80, 96, 128])
def test_head_dims(head_dim, tokens, device):
    assert_both_accurate(
        torch.randn(1, tokens, 3, 1, head_dim, device=device, dtype=torch.bfloat16)
    )


@pytest.mark.parametrize("tokens", [50, 80, 197])
def test_large_scores(tokens, device):
    qkv = torch.randn(1, tokens, 3, 1, 32, device=device, dtype=torch.bfloat16)
    qkv[:, :, :2] = qkv[:, :, :2].sign()
    assert_both_accurate(qkv, scale=80 / 32)  # scores from -80 to 80


@pytest.mark.parametrize("tokens", [50, 80, 197])
def test_scores_far_below_zero(tokens, device):
    """Beside them the zeros of the padding would be huge."""
    qkv = torch.randn(1, tokens, 3, 1, 32, device=device, dtype=torch.float16)
    qkv[:, :, 0], qkv[:, :, 1] = 1, -1
    assert_both_accurate(qkv, scale=80 / 32)


@pytest.mark.parametrize("tokens", [50, 197])
def test_equal_rows_give_the_mean_value(tokens, device):
    qkv = torch.randn(1, 1, 3, 1, 32, device=device).expand(1, tokens, 3, 1, 32)
    qkv = qkv.to(torch.bfloat16).contiguous()
    assert_both_accurate(qkv)
    accuracy.exact(run(ATTENTION, "triton", (qkv, 1.0))[0], qkv[:, :, 2])


def test_one_token_attends_to_itself(device):
    qkv = torch.randn(2, 1, 3, 2, 64, device=device, dtype=torch.bfloat16)
    accuracy.exact(run(ATTENTION, "triton", (qkv, 0.125))[0], qkv[:, :, 2])


def test_autocast_gives_weights_a_gradient_in_their_dtype(device, monkeypatch):
    x = torch.randn(2, 50, 32, device=device)
    usable(ATTENTION, "triton", (torch.zeros(1, 1, 3, 1, 16, device=device).bfloat16(), 1.0))
    gradients = {}
    for asked in ("triton", "reference"):
        monkeypatch.setattr(module, "_asked", asked)
        weight = torch.ones(96, 32, device=device).tril().div(32).requires_grad_()
        with torch.autocast(device, torch.bfloat16):
            out = fastmim.ops.attention(F.linear(x, weight).view(2, 50, 3, 2, 16))
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        gradients[asked] = weight.grad
    assert gradients["triton"].dtype == torch.float32
    accuracy.run(
        gradients["triton"].norm()[None].tolist(),
        gradients["reference"].norm()[None].tolist(),
        torch.bfloat16,
    )


@pytest.mark.parametrize(
    ("tokens", "head_dim", "backend"),
    [
        (50, 64, "triton"),
        (65, 80, "triton"),
        (197, 32, "triton"),
        (257, 80, "cuda"),
        (785, 64, "cuda"),
    ],
)
def test_table_chooses_for_the_shapes_of_the_models(tokens, head_dim, backend):
    assert module.gpu_choice(tokens, head_dim).backend == backend
    qkv = torch.empty(2, tokens, 3, 2, head_dim, device="meta", dtype=torch.bfloat16)
    refused = ATTENTION.refuses("cuda", (qkv, 0.1))
    assert (refused is None) == (backend == "cuda")
    if refused:
        assert "predicted" in refused or "measured" in refused
        assert ATTENTION.refuses("triton", (qkv, 0.1)) is None


def test_table_says_where_its_choices_come_from():
    assert all(c.evidence.startswith(("measured", "predicted")) for c in module.GPU_TABLE)
    assert {c.backend for c in module.GPU_TABLE} <= set(ATTENTION.backends)


def test_what_triton_cannot_differentiate_goes_to_pytorch():
    qkv = torch.empty(2, 197, 3, 2, 64, device="meta", dtype=torch.bfloat16)
    args = (qkv[:, :, 0], qkv, *reference.attention(qkv, 0.1), 0.1)
    assert BACKWARD.refuses("cuda", args) is None
    assert "do not fit" in BACKWARD.refuses("triton", args)


@pytest.mark.parametrize(
    ("shape", "dtype", "scale", "reason"),
    [
        ((1, 50, 3, 1, 64), torch.float32, 1.0, "float16 and bfloat16"),
        ((1, 50, 3, 1, 64), torch.float64, 1.0, "float16 and bfloat16"),
        ((1, 273, 3, 1, 32), torch.float16, 1.0, "273 tokens"),
        ((1, 50, 3, 1, 129), torch.float16, 1.0, "head dim 129"),
        ((1, 0, 3, 1, 64), torch.float16, 1.0, "0 tokens"),
        ((1, 50, 3, 1, 64), torch.float16, 0.0, "positive scale"),
        ((1, 50, 3, 1, 64), torch.float16, float("nan"), "positive scale"),
    ],
)
def test_triton_says_why_it_refuses(shape, dtype, scale, reason):
    args = (torch.empty(shape, device="meta", dtype=dtype), scale)
    assert reason in ATTENTION.refuses("triton", args)


@pytest.mark.parametrize("asked", ["triton", "sdpa", "flash", "cudnn", "efficient", "xformers"])
def test_attention_asked_for_is_served_or_refused(asked, monkeypatch):
    monkeypatch.setattr(module, "_asked", asked)
    with pytest.raises(RuntimeError, match=rf"\(FASTMIM_ATTENTION={asked}\), but "):
        fastmim.ops.attention(torch.zeros(1, 4, 3, 1, 4097))


def test_attention_asked_for_goes_before_the_backend_asked_for(monkeypatch):
    monkeypatch.setattr(module, "_asked", "reference")
    with use_backend("cuda"):
        assert ATTENTION.choose(torch.device("cpu")) == "reference"


def test_unknown_attention_is_refused_at_import():
    done = subprocess.run(
        [sys.executable, "-c", "import fastmim.ops"],
        env={**module.os.environ, "FASTMIM_ATTENTION": "fast"},
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert "unknown attention 'fast'; FASTMIM_ATTENTION takes auto, triton, sdpa" in done.stderr


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "reason"),
    [
        ("flash", torch.float32, 64, "flash attention takes float16, bfloat16, not"),
        ("cudnn", torch.bfloat16, 160, "multiples of 8 up to 128"),
        (None, torch.bfloat16, 20, "multiples of 8"),
        (None, torch.float64, 64, "efficient attention takes"),
    ],
)
def test_libraries_say_why_they_refuse(name, dtype, head_dim, reason):
    qkv = torch.empty(2, 7, 3, 2, head_dim, device="meta", dtype=dtype)
    assert reason in libraries.refuses(name, qkv)


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_libraries_have_the_shapes_of_the_operator(name):
    qkv = torch.empty(2, 50, 3, 4, 64, device="meta", dtype=torch.bfloat16)
    assert libraries.refuses(name, qkv) is None
    out, lse = libraries.attention(name, qkv, 0.125)
    expected = module._fake_attention(qkv, 0.125)
    for got, fake in zip((out, lse), expected, strict=True):
        assert (got.shape, got.stride(), got.dtype) == (fake.shape, fake.stride(), fake.dtype)
    grad = libraries.attention_backward(name, out, qkv, out, lse, 0.125)
    assert (grad.shape, grad.stride(), grad.dtype) == (qkv.shape, qkv.stride(), qkv.dtype)


def test_libraries_get_views_and_their_gradients_are_packed(monkeypatch):
    """With PyTorch's CPU kernel in place of a GPU library."""
    memories = set()

    def forward(q, k, v, scale):
        memories.update(t.untyped_storage().data_ptr() for t in (q, k, v))
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)

    def backward(grad, q, k, v, out, lse, scale):
        memories.update(t.untyped_storage().data_ptr() for t in (q, k, v))
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(grad, q, k, v, out, lse, 0.0, False), scale=scale
        )

    library = libraries.Library(forward, backward, (torch.float32,), 64)
    monkeypatch.setitem(libraries.LIBRARIES, "flash", library)
    qkv = torch.randn(2, 7, 3, 4, 8)
    grad = torch.randn(2, 7, 4, 8)
    out, lse = libraries.attention("flash", qkv, 0.3)
    grad_qkv = libraries.attention_backward("flash", grad, qkv, out, lse, 0.3)
    assert memories == {qkv.untyped_storage().data_ptr()}
    assert_accurate(ATTENTION, [out, lse], (qkv, 0.3), qkv.dtype)
    assert_accurate(BACKWARD, [grad_qkv], (grad, qkv, out, lse, 0.3), qkv.dtype)
