"""Options: what is refused, and that they survive JSON and YAML."""

import dataclasses
import json
import math

import pytest
import yaml

from fastmim.methods import METHODS
from fastmim.models import MODELS
from fastmim.train import PRESETS, Data, Efficiency, Evaluation, Output, Pretrain, Recipe
from fastmim.train.config import recipe_from_dict, to_dict

REFUSED = [
    (Recipe, "recipe.", {
        "mask_ratio": [0.0, 1.0, 1.5, -0.1, math.nan],
        "epochs": [0],
        "warmup_epochs": [-1, 801, math.nan],
        "batch_size": [0],
        "base_lr": [0.0, -1.0, math.nan, math.inf],
        "min_lr": [-1.0, 1.0],
        "weight_decay": [-0.1, math.inf],
        "betas": [(0.9, 1.0), (-0.1, 0.9)],
        "adam_eps": [0.0],
        "clip_grad": [0.0, math.nan],
        "drop_path": [-0.1, 1.0, math.nan],
        "momentum_end": [-0.1, 1.1, math.nan],
        "folds": [-1],
        "cosine_dim": ["patch"],
        "teacher_update": ["never"],
        "teacher_every": [0],
        "momentum_warmup_epochs": [-1, 800],
        "momentum_start": [-0.1, 1.1],
        "teacher_init": ["random"],
        "stage_epochs": [(0,), (0, 400), (0, 400, 400, 800), (0, 500, 400, 800), (1, 800)],
        "stage_depths": [(), (0,), (12, 12)],
        "teacher_depth": [-1],
        "teachers": [("own", "own"), ("",)],
        "gamma": [-1.0],
        "momentum": [-0.1, 1.1, math.nan],
        "momentum_schedule": ["offical"],
        "seed": [-1, 2**63],
    }),
    (Efficiency, "efficiency.", {
        "micro_batch": [0], "workers": [-1], "threads": [0], "precision": ["fp16"],
        "teacher_precision": ["fp16"], "memory": ["small"], "residual": ["fp16"],
        "parallel": ["fsdp"], "timeout_minutes": [0.0, math.inf],
    }),
    (Data, "data.", {"max_bad_fraction": [-0.1, 1.1, math.nan]}),
    (Evaluation, "eval.", {
        "knn_every": [-1], "limit": [-1], "k": [0], "temperature": [0.0], "crop_ratio": [0.0, 1.1],
        "pool": ["max"],
    }),
    (Output, "output.", {
        "log_every": [0],
        "checkpoint_every": [-1],
        "checkpoint_minutes": [-1.0],
        "keep": [0],
        "pictures": [-1],
    }),
    (Pretrain, "", {"max_bad_steps": [0], "stop_after": [0], "resume": ["always"]}),
]  # fmt: skip


@pytest.mark.parametrize(("group", "option", "name", "value"), [
    (group, option, prefix + option, value)
    for group, prefix, options in REFUSED
    for option, values in options.items()
    for value in values
])  # fmt: skip
def test_value_out_of_range_is_refused_by_name(group, option, name, value):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        group(**{option: value})


def test_every_number_has_a_rule():
    """Of the options that are not names, only these take any value."""
    free = {"norm_pix", "img_size", "crop_scale", "crop_aspect", "hflip", "knn_at_end"}
    free |= {"stage_carry", "projection", "teacher_once", "compile"}
    words = {"str", "str | None", "Path"}
    for group, _, options in REFUSED:
        for field in dataclasses.fields(group):
            hint = field.type if isinstance(field.type, str) else str(field.type)
            named = hint in words or "str" in hint or "Path" in hint
            nested = dataclasses.is_dataclass(field.type)
            assert field.name in options or field.name in free or named or nested, field.name


def test_warm_up_longer_than_the_run_names_both():
    with pytest.raises(ValueError, match=r"recipe.warmup_epochs: expected between 0 and "
                                         r"recipe.epochs, which is 3, got 4"):  # fmt: skip
        Recipe(epochs=3, warmup_epochs=4)


def test_recipe_survives_json():
    recipe = Recipe(img_size=(32, 48), clip_grad=1.0, crop_scale=(0.3, 0.9), base_lr=1 / 3)
    assert recipe_from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_options_become_plain_values():
    assert yaml.safe_load(yaml.safe_dump(to_dict(Pretrain()))) == to_dict(Pretrain())


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_a_recipe_with_a_source(name):
    preset = PRESETS[name]
    assert preset.source
    assert preset.method in METHODS
    recipe = Recipe(**preset.recipe)
    assert recipe.model in MODELS
    Efficiency(**preset.efficiency)
    Evaluation(**preset.eval)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(("size", "drop_path", "teacher_depth", "clip_grad"), [
    ("base", 0.2, None, 3.0), ("large", 0.2, 0, None), ("huge", 0.3, 0, None),
])  # fmt: skip
def test_dbot_recipe_has_the_published_numbers(stages, size, drop_path, teacher_depth, clip_grad):
    """methods.md 2.3."""
    preset = PRESETS[f"dbot_{size}_{800 * stages}"]
    recipe = Recipe(**preset.recipe)
    assert recipe.lr == pytest.approx(2.4e-3)
    assert (recipe.warmup_epochs, recipe.weight_decay, recipe.mask_ratio) == (40, 0.05, 0.75)
    assert [end - begin for begin, end in recipe.stages] == [800] * stages
    assert (recipe.drop_path, recipe.clip_grad) == (drop_path, clip_grad)
    assert (recipe.teacher_depth, recipe.stage_carry) == (teacher_depth, True)
    assert recipe.model.startswith(f"dbot_vit_{size}")


@pytest.mark.parametrize(("epochs", "warmup", "momenta", "drop_path"), [
    (300, 60, (0.96, 0.99), 0.25), (100, 20, (0.9, 0.95), 0.15),
])  # fmt: skip
def test_sdae_recipe_has_the_published_numbers(epochs, warmup, momenta, drop_path):
    """methods.md 2.4."""
    recipe = Recipe(**PRESETS[f"sdae_base_{epochs}"].recipe)
    assert (recipe.epochs, recipe.warmup_epochs, recipe.batch_size) == (epochs, warmup, 768)
    assert recipe.lr == pytest.approx(8.0e-4, rel=1e-3)
    assert (recipe.momentum, recipe.momentum_end) == momenta
    assert (recipe.weight_decay, recipe.drop_path, recipe.folds) == (0.04, drop_path, 3)
    assert (recipe.betas, recipe.clip_grad, recipe.min_lr) == ((0.9, 0.95), None, 0.0)
    assert (recipe.teacher_update, recipe.teacher_init) == ("epoch", "own")


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith(("mae_", "rc_mae_"))])
def test_released_recipe_has_the_published_numbers(name):
    """methods.md 2.1 and 2.2: effective batch 4096, base lr 1.5e-4, warm-up 40, decay 0.05."""
    recipe = Recipe(**PRESETS[name].recipe)
    defaults = name == "mae_script_defaults"
    assert recipe.lr == pytest.approx(2.5e-4 if defaults else 2.4e-3)
    assert (recipe.warmup_epochs, recipe.weight_decay, recipe.mask_ratio) == (40, 0.05, 0.75)
    assert (recipe.betas, recipe.min_lr, recipe.clip_grad) == ((0.9, 0.95), 0.0, None)
    assert (recipe.crop_scale, recipe.hflip) == ((0.2, 1.0), 0.5)
    assert recipe.norm_pix is not defaults
    assert recipe.epochs == (400 if defaults else int(name.rpartition("_")[2]))
    if PRESETS[name].method == "rc_mae":
        assert (recipe.gamma, recipe.momentum) == (1.0, 0.996)
