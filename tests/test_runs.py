"""32 steps of every method give the same losses whatever serves the operators."""

import pytest
import torch
from torch._dynamo.utils import counters

from fastmim import create_model
from fastmim.methods import METHODS as METHOD_CLASSES
from fastmim.nn.layers import MEMORY_MODES
from fastmim.ops import OPS, use_backend
from fastmim.ops._registry import Op
from fastmim.train import Engine
from fastmim.train.build import build_method
from tests import accuracy
from tests.conftest import DEVICE
from tests.test_train_engine import STEPS_PER_EPOCH, batches, engine, everything
from tests.training import recipe

STEPS = 32
EPOCHS = STEPS // STEPS_PER_EPOCH
METHODS = {
    "mae": {},
    "rc_mae": {},
    "dbot": dict(stage_epochs=(0, EPOCHS // 2, EPOCHS)),
    "sdae": dict(teacher_update="step", momentum=0.9),
}
# What a run of every method cannot do without.
COMMON = {"gather_patches", "norm", "norm_backward", "restore_tokens", "sample_masks"}
ATTENTION = {"attention", "attention_backward"}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOSSES = {
    "mae": "patch_loss", "rc_mae": "patch_loss", "dbot": "feature_loss", "sdae": "feature_loss",
}  # fmt: skip


def losses_of(
    method: str, images: int, precision: str = "fp32", compiled: bool = False
) -> list[float]:
    """Of 32 steps, dBOT's in two stages; a teacher must have moved."""
    run = engine(method, precision=precision, compiled=compiled, epochs=EPOCHS, **METHODS[method])
    before = {n: t.clone() for n, t in everything(run).items() if n.startswith("teacher.")}
    losses = [
        run.run_step(step, batches(step, size=images)).losses["loss"] for step in range(STEPS)
    ]
    assert all(not torch.equal(everything(run)[name], before[name]) for name in moving(before))
    assert run.stage == (method == "dbot")
    return losses


def moving(teacher: dict) -> list[str]:
    """The teacher's matrices: fixed tables stay, and dBOT's new one has the old bias."""
    return [name for name in teacher if name.endswith("qkv.weight")]


def served_by(backend: str, monkeypatch) -> set[str]:
    """Serve operators from a backend where it can, else from the reference; names of the former."""
    served = set()

    def choose(op, device, args=None):
        if op.unavailable(backend, device) or op.refuses(backend, args):
            return "reference"
        served.add(op.name)
        return backend

    monkeypatch.setattr(Op, "choose", choose)
    return served


@pytest.fixture(scope="module")
def reference():
    """Losses of a method, number of images and precision by the reference implementations."""
    found = {}

    def losses(*case) -> list[float]:
        if case not in found:
            with use_backend("reference"):
                found[case] = losses_of(*case)
        return found[case]

    return losses


@pytest.mark.parametrize("method", METHODS)
def test_cpp_run_is_the_reference_run(method, reference, monkeypatch):
    if OPS["attention"].unavailable("cpp", torch.device("cpu")):
        pytest.skip("the extension is not built")
    expected = reference(method, 8)
    served = served_by("cpp", monkeypatch)
    accuracy.run(losses_of(method, 8), expected, torch.float32)
    assert served >= COMMON | ATTENTION | {"ema_update_" if method == "sdae" else "adamw_ema_"}


@pytest.mark.parametrize("method", METHODS)
def test_compiled_run_is_the_reference_run(method, reference):
    torch.compiler.reset()
    counters.clear()
    accuracy.run(losses_of(method, 8, compiled=True), reference(method, 8), torch.float32)
    # The loss's and the teacher's; all of it, and in dBOT's second stage nothing new.
    assert counters["stats"]["unique_graphs"] == (1 if method == "mae" else 2)
    assert not counters["graph_break"]


@pytest.mark.parametrize("method", METHODS)
def test_modes_that_keep_less_learn_the_same_from_images_of_any_kind(method):
    def losses(memory: str) -> list[float]:
        torch.manual_seed(0)
        network = create_model(
            "nano_deep",
            img_size=(16, 32),
            in_chans=5,
            memory=memory,
            **METHOD_CLASSES[method].student_options(0.3),
        )
        chosen = recipe(batch_size=32, warmup_epochs=0, epochs=2, drop_path=0.3)
        options = dict(precision="fp32", steps_per_epoch=4)
        run = Engine(build_method(method, chosen, network), chosen, **options)
        steps = [batches(step) for step in range(8)]
        for (batch,) in steps:
            batch.imgs = torch.randn(8, 5, 16, 32, generator=torch.Generator().manual_seed(1))
        return [run.run_step(i, step).losses["loss"] for i, step in enumerate(steps)]

    standard = losses("standard")
    assert standard[-1] < standard[0]
    for memory in MEMORY_MODES[1:]:
        accuracy.run(losses(memory), standard, torch.float32)


# Triton's attention takes 16 bits only.
@pytest.mark.parametrize(
    ("method", "precision"), [*((name, "fp32") for name in METHODS), ("rc_mae", "bf16")]
)
def test_triton_run_is_the_reference_run(method, precision, reference, monkeypatch):
    if DEVICE != "cpu" or OPS["norm"].unavailable("triton", torch.device("cpu")):
        pytest.skip("Triton's interpreter is not in use")
    expected = reference(method, 1, precision)
    served = served_by("triton", monkeypatch)
    accuracy.run(losses_of(method, 1, precision), expected, DTYPES[precision])
    assert served >= COMMON | {LOSSES[method]} | (ATTENTION if precision == "bf16" else set())
