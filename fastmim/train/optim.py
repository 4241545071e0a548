"""AdamW with the teacher's EMA in the same pass, its parameter groups, and the schedules."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fastmim.ops import adamw_ema_


def param_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float
) -> list[dict]:
    """Trainable parameters in two groups: without decay (vectors, biases), then with.

    As MAE's code groups them (arXiv:2111.06377, appendix A.1): cls and mask token are decayed.

    Args:
        named_parameters: As ``module.named_parameters()`` gives them; frozen ones are left out.
        weight_decay: Of the second group.

    Returns:
        Two dicts with ``names`` (list of str), ``params`` (list of Parameter) and ``weight_decay``.
    """
    groups = [{"names": [], "params": [], "weight_decay": decay} for decay in (0.0, weight_decay)]
    for name, param in named_parameters:
        if param.requires_grad:
            group = groups[0 if param.ndim <= 1 or name.endswith(".bias") else 1]
            group["names"].append(name)
            group["params"].append(param)
    return groups


def lr_at(epoch: float, *, lr: float, min_lr: float, warmup_epochs: float, epochs: float) -> float:
    """Linear warm-up, then half a cosine down to ``min_lr``; the first step has lr 0, as in MAE.

    Args:
        epoch: Fractional: optimizer steps done divided by steps per epoch.
        lr: Peak learning rate.
        min_lr: Learning rate at the end.
        warmup_epochs: Length of the warm-up.
        epochs: Length of the run.
    """
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / max(epochs - warmup_epochs, 1e-12)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


class AdamWEMA:
    """AdamW (arXiv:1711.05101) that also moves an EMA teacher, in one pass over memory.

    Args:
        groups: From :func:`param_groups`.
        betas: Coefficients of the two moments.
        eps: Added to the root of the second moment.
        teachers: Name of a parameter to its teacher tensor, for all parameters or for none.

    Raises:
        ValueError: If some parameters have a teacher and others have none.
    """

    def __init__(
        self,
        groups: list[dict],
        *,
        betas: tuple[float, float],
        eps: float,
        teachers: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.names: list[str] = [n for g in groups for n in g["names"]]
        self.params: list[nn.Parameter] = [p for g in groups for p in g["params"]]
        teachers = teachers or {}
        missing = [n for n in self.names if n not in teachers]
        if teachers and missing:
            raise ValueError(
                f"AdamWEMA: expected a teacher for every parameter, {len(missing)} have none: "
                f"{', '.join(missing[:5])}"
            )
        self.teachers = [teachers[n] for n in self.names] if teachers else []
        self.betas = betas
        self.eps = eps
        device = self.params[0].device
        decay = [g["weight_decay"] for g in groups for _ in g["params"]]
        self._weight_decay = torch.tensor(decay, dtype=torch.float64, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._exp_avg = [torch.zeros_like(p, requires_grad=False) for p in self.params]
        self._exp_avg_sq = [torch.zeros_like(p, requires_grad=False) for p in self.params]

    def grads(self) -> list[Tensor]:
        """Gradients in the order of ``params``.

        Raises:
            RuntimeError: If a parameter has none; names the first five.
        """
        missing = [n for n, p in zip(self.names, self.params, strict=True) if p.grad is None]
        if missing:
            raise RuntimeError(
                f"AdamWEMA: {len(missing)} parameters got no gradient: {', '.join(missing[:5])}; "
                "set requires_grad=False on those that the loss does not use"
            )
        return [p.grad for p in self.params]

    def step(
        self,
        *,
        lr: float,
        momentum: float = 1.0,
        grad_scale: float | Tensor = 1.0,
        clip: float | Tensor = 1.0,
        skip: bool | Tensor = False,
    ) -> None:
        """Update parameters and teachers from the gradients.

        Args:
            lr: Learning rate.
            momentum: Of the teachers.
            grad_scale: Factor of the gradients, undoing a scaling of the loss.
            clip: Another, limiting their norm.
            skip: If true nothing changes.
        """
        adamw_ema_(
            self.params,
            self.grads(),
            self._exp_avg,
            self._exp_avg_sq,
            self.teachers,
            step=self._step,
            lr=lr,
            momentum=momentum,
            grad_scale=grad_scale,
            clip=clip,
            skip=skip,
            weight_decay=self._weight_decay,
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
        )

    def zero_grad(self) -> None:
        """Release the gradients."""
        for param in self.params:
            param.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """``step``, and ``exp_avg.<name>`` and ``exp_avg_sq.<name>`` for every parameter."""
        state = {"step": self._step}
        for name, m, v in zip(self.names, self._exp_avg, self._exp_avg_sq, strict=True):
            state[f"exp_avg.{name}"] = m
            state[f"exp_avg_sq.{name}"] = v
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` gave.

        Raises:
            ValueError: If names or shapes differ; names the first five.
        """
        mine = self.state_dict()
        wrong = [
            n
            for n in [*mine, *(n for n in state if n not in mine)]
            if n not in state or n not in mine or state[n].shape != mine[n].shape
        ]
        if wrong:
            raise ValueError(
                f"AdamWEMA: the optimizer state differs in {len(wrong)} tensors: "
                f"{', '.join(wrong[:5])}"
            )
        for name, tensor in mine.items():
            tensor.copy_(state[name])
