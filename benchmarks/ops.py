"""Suite ``ops``: every operator but the optimizer's against PyTorch and its floor.

Forward and backward together where there is a backward pass.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from measure import interleave, speedup
from suite import CHECKS, FLOOR, TIMES, Column, Options
from torch import Tensor

from fastmim import ops
from fastmim.nn.patch_embed import IMAGENET_MEAN, IMAGENET_STD
from fastmim.ops import OPS, Masks, use_backend

NAME = "ops"
# fmt: off
COLUMNS: list[Column] = [
    ("shape", "shape", ""), ("operator", "kernel_name", ""), ("case", "case", ""),
    ("program", "kernel_provider", ""), ("dtype", "dtype", ""), *TIMES, *FLOOR,
    ("vs torch", "vs_peer", ".2f"), ("vs compiled", "vs_compiled", ".2f"), *CHECKS,
]
# fmt: on
WORDS = {
    "op": [
        "sample_masks",
        "gather_patches",
        "gather_tokens",
        "restore_tokens",
        "patch_loss",
        "feature_loss",
        "norm",
        "bias_gelu",
        "attention",
        "linear",
    ]
}  # fmt: skip
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Relative error (Euclidean norm) of every result against PyTorch in float64.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Sizes(NamedTuple):
    """A model's step as its operators see it; decoder of width 512 at 224 pixels."""

    batch: int
    img_size: int
    patch_size: int
    embed_dim: int
    num_heads: int
    decoder_embed_dim: int
    decoder_num_heads: int
    dtype: torch.dtype

    @property
    def num_patches(self) -> int:
        return (self.img_size // self.patch_size) ** 2

    @property
    def num_keep(self) -> int:
        return self.num_patches // 4


SHAPES = {
    "tiny32": Sizes(64, 32, 4, 128, 4, 64, 4, torch.float32),
    "small224": Sizes(8, 224, 16, 384, 6, 512, 16, torch.float32),
    "large224": Sizes(256, 224, 16, 1024, 16, 512, 16, torch.bfloat16),
}
DEFAULT = {"cpu": ["tiny32", "small224"], "cuda": ["large224"]}


@dataclass(frozen=True)
class Problem:
    """One operator at one size.

    Attributes:
        operator: Name in OPS; decides which backends can serve.
        ours: The call, returning all results that must be right.
        plain: The same in plain PyTorch at its best.
        truth: ``plain`` on float64 inputs; None if results must be equal to the bit.
        bytes: That must be moved: every input read once, every output written once.
        flops: Of matrix products; 0 where bytes alone bound.
        case: Tells it from the same operator at another size.
    """

    operator: str
    ours: Callable[[], list[Tensor]]
    plain: Callable[[], list[Tensor]]
    truth: Callable[[], list[Tensor]] | None
    bytes: int
    flops: int = 0
    case: str = ""


def _differentiated(
    function: Callable, args: tuple, wanted: list[int], grads: list[Tensor] | None
) -> list[Tensor]:
    """Outputs of a call and the gradients of the arguments ``wanted``."""
    args = [a.detach().requires_grad_() if i in wanted else a for i, a in enumerate(args)]
    out = function(*args)
    outputs = list(out) if isinstance(out, tuple) else [out]
    return [
        *(o.detach() for o in outputs),
        *torch.autograd.grad(outputs, [args[i] for i in wanted], grads),
    ]


def _problem(
    operator: str,
    ours: Callable,
    plain: Callable,
    args: tuple,
    *,
    wanted: list[int],
    grads: list[Tensor] | None,
    moved: int,
    flops: int = 0,
    case: str = "",
) -> Problem:
    """A differentiable operator; ``plain`` takes the arguments of ``ours``."""
    double = tuple(a.double() if _floats(a) else a for a in args)
    double_grads = None if grads is None else [g.double() for g in grads]
    return Problem(
        operator,
        functools.partial(_differentiated, ours, args, wanted, grads),
        functools.partial(_differentiated, plain, args, wanted, grads),
        functools.partial(_differentiated, plain, double, wanted, double_grads),
        moved,
        flops,
        case,
    )


def _floats(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _pixel_constants(device: torch.device) -> tuple[Tensor, Tensor]:
    mean, std = (
        torch.tensor(v, dtype=torch.float64, device=device) for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return 1 / (255 * std), -mean / std


def _normalized(imgs: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    return imgs.to(dtype) * scale.to(dtype)[:, None, None] + shift.to(dtype)[:, None, None]


def _cut(imgs: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """(B, K, C, p, p), only the patches asked for."""
    b, c, height, width = imgs.shape
    p = patch_size
    blocks = imgs.view(b, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
    image = torch.arange(b, device=imgs.device)[:, None]
    return blocks[image, ids // (width // p), ids % (width // p)]


def _target(imgs: Tensor, ids: Tensor, patch_size: int, scale, shift, dtype) -> Tensor:
    pixels = _normalized(_cut(imgs, ids, patch_size), scale, shift, dtype)
    rows = pixels.permute(0, 1, 3, 4, 2).flatten(2)
    variance, mean = torch.var_mean(rows, dim=-1, keepdim=True)
    return (rows - mean) / (variance + 1e-6).sqrt()


def problems(s: Sizes, device: torch.device) -> Iterator[Problem]:
    """Every operator at the sizes of one model, for a step of RC-MAE."""
    generator = torch.Generator(device).manual_seed(0)
    n, k, d, dd = s.num_patches, s.num_keep, s.embed_dim, s.decoder_embed_dim
    m, values, item = n - k, 3 * s.patch_size**2, s.dtype.itemsize

    def normal(*shape: int, dtype: torch.dtype = s.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    sample_ids = torch.arange(s.batch, device=device)
    masks = ops.sample_masks(0, 0, sample_ids, n, k)
    shape = (s.batch, 3, s.img_size, s.img_size)
    imgs = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    scale, shift = _pixel_constants(device)
    ids_keep, ids_masked = masks.ids_keep.contiguous(), masks.ids_masked.contiguous()

    def plain_masks() -> list[Tensor]:
        ids_shuffle = torch.rand(s.batch, n, device=device).argsort(dim=1)
        return [ids_shuffle, ids_shuffle.argsort(dim=1)]

    yield Problem(
        "sample_masks",
        lambda: list(ops.sample_masks(0, 0, sample_ids, n, k)[:2]),
        plain_masks,
        None,
        2 * 8 * s.batch * n,
    )

    def patches(dtype: torch.dtype) -> list[Tensor]:
        return [_normalized(_cut(imgs, ids_keep, s.patch_size), scale, shift, dtype).flatten(2)]

    yield Problem(
        "gather_patches",
        lambda: [
            ops.gather_patches(
                imgs, ids_keep, s.patch_size, scale=scale, shift=shift, dtype=s.dtype
            )
        ],
        lambda: [patches(torch.float32)[0].to(s.dtype)],
        lambda: patches(torch.float64),
        s.batch * k * values * (1 + item),
    )

    tokens = normal(s.batch, n, d)
    yield _problem(
        "gather_tokens",
        ops.gather_tokens,
        lambda x, ids: x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[-1])),
        (tokens, ids_keep),
        wanted=[0],
        grads=[normal(s.batch, k, d)],
        moved=s.batch * item * d * (k + k + k + n),
    )

    def plain_restore(x, mask_token, ids_shuffle, ids_restore, pos_embed):
        hidden = mask_token.expand(s.batch, m, -1)
        rows = torch.cat([x[:, 1:], hidden], dim=1)
        rows = rows.gather(1, ids_restore[:, :, None].expand(-1, -1, dd))
        return torch.cat([x[:, :1], rows], dim=1) + pos_embed

    yield _problem(
        "restore_tokens",
        lambda x, token, shuffle, restore, pos: ops.restore_tokens(
            x, token, Masks(shuffle, restore, k), pos
        ),
        plain_restore,
        (
            normal(s.batch, k + 1, dd),
            normal(1, 1, dd),
            masks.ids_shuffle,
            masks.ids_restore,
            normal(1, n + 1, dd),
        ),
        wanted=[0, 1],
        grads=[normal(s.batch, n + 1, dd)],
        moved=s.batch * item * dd * 2 * (n + 1 + k + 1),
    )

    def plain_patch_loss(pred, teacher_pred, imgs, ids):
        wide = torch.promote_types(pred.dtype, torch.float32)
        target = _target(imgs, ids, s.patch_size, scale, shift, wide)
        pixel = F.mse_loss(pred.to(wide), target)
        return pixel + F.mse_loss(pred.to(wide), teacher_pred.to(wide))

    yield _problem(
        "patch_loss",
        lambda pred, teacher, imgs, ids: (
            ops.patch_loss(
                pred,
                imgs,
                ids,
                s.patch_size,
                norm_pix=True,
                teacher_pred=teacher,
                scale=scale,
                shift=shift,
            ).total
        ),
        plain_patch_loss,
        (normal(s.batch, m, values), normal(s.batch, m, values), imgs, ids_masked),
        wanted=[0],
        grads=None,
        moved=s.batch * m * values * (1 + 3 * item),
    )

    def plain_feature_loss(pred, target):
        wide = torch.promote_types(pred.dtype, torch.float32)
        variance, mean = torch.var_mean(target.to(wide), dim=-1, keepdim=True)
        z = (target.to(wide) - mean) / (variance + 1e-6).sqrt()
        return F.smooth_l1_loss(pred.to(wide), z, beta=2.0)

    yield _problem(
        "feature_loss",
        lambda pred, target: ops.feature_loss(pred, target, kind="smooth_l1"),
        plain_feature_loss,
        (normal(s.batch, m, d), normal(s.batch, m, d)),
        wanted=[0],
        grads=None,
        moved=s.batch * m * d * 3 * item,
    )

    def plain_norm(x, branch, weight, bias):
        total = x + branch
        wide = F.layer_norm(total, total.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), 1e-6)
        return wide.to(branch.dtype), total

    stream = normal(s.batch, k + 1, d, dtype=torch.float32)
    branch, affine = normal(s.batch, k + 1, d), normal(2, d, dtype=torch.float32)
    yield _problem(
        "norm",
        lambda x, branch, weight, bias: tuple(
            ops.norm(x, weight, bias, eps=1e-6, branch=branch, dtype=branch.dtype)
        ),
        plain_norm,
        (stream, branch, affine[0], affine[1]),
        wanted=[0, 1, 2, 3],
        grads=[normal(s.batch, k + 1, d), torch.ones_like(stream)],
        moved=stream.numel() * (4 + item + 4 + item + 4 + item + 4 + 4 + item),
    )

    hidden = normal(s.batch, k + 1, 4 * d)
    yield _problem(
        "bias_gelu",
        ops.bias_gelu,
        lambda x, bias: F.gelu(x + bias.to(x.dtype)),
        (hidden, normal(4 * d, dtype=torch.float32)),
        wanted=[0, 1],
        grads=[normal(s.batch, k + 1, 4 * d)],
        moved=hidden.numel() * item * 5,
    )

    def plain_attention(qkv):
        q, key, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, key, v).transpose(1, 2)

    for count, heads, width in (
        (k + 1, s.num_heads, d // s.num_heads),
        (n + 1, s.decoder_num_heads, dd // s.decoder_num_heads),
    ):
        yield _problem(
            "attention",
            ops.attention,
            plain_attention,
            (normal(s.batch, count, 3, heads, width),),
            wanted=[0],
            grads=[normal(s.batch, count, heads, width)],
            moved=s.batch * count * heads * width * item * (3 + 1 + 3 + 1 + 3),
            flops=s.batch * count**2 * heads * width * (4 + 10),
            case=f"{count} tokens, {heads} x {width}",
        )

    if device.type == "cpu":  # elsewhere the product is PyTorch's own
        yield _problem(
            "linear",
            ops.linear,
            F.linear,
            (normal(s.batch, k + 1, d), normal(4 * d, d), normal(4 * d)),
            wanted=[0, 1, 2],
            grads=[normal(s.batch, k + 1, 4 * d)],
            moved=item * (2 * s.batch * (k + 1) * 5 * d + 3 * 4 * d * d),
            flops=3 * 2 * s.batch * (k + 1) * 4 * d * d,
        )


def describe() -> list[str]:
    return [
        "suite ops    operators of fastmim.ops   programs torch, compiled and every backend",
        *(
            f"  {name:10} batch {sizes.batch}, {sizes.img_size} px, width {sizes.embed_dim}"
            for name, sizes in SHAPES.items()
        ),
    ]


def run(options: Options) -> Iterator[dict]:
    """A row for every operator, size and program."""
    device, compiled = options.device, options.compiled
    for shape in options.shapes:
        sizes = SHAPES[shape]._replace(**(dict(batch=2) if options.smoke else {}))
        for problem in problems(sizes, device):
            if options.operators is not None and problem.operator not in options.operators:
                continue
            options.say(f"ops {shape} {problem.operator}")
            programs = programs_of(problem, device, compiled)
            errors = errors_of(problem, programs, sizes.dtype)
            dtype = _NAMES[sizes.dtype]
            floor = options.ceilings.floor(problem.bytes, problem.flops, dtype)
            timings = interleave(programs, **options.timing(), kernels=True)
            for name, timing in timings.items():
                measured = timing.row()
                yield dict(
                    suite="ops",
                    kernel_name=problem.operator,
                    kernel_provider=name,
                    kernel_operation_mode="full",
                    case=problem.case,
                    shape=shape,
                    dtype=dtype,
                    x_name="batch",
                    x_value=sizes.batch,
                    **measured,
                    **options.against_floor(
                        measured["y_value_50"], floor, problem.bytes, problem.flops
                    ),
                    vs_peer=speedup(timing, timings["torch"]),
                    vs_compiled=speedup(timing, timings["compiled"]) if compiled else None,
                    error=errors[name],
                    match=errors[name] <= TOLERANCE[sizes.dtype],
                )


def programs_of(
    problem: Problem, device: torch.device, compiled: bool
) -> dict[str, Callable[[], list[Tensor]]]:
    """Every backend that can serve on the device, best first, and PyTorch."""
    op = OPS[problem.operator]
    programs = {}
    for backend in op.backends:
        if op.unavailable(backend, device) is None and backend != "reference":
            programs[backend] = functools.partial(_served, backend, problem.ours)
    programs["torch"] = problem.plain
    if compiled:
        programs["compiled"] = torch.compile(problem.plain)
    return programs


def _served(backend: str, call: Callable[[], list[Tensor]]) -> list[Tensor]:
    with use_backend(backend):
        return call()


def errors_of(problem: Problem, programs: dict, dtype: torch.dtype) -> dict[str, float]:
    """Largest relative error of the results of each program; infinite where bits must be equal."""
    errors = {}
    if problem.truth is None:
        with use_backend("reference"):
            expected = problem.ours()
        for name, program in programs.items():
            same = all(map(torch.equal, program(), expected))
            # another generator gives PyTorch other masks
            errors[name] = 0.0 if same or name in ("torch", "compiled") else float("inf")
        return errors
    expected = problem.truth()
    for name, program in programs.items():
        ratios = [
            (got.double() - right).norm() / right.norm()
            for got, right in zip(program(), expected, strict=True)
        ]
        errors[name] = float(torch.stack(ratios).max())
    return errors
