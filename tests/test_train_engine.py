"""One optimizer step: schedules and groups as recorded, accumulation, teacher, guarded update."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastmim import MAE, METHODS, RCMAE, create_model
from fastmim.train import Engine
from fastmim.train.build import build_method
from fastmim.train.engine import resolve_device, resolve_precision
from fastmim.train.optim import lr_at, param_groups
from tests import accuracy
from tests.training import recipe

SCHEDULES = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())
STEPS_PER_EPOCH = 4


def network(dtype=torch.float32, model="nano", **options):
    torch.manual_seed(0)
    return create_model(model, norm_pix_loss=True, **options).to(dtype)


def engine(
    method="rc_mae", dtype=torch.float32, precision="fp32", compiled=False, **changes
) -> Engine:
    chosen = recipe(batch_size=32, **{"warmup_epochs": 0, **changes})
    return Engine(
        build_method(
            method,
            chosen,
            network(dtype, chosen.model, **METHODS[method].student_options(chosen.drop_path)),
        ),
        chosen,
        precision=precision,
        steps_per_epoch=STEPS_PER_EPOCH,
        compiled=compiled,
    )


def batches(step: int, count: int = 1, dtype=torch.float32, size: int = 8) -> list:
    """The images of a step, cut into micro-batches."""
    torch.manual_seed(100 + step)
    imgs = torch.randn(size, 3, 16, 16).to(dtype)
    ids = torch.arange(size) + size * step
    return [
        SimpleNamespace(imgs=i, sample_ids=s, epoch=0)
        for i, s in zip(imgs.chunk(count), ids.chunk(count), strict=True)
    ]


def everything(engine: Engine) -> dict[str, torch.Tensor]:
    """All that a step may change, copied."""
    method, state = engine.method, engine.optimizer.state_dict()
    state |= {f"student.{k}": v for k, v in method.student.state_dict().items()}
    if method.teacher is not None:
        state |= {f"teacher.{k}": v for k, v in method.teacher.module.state_dict().items()}
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_same(got: Engine, expected: dict[str, torch.Tensor]) -> None:
    found = everything(got)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        accuracy.exact(tensor, expected[name])


def whole(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("recorded", SCHEDULES["lr_schedule"], ids=["accum 1", "accum 2"])
def test_learning_rate_is_the_recorded_one(recorded):
    micro_steps = recorded["accum_iter"]
    steps_per_epoch = recorded["iters_per_epoch"] // micro_steps
    options = {k: recorded[k] for k in ("lr", "min_lr", "warmup_epochs", "epochs")}
    expected = recorded["per_iteration_lr"]
    found = [lr_at(i // micro_steps / steps_per_epoch, **options) for i in range(len(expected))]
    accuracy.golden(*(torch.tensor(v, dtype=torch.float64) for v in (found, expected)))
    assert found[0] == 0.0
    assert lr_at(recorded["epochs"], **options) == recorded["min_lr"]


def test_a_warm_up_of_no_or_all_epochs_divides_by_nothing():
    assert lr_at(0, lr=1.0, min_lr=0.0, warmup_epochs=0, epochs=5) == 1.0
    assert lr_at(2.5, lr=1.0, min_lr=0.0, warmup_epochs=5, epochs=5) == 0.5
    assert lr_at(5, lr=1.0, min_lr=0.1, warmup_epochs=5, epochs=5) == 1.0


@pytest.mark.parametrize("recorded", SCHEDULES["lr_scaling"])
def test_peak_learning_rate_scales_with_all_images_of_a_step(recorded):
    images = recorded["batch_per_gpu"] * recorded["accum_iter"] * recorded["world_size"]
    found = recipe(base_lr=recorded["blr"], batch_size=images).lr
    accuracy.golden(*(torch.tensor(v, dtype=torch.float64) for v in (found, recorded["lr"])))


@pytest.mark.parametrize(("schedule", "key"), [
    ("cosine", "table"),
    ("official", "momentum_used_per_step"),
])  # fmt: skip
@pytest.mark.parametrize("count", [1, 5])
def test_momentum_is_the_recorded_one(schedule, key, count):
    recorded = SCHEDULES["rc_mae_momentum"]
    micro_steps, epochs = recorded["iters_per_epoch"], recorded["epochs"]
    run = Engine(
        RCMAE(network(), momentum=recorded["base"], momentum_schedule=schedule),
        recipe(epochs=epochs),
        precision="fp32",
        steps_per_epoch=micro_steps // count,
    )
    iterations = range(epochs * micro_steps)
    if schedule == "cosine":  # once a step: the table at the first iteration of each
        found = [run.momentum_at(i // count, count - 1, count) for i in iterations]
        expected = [recorded[key][i // count * count] for i in iterations]
    else:
        found = [run.momentum_at(i // count, i % count, count) for i in iterations]
        expected = recorded[key]
    accuracy.golden(*(torch.tensor(v, dtype=torch.float64) for v in (found, expected)))
    assert run.momentum_at(run.total_steps, 0, 1) == 1.0 or schedule == "official"


@pytest.mark.parametrize("name", METHODS)
def test_parameter_groups_are_the_recorded_ones(name):
    recorded = SCHEDULES["pretrain_param_groups"][name]
    depth = sum(n.endswith("attn.qkv.weight") and n.startswith("blocks") for n in names(recorded))
    model = create_model("nano", depth=depth, target=METHODS[name].target)
    groups = param_groups(model.named_parameters(), recorded["weight_decay"])
    for group, expected in zip(groups, recorded["groups_in_order"], strict=True):
        assert group["names"] == expected["names"]
        assert group["weight_decay"] == expected["weight_decay"]
        assert [n for p in group["params"] for n, q in model.named_parameters() if q is p] == group[
            "names"
        ]
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == recorded["frozen"]


def names(recorded: dict) -> list[str]:
    return [name for group in recorded["groups_in_order"] for name in group["names"]]


@pytest.mark.parametrize("clip_grad", [None, 0.5])
def test_steps_are_those_of_plain_pytorch(clip_grad):
    """AdamW of torch, clipping of torch, then the teacher towards the new weights."""
    ours = engine(dtype=torch.float64, clip_grad=clip_grad, min_lr=1e-5)
    plain = RCMAE(network(torch.float64), momentum=0.996)
    groups = param_groups(plain.student.named_parameters(), ours.recipe.weight_decay)
    for group in groups:
        group.pop("names")
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-8)
    losses, expected = [], []
    for step in range(6):
        batch = batches(step, dtype=torch.float64)[0]
        result = ours.run_step(step, [batch])
        losses.append(result.losses["loss"])
        loss = plain(batch.imgs, ours.masks(batch)).total
        expected.append(loss.item())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip_grad or float("inf"))
        accuracy.scalar(result.grad_norm, norm, torch.float32)
        for group in adamw.param_groups:
            group["lr"] = result.lr
        adamw.step()
        adamw.zero_grad()
        plain.update_teacher(result.momentum)
    accuracy.run(losses, expected, torch.float32)
    for got, wanted in ((ours.method.student, plain.student), (ours.method.teacher, plain.teacher)):
        accuracy.golden_weights(whole(got.parameters()), whole(wanted.parameters()).detach())


@pytest.mark.parametrize("count", [2, 8])
@pytest.mark.parametrize("method", ["mae", "rc_mae"])
def test_accumulated_micro_batches_equal_the_batch(method, count):
    def gradient(dtype, parts):
        run = engine(method, dtype)
        run.run_step(0, batches(0, parts, dtype), parts)
        # After the first step the first moment is the gradient, up to a constant.
        return whole(v for k, v in run.optimizer.state_dict().items() if k.startswith("exp_avg."))

    formula = gradient(torch.float64, 1)
    accuracy.relative(gradient(torch.float32, count), gradient(torch.float32, 1), formula)

    runs = [engine(method), engine(method)]
    losses = [
        [run.run_step(i, batches(i, parts), parts).losses["loss"] for i in range(8)]
        for run, parts in zip(runs, (count, 1), strict=True)
    ]
    accuracy.run(*losses, torch.float32)


def test_teacher_follows_the_new_weights_once_a_step():
    run = engine()
    before = everything(run)
    result = run.run_step(0, batches(0, 4), 4)
    after = everything(run)
    assert result.momentum == run.momentum_at(0, 0, 1) == 0.996
    for name in run.method.teacher.module.state_dict():
        old, new = before[f"teacher.{name}"].double(), after[f"student.{name}"].double()
        accuracy.golden(after[f"teacher.{name}"], (0.996 * old + 0.004 * new).float())


def test_official_teacher_moves_after_every_micro_batch():
    run = engine(momentum_schedule="official", momentum=0.9)
    before = everything(run)
    run.run_step(1, batches(0, 3), 3)
    after = everything(run)
    momenta = [run.momentum_at(1, i, 3) for i in range(3)]
    assert len(set(momenta)) == 3
    for name in run.method.teacher.module.state_dict():
        expected = before[f"teacher.{name}"].double()
        for momentum, student in zip(momenta, (before, before, after), strict=True):
            expected = momentum * expected + (1 - momentum) * student[f"student.{name}"].double()
        accuracy.golden(after[f"teacher.{name}"], expected.float())


@pytest.mark.parametrize("schedule", ["cosine", "official"])
def test_frozen_tables_are_averaged_too(schedule):
    run = engine(momentum_schedule=schedule, momentum=0.75)
    with torch.no_grad():
        run.method.teacher.module.pos_embed.zero_()
    run.run_step(0, batches(0))
    student = run.method.student.pos_embed.detach()
    accuracy.golden(run.method.teacher.module.pos_embed.detach(), 0.25 * student)


def test_method_without_teacher_has_no_momentum():
    result = engine("mae").run_step(0, batches(0))
    assert result.momentum is None
    assert list(result.losses) == ["loss", "pixel"]


def test_gradients_are_released_after_a_step():
    run = engine()
    run.run_step(0, batches(0))
    assert all(p.grad is None for p in run.method.parameters())


def test_masks_depend_on_seed_epoch_and_sample_only():
    first = engine().masks(batches(0)[0])
    other = engine().masks(batches(0, 2)[1])
    accuracy.exact(first.ids_shuffle[4:], other.ids_shuffle)
    moved = batches(0)[0]
    moved.epoch = 1
    assert not torch.equal(engine().masks(moved).ids_shuffle, first.ids_shuffle)


def test_bf16_computes_in_16_bits_and_stores_in_32():
    runs = engine(), engine(precision="bf16")
    losses = [[run.run_step(i, batches(i)).losses["loss"] for i in range(8)] for run in runs]
    assert losses[0] != losses[1]
    accuracy.run(losses[1], losses[0], torch.bfloat16)
    assert {t.dtype for n, t in everything(runs[1]).items() if n != "step"} == {torch.float32}


def test_wrong_number_of_micro_batches_is_refused():
    for given, count in ((1, 2), (2, 1)):
        with pytest.raises(ValueError, match="argument 2 is"):
            engine().run_step(0, batches(0, given), count)


def test_parameter_that_the_loss_does_not_use_is_named():
    method = MAE(network())
    method.student.register_parameter("spare", torch.nn.Parameter(torch.zeros(2)))
    run = Engine(method, recipe(), precision="fp32", steps_per_epoch=4)
    with pytest.raises(RuntimeError, match="1 parameters got no gradient: spare"):
        run.run_step(0, batches(0))


def spoil_loss(run: Engine, micro_batches: list) -> None:
    micro_batches[-1].imgs[0, 0, 0] = float("nan")
    micro_batches[-1].imgs[1:] = float("inf")


def spoil_gradient(run: Engine, micro_batches: list) -> None:
    weight = run.method.student.decoder_pred.weight
    hook = weight.register_hook(lambda grad: hook.remove() or torch.full_like(grad, float("inf")))


@pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient])
@pytest.mark.parametrize("schedule", ["cosine", "official", None])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_bad_step_changes_nothing_and_the_next_one_recovers(spoil, schedule, count, clip_grad):
    def run():
        options = dict(clip_grad=clip_grad, momentum_schedule=schedule or "cosine")
        made = engine("rc_mae" if schedule else "mae", **options)
        made.run_step(0, batches(0, count), count)
        return made

    spoilt, clean = run(), run()
    bad = batches(1, count)
    spoil(spoilt, bad)
    before = everything(spoilt)
    result = spoilt.run_step(1, bad, count)
    assert result.skipped
    assert_same(spoilt, before)
    after = [r.run_step(2, batches(2, count), count) for r in (spoilt, clean)]
    assert after[0] == after[1]
    assert not after[0].skipped
    assert_same(spoilt, everything(clean))


def test_steps_are_the_same_every_time():
    runs = engine(), engine()
    for step in range(3):
        results = [run.run_step(step, batches(step, 2), 2) for run in runs]
        assert results[0] == results[1]
    assert_same(runs[0], everything(runs[1]))


def test_copied_engine_goes_on_alike():
    first = engine()
    first.run_step(0, batches(0))
    second = Engine(
        copy.deepcopy(first.method), first.recipe, precision="fp32", steps_per_epoch=STEPS_PER_EPOCH
    )
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert first.run_step(1, batches(1)) == second.run_step(1, batches(1))
    assert_same(second, everything(first))


def test_optimizer_state_of_another_model_is_refused():
    state = engine().optimizer.state_dict()
    state["exp_avg.spare"] = state.pop("exp_avg.cls_token")
    with pytest.raises(ValueError, match=r"differs in 2 tensors: exp_avg.cls_token, exp_avg.spare"):
        engine().optimizer.load_state_dict(state)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert resolve_device("auto").type == expected
    for name in ("gpu", "mps", "cuda:x", "", "meta"):
        with pytest.raises(ValueError, match="expected auto, cpu, cuda or cuda:N"):
            resolve_device(name)
    with pytest.raises(ValueError, match="was asked for, but"):
        resolve_device("cuda:99")


def test_each_of_several_processes_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("auto", "cuda"):
        assert resolve_device(name, 1) == torch.device("cuda:1")
        with pytest.raises(ValueError, match=r"process 2 of .* there are 2; .*-per-node=2"):
            resolve_device(name, 2)
    with pytest.raises(ValueError, match="'cuda:1' names one GPU for several processes"):
        resolve_device("cuda:1", 0)
    assert resolve_device("cpu", 5) == torch.device("cpu")


def test_precisions(monkeypatch):
    cpu = torch.device("cpu")
    assert [resolve_precision(p, cpu, 32) for p in ("fp32", "bf16", "auto")] == [
        "fp32",
        "bf16",
        "fp32",
    ]
    for native, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=native: has)
        assert resolve_precision("auto", cpu, 768) == expected
    with pytest.raises(ValueError, match="expected auto, fp32 or bf16, got 'fp16'"):
        resolve_precision("fp16", cpu, 768)
