"""Suite ``distillation``: what a step of a self-distillation method costs beside one of RC-MAE.

RC-MAE (arXiv:2210.02077) claims less memory and time than other methods with a teacher, because
both of its networks see a quarter of the patches. This measures the kind of table in which it does
so. Every method is in plain PyTorch with SDPA, fused AdamW and ``_foreach_lerp_`` for the EMA, so
that methods are compared and not implementations; fastmim's RC-MAE stands beside them.

MAE, RC-MAE, dBOT and SdAE are the whole methods of ``peers/plain.py``. **iBOT, MSN and BootMAE are
step-cost models**: the compute graph of a step with the papers' views, token counts and heads, on
random images and for random masks; augmentation, centring, temperature schedules and regularisers
are left out, and nothing is learnt. They are written from the papers alone; where these give no
number, "assumed" is written below.

- iBOT (Zhou et al., ICLR 2022, arXiv:2111.07832): 2 global views of 224 and 10 local ones of 96
  pixels. Student: 2 x (196 + cls) tokens, masked patches replaced by a mask token, and
  10 x (36 + cls). Teacher, without gradient: 2 x (196 + cls). Head, shared by cls and patches: MLP
  of 3 layers, hidden width 2048, bottleneck 256, normalised, then 8192 outputs. It sees every token
  of the global views and the cls token of the local ones (assumed: all patches, masked or not, as
  the loss is a sum over masked positions). Cross-entropy between views (cls) and within (patches).
- MSN (Assran et al., ECCV 2022, arXiv:2204.07141): 1 anchor of 224 pixels from which patches are
  dropped, 0.15 of them for ViT-S, 0.3 for ViT-B, 0.7 for ViT-L (for other sizes 0.15 is assumed),
  and 10 focal views of 96 pixels, whole. Target, without gradient: 1 x (196 + cls). Head on the cls
  token: 3 layers with batch normalisation, hidden width 2048, output 256; cosine similarity with
  1024 prototypes.
- BootMAE (Dong et al., ECCV 2022, arXiv:2207.07116): the student's encoder sees a quarter of the
  patches, the momentum encoder the whole image. A regressor of pixels and a predictor of features,
  each of 2 blocks (assumed: of the encoder's width, with self-attention over all tokens, then
  cross-attention to features of the first and of the last block of the encoder respectively).
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from measure import Lost, Timing, attempt, in_fresh_process, interleave, judged
from peers import Case, FastMIM, StepProgram
from peers.base import autocast, normalized
from peers.plain import Plain, PlainEncoder, gather, masked_mse, pixels, standardized
from roofline import (
    ITEM,
    Blocks,
    Network,
    Part,
    Product,
    Traffic,
    parts_of,
    step_parts,
    step_total,
    update_bytes,
)
from steps import (
    TOLERANCE,
    Memory,
    Timed,
    errors_of,
    footprint_fields,
    footprint_of,
    in_groups,
    ratio,
    truth_of,
)
from suite import CHECKS, FLOOR, TIMES, Column, Options, images_per_second
from torch import Tensor, nn

NAME = "distillation"
SHAPES = {
    "tiny32": ("mae_vit_micro_patch4", 8),
    "small224": ("mae_vit_small_patch16_dec512d8b", 2),
    "base224": ("mae_vit_base_patch16", 64),
    "large224": ("mae_vit_large_patch16", 32),
}
_SMOKE_BATCH = 1
DEFAULT = {"cpu": ["small224"], "cuda": ["base224", "large224"]}
# fmt: off
COLUMNS: list[Column] = [
    ("shape", "shape", ""), ("method", "method", ""), ("program", "kernel_provider", ""),
    ("dtype", "dtype", ""), ("batch", "x_value", "d"), ("student tokens", "student_tokens", "d"),
    ("teacher tokens", "teacher_tokens", "d"), *TIMES, ("img/s", "images_per_second", ".2f"),
    *FLOOR[1:], ("MFU %", "mfu_percent", ".0f"), ("time / RC-MAE", "time_over_rc_mae", ".2f"),
    ("saved MB/img", "saved_mb_per_image", ".1f"), ("saved / RC-MAE", "saved_over_rc_mae", ".2f"),
    ("peak GiB", "peak_memory_gib", ".2f"), *CHECKS,
]
# fmt: on
WORDS: dict[str, list[str]] = {}
_LOCAL_VIEWS, _LOCAL_SHARE = 10, 96 / 224  # of the side of a global view
_PROTOTYPES = 1024
_MSN_DROPPED = {768: 0.3, 1024: 0.7}  # of the anchor's patches, by width; others 0.15
_INJECTED_BLOCKS = 2


class _StepCost(Plain):
    """Student, EMA teacher and optimizer as in :class:`Plain`, around another graph.

    Both networks have every weight, and the teacher follows at every step, as in RC-MAE.

    Attributes:
        tolerance: Largest error that is right, in float32.
    """

    tolerance = TOLERANCE["fp32"]

    def __init__(self, case: Case) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__(dataclasses.replace(case, method="rc_mae"))

    def network(self, weights: dict[str, Tensor]) -> nn.Module:
        names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
        sizes = {name: self.case.sizes[name] for name in names}
        return self.headed(_ViT(**sizes, **self._layers))

    def headed(self, encoder: "_ViT") -> nn.Module:
        """The encoder with what the method puts on it."""
        raise NotImplementedError

    def loss(self, imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        with autocast(self.case):
            return self.graph(normalized(imgs, self._students[0].dtype), ids_shuffle)

    def graph(self, imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        """The loss, for the masks or the order in which patches are dropped."""
        raise NotImplementedError

    @classmethod
    def tokens_of(cls, case: Case) -> tuple[int, int]:
        """Tokens of an image in the encoders of student and teacher."""
        raise NotImplementedError

    @classmethod
    def needed(cls, case: Case) -> "_Needed":
        """What the graph computes at the least."""
        raise NotImplementedError

    def local_views(self, imgs: Tensor) -> Tensor:
        """(10 B, 3, 96, 96)."""
        side = _local_side(self.case)
        return imgs[:, :, :side, :side].repeat(_LOCAL_VIEWS, 1, 1, 1)


class IBot(_StepCost):
    """iBOT: see the module."""

    name = "ibot"

    def headed(self, encoder: "_ViT") -> nn.Module:
        return _Headed(encoder, _IBotHead(encoder.dim), torch.zeros(1, 1, encoder.dim))

    def graph(self, imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        student, teacher = self.student, self.teacher
        views = imgs.repeat(2, 1, 1, 1)
        masked = (ids_shuffle.argsort(dim=1) < self.num_keep).repeat(2, 1)  # (2 B, N)
        with torch.no_grad():
            target = teacher.head(teacher.encoder.encode(teacher.encoder.embed(views)))
            target = _wide(target).softmax(dim=-1)
        tokens = torch.where(masked[:, :, None], student.extra, student.encoder.embed(views))
        pred = student.head(student.encoder.encode(tokens))
        local = student.encoder.encode(student.encoder.embed(self.local_views(imgs)))
        local = student.head(local[:, :1])
        within = _cross_entropy(pred[:, 1:], target[:, 1:])
        losses = [(within * masked).sum() / masked.sum()]
        cls_targets = target[:, :1].chunk(2)
        losses += [
            _cross_entropy(view, other).mean()
            for view, other in zip(pred[:, :1].chunk(2), reversed(cls_targets), strict=True)
        ]
        losses += [
            _cross_entropy(local, other.repeat(_LOCAL_VIEWS, 1, 1)).mean() for other in cls_targets
        ]
        return torch.stack(losses).mean()

    @classmethod
    def tokens_of(cls, case: Case) -> tuple[int, int]:
        whole = case.num_patches + 1
        return 2 * whole + _LOCAL_VIEWS * _local_tokens(case), 2 * whole

    @classmethod
    def needed(cls, case: Case) -> "_Needed":
        whole, local, b = case.num_patches + 1, _local_tokens(case), case.batch
        encoder, views = _Encoder(case), _LOCAL_VIEWS * case.batch
        layers = [(encoder.dim, 2048), (2048, 2048), (2048, 256), (256, 8192)]
        return _Needed(
            student=[encoder.blocks(2 * b, whole), encoder.blocks(views, local)],
            teacher=[encoder.blocks(2 * b, whole)],
            stems=[encoder.stem(2 * b * (whole - 1)), encoder.stem(views * (local - 1))],
            teacher_stems=[encoder.stem(2 * b * (whole - 1))],
            head=_through(layers, 2 * b * whole + views),
            teacher_head=_through(layers, 2 * b * whole),
            parameters=encoder.parameters + _weights(layers) + encoder.dim,
        )


class Msn(_StepCost):
    """MSN: see the module."""

    tolerance = 1e-3  # normalisation over views that are nearly equal multiplies rounding

    name = "msn"

    def headed(self, encoder: "_ViT") -> nn.Module:
        return _Headed(encoder, _msn_head(encoder.dim), torch.randn(_PROTOTYPES, 256))

    def graph(self, imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        student, teacher = self.student, self.teacher
        with torch.no_grad():
            target = teacher.head(teacher.encoder.encode(teacher.encoder.embed(imgs))[:, 0])
            target = _similarity(target, student.extra).softmax(dim=-1)
        anchor = gather(student.encoder.embed(imgs), ids_shuffle[:, : _anchor_patches(self.case)])
        anchor = student.encoder.encode(anchor)[:, 0]
        focal = student.encoder.encode(student.encoder.embed(self.local_views(imgs)))[:, 0]
        pred = _similarity(student.head(torch.cat([anchor, focal])), student.extra)
        return _cross_entropy(pred, target.repeat(1 + _LOCAL_VIEWS, 1)).mean()

    @classmethod
    def tokens_of(cls, case: Case) -> tuple[int, int]:
        anchor = _anchor_patches(case) + 1
        return anchor + _LOCAL_VIEWS * _local_tokens(case), case.num_patches + 1

    @classmethod
    def needed(cls, case: Case) -> "_Needed":
        anchor, whole, local = _anchor_patches(case), case.num_patches + 1, _local_tokens(case)
        encoder, b, views = _Encoder(case), case.batch, _LOCAL_VIEWS * case.batch
        layers = [(encoder.dim, 2048), (2048, 2048), (2048, 256), (256, _PROTOTYPES)]
        return _Needed(
            student=[encoder.blocks(b, anchor + 1), encoder.blocks(views, local)],
            teacher=[encoder.blocks(b, whole)],
            stems=[encoder.stem(b * anchor), encoder.stem(views * (local - 1))],
            teacher_stems=[encoder.stem(b * (whole - 1))],
            head=_through(layers, b + views),
            teacher_head=_through(layers, b),
            parameters=encoder.parameters + _weights(layers),
        )


class BootMaeStyle(_StepCost):
    """In the style of BootMAE: see the module."""

    name = "bootmae-style"

    def headed(self, encoder: "_ViT") -> nn.Module:
        return _Boot(encoder, self.case.sizes["num_heads"], 3 * self.patch_size**2, self._layers)

    def graph(self, imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        ids_restore = ids_shuffle.argsort(dim=1)
        masked = (ids_restore >= self.num_keep).to(imgs.dtype)
        with torch.no_grad():
            teacher = self.teacher.encoder
            target = standardized(teacher.encode(teacher.embed(imgs))[:, 1:])
        made, features = self.student(imgs, ids_shuffle[:, : self.num_keep], ids_restore)
        loss = masked_mse(made, pixels(imgs, self.patch_size), masked)
        return loss + masked_mse(features, target, masked)

    @classmethod
    def tokens_of(cls, case: Case) -> tuple[int, int]:
        return case.num_keep + 1, case.num_patches + 1

    @classmethod
    def needed(cls, case: Case) -> "_Needed":
        visible, whole, b = case.num_keep + 1, case.num_patches + 1, case.batch
        encoder, layers = _Encoder(case), 2 * _INJECTED_BLOCKS
        dim, masked = encoder.dim, b * (whole - visible)
        crossed = [
            Product(b * whole, dim, dim, 2 * layers),
            Product(b * visible, dim, 2 * dim, layers),
        ]
        heads = [Product(masked, dim, encoder.pixels), Product(masked, dim, dim)]
        injected = Blocks(b, whole, dim, layers)
        return _Needed(
            student=[encoder.blocks(b, visible), injected],
            teacher=[encoder.blocks(b, whole)],
            stems=[encoder.stem(b * (visible - 1))],
            teacher_stems=[encoder.stem(b * (whole - 1))],
            head=[*crossed, *heads],
            teacher_head=[],
            parameters=encoder.parameters
            + injected.parameters
            + _weights([(dim, dim)] * 2 * layers + [(dim, 2 * dim)] * layers)
            + _weights([(dim, encoder.pixels), (dim, dim)]),
            attention=4 * layers * b * whole * visible * dim,
        )


@dataclasses.dataclass(frozen=True)
class _Needed:
    """What a step-cost model computes: its blocks, and the products beside them.

    Attributes:
        attention: FLOPs of attention outside of blocks, in the forward pass.
    """

    student: list[Blocks]
    teacher: list[Blocks]
    stems: list[Product]
    teacher_stems: list[Product]
    head: list[Product]
    teacher_head: list[Product]
    parameters: int
    attention: float = 0.0

    def parts(self, dtype: str) -> list[Part]:
        """Beside products and blocks pixels are read, and the last outputs for the loss."""
        outputs = ITEM[dtype] * sum(p.m * p.n for p in (*self.head[-1:], *self.teacher_head[-1:]))
        read = sum(stem.m * stem.k for stem in (*self.stems, *self.teacher_stems))
        return parts_of(
            self.student,
            self.teacher,
            self.stems,
            [*(p for blocks in self.student for p in blocks.products()), *self.head],
            [
                *self.teacher_stems,
                *(p for blocks in self.teacher for p in blocks.products()),
                *self.teacher_head,
            ],
            Traffic.of(ITEM[dtype], ITEM["fp32"]),
            (read + outputs, outputs, update_bytes(self.parameters, "rc_mae", dtype)),
            self.attention,
        )


class _Encoder:
    """Sizes of a model's encoder."""

    def __init__(self, case: Case) -> None:
        self._net = Network(case.model, "mae", 1)
        self.dim, self.pixels = self._net.encoder.dim, self._net.pixels
        embedding = self.pixels * self.dim + 2 * self.dim
        self.parameters = embedding + self._net.encoder.parameters

    def blocks(self, views: int, tokens: int) -> Blocks:
        return Blocks(views, tokens, self.dim, self._net.encoder.depth)

    def stem(self, patches: int) -> Product:
        return Product(patches, self.pixels, self.dim)


def _through(layers: list[tuple[int, int]], rows: int) -> list[Product]:
    return [Product(rows, k, n) for k, n in layers]


def _weights(layers: list[tuple[int, int]]) -> int:
    return sum(k * n + n for k, n in layers)


class _ViT(PlainEncoder):
    """An encoder that also takes smaller views."""

    @property
    def dim(self) -> int:
        return self.cls_token.shape[2]

    def embed(self, imgs: Tensor) -> Tensor:
        patches = self.patch_embed.proj(imgs).flatten(2).transpose(1, 2)
        return patches + self.pos_embed[:, 1 : 1 + patches.shape[1]]


class _Headed(nn.Module):
    def __init__(self, encoder: _ViT, head: nn.Module, extra: Tensor) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head
        self.extra = nn.Parameter(extra)  # iBOT's mask token, MSN's prototypes


class _IBotHead(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2048), nn.GELU(), nn.Linear(2048, 2048), nn.GELU(), nn.Linear(2048, 256)
        )
        self.last = nn.Parameter(torch.randn(8192, 256))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., 8192)."""
        return F.linear(F.normalize(self.mlp(x), dim=-1), F.normalize(self.last, dim=-1))


def _msn_head(dim: int) -> nn.Module:
    """Biases before a normalisation over the batch would do nothing."""
    return nn.Sequential(
        nn.Linear(dim, 2048, bias=False), nn.BatchNorm1d(2048), nn.GELU(),
        nn.Linear(2048, 2048, bias=False), nn.BatchNorm1d(2048), nn.GELU(), nn.Linear(2048, 256),
    )  # fmt: skip


class _Boot(nn.Module):
    """Encoder, regressor of pixels and predictor of features."""

    def __init__(self, encoder: _ViT, num_heads: int, pixel_values: int, layers: dict) -> None:
        super().__init__()
        self.encoder = encoder
        for name, width in (("regressor", pixel_values), ("predictor", encoder.dim)):
            self.add_module(name, _Injected(encoder.dim, num_heads, width, layers))

    def forward(self, imgs: Tensor, ids_keep: Tensor, ids_restore: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels and features of every patch."""
        encoder = self.encoder
        tokens = gather(encoder.embed(imgs), ids_keep)
        cls_token = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        first = encoder.blocks[0](torch.cat([cls_token, tokens], dim=1))
        latent = encoder.norm(encoder.blocks[1:](first))
        positions = encoder.pos_embed
        made = self.regressor(latent, first, ids_restore, positions)
        return made, self.predictor(latent, latent, ids_restore, positions)


class _Injected(nn.Module):
    """Blocks over all tokens, each followed by cross-attention to features of the encoder."""

    def __init__(self, dim: int, num_heads: int, width: int, layers: dict) -> None:
        super().__init__()
        block, attend, norm = layers["block"], layers["attend"], layers["norm"]
        self.num_heads = num_heads
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.blocks = nn.ModuleList(
            block(dim, num_heads, attend, norm) for _ in range(_INJECTED_BLOCKS)
        )
        self.norms = nn.ModuleList(norm(dim, eps=1e-6) for _ in range(_INJECTED_BLOCKS))
        self.queries = nn.ModuleList(nn.Linear(dim, dim) for _ in range(_INJECTED_BLOCKS))
        self.keys = nn.ModuleList(nn.Linear(dim, 2 * dim) for _ in range(_INJECTED_BLOCKS))
        self.mixed = nn.ModuleList(nn.Linear(dim, dim) for _ in range(_INJECTED_BLOCKS))
        self.head = nn.Linear(dim, width)

    def forward(
        self, latent: Tensor, injected: Tensor, ids_restore: Tensor, positions: Tensor
    ) -> Tensor:
        b, n, d = len(latent), ids_restore.shape[1], latent.shape[2]
        mask_tokens = self.mask_token.to(latent.dtype).expand(b, n + 1 - latent.shape[1], -1)
        patches = gather(torch.cat([latent[:, 1:], mask_tokens], dim=1), ids_restore)
        x = torch.cat([latent[:, :1], patches], dim=1) + positions
        layers = zip(self.blocks, self.norms, self.queries, self.keys, self.mixed, strict=True)
        for block, norm, query, key, mixed in layers:
            x = block(x)
            q = query(norm(x)).view(b, -1, self.num_heads, d // self.num_heads).transpose(1, 2)
            k, v = key(injected).view(b, -1, 2, self.num_heads, q.shape[-1]).permute(2, 0, 3, 1, 4)
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, -1, d)
            x = x + mixed(out)
        return self.head(x[:, 1:])


def _local_side(case: Case) -> int:
    """Pixels of a local view."""
    patch_size = case.sizes["patch_size"]
    return int(case.sizes["img_size"] * _LOCAL_SHARE) // patch_size * patch_size


def _local_tokens(case: Case) -> int:
    return (_local_side(case) // case.sizes["patch_size"]) ** 2 + 1


def _anchor_patches(case: Case) -> int:
    """Visible patches of MSN's anchor."""
    return int(case.num_patches * (1 - _MSN_DROPPED.get(case.sizes["embed_dim"], 0.15)))


def _similarity(x: Tensor, prototypes: Tensor) -> Tensor:
    return _wide(F.normalize(x, dim=-1) @ F.normalize(prototypes, dim=-1).T)


def _cross_entropy(pred: Tensor, target: Tensor) -> Tensor:
    return -(target * _wide(pred).log_softmax(dim=-1)).sum(dim=-1)


def _wide(x: Tensor) -> Tensor:
    """In float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


STEP_COSTS: tuple[type[_StepCost], ...] = (IBot, Msn, BootMaeStyle)
_KINDS = {kind.name: kind for kind in STEP_COSTS}
# Name in the table to the program and to the method of its case.
_COMPARED: dict[tuple[str, str], type[StepProgram]] = {
    **{(kind.name, "step-cost model"): kind for kind in STEP_COSTS},
    **{(method, "plain"): Plain for method in ("dbot", "sdae", "mae", "rc_mae")},
    ("rc_mae", "fastmim"): FastMIM,
}
_PEER = ("rc_mae", "plain")


def describe() -> list[str]:
    methods = dict.fromkeys(method for method, _ in _COMPARED)
    return [
        f"suite {NAME}   cost of a step of {', '.join(methods)}, in plain PyTorch",
        *(f"  {name:10} {model}, batch {batch}" for name, (model, batch) in SHAPES.items()),
    ]


def run(options: Options) -> Iterator[dict]:
    """A row for every method and shape, in the last precision asked for."""
    dtype = options.dtypes[-1]
    for shape, model, batch in options.cases(SHAPES):
        batch = _SMOKE_BATCH if options.smoke else batch
        cases = {
            (method, program): Case(model, batch, _method(method), dtype, options.device.type)
            for method, program in _COMPARED
        }
        footprints: dict[tuple[str, str], Memory] = {key: {} for key in cases}
        for key, case in cases.items():
            options.say(f"{NAME} {shape}: memory of {' '.join(key)}")
            if options.memory:
                footprints[key] = in_fresh_process(_footprint, key, case)
        timings, errors = in_groups(
            footprints, options.device, functools.partial(_timed, shape, cases, options)
        )
        for key, case in cases.items():
            found = errors.get(key, {})
            yield {
                **_row(shape, key, case, timings, footprints[key], footprints[_PEER], options),
                "update_error": found.get("update_error"),
                **judged(timings[key].lost, found.get("error"), _tolerance(key, dtype)),
            }


def _timed(
    shape: str,
    cases: Mapping[tuple[str, str], Case],
    options: Options,
    group: Sequence[tuple[str, str]],
) -> Timed:
    """Timings in turns, and how far each program is off."""
    lost, calls, errors = {}, {}, {}
    for key in group:
        options.say(f"{NAME} {shape}: correctness of {' '.join(key)}")
        made = attempt(_checked, key, cases[key])
        if isinstance(made, Lost):
            lost[key] = Timing(lost=made)
        else:
            calls[key], errors[key] = made
    options.say(f"{NAME} {shape}: timing {len(calls)} programs in turns")
    return lost | interleave(calls, **options.timing()), errors


def _tolerance(key: tuple[str, str], dtype: str) -> float:
    return _KINDS[key[0]].tolerance if key[0] in _KINDS else TOLERANCE[dtype]


def _method(name: str) -> str:
    """Of the case that gives a step-cost model its sizes."""
    return "rc_mae" if name in _KINDS else name


def _footprint(key: tuple[str, str], case: Case) -> dict:
    return footprint_of(_COMPARED[key], case)


def _checked(key: tuple[str, str], case: Case):
    """Steps without end, and the errors of the first.

    Those of a step-cost model are of its graph in float32, against itself in float64. At random
    weights some of its gradients are nearly zero: all count together.
    """
    kind, model = _COMPARED[key], _KINDS.get(key[0])
    truth = attempt(truth_of, model or Plain, case)
    program = kind(case)
    if model is None:
        errors = errors_of(program, case, truth)
    else:
        exact = dataclasses.replace(case, dtype="fp32")
        checked = program if case.dtype == "fp32" else kind(exact)
        errors = errors_of(checked, exact, truth, together=True)
    turns = itertools.cycle(case.batches())
    return lambda: program.step(next(turns)), errors


def _row(
    shape: str,
    key: tuple[str, str],
    case: Case,
    timings: Mapping[tuple[str, str], Timing],
    footprint: Memory,
    peers_footprint: Memory,
    options: Options,
) -> dict:
    method, program = key
    measured = timings[key].row()
    ms = measured["y_value_50"]
    memory = footprint_fields(footprint)
    saved = memory["saved_bytes_per_image"]
    peers_saved = footprint_fields(peers_footprint)["saved_bytes_per_image"]
    faster = ratio(timings[key], timings[_PEER])
    student, teacher = _tokens(method, case)
    total = step_total(_parts(method, case), options.ceilings, case.dtype)
    return dict(
        suite=NAME,
        shape=shape,
        kernel_name=f"{method}_step",
        kernel_provider=program,
        kernel_operation_mode="step",
        model=case.model,
        method=method,
        dtype=case.dtype,
        images=case.images,
        x_name="batch",
        x_value=case.batch,
        student_tokens=student,
        teacher_tokens=teacher,
        **_COMPARED[key].backend(case),
        **measured,
        images_per_second=images_per_second(case.batch, ms),
        **options.against_floor(ms, total.floor, total.bytes, total.flops, case.dtype),
        time_over_rc_mae=None if faster is None else 1 / faster,
        **memory,
        saved_over_rc_mae=saved / peers_saved if saved and peers_saved else None,
    )


def _parts(method: str, case: Case) -> list[Part]:
    """What a step needs by arithmetic."""
    if method in _KINDS:
        return _KINDS[method].needed(case).parts(case.dtype)
    return step_parts(case.model, method, case.batch, case.dtype)


def _tokens(method: str, case: Case) -> tuple[int, int]:
    """Tokens of an image in the encoders of student and teacher."""
    visible, whole = case.num_keep + 1, case.num_patches + 1
    masked = case.num_patches - case.num_keep
    known = {
        "mae": (visible, 0),
        "rc_mae": (visible, visible),
        "dbot": (visible, whole),
        "sdae": (visible, masked + 3),  # three folds, each with a cls token
    }
    return known[method] if method in known else _KINDS[method].tokens_of(case)
