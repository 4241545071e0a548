"""Least time of a training step: its FLOPs and least bytes at a machine's ceilings.

Arithmetic only. ``step_parts`` counts a step of any model, method, batch and precision, in parts:
forward, backward and update. Matrix products are counted one by one, each
bound by its FLOPs or its bytes; the rest is bound by bytes. LayerNorm's output and GELU are
computed again in the backward pass, as lean memory does; softmax is rebuilt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastmim.models import MODELS
from fastmim.ops import num_keep

METHODS = ("mae", "rc_mae", "dbot", "sdae")
ITEM = {"fp32": 4, "bf16": 2}  # bytes of an activation
_SDAE_FOLDS = 3


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches.

    Attributes:
        copy: Bytes per second of a large copy, read and written.
        matmul: FLOPs per second of a large square product, by dtype.
        exp: Exponentials per second; None where they are not counted.
    """

    copy: float
    matmul: Mapping[str, float]
    exp: float | None = None

    def floor(self, num_bytes: float, flops: float = 0.0, dtype: str = "fp32") -> float:
        """Least seconds to move the bytes and do the FLOPs, one behind the other."""
        seconds = num_bytes / self.copy
        return max(seconds, flops / self.matmul[dtype]) if flops else seconds


# Copy and product measured on an H200; 16 exponentials per clock of each of its 132
# multiprocessors, at a clock of 1.755 GHz that is assumed.
H200 = Ceilings(copy=4.3e12, matmul={"bf16": 790e12}, exp=16 * 132 * 1.755e9)


class Product(NamedTuple):
    """``count`` matrix products (m, k) x (k, n)."""

    m: int
    k: int
    n: int
    count: int = 1

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n * self.count

    def bytes(self, item: int) -> int:
        """Each factor read once, the product written once."""
        m, k, n, count = self
        return item * count * (m * k + k * n + m * n)

    def floor(self, ceilings: Ceilings, dtype: str) -> float:
        return ceilings.floor(self.bytes(ITEM[dtype]), self.flops, dtype)

    def backward(self, input_gradient: bool = True) -> list["Product"]:
        """The products that give the gradients of weight and input."""
        m, k, n, count = self
        return [Product(k, m, n, count), *([Product(m, n, k, count)] if input_gradient else [])]


class Part(NamedTuple):
    """Part of a step, for a whole batch.

    Attributes:
        name: forward, backward or update.
        products: Matrix products with weights.
        attention_flops: Of the two products of attention, or the four of its gradient; what is
            computed again is not counted.
        other_bytes: That everything but the products moves, attention included.
    """

    name: str
    products: tuple[Product, ...]
    attention_flops: float
    other_bytes: float

    @property
    def matmul_flops(self) -> int:
        return sum(product.flops for product in self.products)

    @property
    def flops(self) -> float:
        return self.matmul_flops + self.attention_flops

    def bytes(self, dtype: str) -> float:
        return self.other_bytes + sum(p.bytes(ITEM[dtype]) for p in self.products)

    def floor(self, ceilings: Ceilings, dtype: str) -> float:
        """Least seconds: every product, and what else is moved, one after the other."""
        products = sum(product.floor(ceilings, dtype) for product in self.products)
        return products + ceilings.floor(self.other_bytes)


class Blocks(NamedTuple):
    """``depth`` transformer blocks over ``views`` sequences of ``tokens``."""

    views: int
    tokens: int
    dim: int
    depth: int

    def products(self) -> list[Product]:
        rows, d = self.views * self.tokens, self.dim
        return [
            Product(rows, d, 3 * d, self.depth),
            Product(rows, d, d, self.depth),
            Product(rows, d, 4 * d, self.depth),
            Product(rows, 4 * d, d, self.depth),
        ]

    def attention_flops(self) -> int:
        return 4 * self.views * self.tokens**2 * self.dim * self.depth

    @property
    def parameters(self) -> int:
        """Of the blocks and the norm behind them."""
        return self.depth * (12 * self.dim**2 + 13 * self.dim) + 2 * self.dim

    def values(self) -> int:
        """Values of the residual stream, over all blocks: what other traffic is proportional to."""
        return self.views * self.tokens * self.dim * self.depth


class Traffic(NamedTuple):
    """Bytes per value of the residual stream and block, attention's included."""

    forward: int
    backward: int
    teacher: int

    @classmethod
    def of(cls, item: int, residual: int) -> "Traffic":
        """For activations of ``item`` and a residual stream of ``residual`` bytes."""
        norm = 2 * residual + 2 * item  # stream and branch in, stream and normalised out
        attention, gelu = 4 * item, 8 * item
        forward = 2 * norm + attention + gelu
        # Stream, its gradient and the normalised one's in; the gradient out, cast for the branch.
        norm_backward = 3 * residual + item + (item if item != residual else 0)
        again = residual + item  # LayerNorm's output
        backward = 2 * (norm_backward + again) + 7 * item + 16 * item
        return cls(forward, backward, forward - 4 * item)  # no product is kept for a backward pass


@dataclass(frozen=True)
class Network:
    """Token counts of a model in a method, for a batch.

    Args:
        model: Name for fastmim.create_model.
        method: One of ``METHODS``.
        batch: Images per step.
        mask_ratio: Fraction of patches removed.
    """

    model: str
    method: str
    batch: int
    mask_ratio: float = 0.75

    def __post_init__(self) -> None:
        if self.model not in MODELS or self.method not in METHODS:
            raise ValueError(
                f"Network: expected a model of fastmim.models.MODELS and a method of {METHODS}, "
                f"got {self.model!r} and {self.method!r}"
            )

    @property
    def sizes(self) -> dict:
        return {"img_size": 224, **MODELS[self.model]}

    @property
    def patches(self) -> int:
        return (self.sizes["img_size"] // self.sizes["patch_size"]) ** 2

    @property
    def visible(self) -> int:
        return num_keep(self.patches, self.mask_ratio)

    @property
    def masked(self) -> int:
        return self.patches - self.visible

    @property
    def pixels(self) -> int:
        """Values of a patch."""
        return 3 * self.sizes["patch_size"] ** 2

    @property
    def outputs(self) -> int:
        """Values that the head predicts for a patch."""
        return self.pixels if self.method in ("mae", "rc_mae") else self.sizes["embed_dim"]

    @property
    def encoder(self) -> Blocks:
        sizes = self.sizes
        return Blocks(self.batch, self.visible + 1, sizes["embed_dim"], sizes["depth"])

    @property
    def decoder(self) -> Blocks:
        sizes = self.sizes
        width, depth = sizes["decoder_embed_dim"], sizes["decoder_depth"]
        return Blocks(self.batch, self.patches + 1, width, depth)

    @property
    def teacher(self) -> list[Blocks]:
        """Blocks of the teacher, all without gradient."""
        dim, depth = self.sizes["embed_dim"], self.sizes["depth"]
        folded = Blocks(_SDAE_FOLDS * self.batch, self.masked // _SDAE_FOLDS + 1, dim, depth)
        return {
            "mae": [],
            "rc_mae": [self.encoder, self.decoder],
            "dbot": [Blocks(self.batch, self.patches + 1, dim, depth)],
            "sdae": [folded],
        }[self.method]

    def stem(self, tokens: int) -> Product:
        """Embedding of so many patches of each image."""
        return Product(self.batch * tokens, self.pixels, self.sizes["embed_dim"])

    @property
    def bridge(self) -> Product:
        """From the width of the encoder to that of the decoder."""
        dim = self.sizes["embed_dim"]
        return Product(self.batch * (self.visible + 1), dim, self.sizes["decoder_embed_dim"])

    def head(self, tokens: int) -> Product:
        return Product(self.batch * tokens, self.sizes["decoder_embed_dim"], self.outputs)

    @property
    def parameters(self) -> int:
        """Trained parameters."""
        dim, width = self.encoder.dim, self.decoder.dim
        return (
            self.pixels * dim + 2 * dim  # embedding and cls token
            + self.encoder.parameters
            + dim * width + 2 * width  # bridge and mask token
            + self.decoder.parameters
            + (width + 1) * self.outputs
        )  # fmt: skip


def step_parts(
    model: str,
    method: str,
    batch: int,
    dtype: str,
    *,
    residual: str = "fp32",
    lean: bool = True,
    pixel_bytes: int = 1,
    mask_ratio: float = 0.75,
) -> list[Part]:
    """What one optimizer step must compute and move.

    Args:
        model: Name for fastmim.create_model.
        method: One of ``METHODS``.
        batch: Images.
        dtype: fp32 or bf16, of activations and products.
        residual: fp32 or bf16, of the residual stream.
        lean: Embed visible patches and predict masked ones only; otherwise all.
        pixel_bytes: Bytes of a value of the images.
        mask_ratio: Fraction of patches removed.
    """
    net = Network(model, method, batch, mask_ratio)
    item = ITEM[dtype]
    traffic = Traffic.of(item, ITEM[residual])
    student = [net.encoder, net.decoder]
    stem = net.stem(net.visible if lean else net.patches)
    predicted = net.masked if lean else net.patches + 1
    if method == "dbot":  # the cls token's features are a target as well
        predicted = net.masked + 1 if lean else net.patches + 1
    inner = [*(p for b in student for p in b.products()), net.bridge, net.head(predicted)]
    teacher = [p for blocks in net.teacher for p in blocks.products()]
    if method == "rc_mae":
        teacher += [stem, net.bridge, net.head(predicted)]
    elif net.teacher:  # dBOT's sees every patch, SdAE's the masked ones
        teacher.append(net.stem(net.patches if method == "dbot" or not lean else net.masked))
    return parts_of(
        student,
        net.teacher,
        [stem],
        inner,
        teacher,
        traffic,
        (
            _ends_forward(net, item, ITEM[residual], pixel_bytes),
            _ends_backward(net, item, ITEM[residual]),
            update_bytes(net.parameters, method, dtype),
        ),
    )


def parts_of(
    student: Sequence[Blocks],
    teacher: Sequence[Blocks],
    stems: Sequence[Product],
    inner: Sequence[Product],
    teacher_products: Sequence[Product],
    traffic: Traffic,
    other_bytes: tuple[float, float, float],
    other_attention: float = 0.0,
) -> list[Part]:
    """Forward, backward and update of any student with any teacher.

    Args:
        student: Blocks with a backward pass.
        teacher: Blocks without.
        stems: The student's products whose input needs no gradient.
        inner: Its others, those of the blocks among them.
        teacher_products: All of the teacher.
        traffic: Of the blocks.
        other_bytes: That forward, backward and update move beside the blocks.
        other_attention: FLOPs of the student's forward pass in attention outside of the blocks.
    """
    values = sum(blocks.values() for blocks in student)
    attention = sum(blocks.attention_flops() for blocks in student) + other_attention
    taught = sum(blocks.values() for blocks in teacher)
    return [
        Part(
            "forward",
            (*stems, *inner, *teacher_products),
            attention + sum(blocks.attention_flops() for blocks in teacher),
            traffic.forward * values + traffic.teacher * taught + other_bytes[0],
        ),
        Part(
            "backward",
            (
                *(p for stem in stems for p in stem.backward(False)),
                *(p for product in inner for p in product.backward()),
            ),
            2 * attention,
            traffic.backward * values + other_bytes[1],
        ),
        Part("update", (), 0.0, other_bytes[2]),
    ]


def _ends_forward(net: Network, item: int, residual: int, pixel: int) -> float:
    """Bytes around the student's blocks: visible pixels in, tokens restored, loss with gradient."""
    batch, targets = net.batch, net.masked * net.outputs
    gather = net.visible * net.pixels * (pixel + item)
    embed = (net.visible + 1) * net.encoder.dim * (item + residual)
    restore = net.decoder.dim * ((net.visible + 1) * item + (net.patches + 1) * residual)
    loss = 2 * targets * item  # prediction in, its gradient out
    if net.method in ("mae", "rc_mae"):
        loss += net.masked * net.pixels * pixel
    if net.method != "mae":
        loss += targets * item
    return batch * (gather + embed + restore + loss)


def _ends_backward(net: Network, item: int, residual: int) -> float:
    embed = (net.visible + 1) * net.encoder.dim * (item + residual)
    restore = net.decoder.dim * ((net.patches + 1) * residual + (net.visible + 1) * item)
    return net.batch * (embed + restore)


def update_bytes(parameters: int, method: str, dtype: str) -> int:
    """Bytes of gradient norm, AdamW and the EMA of every step in one pass over fp32 weights.

    AdamW reads p, g, m, v and writes p, m, v; the norm reads g. In bf16 a copy for the products is
    written, of the teacher too.
    """
    copy = 2 if dtype == "bf16" else 0
    return parameters * (32 + copy + (8 + copy if method == "rc_mae" else 0))


class Total(NamedTuple):
    """Of a step: FLOPs, bytes and least seconds."""

    flops: float
    bytes: float
    floor: float


def step_total(parts: list[Part], ceilings: Ceilings, dtype: str) -> Total:
    return Total(
        sum(part.flops for part in parts),
        sum(part.bytes(dtype) for part in parts),
        sum(part.floor(ceilings, dtype) for part in parts),
    )


def attention_floor(
    views: int, heads: int, tokens: int, head_dim: int, ceilings: Ceilings
) -> tuple[float, float]:
    """Least seconds of attention in bf16, forward and backward, from packed qkv.

    The forward reads qkv and writes its output, 8 N d bytes a head; the backward rebuilds the
    softmax from qkv, reads the output's gradient and writes that of qkv, 14 N d bytes.
    """
    count = views * heads
    values = count * tokens * head_dim
    scores = count * tokens**2
    exp = scores / ceilings.exp if ceilings.exp else 0.0
    forward = ceilings.floor(8 * values, 4 * scores * head_dim, "bf16")
    backward = ceilings.floor(14 * values, 10 * scores * head_dim, "bf16")
    return max(forward, exp), max(backward, exp)


# Values that blocks keep for the backward pass, per value of the residual stream and block:
# qkv, attention's output and fc1's, beside the stream; fc1's is computed again; or all of it.
_SAVED = {"lean": 8, "recompute_mlp": 4, "checkpoint": 0}


def saved_bytes_per_image(
    model: str, memory: str = "lean", residual: str = "fp32", dtype: str = "bf16"
) -> float:
    """Bytes per image kept for the backward pass, without inputs and ends.

    Args:
        model: Name for fastmim.create_model.
        memory: lean, recompute_mlp or checkpoint, as ``fastmim pretrain --efficiency.memory``.
        residual: fp32 or bf16.
        dtype: Of the activations, fp32 or bf16.
    """
    net = Network(model, "mae", 1)
    streams = (1 if memory == "checkpoint" else 2) * ITEM[residual]
    kept = streams + _SAVED[memory] * ITEM[dtype]
    return kept * (net.encoder.values() + net.decoder.values())


def least_memory(model: str, method: str, batch: int, dtype: str) -> float:
    """Bytes at the end of the forward pass of a step that keeps what lean memory does.

    These are weights, both moments and the teacher in fp32, and what blocks keep.
    """
    net = Network(model, method, batch)
    teacher = {"mae": 0, "rc_mae": net.parameters}.get(method, net.encoder.parameters)
    kept = batch * saved_bytes_per_image(model, dtype=dtype)
    return 12 * net.parameters + 4 * teacher + kept
