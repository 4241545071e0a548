"""Updates of whole lists of tensors: the EMA teacher, and AdamW with the EMA in the same pass.

A weight is stored as float32, or split: a bfloat16 tensor that the network computes with and an
int16 remainder, 4 bytes together. Both give the same float32 bits after any number of updates.
"""

import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastmim.ops import reference
from fastmim.ops._registry import Implementation, Native, Op


def split_storage(master: Tensor) -> tuple[Tensor, Tensor]:
    """Divide float32 weights into what a bfloat16 network computes with and what it leaves out.

    ``high`` is ``master`` rounded to nearest, ties away from zero; the 32 bits of ``master`` are
    ``(high << 16) + remainder``.

    Args:
        master: (...), float32.

    Returns:
        ``high`` (...), bfloat16, and ``remainder`` (...), int16: exact for every bit pattern.

    Raises:
        ValueError: If ``master`` is not float32.
    """
    if master.dtype != torch.float32:
        raise ValueError(f"split_storage: expected float32, got {master.dtype}")
    return reference.split_storage(master.detach())


def join_storage(high: Tensor, remainder: Tensor) -> Tensor:
    """The float32 weights of which :func:`split_storage` made ``high`` and ``remainder``.

    Args:
        high: (...), bfloat16.
        remainder: (...), int16.

    Returns:
        (...), float32, a new tensor.

    Raises:
        ValueError: If shapes or dtypes differ from these.
    """
    _check_split("join_storage", "high", [high], "remainder", [remainder])
    return reference.join_storage(high.detach(), remainder)


def ema_update_(
    teachers: Sequence[Tensor],
    students: Sequence[Tensor],
    momentum: float | Tensor,
    *,
    teacher_remainders: Sequence[Tensor] = (),
    student_remainders: Sequence[Tensor] = (),
    teacher_copies: Sequence[Tensor] = (),
    skip: bool | Tensor = False,
) -> None:
    """Move every teacher tensor: ``teacher <- momentum * teacher + (1 - momentum) * student``.

    The teacher of RC-MAE (arXiv:2210.02077, sec. 3). At momentum 0.996 and above a bfloat16 teacher
    does not move, so teachers are float32, float64, or split as by :func:`split_storage`.
    Of DTensors the local shards are updated.

    Args:
        teachers: Tensors to change in place; bfloat16 with ``teacher_remainders``.
        students: As many, of the same shapes, on the same device.
        momentum: In [0, 1]; a number or a float64 scalar tensor on that device.
        teacher_remainders: int16, one a teacher, changed in place; or none at all.
        student_remainders: int16, one a student, whose tensors are then bfloat16; or none at all.
        teacher_copies: bfloat16, one a teacher, overwritten with its new value; or none at all.
        skip: If true, every byte stays as it was; a flag or a bool scalar tensor.

    Raises:
        ValueError: If the lists do not match, a teacher is stored in 16 bits without remainder, a
            tensor is to be changed twice, or DTensors that belong together are placed differently.
    """
    given = {
        "teachers": teachers,
        "students": students,
        "teacher_remainders": teacher_remainders,
        "student_remainders": student_remainders,
        "teacher_copies": teacher_copies,
    }
    _check_pairs("ema_update_", "teachers", teachers, "students", students)
    _check_storage("ema_update_", given, "teacher")
    if student_remainders:
        _check_storage("ema_update_", given, "student")
    _refuse_repeats("ema_update_", _ema, given)
    if not teachers:
        return
    lists = _local_shards("ema_update_", given)
    device = lists["teachers"][0].device
    with torch.no_grad():
        _ema(
            *lists.values(),
            _scalar("ema_update_", "momentum", momentum, device),
            _scalar("ema_update_", "skip", skip, device, torch.bool),
        )
    _increment_versions(_ema, given, lists)


def adamw_ema_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    param_remainders: Sequence[Tensor] = (),
    teacher_remainders: Sequence[Tensor] = (),
    param_copies: Sequence[Tensor] = (),
    teacher_copies: Sequence[Tensor] = (),
    step: Tensor,
    lr: float | Tensor,
    momentum: float | Tensor,
    grad_scale: float | Tensor,
    clip: float | Tensor = 1.0,
    skip: bool | Tensor,
    weight_decay: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One AdamW step on every tensor, and the EMA of the *new* value, in one pass over memory.

    AdamW (Loshchilov & Hutter, arXiv:1711.05101) with decoupled decay, as ``torch.optim.AdamW``::

        step <- step + 1
        g = grad * (grad_scale * clip)
        p <- p * (1 - lr * weight_decay)
        m <- m + (1 - beta1) * (g - m)
        v <- beta2 * v + (1 - beta2) * g^2
        p <- p - lr / (1 - beta1^step) * m / (sqrt(v / (1 - beta2^step)) + eps)
        teacher <- teacher + (1 - momentum) * (p - teacher)

    With split storage the network's bfloat16 weights are one half of the float32 weights that AdamW
    moves, and likewise the teacher's::

        high, remainder = split_storage(weight)
        teacher_high, teacher_remainder = high.clone(), remainder.clone()
        ...
        adamw_ema_([high], [grad], [m], [v], [teacher_high],
                   param_remainders=[remainder], teacher_remainders=[teacher_remainder], ...)
        weight = join_storage(high, remainder)  # the bits that float32 storage would have

    Of DTensors (FSDP2) the local shards are updated. Numbers given as tensors on the device are
    read by the kernel, so a CUDA graph replays with their new values; other numbers are fixed.

    Args:
        params: T tensors, changed in place: float32, float64, or bfloat16 with remainders.
        grads: T gradients, of the same shapes.
        exp_avgs: T first moments m, changed in place.
        exp_avg_sqs: T second moments v, changed in place.
        teachers: T teacher tensors, changed in place, or none at all: then there is no EMA. Stored
            in either way, whichever the parameters are.
        param_remainders: T int16 tensors, changed in place, or none at all.
        teacher_remainders: T int16 tensors, changed in place, or none at all.
        param_copies: T bfloat16 tensors, overwritten with the new parameters, or none at all.
        teacher_copies: T bfloat16 tensors, overwritten with the new teachers, or none at all.
        step: int64 scalar tensor, the number of steps done so far; changed in place.
        lr: Learning rate, a number or a float64 scalar tensor.
        momentum: Of the teacher, in [0, 1]; a number or a float64 scalar tensor.
        grad_scale: Factor that undoes a scaling of the loss, number or float64 scalar.
        clip: Factor that limits the norm of the gradients, number or float64 scalar.
        skip: If true, every byte stays as it was; a flag or a bool scalar tensor.
        weight_decay: (T,), float64, decay of each tensor.
        beta1, beta2, eps: AdamW's constants.

    Raises:
        ValueError: If the lists do not match, a parameter or a teacher is stored in 16 bits without
            remainder, a tensor is to be changed twice, or DTensors that belong together are placed
            differently.
    """
    given = {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "teachers": teachers,
        "param_remainders": param_remainders,
        "teacher_remainders": teacher_remainders,
        "param_copies": param_copies,
        "teacher_copies": teacher_copies,
    }
    for name in ("grads", "exp_avgs", "exp_avg_sqs", *(["teachers"] if teachers else [])):
        _check_pairs("adamw_ema_", "params", params, name, given[name])
    _check_storage("adamw_ema_", given, "param")
    _check_storage("adamw_ema_", given, "teacher")
    _refuse_repeats("adamw_ema_", _adamw_ema, given)
    if not params:
        return
    lists = _local_shards("adamw_ema_", given)
    device = lists["params"][0].device
    for name, tensor, shape, dtype in (
        ("weight_decay", weight_decay, (len(params),), torch.float64),
        ("step", step, (), torch.int64),
    ):
        if (tuple(tensor.shape), tensor.dtype, tensor.device) != (shape, dtype, device):
            raise ValueError(
                f"adamw_ema_: expected {name} {shape} of {dtype} on {device}, "
                f"got {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )
    with torch.no_grad():
        _adamw_ema(
            *lists.values(),
            step,
            _scalar("adamw_ema_", "lr", lr, device),
            _scalar("adamw_ema_", "momentum", momentum, device),
            _scalar("adamw_ema_", "grad_scale", grad_scale, device),
            _scalar("adamw_ema_", "clip", clip, device),
            _scalar("adamw_ema_", "skip", skip, device, torch.bool),
            weight_decay.contiguous(),
            beta1,
            beta2,
            eps,
        )
    _increment_versions(_adamw_ema, given, lists)
    torch.autograd.graph.increment_version(step)


def _scalar(
    function: str,
    name: str,
    value: float | Tensor,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    if not isinstance(value, Tensor):
        # Not torch.tensor: on a GPU it would wait for the copy.
        value = torch.full((), value, dtype=dtype, device=device)
    if _is_dtensor(value):
        raise ValueError(f"{function}: {name} is a DTensor; pass {name}.full_tensor()")
    if value.ndim or value.dtype != dtype or value.device != device:
        raise ValueError(
            f"{function}: expected {name} as a {'flag' if dtype == torch.bool else 'number'} or a "
            f"scalar tensor of {dtype} on {device}, "
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
    # Hundreds of tensors are looked at in every step: all at once first, which is faster.
    if [t.shape for t in tensors] == [t.shape for t in others]:
        device = tensors[0].device if tensors else None
        if all(t.device == device for t in (*tensors, *others)):
            return
    for i, (a, b) in enumerate(zip(tensors, others, strict=True)):
        if a.shape != b.shape or a.device != b.device:
            raise ValueError(
                f"{function}: expected {other_name}[{i}] like {name}[{i}], "
                f"{tuple(a.shape)} on {a.device}, got {tuple(b.shape)} on {b.device}"
            )


def _check_split(
    function: str, name: str, highs: Sequence[Tensor], other_name: str, remainders: Sequence[Tensor]
) -> None:
    _check_pairs(function, name, highs, other_name, remainders)
    for i, (high, remainder) in enumerate(zip(highs, remainders, strict=True)):
        if high.dtype != torch.bfloat16 or remainder.dtype != torch.int16:
            raise ValueError(
                f"{function}: expected bfloat16 {name} and int16 {other_name}, "
                f"got {high.dtype} and {remainder.dtype} at index {i}"
            )


def _check_storage(function: str, lists: Mapping[str, Sequence[Tensor]], name: str) -> None:
    """That ``<name>s`` are stored in one of the two ways, with ``<name>_copies`` that fit."""
    tensors, remainders = lists[f"{name}s"], lists[f"{name}_remainders"]
    copies = lists.get(f"{name}_copies", ())
    if remainders:
        _check_split(function, f"{name}s", tensors, f"{name}_remainders", remainders)
    else:
        _refuse_half(function, tensors)
    if not copies:
        return
    if remainders:
        raise ValueError(
            f"{function}: {name}_copies and {name}_remainders exclude each other: "
            f"with remainders {name}s are bfloat16 already"
        )
    _check_pairs(function, f"{name}s", tensors, f"{name}_copies", copies)
    for i, copy in enumerate(copies):
        if copy.dtype != torch.bfloat16:
            raise ValueError(
                f"{function}: expected bfloat16 {name}_copies, got {copy.dtype} at index {i}"
            )


def _refuse_repeats(function: str, op: Op, lists: Mapping[str, Sequence[Tensor]]) -> None:
    for name in op.written:
        tensors = lists.get(name, ())
        if len({id(t) for t in tensors}) == len(tensors):
            continue
        places: dict[int, int] = {}
        for i, tensor in enumerate(tensors):
            first = places.setdefault(id(tensor), i)
            if first != i:
                raise ValueError(
                    f"{function}: {name}[{i}] is {name}[{first}] again and would be changed twice; "
                    "pass every tensor once"
                )


def _refuse_half(function: str, tensors: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{function}: expected float32 or float64 state, got {tensor.dtype} at index {i}; "
                "small updates vanish in 16 bits, keep a float32 copy or a remainder "
                "(split_storage)"
            )


def _is_dtensor(*tensors: Tensor) -> bool:
    """Whether one of them is a DTensor."""
    # Where torch.distributed.tensor was never imported, there is none; importing it is slow.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


def _local_shards(function: str, lists: Mapping[str, Sequence[Tensor]]) -> dict[str, list[Tensor]]:
    """The lists with the local shard in place of every DTensor.

    An update of single elements needs no communication if all that belongs together is placed
    alike; sums still to be made (``Partial``) are no elements yet.
    """
    if not any(_is_dtensor(*tensors) for tensors in lists.values()):
        return {name: list(tensors) for name, tensors in lists.items()}
    first, leaders = next(iter(lists.items()))
    for name, tensors in lists.items():
        # Of the lists that do not match in length all but the empty ones have been refused.
        for i, (leader, tensor) in enumerate(zip(leaders, tensors, strict=False)):
            expected, got = _placement(leader), _placement(tensor)
            if expected != got:
                raise ValueError(
                    f"{function}: expected {name}[{i}] placed like {first}[{i}], {expected}, "
                    f"got {got}"
                )
            if _is_dtensor(tensor) and any(p.is_partial() for p in tensor.placements):
                raise ValueError(f"{function}: {name}[{i}] is a sum not yet made, placed {got}")
    with torch.no_grad():
        return {
            name: [t.to_local() if _is_dtensor(t) else t for t in tensors]
            for name, tensors in lists.items()
        }


def _placement(tensor: Tensor) -> tuple | str:
    if not _is_dtensor(tensor):
        return "no DTensor"
    return tensor.device_mesh, tuple(tensor.placements)


def _increment_versions(
    op: Op, given: Mapping[str, Sequence[Tensor]], local: Mapping[str, Sequence[Tensor]]
) -> None:
    """Let autograd know what was changed: the tensors given, and the shards of DTensors."""
    for name in op.written:
        if name in given:
            pairs = zip(given[name], local[name], strict=True)
            torch.autograd.graph.increment_version(
                [t for g, shard in pairs for t in ([g] if g is shard else [g, shard])]
            )


# What the compiled kernels take; what else the operators take is served by the reference.
_NATIVE_GRADS = (torch.float32, torch.bfloat16, torch.float16)


def _refuses(tensors: Sequence[Tensor], *dtypes: torch.dtype) -> str | None:
    if {t.dtype for t in tensors} <= {*dtypes} and all(map(Tensor.is_contiguous, tensors)):
        return None
    for tensor in tensors:
        if tensor.dtype not in dtypes or not tensor.is_contiguous():
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return (
                f"it takes contiguous {names} tensors, not {tensor.dtype} "
                f"with strides {tuple(tensor.stride())}"
            )
    return None


def _refuses_storage(
    tensors: Sequence[Tensor], remainders: Sequence[Tensor], copies: Sequence[Tensor] = ()
) -> str | None:
    return (
        _refuses(tensors, torch.bfloat16 if remainders else torch.float32)
        or _refuses(remainders, torch.int16)
        or _refuses(copies, torch.bfloat16)
    )


def _native_ema_accepts(
    teachers, students, teacher_remainders, student_remainders, teacher_copies, *rest
) -> str | None:
    return _refuses_storage(teachers, teacher_remainders, teacher_copies) or _refuses_storage(
        students, student_remainders
    )


def _native_adamw_accepts(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    teachers,
    param_remainders,
    teacher_remainders,
    param_copies,
    teacher_copies,
    *rest,
) -> str | None:
    return (
        _refuses_storage(params, param_remainders, param_copies)
        or _refuses_storage(teachers, teacher_remainders, teacher_copies)
        or _refuses(grads, *_NATIVE_GRADS)
        or _refuses(exp_avgs, torch.float32)
        or _refuses(exp_avg_sqs, torch.float32)
    )


def _fake_in_place(*args) -> None:
    return None


# Sizes of the tensors of a list: mixed and empty; many small ones; those of real models.
_MIXED = (5, 0, 1, 33, 4096 + 3)
_VIT_S = (384 * 1536, 1536, 384, 384 * 1152) * 48
_VIT_B = (768 * 3072, 3072, 768, 768 * 2304) * 48
_EMA_SHAPES = {
    "edge": dict(sizes=_MIXED),
    "edge_many": dict(sizes=(7,) * 70),
    "edge_single": dict(sizes=(1,)),
    "edge_split": dict(sizes=_MIXED, teachers="split", students="split"),
    "edge_split_teacher": dict(sizes=_MIXED, teachers="split"),
    "edge_split_student": dict(sizes=_MIXED, teachers="copied", students="split"),
    "vit_s": dict(sizes=_VIT_S),
    "vit_b": dict(sizes=_VIT_B),
}
_ADAMW_SHAPES = {
    "edge": dict(sizes=_MIXED),
    "edge_many": dict(sizes=(7,) * 70),
    "edge_single": dict(sizes=(1,)),
    "edge_bf16_grads": dict(sizes=_MIXED, grads=torch.bfloat16),
    "edge_fp16_grads": dict(sizes=_MIXED, grads=torch.float16),
    "edge_copied": dict(sizes=_MIXED, params="copied", teachers="copied"),
    "edge_split": dict(sizes=_MIXED, params="split", teachers="split", grads=torch.bfloat16),
    "edge_split_params": dict(sizes=_MIXED, params="split", teachers="copied"),
    "edge_split_teachers": dict(sizes=_MIXED, teachers="split"),
    "vit_s": dict(sizes=_VIT_S),
    "vit_s_split": dict(sizes=_VIT_S, params="split", teachers="split", grads=torch.bfloat16),
    "vit_b": dict(sizes=_VIT_B),
}


def _lists(count: int, sizes, device, dtype) -> list[list[Tensor]]:
    return [[torch.randn(n, device=device, dtype=dtype) for n in sizes] for _ in range(count)]


def _scalars(device, *values: float) -> list[Tensor]:
    return [torch.tensor(v, dtype=torch.float64, device=device) for v in values]


def _stored(tensors: list[Tensor], storage: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Tensors, remainders and copies; the copies hold no values yet."""
    if storage == "split":
        highs, remainders = zip(*map(split_storage, tensors), strict=True)
        return list(highs), list(remainders), []
    copied = storage == "copied"
    return tensors, [], [torch.zeros_like(t, dtype=torch.bfloat16) for t in tensors if copied]


def _make_ema(sizes, device, dtype, teachers="plain", students="plain"):
    teachers, students = (
        _stored(tensors, storage)
        for tensors, storage in zip(
            _lists(2, sizes, device, dtype), (teachers, students), strict=True
        )
    )
    return (
        teachers[0],
        students[0],
        teachers[1],
        students[1],
        teachers[2],
        *_scalars(device, 0.9),
        torch.tensor(False, device=device),
    )


def _make_adamw(sizes, device, dtype, params="plain", teachers="plain", grads=None):
    masters, gradients, exp_avgs, exp_avg_sqs, followers = _lists(5, sizes, device, dtype)
    params, param_remainders, param_copies = _stored(masters, params)
    teachers, teacher_remainders, teacher_copies = _stored(followers, teachers)
    return (
        params,
        [g.to(grads or dtype) for g in gradients],
        exp_avgs,
        # A mean of squares is not below the square of the mean.
        [m.square() + v.square() for m, v in zip(exp_avgs, exp_avg_sqs, strict=True)],
        teachers,
        param_remainders,
        teacher_remainders,
        param_copies,
        teacher_copies,
        torch.tensor(3, device=device),
        *_scalars(device, 1e-2, 0.9, 0.5, 0.8),
        torch.tensor(False, device=device),
        torch.linspace(0.0, 0.1, len(sizes), dtype=torch.float64, device=device),
        0.9,
        0.95,
        1e-8,
    )


_ema = Op(
    "ema_update_(Tensor(a!)[] teachers, Tensor[] students, Tensor(b!)[] teacher_remainders, "
    "Tensor[] student_remainders, Tensor(c!)[] teacher_copies, Tensor momentum, Tensor skip) "
    "-> ()",
    fake=_fake_in_place,
    implementations={
        "reference": reference.ema_update_,
        "cpp": Implementation(Native("ema_update_"), accepts=_native_ema_accepts),
        "cuda": Implementation(Native("ema_update_"), accepts=_native_ema_accepts),
    },
    shapes=_EMA_SHAPES,
    make=_make_ema,
)
_adamw_ema = Op(
    "adamw_ema_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] teachers, Tensor(e!)[] param_remainders, "
    "Tensor(f!)[] teacher_remainders, Tensor(g!)[] param_copies, Tensor(h!)[] teacher_copies, "
    "Tensor(i!) step, Tensor lr, Tensor momentum, Tensor grad_scale, Tensor clip, Tensor skip, "
    "Tensor weight_decay, float beta1, float beta2, float eps) -> ()",
    fake=_fake_in_place,
    implementations={
        "reference": reference.adamw_ema_,
        "cpp": Implementation(Native("adamw_ema_"), accepts=_native_adamw_accepts),
        "cuda": Implementation(Native("adamw_ema_"), accepts=_native_adamw_accepts),
    },
    shapes=_ADAMW_SHAPES,
    make=_make_adamw,
)
