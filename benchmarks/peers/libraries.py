"""MAE of other libraries with fastmim's weights; RC-MAE's teacher is composed around it."""

import functools
import importlib
import sys

import torch
from torch import Tensor, nn

from fastmim.interop.hf import from_hf, to_hf
from peers.base import Case, autocast, load, normalized
from peers.plain import Plain, gather, masked_mse, pixels

_PIXELS = ("mae", "rc_mae")  # what libraries that know MAE can be composed to


class HuggingFace(Plain):
    """``transformers.ViTMAEForPreTraining`` with SDPA, from a configuration: nothing is fetched."""

    name = "hf"
    modules = ("transformers",)
    methods = _PIXELS

    def network(self, weights: dict[str, Tensor]) -> nn.Module:
        transformers = _transformers()
        sizes = self.case.sizes
        config = transformers.ViTMAEConfig(
            hidden_size=sizes["embed_dim"],
            num_hidden_layers=sizes["depth"],
            num_attention_heads=sizes["num_heads"],
            intermediate_size=4 * sizes["embed_dim"],
            decoder_hidden_size=sizes["decoder_embed_dim"],
            decoder_num_hidden_layers=sizes["decoder_depth"],
            decoder_num_attention_heads=sizes["decoder_num_heads"],
            decoder_intermediate_size=4 * sizes["decoder_embed_dim"],
            image_size=sizes["img_size"],
            patch_size=sizes["patch_size"],
            layer_norm_eps=1e-6,
            mask_ratio=self.recipe.mask_ratio,
            norm_pix_loss=True,
            attn_implementation="sdpa",
        )
        transformers.utils.logging.disable_progress_bar()
        network = transformers.ViTMAEForPreTraining.from_pretrained(
            None, config=config, state_dict=to_hf(weights)
        ).train()
        network.vit.embeddings.position_embeddings.requires_grad_(False)  # as in the paper
        network.decoder.decoder_pos_embed.requires_grad_(False)
        return network

    def loss(self, imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        imgs = normalized(imgs, self._students[0].dtype)
        noise = ids_shuffle.argsort(dim=1).to(imgs.dtype)  # its order is ids_shuffle
        with autocast(self.case):
            made = self.student(imgs, noise=noise)
            if self.teacher is None:
                return made.loss
            target = self.teach(imgs, noise)
        return self.objective(made, target)

    def teach(self, imgs: Tensor, noise: Tensor) -> Tensor:
        with torch.no_grad():
            return self.teacher(imgs, noise=noise).logits

    def objective(self, made, target: Tensor) -> Tensor:
        consistency = masked_mse(made.logits, target, made.mask.to(made.loss.dtype))
        return made.loss + self.recipe.gamma * consistency

    def gradients(self) -> dict[str, Tensor | None]:
        trained = {n: p.grad for n, p in self.student.named_parameters() if p.requires_grad}
        return from_hf(trained)

    def parts(self) -> dict[str, list[tuple[object, str]]]:
        student = self.student
        return {
            "masks": [(self, "masks"), (student.vit.embeddings, "random_masking")],
            "embed": [(student.vit.embeddings, "forward")],
            "encoder": [(student.vit, "forward")],
            "decoder": [(student.decoder, "forward")],
            "teacher": [(self, "teach")],
            "loss": [(student, "forward"), (self, "objective")],  # what is left of the forward
            "update": [(self, "update")],
        }


class HuggingFaceCompiled(HuggingFace):
    """:class:`HuggingFace` with the networks and the loss under torch.compile."""

    name = "hf-compiled"

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        torch._dynamo.reset()  # what was compiled for other cases counts towards a limit
        self._compiled = torch.compile(super().loss, dynamic=False)

    def loss(self, imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        return self._compiled(imgs, ids_shuffle)

    def parts(self) -> dict[str, list[tuple[object, str]]]:
        return {
            "masks": [(self, "masks")],
            "forward": [(self, "loss")],
            "update": [(self, "update")],
        }


class Timm(Plain):
    """:class:`Plain` with timm's transformer blocks, whose attention is SDPA."""

    name = "timm"
    modules = ("timm",)

    @property
    def block(self):
        return _timm_block


def _timm_block(dim: int, num_heads: int, attend, norm) -> nn.Module:
    load("timm")
    block = importlib.import_module("timm.models.vision_transformer").Block
    return block(dim, num_heads, qkv_bias=True, norm_layer=functools.partial(norm, eps=1e-6))


class Lightly(Plain):
    """MAE composed of lightly's building blocks, as its documentation does.

    They are ``MaskedVisionTransformerTIMM`` and ``MaskedVisionTransformerDecoderTIMM``; the head
    predicts masked tokens only.
    """

    name = "lightly"
    modules = ("timm", "lightly")
    methods = _PIXELS

    def network(self, weights: dict[str, Tensor]) -> nn.Module:
        load("lightly")
        network = _LightlyMAE(self.case.sizes)
        ours = {
            theirs: weights[_published(theirs)]
            for theirs in network.state_dict()
            if theirs != _UNUSED
        }
        left = network.load_state_dict(ours, strict=False)
        if set(left.missing_keys) - {_UNUSED}:
            raise RuntimeError(f"lightly: no weights for {', '.join(left.missing_keys)}")
        return network

    def gradients(self) -> dict[str, Tensor | None]:
        return {
            _published(n): p.grad for n, p in self.student.named_parameters() if p.requires_grad
        }

    def loss(self, imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        imgs = normalized(imgs, self._students[0].dtype)
        order = torch.nn.functional.pad(ids_shuffle + 1, (1, 0))  # the cls token is at position 0
        keep, masked = order.split([self.num_keep + 1, order.shape[1] - self.num_keep - 1], dim=1)
        with autocast(self.case):
            pred = self.student(imgs, keep, masked)
            target = None
            if self.teacher is not None:
                target = self.teach(imgs, keep, masked)
        return self.objective(pred, target, imgs, masked - 1)

    def teach(self, imgs: Tensor, keep: Tensor, masked: Tensor) -> Tensor:
        with torch.no_grad():
            return self.teacher(imgs, keep, masked)

    def objective(
        self, pred: Tensor, target: Tensor | None, imgs: Tensor, ids_masked: Tensor
    ) -> Tensor:
        wanted = gather(pixels(imgs, self.patch_size), ids_masked)
        loss = torch.nn.functional.mse_loss(pred.to(imgs.dtype), wanted)
        if target is not None:
            distance = torch.nn.functional.mse_loss(pred.to(imgs.dtype), target.to(imgs.dtype))
            loss = loss + self.recipe.gamma * distance
        return loss

    def parts(self) -> dict[str, list[tuple[object, str]]]:
        backbone = self.student.backbone
        return {
            "masks": [(self, "masks")],
            "embed": [(backbone, "preprocess")],
            "encoder": [(backbone, "encode")],
            "decoder": [(self.student, "decode")],
            "teacher": [(self, "teach")],
            "loss": [(self, "objective")],
            "update": [(self, "update")],
        }


class _LightlyMAE(nn.Module):
    def __init__(self, sizes: dict) -> None:
        super().__init__()
        modules = importlib.import_module("lightly.models.modules")
        vit = importlib.import_module("timm.models.vision_transformer").VisionTransformer(
            img_size=sizes["img_size"],
            patch_size=sizes["patch_size"],
            embed_dim=sizes["embed_dim"],
            depth=sizes["depth"],
            num_heads=sizes["num_heads"],
            num_classes=0,
        )
        self.backbone = modules.MaskedVisionTransformerTIMM(vit, weight_initialization="skip")
        self.backbone.mask_token.requires_grad_(False)  # MAE's encoder sees none
        patches, width = vit.patch_embed.num_patches, sizes["decoder_embed_dim"]
        self.decoder = modules.MaskedVisionTransformerDecoderTIMM(
            num_patches=patches,
            embed_dim=width,
            depth=sizes["decoder_depth"],
            num_heads=sizes["decoder_num_heads"],
        )
        self.embed = nn.Linear(sizes["embed_dim"], width)
        self.head = nn.Linear(width, 3 * sizes["patch_size"] ** 2)
        self._functions = importlib.import_module("lightly.models.utils")

    def forward(self, imgs: Tensor, keep: Tensor, masked: Tensor) -> Tensor:
        """Predictions of the masked tokens, (B, N - K, ...); positions count the cls token."""
        return self.decode(self.backbone.encode(imgs, idx_keep=keep), keep, masked)

    def decode(self, latent: Tensor, keep: Tensor, masked: Tensor) -> Tensor:
        f = self._functions
        x = self.embed(latent)
        tokens = f.repeat_token(self.decoder.mask_token, (len(x), self.decoder.sequence_length))
        tokens = f.set_at_index(tokens, keep, x.to(tokens.dtype))
        return self.head(f.get_at_index(self.decoder(tokens), masked))


_UNUSED = "backbone.mask_token"
_RENAMED = {
    "decoder.mask_token": "mask_token",
    "decoder.pos_embed": "decoder_pos_embed",
    "embed.weight": "decoder_embed.weight",
    "embed.bias": "decoder_embed.bias",
    "head.weight": "decoder_pred.weight",
    "head.bias": "decoder_pred.bias",
}


def _published(name: str) -> str:
    """MAE's name of a parameter of ``_LightlyMAE``."""
    if name in _RENAMED:
        return _RENAMED[name]
    if name.startswith("backbone.vit."):
        return name.removeprefix("backbone.vit.")
    return name.replace("decoder.", "decoder_", 1)


def _transformers() -> object:
    """Import ViTMAE; transformers looks for a library `kernels` and would find this checkout's."""
    before = sys.modules.get("kernels")
    sys.modules["kernels"] = None
    try:
        transformers = importlib.import_module("transformers")
        transformers.ViTMAEForPreTraining  # noqa: B018 - imported at the first look
        return transformers
    finally:
        del sys.modules["kernels"]
        if before is not None:
            sys.modules["kernels"] = before
