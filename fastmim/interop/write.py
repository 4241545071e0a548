"""Writers of the layouts that convert knows."""

import json
from collections.abc import Callable
from pathlib import Path

import safetensors.torch

from fastmim.interop.authors import authors_files, save_pth
from fastmim.interop.describe import Description
from fastmim.interop.hf import hf_config, to_hf
from fastmim.interop.layouts import Contents, State
from fastmim.interop.names import AUTOENCODER, CLASSIFIER, ENCODER
from fastmim.interop.read import METADATA
from fastmim.interop.resume import write_run


def _write_fastmim(
    out: Path, contents: Contents, description: Description, data: str | None
) -> list[Path]:
    if data is not None or not out.suffix:
        return [write_run(out, contents, description, data)]
    _expect_suffix(out, ".safetensors")
    (state,) = contents.networks.values()
    _save_safetensors(out, state, {METADATA: json.dumps(description.header(), sort_keys=True)})
    return [out]


def _write_authors(
    out: Path, contents: Contents, description: Description, data: str | None
) -> list[Path]:
    _expect_suffix(out, ".pth")
    files = authors_files(out, contents, description)
    for path, file in files.items():
        save_pth(path, file)
    return list(files)


def _write_timm(
    out: Path, contents: Contents, description: Description, data: str | None
) -> list[Path]:
    _expect_suffix(out, ".safetensors")
    if description.sizes.has_decoder:
        raise ValueError("convert: timm's ViT has no decoder; pass --encoder-only")
    (state,) = contents.networks.values()
    _save_safetensors(out, state, {"format": "pt"})
    return [out]


def _write_hf(
    out: Path, contents: Contents, description: Description, data: str | None
) -> list[Path]:
    sizes, size = description.sizes, description.img_size
    if sizes.kind not in (AUTOENCODER, ENCODER, CLASSIFIER) or sizes.pool == "mean":
        raise ValueError(
            f"convert: Hugging Face has no model of {sizes.kind}"
            f"{' with mean pooling' if sizes.pool else ''}; pass --encoder-only, or another --to"
        )
    if size is None or size[0] != size[1]:
        raise ValueError("convert: Hugging Face's position tables are of square images")
    if description.num_heads is None or (sizes.has_decoder and not description.decoder_num_heads):
        raise ValueError("convert: the file does not tell the number of heads; pass --model NAME")
    config = hf_config(
        sizes,
        size[0],
        description.num_heads,
        description.decoder_num_heads,
        description.norm_pix_loss,
    )
    out.mkdir(exist_ok=True)
    (state,) = contents.networks.values()
    weights, settings = out / "model.safetensors", out / "config.json"
    _save_safetensors(weights, to_hf(state), {"format": "pt"})
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return [weights, settings]


WRITERS: dict[str, Callable[[Path, Contents, Description, str | None], list[Path]]] = {
    "fastmim": _write_fastmim,
    "authors": _write_authors,
    "timm": _write_timm,
    "hf": _write_hf,
}


def _expect_suffix(out: Path, suffix: str) -> None:
    if out.suffix != suffix:
        raise ValueError(f"convert: expected --out to end in {suffix}, got {out.name}")


def _save_safetensors(path: Path, state: State, metadata: dict[str, str]) -> None:
    """Written aside, then renamed: no half file is ever under the name."""
    # Tensors of one file may share memory, which safetensors refuses.
    data = safetensors.torch.save({n: t.clone().contiguous() for n, t in state.items()}, metadata)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
