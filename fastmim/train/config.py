"""Everything a run can be told. A recipe changes the result; efficiency must not."""

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

OWN_TEACHER = "own"  # in Recipe.teachers; anything else is a path


@dataclass(frozen=True)
class Recipe:
    """What is trained and how: two runs of one recipe, seed and data set give one result.

    Args:
        model: Name for fastmim.create_model, such as rc_vit_base_patch16.
        img_size: Height and width of the training crops in pixels, or one number. Default: that
            of the model.
        norm_pix: Normalise the pixels of each target patch (MAE, RC-MAE).
        mask_ratio: Fraction of patches removed, in (0, 1).
        epochs: Passes over the data set.
        warmup_epochs: Linear warm-up of the learning rate.
        batch_size: Images per optimizer step, over all micro-batches of all processes.
        base_lr: Learning rate per 256 images: lr = base_lr * batch_size / 256.
        min_lr: Where the cosine ends.
        weight_decay: Decoupled decay of matrices; biases and norms have none.
        betas: AdamW's coefficients.
        adam_eps: AdamW's epsilon.
        drop_path: Stochastic depth of the student's last block, in [0, 1).
        clip_grad: Largest global gradient norm; none: no clipping.
        crop_scale: Area of the random crop as a fraction of the image, from and to.
        crop_aspect: Aspect ratio (width : height) of the random crop, from and to.
        hflip: Probability of a horizontal flip.
        gamma: Weight of the teacher's consistency term (RC-MAE).
        momentum: Of the EMA teacher at the start of the run (RC-MAE, SdAE).
        momentum_schedule: cosine: to 1 over the run, after every optimizer step. official: what
            the released code does, restarted every epoch and applied after every micro-batch, so
            that efficiency.micro_batch changes the result (RC-MAE).
        momentum_end: Of the EMA teacher at the end of the run (SdAE).
        momentum_warmup_epochs: Epochs in which the momentum climbs from momentum_start to momentum
            (SdAE).
        momentum_start: Of the EMA teacher at the start of such a warm-up (SdAE).
        folds: Parts into which the masked patches are cut for the teacher; must divide their
            number. 0: the teacher sees the whole image (SdAE).
        cosine_dim: feature: similarity of two tokens. token: what the released code does, of a
            feature along the tokens of a fold (SdAE).
        teacher_update: When the teacher moves (SdAE).
        teacher_every: It moves after every so many epochs or steps only (SdAE).
        teacher_init: own: the teacher starts from random weights of its own. student: from the
            student's (SdAE).
        stage_epochs: Epochs at which stages begin, and the end: [0, 800, 1600] are two stages;
            none: one stage (dBOT).
        stage_depths: Blocks of the student's encoder in each stage; none: those of the model
            (dBOT).
        stage_carry: Keep AdamW's moments and the bias of the patch embedding where a stage begins,
            as the released code does (dBOT).
        teacher_depth: Blocks of the first, random teacher; none: those of the first student (dBOT).
        teachers: Teacher of each stage: own (random at first, then the student of the stage
            before), the folder of a run or checkpoint of fastmim, or a file of the authors, timm
            or Hugging Face as fastmim convert reads it. Stages that are not named have their own
            (dBOT).
        projection: Give the student's head the width of each teacher, so that teachers of another
            width can be used (dBOT).
        seed: Of initial weights, order, crops and masks.
    """

    model: str = "rc_vit_base_patch16"
    img_size: int | tuple[int, int] | None = None
    norm_pix: bool = True
    mask_ratio: float = 0.75
    epochs: int = 800
    warmup_epochs: float = 40
    batch_size: int = 4096
    base_lr: float = 1.5e-4
    min_lr: float = 0.0
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-8
    drop_path: float = 0.0
    clip_grad: float | None = None
    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    gamma: float = 1.0
    momentum: float = 0.996
    momentum_schedule: Literal["cosine", "official"] = "cosine"
    momentum_end: float = 0.99
    momentum_warmup_epochs: int = 0
    momentum_start: float = 0.0
    folds: int = 3
    cosine_dim: Literal["feature", "token"] = "feature"
    teacher_update: Literal["epoch", "step"] = "epoch"
    teacher_every: int = 1
    teacher_init: Literal["own", "student"] = "own"
    stage_epochs: tuple[int, ...] | None = None
    stage_depths: tuple[int, ...] | None = None
    stage_carry: bool = True
    teacher_depth: int | None = None
    teachers: tuple[str, ...] | None = None
    projection: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        bounds, count = self.stage_epochs or (0, self.epochs), len(self.stages)
        depths, teachers = self.stage_depths, self.teachers
        shortest = min((end - begin for begin, end in self.stages), default=0)
        _check(
            "recipe.",
            self,
            mask_ratio=(0 < self.mask_ratio < 1, "between 0 and 1"),
            epochs=(self.epochs >= 1, "at least 1"),
            stage_epochs=(
                (bounds[0], bounds[-1]) == (0, self.epochs) and shortest > 0,
                f"epochs that increase from 0 to recipe.epochs, which is {self.epochs}",
            ),
            stage_depths=(
                depths is None or (len(depths) == count and min(depths) >= 1),
                f"a depth of at least 1 for each of the {count} stages, or null",
            ),
            teacher_depth=(
                self.teacher_depth is None or self.teacher_depth >= 0,
                "at least 0, or null",
            ),
            teachers=(
                teachers is None or (len(teachers) <= count and all(teachers)),
                f"at most one for each of the {count} stages, or null",
            ),
            warmup_epochs=(
                0 <= self.warmup_epochs <= shortest,
                f"between 0 and recipe.epochs, which is {self.epochs}"
                if count == 1
                else f"between 0 and the shortest stage, which has {shortest} epochs",
            ),
            batch_size=(self.batch_size >= 1, "at least 1"),
            base_lr=(0 < self.base_lr < math.inf, "a positive number"),
            min_lr=(0 <= self.min_lr <= self.lr, f"between 0 and the peak of {self.lr:g}"),
            weight_decay=(0 <= self.weight_decay < math.inf, "at least 0"),
            betas=(all(0 <= beta < 1 for beta in self.betas), "two numbers in [0, 1)"),
            adam_eps=(0 < self.adam_eps < math.inf, "a positive number"),
            drop_path=(0 <= self.drop_path < 1, "in [0, 1)"),
            clip_grad=(self.clip_grad is None or self.clip_grad > 0, "positive, or null"),
            gamma=(0 <= self.gamma < math.inf, "at least 0"),
            momentum=(0 <= self.momentum <= 1, "between 0 and 1"),
            momentum_end=(0 <= self.momentum_end <= 1, "between 0 and 1"),
            momentum_warmup_epochs=(
                0 <= self.momentum_warmup_epochs < self.epochs,
                f"at least 0 and fewer than recipe.epochs, which is {self.epochs}",
            ),
            momentum_start=(0 <= self.momentum_start <= 1, "between 0 and 1"),
            teacher_every=(self.teacher_every >= 1, "at least 1"),
            folds=(self.folds >= 0, "at least 0"),
            seed=(0 <= self.seed < 2**63, "in [0, 2**63)"),
        )

    @property
    def lr(self) -> float:
        """Peak learning rate: ``base_lr * batch_size / 256``."""
        return self.base_lr * self.batch_size / 256

    @property
    def stages(self) -> list[tuple[int, int]]:
        """First epoch and end of each stage."""
        return list(itertools.pairwise(self.stage_epochs or (0, self.epochs)))

    def stage_at(self, epoch: int) -> int:
        """Stage of an epoch; that of the last epoch for all after it."""
        return sum(epoch >= begin for begin, _ in self.stages[1:])


@dataclass(frozen=True)
class Efficiency:
    """How fast and in how much memory. Changes rounding at most.

    Args:
        micro_batch: Images per forward pass; must divide the part of recipe.batch_size that a
            process has. Default, and where it is larger: all of it at once.
        precision: Of matrix products. bf16: autocast, with float32 weights, teacher, residual
            stream and losses. auto: bf16 where the processor computes it natively and the model is
            wide enough to gain, else fp32.
        memory: What blocks keep for the backward pass; the others compute it again, with the same
            result. See fastmim.nn.Block.
        residual: Precision of the residual stream; bf16 saves memory and changes rounding.
        teacher_precision: Of the teacher's products, which have no gradient. same: as precision.
        teacher_once: Let the teacher see all micro-batches of a step at once: fewer, larger
            products, and memory for the features of the whole step.
        compile: Put the networks and the loss under torch.compile, around the operators of this
            library. The first step takes a minute more, or a few for large models; so does that of
            a dBOT stage with networks of other sizes.
        workers: Processes that load images for each training process; 0: it does so itself.
        threads: CPU threads of a training process. Default: torch's.
        device: auto: a GPU if there is one, else the CPU. Each of several processes takes a GPU of
            its own.
        parallel: How processes that torchrun starts share the work. ddp: each holds all weights.
            fsdp2: each holds a part of every weight, for models that do not fit otherwise. auto:
            ddp if there are several. none: refuse several.
        timeout_minutes: That a process waits for the others before it gives up; rank 0's kNN
            evaluation and checkpoints are waited for, too.
    """

    micro_batch: int | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    memory: Literal["standard", "lean", "recompute_mlp", "checkpoint"] = "standard"
    residual: Literal["fp32", "bf16"] = "fp32"
    teacher_precision: Literal["same", "fp32", "bf16"] = "same"
    teacher_once: bool = False
    compile: bool = False
    workers: int = 0
    threads: int | None = None
    device: str = "auto"
    parallel: Literal["auto", "ddp", "fsdp2", "none"] = "auto"
    timeout_minutes: float = 30.0

    def __post_init__(self) -> None:
        micro_batch, threads = self.micro_batch, self.threads
        _check(
            "efficiency.",
            self,
            micro_batch=(micro_batch is None or micro_batch >= 1, "at least 1, or null"),
            workers=(self.workers >= 0, "at least 0"),
            threads=(threads is None or threads >= 1, "at least 1, or null"),
            timeout_minutes=(0 < self.timeout_minutes < math.inf, "a positive number"),
        )


@dataclass(frozen=True)
class Data:
    """Where the images are.

    Args:
        path: A folder of images (searched recursively), a parquet file or folder in Hugging Face's
            layout, or "digits", the embedded data set.
        max_bad_fraction: Fraction of unreadable images above which the run stops, at least 8
            images; 0: at the first.
    """

    path: str = "digits"
    max_bad_fraction: float = 1e-3

    def __post_init__(self) -> None:
        fraction = self.max_bad_fraction
        _check("data.", self, max_bad_fraction=(0 <= fraction <= 1, "between 0 and 1"))


@dataclass(frozen=True)
class Evaluation:
    """How good the features are, the sign that pre-training works. Needs labels.

    Args:
        knn_every: Epochs between evaluations during the run; 0: none.
        knn_at_end: Compare teacher, student, the untrained network and raw pixels when the run
            ends, if there are labels.
        bank: Labelled images to search in, or to train a classifier on. Default: the training
            images.
        queries: Labelled images to classify. Default: by kNN every bank image against all others,
            by a classifier a fifth of the bank that it is not trained on.
        limit: Images of the bank used at most; 0: all.
        k: Neighbours.
        temperature: Of the votes.
        pool: Feature of an image: mean of its patch tokens, or the cls token.
        crop_ratio: Crop size divided by the size to which the short side is resized.
    """

    knn_every: int = 0
    knn_at_end: bool = True
    bank: str | None = None
    queries: str | None = None
    limit: int = 10000
    k: int = 20
    temperature: float = 0.07
    pool: Literal["mean", "cls"] = "mean"
    crop_ratio: float = 1.0

    def __post_init__(self) -> None:
        _check(
            "eval.",
            self,
            knn_every=(self.knn_every >= 0, "at least 0"),
            limit=(self.limit >= 0, "at least 0"),
            k=(self.k >= 1, "at least 1"),
            temperature=(0 < self.temperature < math.inf, "a positive number"),
            crop_ratio=(0 < self.crop_ratio <= 1, "above 0 and at most 1"),
        )


@dataclass(frozen=True)
class Output:
    """What is written, and how often.

    Args:
        folder: Runs are written to folder/name.
        name: Of the run. Default: made of preset and method.
        log_every: Optimizer steps between lines of metrics.jsonl.
        checkpoint_every: Optimizer steps between checkpoints; 0: only at the end.
        checkpoint_minutes: Minutes between checkpoints; 0: no such rule.
        keep: Checkpoints kept.
        pictures: Images in reconstruction.png; 0: no picture.
    """

    folder: Path = Path("runs")
    name: str | None = None
    log_every: int = 10
    checkpoint_every: int = 0
    checkpoint_minutes: float = 10.0
    keep: int = 2
    pictures: int = 8

    def __post_init__(self) -> None:
        _check(
            "output.",
            self,
            log_every=(self.log_every >= 1, "at least 1"),
            checkpoint_every=(self.checkpoint_every >= 0, "at least 0"),
            checkpoint_minutes=(self.checkpoint_minutes >= 0, "at least 0"),
            keep=(self.keep >= 1, "at least 1"),
            pictures=(self.pictures >= 0, "at least 0"),
        )


@dataclass(frozen=True)
class Pretrain:
    """Pre-train a Vision Transformer by masked image modelling.

    Args:
        method: rc_mae, mae, dbot or sdae.
        preset: Named recipe that the other options start from; see fastmim presets.
        resume: auto: go on with the run folder if it holds an unfinished run. never: start anew in
            a folder of its own.
        max_bad_steps: Steps in a row with a non-finite loss or gradient after which the run stops.
        stop_after: Stop after this many optimizer steps of the run, as Ctrl-C would; none: never.
        data: Where the images are.
        recipe: What is trained and how; changes the result.
        efficiency: How fast and in how much memory; must not change the result.
        eval: kNN accuracy of the features.
        output: What is written, and how often.
    """

    method: str = "rc_mae"
    preset: str = "digits"
    resume: Literal["auto", "never"] = "auto"
    max_bad_steps: int = 3
    stop_after: int | None = None
    data: Data = field(default_factory=Data)
    recipe: Recipe = field(default_factory=Recipe)
    efficiency: Efficiency = field(default_factory=Efficiency)
    eval: Evaluation = field(default_factory=Evaluation)
    output: Output = field(default_factory=Output)

    def __post_init__(self) -> None:
        stop_after = self.stop_after
        _check(
            "",
            self,
            max_bad_steps=(self.max_bad_steps >= 1, "at least 1"),
            stop_after=(stop_after is None or stop_after >= 1, "at least 1, or null"),
        )


def to_dict(config) -> dict:
    """Nested plain values of a configuration, ready for JSON and YAML."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value):
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def recipe_from_dict(values: dict) -> Recipe:
    """The recipe that :func:`to_dict` was given."""
    return Recipe(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _check(prefix: str, config, **rules: tuple[bool, str]) -> None:
    """Refuse a configuration by the first option that breaks its rule (holds, what it says)."""
    for name, hint in get_type_hints(type(config)).items():
        if get_origin(hint) is Literal:
            words = get_args(hint)
            rules[name] = (getattr(config, name) in words, " or ".join(words))
    for name, (holds, expected) in rules.items():
        if not holds:
            raise ValueError(f"{prefix}{name}: expected {expected}, got {getattr(config, name)}")
