"""The sizes of a network, read off its tensors, and what does not fit them."""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from fastmim.interop.names import (
    AUTOENCODER,
    CLASSIFIER,
    DBOT,
    ENCODER,
    SDAE,
    Sizes,
    published_shapes,
)
from fastmim.train.checkpoint import CheckpointError


def measure(state: Mapping[str, Tensor], method: str | None, path: Path) -> Sizes:
    """Sizes of a network with published names.

    Args:
        state: Its tensors.
        method: Settles what ``decoder_pred`` predicts where the shapes do not.
        path: For messages.

    Raises:
        CheckpointError: If a tensor is missing that a ViT must have; lists the first names.
    """
    for name, ndim in {"cls_token": 3, "pos_embed": 3, "patch_embed.proj.weight": 4}.items():
        if name not in state or state[name].ndim != ndim or 0 in state[name].shape:
            shape = f"of shape {tuple(state[name].shape)}" if name in state else "missing"
            raise CheckpointError(
                f"{path}: unknown layout, {name} is {shape}; its first keys are "
                f"{', '.join(list(state)[:8])}. Expected the names of MAE, RC-MAE, dBOT, SdAE, "
                "timm's ViT or Hugging Face's ViT and ViTMAE"
            )
    width, channels, patch, across = state["patch_embed.proj.weight"].shape
    if patch != across:
        raise CheckpointError(f"{path}: patches of {patch} x {across}, expected square ones")
    classes = _rows(state, "head.weight", None)
    sizes = dict(
        embed_dim=width,
        depth=_count(state, "blocks"),
        patch_size=patch,
        in_chans=channels,
        tokens=state["pos_embed"].shape[1],
        hidden=_rows(state, "blocks.0.mlp.fc1.weight", 4 * width),
    )
    if classes is not None or "fc_norm.weight" in state:
        pool = "mean" if "fc_norm.weight" in state else "cls"
        return Sizes(CLASSIFIER, **sizes, num_classes=classes, pool=pool)
    kind = _kind(state, method, width, patch * patch * channels)
    if kind == ENCODER:
        return Sizes(ENCODER, **sizes)
    narrow = _rows(state, "decoder_embed.weight", 0)
    return Sizes(
        kind,
        **sizes,
        decoder_embed_dim=narrow,
        decoder_depth=_count(state, "decoder_blocks"),
        decoder_hidden=_rows(state, "decoder_blocks.0.mlp.fc1.weight", 4 * narrow),
    )


def _kind(state: Mapping[str, Tensor], method: str | None, width: int, pixels: int) -> str:
    if "decoder_predp.weight" in state:
        return DBOT
    if not any(name.startswith(("decoder_", "mask_token")) for name in state):
        return ENCODER
    out = _rows(state, "decoder_pred.weight", pixels)
    features = out == width and (out != pixels or method == "sdae")
    return SDAE if features else AUTOENCODER


def _rows(state: Mapping[str, Tensor], name: str, default: int | None) -> int | None:
    return state[name].shape[0] if name in state and state[name].ndim else default


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    numbers = [re.match(rf"{prefix}\.(\d{{1,4}})\.", name) for name in state]  # no bomb
    return 1 + max((int(match[1]) for match in numbers if match), default=-1)


def misfits(state: Mapping[str, Tensor], sizes: Sizes) -> tuple[list[str], list[str]]:
    """Names that the network needs and lacks, and names that it has beyond them."""
    wanted = published_shapes(sizes)
    return [n for n in wanted if n not in state], [n for n in state if n not in wanted]


def check_shapes(state: Mapping[str, Tensor], sizes: Sizes, path: Path) -> None:
    """Refuse tensors that contradict each other.

    Raises:
        CheckpointError: Names the first five, with the sizes that the others have.
    """
    wrong = [
        f"{name} is {tuple(state[name].shape)}, expected {shape}"
        for name, shape in published_shapes(sizes).items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if wrong:
        decoder = f", decoder_embed_dim {sizes.decoder_embed_dim}" if sizes.has_decoder else ""
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors do not fit embed_dim {sizes.embed_dim}, patch_size "
            f"{sizes.patch_size}, in_chans {sizes.in_chans}, {sizes.tokens - 1} patches{decoder}: "
            f"{'; '.join(wrong[:5])}{'; ...' if len(wrong) > 5 else ''}"
        )
