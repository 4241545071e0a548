"""Names and shapes of published ViT weights, in the order of the released state_dicts."""

from dataclasses import dataclass

AUTOENCODER, DBOT, SDAE = "autoencoder", "dBOT student", "SdAE student"
ENCODER, CLASSIFIER = "encoder", "classifier"


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a network's tensors say.

    Attributes:
        kind: Which network: encoder, classifier, or a student with its decoder.
        tokens: Rows of the position table, the cls token included.
        pool: Of a classifier: "mean" (norm is fc_norm) or "cls".
        decoder_embed_dim: None without a decoder, as the other two.
    """

    kind: str
    embed_dim: int
    depth: int
    patch_size: int
    in_chans: int
    tokens: int
    hidden: int
    decoder_embed_dim: int | None = None
    decoder_depth: int | None = None
    decoder_hidden: int | None = None
    num_classes: int | None = None
    pool: str | None = None

    @property
    def patch_values(self) -> int:
        """Values in a patch: ``p * p * C``."""
        return self.patch_size**2 * self.in_chans

    @property
    def has_decoder(self) -> bool:
        return self.decoder_embed_dim is not None


def published_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Every tensor of the network, by its published name and in the published order."""
    width, narrow, patch = sizes.embed_dim, sizes.decoder_embed_dim, sizes.patch_size
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, sizes.tokens, width)}
    if sizes.has_decoder:
        own = {"mask_token": (1, 1, narrow), "decoder_pos_embed": (1, sizes.tokens, narrow)}
        shapes |= dict(reversed(own.items())) if sizes.kind == DBOT else own
    shapes["patch_embed.proj.weight"] = (width, sizes.in_chans, patch, patch)
    shapes["patch_embed.proj.bias"] = (width,)
    shapes |= _blocks("blocks", sizes.depth, width, sizes.hidden)
    if sizes.pool != "mean":
        shapes |= _norm("norm", width)
    if sizes.has_decoder:
        head = "decoder_predp" if sizes.kind == DBOT else "decoder_pred"
        out = sizes.patch_values if sizes.kind == AUTOENCODER else width
        shapes |= _linear("decoder_embed", width, narrow)
        shapes |= _blocks("decoder_blocks", sizes.decoder_depth, narrow, sizes.decoder_hidden)
        shapes |= _norm("decoder_norm", narrow) | _linear(head, narrow, out)
    if sizes.num_classes is not None:
        shapes |= _linear("head", width, sizes.num_classes)
    if sizes.pool == "mean":
        shapes |= _norm("fc_norm", width)
    return shapes


def is_decayed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether pre-training decays a parameter; cls and mask token are."""
    return len(shape) > 1 and not name.endswith(".bias")


def is_trained(name: str) -> bool:
    """Whether pre-training trains a parameter; position tables are fixed."""
    return name not in ("pos_embed", "decoder_pos_embed")


def _linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _blocks(prefix: str, depth: int, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for i in range(depth):
        at = f"{prefix}.{i}"
        shapes |= _norm(f"{at}.norm1", width)
        shapes |= _linear(f"{at}.attn.qkv", width, 3 * width)
        shapes |= _linear(f"{at}.attn.proj", width, width)
        shapes |= _norm(f"{at}.norm2", width)
        shapes |= _linear(f"{at}.mlp.fc1", width, hidden)
        shapes |= _linear(f"{at}.mlp.fc2", hidden, width)
    return shapes
