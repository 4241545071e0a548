"""Every operator but the optimizer's as a problem: ours, plain PyTorch, the truth, and the least.

A problem is known before any tensor is made: what does not fit into memory still has a name, bytes
and FLOPs. Its sizes are those of a training step of RC-MAE.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim import ops
from fastmim.data.augment import Augmentation, crop_box
from fastmim.nn.patch_embed import IMAGENET_MEAN, IMAGENET_STD
from fastmim.ops import OPS, Masks, reference, use_backend

_AREA, _RATIO, _HFLIP = (0.2, 1.0), (3 / 4, 4 / 3), 0.5  # of a crop
_TRIES = 10  # to draw a crop that fits


class Sizes(NamedTuple):
    """A model's step as its operators see it."""

    batch: int
    img_size: int
    patch_size: int
    embed_dim: int
    num_heads: int
    decoder_embed_dim: int
    decoder_num_heads: int
    dtype: torch.dtype

    @property
    def num_patches(self) -> int:
        return (self.img_size // self.patch_size) ** 2

    @property
    def num_keep(self) -> int:
        return self.num_patches // 4

    @property
    def num_masked(self) -> int:
        return self.num_patches - self.num_keep

    @property
    def patch_values(self) -> int:
        return 3 * self.patch_size**2

    @property
    def rows(self) -> int:
        """Tokens of the encoder, over the batch."""
        return self.batch * (self.num_keep + 1)

    @property
    def stored_size(self) -> int:
        """Side of a picture before it is cropped: 256 pixels for 224."""
        return self.img_size * 8 // 7


class Inputs:
    """What a problem gets: the same values for the same sizes, whichever were made before."""

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self._generator = torch.Generator(device).manual_seed(0)

    @property
    def wide(self) -> torch.dtype:
        """Of the residual stream and of parameters, which stay wide under autocast."""
        return torch.promote_types(self.sizes.dtype, torch.float32)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(*shape, generator=self._generator, device=self.device)
        return values.to(dtype or self.sizes.dtype)

    def sample_ids(self) -> Tensor:
        return torch.arange(self.sizes.batch, device=self.device)

    def masks(self) -> Masks:
        s = self.sizes
        return ops.sample_masks(0, 0, self.sample_ids(), s.num_patches, s.num_keep)

    def imgs(self) -> Tensor:
        shape = (self.sizes.batch, 3, self.sizes.img_size, self.sizes.img_size)
        given = dict(dtype=torch.uint8, device=self.device, generator=self._generator)
        return torch.randint(0, 256, shape, **given)

    def pixel_constants(self) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(v, dtype=torch.float64, device=self.device)
            for v in (IMAGENET_MEAN, IMAGENET_STD)
        )
        return 1 / (255 * std), -mean / std

    def smooth_pictures(self) -> Tensor:
        """Uncropped, without noise and far from black and white: nothing is ever clipped."""
        side = self.sizes.stored_size
        coarse = (self.sizes.batch, 3, -(-side // 8), -(-side // 8))
        levels = torch.rand(coarse, generator=self._generator, device=self.device) * 191 + 32
        return F.interpolate(levels, size=(side, side), mode="bilinear").to(torch.uint8)


Call = Callable[[], list[Tensor]]


class Calls(NamedTuple):
    """Programs on inputs that are there.

    Attributes:
        ours: The operator, returning all results that must be right.
        plain: The same in plain PyTorch at its best.
        truth: What both must be: ``plain`` in float64, or bits.
        compiled: Puts ``plain`` under torch.compile, for these very shapes; its gradient too.
    """

    ours: Call
    plain: Call
    truth: Call
    compiled: Callable[[], Call] | None = None


def relative(results: list[Tensor], expected: list[Tensor]) -> float:
    """Largest relative error of a result, by Euclidean norm."""
    ratios = [
        (got.double() - right).norm() / right.norm()
        for got, right in zip(results, expected, strict=True)
    ]
    return float(torch.stack(ratios).max())


def grey_levels(results: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference of two pixels, in grey levels."""
    pairs = zip(results, expected, strict=True)
    return max(float((got.double() - right.double()).abs().max()) for got, right in pairs)


def other_bits(results: list[Tensor], expected: list[Tensor]) -> float:
    """0 if all are equal to the bit, else infinite."""
    return 0.0 if all(map(torch.equal, results, expected)) else math.inf


@dataclass(frozen=True)
class Problem:
    """One operator at one size.

    Attributes:
        operator: Name in OPS; decides which backends can serve.
        make: Makes the inputs, and of them the calls.
        bytes: That must be moved: every input read once, every output written once.
        flops: Of matrix products; 0 where bytes alone bound.
        case: Tells it from the same operator at another size.
        error: Of results against the truth.
        tolerance: Largest error that is right; None: that of the dtype.
        drawn: Whether results are ones that may be drawn; for PyTorch, which draws others than we.
    """

    operator: str
    make: Callable[[Inputs], Calls]
    bytes: int
    flops: int = 0
    case: str = ""
    error: Callable[[list[Tensor], list[Tensor]], float] = relative
    tolerance: float | None = None
    drawn: Callable[[list[Tensor]], bool] | None = None

    def error_of(self, results: list[Tensor], expected: list[Tensor], *, ours: bool) -> float:
        if self.drawn is not None and not ours:
            return 0.0 if self.drawn(results) else math.inf
        return self.error(results, expected)


def problems(s: Sizes, device: torch.device) -> list[Problem]:
    """Every operator at the sizes of one model."""
    width, decoder_width = s.embed_dim // s.num_heads, s.decoder_embed_dim // s.decoder_num_heads
    found = [
        _sample_crops(s),
        _crop_resize(s),
        _sample_masks(s),
        _gather_patches(s),
        _gather_tokens(s),
        _scatter_tokens(s),
        _restore_tokens(s),
        _patch_loss(s),
        _feature_loss(s),
        _scale(s),
        _norm(s),
        _norm_linear(s),
        _bias_gelu(s),
        _bias_gelu_linear(s),
        _attention(s, s.num_keep + 1, s.num_heads, width),
        _attention(s, s.num_patches + 1, s.decoder_num_heads, decoder_width),
    ]
    # Elsewhere the product is PyTorch's own.
    return [*found, _linear(s)] if device.type == "cpu" else found


def _differentiated(
    function: Callable, args: tuple, wanted: list[int], grads: list[Tensor] | None
) -> list[Tensor]:
    """Outputs of a call and the gradients of the arguments ``wanted``."""
    args = [a.detach().requires_grad_() if i in wanted else a for i, a in enumerate(args)]
    out = function(*args)
    outputs = list(out) if isinstance(out, tuple) else [out]
    return [
        *(o.detach() for o in outputs),
        *torch.autograd.grad(outputs, [args[i] for i in wanted], grads),
    ]


def _both_passes(
    ours: Callable,
    plain: Callable,
    args: tuple,
    *,
    wanted: list[int],
    grads: list[Tensor] | None,
) -> Calls:
    """A differentiable operator; ``plain`` takes the arguments of ``ours``."""

    def truth() -> list[Tensor]:
        double = tuple(a.double() if _floats(a) else a for a in args)
        double_grads = None if grads is None else [g.double() for g in grads]
        return _differentiated(plain, double, wanted, double_grads)

    def compiled() -> Call:
        made = torch.compile(plain, dynamic=False)
        return functools.partial(_differentiated, made, args, wanted, grads)

    return Calls(
        functools.partial(_differentiated, ours, args, wanted, grads),
        functools.partial(_differentiated, plain, args, wanted, grads),
        truth,
        compiled,
    )


def _floats(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _by_reference(ours: Call) -> Call:
    """The truth of what is specified to the bit."""

    def truth() -> list[Tensor]:
        with use_backend("reference"):
            return ours()

    return truth


def _sample_crops(s: Sizes) -> Problem:
    """The truth is the loader's own draw, by NumPy."""
    side = s.stored_size
    ranges = Augmentation(scale=_AREA, ratio=_RATIO, hflip=_HFLIP)

    def make(given: Inputs) -> Calls:
        sample_ids = given.sample_ids()

        def ours() -> list[Tensor]:
            return [OPS["sample_crops"](sample_ids, 0, 0, side, side, *_AREA, *_RATIO, _HFLIP)]

        def plain() -> list[Tensor]:
            u = torch.rand(s.batch, 3 + 2 * _TRIES, device=given.device)
            area = side**2 * (_AREA[0] + (_AREA[1] - _AREA[0]) * u[:, 3::2])
            low, high = map(math.log, _RATIO)
            aspect = (low + (high - low) * u[:, 4::2]).exp()
            sides = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=2).round()
            fits = (sides <= side).all(dim=2)
            first = fits.int().argmax(dim=1)
            box = sides.take_along_dim(first[:, None, None], dim=1)[:, 0]
            # Of a square the largest central box with one of the ratios is all of it.
            box = torch.where(fits.any(dim=1, keepdim=True), box, float(side))
            corner = (u[:, 1:3] * (side - box + 1)).floor()
            return [torch.cat([corner, box, u[:, :1] < _HFLIP], dim=1).int()]

        def truth() -> list[Tensor]:
            boxes = [crop_box(side, side, ranges, seed=0, epoch=0, index=i) for i in range(s.batch)]
            return [torch.tensor(boxes, dtype=torch.int32, device=given.device)]

        return Calls(ours, plain, truth)

    def drawn(results: list[Tensor]) -> bool:
        top, left, h, w, flip = results[0].unbind(dim=1)
        inside = (top >= 0) & (left >= 0) & (h > 0) & (w > 0)
        inside &= (top + h <= side) & (left + w <= side)
        return bool((inside & (flip >= 0) & (flip <= 1)).all())

    moved = s.batch * (8 + 5 * 4)
    return Problem("sample_crops", make, moved, error=other_bits, drawn=drawn)


def _crop_resize(s: Sizes) -> Problem:
    """To uint8. PyTorch gets the boxes as numbers, as a host has them that draws them.

    The truth is the interpolation in float64, rounded at its end to grey levels. Ours is rounded
    between the passes too, and promises to be within one.
    """
    side = s.stored_size
    boxes = reference.sample_crops(torch.arange(s.batch), 0, 0, side, side, *_AREA, *_RATIO, _HFLIP)
    size = (s.img_size, s.img_size)

    def make(given: Inputs) -> Calls:
        imgs, there, known = given.smooth_pictures(), boxes.to(given.device), boxes.tolist()
        # PyTorch resizes grey levels as they are on a CPU alone.
        dtype = torch.uint8 if given.device.type == "cpu" else torch.float32
        return Calls(
            lambda: [OPS["crop_resize"](imgs, there, *size, None, None, torch.uint8)],
            lambda: [_resized(imgs, known, size, dtype)],
            lambda: [_resized(imgs, known, size, torch.float64)],
        )

    cut = int((boxes[:, 2].long() * boxes[:, 3]).sum())
    moved = 3 * (cut + s.batch * s.img_size**2)
    return Problem("crop_resize", make, moved, error=grey_levels, tolerance=1.0)


def _resized(
    imgs: Tensor, boxes: list[list[int]], size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Crops of uint8 pictures, resized in a dtype."""
    pixels = []
    for img, (top, left, h, w, flip) in zip(imgs, boxes, strict=True):
        crop = img[None, :, top : top + h, left : left + w].to(dtype)
        out = F.interpolate(crop, size=size, mode="bicubic", antialias=True, align_corners=False)
        pixels.append(out.flip(-1) if flip else out)
    out = torch.cat(pixels)
    return out if dtype == torch.uint8 else out.round_().clamp_(0, 255).to(torch.uint8)


def _sample_masks(s: Sizes) -> Problem:
    n = s.num_patches

    def make(given: Inputs) -> Calls:
        sample_ids = given.sample_ids()

        def ours() -> list[Tensor]:
            return list(ops.sample_masks(0, 0, sample_ids, n, s.num_keep)[:2])

        def plain() -> list[Tensor]:
            ids_shuffle = torch.rand(s.batch, n, device=given.device).argsort(dim=1)
            return [ids_shuffle, ids_shuffle.argsort(dim=1)]

        return Calls(ours, plain, _by_reference(ours))

    def drawn(results: list[Tensor]) -> bool:
        ids_shuffle, ids_restore = results
        in_order = torch.arange(n, device=ids_shuffle.device).expand(s.batch, n)
        every = torch.equal(ids_shuffle.sort(dim=1).values, in_order)
        return every and torch.equal(ids_shuffle.gather(1, ids_restore), in_order)

    return Problem("sample_masks", make, 2 * 8 * s.batch * n, error=other_bits, drawn=drawn)


def _normalized(imgs: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    return imgs.to(dtype) * scale.to(dtype)[:, None, None] + shift.to(dtype)[:, None, None]


def _cut(imgs: Tensor, ids: Tensor, patch_size: int) -> Tensor:
    """(B, K, C, p, p), only the patches asked for."""
    b, c, height, width = imgs.shape
    p = patch_size
    blocks = imgs.view(b, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
    image = torch.arange(b, device=imgs.device)[:, None]
    return blocks[image, ids // (width // p), ids % (width // p)]


def _gather_patches(s: Sizes) -> Problem:
    def make(given: Inputs) -> Calls:
        imgs, ids = given.imgs(), given.masks().ids_keep.contiguous()
        scale, shift = given.pixel_constants()
        constants = dict(scale=scale, shift=shift, dtype=s.dtype)

        def patches(dtype: torch.dtype) -> Tensor:
            return _normalized(_cut(imgs, ids, s.patch_size), scale, shift, dtype).flatten(2)

        return Calls(
            lambda: [ops.gather_patches(imgs, ids, s.patch_size, **constants)],
            lambda: [patches(torch.float32).to(s.dtype)],
            lambda: [patches(torch.float64)],
        )

    moved = s.batch * s.num_keep * s.patch_values * (1 + s.dtype.itemsize)
    return Problem("gather_patches", make, moved)


def _gather_tokens(s: Sizes) -> Problem:
    n, k, d = s.num_patches, s.num_keep, s.embed_dim

    def make(given: Inputs) -> Calls:
        return _both_passes(
            ops.gather_tokens,
            lambda x, ids: x.gather(1, ids[:, :, None].expand(-1, -1, d)),
            (given.normal(s.batch, n, d), given.masks().ids_keep.contiguous()),
            wanted=[0],
            grads=[given.normal(s.batch, k, d)],
        )

    return Problem("gather_tokens", make, s.batch * s.dtype.itemsize * d * (k + k + k + n))


def _scatter_tokens(s: Sizes) -> Problem:
    n, k, d = s.num_patches, s.num_keep, s.embed_dim

    def plain(x: Tensor, ids: Tensor) -> Tensor:
        return x.new_zeros(s.batch, n, d).scatter_(1, ids[:, :, None].expand(-1, -1, d), x)

    def make(given: Inputs) -> Calls:
        return _both_passes(
            lambda x, ids: ops.scatter_tokens(x, ids, n),
            plain,
            (given.normal(s.batch, k, d), given.masks().ids_keep.contiguous()),
            wanted=[0],
            grads=[given.normal(s.batch, n, d)],
        )

    return Problem("scatter_tokens", make, s.batch * s.dtype.itemsize * d * (k + n + k + k))


def _restore_tokens(s: Sizes) -> Problem:
    n, k, d = s.num_patches, s.num_keep, s.decoder_embed_dim

    def plain(x, mask_token, ids_shuffle, ids_restore, pos_embed):
        rows = torch.cat([x[:, 1:], mask_token.expand(s.batch, s.num_masked, -1)], dim=1)
        rows = rows.gather(1, ids_restore[:, :, None].expand(-1, -1, d))
        return torch.cat([x[:, :1], rows], dim=1) + pos_embed

    def make(given: Inputs) -> Calls:
        masks = given.masks()
        x, mask_token = given.normal(s.batch, k + 1, d), given.normal(1, 1, d)
        pos_embed = given.normal(1, n + 1, d)
        return _both_passes(
            lambda x, token, shuffle, restore, pos: ops.restore_tokens(
                x, token, Masks(shuffle, restore, k), pos
            ),
            plain,
            (x, mask_token, masks.ids_shuffle, masks.ids_restore, pos_embed),
            wanted=[0, 1],
            grads=[given.normal(s.batch, n + 1, d)],
        )

    moved = s.batch * s.dtype.itemsize * d * 2 * (n + 1 + k + 1)
    return Problem("restore_tokens", make, moved)


def _patch_loss(s: Sizes) -> Problem:
    shape = (s.batch, s.num_masked, s.patch_values)

    def make(given: Inputs) -> Calls:
        scale, shift = given.pixel_constants()

        def ours(pred, teacher_pred, imgs, ids):
            given = dict(norm_pix=True, teacher_pred=teacher_pred, scale=scale, shift=shift)
            return ops.patch_loss(pred, imgs, ids, s.patch_size, **given).total

        def plain(pred, teacher_pred, imgs, ids):
            wide = torch.promote_types(pred.dtype, torch.float32)
            pixels = _normalized(_cut(imgs, ids, s.patch_size), scale, shift, wide)
            rows = pixels.permute(0, 1, 3, 4, 2).flatten(2)
            variance, mean = torch.var_mean(rows, dim=-1, keepdim=True)
            target = (rows - mean) / (variance + 1e-6).sqrt()
            pixel = F.mse_loss(pred.to(wide), target)
            return pixel + F.mse_loss(pred.to(wide), teacher_pred.to(wide))

        pred, teacher_pred = given.normal(*shape), given.normal(*shape)
        ids = given.masks().ids_masked.contiguous()
        args = (pred, teacher_pred, given.imgs(), ids)
        return _both_passes(ours, plain, args, wanted=[0], grads=None)

    return Problem("patch_loss", make, math.prod(shape) * (1 + 3 * s.dtype.itemsize))


def _feature_loss(s: Sizes) -> Problem:
    shape = (s.batch, s.num_masked, s.embed_dim)

    def plain(pred, target):
        wide = torch.promote_types(pred.dtype, torch.float32)
        variance, mean = torch.var_mean(target.to(wide), dim=-1, keepdim=True)
        z = (target.to(wide) - mean) / (variance + 1e-6).sqrt()
        return F.smooth_l1_loss(pred.to(wide), z, beta=2.0)

    def make(given: Inputs) -> Calls:
        return _both_passes(
            lambda pred, target: ops.feature_loss(pred, target, kind="smooth_l1"),
            plain,
            (given.normal(*shape), given.normal(*shape)),
            wanted=[0],
            grads=None,
        )

    return Problem("feature_loss", make, math.prod(shape) * 3 * s.dtype.itemsize)


def _scale(s: Sizes) -> Problem:
    """The last of a loss's gradient; ours has no function of its own."""
    shape = (s.batch, s.num_masked, s.patch_values)

    def make(given: Inputs) -> Calls:
        x, factor = given.normal(*shape), torch.tensor(0.7, dtype=given.wide, device=given.device)
        return Calls(
            lambda: [OPS["scale"](x, factor)],
            lambda: [x * factor],
            lambda: [x.double() * factor.double()],
        )

    return Problem("scale", make, math.prod(shape) * 2 * s.dtype.itemsize)


def _added_and_normalized(x, branch, weight, bias) -> tuple[Tensor, Tensor]:
    total = x + branch
    out = F.layer_norm(total, total.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), 1e-6)
    return out.to(branch.dtype), total


def _norm(s: Sizes) -> Problem:
    shape, item = (s.batch, s.num_keep + 1, s.embed_dim), s.dtype.itemsize

    def ours(x, branch, weight, bias):
        return tuple(ops.norm(x, weight, bias, eps=1e-6, branch=branch, dtype=branch.dtype))

    def make(given: Inputs) -> Calls:
        stream = given.normal(*shape, dtype=given.wide)
        affine = given.normal(2, s.embed_dim, dtype=given.wide)
        return _both_passes(
            ours,
            _added_and_normalized,
            (stream, given.normal(*shape), *affine),
            wanted=[0, 1, 2, 3],
            grads=[given.normal(*shape), torch.ones_like(stream)],
        )

    # Stream and branch in, both out; sum, both gradients in, those of stream and branch out.
    moved = math.prod(shape) * (4 + item + item + 4 + 4 + item + 4 + 4 + item)
    return Problem("norm", make, moved)


def _norm_linear(s: Sizes) -> Problem:
    """With the first layer of an MLP, under autocast where that computes in 16 bits."""
    d, wide, item = s.embed_dim, 4 * s.embed_dim, s.dtype.itemsize
    shape = (s.batch, s.num_keep + 1)

    def ours(x, branch, norm_weight, norm_bias, weight, bias):
        lower = weight.dtype == torch.bfloat16
        with torch.autocast(x.device.type, torch.bfloat16, enabled=lower):
            given = (x, norm_weight, norm_bias, weight, bias)
            return tuple(ops.norm_linear(*given, eps=1e-6, branch=branch))

    def plain(x, branch, norm_weight, norm_bias, weight, bias):
        out, total = _added_and_normalized(x, branch, norm_weight, norm_bias)
        return F.linear(out, weight, bias), total

    def make(given: Inputs) -> Calls:
        stream = given.normal(*shape, d, dtype=given.wide)
        affine = given.normal(2, d, dtype=given.wide)
        layer = given.normal(wide, d), given.normal(wide)
        return _both_passes(
            ours,
            plain,
            (stream, given.normal(*shape, d), *affine, *layer),
            wanted=[0, 1, 2, 3, 4, 5],
            grads=[given.normal(*shape, wide), torch.ones_like(stream)],
        )

    # What is normalised is never written; the sum is read again to make it once more.
    streams = s.rows * d * (4 + item + 4 + 4 + 4 + 4 + item)
    moved = streams + item * (s.rows * 2 * wide + 3 * wide * d)
    return Problem("norm_linear", make, moved, flops=3 * 2 * s.rows * wide * d)


def _bias_gelu(s: Sizes) -> Problem:
    shape = (s.batch, s.num_keep + 1, 4 * s.embed_dim)

    def make(given: Inputs) -> Calls:
        return _both_passes(
            ops.bias_gelu,
            lambda x, bias: F.gelu(x + bias.to(x.dtype)),
            (given.normal(*shape), given.normal(shape[-1], dtype=given.wide)),
            wanted=[0, 1],
            grads=[given.normal(*shape)],
        )

    return Problem("bias_gelu", make, math.prod(shape) * s.dtype.itemsize * 5)


def _bias_gelu_linear(s: Sizes) -> Problem:
    d, wide = s.embed_dim, 4 * s.embed_dim
    shape = (s.batch, s.num_keep + 1)

    def make(given: Inputs) -> Calls:
        bias = given.normal(wide, dtype=given.wide)
        return _both_passes(
            ops.bias_gelu_linear,
            lambda x, bias, weight, out_bias: F.linear(
                F.gelu(x + bias.to(x.dtype)), weight, out_bias
            ),
            (given.normal(*shape, wide), bias, given.normal(d, wide), given.normal(d)),
            wanted=[0, 1, 2, 3],
            grads=[given.normal(*shape, d)],
        )

    # The activation is never written; x is read again to make it once more.
    moved = s.dtype.itemsize * (s.rows * (3 * wide + 2 * d) + 3 * wide * d)
    return Problem("bias_gelu_linear", make, moved, flops=3 * 2 * s.rows * wide * d)


def _attention(s: Sizes, count: int, heads: int, width: int) -> Problem:
    def plain(qkv):
        q, key, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, key, v).transpose(1, 2)

    def make(given: Inputs) -> Calls:
        return _both_passes(
            ops.attention,
            plain,
            (given.normal(s.batch, count, 3, heads, width),),
            wanted=[0],
            grads=[given.normal(s.batch, count, heads, width)],
        )

    return Problem(
        "attention",
        make,
        s.batch * count * heads * width * s.dtype.itemsize * (3 + 1 + 3 + 1 + 3),
        flops=s.batch * count**2 * heads * width * (4 + 10),
        case=f"{count} tokens, {heads} x {width}",
    )


def _linear(s: Sizes) -> Problem:
    d, wide = s.embed_dim, 4 * s.embed_dim
    shape = (s.batch, s.num_keep + 1)

    def make(given: Inputs) -> Calls:
        return _both_passes(
            ops.linear,
            F.linear,
            (given.normal(*shape, d), given.normal(wide, d), given.normal(wide)),
            wanted=[0, 1, 2],
            grads=[given.normal(*shape, wide)],
        )

    moved = s.dtype.itemsize * (s.rows * (3 * d + 2 * wide) + 3 * wide * d)
    return Problem("linear", make, moved, flops=3 * 2 * s.rows * wide * d)
