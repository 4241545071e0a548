"""Model sizes by name: ``create_model("mae_vit_base_patch16")``."""

import difflib
from collections.abc import Iterable

from fastmim.nn import MaskedAutoencoder

# width, depth, heads (ViT, arXiv:2010.11929; DeiT, arXiv:2012.12877)
_ENCODERS = {
    "micro": (128, 4, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
# name in published factories: width, depth, heads
_DECODERS = {
    "dec64d2b": (64, 2, 4),
    "dec128d2b": (128, 2, 4),
    "dec256d4b": (256, 4, 8),
    "dec512d2b": (512, 2, 16),
    "dec512d4b": (512, 4, 16),
    "dec512d6b": (512, 6, 16),
    "dec512d8b": (512, 8, 16),
}
_BODIES = {
    "vit_micro_patch4": dict(img_size=32, patch_size=4),
    "vit_micro_patch8": dict(img_size=32, patch_size=8),
    "vit_tiny_patch16": dict(patch_size=16),
    "vit_small_patch16": dict(patch_size=16),
    "vit_base_patch16": dict(patch_size=16),
    "vit_large_patch16": dict(patch_size=16),
    "vit_huge_patch14": dict(patch_size=14),
    "vit_huge_patch16": dict(patch_size=16),
}
# Decoder meant when the name has no suffix, as the authors' factories have it.
_DEFAULT_DECODER = {
    "mae": {"micro": "dec64d2b", "tiny": "dec128d2b"},
    "rc": {"micro": "dec64d2b", "tiny": "dec128d2b", "small": "dec256d4b"},
}
# prefix: what the methods of that name predict
_TARGETS = {
    "mae": {},
    "rc": {},
    "dbot": {"target": "tokens"},
    "sdae": {"target": "features"},
}


def _sizes(body: str, decoder: str) -> dict:
    width, depth, heads = _ENCODERS[body.split("_")[1]]
    decoder_width, decoder_depth, decoder_heads = _DECODERS[decoder]
    return dict(
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        decoder_embed_dim=decoder_width,
        decoder_depth=decoder_depth,
        decoder_num_heads=decoder_heads,
        **_BODIES[body],
    )


def _table() -> dict[str, dict]:
    table = {}
    for prefix, target in _TARGETS.items():
        for body in _BODIES:
            decoders = _DEFAULT_DECODER["mae" if prefix in ("dbot", "sdae") else prefix]
            default = decoders.get(body.split("_")[1], "dec512d8b")
            for name, decoder in {"": default, **{f"_{d}": d for d in _DECODERS}}.items():
                table[f"{prefix}_{body}{name}"] = {**_sizes(body, decoder), **target}
    return table


MODELS: dict[str, dict] = _table()


def did_you_mean(what: str, name: str, known: Iterable[str]) -> str:
    """Message for an unknown name: the nearest known ones, or all if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return f"unknown {what} '{name}'; {hint}"


def create_model(name: str, **kwargs) -> MaskedAutoencoder:
    """Build a masked autoencoder with freshly initialised weights.

    Args:
        name: ``mae_vit_{tiny,small,base,large}_patch16``, ``mae_vit_huge_patch14`` or ``_patch16``,
            ``mae_vit_micro_patch4`` or ``_patch8`` (32-pixel images); the decoder may be named by
            a suffix (``_dec512d8b``, ``_dec256d4b``, ``_dec128d2b``, ``_dec64d2b``, ...). With the
            prefix ``rc_`` the default decoders are those of RC-MAE (ViT-S: 256 wide, 4 deep); with
            ``dbot_`` and ``sdae_`` the network predicts features, as these methods need it.
        **kwargs: Arguments of :class:`fastmim.nn.MaskedAutoencoder`, which win over the table:
            ``img_size`` (a number or (H, W)), ``in_chans``, ``norm_pix_loss``, ...

    Raises:
        ValueError: If the name is unknown; suggests the nearest.
    """
    if name not in MODELS:
        raise ValueError(f"create_model: {did_you_mean('model', name, MODELS)}")
    return MaskedAutoencoder(**{**MODELS[name], **kwargs})
