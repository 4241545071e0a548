"""The training loop: steps, checkpoints, signals, and what is left behind at the end."""

import contextlib
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
    check_checkpoint,
    networks,
    run_identity,
    teacher_identity,
)
from fastmim.train.checkpoint import Checkpoint, CheckpointError, CheckpointWriteError
from fastmim.train.config import Pretrain, to_dict
from fastmim.train.distributed import World, rank
from fastmim.train.engine import (
    Engine,
    StepResult,
    Votes,
    check_compiler,
    check_options,
    resolve_device,
    resolve_precision,
)
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
    """A pre-training run, from a configuration; one in each of the processes that train together.

    Everything that can be wrong with the configuration or the data is found here, before any
    training is done. What is wrong in one process is raised in all.

    Args:
        config: The run.

    Raises:
        ValueError, FileNotFoundError: A configuration or data set that cannot be trained on.
        CheckpointError: The run folder holds a run with another recipe, method or data set, or
            only damaged checkpoints.
        PeerError: Another process raised.
    """

    def __init__(self, config: Pretrain) -> None:
        self.config = config
        self.world = World(config.efficiency.timeout_minutes)
        self.done = 0  # optimizer steps
        self.skipped = 0  # of them without an update
        self._bad_in_a_row = 0
        self._window = Window()
        self._saved_at: int | None = None
        self._bad_images: set[str] = set()
        self._untold: list[tuple[str, str]] = []  # bad images that other processes know not of
        with self.world.together():
            self._prepare()
        self._compare_processes()
        efficiency = config.efficiency
        self.engine = Engine(
            self.method,
            config.recipe,
            precision=self.precision,
            teacher_precision=None
            if efficiency.teacher_precision == "same"
            else efficiency.teacher_precision,
            teacher_once=efficiency.teacher_once,
            compiled=efficiency.compile,
            steps_per_epoch=self.loader.sampler.steps_per_epoch,
            world=self.world,
        )
        self.folder = self.world.broadcast(run_folder(config))
        self._resume()

    def _prepare(self) -> None:
        """All that needs no other process."""
        config, recipe, efficiency = self.config, self.config.recipe, self.config.efficiency
        self.world.choose(efficiency.parallel)
        several = self.world.size > 1
        local_rank = int(os.environ.get("LOCAL_RANK", self.world.rank)) if several else None
        self.device = resolve_device(efficiency.device, local_rank)
        if several and self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # NCCL's collectives of objects use the current one
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
        check_options(self.method, recipe, efficiency.teacher_once)
        if efficiency.compile:
            check_compiler(self.device)
        part = max(recipe.batch_size // self.world.size, 1)  # a remainder is the loader's error
        micro_batch = efficiency.micro_batch and min(efficiency.micro_batch, part)
        self.loader = PretrainLoader(
            self.source,
            batch_size=recipe.batch_size,
            micro_batch=micro_batch,
            image_size=image_size,
            seed=recipe.seed,
            augmentation=Augmentation(
                scale=recipe.crop_scale, ratio=recipe.crop_aspect, hflip=recipe.hflip
            ),
            workers=efficiency.workers,
            max_bad_fraction=config.data.max_bad_fraction,
            on_bad=self._report_bad_image,
            pin_memory=self.device.type == "cuda",
            rank=self.world.rank,
            world_size=self.world.size,
        )
        self.evaluation = KNNEvaluation(
            config.eval,
            self.source,
            image_size=image_size,
            channels=self.source.channels,
            workers=efficiency.workers,
            on_bad=self._report_bad_image,
        )
        self.identity = self._identify()

    def _identify(self) -> dict:
        """What a checkpoint must agree in with this run."""
        recipe = self.config.recipe
        identity = run_identity(self.config.method, to_dict(recipe), self.source)
        if self.method.has_stages and recipe.teachers:
            identity["teachers"] = teacher_identity(recipe.teachers)
        # Only a teacher that moves after every micro-batch makes their size change the result.
        if self.method.teacher_follows == "micro_step":
            identity["micro_batch"] = self.loader.micro_batch * self.world.size
        return identity

    def _compare_processes(self) -> None:
        """Refuse to train with processes that were told something else, or see other images."""
        config = to_dict(self.config)
        del config["data"]["path"]  # a disk of each machine
        mine = {"identity": self.identity, "config": config, "precision": self.precision}
        of_rank_0 = self.world.broadcast(mine)
        with self.world.together():
            fields = checkpoints.difference(of_rank_0, mine)
            if fields:
                names = ", ".join(field.partition(":")[0] for field in fields)
                raise ValueError(
                    f"processes {rank()} and 0 train different runs, they differ in {names}; start "
                    "all with the same options and images"
                )

    def _resume(self) -> None:
        """Go on from the newest checkpoint that rank 0 finds."""
        with self.world.together():
            checkpoint = newest_checkpoint(self.folder) if self.world.leads else None
            if checkpoint is not None:
                self._check_run(checkpoint)
        found = self.world.broadcast(checkpoint and (checkpoint.step, checkpoint.state))
        if found is None:
            return
        step, state = found
        self.engine.begin_stage(state.get("stage", 0))
        wanted = self._parts()
        with self.world.together():
            if checkpoint is not None:
                check_checkpoint(checkpoint, wanted)
        for part, tensors in wanted.items():
            self.world.load(tensors, checkpoint and checkpoint.parts[part])
        self.done = self._saved_at = self.loader.start_step = step
        self.skipped = state["skipped_steps"]
        self._bad_in_a_row = state["bad_in_a_row"]
        self._window = Window(**state["log_window"])
        if state["precision"] != self.precision:
            say(
                f"warning: the run was computed in {state['precision']} so far and goes on in "
                f"{self.precision}"
            )

    def _check_run(self, checkpoint: Checkpoint) -> None:
        fields = checkpoints.difference(checkpoint.state.get("identity", {}), self.identity)
        if fields:
            raise CheckpointError(
                f"{checkpoint.path} is of another run, they differ in\n  "
                + "\n  ".join(fields)
                + "\nto start another run pass --output.name or --resume never; to go on with "
                f"this one pass --config {self.folder / 'config.yaml'}"
            )

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor that a checkpoint holds, shards where they are spread."""
        parts = {name: network.state_dict() for name, network in networks(self.method).items()}
        return {**parts, "optimizer": self.engine.optimizer.state_dict()}

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
            f"lr {recipe.lr:.3g}, {self.precision} on {self._describe_processes()}, threads: "
            f"{torch.get_num_threads()}, loading processes: {self.loader.workers or 'none'}\n"
            f"{self.folder}: {start}"
        )

    def _describe_processes(self) -> str:
        if self.world.size == 1:
            return str(self.device)
        part = self.config.recipe.batch_size // self.world.size
        return (
            f"{self.device.type}, {self.world.size} processes ({self.world.parallel}) of {part} "
            "images each"
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
        with contextlib.ExitStack() as stack:
            with self.world.together():
                log = self._open_folder(stack)
            say(self._describe())
            try:
                with collected_signals(once=self.world.size == 1) as received, self.loader:
                    self._train(log, received)
                    saved = self._saved_at == self.done or self._try_save(log)
            finally:
                log.close()
            if self._bad_images:
                say(f"{len(self._bad_images)} images could not be read; others took their place")
            if self.done >= self.engine.total_steps:
                self._gather_networks()
                if self.world.leads:
                    self._write_pictures()
        caught = received[0] if received else None
        return Outcome(self.folder, self.done, self.done >= self.engine.total_steps, caught, saved)

    def _open_folder(self, stack: contextlib.ExitStack) -> RunLog:
        """Hold the run's folder until the stack is left, and begin its log; rank 0 alone writes."""
        total = self.engine.total_steps
        if self.world.leads:
            stack.enter_context(held(self.folder))
            if self.done < total:
                write_config(self.folder, self.config)
        return RunLog(
            Metrics(self.folder / "metrics.jsonl" if self.world.leads else None, self.done),
            self._window,
            device=self.device,
            first_step=self.done,
            total_steps=total,
            steps_per_epoch=self.engine.steps_per_epoch,
            batch_size=self.config.recipe.batch_size,
            log_every=self.config.output.log_every,
        )

    def _train(self, log: RunLog, received: list[signal.Signals]) -> None:
        """Steps until the end or a signal."""
        stop = min(self.engine.total_steps, self.config.stop_after or math.inf)
        stage, stages = self.engine.stage, self.config.recipe.stages
        self._last_save = time.perf_counter()
        stream = iter(self.loader)
        if not self.world.broadcast(self._is_evaluated()):
            self._evaluate(log)
        ends = False
        while self.done < stop and not ends:
            begin, waited = time.perf_counter(), self.loader.wait_seconds
            taught = self.engine.teacher_seconds
            result = self.engine.run_step(
                self.done,
                self._micro_batches(stream),
                self.loader.micro_steps,
                lambda: Votes(bool(received), self._is_late(), bool(self._untold)),
            )
            if self.engine.stage != stage:
                stage = self.engine.stage
                say(f"stage {stage + 1} of {len(stages)}: {self._describe_teacher()}")
            self.done += 1
            self._guard(result)
            if result.votes.tell:
                self._share_bad_images()
            waited = self.loader.wait_seconds - waited
            taught = self.engine.teacher_seconds - taught
            log.step(self.done, result, time.perf_counter() - begin, waited, taught)
            ends = result.votes.stop or self._ends(received)
            if ends:
                break  # a due evaluation is made up for at the resumption
            self._evaluate(log)
            if result.votes.save or self._save_is_due():
                self._try_save(log)
            ends = self._ends(received)

    def _ends(self, received: list[signal.Signals]) -> bool:
        """Whether a signal ends the run before another step; several processes vote in one."""
        return self.world.size == 1 and bool(received)

    def _micro_batches(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """Those of one step, one at a time; keeps in mind which images were bad."""
        for batch in islice(stream, self.loader.micro_steps):
            if self.world.size > 1:
                self._untold += batch.bad
            yield batch

    def _share_bad_images(self) -> None:
        """Count the bad images that any process met: all stop at the same number."""
        everyones = self.world.gather(self._untold)
        self._untold = []
        with self.world.together():
            for bad in everyones:
                self.loader.count_bad(bad)

    def _guard(self, result: StepResult) -> None:
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
        if self._bad_in_a_row >= self.config.max_bad_steps:
            with self.world.together():
                self._give_up(result)

    def _give_up(self, result: StepResult) -> None:
        _, ids = self.loader.sampler.indices(self.done - 1)
        report = self.folder / "nonfinite.json"
        content = {
            "step": self.done,
            "losses": {k: repr(v) for k, v in result.losses.items()},
            "grad_norm": repr(result.grad_norm),
            "lr": result.lr,
            "precision": self.precision,
            "seed": self.config.recipe.seed,
            "sample_ids": ids.tolist(),
            "images": [self.source.name(i) for i in ids.tolist()],
        }
        if self.world.leads:
            report.write_text(json.dumps(content, indent=1))
        raise NonFiniteError(
            f"stopped after {self._bad_in_a_row} steps in a row with a loss or gradient that is "
            "not finite. Parameters, teacher and optimizer were left as before the first of them; "
            f"the last checkpoint is kept. {report} names the images of the last batch. Try a "
            "lower recipe.base_lr, recipe.clip_grad 1.0, or efficiency.precision fp32"
        )

    def _evaluate(self, log: RunLog) -> None:
        """Measure kNN accuracy, if it is due after this step; rank 0 does, the others wait."""
        every = self.config.eval.knn_every
        epoch, rest = divmod(self.done, self.engine.steps_per_epoch)
        if not every or not epoch or rest or epoch % every:
            return
        encoder = self.world.whole(self.method.best_encoder())
        with self.world.together():
            if self.world.leads:
                accuracy = self.evaluation.accuracy(encoder)
                log.metrics.write(self.done, {"epoch": epoch, "knn_accuracy": accuracy})
                say(f"epoch {epoch}: kNN accuracy {100 * accuracy:.2f} %")

    def _is_evaluated(self) -> bool:
        lines = read_metrics(self.folder / "metrics.jsonl")
        return any(line["step"] == self.done and "knn_accuracy" in line for line in lines)

    def _is_late(self) -> bool:
        """Whether the last checkpoint is older than it may be, by this process's clock."""
        minutes = (time.perf_counter() - self._last_save) / 60
        limit = self.config.output.checkpoint_minutes
        return bool(limit) and minutes >= limit

    def _save_is_due(self) -> bool:
        """Whether a checkpoint belongs after this step, whatever the time."""
        output, recipe = self.config.output, self.config.recipe
        epoch, rest = divmod(self.done, self.engine.steps_per_epoch)
        if not rest and any(epoch == end for _, end in recipe.stages[:-1]):
            return True  # of a stage: the next step replaces the networks
        return bool(output.checkpoint_every) and self.done % output.checkpoint_every == 0

    def _try_save(self, log: RunLog) -> bool:
        """Save; a failure is told, not raised: the older checkpoints are still there."""
        parts = {name: self.world.full(tensors) for name, tensors in self._parts().items()}
        with self.world.together():
            saved = not self.world.leads or self._write_checkpoint(parts, log)
        saved = self.world.broadcast(saved)
        self._last_save = time.perf_counter()
        if saved:
            self._saved_at = self.done
        return saved

    def _write_checkpoint(self, parts: dict[str, dict[str, Tensor]], log: RunLog) -> bool:
        state = {
            "identity": self.identity,
            "stage": self.engine.stage,
            "config": to_dict(self.config),
            "precision": self.precision,
            "skipped_steps": self.skipped,
            "bad_in_a_row": self._bad_in_a_row,
            "log_window": asdict(log.window),
        }
        if self.method.has_stages:
            state["teacher"] = self.method.teacher.module.options
        root, keep = self.folder / CHECKPOINTS, self.config.output.keep
        try:
            checkpoints.save(root, self.done, parts, state, keep=keep)
        except CheckpointWriteError as error:
            say(f"warning: checkpoint of step {self.done} not written: {error}")
            return False
        return True

    def _gather_networks(self) -> None:
        """Give rank 0 plain networks, for whatever follows the training."""
        self.method.student = self.world.whole(self.method.student)
        if self.method.teacher is not None:
            self.method.teacher.module = self.world.whole(self.method.teacher.module)

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
