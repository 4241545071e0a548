"""What a training step is to the benchmark, and the peers that fastmim's is compared with.

A peer is a :class:`StepProgram` in ``PEERS``. It does the same mathematics as fastmim from the same
weights, written as well as its library allows; ``match`` holds it to that.
"""

import contextlib
import copy
import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim import create_model
from fastmim.models import MODELS
from fastmim.nn.patch_embed import IMAGENET_MEAN, IMAGENET_STD
from fastmim.nn.pos_embed import sincos_pos_embed
from fastmim.ops import num_keep
from fastmim.train import Recipe

_BATCHES = 4  # distinct inputs that a program goes through in turns


class Batch(NamedTuple):
    """Images of a step, as the loader gives them.

    Attributes:
        imgs: (B, 3, H, W), uint8; or float32, normalised.
        sample_ids: (B,), int64.
        epoch: Pass over the data.
    """

    imgs: Tensor
    sample_ids: Tensor
    epoch: int


@dataclass(frozen=True)
class Case:
    """One training step to be measured.

    Args:
        model: Name for fastmim.create_model.
        batch: Images per step.
        method: mae or rc_mae.
        dtype: fp32, or bf16: autocast with float32 weights. fp64: the truth of ``match``.
        device: cpu or cuda.
        images: uint8, as the loader gives them, or float, normalised beforehand.
    """

    model: str
    batch: int
    method: str
    dtype: str
    device: str
    images: str

    @property
    def sizes(self) -> dict:
        return {"img_size": 224, **MODELS[self.model]}

    @property
    def num_patches(self) -> int:
        return (self.sizes["img_size"] // self.sizes["patch_size"]) ** 2

    @property
    def recipe(self) -> Recipe:
        """MAE's recipe (arXiv:2111.06377, table 8), at the full learning rate from the start."""
        return Recipe(model=self.model, batch_size=self.batch, epochs=1, warmup_epochs=0)

    def weights(self, seed: int) -> dict[str, Tensor]:
        return _weights(self.model, seed)

    def batches(self) -> list[Batch]:
        size = self.sizes["img_size"]
        generator = torch.Generator().manual_seed(0)
        made = []
        for i in range(_BATCHES):
            shape = (self.batch, 3, size, size)
            imgs = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            if self.images == "float":
                imgs = _normalize(imgs, torch.float32)
            ids = torch.arange(self.batch) + i * self.batch
            made.append(Batch(imgs.to(self.device), ids.to(self.device), 0))
        return made


@functools.cache
def _weights(model: str, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_model(model).state_dict()


class StepProgram(ABC):
    """A training step: masks, forward, backward, AdamW, and the teacher's EMA for RC-MAE.

    The student starts from ``case.weights(0)``, the teacher from ``case.weights(1)``: with equal
    weights the consistency term would be zero.
    """

    student: nn.Module

    @abstractmethod
    def __init__(self, case: Case) -> None: ...

    @abstractmethod
    def loss(self, imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        """The loss for given masks, with its graph.

        Args:
            imgs: (B, 3, H, W).
            ids_shuffle: (B, N), int64: the first K patches of each row are visible.
        """

    @abstractmethod
    def step(self, batch: Batch) -> None:
        """All of one optimizer step, masks included."""


class Plain(StepProgram):
    """The step written directly in plain PyTorch 2, at its best.

    Every patch is embedded by the convolution, masks come from argsort, attention is SDPA, the head
    predicts every token, AdamW is fused and the EMA is ``_foreach_lerp_``. Unlike fastmim's it
    looks for no NaN and takes no gradient norm.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        dtype = torch.float64 if case.dtype == "fp64" else torch.float32
        self.student = PlainMAE(**case.sizes).to(case.device, dtype)
        self.teacher = None
        if case.method == "rc_mae":
            self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
            self.teacher.load_state_dict(case.weights(1))
        self.student.load_state_dict(case.weights(0))
        self.num_keep = num_keep(case.num_patches, case.recipe.mask_ratio)
        trained = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        teachers = dict(self.teacher.named_parameters()) if self.teacher else {}
        self._students = list(trained.values())
        self._teachers = [teachers[name] for name in trained if teachers]
        vectors = [p for p in self._students if p.ndim <= 1]
        matrices = [p for p in self._students if p.ndim > 1]
        recipe = case.recipe
        self._gamma = recipe.gamma
        self._optimizer = torch.optim.AdamW(
            [
                dict(params=vectors, weight_decay=0.0),
                dict(params=matrices, weight_decay=recipe.weight_decay),
            ],
            lr=recipe.lr,
            betas=recipe.betas,
            eps=recipe.adam_eps,
            fused=True,
        )

    def loss(self, imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        student = self.student
        if imgs.dtype == torch.uint8:
            imgs = _normalize(imgs, student.cls_token.dtype)
        imgs = imgs.to(student.cls_token.dtype)
        ids_restore = ids_shuffle.argsort(dim=1)
        masked = (ids_restore >= self.num_keep).to(imgs.dtype)  # (B, N)
        with autocast(self.case):
            pred = student(imgs, ids_shuffle, ids_restore, self.num_keep)
            consistent = None
            if self.teacher is not None:
                with torch.no_grad():
                    consistent = self.teacher(imgs, ids_shuffle, ids_restore, self.num_keep)
        loss = _masked_mse(pred, student.target(imgs), masked)
        if consistent is not None:
            loss = loss + self._gamma * _masked_mse(pred, consistent, masked)
        return loss

    def step(self, batch: Batch) -> None:
        noise = torch.rand(len(batch.imgs), self.case.num_patches, device=batch.imgs.device)
        self.loss(batch.imgs, noise.argsort(dim=1)).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._teachers:
            with torch.no_grad():
                torch._foreach_lerp_(self._teachers, self._students, 1 - self.case.recipe.momentum)


class Compiled(Plain):
    """:class:`Plain` with both networks and the loss under torch.compile, in one graph."""

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        self._compiled = torch.compile(super().loss, fullgraph=True)

    def loss(self, imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        return self._compiled(imgs, ids_shuffle)


PEERS: dict[str, type[StepProgram]] = {"plain": Plain, "compiled": Compiled}


def autocast(case: Case) -> contextlib.AbstractContextManager:
    return torch.autocast(case.device, torch.bfloat16, enabled=case.dtype == "bf16")


def _normalize(imgs: Tensor, dtype: torch.dtype) -> Tensor:
    mean, std = (
        torch.tensor(v, dtype=torch.float64, device=imgs.device)[:, None, None]
        for v in (IMAGENET_MEAN, IMAGENET_STD)
    )
    return imgs.to(dtype).mul_((1 / (255 * std)).to(dtype)).sub_((mean / std).to(dtype))


def _masked_mse(pred: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    # Means are taken in the precision of the mask: bf16 predictions are not summed in bf16.
    error = (pred.to(masked.dtype) - target.to(masked.dtype)).square().mean(dim=-1)
    return (error * masked).sum() / masked.sum()


class PlainMAE(nn.Module):
    """MAE (arXiv:2111.06377) with the parameter names of its checkpoints."""

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
    ) -> None:
        super().__init__()
        grid = (img_size // patch_size,) * 2
        self.patch_size = patch_size
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, grid), requires_grad=False)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.blocks = nn.Sequential(*(PlainBlock(embed_dim, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(
            sincos_pos_embed(decoder_embed_dim, grid), requires_grad=False
        )
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_blocks = nn.Sequential(
            *(PlainBlock(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth))
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, 3 * patch_size**2)

    def forward(self, imgs: Tensor, ids_shuffle: Tensor, ids_restore: Tensor, kept: int) -> Tensor:
        """Predict every patch: (B, N, 3 * p * p)."""
        x = self.patch_embed.proj(imgs).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        x = _gather(x, ids_shuffle[:, :kept])
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = self.norm(self.blocks(torch.cat([cls_token, x], dim=1)))

        x = self.decoder_embed(x)
        hidden = self.mask_token.to(x.dtype).expand(len(x), ids_restore.shape[1] - kept, -1)
        patches = _gather(torch.cat([x[:, 1:], hidden], dim=1), ids_restore)
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]

    def target(self, imgs: Tensor) -> Tensor:
        """Pixels of every patch, normalised over the patch: (B, N, 3 * p * p)."""
        b, c, height, width = imgs.shape
        p = self.patch_size
        patches = imgs.reshape(b, c, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1)
        patches = patches.reshape(b, -1, p * p * c)
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()


class PlainBlock(nn.Module):
    """Pre-norm transformer block with SDPA."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).view(b, n, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        x = x + self.attn["proj"](out)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def _gather(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[-1]))
