"""Hugging Face's names for ViT and ViTMAE: query, key and value apart, other words for the rest.

Written are the names of the files on the hub, which every version of transformers reads. Read are
also those that transformers 5 has in memory, and those that it saves ViTMAE's decoder under.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastmim.interop.names import AUTOENCODER, CLASSIFIER, Sizes

_TOP = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "head": "classifier",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
_LAYERS = {"blocks": "vit.encoder.layer", "decoder_blocks": "decoder.decoder_layers"}
_IN_LAYER = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("query", "key", "value")
_APART = {f"attention.attention.{word}": word for word in _QKV}
# transformers 5
_LAYERS_5 = {"vit.layers": "blocks", "decoder.decoder_encoder.layer": "decoder_blocks"}
_IN_LAYER_5 = {"attention.o_proj": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_APART_5 = {f"attention.{word[0]}_proj": word for word in _QKV}

_FROM_TOP = {theirs: ours for ours, theirs in _TOP.items()}
_FROM_LAYERS = {theirs: ours for ours, theirs in _LAYERS.items()} | _LAYERS_5
_FROM_IN_LAYER = {theirs: ours for ours, theirs in _IN_LAYER.items()} | _IN_LAYER_5
_FROM_APART = _APART | _APART_5
_OURS = re.compile(r"(blocks|decoder_blocks)\.(\d+)\.(.+?)\.(weight|bias)")
_THEIRS = re.compile(rf"({'|'.join(map(re.escape, _FROM_LAYERS))})\.(\d+)\.(.+?)\.(weight|bias)")


def is_hf(names: Iterable[str]) -> bool:
    """Whether state_dict keys are Hugging Face's, with or without the prefix ``vit.``."""
    return any(
        re.match(r"(vit\.)?(embeddings|encoder\.layer)\.|decoder\.decoder_", n) for n in names
    )


def from_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published names; names that mean nothing here stay as they are."""
    if not any(name.startswith("vit.") for name in state):  # a bare ViTModel or ViTMAEModel
        state = {
            n if n.startswith(("decoder.", "classifier.")) else f"vit.{n}": t
            for n, t in state.items()
        }
    renamed, apart = {}, {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        match = _THEIRS.fullmatch(name)
        at = match and f"{_FROM_LAYERS[match[1]]}.{match[2]}"
        if name in _FROM_TOP:
            renamed[_FROM_TOP[name]] = tensor
        elif stem in _FROM_TOP:
            renamed[f"{_FROM_TOP[stem]}.{leaf}"] = tensor
        elif match and match[3] in _FROM_IN_LAYER:
            renamed[f"{at}.{_FROM_IN_LAYER[match[3]]}.{match[4]}"] = tensor
        elif match and match[3] in _FROM_APART:
            apart.setdefault(f"{at}.attn.qkv.{leaf}", {})[_FROM_APART[match[3]]] = name
        else:
            renamed[name] = tensor
    for whole, names in apart.items():
        parts = [state[names[word]] for word in _QKV if word in names]
        if len(parts) == len(_QKV) and len({part.shape for part in parts}) == 1:
            renamed[whole] = torch.cat(parts)
        else:  # listed as unexpected
            renamed |= {name: state[name] for name in names.values()}
    return renamed


def to_hf(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names, from published ones."""
    renamed = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        match = _OURS.fullmatch(name)
        if name in _TOP:
            renamed[_TOP[name]] = tensor
        elif stem in _TOP:
            renamed[f"{_TOP[stem]}.{leaf}"] = tensor
        elif match[3] == "attn.qkv":
            for word, part in zip(_QKV, tensor.chunk(3), strict=True):
                renamed[f"{_LAYERS[match[1]]}.{match[2]}.attention.attention.{word}.{leaf}"] = part
        else:
            renamed[f"{_LAYERS[match[1]]}.{match[2]}.{_IN_LAYER[match[3]]}.{leaf}"] = tensor
    return renamed


def hf_config(
    sizes: Sizes, image_size: int, heads: int, decoder_heads: int | None, norm_pix: bool | None
) -> dict[str, Any]:
    """config.json for the weights; LayerNorm's epsilon is the authors' 1e-6."""
    config = dict(
        architectures=["ViTModel"],
        model_type="vit",
        hidden_size=sizes.embed_dim,
        num_hidden_layers=sizes.depth,
        num_attention_heads=heads,
        intermediate_size=sizes.hidden,
        image_size=image_size,
        patch_size=sizes.patch_size,
        num_channels=sizes.in_chans,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        layer_norm_eps=1e-6,
        qkv_bias=True,
    )
    if sizes.kind == CLASSIFIER:
        labels = {str(i): f"LABEL_{i}" for i in range(sizes.num_classes)}
        config |= dict(architectures=["ViTForImageClassification"], id2label=labels)
        config["label2id"] = {label: int(i) for i, label in labels.items()}
    elif sizes.kind == AUTOENCODER:
        config |= dict(
            architectures=["ViTMAEForPreTraining"],
            model_type="vit_mae",
            decoder_hidden_size=sizes.decoder_embed_dim,
            decoder_num_hidden_layers=sizes.decoder_depth,
            decoder_num_attention_heads=decoder_heads,
            decoder_intermediate_size=sizes.decoder_hidden,
            mask_ratio=0.75,
        )
        config |= {} if norm_pix is None else dict(norm_pix_loss=norm_pix)
    return config
