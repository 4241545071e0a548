"""Features of whole images: nothing is masked, nothing is random, nothing of the model changes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastmim.nn import Encoder

Batches = Iterable[tuple[Tensor, Tensor | None, Tensor]]  # (imgs, labels, indices)


class FeatureBank(NamedTuple):
    """One feature vector per image.

    Attributes:
        features: (n, D), float32, on the CPU.
        labels: (n,), int64, -1 where an image has none; None if the images have no labels.
        indices: (n,), int64, position of each image in its source.
    """

    features: Tensor
    labels: Tensor | None
    indices: Tensor


def extract_features(
    encoder: Encoder,
    batches: Batches,
    *,
    pool: Literal["mean", "cls"] = "mean",
    autocast: torch.dtype | None = None,
) -> FeatureBank:
    """Encode whole images, one vector each: ``mean over the patch tokens`` or the cls token.

    Every patch is seen, so the result depends on the weights and the pixels only. Each module's
    training flag and the random state are as before when it returns or raises.

    Args:
        encoder: The model; a masked autoencoder serves as its encoder.
        batches: (imgs (b, C, H, W), labels (b,) or None, indices (b,)), as ``eval_batches`` of
            ``fastmim.data`` yields. Images are moved to the encoder's device.
        pool: ``"mean"`` of the patch tokens after the final norm, as MAE fine-tunes
            (arXiv:2111.06377, appendix A); or the ``"cls"`` token.
        autocast: Compute in torch.bfloat16 or torch.float16. Default: as the weights are.

    Raises:
        ValueError: If there are no images, ``pool`` is unknown or the images do not fit the model.
    """
    if pool not in ("mean", "cls"):
        raise ValueError(f"extract_features: expected pool 'mean' or 'cls', got {pool!r}")
    device = next(encoder.parameters()).device

    @torch.inference_mode()
    def encode(imgs: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            features = encoder.encode(imgs.to(device))
        pooled = features.cls if pool == "cls" else features.patch_tokens.float().mean(dim=1)
        return pooled.float().cpu()

    with evaluation_mode(encoder):
        return _bank("extract_features", ((encode(imgs), *rest) for imgs, *rest in batches))


def pixel_features(batches: Batches) -> FeatureBank:
    """Pixels as features: ``flatten(x - mean(x))`` with the mean of the image itself.

    What a method has to beat. Less its mean, the cosine of two images is their correlation, which
    neither brightness nor contrast changes.

    Args:
        batches: (imgs (b, C, H, W), labels (b,) or None, indices (b,)). The bank holds
            4 * C * H * W bytes an image: use small images or few of them.

    Raises:
        ValueError: If there are no images.
    """

    def centred(imgs: Tensor) -> Tensor:
        pixels = imgs.flatten(1).float()
        return (pixels - pixels.mean(dim=1, keepdim=True)).cpu()

    return _bank("pixel_features", ((centred(imgs), *rest) for imgs, *rest in batches))


def labelled(function: str, name: str, bank: FeatureBank) -> tuple[Tensor, Tensor]:
    """Features (n, D), float32, and classes (n,) of the images that have a label.

    Args:
        function: Named in errors.
        name: Of the bank, likewise.
        bank: Images with label -1 are left out.

    Raises:
        ValueError: If no image has a label, or features are not finite.
    """
    features, labels, _ = bank
    if labels is None or not bool((labels >= 0).any()):
        raise ValueError(
            f"{function}: the {name} has no labels; put the images into one sub-folder a class, "
            "or add a label column to the parquet file"
        )
    labels = labels.to(features.device)
    if bool((labels < 0).any()):
        features, labels = features[labels >= 0], labels[labels >= 0]
    if not bool(features.isfinite().all()):
        raise ValueError(f"{function}: the {name} holds features that are not finite")
    return features.float(), labels


def check_widths(function: str, bank: Tensor, queries: Tensor) -> None:
    """Refuse features (n, D) and (m, E) of which D is not E.

    Raises:
        ValueError: Names both widths.
    """
    if queries.shape[1] != bank.shape[1]:
        raise ValueError(
            f"{function}: expected bank and queries of one width, got {bank.shape[1]} and "
            f"{queries.shape[1]}; extract both with the same model"
        )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """``module.eval()`` inside the block; after it, every sub-module's own flag as it was."""
    flags = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in flags:
            part.training = training


def _bank(function: str, rows: Iterable[tuple[Tensor, Tensor | None, Tensor]]) -> FeatureBank:
    features, labels, indices = [], [], []
    for vectors, names, positions in rows:
        features.append(vectors)
        labels.append(names)
        indices.append(positions)
    if not features:
        raise ValueError(f"{function}: expected at least one batch of images, got none")
    # cat outside inference mode: the result may be trained on, as a linear probe does.
    return FeatureBank(
        torch.cat(features),
        None if labels[0] is None else torch.cat(labels).cpu(),
        torch.cat(indices).cpu(),
    )
