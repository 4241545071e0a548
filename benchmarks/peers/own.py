"""fastmim's own step, as a user gets it, and the same with options that cost or save memory."""

import itertools

import torch
from machine import libraries, serving
from torch import Tensor

from fastmim import create_model
from fastmim.methods import METHODS
from fastmim.ops import masks_from_shuffle, use_backend
from fastmim.train import Engine
from fastmim.train.distributed import World
from fastmim.train.engine import Votes
from peers.base import Batch, Case, StepProgram, autocast


class FastMIM(StepProgram):
    """The engine with its masks, guard, schedules and gradient norm."""

    name = "fastmim"
    memory = "standard"
    residual_dtype: torch.dtype | None = None
    forced: str | None = None
    compiled = False

    def __init__(self, case: Case) -> None:
        recipe = case.recipe
        kind = METHODS[case.method]
        model = create_model(
            case.model,
            norm_pix_loss=recipe.norm_pix,
            memory=self.memory,
            residual_dtype=self.residual_dtype,
            **kind.student_options(drop_path=0.0),
        )
        method = kind(model, mask_ratio=recipe.mask_ratio)
        if method.teacher is not None:
            teacher, weights = method.teacher.module, case.weights(1)
            teacher.load_state_dict({name: weights[name] for name in teacher.state_dict()})
        method.student.load_state_dict(case.weights(0))
        method.to(case.device)
        self.case = case
        self.student = method.student
        self._engine = Engine(
            method,
            recipe,
            precision=case.dtype,
            steps_per_epoch=10**6,
            compiled=self.compiled,
            world=self.world(),
        )
        self._step = itertools.count()

    def world(self) -> World | None:
        """Processes that train together; None: this one."""
        return None

    def loss(self, imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        masks = masks_from_shuffle(ids_shuffle, self._engine.num_keep)
        with autocast(self.case), use_backend(self.forced):
            return self._engine.method(imgs, masks).total

    def update(self) -> None:
        step, loss = next(self._step), torch.zeros((), device=self.case.device)
        with use_backend(self.forced):
            self._engine._update(step, 1, {"loss": loss}, Votes)
            self._engine._follow(step, 0, 1)

    def followed(self) -> list[tuple[Tensor, Tensor]]:
        if self._engine.method.teacher_follows != "step":
            return []
        teachers = dict(self._engine.method.teacher.module.named_parameters())
        students = self.student.named_parameters()
        return [(teachers[name], p) for name, p in students if p.requires_grad]

    @classmethod
    def backend(cls, case: Case) -> dict:
        served = cls.forced or serving(torch.device(case.device))
        return dict(backend=served, libraries=libraries(["triton"] if "triton" in served else []))

    def step(self, batch: Batch) -> None:
        with use_backend(self.forced):
            result = self._engine.run_step(next(self._step), [batch])
        if result.skipped:
            raise RuntimeError("the step was skipped: a loss or gradient was not finite")

    def parts(self) -> dict[str, list[tuple[object, str]]]:
        engine, student = self._engine, self.student
        return {
            "masks": [(engine, "masks")],
            "embed": [(student.patch_embed, "forward")],
            "encoder": [(student, "forward_encoder")],
            "decoder": [(student, "forward_decoder")],
            "teacher": [(engine, "_teach")],
            "loss": [(engine.method, "forward")],  # what is left of the forward pass
            "update": [(engine, "_update"), (engine, "_follow")],
        }


class CompiledFastMIM(FastMIM):
    """``compile=True``: networks and loss under torch.compile, around fastmim's operators."""

    name = "fastmim-compiled"
    compiled = True

    def __init__(self, case: Case) -> None:
        torch._dynamo.reset()  # what was compiled for other cases is not needed again
        super().__init__(case)

    def parts(self) -> dict[str, list[tuple[object, str]]]:
        engine = self._engine
        return {
            "masks": [(engine, "masks")],
            "teacher": [(engine, "_teach")],
            "forward": [(engine.method, "_compiled_call_impl")],
            "update": [(engine, "_update"), (engine, "_follow")],
        }


class Lean(FastMIM):
    """``memory="lean"``: normalised tokens and GELU are made again in the backward pass."""

    name = "fastmim-lean"
    memory = "lean"


class RecomputeMlp(FastMIM):
    """``memory="recompute_mlp"``: the hidden layer of each MLP is made again too."""

    name = "fastmim-recompute-mlp"
    memory = "recompute_mlp"


class Checkpoint(FastMIM):
    """``memory="checkpoint"``: each block is made again."""

    name = "fastmim-checkpoint"
    memory = "checkpoint"


class LeanBf16Residual(Lean):
    """:class:`Lean` with a residual stream in bfloat16: other numerics."""

    name = "fastmim-lean-bf16-residual"
    residual_dtype = torch.bfloat16
    dtypes = ("bf16",)


class Reference(FastMIM):
    """fastmim with every operator in plain PyTorch."""

    name = "fastmim-reference"
    forced = "reference"


OWN: dict[str, type[StepProgram]] = {
    program.name: program
    for program in (
        FastMIM,
        CompiledFastMIM,
        Lean,
        RecomputeMlp,
        Checkpoint,
        LeanBf16Residual,
        Reference,
    )
}
