"""Attention: the edges of the Triton tiles, extreme inputs, and who serves a call.

``FASTMIM_FULL_GRID=1`` adds long sequences of wide heads, minutes of interpretation: before a
release.
"""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import fastmim.ops
from fastmim.ops import OPS, attention_queries, attention_varlen, reference, use_backend
from fastmim.ops import _attention_choice as choice
from fastmim.ops import _attention_libraries as libraries
from fastmim.ops.attention import attention_backends, use_attention
from tests import accuracy, test_train_engine
from tests.test_ops import assert_accurate, run, usable

module = sys.modules["fastmim.ops.attention"]  # the package's attribute is the function
ATTENTION, BACKWARD = OPS["attention"], OPS["attention_backward"]
FULL_GRID = os.environ.get("FASTMIM_FULL_GRID") == "1"
TILE_EDGES = (
    *(1, 15, 16, 17, 49, 50, 51, 63, 64, 65, 66, 127, 128, 129),
    *(196, 197, 198, 207, 208, 209, 256, 257, 258, 272),
)
# Queries and keys at the edges of both tails.
QUERY_EDGES = ((1, 2), (16, 17), (48, 65), (64, 65), (65, 64), (128, 130), (147, 197), (192, 257))
LENGTHS = ((1, 64, 16, 0, 50), (65, 1, 0, 33, 64))
aten = torch.ops.aten


def assert_both_accurate(given, *more, scale=None, op="attention", backend="triton"):
    """Forward and backward are as accurate as plain PyTorch."""
    given = given if isinstance(given, tuple) else (given,)
    scale = given[0].shape[-1] ** -0.5 if scale is None else scale
    args = (*given, *more, scale)
    out, lse = getattr(reference, op)(*args)
    backward = (torch.randn_like(out), *given, out, lse, *more, scale)
    for name, these in ((op, args), (f"{op}_backward", backward)):
        assert_accurate(OPS[name], run(OPS[name], backend, these), these, out.dtype)


def packed(tokens, heads, head_dim, device, dtype):
    return torch.randn(1, tokens, 3, heads, head_dim, device=device, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tokens", TILE_EDGES)
def test_edges_of_the_tiles(tokens, dtype, device):
    if dtype != torch.bfloat16 and tokens > (80 if dtype == torch.float32 else 129):
        pytest.skip("float32 goes to PyTorch" if dtype == torch.float32 else "as in bfloat16")
    assert_both_accurate(packed(tokens, 1 if tokens > 129 else 2, 16, device, dtype))


@pytest.mark.parametrize("tokens", [50, 65])
@pytest.mark.parametrize("head_dim", [1, 32, 48, 64, 80, 96, 128])
def test_head_dims(head_dim, tokens, device):
    assert_both_accurate(packed(tokens, 1, head_dim, device, torch.bfloat16))


@pytest.mark.skipif(not FULL_GRID, reason="FASTMIM_FULL_GRID=1 for long sequences of wide heads")
@pytest.mark.parametrize("tokens", [129, 197, 208])
@pytest.mark.parametrize("head_dim", [48, 64, 80, 96, 128])
def test_long_sequences_of_wide_heads(head_dim, tokens, device):
    assert_both_accurate(packed(tokens, 1, head_dim, device, torch.bfloat16))


@pytest.mark.parametrize(("queries", "tokens"), QUERY_EDGES)
def test_edges_of_the_tiles_of_some_queries(queries, tokens, device):
    q = torch.randn(1, queries, 1, 16, device=device, dtype=torch.bfloat16)
    kv = torch.randn(1, tokens, 2, 1, 16, device=device, dtype=torch.bfloat16)
    assert_both_accurate((q, kv), op="attention_queries")


@pytest.mark.parametrize("backend", ["triton", "cpp", "reference"])
def test_some_queries_get_the_rows_of_all(backend, device):
    qkv = torch.randn(2, 65, 3, 2, 16, device=device, dtype=torch.bfloat16)
    every, _ = run(ATTENTION, backend, (qkv, 0.25))
    some, _ = run(OPS["attention_queries"], backend, (qkv[:, 7:31, 0], qkv[:, :, 1:], 0.25))
    truth = reference.attention(qkv.double(), 0.25)[0]
    accuracy.relative(some, every[:, 7:31], truth[:, 7:31])


def starts(lengths, device):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_sequences_of_various_lengths(lengths, device):
    qkv = torch.randn(sum(lengths), 3, 1, 16, device=device, dtype=torch.bfloat16)
    assert_both_accurate(qkv, starts(lengths, device), max(lengths), op="attention_varlen")


@pytest.mark.parametrize("backend", ["triton", "cpp"])
def test_sequences_get_what_each_gets_alone(backend, device):
    lengths = (5, 0, 17, 1)
    qkv = torch.randn(sum(lengths), 3, 2, 8, device=device, dtype=torch.bfloat16)
    cuts = starts(lengths, device)
    together, _ = run(OPS["attention_varlen"], backend, (qkv, cuts, 20, 0.3))
    for a, b in pairwise(cuts.tolist()):
        if a < b:
            alone, _ = run(ATTENTION, backend, (qkv[None, a:b], 0.3))
            truth = reference.attention(qkv[None, a:b].double(), 0.3)[0]
            accuracy.relative(together[a:b], alone[0], truth[0])


@pytest.mark.parametrize(
    ("cuts", "longest"),
    [
        ([0, 3, 6], 4),  # does not end with the rows
        ([1, 3, 7], 4),  # does not begin with them
        ([0, 5, 3, 7], 5),  # falls
        ([0, 3, 7], 3),  # a sequence longer than the longest
        ([0, 9, 7], 9),  # beyond the rows and back
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_starts_that_cut_no_sequences_are_refused(cuts, longest, backend):
    qkv = torch.zeros(7, 3, 1, 8)
    cuts = torch.tensor(cuts, dtype=torch.int32)
    with use_backend(backend), pytest.raises((ValueError, RuntimeError), match="rise from 0 to"):
        attention_varlen(qkv, cuts, longest)
    with pytest.raises(ValueError, match="number of rows, 7, by at most max_seqlen"):
        attention_varlen(qkv, cuts, longest, validate=True)


@pytest.mark.parametrize("cuts", [[0, 90], [5, 3, 70], [-9, 80, 10], [0, 0, 0]])
def test_wrong_starts_touch_no_other_memory(cuts, device):
    """Unchecked on a GPU: rows outside the tensors are neither read nor written."""
    memory = torch.full((100, 3, 1, 16), 7.0, device=device, dtype=torch.bfloat16)
    qkv = memory[30:60]
    given = (qkv, torch.tensor(cuts, dtype=torch.int32, device=device), 40, 0.25)
    usable(OPS["attention_varlen"], "triton", given)
    before = memory.clone()
    with use_backend("triton"):
        out, lse = OPS["attention_varlen"](*given)
        OPS["attention_varlen_backward"](out, qkv, out, lse, *given[1:])
    accuracy.exact(memory, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: attention_queries(torch.zeros(1, 2, 3, 4), torch.zeros(1, 5, 3, 3, 4)), "kv"),
        (lambda: attention_queries(torch.zeros(1, 2, 3, 4), torch.zeros(2, 5, 2, 3, 4)), "kv"),
        (
            lambda: attention_queries(torch.zeros(1, 2, 3, 4), torch.zeros(1, 5, 2, 3, 4).half()),
            "one floating-point dtype",
        ),
        (lambda: attention_varlen(torch.zeros(7, 2, 1, 8), starts([7], "cpu"), 7), "qkv"),
        (lambda: attention_varlen(torch.zeros(7, 3, 1, 8), torch.tensor([0, 7]), 7), "int32"),
        (lambda: attention_varlen(torch.zeros(7, 3, 1, 8), starts([], "cpu"), 7), "B >= 1"),
        (lambda: attention_varlen(torch.zeros(7, 3, 1, 8), starts([7], "cpu"), 0), "max_seqlen"),
    ],
)
def test_wrong_shapes_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


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
        monkeypatch.setattr(choice, "_asked", asked)
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
    assert choice.gpu_choice(tokens, head_dim).backend == backend
    qkv = torch.empty(2, tokens, 3, 2, head_dim, device="meta", dtype=torch.bfloat16)
    refused = ATTENTION.refuses("cuda", (qkv, 0.1))
    assert (refused is None) == (backend == "cuda")
    if refused:
        assert "predicted" in refused or "measured" in refused
        assert ATTENTION.refuses("triton", (qkv, 0.1)) is None


def test_table_says_where_its_choices_come_from():
    assert all(c.evidence.startswith(("measured", "predicted")) for c in choice.GPU_TABLE)
    assert {c.backend for c in choice.GPU_TABLE} <= set(ATTENTION.backends)


def test_float32_is_left_to_pytorch_by_the_table():
    qkv = torch.empty(2, 50, 3, 2, 64, device="meta")
    assert ATTENTION.refuses("cuda", (qkv, 0.1)) is None
    assert ATTENTION.refuses("triton", (qkv, 0.1)) is None


@pytest.mark.parametrize(
    ("shape", "dtype", "scale", "reason"),
    [
        ((1, 50, 3, 1, 64), torch.float64, 1.0, "float16, bfloat16 and float32"),
        ((1, 81, 3, 1, 32), torch.float32, 1.0, "81 keys"),
        ((1, 273, 3, 1, 32), torch.float16, 1.0, "273 keys"),
        ((1, 50, 3, 1, 129), torch.float16, 1.0, "head dim 129"),
        ((1, 50, 3, 1, 65), torch.float32, 1.0, "head dim 65"),
        ((1, 0, 3, 1, 64), torch.float16, 1.0, "0 keys"),
        ((1, 50, 3, 1, 64), torch.float16, 0.0, "positive scale"),
        ((1, 50, 3, 1, 64), torch.float16, float("nan"), "positive scale"),
    ],
)
def test_triton_says_why_it_refuses(shape, dtype, scale, reason):
    args = (torch.empty(shape, device="meta", dtype=dtype), scale)
    assert reason in ATTENTION.refuses("triton", args)


def test_every_word_serves_or_says_why_not():
    """On a CPU: reference and auto serve; the others name what is missing."""
    calls = {
        fastmim.ops.attention: (torch.randn(1, 4, 3, 2, 8),),
        attention_queries: (torch.randn(1, 2, 2, 8), torch.randn(1, 4, 2, 2, 8)),
    }
    for call, given in calls.items():
        reasons = attention_backends(*given)
        assert list(reasons) == ["auto", *choice.WORDS]
        for word, reason in reasons.items():
            with use_attention(word):
                if reason is None:
                    assert call(*given).shape == (1, given[0].shape[1], 2, 8)
                    continue
                with pytest.raises(RuntimeError, match=rf"\(FASTMIM_ATTENTION={word}\), but "):
                    call(*given)
        if given[0].device.type == "cpu":
            assert reasons["auto"] is reasons["reference"] is None
            assert all("needs cuda tensors" in reasons[w] for w in ("sdpa", "flash", "xformers"))


def test_every_word_can_say_what_a_gpu_would_do():
    meta = torch.device("meta")
    call = libraries.Call(50, 50, 64, torch.bfloat16, meta, 0.1, varlen=False, empty=False)
    refused = {word: choice.refuses(word, call) for word in choice.WORDS}
    assert {word for word, reason in refused.items() if reason} <= {"xformers"}
    single = call._replace(dtype=torch.float32)
    assert "not torch.float32" in choice.refuses("flash", single)
    assert choice.refuses("efficient", single) is None
    assert choice.refuses("triton", call._replace(varlen=True)) is None


def test_a_misspelt_word_is_refused_at_once():
    with pytest.raises(ValueError, match="unknown attention 'flsh'"), use_attention("flsh"):
        pass


@pytest.mark.parametrize("word", ["auto", "triton"])
def test_32_steps_are_those_of_the_reference(word, device):
    """RC-MAE in float32, from images to updated student and teacher."""
    if word == "triton":
        usable(ATTENTION, "triton", (torch.zeros(1, 1, 3, 1, 16, device=device), 1.0))
    losses = {}
    for asked in (word, "reference"):
        with use_attention(asked):
            steps = test_train_engine.engine()
            losses[asked] = [
                steps.run_step(i, test_train_engine.batches(i, size=2)).losses["loss"]
                for i in range(32)
            ]
    accuracy.run(losses[word], losses["reference"], torch.float32)


@pytest.mark.parametrize("asked", ["triton", "sdpa", "flash", "cudnn", "efficient", "xformers"])
def test_attention_asked_for_is_served_or_refused(asked, monkeypatch):
    monkeypatch.setattr(choice, "_asked", asked)
    with pytest.raises(RuntimeError, match=rf"\(FASTMIM_ATTENTION={asked}\), but "):
        fastmim.ops.attention(torch.zeros(1, 4, 3, 1, 4097))


def test_attention_asked_for_goes_before_the_backend_asked_for(monkeypatch):
    monkeypatch.setattr(choice, "_asked", "reference")
    with use_backend("cuda"):
        assert ATTENTION.choose(torch.device("cpu")) == "reference"


def test_unknown_attention_is_refused_at_import():
    done = subprocess.run(
        [sys.executable, "-c", "import fastmim.ops"],
        env={**os.environ, "FASTMIM_ATTENTION": "fast"},
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert "unknown attention 'fast'; FASTMIM_ATTENTION takes auto, triton, sdpa" in done.stderr


def meta_call(tokens=50, head_dim=64, dtype=torch.bfloat16, *, varlen=False):
    given = (tokens, tokens, head_dim, dtype, torch.device("meta"), 0.1)
    return libraries.Call(*given, varlen=varlen, empty=False)


@pytest.mark.parametrize(
    ("name", "dtype", "head_dim", "reason"),
    [
        ("flash", torch.float32, 64, "flash attention takes float16, bfloat16, not"),
        ("cudnn", torch.bfloat16, 160, "multiples of 8 up to 128"),
        ("efficient", torch.bfloat16, 20, "multiples of 8"),
        ("efficient", torch.float64, 64, "efficient attention takes"),
    ],
)
def test_libraries_say_why_they_refuse(name, dtype, head_dim, reason):
    assert reason in libraries.refuses(name, meta_call(7, head_dim, dtype))


def assert_like(got, fakes):
    for tensor, fake in zip(got, fakes, strict=True):
        assert (tensor.shape, tensor.stride(), tensor.dtype) == (
            fake.shape,
            fake.stride(),
            fake.dtype,
        )


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
@pytest.mark.parametrize("queries", [50, 30])
def test_libraries_have_the_shapes_of_the_operator(name, queries):
    q = torch.empty(2, queries, 4, 64, device="meta", dtype=torch.bfloat16)
    kv = torch.empty(2, 50, 2, 4, 64, device="meta", dtype=torch.bfloat16)
    assert libraries.refuses(name, meta_call()) is None
    out, lse = libraries.attention(name, q, *kv.unbind(2), 0.125)
    assert_like((out, lse), module._fake_queries(q, kv, 0.125))
    grads = libraries.attention_backward(name, out, q, *kv.unbind(2), out, lse, 0.125)
    assert [g.shape for g in grads] == [q.shape, *(t.shape for t in kv.unbind(2))]


def test_flash_takes_packed_sequences():
    qkv = torch.empty(90, 3, 4, 64, device="meta", dtype=torch.bfloat16)
    cuts = torch.empty(4, device="meta", dtype=torch.int32)
    out, lse = libraries.varlen("flash", qkv, cuts, 50, 0.125)
    assert (out.shape, lse.shape) == ((90, 4, 64), (4, 90))
    grads = libraries.varlen_backward("flash", out, qkv, out, lse, cuts, 50, 0.125)
    assert grads.shape == qkv.shape


@pytest.fixture
def cpu_library(monkeypatch):
    """PyTorch's CPU kernel in place of a GPU library; collects the storages it was given."""
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
    monkeypatch.setitem(libraries.LIBRARIES, "efficient", library)
    return memories


def test_libraries_get_views_and_their_gradients_are_packed(cpu_library):
    qkv = torch.randn(2, 7, 3, 4, 8)
    grad = torch.randn(2, 7, 4, 8)
    out, lse = module._attention_library(qkv, 0.3)
    grad_qkv = module._attention_library_backward(grad, qkv, out, lse, 0.3)
    assert cpu_library == {qkv.untyped_storage().data_ptr()}
    assert_accurate(ATTENTION, [out, lse], (qkv, 0.3), qkv.dtype)
    assert_accurate(BACKWARD, [grad_qkv], (grad, qkv, out, lse, 0.3), qkv.dtype)


def test_libraries_serve_some_queries(cpu_library):
    q, kv = torch.randn(2, 4, 4, 8), torch.randn(2, 7, 2, 4, 8)
    out, lse = module._queries_library(q, kv, 0.3)
    given = (torch.randn_like(out), q, kv, out, lse, 0.3)
    grads = module._queries_library_backward(*given)
    assert cpu_library == {t.untyped_storage().data_ptr() for t in (q, kv)}
    assert_accurate(OPS["attention_queries"], [out, lse], (q, kv, 0.3), q.dtype)
    assert_accurate(OPS["attention_queries_backward"], list(grads), given, q.dtype)


@pytest.mark.usefixtures("cpu_library")
def test_libraries_without_packs_serve_each_sequence():
    qkv, cuts = torch.randn(9, 3, 2, 8), starts((4, 0, 5), "cpu")
    out, lse = libraries.varlen("efficient", qkv, cuts, 5, 0.3)
    grad = torch.randn_like(out)
    grads = libraries.varlen_backward("efficient", grad, qkv, out, lse, cuts, 5, 0.3)
    op = OPS["attention_varlen"]
    assert_accurate(op, [out, lse], (qkv, cuts, 5, 0.3), qkv.dtype)
    backward = (grad, qkv, out, lse, cuts, 5, 0.3)
    assert_accurate(OPS["attention_varlen_backward"], [grads], backward, qkv.dtype)
