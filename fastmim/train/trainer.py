"""The training loop: steps, checkpoints, signals, and what is left behind at the end."""

import json
import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastmim.data import Augmentation, Batch, PretrainLoader, Source, open_source
from fastmim.train import checkpoint as checkpoints
from fastmim.train.build import (
    build_autoencoder,
    build_method,
    load_parts,
    networks,
    run_identity,
    teacher_identity,
)
from fastmim.train.checkpoint import Checkpoint, CheckpointError, CheckpointWriteError
from fastmim.train.config import Pretrain, to_dict
from fastmim.train.engine import Engine, StepResult, resolve_device, resolve_precision
from fastmim.train.evaluation import KNNEvaluation
from fastmim.train.folder import CHECKPOINTS, held, newest_checkpoint, run_folder, write_config
from fastmim.train.interrupt import collected_signals
from fastmim.train.log import Metrics, RunLog, Window, read_metrics, say
from fastmim.train.pictures import write_loss_chart, write_reconstructions


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
        CheckpointError: The run folder holds a run with another recipe, method or data set, or
            only damaged checkpoints.
    """

    def __init__(self, config: Pretrain) -> None:
        recipe, efficiency = config.recipe, config.efficiency
        _refuse_many_processes()
        self.config = config
        self.device = resolve_device(efficiency.device)
        self.source: Source = open_source(config.data.path)
        autoencoder = build_autoencoder(
            config.method,
            recipe,
            self.source.channels,
            self.source.mean,
            self.source.std,
            efficiency,
        )
        image_size = autoencoder.patch_embed.img_size
        self.precision = resolve_precision(efficiency.precision, self.device, autoencoder.embed_dim)
        self.method = build_method(config.method, recipe, autoencoder).to(self.device)
        self.identity = run_identity(config.method, to_dict(recipe), self.source)
        if self.method.has_stages and recipe.teachers:
            self.identity["teachers"] = teacher_identity(recipe.teachers)
        self.loader = PretrainLoader(
            self.source,
            batch_size=recipe.batch_size,
            micro_batch=efficiency.micro_batch,
            image_size=image_size,
            seed=recipe.seed,
            augmentation=Augmentation(
                scale=recipe.crop_scale, ratio=recipe.crop_aspect, hflip=recipe.hflip
            ),
            workers=efficiency.workers,
            max_bad_fraction=config.data.max_bad_fraction,
            on_bad=self._report_bad_image,
            pin_memory=self.device.type == "cuda",
        )
        # Only a teacher that moves after every micro-batch makes their size change the result.
        if self.method.teacher_follows == "micro_step":
            self.identity["micro_batch"] = self.loader.micro_batch
        self.engine = Engine(
            self.method,
            recipe,
            precision=self.precision,
            teacher_precision=None
            if efficiency.teacher_precision == "same"
            else efficiency.teacher_precision,
            teacher_once=efficiency.teacher_once,
            steps_per_epoch=self.loader.sampler.steps_per_epoch,
        )
        self.evaluation = KNNEvaluation(
            config.eval,
            self.source,
            image_size=image_size,
            channels=self.source.channels,
            workers=efficiency.workers,
            on_bad=self._report_bad_image,
        )
        self.done = 0  # optimizer steps
        self.skipped = 0  # of them without an update
        self._bad_in_a_row = 0
        self._window = Window()
        self._saved_at: int | None = None
        self._bad_images: set[str] = set()
        self._sample_ids: list[Tensor] = []  # of the step under way
        self.folder = run_folder(config)
        checkpoint = newest_checkpoint(self.folder)
        if checkpoint is not None:
            self._resume(checkpoint)

    def _resume(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        fields = checkpoints.difference(state.get("identity", {}), self.identity)
        if fields:
            raise CheckpointError(
                f"{checkpoint.path} is of another run, they differ in\n  "
                + "\n  ".join(fields)
                + "\nto start another run pass --output.name or --resume never; to go on with "
                f"this one pass --config {self.folder / 'config.yaml'}"
            )
        self.engine.begin_stage(state.get("stage", 0))
        load_parts(self.method, checkpoint)
        wanted = self.engine.optimizer.state_dict()
        checkpoints.check_parts(checkpoint.parts.get("optimizer", {}), wanted, "optimizer")
        self.engine.optimizer.load_state_dict(checkpoint.parts["optimizer"])
        self.done = self._saved_at = self.loader.start_step = checkpoint.step
        self.skipped = state["skipped_steps"]
        self._bad_in_a_row = state["bad_in_a_row"]
        self._window = Window(**state["log_window"])
        if state["precision"] != self.precision:
            say(
                f"warning: the run was computed in {state['precision']} so far and goes on in "
                f"{self.precision}"
            )

    def _describe(self) -> str:
        student = self.method.student
        params = sum(p.numel() for p in student.parameters()) / 1e6
        height, width = student.patch_embed.img_size
        recipe, total = self.config.recipe, self.engine.total_steps
        start = "from the start" if self.done == 0 else f"resumed after step {self.done}"
        if self.done >= total:
            start = (
                f"this run is complete: {self.done} of {total} steps. To train anew pass "
                "--resume never or another --output.name"
            )
        return (
            f"{self.config.method} on {self.source.describe()}\n"
            f"{recipe.model}: {params:.1f} M parameters, {height} x {width} pixels, "
            f"{student.num_patches} patches, {self.engine.num_keep} visible\n"
            f"{self._describe_teacher()}\n"
            f"{total} steps of {recipe.batch_size} images ({recipe.epochs} epochs), "
            f"lr {recipe.lr:.3g}, {self.precision} on {self.device}, threads: "
            f"{torch.get_num_threads()}, loading processes: {self.loader.workers or 'none'}\n"
            f"{self.folder}: {start}"
        )

    def _describe_teacher(self) -> str:
        """Size of the teacher that there is now."""
        teacher = self.method.teacher
        if teacher is None:
            return "no teacher"
        tensors = list(teacher.parameters())
        size = sum(t.numel() * t.element_size() for t in tensors) / 2**20
        follows = self.method.teacher_follows.replace("_", " ")
        moves = "frozen" if follows == "never" else f"moves every {follows}"
        count = sum(t.numel() for t in tensors) / 1e6
        precision = self.engine.teacher_precision
        return f"teacher: {count:.1f} M parameters, {size:.1f} MiB, {moves}, {precision}"

    def run(self) -> Outcome:
        """Train to the end, or until a signal, and leave checkpoint, metrics and pictures.

        Raises:
            NonFiniteError: After ``max_bad_steps`` bad steps in a row; a report lies in the folder.
            TooManyBadImages: If more images than allowed cannot be read.
            ValueError: If another process trains in the folder.
        """
        if self.config.efficiency.threads is not None:
            torch.set_num_threads(self.config.efficiency.threads)
        total = self.engine.total_steps
        with held(self.folder):
            if self.done < total:
                write_config(self.folder, self.config)
            say(self._describe())
            log = RunLog(
                Metrics(self.folder / "metrics.jsonl", self.done),
                self._window,
                device=self.device,
                first_step=self.done,
                total_steps=total,
                steps_per_epoch=self.engine.steps_per_epoch,
                batch_size=self.config.recipe.batch_size,
                log_every=self.config.output.log_every,
            )
            try:
                with collected_signals() as received, self.loader:
                    self._train(log, received)
                    saved = self._saved_at == self.done or self._try_save(log)
            finally:
                log.close()
            if self._bad_images:
                say(f"{len(self._bad_images)} images could not be read; others took their place")
            if self.done >= total:
                self._write_pictures()
        caught = received[0] if received else None
        return Outcome(self.folder, self.done, self.done >= total, caught, saved)

    def _train(self, log: RunLog, received: list[signal.Signals]) -> None:
        """Steps until the end or a signal."""
        stop = min(self.engine.total_steps, self.config.stop_after or math.inf)
        stage, stages = self.engine.stage, self.config.recipe.stages
        last_save = time.perf_counter()
        stream = iter(self.loader)
        if not self._is_evaluated():
            self._evaluate(log)
        while self.done < stop and not received:
            begin, waited = time.perf_counter(), self.loader.wait_seconds
            taught = self.engine.teacher_seconds
            batches = self._micro_batches(stream)
            result = self.engine.run_step(self.done, batches, self.loader.micro_steps)
            if self.engine.stage != stage:
                stage = self.engine.stage
                say(f"stage {stage + 1} of {len(stages)}: {self._describe_teacher()}")
            self.done += 1
            self._guard(log, result)
            waited = self.loader.wait_seconds - waited
            taught = self.engine.teacher_seconds - taught
            log.step(self.done, result, time.perf_counter() - begin, waited, taught)
            if received:
                break  # a due evaluation is made up for at the resumption
            self._evaluate(log)
            if self._save_is_due(last_save):
                self._try_save(log)
                last_save = time.perf_counter()

    def _micro_batches(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """Those of one step, one at a time; keeps in mind which samples they hold."""
        self._sample_ids.clear()
        for batch in islice(stream, self.loader.micro_steps):
            self._sample_ids.append(batch.sample_ids)
            yield batch

    def _guard(self, log: RunLog, result: StepResult) -> None:
        """Count skipped steps; stop, with a report, when they follow one another."""
        if not result.skipped:
            self._bad_in_a_row = 0
            return
        self.skipped += 1
        self._bad_in_a_row += 1
        say(
            f"warning: step {self.done}: loss {result.losses['loss']}, gradient norm "
            f"{result.grad_norm}: skipped, nothing was changed ({self.skipped} skipped so far)"
        )
        if self._bad_in_a_row < self.config.max_bad_steps:
            return
        ids = torch.cat(self._sample_ids).tolist()
        report = self.folder / "nonfinite.json"
        content = {
            "step": self.done,
            "losses": {k: repr(v) for k, v in result.losses.items()},
            "grad_norm": repr(result.grad_norm),
            "lr": result.lr,
            "precision": self.precision,
            "seed": self.config.recipe.seed,
            "sample_ids": ids,
            "images": [self.source.name(i) for i in ids],
        }
        report.write_text(json.dumps(content, indent=1))
        raise NonFiniteError(
            f"stopped after {self._bad_in_a_row} steps in a row with a loss or gradient that is "
            "not finite. Parameters, teacher and optimizer were left as before the first of them; "
            f"the last checkpoint is kept. {report} names the images of the last batch. Try a "
            "lower recipe.base_lr, recipe.clip_grad 1.0, or efficiency.precision fp32"
        )

    def _evaluate(self, log: RunLog) -> None:
        """Measure kNN accuracy, if it is due after this step."""
        every = self.config.eval.knn_every
        epoch, rest = divmod(self.done, self.engine.steps_per_epoch)
        if not every or not epoch or rest or epoch % every:
            return
        accuracy = self.evaluation.accuracy(self.method.best_encoder())
        log.metrics.write(self.done, {"epoch": epoch, "knn_accuracy": accuracy})
        say(f"epoch {epoch}: kNN accuracy {100 * accuracy:.2f} %")

    def _is_evaluated(self) -> bool:
        lines = read_metrics(self.folder / "metrics.jsonl")
        return any(line["step"] == self.done and "knn_accuracy" in line for line in lines)

    def _save_is_due(self, last_save: float) -> bool:
        output, recipe = self.config.output, self.config.recipe
        epoch, rest = divmod(self.done, self.engine.steps_per_epoch)
        if not rest and any(epoch == end for _, end in recipe.stages[:-1]):
            return True  # of a stage: the next step replaces the networks
        if output.checkpoint_every and self.done % output.checkpoint_every == 0:
            return True
        minutes = (time.perf_counter() - last_save) / 60
        return bool(output.checkpoint_minutes) and minutes >= output.checkpoint_minutes

    def _try_save(self, log: RunLog) -> bool:
        """Save; a failure is told, not raised: the older checkpoints are still there."""
        parts = {name: network.state_dict() for name, network in networks(self.method).items()}
        parts["optimizer"] = self.engine.optimizer.state_dict()
        state = {
            "identity": self.identity,
            "stage": self.engine.stage,
            "config": to_dict(self.config),
            "precision": self.precision,
            "skipped_steps": self.skipped,
            "bad_in_a_row": self._bad_in_a_row,
            "log_window": asdict(log.window),
        }
        root, keep = self.folder / CHECKPOINTS, self.config.output.keep
        try:
            checkpoints.save(root, self.done, parts, state, keep=keep)
        except CheckpointWriteError as error:
            say(f"warning: checkpoint of step {self.done} not written: {error}")
            return False
        self._saved_at = self.done
        return True

    def _write_pictures(self) -> None:
        """loss.png and reconstruction.png; what goes wrong is told, the run is done."""
        count = self.config.output.pictures
        try:
            write_loss_chart(self.folder)
            if count and self.method.target == "pixels":
                write_reconstructions(
                    self.folder / "reconstruction.png",
                    self.method,
                    self.source,
                    count=count,
                    mask_ratio=self.config.recipe.mask_ratio,
                    seed=self.config.recipe.seed,
                    crop_ratio=self.config.eval.crop_ratio,
                    on_bad=self._report_bad_image,
                )
        except (OSError, ValueError) as error:
            say(f"warning: pictures not written: {error}")

    def _report_bad_image(self, name: str, reason: str) -> None:
        """Name each unreadable image once, whoever met it."""
        if name not in self._bad_images:
            say(f"warning: image skipped: {name}: {reason}")
        self._bad_images.add(name)


def _refuse_many_processes() -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1":
        raise ValueError(
            f"pretrain: started as one of several processes (WORLD_SIZE is {world}), but it trains "
            "in one process; start it without torchrun"
        )
