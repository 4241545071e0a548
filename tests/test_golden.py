"""MAE and RC-MAE against numbers recorded from the authors' code (tests/golden/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastmim import MAE, OPS, RCMAE, use_backend
from fastmim.nn import MaskedAutoencoder, sincos_pos_embed
from fastmim.ops import (
    adamw_ema_,
    ema_update_,
    masks_from_noise,
    patchify,
    unpatchify,
)
from tests import accuracy

SIZES = dict(
    img_size=32,
    patch_size=8,
    embed_dim=64,
    depth=2,
    num_heads=2,
    decoder_embed_dim=32,
    decoder_depth=1,
    decoder_num_heads=1,
)
LINEAR = ("weight", "bias")
BLOCK = [
    f"{layer}.{name}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for name in LINEAR
]
KEYS = [
    *("cls_token", "pos_embed", "mask_token", "decoder_pos_embed"),
    *(f"patch_embed.proj.{name}" for name in LINEAR),
    *(f"blocks.{i}.{name}" for i in range(2) for name in BLOCK),
    *(f"{layer}.{name}" for layer in ("norm", "decoder_embed") for name in LINEAR),
    *(f"decoder_blocks.0.{name}" for name in BLOCK),
    *(f"{layer}.{name}" for layer in ("decoder_norm", "decoder_pred") for name in LINEAR),
]
KEPT = 4
GAMMA, MOMENTUM = 1.0, 0.996
TERMS = {"loss": "total", "s_loss": "pixel", "consistency_loss": "consistency"}


def part(recorded: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}


def autoencoder(state: dict[str, Tensor], norm_pix: bool) -> MaskedAutoencoder:
    model = MaskedAutoencoder(norm_pix_loss=norm_pix, **SIZES)
    model.load_state_dict(state)
    return model


def rc_mae(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> RCMAE:
    method = RCMAE(autoencoder(student, True), gamma=GAMMA, momentum=MOMENTUM)
    method.teacher.module.load_state_dict(teacher)
    return method


def assert_gradients(model: torch.nn.Module, recorded: dict[str, Tensor]) -> None:
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == recorded.keys()
    for name, gradient in gradients.items():
        accuracy.golden(gradient, recorded[name])


@pytest.fixture(params=["reference", "auto"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def test_weights_have_the_published_names_in_the_published_order(golden_file):
    assert list(MaskedAutoencoder(**SIZES).state_dict()) == KEYS
    assert set(part(golden_file("mae_pix"), "model.")) == set(KEYS)
    schedules = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())
    for group in schedules["pretrain_param_groups"]["mae"]["groups_in_order"]:
        assert [key for key in KEYS if key in group["names"]] == group["names"]


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["mae_pix", "mae_normpix"])
def test_mae(name, golden_file):
    recorded = golden_file(name)
    model = autoencoder(part(recorded, "model."), name == "mae_normpix")
    masks = masks_from_noise(recorded["noise"], KEPT)
    accuracy.exact(masks.mask.float(), recorded["mask"])
    accuracy.golden(model.forward_encoder(recorded["imgs"], masks), recorded["latent"])
    out = model(recorded["imgs"], masks, return_full_pred=True)
    accuracy.golden(out.pred, recorded["pred"])
    losses = MAE(model)(recorded["imgs"], masks)
    for loss in (out.loss, losses.total, losses.terms["pixel"]):
        accuracy.golden(loss.reshape(1), recorded["loss"])
    losses.total.backward()
    assert_gradients(model, part(recorded, "grad."))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("name", ["mae_pix", "mae_normpix"])
def test_mae_in_double(name, golden_file):
    recorded = golden_file(name)
    model = autoencoder(part(recorded, "model."), name == "mae_normpix").double()
    loss = MAE(model)(recorded["imgs"].double(), masks_from_noise(recorded["noise"], KEPT)).total
    accuracy.golden(loss.reshape(1), recorded["loss_fp64"])


def test_patches_are_in_the_published_order(golden_file):
    recorded = golden_file("mae_pix")
    accuracy.exact(patchify(recorded["imgs"], 8), recorded["patches"])
    accuracy.exact(unpatchify(recorded["patches"], 8, (4, 4)), recorded["imgs"])


@pytest.mark.usefixtures("backend")
def test_rc_mae(golden_file):
    recorded = golden_file("rc_mae")
    method = rc_mae(part(recorded, "model."), part(recorded, "teacher."))
    imgs, masks = recorded["imgs"], masks_from_noise(recorded["noise"], KEPT)
    for model, prefix in ((method.student, ""), (method.teacher.module, "teacher_")):
        accuracy.golden(model.forward_encoder(imgs, masks), recorded[f"{prefix}latent"])
        accuracy.golden(model.predict(imgs, masks, full=True), recorded[f"{prefix}pred"])
    losses = method(imgs, masks)
    for name, term in TERMS.items():
        accuracy.golden({"total": losses.total, **losses.terms}[term].reshape(1), recorded[name])
    losses.total.backward()
    assert_gradients(method.student, part(golden_file("rc_mae_grads"), "grad."))


@pytest.mark.usefixtures("backend")
def test_rc_mae_in_double(golden_file):
    recorded = golden_file("rc_mae")
    method = rc_mae(part(recorded, "model."), part(recorded, "teacher.")).double()
    losses = method(recorded["imgs"].double(), masks_from_noise(recorded["noise"], KEPT))
    for name, term in TERMS.items():
        value = {"total": losses.total, **losses.terms}[term]
        accuracy.golden(value.reshape(1), recorded[f"{name}_fp64"])


@pytest.mark.usefixtures("backend")
def test_teacher_after_one_update(golden_file):
    recorded = golden_file("rc_mae")
    method = rc_mae(part(recorded, "model."), part(recorded, "teacher."))
    method.update_teacher()
    after = part(golden_file("rc_mae_ema"), "teacher_after.")
    assert method.teacher.module.state_dict().keys() == after.keys()
    for name, tensor in method.teacher.module.state_dict().items():
        accuracy.golden(tensor, after[name])


def train(method: RCMAE, recorded: dict[str, Tensor]) -> dict[str, Tensor]:
    """Five steps as recorded: AdamW, then the EMA of the new student, in one operator."""
    named = [(n, p) for n, p in method.student.named_parameters() if p.requires_grad]
    pairs = method.teacher.pairs(method.student)
    params, teachers = [p for _, p in named], [pairs[n][0] for n, _ in named]
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    decays = [0.05 if p.ndim > 1 and not n.endswith(".bias") else 0.0 for n, p in named]
    step = torch.tensor(0)
    logged = {name: [] for name in (*TERMS, "grad_norm")}
    for imgs, noise in zip(recorded["imgs"], recorded["noise"], strict=True):
        losses = method(imgs.to(params[0].dtype), masks_from_noise(noise, KEPT))
        grads = torch.autograd.grad(losses.total, params)
        for name, term in TERMS.items():
            logged[name].append({"total": losses.total, **losses.terms}[term].detach())
        logged["grad_norm"].append(torch.nn.utils.get_total_norm(grads))
        adamw_ema_(
            params,
            grads,
            *moments,
            teachers,
            step=step,
            lr=1e-3,
            momentum=MOMENTUM,
            grad_scale=1.0,
            skip=False,
            weight_decay=torch.tensor(decays, dtype=torch.float64),
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
        )
    return {name: torch.stack(values) for name, values in logged.items()}


def without_key_bias(name: str, tensor: Tensor) -> Tensor:
    """The bias of the keys shifts every score of a query alike, so its gradient is rounding noise.

    AdamW divides by the size of the gradient and makes steps of that noise.
    """
    if not name.endswith("attn.qkv.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])


def final_weights(method: RCMAE, recorded: dict[str, Tensor]):
    """Student and teacher after the run, each beside the recorded one."""
    for model, prefix in (
        (method.student, "model_final."),
        (method.teacher.module, "teacher_final."),
    ):
        expected = {n: without_key_bias(n, t) for n, t in part(recorded, prefix).items()}
        state = model.state_dict()
        yield {n: without_key_bias(n, state[n]).float() for n in expected}, expected


@pytest.mark.usefixtures("backend")
def test_trajectory(golden_file):
    start, recorded = golden_file("rc_mae"), golden_file("rc_mae_trajectory")
    method = rc_mae(part(start, "model."), part(start, "teacher."))
    for name, values in train(method, recorded).items():
        accuracy.golden(values, recorded[name])
    for got, expected in final_weights(method, recorded):
        whole = [torch.cat([t.flatten() for t in ts.values()]) for ts in (got, expected)]
        accuracy.golden_weights(*whole)


@pytest.mark.usefixtures("backend")
def test_trajectory_from_a_copied_teacher(golden_file):
    start, recorded = golden_file("rc_mae"), golden_file("rc_mae_trajectory")
    method = RCMAE(autoencoder(part(start, "model."), True), gamma=GAMMA, momentum=MOMENTUM)
    logged = train(method, recorded)
    assert logged["consistency_loss"][0] == 0
    for name, values in logged.items():
        accuracy.golden(values, recorded[f"copystart.{name}"])


@pytest.mark.parametrize("prefix", ["", "copystart."])
def test_trajectory_in_double(prefix, golden_file):
    start, recorded = golden_file("rc_mae"), golden_file("rc_mae_trajectory")
    teacher = part(start, "teacher." if not prefix else "model.")
    method = rc_mae(part(start, "model."), teacher).double()
    for name, values in train(method, recorded).items():
        if f"{prefix}{name}_fp64" in recorded:
            accuracy.golden(values, recorded[f"{prefix}{name}_fp64"])
    if not prefix:
        for got, expected in final_weights(method, recorded):
            for name in expected:
                accuracy.golden_weights(got[name], expected[name])


@pytest.mark.parametrize(("width", "side"), [(64, 4), (96, 6)])
def test_position_table(width, side, golden_file):
    recorded = golden_file("pos_embed")
    table = sincos_pos_embed(width, (side, side))
    accuracy.exact(table[0], recorded[f"sincos.d{width}.g{side}"])
    accuracy.exact(table[0, 1:], recorded[f"sincos.d{width}.g{side}.nocls"])


@pytest.mark.parametrize("backend", OPS["ema_update_"].backends)
def test_ema_update_operator(backend, golden_file):
    reason = OPS["ema_update_"].unavailable(backend, torch.device("cpu"))
    if reason:
        pytest.skip(reason)
    recorded, after = golden_file("rc_mae"), part(golden_file("rc_mae_ema"), "teacher_after.")
    teachers, students = part(recorded, "teacher."), part(recorded, "model.")
    with use_backend(backend):
        ema_update_(list(teachers.values()), [students[n] for n in teachers], MOMENTUM)
    for name, teacher in teachers.items():
        accuracy.golden(teacher, after[name])
