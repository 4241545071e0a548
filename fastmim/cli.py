"""The command line: ``fastmim pretrain | knn | visualize | presets | info``."""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from fastmim.data import TooManyBadImages, open_source
from fastmim.info import print_report
from fastmim.methods import Method
from fastmim.models import did_you_mean
from fastmim.train.build import restore_run
from fastmim.train.checkpoint import Checkpoint, CheckpointError
from fastmim.train.config import Evaluation, Pretrain, Recipe
from fastmim.train.evaluation import KNNEvaluation, compare
from fastmim.train.log import console
from fastmim.train.pictures import write_reconstructions
from fastmim.train.presets import PRESETS
from fastmim.train.trainer import NonFiniteError, Trainer

# What a user can cause. Their messages say what to do, so no traceback is shown.
_USER_ERRORS = (ValueError, FileNotFoundError, NotADirectoryError, PermissionError, CheckpointError)
_EXIT_BAD_INPUT, _EXIT_NON_FINITE, _EXIT_BAD_DATA, _EXIT_NOT_SAVED = 2, 3, 4, 5


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after ``fastmim``. Default: those of the process.

    Returns:
        Exit status: 0 done (or stopped by SIGTERM and saved), 2 bad input, 3 non-finite losses,
        4 too many unreadable images, 5 last checkpoint not written, 130 stopped by Ctrl-C, saved.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        parser = _parser(_preset_of(argv))
        options = parser.parse_args(argv)
        return _COMMANDS[options.command](parser, options)
    except _USER_ERRORS as error:
        console.print(f"error: {error}", markup=False)
        return _EXIT_BAD_INPUT


def _preset_of(argv: Sequence[str]) -> str:
    """The preset named on the command line or in a --config file; its values become defaults."""
    preset = Pretrain.preset
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name not in ("--config", "--preset"):
            continue
        if not equals:
            value = argv[i + 1] if i + 1 < len(argv) else ""
        if name == "--preset":
            preset = value
        elif Path(value).is_file():
            content = yaml.safe_load(Path(value).read_text())
            if isinstance(content, dict):
                preset = content.get("preset", preset)
    if preset not in PRESETS:
        raise ValueError(f"preset: {did_you_mean('preset', preset, PRESETS)}")
    return preset


def _parser(preset: str) -> ArgumentParser:
    parser = ArgumentParser(prog="fastmim", description=__doc__.partition(":")[0] + " of fastmim.")
    commands = parser.add_subcommands(dest="command", required=True)

    pretrain = ArgumentParser(description="Pre-train a Vision Transformer.")
    pretrain.add_argument("--config", action=ActionConfigFile, help="YAML file with any options.")
    pretrain.add_class_arguments(Pretrain, as_group=False)
    pretrain.set_defaults(_preset_defaults(preset))
    commands.add_subcommand("pretrain", pretrain, help="pre-train a Vision Transformer")

    knn = ArgumentParser(description="kNN accuracy of a run's features.")
    knn.add_argument("run", type=str, help="Folder of a run, or of one checkpoint.")
    knn.add_class_arguments(Evaluation, "evaluation", skip={"knn_every", "knn_at_end"})
    commands.add_subcommand("knn", knn, help="kNN accuracy of a run's features")

    visualize = ArgumentParser(description="Picture of what a run's networks reconstruct.")
    visualize.add_argument("run", type=str, help="Folder of a run, or of one checkpoint.")
    visualize.add_argument("--images", type=str, help="Data set. Default: the run's own.")
    visualize.add_argument("--count", type=int, default=8, help="Images shown.")
    visualize.add_argument("--seed", type=int, default=0, help="Of the masks.")
    visualize.add_argument("--out", type=str, help="Default: reconstruction.png in the run.")
    commands.add_subcommand("visualize", visualize, help="picture of a run's reconstructions")

    commands.add_subcommand(
        "presets",
        ArgumentParser(description="Named recipes and their sources."),
        help="list the named recipes",
    )
    info = ArgumentParser(description="Versions, devices, and the backend of each operator.")
    info.add_argument("--json", action="store_true", help="Machine-readable.")
    commands.add_subcommand("info", info, help="what runs where on this machine, and why")
    return parser


def _preset_defaults(name: str) -> dict:
    preset = PRESETS[name]
    defaults = {"preset": name, "method": preset.method}
    for group in ("recipe", "efficiency", "evaluation"):
        defaults |= {f"{group}.{key}": value for key, value in getattr(preset, group).items()}
    return defaults


def _pretrain(parser: ArgumentParser, options: Namespace) -> int:
    given = parser.instantiate_classes(options).pretrain
    config = Pretrain(**{k: v for k, v in vars(given).items() if k != "config"})
    trainer = Trainer(config)
    try:
        outcome = trainer.run()
    except NonFiniteError as error:
        console.print(f"error: {error}", markup=False)
        return _EXIT_NON_FINITE
    except TooManyBadImages as error:
        console.print(f"error: {error}", markup=False)
        return _EXIT_BAD_DATA
    if not outcome.saved:
        return _EXIT_NOT_SAVED
    if not outcome.finished:
        console.print(
            f"stopped after step {outcome.steps} and saved; the same command with --resume auto "
            f"(the default) and --output.name {outcome.folder.name} goes on from there",
            markup=False,
        )
        return 130 if outcome.signal == signal.SIGINT else 0
    if config.evaluation.knn_at_end and trainer.evaluation.possible:
        _print_accuracies(
            trainer.evaluation, compare(trainer.evaluation, trainer.method, config.recipe)
        )
    files = ", ".join(sorted(path.name for path in outcome.folder.iterdir()))
    console.print(f"{outcome.folder} holds {files}", markup=False)
    return 0


def _knn(parser: ArgumentParser, options: Namespace) -> int:
    given = options.knn
    checkpoint, method, recipe = _restore(given.run)
    config = Evaluation(**vars(given.evaluation))
    data = checkpoint.state["config"]["data"]["path"]
    source = open_source(data if config.bank is None else config.bank)
    evaluation = KNNEvaluation(config, source, method.student.patch_embed.img_size)
    if not evaluation.possible:
        raise ValueError(
            f"knn: kNN accuracy needs labels, and {source.describe()} has none; name labelled "
            "images with --evaluation.bank"
        )
    _print_accuracies(evaluation, compare(evaluation, method, recipe))
    return 0


def _visualize(parser: ArgumentParser, options: Namespace) -> int:
    given = options.visualize
    checkpoint, method, recipe = _restore(given.run)
    config = checkpoint.state["config"]
    source = open_source(given.images or config["data"]["path"])
    path = write_reconstructions(
        Path(given.out) if given.out else Path(given.run) / "reconstruction.png",
        method,
        source,
        count=given.count,
        mask_ratio=recipe.mask_ratio,
        seed=given.seed,
        crop_ratio=config["evaluation"]["crop_ratio"],
    )
    console.print(f"wrote {path}", markup=False)
    return 0


def _presets(parser: ArgumentParser, options: Namespace) -> int:
    for name, preset in PRESETS.items():
        print(f"{name:22}{preset.method:8}{preset.recipe['model']:26}{preset.source}")
    return 0


def _info(parser: ArgumentParser, options: Namespace) -> int:
    print_report(json=options.info.json)
    return 0


_COMMANDS = {
    "pretrain": _pretrain,
    "knn": _knn,
    "visualize": _visualize,
    "presets": _presets,
    "info": _info,
}


def _restore(run: str) -> tuple[Checkpoint, Method, Recipe]:
    def warn(path: Path, reason: str) -> None:
        console.print(f"warning: checkpoint {path.name} is refused: {reason}", markup=False)

    return restore_run(run, on_invalid=warn)


def _print_accuracies(evaluation: KNNEvaluation, accuracies: dict[str, float]) -> None:
    console.print(f"kNN accuracy ({evaluation.describe()}):")
    for name, accuracy in accuracies.items():
        console.print(f"  {name:20}{100 * accuracy:6.2f} %", markup=False)
