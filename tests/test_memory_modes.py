"""Blocks that keep less for the backward pass give the same results."""

import contextlib
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastmim.nn import Block, MaskedAutoencoder, layers
from fastmim.nn.encoder import LAYER_NORM
from fastmim.nn.layers import MEMORY_MODES, Linear, Residual
from fastmim.ops import gather_tokens, sample_masks
from tests import accuracy

B, N, DIM, HEADS = 64, 50, 64, 4
# Bytes for each token and value of width that a block may keep under bf16 autocast, in its tensors
# of B * N rows: with a float32 and with a bfloat16 residual stream.
MOST = {"standard": (36, 32), "lean": (24, 20), "recompute_mlp": (16, 12)}


def block(memory: str) -> Block:
    torch.manual_seed(0)
    return Block(DIM, HEADS, 4.0, LAYER_NORM, memory)


def stream(dtype: torch.dtype) -> Residual:
    torch.manual_seed(1)
    return Residual(*(torch.randn(B, N, DIM, dtype=dtype).requires_grad_() for _ in range(2)))


def kept(memory: str, residual: torch.dtype, device: str) -> float:
    """Bytes a token and value of width; statistics of a row (one value each) are left out."""
    layer, given = block(memory).to(device), stream(residual)
    branch = given.branch.detach().to(device, torch.bfloat16)
    storages = {}

    def pack(tensor):
        if tensor.numel() >= B * N * DIM:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with (
        torch.autocast(device, torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        out = layer(Residual(given.x.to(device), branch))
    del out
    return sum(storages.values()) / (B * N * DIM)


@pytest.mark.parametrize("memory", MOST)
@pytest.mark.parametrize("residual", [torch.float32, torch.bfloat16])
def test_a_block_keeps_at_most_its_bytes(memory, residual, device):
    assert kept(memory, residual, device) <= MOST[memory][residual == torch.bfloat16]


def outcome(memory: str, *, ids: torch.Tensor | None, dtype: torch.dtype) -> list[torch.Tensor]:
    layer, given = block(memory).to(dtype), stream(dtype)
    scale = torch.tensor([1.0, 2.0], dtype=dtype).expand(B, 2)
    out = layer(given, ids, scale)
    torch.manual_seed(2)
    out.total().backward(torch.randn_like(out.x))
    return [out.total().detach(), given.x.grad, given.branch.grad] + [
        p.grad for p in layer.parameters()
    ]


@pytest.mark.parametrize("memory", [m for m in MEMORY_MODES if m != "standard"])
@pytest.mark.parametrize("some", [False, True])
def test_results_and_gradients_are_those_of_the_standard_mode(memory, some):
    ids = torch.arange(5, 25).expand(B, -1) if some else None
    truth = outcome("standard", ids=ids, dtype=torch.float64)
    plain = outcome("standard", ids=ids, dtype=torch.float32)
    got = outcome(memory, ids=ids, dtype=torch.float32)
    for a, b, c in zip(got, plain, truth, strict=True):
        accuracy.relative(a, b, c)


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_wanted_tokens_are_those_of_the_whole_block(memory):
    ids = torch.stack([torch.randperm(N)[:20] for _ in range(B)])

    def rows(dtype, wanted):
        layer, given = block(memory).to(dtype), stream(dtype)
        out = layer(given, ids).total() if wanted else gather_tokens(layer(given).total(), ids)
        torch.manual_seed(2)
        out.backward(torch.randn(out.shape, dtype=dtype))
        return [out.detach(), given.x.grad, given.branch.grad] + [
            p.grad for p in layer.parameters()
        ]

    cases = rows(torch.float32, True), rows(torch.float32, False), rows(torch.float64, False)
    for a, b, c in zip(*cases, strict=True):
        accuracy.relative(a, b, c)


def test_only_wanted_tokens_become_queries(monkeypatch):
    asked = []
    real = layers.attention_queries
    monkeypatch.setattr(
        layers, "attention_queries", lambda q, kv: (asked.append((q, kv)), real(q, kv))[1]
    )
    block("standard")(stream(torch.float32), torch.arange(5, 25).expand(B, -1))
    ((q, kv),) = asked
    assert (q.shape, kv.shape) == ((B, 20, HEADS, DIM // HEADS), (B, N, 2, HEADS, DIM // HEADS))


def test_a_replaced_projection_is_called_for_all_tokens():
    layer, ids = block("standard"), torch.arange(5, 25).expand(B, -1)
    given = stream(torch.float32)
    expected = layer(given, ids).total()
    layer.attn.qkv = nn.Sequential(layer.attn.qkv)
    accuracy.scalar((layer(given, ids).total() - expected).norm() + 1, 1.0, torch.float32)


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_a_model_trains_in_every_mode(memory):
    torch.manual_seed(0)
    model = MaskedAutoencoder(
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        decoder_embed_dim=32,
        decoder_depth=2,
        decoder_num_heads=2,
        memory=memory,
        residual_dtype=torch.bfloat16,
    )
    imgs = torch.randn(3, 3, 16, 16)
    masks = sample_masks(0, 0, torch.arange(3), model.num_patches, 4)
    model(imgs, masks).loss.backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), name


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="expected memory standard, lean, recompute_mlp, checkp"):
        block("small")


def test_forward_hooks_of_every_layer_are_called():
    layer, called = block("standard"), []
    names = ["norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"]
    for name in names:
        layer.get_submodule(name).register_forward_hook(
            lambda module, given, out, name=name: called.append(name)
        )
    layer(stream(torch.float32))
    assert called == names


def test_a_lean_block_refuses_a_layer_with_hooks():
    layer = block("lean")
    layer.mlp.fc1.register_forward_hook(lambda module, given, out: None)
    with pytest.raises(TypeError, match="without hooks"):
        layer(stream(torch.float32))


def test_a_lean_block_refuses_a_replaced_layer():
    layer = block("lean")
    layer.attn.qkv = nn.Sequential(Linear(DIM, 3 * DIM))
    with pytest.raises(TypeError, match=r"memory 'lean'.*got LayerNorm and Sequential"):
        layer(stream(torch.float32))


@pytest.fixture(scope="module")
def memory():
    """benchmarks/memory_model.py, which counts on tensors without memory."""
    folder = str(Path(__file__).parents[1] / "benchmarks")
    sys.path.append(folder)
    try:
        return importlib.import_module("memory_model")
    finally:
        sys.path.remove(folder)


def test_a_step_of_rc_mae_keeps_what_its_mode_promises(memory):
    """ViT-L/16, 256 images: counted, and its peak as predicted from that."""
    found = dict(memory.footprints("mae_vit_large_patch16", 256))
    eager = found["eager + SDPA"]
    assert found["standard, fp32 residual"].saved < eager.saved
    assert found["lean, bf16 residual"].saved < 0.6 * eager.saved
    assert found["recompute_mlp, bf16 residual"].saved < eager.saved / 2
    assert found["recompute_mlp, bf16 residual"].peak < eager.peak / 2
    assert found["checkpoint, bf16 residual"].saved < eager.saved / 8


@pytest.mark.parametrize(
    ("mode", "most"), [("lean", 0.6), ("recompute_mlp", 0.5), ("checkpoint", 0.125)]
)
def test_counted_memory_is_that_of_a_real_step(memory, monkeypatch, mode, most):
    """At the proportions of ViT-L/16, with the counted storages in memory."""
    small = dict(patch_size=16, embed_dim=64, depth=24, num_heads=2)
    small |= dict(decoder_embed_dim=32, decoder_depth=8, decoder_num_heads=1)
    monkeypatch.setitem(memory.MODELS, "small_large", small)
    monkeypatch.setattr(memory, "MEMORY_MODES", (mode,))
    counted = dict(memory.footprints("small_large", 2))
    monkeypatch.setattr(memory, "FakeTensorMode", contextlib.nullcontext)
    real = dict(memory.footprints("small_large", 2))
    for name, footprint in real.items():
        assert footprint.saved == counted[name].saved
    assert real[f"{mode}, bf16 residual"].saved < most * real["eager + SDPA"].saved
