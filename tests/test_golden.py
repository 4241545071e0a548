"""All methods against numbers recorded from the authors' code (tests/golden/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastmim import DBOT, MAE, OPS, RCMAE, SdAE, use_backend
from fastmim.methods import Clock
from fastmim.nn import Block, Blocks, MaskedAutoencoder, resize_pos_embed, sincos_pos_embed
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
FOLDS = 3
SCHEDULES = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())
GAMMA, MOMENTUM = 1.0, 0.996
TERMS = {"loss": "total", "s_loss": "pixel", "consistency_loss": "consistency"}


def part(recorded: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}


def autoencoder(state: dict[str, Tensor], norm_pix: bool = False, **more) -> MaskedAutoencoder:
    model = MaskedAutoencoder(norm_pix_loss=norm_pix, **{**SIZES, **more})
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
    for group in SCHEDULES["pretrain_param_groups"]["mae"]["groups_in_order"]:
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


def dbot(recorded: dict[str, Tensor], teacher: str = "teacher.", **options) -> DBOT:
    student = autoencoder(part(recorded, "model."), target="tokens")
    method = DBOT(student, teacher_depth=0 if teacher.startswith("depth0") else None, **options)
    method.teacher.module.load_state_dict(part(recorded, teacher))
    return method


@pytest.mark.usefixtures("backend")
def test_dbot(golden_file):
    recorded = golden_file("dbot")
    method = dbot(recorded)
    imgs, masks = recorded["imgs"], masks_from_noise(recorded["noise"], KEPT)
    accuracy.exact(torch.cat([torch.ones(3, 1), masks.mask], dim=1), recorded["mask"])
    accuracy.golden(method.student.forward_encoder(imgs, masks), recorded["latent"])
    accuracy.golden(method.student.predict(imgs, masks, full=True), recorded["pred"])
    accuracy.golden(method.teach(imgs, masks), recorded["target"])
    losses = method(imgs, masks)
    for loss in (losses.total, losses.terms["feature"]):
        accuracy.golden(loss.reshape(1), recorded["loss"])
    losses.total.backward()
    assert_gradients(method.student, part(golden_file("dbot_grads"), "grad."))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("loss", "teacher", "options"), [
    ("loss", "teacher.", {}),
    ("loss_target_final_norm", "teacher.", {"teacher_norm": True}),
    ("loss_unnormalized_target", "teacher.", {"norm_features": False}),
    ("depth0.loss", "depth0.teacher.", {}),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dbot_variants(loss, teacher, options, dtype, golden_file):
    recorded = golden_file("dbot")
    method = dbot(recorded, teacher, **options).to(dtype)
    found = method(recorded["imgs"].to(dtype), masks_from_noise(recorded["noise"], KEPT)).total
    suffix = "" if dtype == torch.float32 else "_fp64"
    accuracy.golden(found.reshape(1), recorded[loss + suffix])


def test_dbot_teacher_without_blocks(golden_file):
    recorded = golden_file("dbot")
    method = dbot(recorded, "depth0.teacher.")
    assert set(method.teacher.module.state_dict()) == set(part(recorded, "depth0.teacher."))
    accuracy.golden(method.teach(recorded["imgs"], None), recorded["depth0.target"])


@pytest.mark.usefixtures("backend")
def test_dbot_with_stochastic_depth(golden_file):
    recorded = golden_file("dbot")
    method = dbot(recorded)
    rate = recorded["droppath.rates"].max().item()
    method.student = autoencoder(
        part(recorded, "model."), target="tokens", drop_path=rate, decoder_drop_path=rate
    )
    imgs, masks = recorded["imgs"], masks_from_noise(recorded["noise"], KEPT)
    draws = recorded["droppath.draws"].T
    pred = method.student.predict(imgs, masks, full=True, draws=draws)
    accuracy.golden(pred, recorded["droppath.pred"])
    loss = method(imgs, masks, draws=draws).total
    accuracy.golden(loss.reshape(1), recorded["droppath.loss"])
    loss.backward()
    norms = {n: p.grad.norm() for n, p in method.student.named_parameters() if p.requires_grad}
    assert norms.keys() == part(recorded, "droppath.gradnorm.").keys()
    for name, expected in part(recorded, "droppath.gradnorm.").items():
        accuracy.golden(norms[name].reshape(1), expected.float().reshape(1))
    method.eval()  # nothing is dropped
    accuracy.golden(method(imgs, masks).total.reshape(1), recorded["loss"])


@pytest.mark.parametrize(("method", "option", "part"), [
    ("dbot", "drop_path_rate", "encoder"),
    ("dbot", "drop_path_rate", "decoder"),
    ("sdae", "drop_path", "encoder"),
])  # fmt: skip
def test_rates_of_stochastic_depth(method, option, part):
    for recorded in SCHEDULES[f"{method}_drop_path_rates"]:
        rates = recorded[part]
        blocks = (Block(4, 1, 1.0, torch.nn.LayerNorm) for _ in rates)
        found = Blocks(blocks, recorded[option]).rates
        accuracy.golden(torch.tensor(found), torch.tensor(rates))


def test_dbot_stage_switch_keeps_what_the_released_code_keeps(golden_file):
    recorded, switch = golden_file("dbot"), SCHEDULES["dbot_stage_switch"]
    method = dbot(recorded)
    trained = {n: p.clone() for n, p in method.student.state_dict().items()}
    method.begin_stage(1)
    teacher, student = method.teacher.module.state_dict(), method.student.state_dict()
    assert set(teacher) == set(switch["teacher_receives"])
    for name, tensor in teacher.items():
        accuracy.exact(tensor, trained[name])
    kept = {name for name in student if torch.equal(student[name], trained[name])}
    assert kept == set(switch["not_reinitialised"])


def sdae(recorded: dict[str, Tensor], **options) -> SdAE:
    method = SdAE(autoencoder(part(recorded, "model."), target="features"), **options)
    method.teacher.module.load_state_dict(part(recorded, "teacher."))
    return method


def normalised(tokens: Tensor) -> Tensor:
    variance, mean = torch.var_mean(tokens, dim=-1, keepdim=True)
    return (tokens - mean) / (variance + 1e-6).sqrt()


@pytest.mark.usefixtures("backend")
def test_sdae(golden_file):
    recorded = golden_file("sdae")
    method = sdae(recorded, folds=FOLDS, cosine_dim="token")
    imgs, masks = recorded["imgs"], masks_from_noise(recorded["noise"], KEPT)
    accuracy.exact(masks.ids_masked, recorded["ids_mask"])
    accuracy.golden(method.student.forward_encoder(imgs, masks), recorded["latent"])
    accuracy.golden(method.student.predict(imgs, masks, full=True), recorded["pred"])
    pred = method.student.predict(imgs, masks)
    accuracy.golden(pred.reshape(9, 4, 64), recorded["pred_folds"])
    target = method.teach(imgs, masks)
    accuracy.golden(target, recorded["teacher_output"])
    accuracy.golden(normalised(target), recorded["target_folds"])
    losses = method(imgs, masks)
    for loss in (losses.total, losses.terms["feature"]):
        accuracy.golden(loss.reshape(1), recorded["loss"])
    losses.total.backward()
    assert_gradients(method.student, part(golden_file("sdae_grads"), "grad."))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("loss", "folds", "cosine_dim"), [
    ("loss", FOLDS, "token"),
    ("loss_feature_axis", FOLDS, "feature"),
    ("single_fold.loss", 1, "token"),
    ("single_fold.loss_feature_axis", 1, "feature"),
    ("no_shrink.loss", 0, "feature"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sdae_variants(loss, folds, cosine_dim, dtype, golden_file):
    recorded = golden_file("sdae")
    suffix = "" if dtype == torch.float32 else "_fp64"
    if loss + suffix not in recorded:
        pytest.skip("not recorded in double")
    method = sdae(recorded, folds=folds, cosine_dim=cosine_dim).to(dtype)
    found = method(recorded["imgs"].to(dtype), masks_from_noise(recorded["noise"], KEPT)).total
    accuracy.golden(found.reshape(1), recorded[loss + suffix])


@pytest.mark.usefixtures("backend")
def test_sdae_gradient_of_the_similarity_over_features(golden_file):
    recorded = golden_file("sdae")
    method = sdae(recorded, folds=FOLDS)
    method(recorded["imgs"], masks_from_noise(recorded["noise"], KEPT)).total.backward()
    for name, expected in part(recorded, "feature_axis.gradnorm.").items():
        norm = method.student.get_parameter(name).grad.norm()
        accuracy.golden(norm.reshape(1), expected.float().reshape(1))


@pytest.mark.usefixtures("backend")
def test_sdae_teacher_after_one_update(golden_file):
    method = sdae(golden_file("sdae"), momentum=0.96)
    method.update_teacher()
    after = part(golden_file("sdae_ema"), "teacher_after.")
    keys = SCHEDULES["sdae_ema_keys"]
    assert method.teacher.module.state_dict().keys() == after.keys() == set(keys["updated"])
    assert method.teacher.pairs(method.student).keys() == set(keys["updated"])
    assert set(method.student.state_dict()) - set(keys["updated"]) == set(keys["not_used"])
    for name, tensor in method.teacher.module.state_dict().items():
        accuracy.golden(tensor, after[name])


@pytest.mark.parametrize("update", ["epoch", "step"])
@pytest.mark.parametrize("recorded", SCHEDULES["sdae_momentum"], ids=["plain", "warm-up"])
def test_sdae_momentum_is_read_at_the_epoch(recorded, update):
    student = MaskedAutoencoder(target="features", **SIZES)
    method = SdAE(
        student,
        momentum=recorded["base"],
        momentum_end=recorded["final"],
        momentum_warmup_epochs=recorded["warmup_epochs"],
        momentum_start=recorded["start_warmup_value"],
        teacher_update=update,
    )
    found = [method.teacher_momentum(Clock(step, 4, recorded["epochs"])) for step in range(40)]
    expected = [value for value in recorded["values"] for _ in range(4)]
    accuracy.golden(*(torch.tensor(v, dtype=torch.float64) for v in (found, expected)))


@pytest.mark.parametrize(("width", "side"), [(64, 4), (96, 6)])
def test_position_table(width, side, golden_file):
    recorded = golden_file("pos_embed")
    table = sincos_pos_embed(width, (side, side))
    accuracy.exact(table[0], recorded[f"sincos.d{width}.g{side}"])
    accuracy.exact(table[0, 1:], recorded[f"sincos.d{width}.g{side}.nocls"])


@pytest.mark.parametrize("kind", ["sincos", "random"])
@pytest.mark.parametrize(("width", "side", "new"), [(64, 4, 4), (64, 4, 6), (96, 6, 4)])
def test_resized_position_table(kind, width, side, new, golden_file):
    recorded = golden_file("pos_embed")
    name = f"interp.{kind}.d{width}.g{side}to{new}"
    found = resize_pos_embed(recorded[f"{name}.in"], (side, side), (new, new))
    accuracy.golden(found, recorded[f"{name}.out"])


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
