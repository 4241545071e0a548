"""Options of the authors' scripts as a recipe, and back."""

from collections.abc import Callable, Mapping
from typing import Any

from fastmim.interop.describe import Description
from fastmim.models import MODELS
from fastmim.ops import num_keep
from fastmim.train.checkpoint import CheckpointError
from fastmim.train.config import Recipe

Options = dict[str, Any]

# Of every script: options that a recipe takes over as they are, and those that must be there.
_SAME = (
    "mask_ratio",
    "epochs",
    "warmup_epochs",
    "min_lr",
    "weight_decay",
    "seed",
    "clip_grad",
)
_NEEDED = (
    "batch_size",
    "accum_iter",
    "world_size",
    "mask_ratio",
    "epochs",
    "warmup_epochs",
    "lr",
)
# What no recipe says, and the one value for which it need not.
_ONLY = {
    "dbot": {"tlayernorm": 0, "tdpr": 0.0, "norm_feature_loss": True},
    "sdae": {"drop": 0.0, "attn_drop_rate": 0.0},
}
_UPDATES = {"per_epoch": "epoch", "per_ite": "step"}


def recipe_options(method: str, args: Mapping[str, Any], found: Description) -> Options:
    """Fields of :class:`Recipe` that the options of an official run stand for.

    Args:
        method: mae, rc_mae, dbot or sdae.
        args: Of the authors' script.
        found: The student.

    Raises:
        CheckpointError: If an option is missing, or has a value that no recipe stands for.
    """
    args = {"accum_iter": 1, "world_size": 1, **args}
    _numbers(args, _NEEDED)
    for name, value in _ONLY.get(method, {}).items():
        if args.get(name, value) != value:
            raise CheckpointError(
                f"convert: the run has {name} {args[name]!r}; fastmim can go on with {value!r} only"
            )
    batch = args["batch_size"] * args["accum_iter"] * args["world_size"]
    base_lr = args.get("blr")
    if base_lr is None or base_lr * batch / 256 != args["lr"]:
        base_lr = args["lr"] * 256 / batch
    options = {name: args[name] for name in _SAME if args.get(name) is not None}
    return {**options, "batch_size": batch, "base_lr": base_lr, **_READERS[method](args, found)}


def _numbers(args: Mapping[str, Any], names: tuple[str, ...]) -> None:
    wrong = [name for name in names if type(args.get(name)) not in (int, float, bool)]
    if wrong:
        raise CheckpointError(f"convert: expected numbers in the file's args: {', '.join(wrong)}")


def _mae(args: Mapping[str, Any], found: Description) -> Options:
    _numbers(args, ("norm_pix_loss",))
    return {"norm_pix": args["norm_pix_loss"]}


def _rc_mae(args: Mapping[str, Any], found: Description) -> Options:
    return {
        **_mae(args, found),
        "momentum_schedule": "official",
        "momentum": args.get("momentum_teacher", 0.996),
        "gamma": args.get("gamma", 1.0),
    }


def _dbot(args: Mapping[str, Any], found: Description) -> Options:
    _numbers(args, ("sdpr", "init_teacher_encoder_depth"))
    bounds, depths = (args.get(name) for name in ("stage_epochs", "depth"))
    if not all(_are_ints(values) for values in (bounds, depths)) or len(depths) < len(bounds) - 1:
        raise CheckpointError(
            "convert: expected in the file's args stage_epochs, a list of epochs, and depth, one "
            f"number for each stage, got {bounds} and {depths}"
        )
    # The last one is not used; the others are the depths of the teachers to come.
    if any(depth != found.sizes.depth for depth in depths[: len(bounds) - 2]):
        raise CheckpointError(
            f"convert: teachers of {depths[: len(bounds) - 2]} blocks for a student of "
            f"{found.sizes.depth}; fastmim's teacher is the whole student of the stage before"
        )
    return {
        "stage_epochs": tuple(bounds),
        "stage_carry": True,
        "teacher_depth": args["init_teacher_encoder_depth"],
        "drop_path": args["sdpr"],
    }


def _are_ints(values: object) -> bool:
    return isinstance(values, list | tuple) and all(type(value) is int for value in values)


def _sdae(args: Mapping[str, Any], found: Description) -> Options:
    _numbers(args, ("drop_path", "momentum_teacher", "momentum_teacher_final", "mask_ratio"))
    update, every = _UPDATES.get(args.get("ema_op")), args.get("ema_frequent", 1)
    if update is None or every != 1 or (update == "step" and args["accum_iter"] != 1):
        raise CheckpointError(
            f"convert: the run has ema_op {args.get('ema_op')!r}, ema_frequent {every!r} and "
            f"accum_iter {args['accum_iter']!r}; known is the teacher that moves after every "
            "epoch, or after every iteration without accumulation. After which of several its "
            "script moves it is not known"
        )
    return {
        "drop_path": args["drop_path"],
        "momentum": args["momentum_teacher"],
        "momentum_end": args["momentum_teacher_final"],
        "momentum_start": args.get("momentum_teacher_warmup", 0.0),
        "momentum_warmup_epochs": args.get("momentum_teacher_warmup_ep", 0),
        "teacher_update": update,
        **_folds(args, _masked(found, args["mask_ratio"])),
    }


def _folds(args: Mapping[str, Any], masked: int) -> Options:
    """Without shrink_num the teacher sees the whole image, and tokens are compared."""
    shrink, folds = args.get("shrink_num"), args.get("ncrop_loss")
    if shrink is None:
        return {"folds": 0, "cosine_dim": "feature"}
    if shrink != masked:
        raise CheckpointError(
            f"convert: the run has shrink_num {shrink!r} of {masked} masked patches; fastmim's "
            "teacher sees all of them"
        )
    return {"folds": 1 if folds is None else folds, "cosine_dim": "token"}


def _masked(found: Description, mask_ratio: float) -> int:
    patches = found.sizes.tokens - 1
    return patches - num_keep(patches, mask_ratio)


_READERS: dict[str, Callable[[Mapping[str, Any], Description], Options]] = {
    "mae": _mae,
    "rc_mae": _rc_mae,
    "dbot": _dbot,
    "sdae": _sdae,
}


def script_options(recipe: Recipe, method: str | None, found: Description) -> Options:
    """The options of the authors' script that a recipe stands for.

    :func:`recipe_options` of them gives the recipe back, as far as the script knows its options.

    Args:
        recipe: Of the run.
        method: Whose script it is.
        found: The student.
    """
    options = {name: getattr(recipe, name) for name in _SAME}
    options |= dict(
        model=recipe.model,
        batch_size=recipe.batch_size,
        accum_iter=1,
        world_size=1,
        blr=recipe.base_lr,
        lr=recipe.lr,
    )
    if method in ("mae", "rc_mae"):
        options["norm_pix_loss"] = recipe.norm_pix
    if method == "rc_mae":
        options |= dict(gamma=recipe.gamma, momentum_teacher=recipe.momentum)
    if method == "dbot":
        depth = MODELS[recipe.model]["depth"] if recipe.model in MODELS else found.sizes.depth
        depths = recipe.stage_depths or [depth] * len(recipe.stages)
        first = depths[0] if recipe.teacher_depth is None else recipe.teacher_depth
        options |= dict(
            stage_epochs=list(recipe.stage_epochs or (0, recipe.epochs)),
            depth=list(depths),
            init_teacher_encoder_depth=first,
            sdpr=recipe.drop_path,
            **_ONLY["dbot"],
        )
    if method == "sdae":
        options |= dict(
            drop_path=recipe.drop_path,
            momentum_teacher=recipe.momentum,
            momentum_teacher_final=recipe.momentum_end,
            momentum_teacher_warmup=recipe.momentum_start,
            momentum_teacher_warmup_ep=recipe.momentum_warmup_epochs,
            ema_op={update: name for name, update in _UPDATES.items()}[recipe.teacher_update],
            ema_frequent=recipe.teacher_every,
            shrink_num=_masked(found, recipe.mask_ratio) if recipe.folds else None,
            ncrop_loss=recipe.folds or None,
        )
    return options
