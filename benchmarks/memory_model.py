"""Memory of a step of RC-MAE by mode, not run: ``python benchmarks/memory_model.py``.

What autograd keeps is counted, on tensors that have shapes and no memory, for any model and batch;
so are weights, moments and the teacher. The peak is a prediction: these and the largest tensors of
a block's backward pass. What a GPU's allocator adds by fragments is not in it.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[1]))  # last: an installed fastmim comes first

import torch
from peers import Case
from peers.plain import Plain, PlainBlock, PlainMAE
from peers.plain import pixels as target_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmim import create_model
from fastmim.models import MODELS
from fastmim.nn.layers import MEMORY_MODES
from fastmim.ops import masks_from_shuffle, num_keep

_GB = 1e9


class Footprint(NamedTuple):
    """Bytes of a step under bf16 autocast with float32 weights.

    Attributes:
        fixed: Weights, their moments, the teacher.
        gradients: Of all weights.
        saved: Kept for the backward pass, all images together.
        transient: The largest tensors of the backward pass of one block.
    """

    fixed: int
    gradients: int
    saved: int
    transient: int

    @property
    def peak(self) -> int:
        """At the end of the forward pass, or with all gradients at the end of the backward pass."""
        return self.fixed + max(self.saved + self.transient, self.gradients)


def kept(forward: Callable[[], Tensor], exclude: Iterator[Tensor]) -> int:
    """Bytes that autograd keeps, each storage once, without ``exclude``; of tensors of any kind."""
    known = {tensor.untyped_storage()._cdata for tensor in exclude}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    total = sum(storage.nbytes() for storage in storages.values())
    del loss
    return total


def footprints(model: str, batch: int) -> Iterator[tuple[str, Footprint]]:
    """Of the step in plain PyTorch with SDPA, then of fastmim's in every mode."""
    with FakeTensorMode():
        yield "eager + SDPA", _footprint(_plain(model), model, batch)
        for memory in MEMORY_MODES:
            for dtype in (None, torch.bfloat16):
                name = f"{memory}, {'bf16' if dtype else 'fp32'} residual"
                yield name, _footprint(_ours(model, memory, dtype), model, batch)


Step = tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]


def _sizes(model: str) -> dict[str, int]:
    return Case(model, 1, "rc_mae", "bf16", "cpu", "uint8").sizes


def _visible(model: str) -> int:
    sizes = _sizes(model)
    return num_keep((sizes["img_size"] // sizes["patch_size"]) ** 2, 0.75)


def _plain(model: str) -> Step:
    sizes = _sizes(model)
    layers = dict(block=PlainBlock, attend=Plain.attend, norm=nn.LayerNorm)
    student = PlainMAE(**sizes, target="pixels", **layers)

    def loss(imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        pixels = imgs.float()
        pred = student(pixels, ids_shuffle[:, : _visible(model)], ids_shuffle.argsort(dim=1))
        target = target_of(pixels, sizes["patch_size"])
        pixel = (pred.float() - target).square().mean(dim=-1)
        consistency = (pred.float() - torch.empty_like(pred).float()).square().mean(dim=-1)
        return (pixel + consistency).sum()

    return student, loss


def _ours(model: str, memory: str, residual_dtype: torch.dtype | None) -> Step:
    student = create_model(model, norm_pix_loss=True, memory=memory, residual_dtype=residual_dtype)

    def loss(imgs: Tensor, ids_shuffle: Tensor) -> Tensor:
        masks = masks_from_shuffle(ids_shuffle, _visible(model))
        pred = student.predict(imgs, masks)
        return student.loss(pred, imgs, masks, teacher_pred=torch.empty_like(pred)).total

    return student, loss


def _footprint(step: Step, model: str, batch: int) -> Footprint:
    student, loss = step
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    every = sum(p.numel() for p in student.parameters())
    sizes = _sizes(model)
    side, patches = sizes["img_size"], (sizes["img_size"] // sizes["patch_size"]) ** 2
    imgs = torch.zeros(batch, 3, side, side, dtype=torch.uint8)
    ids_shuffle = torch.arange(patches).expand(batch, -1).contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        saved = kept(lambda: loss(imgs, ids_shuffle), [imgs, *student.parameters()])
    width, tokens = sizes["decoder_embed_dim"], patches + 1
    # Of the decoder's MLP: the output of fc1 made again, its gradient, and that of the activation.
    transient = 3 * batch * tokens * 4 * width * 2
    return Footprint(4 * every * 2 + 8 * trained, 4 * trained, saved, transient)


def main() -> int:
    """Print the table; nothing is computed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="mae_vit_large_patch16")
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    print(f"RC-MAE {options.model}, batch {options.batch}, bf16 autocast: counted, peak predicted")
    print(f"{'':28} {'saved MB/img':>13} {'fixed GB':>9} {'predicted peak GB':>18} {'of eager':>9}")
    first = None
    for name, footprint in footprints(options.model, options.batch):
        first = first or footprint.peak
        per_image = footprint.saved / options.batch / 1e6
        print(
            f"{name:28} {per_image:13.1f} {footprint.fixed / _GB:9.1f} "
            f"{footprint.peak / _GB:18.1f} {footprint.peak / first:8.0%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
