"""AdamW's state: by index as torch and the authors save it, by name as fastmim does."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastmim.interop.names import is_decayed, is_trained
from fastmim.train.checkpoint import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
_MOMENTS = ("exp_avg", "exp_avg_sq")


def group_names(shapes: Shapes) -> list[list[str]]:
    """Trained parameters of the authors' two groups, in the order of their indices.

    Args:
        shapes: Of all tensors, in the order of the state_dict.

    Returns:
        Names without decay (vectors and biases), then names with it; fixed tables are in neither.
    """
    trained = [name for name in shapes if is_trained(name)]
    return [
        [n for n in trained if is_decayed(n, shapes[n]) is decayed] for decayed in (False, True)
    ]


def by_name(optimizer: Any, shapes: Shapes) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """AdamW's state by name, from ``torch.optim.AdamW.state_dict()`` of the authors' groups.

    Args:
        optimizer: ``{"state": {index: ...}, "param_groups": [...]}``; steps may be ints, as old
            versions of torch saved them.
        shapes: Of the student's tensors, in the order of the state_dict.

    Returns:
        ``step``, and ``exp_avg.<name>`` and ``exp_avg_sq.<name>`` for every trained parameter;
        and the options of the two groups.

    Raises:
        CheckpointError: If groups or shapes are not those of the student; names the first.
    """
    names = group_names(shapes)
    try:
        groups, state = optimizer["param_groups"], optimizer["state"]
        indices = [list(group["params"]) for group in groups]
        options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
        if [len(group) for group in indices] != [len(group) for group in names]:
            raise CheckpointError(
                f"optimizer: groups of {' and '.join(str(len(group)) for group in indices)} "
                f"parameters, expected {len(names[0])} without decay and {len(names[1])} with it"
            )
        named, steps = {}, set()
        for name, index in zip(chain(*names), chain(*indices), strict=True):
            entry = state[index]
            steps.add(int(entry["step"]))
            for moment in _MOMENTS:
                shape = tuple(entry[moment].shape)
                if shape != shapes[name]:
                    raise CheckpointError(
                        f"optimizer: {moment} of parameter {index} is {shape}, {name} is "
                        f"{shapes[name]}"
                    )
                named[f"{moment}.{name}"] = entry[moment]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"optimizer: expected the state of torch's AdamW with two moments for each parameter; "
            f"{type(error).__name__}: {error}"
        ) from error
    if len(steps) != 1:
        raise CheckpointError(f"optimizer: expected one step count, got {sorted(steps)}")
    return {"step": torch.tensor(steps.pop()), **named}, options


def check_named(named: Mapping[str, Tensor], shapes: Shapes) -> None:
    """Refuse a state by name that is not of these parameters.

    Raises:
        CheckpointError: Names the first five tensors that are missing or of another shape.
    """
    wanted = {"step": ()}
    for name in chain(*group_names(shapes)):
        wanted |= {f"{moment}.{name}": shapes[name] for moment in _MOMENTS}
    wrong = [n for n, shape in wanted.items() if n not in named or named[n].shape != shape]
    if wrong:
        raise CheckpointError(
            f"optimizer: {len(wrong)} tensors are missing or of another shape: "
            f"{', '.join(wrong[:5])}"
        )


def by_index(
    named: Mapping[str, Tensor], shapes: Shapes, options: list[dict[str, Any]]
) -> dict[str, Any]:
    """The inverse of :func:`by_name`, in the layout of today's torch.

    Raises:
        CheckpointError: If the options are not those of two groups.
    """
    if len(options) != 2 or not all(isinstance(group, dict) for group in options):
        raise CheckpointError(f"optimizer: expected the options of two groups, got {options}")
    names = group_names(shapes)
    order = list(chain(*names))
    state = {
        index: {
            "step": named["step"].to(torch.float32),
            **{moment: named[f"{moment}.{name}"] for moment in _MOMENTS},
        }
        for index, name in enumerate(order)
    }
    first = len(names[0])
    indices = [list(range(first)), list(range(first, len(order)))]
    groups = [
        {k: tuple(v) if isinstance(v, list) else v for k, v in group.items()} | {"params": params}
        for group, params in zip(options, indices, strict=True)
    ]
    return {"state": state, "param_groups": groups}
