"""One network of every operator compiles into one graph, and computes what it computes eagerly."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmim import ops
from fastmim.ops import OPS
from tests import accuracy

IMAGES, SIDE, PATCH, WIDTH, HEADS = 3, 16, 4, 8, 2
PATCHES, KEPT, VALUES = (SIDE // PATCH) ** 2, 4, 3 * PATCH**2
EPS = 1e-6
SHAPES = {
    "embed": (WIDTH, VALUES),
    "embed_bias": (WIDTH,),
    "norm1": (WIDTH,),
    "norm1_bias": (WIDTH,),
    "qkv": (3 * WIDTH, WIDTH),
    "qkv_bias": (3 * WIDTH,),
    "norm2": (WIDTH,),
    "norm2_bias": (WIDTH,),
    "fc1": (WIDTH, WIDTH),
    "fc1_bias": (WIDTH,),
    "fc2": (WIDTH, WIDTH),
    "fc2_bias": (WIDTH,),
    "hidden_bias": (WIDTH,),
    "cls_token": (1, 1, WIDTH),
    "mask_token": (1, 1, WIDTH),
    "pos_embed": (1, PATCHES + 1, WIDTH),
    "pred": (VALUES, WIDTH),
    "pred_bias": (VALUES,),
}


def loss_of(w: dict[str, Tensor], photos: Tensor, sample_ids: Tensor, features: Tensor) -> Tensor:
    """A masked autoencoder of one block that goes through every operator but the updates."""
    imgs = ops.augment(photos, sample_ids, seed=1, epoch=0, size=(SIDE, SIDE), dtype=features.dtype)
    masks = ops.sample_masks(3, 0, sample_ids, PATCHES, KEPT)
    x = ops.linear(ops.gather_patches(imgs, masks.ids_keep, PATCH), w["embed"], w["embed_bias"])
    x = ops.gather_tokens(ops.scatter_tokens(x, masks.ids_keep, PATCHES), masks.ids_keep)
    qkv = ops.norm_linear(
        x, w["norm1"], w["norm1_bias"], w["qkv"], w["qkv_bias"], eps=EPS
    ).out.unflatten(2, (3, HEADS, -1))
    starts = torch.arange(IMAGES + 1, dtype=torch.int32, device=qkv.device) * KEPT
    packed = ops.attention_varlen(qkv.flatten(0, 1), starts, KEPT).unflatten(0, (IMAGES, KEPT))
    some = ops.attention_queries(qkv[:, :, 0], qkv[:, :, 1:])
    branch = (ops.attention(qkv) + packed + some).flatten(2)
    out, x = ops.norm(x, w["norm2"], w["norm2_bias"], eps=EPS, branch=branch)
    hidden = ops.bias_gelu(ops.linear(out, w["fc1"]), w["fc1_bias"])
    x = x + ops.bias_gelu_linear(hidden, w["hidden_bias"], w["fc2"], w["fc2_bias"])
    x = torch.cat([w["cls_token"].expand(IMAGES, -1, -1), x], dim=1)
    decoded = ops.restore_tokens(x, w["mask_token"], masks, w["pos_embed"])[:, 1:]
    masked = ops.gather_tokens(decoded, masks.ids_masked)
    pred = ops.linear(masked, w["pred"], w["pred_bias"])
    pixels = ops.patch_loss(pred, imgs, masks.ids_masked, PATCH, norm_pix=True).total
    return pixels + ops.feature_loss(masked, features, kind="smooth_l1")


def update(params, grads, exp_avgs, exp_avg_sqs, teachers, seconds, step, weight_decay) -> None:
    ops.adamw_ema_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        teachers,
        step=step,
        lr=1e-2,
        momentum=0.9,
        grad_scale=1.0,
        skip=False,
        weight_decay=weight_decay,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
    )
    ops.ema_update_(seconds, params, 0.99)


def train_once(dtype: torch.dtype, device: str, compiler: str | None = None) -> list[Tensor]:
    """Loss, gradients and everything that the update changes, after one step."""
    torch.manual_seed(0)
    torch.compiler.reset()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(device, dtype)

    weights = {name: normal(*shape).requires_grad_() for name, shape in SHAPES.items()}
    params = [w.detach() for w in weights.values()]
    exp_avgs, exp_avg_sqs, teachers, seconds = (
        [normal(*p.shape) for p in params] for _ in range(4)
    )
    exp_avg_sqs = [v.square() + m.square() for v, m in zip(exp_avg_sqs, exp_avgs, strict=True)]
    photos = torch.randint(256, (IMAGES, 3, SIDE + 5, SIDE), dtype=torch.uint8).to(device)
    features = normal(IMAGES, PATCHES - KEPT, WIDTH)
    sample_ids = torch.arange(IMAGES, device=device)
    step = torch.tensor(3, device=device)
    weight_decay = torch.full((len(params),), 0.05, dtype=torch.float64, device=device)

    def whole(function):
        if compiler is None:
            return function
        return torch.compile(function, fullgraph=True, backend=compiler)

    loss = whole(loss_of)(weights, photos, sample_ids, features)
    loss.backward()
    grads = [w.grad for w in weights.values()]
    state = (exp_avgs, exp_avg_sqs, teachers, seconds)
    whole(update)(params, grads, *state, step, weight_decay)
    return [loss.detach(), *grads, *params, *(t for tensors in state for t in tensors)]


class Recorder(TorchDispatchMode):
    """Names of the library's operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastmim":
            self.names.add(function._schema.name.removeprefix("fastmim::"))
        return function(*args, **(kwargs or {}))


def test_the_network_goes_through_every_operator(device):
    with Recorder() as recorder:
        train_once(torch.float32, device)
    # PyTorch's own, but for what oneDNN does better.
    products = {"linear", "linear_weight_grad"} - recorder.names
    assert not products or device == "cuda" or torch.backends.cpu.get_cpu_capability() != "AVX512"
    assert recorder.names == set(OPS) - products


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_the_network_compiles_into_one_graph_and_computes_the_same(compiler, device):
    plain, formula = (train_once(dtype, device) for dtype in (torch.float32, torch.float64))
    compiled = train_once(torch.float32, device, compiler)
    for got, ordinary, right in zip(compiled, plain, formula, strict=True):
        accuracy.relative(got, ordinary, right)
