"""A teacher that follows its student as an exponential moving average."""

import copy

from torch import Tensor, nn

from fastmim.ops import ema_update_


class EMATeacher(nn.Module):
    """Copy of a student whose parameters follow it (RC-MAE, arXiv:2210.02077, sec. 3).

    The copy is stored in the student's precision, always in evaluation mode, and takes no gradient.

    Args:
        student: The module to copy and to follow. All its parameters are averaged, the frozen
            ones too; buffers stay as they are, the networks here hold constants in them.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(student).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "EMATeacher":
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)

    def pairs(self, student: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """Teacher and student parameter of each name, matched by name and shape.

        Raises:
            ValueError: If the two do not hold the same parameters; names the first five.
        """
        mine = dict(self.module.named_parameters())
        theirs = dict(student.named_parameters())
        wrong = [
            name
            for name in [*mine, *(n for n in theirs if n not in mine)]
            if name not in mine or name not in theirs or mine[name].shape != theirs[name].shape
        ]
        if wrong:
            raise ValueError(
                f"EMATeacher: teacher and student differ in {len(wrong)} parameters: "
                f"{', '.join(wrong[:5])}; build the teacher from this student"
            )
        return {name: (mine[name], theirs[name]) for name in mine}

    def update_(self, student: nn.Module, momentum: float | Tensor) -> None:
        """``teacher <- momentum * teacher + (1 - momentum) * student`` for every parameter.

        Args:
            student: A module with the parameters of the one copied.
            momentum: In [0, 1].
        """
        pairs = self.pairs(student).values()
        ema_update_([t for t, _ in pairs], [s for _, s in pairs], momentum)
