"""fastmim convert: the authors', timm's and Hugging Face's checkpoints, in and out."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fastmim import create_model
from fastmim.compat import models_dbot, models_mae, models_rc, models_sdae
from fastmim.interop import convert, load_into, load_weights
from fastmim.interop.hf import to_hf
from fastmim.interop.names import AUTOENCODER, DBOT, SDAE, Sizes, published_shapes
from fastmim.interop.optimizer import group_names
from fastmim.interop.options import recipe_options, script_options
from fastmim.interop.positions import resize_positions
from fastmim.interop.read import read
from fastmim.methods import METHODS
from fastmim.models import MODELS
from fastmim.ops import masks_from_shuffle
from fastmim.train import Engine, Pretrain, Recipe, Trainer
from fastmim.train.build import restore_run
from fastmim.train.checkpoint import CheckpointError
from fastmim.train.config import Data, Efficiency, Evaluation, Output, recipe_from_dict
from fastmim.train.optim import AdamWEMA, lr_at, param_groups
from tests import accuracy
from tests.test_golden import without_key_bias
from tests.training import write_images

CHECKPOINTS = Path(os.environ.get("FASTMIM_SHARED", "/nowhere")) / "golden" / "checkpoints"
recorded = pytest.mark.skipif(
    not CHECKPOINTS.is_dir(), reason="FASTMIM_SHARED/golden/checkpoints is not there"
)
TINY = dict(
    img_size=32,
    patch_size=8,
    embed_dim=32,
    depth=2,
    num_heads=1,
    decoder_embed_dim=32,
    decoder_depth=1,
    decoder_num_heads=1,
)
# file, layout, method, its networks, kind of the one taken, epoch, norm_pix_loss
FILES = [
    ("mae/checkpoint-0", "MAE pre-training", "mae", "student", "autoencoder", 0, True),
    ("mae/checkpoint-0-legacy-optimizer", "MAE pre-training", "mae", "student", "autoencoder", 0, True),  # noqa: E501
    ("mae/pretrain_encoder", "encoder only (MAE's", None, "student", "encoder", None, None),
    ("mae/pretrain_full", "MAE weights, encoder and", "mae", "student", "autoencoder", None, None),
    ("rc_mae/checkpoint-0", "RC-MAE pre-training", "rc_mae", "student teacher", "autoencoder", 0, True),  # noqa: E501
    ("dbot/checkpoint-8", "dBOT pre-training", "dbot", "student teacher", "dBOT student", 7, None),
    ("dbot/checkpoint-last", "dBOT pre-training", "dbot", "student teacher", "dBOT student", 9, None),  # noqa: E501
    ("dbot/checkpoint-teacher-8", "dBOT weights, encoder only", "dbot", "teacher", "encoder", None, None),  # noqa: E501
    ("dbot/checkpoint-teacher-last", "dBOT weights, encoder only", "dbot", "teacher", "encoder", None, None),  # noqa: E501
    ("sdae/checkpoint-0", "SdAE pre-training", "sdae", "student teacher", "SdAE student", 0, True),
]  # fmt: skip
TRAINING = ["mae/checkpoint-0", "rc_mae/checkpoint-0", "dbot/checkpoint-last", "sdae/checkpoint-0"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The recorded checkpoints' model has a name, as the authors' models have."""
    monkeypatch.setitem(MODELS, "golden_tiny", TINY)


def load_pth(path: Path) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def golden_pth(name: str) -> tuple[Path, dict]:
    path = CHECKPOINTS / f"{name}.pth"
    return path, load_pth(path)


def assert_equal(got: object, expected: object) -> None:
    """Bitwise; the tensors of a state_dict in the same order, options in any."""
    if isinstance(expected, argparse.Namespace):
        got, expected = vars(got), vars(expected)
    if isinstance(expected, dict):
        tensors = all(isinstance(value, torch.Tensor) for value in expected.values())
        assert list(got) == list(expected) if tensors else got.keys() == expected.keys()
        for key in expected:
            assert_equal(got[key], expected[key])
    elif isinstance(expected, torch.Tensor):
        accuracy.exact(got, expected)
    elif isinstance(expected, list):
        assert len(got) == len(expected)
        for one, other in zip(got, expected, strict=True):
            assert_equal(one, other)
    else:
        assert got == expected


def vit(**changes) -> dict[str, torch.Tensor]:
    """State of a tiny encoder, and of more, with random values in the published order."""
    sizes = dict(
        kind="encoder", embed_dim=32, depth=2, patch_size=8, in_chans=3, tokens=17, hidden=128
    )
    shapes = published_shapes(Sizes(**{**sizes, **changes}))
    return {name: torch.randn(shape) for name, shape in shapes.items()}


# --- what a file is ---


@recorded
@pytest.mark.parametrize(("name", "layout", "method", "networks", "kind", "epoch", "norm"), FILES)
def test_a_recorded_file_is_recognised(name, layout, method, networks, kind, epoch, norm):
    found = load_weights(CHECKPOINTS / f"{name}.pth")[1]
    assert found.layout.startswith(layout)
    assert (found.method, found.sizes.kind, found.epoch) == (method, kind, epoch)
    assert (found.available, found.norm_pix_loss) == (networks.split(), norm)
    assert (found.img_size, found.sizes.patch_size, found.sizes.embed_dim) == ((32, 32), 8, 32)
    assert found.sizes.depth == (0 if name.endswith("teacher-8") else 2)
    assert not found.missing
    assert not found.unexpected
    assert not found.left_out
    if found.sizes.depth:
        assert (found.model, found.num_heads) == ("golden_tiny", 1)


@recorded
@pytest.mark.parametrize(
    ("name", "key", "which"),
    [
        *((name, "model", None) for name, *_ in FILES if not name.startswith("rc_mae")),
        ("rc_mae/checkpoint-0", "teacher", None),  # which the authors fine-tune
        ("rc_mae/checkpoint-0", "student_without_ddp", "student"),
        ("sdae/checkpoint-0", "model_teacher", "teacher"),
    ],
)
def test_tensors_come_out_bitwise_and_in_order(name, key, which):
    path, file = golden_pth(name)
    assert_equal(load_weights(path, which=which)[0], dict(file[key]))


@pytest.mark.parametrize("suffix", ["", "_without_ddp"])
@pytest.mark.parametrize("roles", [["student"], ["teacher"], ["student", "teacher"]])
def test_rc_mae_is_known_by_either_spelling(tmp_path, roles, suffix):
    states = {role: create_model("golden_tiny").state_dict() for role in roles}
    torch.save({role + suffix: state for role, state in states.items()}, tmp_path / "a.pth")
    state, found = load_weights(tmp_path / "a.pth")
    assert (found.method, found.network, found.available) == ("rc_mae", roles[-1], roles)
    assert_equal(state, dict(states[roles[-1]]))
    _, written = convert(tmp_path / "a.pth", tmp_path / "b.pth", to="authors")
    assert written == [tmp_path / "b.pth"]
    file = load_pth(tmp_path / "b.pth")
    if len(roles) == 1:
        assert_equal(file, {"model": dict(states[roles[0]])})
    else:
        for role in roles:
            assert_equal(file[f"{role}_without_ddp"], dict(states[role]))


@pytest.mark.parametrize(("name", "norm_pix"), [
    ("mae_pretrain_vit_base_full.pth", True),
    ("mae_visualize_vit_base.pth", False),
    ("other.pth", None),
])  # fmt: skip
def test_the_released_names_tell_whether_targets_were_normalised(tmp_path, name, norm_pix):
    torch.save({"model": create_model("golden_tiny").state_dict()}, tmp_path / name)
    assert load_weights(tmp_path / name)[1].norm_pix_loss is norm_pix


def test_a_head_as_wide_as_pixels_and_features_is_called_ambiguous(tmp_path):
    state = create_model("golden_tiny", in_chans=2, patch_size=4, decoder_embed_dim=16).state_dict()
    torch.save({"model": state}, tmp_path / "a.pth")
    assert any("look the same" in note for note in load_weights(tmp_path / "a.pth")[1].notes)
    torch.save({"model": state, "args": argparse.Namespace(shrink_num=147)}, tmp_path / "a.pth")
    found = load_weights(tmp_path / "a.pth")[1]
    assert (found.method, found.sizes.kind, found.notes) == ("sdae", SDAE, [])


@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (16, 1)])
def test_a_fixed_table_tells_its_grid(tmp_path, grid):
    size = tuple(8 * side for side in grid)
    model = create_model("golden_tiny", img_size=size)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert load_weights(tmp_path / "a.pth")[1].img_size == size


@pytest.mark.parametrize(
    ("changes", "layout", "pool"),
    [
        ({}, "timm ViT without a head", None),
        (dict(kind="classifier", num_classes=7, pool="cls"), "timm ViT with a head", "cls"),
        (dict(kind="classifier", num_classes=7, pool="mean"), "timm ViT with a head", "mean"),
        (dict(kind="classifier", pool="mean"), "timm ViT with a head", "mean"),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_vit_of_timm_goes_in_and_out(tmp_path, changes, layout, pool, suffix):
    state = vit(**changes)
    path, out = tmp_path / f"vit{suffix}", tmp_path / "out.safetensors"
    (torch.save if suffix == ".pth" else save_file)(state, path)
    found, _ = convert(path, out, to="timm")
    assert (found.layout, found.sizes.pool) == (layout, pool)
    assert_equal(dict(sorted(load_file(out).items())), dict(sorted(state.items())))


def test_a_fine_tuned_vit_is_recognised_without_its_optimizer(tmp_path):
    state = vit(kind="classifier", num_classes=7, pool="mean")
    args = argparse.Namespace(model="vit_base_patch16")
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 3, "args": args},
               tmp_path / "a.pth")  # fmt: skip
    found = load_weights(tmp_path / "a.pth")[1]
    assert (found.layout, found.left_out, found.epoch) == ("fine-tuned ViT", ["optimizer"], 3)


# --- back to the authors ---


@recorded
@pytest.mark.parametrize("through", ["folder", "nothing"])
@pytest.mark.parametrize("name", [name for name, *_ in FILES])
def test_what_went_in_comes_back_bitwise(tmp_path, name, through):
    path, file = golden_pth(name)
    back = tmp_path / path.name
    if through == "folder":
        convert(path, tmp_path / "folder")
        path = tmp_path / "folder"
    convert(path, back, to="authors")
    got = load_pth(back)
    if "legacy" in name:  # written as today's torch does
        for entry in file["optimizer"]["state"].values():
            entry["step"] = torch.tensor(float(entry["step"]))
    assert_equal(got, file)
    if name in ("dbot/checkpoint-8", "dbot/checkpoint-last"):
        teacher = name.replace("checkpoint-", "checkpoint-teacher-")
        beside = load_pth(back.with_name(Path(teacher).name + ".pth"))
        assert_equal(beside, golden_pth(teacher)[1])


@recorded
@pytest.mark.parametrize(("name", "module", "student", "teacher"), [
    ("mae/checkpoint-0", models_mae, "model", None),
    ("rc_mae/checkpoint-0", models_rc, "student_without_ddp", "teacher"),
    ("dbot/checkpoint-last", models_dbot, "model", "checkpoint-teacher-last"),
    ("dbot/checkpoint-8", models_dbot, "model", "checkpoint-teacher-8"),
    ("sdae/checkpoint-0", models_sdae, "model", "model_teacher"),
])  # fmt: skip
def test_what_comes_back_loads_strict_in_the_authors_classes(
    tmp_path, name, module, student, teacher
):
    convert(CHECKPOINTS / f"{name}.pth", tmp_path / "weights")
    back = tmp_path / f"{Path(name).name}.pth"
    convert(tmp_path / "weights", back, to="authors")
    file, build = load_pth(back), module.MaskedAutoencoderViT
    build(**TINY).load_state_dict(file[student], strict=True)
    encoder = {key: size for key, size in TINY.items() if not key.startswith("decoder_")}
    if module is models_rc:
        build(**TINY, compute_loss=False).load_state_dict(file[teacher], strict=True)
    elif module is models_dbot:
        state = load_pth(tmp_path / f"{teacher}.pth")["model"]
        depth = 0 if teacher.endswith("8") else 2
        build(**{**encoder, "depth": depth}, decoder_depth=0).load_state_dict(state, strict=True)
    elif module is models_sdae:
        models_sdae.VisionTransformer(**encoder).load_state_dict(file[teacher], strict=True)


@recorded
def test_weights_keep_what_was_found(tmp_path):
    path, file = golden_pth("rc_mae/checkpoint-0")
    convert(path, tmp_path / "w.safetensors")
    state, found = load_weights(tmp_path / "w.safetensors")
    assert_equal(state, dict(file["teacher"]))
    assert (found.method, found.network, found.norm_pix_loss) == ("rc_mae", "teacher", True)
    convert(tmp_path / "w.safetensors", tmp_path / "w.pth", to="authors")
    assert_equal(load_pth(tmp_path / "w.pth"), {"model": dict(file["teacher"])})


# --- the optimizer ---


@pytest.mark.parametrize(("method", "kind"), [
    ("mae", AUTOENCODER), ("rc_mae", AUTOENCODER), ("dbot", DBOT), ("sdae", SDAE),
])  # fmt: skip
def test_moments_are_indexed_as_the_authors_group_parameters(method, kind):
    schedules = json.loads((Path(__file__).parent / "golden" / "schedules.json").read_text())
    groups = schedules["pretrain_param_groups"][method]["groups_in_order"]
    shapes = published_shapes(
        Sizes(kind, 64, 2, 8, 3, 17, 256, decoder_embed_dim=32, decoder_depth=1, decoder_hidden=128)
    )
    assert group_names(shapes) == [group["names"] for group in groups]


def test_a_vit_base_has_the_published_number_of_tensors():
    sizes = Sizes(AUTOENCODER, 768, 12, 16, 3, 197, 3072, 512, 8, 2048)
    shapes = published_shapes(sizes)
    assert len(shapes) == 254
    assert [len(names) for names in group_names(shapes)] == [167, 85]
    assert list(shapes) == list(create_model("mae_vit_base_patch16").state_dict())


@recorded
@pytest.mark.parametrize("name", ["checkpoint-0", "checkpoint-0-legacy-optimizer"])
def test_the_next_step_of_an_official_run_is_the_recorded_one(tmp_path, name):
    convert(CHECKPOINTS / "mae" / f"{name}.pth", tmp_path / "run")
    model = create_model("golden_tiny", norm_pix_loss=True)
    load_into(model, tmp_path / "run")
    optimizer = AdamWEMA(param_groups(model.named_parameters(), 0.05), betas=(0.9, 0.95), eps=1e-8)
    optimizer.load_state_dict(read(tmp_path / "run").checkpoint.parts["optimizer"])
    expected = load_file(CHECKPOINTS / "mae" / "expected.safetensors")
    masks = masks_from_shuffle(expected["ids_shuffle"], expected["ids_keep"].shape[1])
    loss = model(expected["imgs"], masks).loss
    accuracy.golden(loss.reshape(1), expected["loss"])
    loss.backward()
    optimizer.step(lr=1e-3)
    for key, tensor in model.state_dict().items():
        pair = (tensor, expected[f"model_next.{key}"])
        accuracy.golden_weights(*(without_key_bias(key, weights) for weights in pair))


def official_run(tmp_path, path, file, **options) -> Trainer:
    """The trainer that goes on with a file, on noise enough for two steps an epoch."""
    args = file["args"]
    batch = args.batch_size * args.accum_iter * args.world_size
    write_images(tmp_path / "photos", 2 * batch + 5, size=32)
    found, (config_file,) = convert(path, tmp_path / "run", data=str(tmp_path / "photos"))
    assert found.model == "golden_tiny"
    options = {**yaml.safe_load(config_file.read_text()), **options}
    sections = dict(data=Data, efficiency=Efficiency, eval=Evaluation, output=Output)
    options |= {name: kind(**options[name]) for name, kind in sections.items()}
    options["output"] = Output(folder=tmp_path, name="run", pictures=0, log_every=1)
    options["recipe"] = recipe_from_dict(options["recipe"])
    trainer = Trainer(Pretrain(**options))
    assert trainer.engine.steps_per_epoch == 2
    assert trainer.done == (file["epoch"] + 1) * 2
    assert trainer.config.recipe.lr == args.lr
    return trainer


def assert_same(network: torch.nn.Module, expected: dict) -> None:
    """Bitwise, in any order."""
    state = network.state_dict()
    assert state.keys() == expected.keys()
    assert_equal({name: state[name] for name in expected}, dict(expected))


OFFICIAL = {  # the file; where its student and its teacher are
    "mae/checkpoint-0": ("model", None),
    "rc_mae/checkpoint-0": ("student_without_ddp", "teacher"),
    "dbot/checkpoint-last": ("model", "dbot/checkpoint-teacher-last"),
    "dbot/checkpoint-8": ("model", "dbot/checkpoint-teacher-8"),
    "sdae/checkpoint-0": ("model", "model_teacher"),
}


@recorded
@pytest.mark.parametrize("name", OFFICIAL)
def test_pretrain_goes_on_with_an_official_run(tmp_path, name, monkeypatch):
    path, file = golden_pth(name)
    if name == "rc_mae/checkpoint-0":
        convert(path, tmp_path / "kept")  # which can be made a run later
        path = tmp_path / "kept"
    step = 2 * (file["epoch"] + 1)
    trainer = official_run(tmp_path, path, file, stop_after=step + 1)
    key, teacher = OFFICIAL[name]
    assert_same(trainer.method.student, file[key])
    if teacher is not None:
        recorded_teacher = golden_pth(teacher)[1]["model"] if "/" in teacher else file[teacher]
        assert_same(trainer.method.teacher.module, recorded_teacher)
    saved, named = file["optimizer"]["state"], trainer.engine.optimizer.state_dict()
    for index, parameter in enumerate(trainer.engine.optimizer.names):
        accuracy.exact(named[f"exp_avg.{parameter}"], saved[index]["exp_avg"])
        accuracy.exact(named[f"exp_avg_sq.{parameter}"], saved[index]["exp_avg_sq"])
        assert named["step"] == saved[index]["step"]

    lrs = []
    run_step = Engine.run_step
    monkeypatch.setattr(
        Engine, "run_step", lambda *a: lrs.append((result := run_step(*a)).lr) or result
    )
    outcome = trainer.run()
    assert outcome.steps == step + 1
    recipe = trainer.config.recipe
    begin, end = recipe.stages[recipe.stage_at(file["epoch"] + 1)]
    at = float(file["epoch"] + 1 - begin)
    epochs = end - begin
    warmup = file["args"].warmup_epochs
    assert lrs == [lr_at(at, lr=recipe.lr, min_lr=0.0, warmup_epochs=warmup, epochs=epochs)]
    assert read(tmp_path / "run").checkpoint.parts["optimizer"]["step"] == saved[0]["step"] + 1
    restore_run(tmp_path / "run")  # what knn and visualize load


@recorded
def test_options_of_official_runs_become_recipes(tmp_path):
    recipes = {}
    for name in OFFICIAL:
        path, file = golden_pth(name)
        place = tmp_path / name.replace("/", "-")
        recipes[name] = official_run(place, path, file).config.recipe
        assert (recipes[name].epochs, recipes[name].seed) == (file["args"].epochs, 0)
        assert recipes[name].warmup_epochs == file["args"].warmup_epochs
    assert recipes["rc_mae/checkpoint-0"].momentum_schedule == "official"
    dbot, sdae = recipes["dbot/checkpoint-last"], recipes["sdae/checkpoint-0"]
    assert dbot == recipes["dbot/checkpoint-8"]
    assert (dbot.stage_epochs, dbot.teacher_depth, dbot.stage_carry) == ((0, 8, 16), 0, True)
    assert (dbot.drop_path, dbot.clip_grad, sdae.drop_path) == (0.2, 3.0, 0.25)
    assert (sdae.momentum, sdae.momentum_end, sdae.momentum_warmup_epochs) == (0.96, 0.99, 0)
    assert (sdae.folds, sdae.cosine_dim, sdae.teacher_update) == (3, "token", "epoch")


@recorded
def test_a_file_from_the_end_of_a_stage_begins_the_next_one(tmp_path):
    path, file = golden_pth("dbot/checkpoint-8")
    trainer = official_run(tmp_path, path, file, stop_after=17)
    assert trainer.engine.stage == 0
    trainer.run()
    assert trainer.engine.stage == 1
    # The learning rate of a stage's first step is 0: the networks are still those of the switch.
    assert_same(
        trainer.method.teacher.module, golden_pth("dbot/checkpoint-teacher-last")[1]["model"]
    )
    student = trainer.method.student.state_dict()
    accuracy.exact(student["patch_embed.proj.bias"], file["model"]["patch_embed.proj.bias"])
    assert not torch.equal(student["cls_token"], file["model"]["cls_token"])


@recorded
def test_a_new_student_at_the_end_of_a_stage_is_of_the_next_one(tmp_path):
    file = golden_pth("dbot/checkpoint-8")[1]
    bias = file["model"]["patch_embed.proj.bias"]
    file["model"] = dict(create_model("golden_tiny", target="tokens").state_dict())
    file["model"]["patch_embed.proj.bias"] = bias
    torch.save(file, tmp_path / "checkpoint-last.pth")
    teacher = golden_pth("dbot/checkpoint-teacher-last")[1]
    torch.save(teacher, tmp_path / "checkpoint-teacher-last.pth")
    trainer = official_run(tmp_path, tmp_path / "checkpoint-last.pth", file)
    assert trainer.engine.stage == 1
    assert_same(trainer.method.teacher.module, teacher["model"])


@recorded
@pytest.mark.parametrize(("name", "change", "message"), [
    ("dbot/checkpoint-last", {}, "without its teacher; expected checkpoint-teacher-X.pth beside"),
    ("dbot/checkpoint-last", dict(tlayernorm=1), "has tlayernorm 1; fastmim can go on with 0 only"),
    ("dbot/checkpoint-last", dict(norm_feature_loss=False), "norm_feature_loss False; fastmim can"),
    ("dbot/checkpoint-last", dict(depth=[12, 2]), "teachers of [12] blocks for a student of 2"),
    ("dbot/checkpoint-last", dict(depth=2), "got [0, 8, 16] and 2"),
    ("dbot/checkpoint-last", dict(stage_epochs=[0, 16, 8]), "epochs that increase from 0 to"),
    ("dbot/checkpoint-last", dict(sdpr=None), "in the file's args: sdpr"),
    ("sdae/checkpoint-0", dict(ema_op="per_run"), "has ema_op 'per_run'"),
    ("sdae/checkpoint-0", dict(ema_frequent=2), "After which of several its script moves it"),
    ("sdae/checkpoint-0", dict(ema_op="per_ite", accum_iter=2), "and accum_iter 2"),
    ("sdae/checkpoint-0", dict(shrink_num=9), "has shrink_num 9 of 12 masked patches"),
    ("sdae/checkpoint-0", dict(momentum_teacher=None), "in the file's args: momentum_teacher"),
    ("mae/pretrain_full", {}, "holds no optimizer state and epoch"),
    ("mae/checkpoint-0", dict(batch_size="4", lr=None), "in the file's args: batch_size, lr"),
    ("mae/checkpoint-0", dict(norm_pix_loss="yes"), "in the file's args: norm_pix_loss"),
    ("mae/checkpoint-0", dict(world_size=1000), "1797 images, fewer than the run's batch of 4000"),
    ("mae/checkpoint-0", {}, "have 1 channels, the network takes 3"),
    ("mae/checkpoint-0", dict(epochs=0), "recipe.epochs: expected at least 1"),
])  # fmt: skip
def test_a_run_that_cannot_go_on_is_refused(tmp_path, name, change, message):
    file = golden_pth(name)[1]
    vars(file.get("args", argparse.Namespace())).update(change)
    torch.save(file, tmp_path / "a.pth")
    with pytest.raises((CheckpointError, ValueError)) as error:
        convert(tmp_path / "a.pth", tmp_path / "run", data="digits")
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("method", "options"), [
    ("mae", dict(norm_pix=False)),
    ("rc_mae", dict(gamma=0.5, momentum=0.9, momentum_schedule="official")),
    ("dbot", dict(epochs=6, stage_epochs=(0, 3, 6), teacher_depth=0, drop_path=0.1, clip_grad=3.0)),
    ("sdae", dict(cosine_dim="token", momentum=0.9, momentum_end=0.95, momentum_start=0.5,
                  momentum_warmup_epochs=1, teacher_update="step", drop_path=0.25)),
    ("sdae", dict(folds=0)),
])  # fmt: skip
def test_a_recipe_and_the_options_of_its_script_agree(tmp_path, method, options):
    network = create_model("golden_tiny", **METHODS[method].student_options(0.0))
    torch.save({"model": network.state_dict()}, tmp_path / "a.pth")
    _, found = load_weights(tmp_path / "a.pth")
    recipe = Recipe(**dict(model="golden_tiny", batch_size=8, epochs=3, warmup_epochs=1) | options)
    back = recipe_options(method, script_options(recipe, method, found), found)
    assert Recipe(model="golden_tiny", **back) == recipe


@pytest.mark.parametrize(("depths", "teacher", "first"), [
    (None, None, 2), ((1, 2), None, 1), ((1, 2), 0, 0),
])  # fmt: skip
def test_the_first_teacher_is_as_deep_as_the_first_student(tmp_path, depths, teacher, first):
    torch.save(create_model("golden_tiny", target="tokens").state_dict(), tmp_path / "a.pth")
    recipe = Recipe(model="golden_tiny", batch_size=8, epochs=4, warmup_epochs=1,
                    stage_epochs=(0, 2, 4), stage_depths=depths, teacher_depth=teacher)  # fmt: skip
    options = script_options(recipe, "dbot", load_weights(tmp_path / "a.pth")[1])
    assert options["init_teacher_encoder_depth"] == first
    assert options["depth"] == list(depths or (2, 2))


def test_a_run_of_fastmim_goes_to_the_authors_and_on(tmp_path):
    write_images(tmp_path / "photos", 16, size=32)
    recipe = recipe_from_dict(
        dict(model="golden_tiny", batch_size=8, epochs=3, warmup_epochs=1, base_lr=1e-2)
    )
    config = Pretrain(
        "mae",
        data=Data(str(tmp_path / "photos")),
        recipe=recipe,
        eval=Evaluation(knn_at_end=False),
        output=Output(folder=tmp_path, name="run", pictures=0),
        stop_after=4,
    )
    trainer = Trainer(config)
    trainer.run()
    convert(tmp_path / "run", tmp_path / "checkpoint-1.pth", to="authors")
    file = load_pth(tmp_path / "checkpoint-1.pth")
    assert_equal(file["model"], trainer.method.student.state_dict())
    assert (list(file), file["epoch"]) == (["model", "optimizer", "epoch", "args"], 1)
    again, written = convert(
        tmp_path / "checkpoint-1.pth", tmp_path / "again", data=str(tmp_path / "photos")
    )
    config = yaml.safe_load(written[0].read_text())
    assert recipe_from_dict({**config["recipe"], "img_size": None}) == recipe
    assert (again.model, again.norm_pix_loss) == ("golden_tiny", True)
    # As the authors' scripts resume: the same groups in torch's AdamW.
    model = models_mae.MaskedAutoencoderViT(**TINY)
    model.load_state_dict(file["model"])
    groups = [
        {k: v for k, v in g.items() if k != "names"}
        for g in param_groups(model.named_parameters(), 0.05)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95))
    optimizer.load_state_dict(file["optimizer"])
    by_name = dict(model.named_parameters())
    for name, moments in trainer.engine.optimizer.state_dict().items():
        if name.startswith("exp_avg_sq."):
            state = optimizer.state[by_name[name.removeprefix("exp_avg_sq.")]]
            accuracy.exact(state["exp_avg_sq"], moments)
            assert state["step"] == 4


@pytest.mark.parametrize(("method", "options"), [
    ("rc_mae", dict(momentum_schedule="official")),
    ("dbot", dict(stage_epochs=(0, 1, 3), drop_path=0.1, teacher_depth=0)),
    ("sdae", dict(cosine_dim="token", momentum=0.9, drop_path=0.1)),
])  # fmt: skip
def test_teachers_go_to_the_authors_and_on(tmp_path, method, options):
    write_images(tmp_path / "photos", 16, size=32)
    data = str(tmp_path / "photos")
    recipe = Recipe(
        **dict(model="golden_tiny", img_size=32, batch_size=8, epochs=3, warmup_epochs=1) | options
    )
    config = Pretrain(
        method,
        data=Data(data),
        recipe=recipe,
        eval=Evaluation(knn_at_end=False),
        output=Output(folder=tmp_path, name="run", pictures=0),
        stop_after=4,
    )
    trainer = Trainer(config)
    trainer.run()
    convert(tmp_path / "run", tmp_path / "checkpoint-1.pth", to="authors")
    _, (written,) = convert(tmp_path / "checkpoint-1.pth", tmp_path / "again", data=data)
    back = recipe_from_dict(yaml.safe_load(written.read_text())["recipe"])
    assert replace(back, img_size=32) == recipe
    ours, theirs = (read(tmp_path / name).checkpoint for name in ("run", "again"))
    assert (ours.step, ours.state["stage"]) == (theirs.step, theirs.state["stage"])
    for part, tensors in ours.parts.items():
        assert tensors.keys() == theirs.parts[part].keys()
        assert_equal(dict(theirs.parts[part]), {n: tensors[n] for n in theirs.parts[part]})


@recorded
@pytest.mark.parametrize(("change", "message"), [
    (lambda o: o["param_groups"][0]["params"].pop(), "groups of 30 and 17 parameters, expected 31"),
    (lambda o: o["state"].pop(3), "two moments for each parameter; KeyError: 3"),
    (lambda o: o["state"][0].pop("exp_avg"), "KeyError: 'exp_avg'"),
    (lambda o: o["state"][0].update(exp_avg=torch.zeros(5)), "exp_avg of parameter 0 is (5,)"),
    (lambda o: o["state"][0].update(step=9), "expected one step count, got [2, 9]"),
    (lambda o: o.pop("state"), "KeyError: 'state'"),
])  # fmt: skip
def test_an_optimizer_that_does_not_fit_is_refused(tmp_path, change, message):
    file = golden_pth("mae/checkpoint-0")[1]
    change(file["optimizer"])
    torch.save(file, tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as error:
        convert(tmp_path / "a.pth", tmp_path / "run")
    assert message in str(error.value)
    convert(tmp_path / "a.pth", tmp_path / "a.safetensors")  # the weights are still whole


# --- Hugging Face ---


def transformers_5(state: dict) -> dict:
    """Names in memory since version 5; ViTMAE's decoder as that saves it."""
    words = {
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        "vit.encoder.layer": "vit.layers",
        "decoder.decoder_layers": "decoder.decoder_encoder.layer",
    }
    renamed = {}
    for name, tensor in state.items():
        for old, new in words.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("rename", [dict, transformers_5])
def test_hugging_face_goes_out_and_in(tmp_path, rename):
    state = create_model("golden_tiny").state_dict()
    torch.save({"model": state}, tmp_path / "mae_visualize_vit_tiny.pth")
    convert(tmp_path / "mae_visualize_vit_tiny.pth", tmp_path / "hf", to="hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["ViTMAEForPreTraining"]
    assert (config["image_size"], config["num_attention_heads"]) == (32, 1)
    assert (config["norm_pix_loss"], config["layer_norm_eps"]) == (False, 1e-6)
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    query = weights["vit.encoder.layer.1.attention.attention.query.weight"]
    accuracy.exact(query, state["blocks.1.attn.qkv.weight"][:32])
    save_file(rename(weights), tmp_path / "hf" / "model.safetensors")
    back, found = load_weights(tmp_path / "hf")
    assert_equal(back, dict(state))
    assert (found.layout, found.method, found.num_heads) == ("Hugging Face ViTMAE", "mae", 1)


def test_a_bare_vit_of_hugging_face_loses_its_pooler_only_when_told(tmp_path):
    state = vit()
    theirs = {name.removeprefix("vit."): tensor for name, tensor in to_hf(state).items()}
    theirs |= {"pooler.dense.weight": torch.zeros(32, 32), "pooler.dense.bias": torch.zeros(32)}
    (tmp_path / "hf").mkdir()
    save_file(theirs, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text('{"layer_norm_eps": 1e-12}')
    with pytest.raises(CheckpointError, match=r"2 unexpected: vit\.pooler\.dense\."):
        load_weights(tmp_path / "hf")
    got, found = load_weights(tmp_path / "hf", partial=True)
    assert_equal(got, state)
    assert len(found.unexpected) == 2
    assert any("layer_norm_eps 1e-12" in note for note in found.notes)


def test_a_query_without_its_key_is_listed(tmp_path):
    theirs = to_hf(vit())
    del theirs["vit.encoder.layer.0.attention.attention.key.weight"]
    torch.save(theirs, tmp_path / "hf.bin")
    with pytest.raises(CheckpointError) as error:
        load_weights(tmp_path / "hf.bin")
    assert "1 missing: blocks.0.attn.qkv.weight; 2 unexpected: vit.encoder" in str(error.value)


# --- position tables ---


@pytest.mark.parametrize("case", ["random.d64.g4to4", "random.d64.g4to6", "random.d96.g6to4",
                                  "sincos.d64.g4to6", "sincos.d96.g6to4"])  # fmt: skip
def test_tables_are_resampled_as_recorded(golden_file, case):
    tables = golden_file("pos_embed")
    old, new = (int(side) for side in case.rpartition("g")[2].split("to"))
    got = resize_positions(tables[f"interp.{case}.in"], (old, old), (new, new))
    accuracy.golden(got, tables[f"interp.{case}.out"])


@pytest.mark.parametrize("size", [48, (32, 64)])
def test_tables_for_another_size(tmp_path, size):
    model = create_model("golden_tiny")
    torch.save(model.state_dict(), tmp_path / "a.pth")
    larger = create_model("golden_tiny", img_size=size)
    load_into(larger, tmp_path / "a.pth", img_size=size)
    want = resize_positions(model.pos_embed, (4, 4), larger.grid_size)
    accuracy.exact(larger.pos_embed, want)
    state, found = load_weights(tmp_path / "a.pth", img_size=size, sincos=True)
    fixed = create_model("golden_tiny", img_size=size)
    accuracy.exact(state["pos_embed"], fixed.pos_embed)
    accuracy.exact(state["decoder_pos_embed"], fixed.decoder_pos_embed)
    assert found.img_size == larger.patch_embed.img_size


def test_learnt_tables_are_not_thrown_away(tmp_path):
    torch.save(vit(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="pos_embed is learnt"):
        load_weights(tmp_path / "a.pth", img_size=48, sincos=True)
    with pytest.raises(ValueError, match="multiple of the patch size 8, got 50 x 50"):
        load_weights(tmp_path / "a.pth", img_size=50)
    torch.save(vit(tokens=16), tmp_path / "b.pth")
    with pytest.raises(ValueError, match="nothing says of which grid"):
        load_weights(tmp_path / "b.pth", img_size=48)


# --- into a model ---


def test_an_encoder_is_loaded_into_an_autoencoder_only_when_told(tmp_path):
    torch.save({"model": vit()}, tmp_path / "a.pth")
    model = create_model("golden_tiny")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="20 missing: mask_token, decoder_pos_embed"):
        load_into(model, tmp_path / "a.pth")
    assert_equal(dict(model.state_dict()), before)
    found = load_into(model, tmp_path / "a.pth", partial=True)
    assert len(found.missing) == 20
    for name, tensor in load_weights(tmp_path / "a.pth")[0].items():
        accuracy.exact(model.state_dict()[name], tensor)


def test_encoder_only(tmp_path):
    torch.save(create_model("golden_tiny").state_dict(), tmp_path / "a.pth")
    state, found = load_weights(tmp_path / "a.pth", encoder_only=True)
    assert list(state) == list(vit())
    assert found.parameters == sum(tensor.numel() for tensor in state.values())
    torch.save(vit(kind="classifier", num_classes=7, pool="mean"), tmp_path / "b.pth")
    with pytest.raises(ValueError, match="no encoder norm"):
        load_weights(tmp_path / "b.pth", encoder_only=True)
