"""The command line: ``fastmim pretrain | knn | linear | visualize | convert | presets | info``."""

import argparse
import difflib
import re
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from jsonargparse import (
    ActionConfigFile,
    ArgumentError,
    ArgumentParser,
    DefaultHelpFormatter,
    Namespace,
)
from jsonargparse.typing import PositiveInt

import fastmim
from fastmim.data import TooManyBadImages, open_source
from fastmim.info import print_report
from fastmim.interop import convert
from fastmim.models import did_you_mean
from fastmim.train.build import published_encoders, restore_run
from fastmim.train.checkpoint import CheckpointError
from fastmim.train.config import Evaluation, Pretrain
from fastmim.train.distributed import PeerError, process_group, rank, together
from fastmim.train.evaluation import (
    FeatureEvaluation,
    KNNEvaluation,
    LinearEvaluation,
    compare,
    encoders_of,
)
from fastmim.train.folder import CHECKPOINTS
from fastmim.train.log import say
from fastmim.train.pictures import write_reconstructions
from fastmim.train.presets import PRESETS
from fastmim.train.trainer import NonFiniteError, Outcome, Trainer

# What a user can cause. Their messages say what to do, so no traceback is shown.
_USER_ERRORS = (ValueError, OSError, ImportError, CheckpointError, PeerError)
_BAD_INPUT, _NON_FINITE, _BAD_DATA, _NOT_SAVED = 2, 3, 4, 5
_STOPPED = 128 + signal.SIGINT

_EXAMPLES = """\
examples:
  fastmim pretrain                                                 the embedded digits
  fastmim pretrain --preset small32 --data.path cifar10.parquet
  fastmim pretrain --preset tiny224 --data.path photos/ --method mae --recipe.epochs 50
  fastmim pretrain --method dbot --recipe.stage_epochs '[0,10,20]'   two stages
  fastmim pretrain --method sdae --recipe.momentum 0.9
  fastmim pretrain --preset small32 --print_config > my.yaml       every option, to edit
  fastmim pretrain --config my.yaml
  fastmim pretrain --config runs/small32-rc_mae/config.yaml        go on with that run
  torchrun --nproc-per-node=8 -m fastmim pretrain --preset tiny224 --data.path photos/
"""


_CONVERT_EXAMPLES = """\
examples:
  fastmim convert mae_pretrain_vit_base.pth                        only say what it is
  fastmim convert rc_mae/checkpoint-1599.pth --out rc.safetensors  the teacher, which they fine-tune
  fastmim convert checkpoint-400.pth --out runs/mae --data /data/imagenet/train
  fastmim pretrain --config runs/mae/config.yaml                   goes on with that official run
  fastmim convert runs/mae --out mae.pth --to authors
  fastmim convert rc.safetensors --out vit --to hf --encoder-only --img-size 384
"""


# Commands on a run's features, and the options of Evaluation that say nothing to them.
_EVALUATIONS: dict[str, tuple[type[FeatureEvaluation], set[str]]] = {
    "knn": (KNNEvaluation, set()),
    "linear": (LinearEvaluation, {"k", "temperature"}),
}
_DURING = {"knn_every", "knn_at_end"}


class _Call(NamedTuple):
    """One invocation."""

    argv: list[str]
    parser: ArgumentParser
    options: Namespace  # of the command


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after ``fastmim``. Default: those of the process.

    Returns:
        Exit status: 0 done (or stopped by SIGTERM and saved), 2 bad input or another process
        failed, 3 non-finite losses, 4 too many unreadable images, 5 last checkpoint not written,
        130 stopped by Ctrl-C.
    """
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    with process_group() if argv[0] == "pretrain" else nullcontext():
        return _run(argv)


def _run(argv: list[str]) -> int:
    try:
        with together():
            parser = _parser(_preset_of(argv))
            options = parser.parse_args(argv)
        return _COMMANDS[options.command](_Call(argv, parser, options[options.command]))
    except ArgumentError as error:
        command = argv[0] + " " if argv[0] in _COMMANDS else ""
        _tell(error, f"{_nearest_option(error, argv[0])}\nsee fastmim {command}--help")
        return _BAD_INPUT
    except _USER_ERRORS as error:
        _tell(error)
        return _BAD_INPUT
    except KeyboardInterrupt:
        say("stopped at once; of a training run, the last checkpoint is kept")
        return _STOPPED


def _tell(error: Exception, remedy: str = "") -> None:
    """Print an error; of several processes rank 0 does, unless it does not know of it."""
    if rank() == 0:
        say(f"error: {error}{remedy}")
    elif not getattr(error, "told", isinstance(error, PeerError)):
        print(f"rank {rank()}: error: {error}{remedy}", file=sys.stderr)


def _preset_of(argv: Sequence[str]) -> str:
    """The preset named on the command line or in a --config file; its values become defaults."""
    preset = Pretrain.preset
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name not in ("--config", "--preset"):
            continue
        if not equals:
            value = argv[i + 1] if i + 1 < len(argv) else ""
        preset = value if name == "--preset" else _preset_in(Path(value), preset)
    if preset not in PRESETS:
        raise ValueError(f"preset: {did_you_mean('preset', preset, PRESETS)}")
    return preset


def _preset_in(path: Path, default: str) -> str:
    """The preset that a --config file names."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError:
        return default  # the parser will say so
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {path}: expected YAML: {error}") from error
    return str(content.get("preset", default)) if isinstance(content, dict) else default


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the lines of the examples."""


def _command(description: str, usage: str, epilog: str | None = None) -> ArgumentParser:
    return ArgumentParser(
        description=description,
        usage=f"fastmim {usage}",
        epilog=epilog,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )


def _parser(preset: str) -> ArgumentParser:
    parser = ArgumentParser(
        prog="fastmim",
        description="Masked image modelling: pre-train Vision Transformers and look at them.",
        version=fastmim.__version__,
        formatter_class=_HelpFormatter,
        exit_on_error=False,
        allow_abbrev=False,
    )
    commands = parser.add_subcommands(dest="command", required=True)
    commands.add_subcommand(
        "pretrain", _pretrain_parser(preset), help="pre-train a Vision Transformer"
    )
    for name, (evaluation, skipped) in _EVALUATIONS.items():
        what = f"{evaluation.title} of a run's features"
        of_features = _command(
            f"{what}.\nOptions that are not given are those of the run.",
            f"{name} RUN [options]",
        )
        of_features.add_argument(
            "run",
            type=str,
            help="Folder of a run, or of one checkpoint; or a file of the authors, timm or "
            "convert, with --eval.bank.",
        )
        of_features.add_class_arguments(Evaluation, "eval", skip={*_DURING, *skipped})
        commands.add_subcommand(name, of_features, help=what)

    visualize = _command("Picture of what a run's networks reconstruct.", "visualize RUN [options]")
    visualize.add_argument("run", type=str, help="Folder of a run, or of one checkpoint.")
    visualize.add_argument("--images", type=str, help="Data set. Default: the run's own.")
    visualize.add_argument("--count", type=PositiveInt, default=8, help="Images shown.")
    visualize.add_argument("--seed", type=int, default=0, help="Of the masks.")
    visualize.add_argument("--out", type=str, help="Default: reconstruction.png in the run.")
    commands.add_subcommand("visualize", visualize, help="picture of a run's reconstructions")

    commands.add_subcommand("convert", _convert_parser(), help="checkpoints of others, in and out")

    presets = _command("Named recipes and their sources.", "presets")
    commands.add_subcommand("presets", presets, help="list the named recipes")

    info = _command("Versions, devices, and the backend of each operator.", "info [--json]")
    info.add_argument("--json", action="store_true", help="Machine-readable.")
    commands.add_subcommand("info", info, help="what runs where on this machine, and why")
    return parser


def _pretrain_parser(preset: str) -> ArgumentParser:
    parser = _command(
        "Pre-train a Vision Transformer by masked image modelling.\n"
        "Repeat the command to go on with a run that was interrupted.",
        "pretrain [--preset NAME] [--method NAME] [--data.path PATH] [options]",
        _EXAMPLES,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any options.")
    parser.add_class_arguments(Pretrain, as_group=False)
    chosen = PRESETS[preset]
    defaults = {"preset": preset, "method": chosen.method}
    for group in ("recipe", "efficiency", "eval"):
        defaults |= {f"{group}.{key}": value for key, value in getattr(chosen, group).items()}
    parser.set_defaults(defaults)
    return parser


def _convert_parser() -> ArgumentParser:
    parser = _command(
        "Recognise a checkpoint of MAE, RC-MAE, dBOT, SdAE, timm, Hugging Face or fastmim, and\n"
        "write it in another layout. Nothing in it is run.",
        "convert IN [--out OUT] [options]",
        _CONVERT_EXAMPLES,
    )
    parser.add_argument("path", type=str, help="File or folder; its layout is recognised.")
    parser.add_argument(
        "--out",
        type=str,
        help="One network: a name ending in .safetensors (.pth for authors). Everything, with the "
        "optimizer: a folder. Default: only say what the file is.",
    )
    parser.add_argument(
        "--to",
        type=Literal["fastmim", "authors", "timm", "hf"],
        default="fastmim",
        help="Layout of OUT.",
    )
    parser.add_argument(
        "--which",
        type=Literal["student", "teacher"] | None,
        help="Default: the one that the authors fine-tune; in a folder and for authors, both.",
    )
    parser.add_argument("--encoder-only", action="store_true", help="Leave the decoder out.")
    parser.add_argument(
        "--img-size",
        type=int | tuple[int, int] | None,
        help="Interpolate the position tables for this size in pixels, or [height, width].",
    )
    parser.add_argument(
        "--positions",
        type=Literal["bicubic", "sincos"],
        default="bicubic",
        help="With --img-size: resample the tables, or compute fixed ones anew.",
    )
    parser.add_argument("--model", type=str, help="Refuse other sizes than those of this model.")
    parser.add_argument(
        "--partial", action="store_true", help="Go on without missing and unexpected tensors."
    )
    parser.add_argument("--data", type=str, help="Images with which the run in OUT goes on.")
    return parser


def _nearest_option(error: ArgumentError, command: str) -> str:
    """Hint for an option that is not there, or nothing."""
    convert = command == "convert"
    parser = _convert_parser() if convert else _pretrain_parser(Pretrain.preset)
    known = [f"--{key}" for key, _ in parser.get_defaults().items()]
    known = [option.replace("_", "-") for option in known] if convert else known
    found = re.search("unrecognized arguments:(.*)", str(error), re.IGNORECASE)
    for word in found[1].split() if found else ():
        name = word.partition("=")[0]
        # By the last part too: --epochs means --recipe.epochs
        near = [option for option in known if option.partition(".")[2] == name.strip("-")]
        near += difflib.get_close_matches(name, known, n=1)
        if near:
            return f"\ndid you mean {near[0]}?"
    return ""


def _pretrain(call: _Call) -> int:
    # Until jsonargparse 4.48 the method had its longer name.
    instantiate = getattr(call.parser, "instantiate", None) or call.parser.instantiate_classes
    given = instantiate(Namespace(command="pretrain", pretrain=call.options)).pretrain
    config = Pretrain(**{k: v for k, v in vars(given).items() if k != "config"})
    trainer = Trainer(config)
    try:
        outcome = trainer.run()
    except NonFiniteError as error:
        _tell(error)
        return _NON_FINITE
    except TooManyBadImages as error:
        _tell(error)
        return _BAD_DATA
    if not outcome.saved:
        say(
            f"error: the last checkpoint, of step {outcome.steps}, could not be written; make room "
            "and repeat the command: it goes on from the newest checkpoint there is"
        )
        return _NOT_SAVED
    if not outcome.finished:
        say(
            f"stopped after step {outcome.steps} and saved; to go on: fastmim pretrain --config "
            f"{outcome.folder / 'config.yaml'}"
        )
        return _STOPPED if outcome.signal == signal.SIGINT else 0
    if rank() == 0:
        _report(config, trainer, outcome)
    return 0


def _report(config: Pretrain, trainer: Trainer, outcome: Outcome) -> None:
    evaluation = trainer.evaluation
    if config.eval.knn_at_end and evaluation.obstacle:
        say(f"no kNN accuracy: {evaluation.obstacle}")
    elif config.eval.knn_at_end:
        encoders = encoders_of(trainer.method, trainer.identity)
        _print_accuracies(evaluation, compare(evaluation, encoders))
    files = sorted(path.name for path in outcome.folder.iterdir() if path.name[0] != ".")
    say(f"{outcome.folder} holds {', '.join(files)}")


def _evaluate(call: _Call) -> int:
    command, path = call.argv[0], call.options.run
    chosen = dict(call.parser.parse_args(call.argv, defaults=False)[command].get("eval", {}))
    if Path(path).is_file():
        if chosen.get("bank") is None:
            raise ValueError(
                f"{command}: {path} names no images; pass labelled ones by --eval.bank"
            )
        source = open_source(chosen["bank"])
        encoders = published_encoders(path, source)
    else:
        checkpoint, method = restore_run(path)
        ran = checkpoint.state["config"]
        chosen = {**ran["eval"], "knn_every": 0, **chosen}
        source = open_source(chosen["bank"] or ran["data"]["path"])
        encoders = encoders_of(method, checkpoint.state["identity"])
    embed = encoders.get("student", next(iter(encoders.values()))).patch_embed
    evaluation = _EVALUATIONS[command][0](
        Evaluation(**{**chosen, "bank": None}),
        source,
        image_size=embed.img_size,
        channels=embed.in_chans,
    )
    if evaluation.obstacle:
        raise ValueError(f"{command}: {evaluation.obstacle}")
    _print_accuracies(evaluation, compare(evaluation, encoders))
    return 0


def _visualize(call: _Call) -> int:
    given = call.options
    checkpoint, method = restore_run(given.run)
    ran = checkpoint.state["config"]
    of_run = checkpoint.path.parent.name == CHECKPOINTS
    folder = checkpoint.path.parent.parent if of_run else Path(given.run)
    path = write_reconstructions(
        Path(given.out) if given.out else folder / "reconstruction.png",
        method,
        open_source(given.images or ran["data"]["path"]),
        count=given.count,
        mask_ratio=method.mask_ratio,
        seed=given.seed,
        crop_ratio=ran["eval"]["crop_ratio"],
    )
    say(f"wrote {path}")
    return 0


def _convert(call: _Call) -> int:
    given = call.options
    description, written = convert(
        given.path,
        given.out,
        to=given.to,
        data=given.data,
        which=given.which,
        encoder_only=given.encoder_only,
        img_size=given.img_size,
        sincos=given.positions == "sincos",
        partial=given.partial,
        model=given.model,
    )
    print("\n".join(description.lines()))
    for path in written:
        say(f"wrote {path}")
    if given.data is not None:
        say(f"to go on with this run: fastmim pretrain --config {written[0]}")
    return 0


def _presets(call: _Call) -> int:
    for name, preset in PRESETS.items():
        recipe = preset.recipe
        print(
            f"{name:21}{preset.method}, {recipe['model']}, {recipe['epochs']} epochs, "
            f"batch {recipe['batch_size']}\n{'':21}{preset.source}"
        )
    return 0


def _info(call: _Call) -> int:
    print_report(json=call.options.json)
    return 0


_COMMANDS = {
    "pretrain": _pretrain,
    "knn": _evaluate,
    "linear": _evaluate,
    "visualize": _visualize,
    "convert": _convert,
    "presets": _presets,
    "info": _info,
}


def _print_accuracies(evaluation: FeatureEvaluation, accuracies: dict[str, float]) -> None:
    """On standard output, as results are; progress and messages go to standard error."""
    print(f"{evaluation.title} ({evaluation.describe()}):")
    for name, accuracy in accuracies.items():
        print(f"  {name:24}{100 * accuracy:6.2f} %")
    sys.stdout.flush()
