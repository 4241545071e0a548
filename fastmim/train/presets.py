"""Named recipes, each with its source."""

import os
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Preset:
    """A recipe to start from.

    Args:
        source: Where the numbers come from.
        method: Method it was made for.
        recipe: Fields of :class:`fastmim.train.config.Recipe`.
        efficiency: Fields of :class:`fastmim.train.config.Efficiency`.
        eval: Fields of :class:`fastmim.train.config.Evaluation`.
    """

    source: str
    method: str
    recipe: dict
    efficiency: dict = field(default_factory=dict)
    eval: dict = field(default_factory=dict)


_MAE = dict(
    batch_size=4096,
    epochs=800,
    warmup_epochs=40,
    base_lr=1.5e-4,
    weight_decay=0.05,
    norm_pix=True,
    mask_ratio=0.75,
)
_MAE_SOURCE = "MAE's released pre-training recipe (arXiv:2111.06377, table 8): 64 GPUs x 64 images"
_RC_MAE = {**_MAE, "epochs": 1600, "gamma": 1.0, "momentum": 0.996}
_RC_SOURCE = "RC-MAE's released pre-training scripts (arXiv:2210.02077), momentum to 1 over the run"
_DBOT_SOURCE = "dBOT's released pre-training scripts (arXiv:2209.03917): 32 GPUs x 128 images"
_SDAE = dict(
    model="sdae_vit_base_patch16",
    batch_size=768,
    base_lr=2.666e-4,
    weight_decay=0.04,
    mask_ratio=0.75,
    folds=3,
    cosine_dim="feature",
    teacher_update="epoch",
    teacher_every=1,
    teacher_init="own",
    momentum_warmup_epochs=0,
)
_SDAE_SOURCE = "SdAE's {} (arXiv:2208.00449): 8 GPUs x 96; its code has recipe.cosine_dim token"
_LARGE_BATCH = dict(micro_batch=256, workers=min(8, os.cpu_count() or 1))
_PHOTOS = dict(crop_ratio=0.875)


def _mae(size: str, epochs: int) -> Preset:
    note = "" if epochs == 800 else "; the length of the paper's checkpoints"
    recipe = {**_MAE, "model": f"mae_vit_{size}", "epochs": epochs}
    return Preset(_MAE_SOURCE + note, "mae", recipe, efficiency=_LARGE_BATCH, eval=_PHOTOS)


def _rc_mae(size: str, **changes) -> Preset:
    recipe = {**_RC_MAE, "model": f"rc_vit_{size}", **changes}
    return Preset(_RC_SOURCE, "rc_mae", recipe, efficiency=_LARGE_BATCH, eval=_PHOTOS)


def _dbot(size: str, stages: int, drop_path: float, **changes) -> Preset:
    note = "" if stages == 2 else "; a third stage, as for detection and segmentation in the paper"
    bounds = tuple(range(0, 800 * stages + 1, 800))
    recipe = {
        **{name: value for name, value in _MAE.items() if name != "norm_pix"},
        "model": f"dbot_vit_{size}",
        "epochs": bounds[-1],
        "stage_epochs": bounds,
        "drop_path": drop_path,
        **changes,
    }
    return Preset(_DBOT_SOURCE + note, "dbot", recipe, efficiency=_LARGE_BATCH, eval=_PHOTOS)


def _sdae(source: str, **changes) -> Preset:
    recipe = {**_SDAE, **changes}
    return Preset(
        _SDAE_SOURCE.format(source),
        "sdae",
        recipe,
        efficiency={**_LARGE_BATCH, "micro_batch": 96},
        eval=_PHOTOS,
    )


_DBOT_SIZES = {  # L and H start from a teacher without blocks; only the script of B clips
    "base": ("base_patch16", 0.2, dict(clip_grad=3.0)),
    "large": ("large_patch16", 0.2, dict(teacher_depth=0)),
    "huge": ("huge_patch14", 0.3, dict(teacher_depth=0)),
}


PRESETS: dict[str, Preset] = {
    "digits": Preset(
        "ours: the embedded data set in about a minute on two CPU cores",
        "rc_mae",
        dict(
            model="rc_vit_micro_patch4",
            batch_size=32,
            epochs=20,
            warmup_epochs=2,
            base_lr=8e-3,
            crop_scale=(0.8, 1.0),
            hflip=0.0,
            momentum=0.95,
        ),
    ),
    "small32": Preset(
        "ours: 32-pixel photographs such as CIFAR-10 in minutes on two CPU cores",
        "rc_mae",
        dict(
            model="rc_vit_micro_patch4",
            batch_size=64,
            epochs=6,
            warmup_epochs=1,
            base_lr=4e-3,
            crop_scale=(0.4, 1.0),
            momentum=0.98,
        ),
    ),
    "tiny224": Preset(
        "ours: ViT-Ti/16 at 224 pixels, for folders of a few thousand photographs",
        "rc_mae",
        dict(
            model="rc_vit_tiny_patch16",
            batch_size=64,
            epochs=100,
            warmup_epochs=10,
            base_lr=1e-3,
        ),
        efficiency=dict(workers=2),
        eval=_PHOTOS,
    ),
    "mae_base_800": _mae("base_patch16", 800),
    "mae_base_1600": _mae("base_patch16", 1600),
    "mae_large_800": _mae("large_patch16", 800),
    "mae_large_1600": _mae("large_patch16", 1600),
    "mae_huge_800": _mae("huge_patch14", 800),
    "mae_huge_1600": _mae("huge_patch14", 1600),
    "mae_script_defaults": Preset(
        "the defaults of MAE's released pre-training script, which no published run used",
        "mae",
        {
            **_MAE,
            "model": "mae_vit_large_patch16",
            "batch_size": 64,
            "epochs": 400,
            "base_lr": 1e-3,
            "norm_pix": False,
        },
        eval=_PHOTOS,
    ),
    "rc_mae_small_1600": _rc_mae("small_patch16"),
    "rc_mae_base_800": _rc_mae("base_patch16", epochs=800),
    "rc_mae_base_1600": _rc_mae("base_patch16"),
    "rc_mae_large_1600": _rc_mae("large_patch16"),
    **{
        f"dbot_{name}_{800 * stages}": _dbot(size, stages, drop_path, **changes)
        for name, (size, drop_path, changes) in _DBOT_SIZES.items()
        for stages in (2, 3)
    },
    "sdae_base_300": _sdae(
        "released recipe",
        epochs=300,
        warmup_epochs=60,
        drop_path=0.25,
        momentum=0.96,
        momentum_end=0.99,
    ),
    "sdae_base_100": _sdae(
        "recipe of its author for 100 epochs",
        epochs=100,
        warmup_epochs=20,
        drop_path=0.15,
        momentum=0.9,
        momentum_end=0.95,
    ),
}
