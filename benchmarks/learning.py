"""What the methods learn from real photographs, in as many optimizer steps each.

``python benchmarks/learning.py --train cifar10-train.parquet --test cifar10-test.parquet
--json rows.jsonl``

One small network, pre-trained by each method with the recipe of the preset ``small32``, then kNN
accuracy and linear probe of teacher, student, the untrained network, and raw pixels. A row is
appended for each. Interrupted, the command goes on where it was. About an hour of one core for
30,000 images of 32 pixels and four epochs.

Does RC-MAE converge faster than MAE, as its paper says? On a GPU, with probes along the run:
``--methods mae rc_mae --epochs 100 --precision bf16 --probe-at 0.25 0.5 0.75 1``
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is imported

import argparse
import datetime
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # last: an installed fastmim comes first

import torch

from fastmim.eval import knn_accuracy, linear_probe
from fastmim.info import report
from fastmim.nn import Encoder
from fastmim.train import PRESETS, Data, Efficiency, Evaluation, Output, Pretrain, Recipe, Trainer
from fastmim.train.build import networks, untrained_network

# What a method changes in the preset. SdAE's momentum has the time constants of its released
# recipe, a twelfth and a third of the run: a teacher that moved four times would stay random.
_CHANGES = {
    "mae": dict(model="mae_vit_micro_patch4"),
    "rc_mae": {},
    "dbot": dict(model="dbot_vit_micro_patch4"),
    "sdae": dict(
        model="sdae_vit_micro_patch4", teacher_update="step", momentum=0.996, momentum_end=0.999
    ),
}
_NAMES = {"mae": "MAE", "rc_mae": "RC-MAE", "dbot": "dBOT", "sdae": "SdAE"}
_WITHOUT_METHOD = ("untrained", "raw pixels")


def table(rows: list[dict]) -> str:
    """Markdown of the rows of suite ``learning``: one line a network, one table a data set.

    The last row of a network counts. What was trained is said above the table.
    """
    newest = {_key(row): row for row in rows if row["suite"] == "learning"}
    parts = []
    for setting in dict.fromkeys(_setting(row) for row in newest.values()):
        of_setting = [row for row in newest.values() if _setting(row) == setting]
        of_setting.sort(key=_place)
        parts.append("\n".join(_lines(of_setting)))
    return "\n\n".join(parts)


def _key(row: dict) -> tuple:
    return (*_setting(row), row["method"], row["network"], _share(row))


def _share(row: dict) -> float:
    """Part of its run that a network has behind it."""
    return row.get("share", 1.0)


def _setting(row: dict) -> tuple:
    names = ("train", "test", "steps", "batch_size", "seed")
    return (*(row[name] for name in names), row.get("precision", "fp32"))


def _place(row: dict) -> tuple:
    """Methods in the order of their papers, the network that is meant to be used first."""
    if row["method"] is None:
        return (len(_NAMES), _WITHOUT_METHOD.index(row["network"]), 0, 0)
    return (list(_NAMES).index(row["method"]), 0, not row["meant"], _share(row))


def _lines(rows: list[dict]) -> Iterator[str]:
    first = rows[0]
    error = 100 * math.sqrt(0.25 / first["test_images"])
    yield (
        f"`{first['train']}` ({first['train_images']:,} images), {first['steps']} steps of "
        f"{first['batch_size']} images ({first['epochs']} epochs) for every method, "
        f"{first['model']}, seed {first['seed']}; accuracy on `{first['test']}` "
        f"({first['test_images']:,} images, one standard error at most {error:.1f} points). "
        f"kNN: k = {first['k']}. Linear probe: learning rate chosen on a tenth of the training "
        f"images. {first.get('gpu_name') or first['cpu_name']}, torch {first['torch']}, "
        f"commit {first['commit']}. "
        f"`python benchmarks/learning.py --train {first['train']} --test {first['test']} "
        f"--epochs {first['epochs']} --seed {first['seed']}`"
    )
    yield ""
    yield "| method | network | kNN, % | linear probe, % |"
    yield "|---|---|---|---|"
    for row in rows:
        meant = " (meant to be used)" if row["meant"] else ""
        after = "" if _share(row) == 1 else f" after {_share(row):.0%}"
        yield (
            f"| {_NAMES.get(row['method'], '-')} | {row['network']}{meant}{after} | "
            f"{100 * row['knn_accuracy']:.1f} | {100 * row['linear_accuracy']:.1f} |"
        )


def run_of(method: str, options: argparse.Namespace, stop_after: int | None = None) -> Pretrain:
    """The run of one method; dBOT's in two stages of the same length."""
    epochs = options.epochs
    changes = {**_CHANGES[method], "epochs": epochs, "seed": options.seed}
    if method == "dbot":
        changes["stage_epochs"] = (0, epochs // 2, epochs)
    return Pretrain(
        method=method,
        preset="small32",
        data=Data(path=str(options.train)),
        recipe=Recipe(**{**PRESETS["small32"].recipe, **changes}),
        efficiency=Efficiency(precision=options.precision, threads=options.threads),
        eval=Evaluation(knn_at_end=False, queries=str(options.test), limit=0),
        output=Output(
            folder=options.runs,
            name=f"{method}-{options.seed}",
            log_every=50,
            pictures=0,
            checkpoint_minutes=3,
        ),
        stop_after=stop_after,
    )


def _rows(options: argparse.Namespace) -> Iterator[dict]:
    """Train and evaluate; what no method has trained comes from the first of them."""
    for method in options.methods:
        for share in sorted({*options.probe_at, 1.0}):
            trainer = Trainer(run_of(method, options))
            step = max(round(share * trainer.engine.total_steps), 1)
            if trainer.done > step:  # a command before this one has been here
                continue
            trainer = Trainer(run_of(method, options, stop_after=step))
            if trainer.run().steps < step:
                raise SystemExit("interrupted; repeat the command to go on")
            meant = trainer.method.features_of
            for name, network in networks(trainer.method).items():
                row = {**_accuracies(trainer, network), "share": share}
                yield {**row, "network": name, "meant": name == meant}
        if method == "mae":
            for name, network in zip(
                _WITHOUT_METHOD, (untrained_network(trainer.identity), None), strict=True
            ):
                row = _accuracies(trainer, network)
                yield {**row, "method": None, "network": name, "meant": False}


def _accuracies(trainer: Trainer, network: Encoder | None) -> dict:
    """kNN and linear probe of one network's mean patch token, and what was trained."""
    config, evaluation = trainer.config, trainer.evaluation
    bank, queries = evaluation.features(network)
    probe = linear_probe(bank, queries)
    return dict(
        suite="learning",
        device=trainer.device.type,
        gpu_name=torch.cuda.get_device_name(trainer.device)
        if trainer.device.type == "cuda"
        else None,
        precision=trainer.precision,
        method=config.method,
        knn_accuracy=knn_accuracy(bank, queries, k=config.eval.k),
        linear_accuracy=probe.accuracy,
        linear_lr=probe.lr,
        linear_held_out={f"{lr:g}": value for lr, value in probe.held_out.items()},
        k=config.eval.k,
        train=Path(config.data.path).name,
        train_images=len(evaluation.bank),
        test=Path(config.eval.queries).name,
        test_images=len(evaluation.queries),
        model=config.recipe.model.partition("_")[2],
        steps=trainer.engine.total_steps,
        epochs=config.recipe.epochs,
        batch_size=config.recipe.batch_size,
        seed=config.recipe.seed,
    )


def _fraction(text: str) -> float:
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"expected a part of the run, in (0, 1], got {text}")
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="labelled images")
    parser.add_argument("--test", type=Path, required=True, help="labelled images")
    parser.add_argument("--methods", nargs="*", default=list(_NAMES), choices=list(_NAMES))
    parser.add_argument("--epochs", type=int, default=4, help="of each method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="fp32", choices=["auto", "fp32", "bf16"])
    parser.add_argument(
        "--probe-at",
        nargs="*",
        type=_fraction,
        default=[],
        metavar="SHARE",
        help="also after these parts of each run, in (0, 1]",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the rows as JSONL")
    options = parser.parse_args()
    about = report()
    where = dict(
        cpu_name=about["cpu"]["model"],
        torch=torch.__version__,
        fastmim_version=about["fastmim"]["version"],
        commit=(about["fastmim"]["git_revision"] or "unknown")[:7],
    )
    rows = []
    for row in _rows(options):
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        rows.append({**row, **where, "timestamp": now})
        if options.json:
            with options.json.open("a") as out:
                print(json.dumps(rows[-1]), file=out)
    print(table(rows))


if __name__ == "__main__":
    main()
