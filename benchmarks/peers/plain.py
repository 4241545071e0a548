"""The four methods in plain PyTorch 2, at its best, and the same under torch.compile.

Written from the papers: MAE (arXiv:2111.06377), RC-MAE (arXiv:2210.02077), dBOT (arXiv:2209.03917)
and SdAE (arXiv:2208.00449).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.nn.pos_embed import sincos_pos_embed
from peers.base import Attend, Batch, Case, StepProgram, autocast, normalized

_FOLDS = 3  # SdAE
_BETA = 2.0  # dBOT


class Plain(StepProgram):
    """The step written directly in plain PyTorch 2, at its best.

    Every patch is embedded by the convolution, masks come from argsort, attention is SDPA, the head
    predicts every token, AdamW is fused and the EMA is ``_foreach_lerp_``. Unlike fastmim's it
    looks for no NaN and takes no gradient norm.

    Peers that differ in one thing replace one of ``attend``, ``block``, ``norm``, ``network``,
    ``make_optimizer``, ``move_teacher``, ``objective``.
    """

    name = "plain"

    def __init__(self, case: Case) -> None:
        self.case, self.recipe = case, case.recipe
        self.num_patches, self.num_keep = case.num_patches, case.num_keep
        self.patch_size = case.sizes["patch_size"]
        dtype = torch.float64 if case.dtype == "fp64" else torch.float32
        self.student = self.network(case.weights(0)).to(case.device, dtype)
        self.teacher = None
        if case.method != "mae":
            kind = self.network if case.method == "rc_mae" else self.encoder
            self.teacher = kind(case.weights(1)).to(case.device, dtype)
            self.teacher.requires_grad_(False).eval()
        trained = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        self._students = list(trained.values())
        self._teachers = []
        if case.method == "rc_mae":  # dBOT's is frozen, SdAE's moves once an epoch
            teachers = dict(self.teacher.named_parameters())
            self._teachers = [teachers[name] for name in trained]
        self.optimizer = self.make_optimizer()

    def network(self, weights: dict[str, Tensor]) -> nn.Module:
        """Encoder and decoder with these weights."""
        return _loaded(
            PlainMAE(**self.case.sizes, target=self.case.target, **self._layers), weights
        )

    def encoder(self, weights: dict[str, Tensor]) -> nn.Module:
        """The encoder alone with these weights."""
        names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
        sizes = {name: self.case.sizes[name] for name in names}
        return _loaded(PlainEncoder(**sizes, **self._layers), weights)

    @property
    def _layers(self) -> dict:
        return dict(block=self.block, attend=type(self).attend, norm=self.norm)

    @property
    def block(self) -> type[nn.Module]:
        return PlainBlock

    @property
    def norm(self) -> type[nn.Module]:
        return nn.LayerNorm

    @staticmethod
    def attend(qkv: Tensor) -> Tensor:
        """(B, N, 3, H, d) to (B, N, H, d)."""
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def groups(self) -> list[dict]:
        """Parameters of the optimizer: no decay of vectors."""
        vectors = [p for p in self._students if p.ndim <= 1]
        matrices = [p for p in self._students if p.ndim > 1]
        return [
            dict(params=vectors, weight_decay=0.0),
            dict(params=matrices, weight_decay=self.recipe.weight_decay),
        ]

    def make_optimizer(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        return torch.optim.AdamW(
            self.groups(), lr=recipe.lr, betas=recipe.betas, eps=recipe.adam_eps, fused=True
        )

    def move_teacher(self) -> None:
        torch._foreach_lerp_(self._teachers, self._students, 1 - self.recipe.momentum)

    def masks(self, batch: Batch) -> Tensor:
        """(B, N), positions in shuffle order."""
        noise = torch.rand(len(batch.imgs), self.num_patches, device=batch.imgs.device)
        return noise.argsort(dim=1)

    def loss(self, imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        imgs = normalized(imgs, self._students[0].dtype)
        ids_restore = ids_shuffle.argsort(dim=1)
        ids_keep = ids_shuffle[:, : self.num_keep]
        with autocast(self.case):
            pred = self.student(imgs, ids_keep, ids_restore)
            target = None
            if self.teacher is not None:
                with torch.no_grad():
                    target = self.teach(imgs, ids_shuffle, ids_restore)
        return self.objective(pred, target, imgs, ids_shuffle, ids_restore)

    def teach(self, imgs: Tensor, ids_shuffle: Tensor, ids_restore: Tensor) -> Tensor:
        """What the student is compared with, besides pixels."""
        kept = self.num_keep
        if self.case.method == "rc_mae":
            return self.teacher(imgs, ids_shuffle[:, :kept], ids_restore)
        tokens = self.teacher.embed(imgs)
        if self.case.method == "dbot":
            return self.teacher.encode(tokens, final_norm=False)
        tokens = gather(tokens, ids_shuffle[:, kept:])
        folds = tokens.reshape(_FOLDS * len(tokens), -1, tokens.shape[2])
        return self.teacher.encode(folds)[:, 1:]

    def objective(
        self,
        pred: Tensor,
        target: Tensor | None,
        imgs: Tensor,
        ids_shuffle: Tensor,
        ids_restore: Tensor,
    ) -> Tensor:
        """The loss from the predictions of all tokens."""
        method = self.case.method
        masked = (ids_restore >= self.num_keep).to(imgs.dtype)  # (B, N)
        if method == "dbot":
            errors = F.smooth_l1_loss(
                pred.to(imgs.dtype), standardized(target), beta=_BETA, reduction="none"
            )
            weights = F.pad(masked, (1, 0), value=1.0)  # the cls token counts
            return (errors.mean(dim=-1) * weights).sum() / weights.sum()
        if method == "sdae":
            pred = gather(pred, ids_shuffle[:, self.num_keep :]).reshape(target.shape)
            return 1 - F.cosine_similarity(pred.to(imgs.dtype), standardized(target), dim=-1).mean()
        loss = masked_mse(pred, pixels(imgs, self.patch_size), masked)
        if target is not None:
            loss = loss + self.recipe.gamma * masked_mse(pred, target, masked)
        return loss

    def followed(self) -> list[tuple[Tensor, Tensor]]:
        pairs = zip(self._teachers, self._students, strict=True)
        return list(pairs) if self._teachers else []

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._teachers:
            with torch.no_grad():
                self.move_teacher()

    def step(self, batch: Batch) -> None:
        self.loss(batch.imgs, self.masks(batch)).backward()
        self.update()

    def parts(self) -> dict[str, list[tuple[object, str]]]:
        return {
            "masks": [(self, "masks")],
            "embed": [(self.student, "embed")],
            "encoder": [(self.student, "encode")],
            "decoder": [(self.student, "decode")],
            "teacher": [(self, "teach")],
            "loss": [(self, "objective")],
            "update": [(self, "update")],
        }


class Compiled(Plain):
    """:class:`Plain` with both networks and the loss under torch.compile, in one graph."""

    name = "compiled"
    mode: str | None = None

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        torch._dynamo.reset()  # what was compiled for other cases counts towards a limit
        self._compiled = torch.compile(super().loss, fullgraph=True, mode=self.mode, dynamic=False)

    def loss(self, imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        return self._compiled(imgs, ids_shuffle)

    def parts(self) -> dict[str, list[tuple[object, str]]]:
        return {
            "masks": [(self, "masks")],
            "forward": [(self, "loss")],
            "update": [(self, "update")],
        }


class CompiledMaxAutotune(Compiled):
    """:class:`Compiled` with ``mode="max-autotune"``.

    On a GPU every matrix product is timed for the best code, and the step is in CUDA graphs. On a
    CPU Inductor tunes products with constant weights alone, of which training has none.
    """

    name = "compiled-max-autotune"
    mode = "max-autotune"


def masked_mse(pred: Tensor, target: Tensor, masked: Tensor) -> Tensor:
    """Mean over masked patches of the squared error.

    Means are taken in the precision of the mask: bf16 predictions are not summed in bf16.
    """
    error = (pred.to(masked.dtype) - target.to(masked.dtype)).square().mean(dim=-1)
    return (error * masked).sum() / masked.sum()


def pixels(imgs: Tensor, p: int) -> Tensor:
    """Pixels of every patch, normalised over the patch: (B, N, 3 * p * p)."""
    b, c, height, width = imgs.shape
    patches = imgs.reshape(b, c, height // p, p, width // p, p).permute(0, 2, 4, 3, 5, 1)
    return standardized(patches.reshape(b, -1, p * p * c))


def gather(x: Tensor, ids: Tensor) -> Tensor:
    """``out[b, k] = x[b, ids[b, k]]``."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[-1]))


def standardized(x: Tensor) -> Tensor:
    """Each token with mean 0 and unbiased variance 1, in float32 or better."""
    x = x.float() if x.dtype == torch.bfloat16 else x
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt()


def _loaded(network: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    return network


class PlainEncoder(nn.Module):
    """ViT encoder with the parameter names of MAE's checkpoints."""

    def __init__(
        self,
        *,
        img_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        block: type[nn.Module],
        attend: Attend,
        norm: type[nn.Module],
    ) -> None:
        super().__init__()
        self.grid_size = (img_size // patch_size,) * 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = _positions(embed_dim, self.grid_size)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)
        self.blocks = nn.Sequential(
            *(block(embed_dim, num_heads, attend, norm) for _ in range(depth))
        )
        self.norm = norm(embed_dim, eps=1e-6)

    def embed(self, imgs: Tensor) -> Tensor:
        """Tokens of every patch: (B, N, D)."""
        return self.patch_embed.proj(imgs).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]

    def encode(self, tokens: Tensor, *, final_norm: bool = True) -> Tensor:
        """(B, K, D) to (B, K + 1, D), cls token first."""
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        x = self.blocks(torch.cat([cls_token, tokens], dim=1))
        return self.norm(x) if final_norm else x


class PlainMAE(PlainEncoder):
    """MAE with the parameter names of its checkpoints.

    Args:
        target: ``pixels``, ``features`` (SdAE) or ``tokens``, those and the cls token (dBOT).
    """

    def __init__(
        self,
        *,
        target: str,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        block: type[nn.Module],
        attend: Attend,
        norm: type[nn.Module],
        embed_dim: int,
        patch_size: int,
        **encoder,
    ) -> None:
        layers = dict(block=block, attend=attend, norm=norm)
        super().__init__(embed_dim=embed_dim, patch_size=patch_size, **encoder, **layers)
        self.with_cls = target == "tokens"
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = _positions(decoder_embed_dim, self.grid_size)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.decoder_blocks = nn.Sequential(
            *(
                block(decoder_embed_dim, decoder_num_heads, attend, norm)
                for _ in range(decoder_depth)
            )
        )
        self.decoder_norm = norm(decoder_embed_dim, eps=1e-6)
        width = 3 * patch_size**2 if target == "pixels" else embed_dim
        self.head_name = "decoder_predp" if self.with_cls else "decoder_pred"
        setattr(self, self.head_name, nn.Linear(decoder_embed_dim, width))

    def forward(self, imgs: Tensor, ids_keep: Tensor, ids_restore: Tensor) -> Tensor:
        """Predict every patch, (B, N, ...); of ``tokens``, the cls token first."""
        visible = gather(self.embed(imgs), ids_keep)
        return self.decode(self.encode(visible), ids_restore)

    def decode(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """(B, K + 1, D) to predictions of all tokens."""
        x = self.decoder_embed(latent)
        hidden = ids_restore.shape[1] + 1 - x.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), hidden, -1)
        patches = gather(torch.cat([x[:, 1:], mask_tokens], dim=1), ids_restore)
        return self.predict(torch.cat([x[:, :1], patches], dim=1))

    def predict(self, x: Tensor) -> Tensor:
        """Blocks and head of the decoder on all tokens, (B, N + 1, Dd)."""
        x = x + self.decoder_pos_embed
        pred = getattr(self, self.head_name)(self.decoder_norm(self.decoder_blocks(x)))
        return pred if self.with_cls else pred[:, 1:]


class PlainBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, attend: Attend, norm: type[nn.Module]) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attend = attend
        self.norm1 = norm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = norm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, 4 * dim), "fc2": nn.Linear(4 * dim, dim)})

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        qkv = self.attn["qkv"](self.norm1(x)).view(b, n, 3, self.num_heads, -1)
        x = x + self.attn["proj"](self.attend(qkv).reshape(b, n, d))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


def _positions(dim: int, grid_size: tuple[int, int]) -> nn.Parameter:
    return nn.Parameter(sincos_pos_embed(dim, grid_size), requires_grad=False)
