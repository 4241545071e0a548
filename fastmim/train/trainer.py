"""The training loop: steps, checkpoints, signals, and what is left behind at the end."""

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from torch import Tensor

from fastmim.data import Augmentation, PretrainLoader, Source, open_source
from fastmim.train import checkpoint as checkpoints
from fastmim.train.build import (
    CHECKPOINTS,
    build_autoencoder,
    build_method,
    load_parts,
    run_identity,
)
from fastmim.train.checkpoint import Checkpoint, CheckpointError, CheckpointWriteError
from fastmim.train.config import Pretrain, to_dict
from fastmim.train.engine import Engine, StepResult, resolve_device, resolve_precision
from fastmim.train.evaluation import KNNEvaluation
from fastmim.train.log import Metrics, RunLog, console
from fastmim.train.pictures import write_loss_chart, write_reconstructions

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        folder: Of the run.
        steps: Optimizer steps done.
        finished: False if it was interrupted and can be resumed.
        signal: That interrupted it, or None.
        saved: False if the last checkpoint could not be written.
    """

    folder: Path
    steps: int
    finished: bool
    signal: signal.Signals | None
    saved: bool


class Trainer:
    """A pre-training run, from a configuration.

    Everything that can be wrong with the configuration or the data is found here, before any
    training is done.

    Args:
        config: The run.

    Raises:
        ValueError, FileNotFoundError: A configuration or data set that cannot be trained on.
        CheckpointError: The run folder holds a run with another recipe, method or data set.
    """

    def __init__(self, config: Pretrain) -> None:
        recipe, efficiency = config.recipe, config.efficiency
        _refuse_many_processes()
        self.config = config
        self.device = resolve_device(efficiency.device)
        self.source: Source = open_source(config.data.path)
        autoencoder = build_autoencoder(
            recipe, self.source.channels, self.source.mean, self.source.std
        )
        self.precision = resolve_precision(
            efficiency.precision, self.device, autoencoder.norm.weight.shape[0]
        )
        self.method = build_method(config.method, recipe, autoencoder).to(self.device)
        self.identity = run_identity(config.method, to_dict(recipe), self.source)
        self.loader = PretrainLoader(
            self.source,
            batch_size=recipe.batch_size,
            micro_batch=efficiency.micro_batch,
            image_size=autoencoder.patch_embed.img_size,
            seed=recipe.seed,
            augmentation=Augmentation(
                scale=recipe.crop_scale, ratio=recipe.crop_ratio, hflip=recipe.hflip
            ),
            workers=efficiency.workers,
            max_bad_fraction=config.data.max_bad_fraction,
            on_bad=self._report_bad_image,
            pin_memory=self.device.type == "cuda",
        )
        self.engine = Engine(
            self.method,
            recipe,
            precision=self.precision,
            steps_per_epoch=self.loader.sampler.steps_per_epoch,
        )
        self.evaluation = KNNEvaluation(
            config.evaluation, self.source, autoencoder.patch_embed.img_size
        )
        self.done = 0  # optimizer steps
        self.skipped = 0  # of them without an update
        self._bad_in_a_row = 0
        self._log: RunLog | None = None
        self.folder, resumed = self._choose_folder()
        if resumed is not None:
            self._resume(resumed)

    # ---- Before the first step

    def _choose_folder(self) -> tuple[Path, Checkpoint | None]:
        """The run's folder, and the checkpoint to go on from, if any."""
        output = self.config.output
        name = output.name or f"{self.config.preset}-{self.config.method}"
        folder = Path(output.folder) / name
        if self.config.resume == "never":
            for number in range(2, 10_000):
                if not folder.exists():
                    break
                folder = Path(output.folder) / f"{name}-{number}"
            return folder, None
        found = checkpoints.latest(
            folder / CHECKPOINTS,
            on_invalid=lambda path, reason: console.print(
                f"warning: checkpoint {path.name} is refused: {reason}", markup=False
            ),
            refuse_nonfinite=True,
        )
        return folder, found

    def _resume(self, checkpoint: Checkpoint) -> None:
        fields = checkpoints.difference(checkpoint.state["identity"], self.identity)
        if fields:
            raise CheckpointError(
                f"{checkpoint.path} is of another run, they differ in\n  "
                + "\n  ".join(fields)
                + "\nto start another run pass --output.name or --resume never; to go on with "
                "this one use its options (they are in config.yaml)"
            )
        load_parts(self.method, checkpoint)
        wanted = self.engine.optimizer.state_dict()
        checkpoints.check_parts(checkpoint.parts.get("optimizer", {}), wanted, "optimizer")
        self.engine.optimizer.load_state_dict(checkpoint.parts["optimizer"])
        self.done = checkpoint.step
        self.skipped = checkpoint.state["skipped_steps"]
        self.loader.start_step = self.done
        if checkpoint.state["precision"] != self.precision:
            console.print(
                f"warning: the run was computed in {checkpoint.state['precision']} so far and goes "
                f"on in {self.precision}"
            )

    def _describe(self) -> str:
        student = self.method.student
        params = sum(p.numel() for p in student.parameters()) / 1e6
        height, width = student.patch_embed.img_size
        recipe = self.config.recipe
        start = "from the start" if self.done == 0 else f"resumed after step {self.done}"
        return (
            f"{self.config.method} on {self.source.describe()}\n"
            f"{recipe.model}: {params:.1f} M parameters, {height} x {width} pixels, "
            f"{student.num_patches} patches, {self.engine.num_keep} visible\n"
            f"{self.engine.total_steps} steps of {recipe.batch_size} images "
            f"({recipe.epochs} epochs), lr {recipe.lr:.3g}, {self.precision} on {self.device}, "
            f"{torch.get_num_threads()} threads, {self.loader.workers} loading processes\n"
            f"{self.folder}: {start}"
        )

    # ---- The loop

    def run(self) -> Outcome:
        """Train to the end, or until a signal, and leave checkpoint, metrics and pictures.

        Raises:
            NonFiniteError: After ``max_bad_steps`` bad steps in a row; a report lies in the folder.
            TooManyBadImages: If more images than allowed cannot be read.
        """
        if self.config.efficiency.threads is not None:
            torch.set_num_threads(self.config.efficiency.threads)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.yaml").write_text(
            yaml.safe_dump(to_dict(self.config), sort_keys=False)
        )
        total = self.engine.total_steps
        console.print(self._describe(), markup=False)
        if self.done >= total:
            console.print(
                f"this run is complete: {self.done} of {total} steps. To train anew pass "
                "--resume never or another --output.name",
                markup=False,
            )
            return Outcome(self.folder, self.done, True, None, True)
        self._log = RunLog(
            Metrics(self.folder / "metrics.jsonl", self.done),
            device=self.device,
            first_step=self.done,
            total_steps=total,
            steps_per_epoch=self.engine.steps_per_epoch,
            batch_size=self.config.recipe.batch_size,
            log_every=self.config.output.log_every,
        )
        try:
            with _signals() as received, self.loader:
                caught = self._train(received)
            saved = self._try_save()
        finally:
            self._log.close()
        finished = self.done >= total
        if finished:
            self._write_pictures()
        return Outcome(self.folder, self.done, finished, caught, saved)

    def _train(self, received: list[signal.Signals]) -> signal.Signals | None:
        """Steps until the end or a signal; returns the signal."""
        stop = min(self.engine.total_steps, self.config.stop_after or math.inf)
        last_save = time.perf_counter()
        stream = iter(self.loader)
        while self.done < stop and not received:
            begin, waited = time.perf_counter(), self.loader.wait_seconds
            batches = [next(stream) for _ in range(self.loader.micro_steps)]
            result = self.engine.run_step(self.done, batches, len(batches))
            self.done += 1
            self._guard(result, torch.cat([b.sample_ids for b in batches]))
            self._log.step(
                self.done,
                result,
                time.perf_counter() - begin,
                self.loader.wait_seconds - waited,
            )
            self._evaluate()
            if self._save_is_due(last_save) and self.done < stop and not received:
                self._try_save()
                last_save = time.perf_counter()
        return received[0] if received else None

    def _guard(self, result: StepResult, sample_ids: Tensor) -> None:
        """Count skipped steps; stop, with a report, when they follow one another."""
        if not result.skipped:
            self._bad_in_a_row = 0
            return
        self.skipped += 1
        self._bad_in_a_row += 1
        self._log.say(
            f"warning: step {self.done}: loss {result.losses['loss']}, gradient norm "
            f"{result.grad_norm}: skipped, nothing was changed ({self.skipped} skipped so far)"
        )
        if self._bad_in_a_row < self.config.max_bad_steps:
            return
        report = self.folder / "nonfinite.json"
        report.write_text(
            json.dumps(
                {
                    "step": self.done - 1,
                    "losses": {k: repr(v) for k, v in result.losses.items()},
                    "grad_norm": repr(result.grad_norm),
                    "lr": result.lr,
                    "precision": self.precision,
                    "seed": self.config.recipe.seed,
                    "sample_ids": sample_ids.tolist(),
                    "images": [self.source.name(i) for i in sample_ids.tolist()],
                },
                indent=1,
            )
        )
        raise NonFiniteError(
            f"stopped after {self._bad_in_a_row} steps in a row with a loss or gradient that is "
            f"not finite. Parameters, teacher and optimizer are as before the first of them; the "
            f"last checkpoint is kept. {report} names the batch. Try a lower recipe.base_lr, "
            "recipe.clip_grad 1.0, or efficiency.precision fp32"
        )

    def _evaluate(self) -> None:
        every = self.config.evaluation.knn_every
        epoch, rest = divmod(self.done, self.engine.steps_per_epoch)
        if not every or rest or epoch % every:
            return
        accuracy = self.evaluation.accuracy(self.best_encoder())
        self._log.metrics.write(self.done, {"epoch": epoch, "knn_accuracy": accuracy})
        self._log.say(f"epoch {epoch}: kNN accuracy {100 * accuracy:.2f} %")

    def best_encoder(self):
        """The network whose features are meant to be used: the teacher's where there is one."""
        return self.method.student if self.method.teacher is None else self.method.teacher.module

    # ---- Checkpoints

    def _save_is_due(self, last_save: float) -> bool:
        output = self.config.output
        if output.checkpoint_every and self.done % output.checkpoint_every == 0:
            return True
        minutes = (time.perf_counter() - last_save) / 60
        return bool(output.checkpoint_minutes) and minutes >= output.checkpoint_minutes

    def _save(self) -> Path:
        parts = {
            "student": self.method.student.state_dict(),
            "optimizer": self.engine.optimizer.state_dict(),
        }
        if self.method.teacher is not None:
            parts["teacher"] = self.method.teacher.module.state_dict()
        state = {
            "identity": self.identity,
            "config": to_dict(self.config),
            "precision": self.precision,
            "total_steps": self.engine.total_steps,
            "skipped_steps": self.skipped,
            "bad_images": self.loader.bad_count,
        }
        return checkpoints.save(
            self.folder / CHECKPOINTS, self.done, parts, state, keep=self.config.output.keep
        )

    def _try_save(self) -> bool:
        """Save; a failure is told, not raised: the older checkpoints are still there."""
        try:
            self._save()
        except CheckpointWriteError as error:
            self._log.say(f"warning: checkpoint of step {self.done} not written: {error}")
            return False
        return True

    def _write_pictures(self) -> None:
        write_loss_chart(self.folder)
        if self.config.output.pictures:
            write_reconstructions(
                self.folder / "reconstruction.png",
                self.method,
                self.source,
                count=self.config.output.pictures,
                mask_ratio=self.config.recipe.mask_ratio,
                seed=self.config.recipe.seed,
                crop_ratio=self.config.evaluation.crop_ratio,
            )

    def _report_bad_image(self, name: str, reason: str) -> None:
        text = f"warning: image skipped: {name}: {reason}"
        if self._log is None:
            console.print(text, markup=False)
        else:
            self._log.say(text)


def _refuse_many_processes() -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise ValueError(
            f"pretrain: started as one of {world} processes (WORLD_SIZE), but it trains in one "
            "process; start it without torchrun"
        )


@contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """Collect the first interrupting signal instead of dying of it; a second one kills as usual."""
    received: list[signal.Signals] = []
    previous = {}

    def note(number: int, frame) -> None:
        received.append(signal.Signals(number))
        for caught, handler in previous.items():
            signal.signal(caught, handler)
        console.print(
            f"\n{signal.Signals(number).name}: finishing this step and saving; again to stop "
            "at once",
            markup=False,
        )

    try:
        for number in _SIGNALS:
            previous[number] = signal.signal(number, note)
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
