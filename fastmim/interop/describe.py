"""What a file was found to hold, for people and for the header of the file that is written."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastmim.interop.layouts import METHOD_NAMES, Contents
from fastmim.interop.measure import check_shapes, measure, misfits
from fastmim.interop.names import Sizes
from fastmim.interop.positions import grid_of
from fastmim.models import MODELS, did_you_mean
from fastmim.train.checkpoint import CheckpointError

_PREFIXES = {  # own names first
    "mae": ("mae_", "rc_"),
    "rc_mae": ("rc_", "mae_"),
    "dbot": ("dbot_",),
    "sdae": ("sdae_",),
}


@dataclass(frozen=True)
class Description:
    """One network of a file.

    Attributes:
        layout: Of the file, in words.
        method: mae, rc_mae, dbot or sdae, None if the file does not tell.
        network: "student" or "teacher".
        available: Networks of the file.
        sizes: What the shapes say.
        grid: Rows and columns of patches, None if the file does not tell.
        model: Name for ``fastmim.create_model``, None if none is of these sizes.
        num_heads: Heads, which no shape tells: of the model, the file's own account, or the only
            published model of that width; else None.
        decoder_num_heads: Likewise.
        norm_pix_loss: None if the file does not tell.
        epoch: Of the training, counted from 0.
        parameters: Their number.
        missing: Names that the network lacks.
        unexpected: Names beyond the network's.
        left_out: Top-level keys of the file that are not taken over.
        notes: What else the user should know.
    """

    layout: str
    method: str | None
    network: str
    available: list[str]
    sizes: Sizes
    grid: tuple[int, int] | None
    model: str | None
    num_heads: int | None
    decoder_num_heads: int | None
    norm_pix_loss: bool | None
    epoch: int | None
    parameters: int
    missing: list[str]
    unexpected: list[str]
    left_out: list[str]
    notes: list[str]

    @property
    def img_size(self) -> tuple[int, int] | None:
        """Height and width in pixels."""
        return self.grid and tuple(side * self.sizes.patch_size for side in self.grid)

    def header(self) -> dict[str, Any]:
        """JSON values that :func:`fastmim.interop.load_weights` gives back."""
        return {**asdict(self), "img_size": self.img_size}

    def lines(self) -> list[str]:
        """A table, one line a field."""
        sizes, size = self.sizes, self.img_size
        decoder = "none"
        if sizes.has_decoder:
            decoder = (
                f"width {sizes.decoder_embed_dim}, depth {sizes.decoder_depth}, "
                f"heads {_or_unknown(self.decoder_num_heads)}"
            )
        rows = {
            "layout": self.layout,
            "method": METHOD_NAMES.get(self.method, "not told by the file"),
            "network": f"{self.network} (of {', '.join(self.available)}): {sizes.kind}",
            "model": self.model or "none of fastmim's has these sizes",
            "encoder": f"width {sizes.embed_dim}, depth {sizes.depth}, "
            f"heads {_or_unknown(self.num_heads)}, MLP {sizes.hidden}",
            "decoder": decoder,
            "image": f"{f'{size[0]} x {size[1]}' if size else f'{sizes.tokens - 1} patches'}, "
            f"patches of {sizes.patch_size}, {sizes.in_chans} channels",
            "norm_pix_loss": _or_unknown(self.norm_pix_loss),
            "parameters": f"{self.parameters / 1e6:.2f} M",
        }
        if sizes.num_classes is not None:
            rows["head"] = f"{sizes.num_classes} classes, {sizes.pool} pooling"
        if self.epoch is not None:
            rows["epoch"] = f"{self.epoch}, counted from 0"
        lists = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "not taken over": self.left_out,
        }
        rows |= {name: ", ".join(names) for name, names in lists.items() if names}
        lines = [f"{name:15} {value}" for name, value in rows.items()]
        return lines + [f"{'note':15} {note}" for note in self.notes]


def _or_unknown(value: object) -> str:
    return "unknown" if value is None else str(value)


def describe(contents: Contents, network: str, path: Path, model: str | None) -> Description:
    """Describe one network of a file.

    Args:
        contents: Of the file.
        network: "student" or "teacher".
        path: For messages.
        model: Name in ``fastmim.MODELS`` that the sizes must be those of, or None.

    Raises:
        CheckpointError: If tensors contradict each other or the model; names the fields.
    """
    state = contents.networks[network]
    sizes = measure(state, contents.method, path)
    check_shapes(state, sizes, path)
    missing, unexpected = misfits(state, sizes)
    grid = grid_of(state["pos_embed"])
    if model is not None:
        _check_model(model, sizes, path)
    name = model or _model_of(contents, sizes, grid)
    heads, decoder_heads = _heads(contents, sizes, name)
    return Description(
        contents.layout,
        contents.method,
        network,
        list(contents.networks),
        sizes,
        grid,
        name,
        heads,
        decoder_heads,
        contents.norm_pix,
        contents.training.get("epoch"),
        count_parameters(state),
        missing,
        unexpected,
        contents.left_out,
        contents.notes,
    )


def count_parameters(state: dict[str, Tensor]) -> int:
    """Numbers in all tensors."""
    return sum(tensor.numel() for tensor in state.values())


def _fields(sizes: Sizes) -> dict[str, int]:
    names = ["patch_size", "embed_dim", "depth"]
    if sizes.has_decoder:
        names += ["decoder_embed_dim", "decoder_depth"]
    return {name: getattr(sizes, name) for name in names}


def differing(model: str, sizes: Sizes) -> list[str]:
    """Fields in which a file differs from a model of fastmim, as ``depth: file 12, model 24``."""
    known = MODELS[model]
    fields = [
        f"{name}: file {value}, model {known[name]}"
        for name, value in _fields(sizes).items()
        if known[name] != value
    ]
    for width, hidden in (
        (sizes.embed_dim, sizes.hidden),
        (sizes.decoder_embed_dim, sizes.decoder_hidden),
    ):
        if width is not None and hidden != 4 * width:
            fields.append(f"mlp_ratio: file {hidden / width:g}, model 4")
    return fields


def _check_model(model: str, sizes: Sizes, path: Path) -> None:
    if model not in MODELS:
        raise ValueError(f"convert: {did_you_mean('model', model, MODELS)}")
    fields = differing(model, sizes)
    if fields:
        raise CheckpointError(f"{path} is no {model}, they differ in\n  " + "\n  ".join(fields))


def _model_of(contents: Contents, sizes: Sizes, grid: tuple[int, int] | None) -> str | None:
    """By the file's own account if that fits, else the first with these sizes."""
    if contents.model in MODELS and not differing(contents.model, sizes):
        return contents.model
    fitting = [name for name in MODELS if not differing(name, sizes)]
    for prefix in _PREFIXES.get(contents.method, ("mae_", "rc_")):
        for name in sorted(fitting, key=len):
            if name.startswith(prefix):
                return name
    return next(iter(fitting), None)


def _heads(contents: Contents, sizes: Sizes, model: str | None) -> tuple[int | None, int | None]:
    told, decoder_told = contents.heads
    known = MODELS.get(model, {})
    heads = told or known.get("num_heads") or _only("embed_dim", "num_heads", sizes.embed_dim)
    if not sizes.has_decoder:
        return heads, None
    narrow = _only("decoder_embed_dim", "decoder_num_heads", sizes.decoder_embed_dim)
    return heads, decoder_told or known.get("decoder_num_heads") or narrow


def _only(width: str, heads: str, value: int) -> int | None:
    """Heads of all models of that width, if they agree."""
    found = {sizes[heads] for sizes in MODELS.values() if sizes[width] == value}
    return found.pop() if len(found) == 1 else None
