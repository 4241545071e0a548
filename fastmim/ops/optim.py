"""Updates of whole lists of tensors: the EMA teacher, and AdamW with the EMA in the same pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmim.ops import reference
from fastmim.ops._registry import Implementation, Native, Op


def ema_update_(
    teachers: Sequence[Tensor], students: Sequence[Tensor], momentum: float | Tensor
) -> None:
    """Move every teacher tensor: ``teacher <- momentum * teacher + (1 - momentum) * student``.

    The teacher of RC-MAE (arXiv:2210.02077, sec. 3). Teachers must be float32 or float64: at
    momentum 0.996 and above a bfloat16 teacher does not move.

    Args:
        teachers: Tensors to change in place.
        students: As many, of the same shapes, on the same device.
        momentum: In [0, 1]; a number or a float64 scalar tensor on that device.

    Raises:
        ValueError: If the lists do not match, or a teacher is stored in 16 bits.
    """
    _check_pairs("ema_update_", "teachers", teachers, "students", students)
    _refuse_half("ema_update_", teachers)
    if not teachers:
        return
    device = teachers[0].device
    with torch.no_grad():
        _ema(list(teachers), list(students), _scalar("ema_update_", "momentum", momentum, device))
    torch.autograd.graph.increment_version(teachers)


def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    step: Tensor,
    lr: float | Tensor,
    momentum: float | Tensor,
    grad_scale: float | Tensor,
    skip: bool | Tensor,
    weight_decay: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One AdamW step on every tensor, and the EMA of the *new* value, in one pass over memory.

    AdamW (Loshchilov & Hutter, arXiv:1711.05101) with decoupled decay, as ``torch.optim.AdamW``::

        step <- step + 1
        g = grad * grad_scale
        p <- p * (1 - lr * weight_decay)
        m <- m + (1 - beta1) * (g - m)
        v <- beta2 * v + (1 - beta2) * g^2
        p <- p - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
        teacher <- teacher + (1 - momentum) * (p - teacher)

    Args:
        params: T tensors, changed in place.
        grads: T gradients.
        exp_avgs: T first moments m, changed in place.
        exp_avg_sqs: T second moments v, changed in place.
        teachers: T teacher tensors, changed in place, or none at all: then there is no EMA.
        step: int64 scalar tensor, the number of steps done so far; changed in place.
        lr: Learning rate, a number or a float64 scalar tensor.
        momentum: Of the teacher, in [0, 1]; a number or a float64 scalar tensor.
        grad_scale: Factor of the gradients (unscaling times clipping), number or float64 scalar.
        skip: If true, every byte stays as it was; a flag or a bool scalar tensor.
        weight_decay: (T,), float64, decay of each tensor.
        beta1, beta2, eps: AdamW's constants.

    Raises:
        ValueError: If the lists do not match, or a parameter or a teacher is stored in 16 bits.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if teachers:
        lists["teachers"] = teachers
    for name, tensors in lists.items():
        _check_pairs("adamw_ema_", "params", params, name, tensors)
    _refuse_half("adamw_ema_", params)
    _refuse_half("adamw_ema_", teachers)
    if not params:
        return
    device = params[0].device
    if not isinstance(skip, Tensor):
        skip = torch.tensor(skip, device=device)
    for name, tensor, shape, dtype in (
        ("weight_decay", weight_decay, (len(params),), torch.float64),
        ("step", step, (), torch.int64),
        ("skip", skip, (), torch.bool),
    ):
        if (tuple(tensor.shape), tensor.dtype, tensor.device) != (shape, dtype, device):
            raise ValueError(
                f"adamw_ema_: expected {name} {shape} of {dtype} on {device}, "
                f"got {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )
    with torch.no_grad():
        _adamw_ema(
            list(params),
            list(grads),
            list(exp_avgs),
            list(exp_avg_sqs),
            list(teachers),
            step,
            _scalar("adamw_ema_", "lr", lr, device),
            _scalar("adamw_ema_", "momentum", momentum, device),
            _scalar("adamw_ema_", "grad_scale", grad_scale, device),
            skip,
            weight_decay.contiguous(),
            beta1,
            beta2,
            eps,
        )
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, *teachers, step])


def _scalar(function: str, name: str, value: float | Tensor, device: torch.device) -> Tensor:
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=torch.float64, device=device)
    if value.ndim or value.dtype != torch.float64 or value.device != device:
        raise ValueError(
            f"{function}: expected {name} as a number or a float64 scalar on {device}, "
            f"got {tuple(value.shape)} of {value.dtype} on {value.device}"
        )
    return value


def _check_pairs(
    function: str, name: str, tensors: Sequence[Tensor], other_name: str, others: Sequence[Tensor]
) -> None:
    if len(tensors) != len(others):
        raise ValueError(
            f"{function}: expected as many {other_name} as {name}, "
            f"got {len(others)} and {len(tensors)}"
        )
    for i, (a, b) in enumerate(zip(tensors, others, strict=True)):
        if a.shape != b.shape or a.device != b.device:
            raise ValueError(
                f"{function}: expected {other_name}[{i}] like {name}[{i}], "
                f"{tuple(a.shape)} on {a.device}, got {tuple(b.shape)} on {b.device}"
            )


def _refuse_half(function: str, tensors: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{function}: expected float32 or float64 state, got {tensor.dtype} at index {i}; "
                "small updates vanish in 16 bits, keep a float32 copy"
            )


def _fp32_contiguous(*lists: Sequence[Tensor]) -> str | None:
    for tensors in lists:
        for tensor in tensors:
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                return (
                    f"it takes contiguous float32 tensors, not {tensor.dtype} "
                    f"with strides {tuple(tensor.stride())}"
                )
    return None


def _native_ema_accepts(teachers, students, momentum) -> str | None:
    return _fp32_contiguous(teachers, students)


def _native_adamw_accepts(params, grads, exp_avgs, exp_avg_sqs, teachers, *rest) -> str | None:
    return _fp32_contiguous(params, grads, exp_avgs, exp_avg_sqs, teachers)


def _fake_in_place(*args) -> None:
    return None


# Sizes of the tensors of a list: mixed and empty; many small ones; those of real models.
_SIZES = {
    "edge": dict(sizes=(5, 0, 1, 33, 4096 + 3)),
    "edge_many": dict(sizes=(7,) * 70),
    "edge_single": dict(sizes=(1,)),
    "vit_s": dict(sizes=(384 * 1536, 1536, 384, 384 * 1152) * 48),
    "vit_b": dict(sizes=(768 * 3072, 3072, 768, 768 * 2304) * 48),
}


def _lists(count: int, sizes, device, dtype) -> list[list[Tensor]]:
    return [[torch.randn(n, device=device, dtype=dtype) for n in sizes] for _ in range(count)]


def _scalars(device, *values: float) -> list[Tensor]:
    return [torch.tensor(v, dtype=torch.float64, device=device) for v in values]


def _make_ema(sizes, device, dtype):
    return *_lists(2, sizes, device, dtype), *_scalars(device, 0.9)


def _make_adamw(sizes, device, dtype):
    params, grads, exp_avgs, exp_avg_sqs, teachers = _lists(5, sizes, device, dtype)
    return (
        params,
        grads,
        exp_avgs,
        [v.square() for v in exp_avg_sqs],
        teachers,
        torch.tensor(3, device=device),
        *_scalars(device, 1e-2, 0.9, 0.5),
        torch.tensor(False, device=device),
        torch.linspace(0.0, 0.1, len(sizes), dtype=torch.float64, device=device),
        0.9,
        0.95,
        1e-8,
    )


_ema = Op(
    "ema_update_(Tensor(a!)[] teachers, Tensor[] students, Tensor momentum) -> ()",
    fake=_fake_in_place,
    implementations={
        "reference": reference.ema_update_,
        "cpp": Implementation(Native("ema_update_"), accepts=_native_ema_accepts),
        "cuda": Implementation(Native("ema_update_"), accepts=_native_ema_accepts),
    },
    shapes=_SIZES,
    make=_make_ema,
)
_adamw_ema = Op(
    "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] teachers, Tensor(e!) step, Tensor lr, Tensor momentum, "
    "Tensor grad_scale, Tensor skip, Tensor weight_decay, float beta1, float beta2, float eps) "
    "-> ()",
    fake=_fake_in_place,
    implementations={
        "reference": reference.adamw_ema_,
        "cpp": Implementation(Native("adamw_ema_"), accepts=_native_adamw_accepts),
        "cuda": Implementation(Native("adamw_ema_"), accepts=_native_adamw_accepts),
    },
    shapes=_SIZES,
    make=_make_adamw,
)
