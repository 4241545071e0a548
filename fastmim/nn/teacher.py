"""Teachers: networks that give targets, take no gradient and stay in evaluation mode."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmim.nn.encoder import Encoder
from fastmim.ops import ema_update_


class Teacher(nn.Module):
    """A network without gradient, always in evaluation mode.

    Args:
        module: The network; it is changed accordingly.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode whatever is asked."""
        return super().train(False)


class FrozenTeacher(Teacher):
    """A network whose features of whole images are predicted (dBOT, arXiv:2209.03917).

    Any ``nn.Module`` serves: an encoder of this library, a ViT of timm, of transformers (CLIP's
    vision model, DINOv2) or of DINOv2's own repository, or, with ``features``, another network.

    Args:
        module: The network.
        features: ``features(module, imgs)`` gives (B, N + 1, D), cls token first, or (B, N, D),
            patches row-major; ``imgs`` are then floating point and normalised as the student's,
            or by the encoder's own statistics.
            Default: of a :class:`fastmim.nn.Encoder` the output of its last block, without the
            final norm; of other modules :func:`vit_tokens`.
        img_size: Height and width of the images it takes; others are resized. A teacher with
            another patch size sees as many patches as its student in images of another size.
    """

    def __init__(
        self,
        module: nn.Module,
        features: Callable[[nn.Module, Tensor], Tensor] | None = None,
        *,
        img_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(module)
        if features is None and not isinstance(module, Encoder):
            features = vit_tokens
        self.features = features
        self.img_size = img_size

    def forward(self, imgs: Tensor, student: Encoder, *, final_norm: bool = False) -> Tensor:
        """Features of whole images.

        Args:
            imgs: (B, C, H, W), uint8 or floating point and normalised, as the student takes them.
            student: Tells the size of the images and the number of patches, and how uint8 images
                are normalised for other modules than an encoder, which has its own statistics.
            final_norm: Normalise the output of the last block; only without ``features``.

        Returns:
            (B, N + 1, D) or (B, N, D).

        Raises:
            ValueError: If the teacher gives another number of tokens.
        """
        resized = self.img_size is not None and tuple(imgs.shape[2:]) != tuple(self.img_size)
        student.patch_embed.check_shape(imgs)
        if resized or self.features is not None:
            own = isinstance(self.module, Encoder)
            imgs = (self.module if own else student).patch_embed.normalized(imgs)
        if resized:
            imgs = F.interpolate(imgs, self.img_size, mode="bicubic", antialias=True)
        if self.features is None:
            tokens = self.module.encode_image(imgs, final_norm=final_norm)
        else:
            tokens = self.features(self.module, imgs)
        patches = student.num_patches
        if tokens.ndim != 3 or tokens.shape[1] not in (patches, patches + 1):
            raise ValueError(
                f"FrozenTeacher: expected features (B, {patches} or {patches + 1}, D), as many as "
                f"the student has patches, got {tuple(tokens.shape)}; give img_size, the number of "
                "the student's rows and columns times the teacher's patch size"
            )
        return tokens


def vit_tokens(module: nn.Module, imgs: Tensor) -> Tensor:
    """Tokens of a ViT of another library, after its own final norm if it has one.

    Register and distillation tokens, between the cls token and the patches, are left out.

    Args:
        module: Gives, by ``forward_features`` or when called, tokens (timm), an output with
            ``last_hidden_state`` (transformers) or DINOv2's dictionary.
        imgs: (B, C, H, W), floating point and normalised.

    Returns:
        (B, N + 1, D), cls token first; (B, N, D) of a ViT without one.

    Raises:
        ValueError: If the module gives something else.
    """
    output = getattr(module, "forward_features", module)(imgs)
    if isinstance(output, dict) and "x_norm_patchtokens" in output:
        return torch.cat([output["x_norm_clstoken"][:, None], output["x_norm_patchtokens"]], dim=1)
    tokens = getattr(output, "last_hidden_state", output)
    if not isinstance(tokens, Tensor) or tokens.ndim != 3:
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(
            f"FrozenTeacher: {type(module).__name__} gives {got}, expected tokens (B, N + 1, D) or "
            "(B, N, D); give features, a function of it and of the images that returns them"
        )
    registers = getattr(getattr(module, "config", None), "num_register_tokens", 0)
    others = getattr(module, "num_prefix_tokens", 1 + registers) - 1  # beside the cls token
    return tokens if others < 1 else torch.cat([tokens[:, :1], tokens[:, 1 + others :]], dim=1)


class EMATeacher(Teacher):
    """A teacher that follows its student (RC-MAE, arXiv:2210.02077, sec. 3).

    It is stored in the student's precision.

    Args:
        student: The module to follow.
        module: The teacher's own network. Each of its parameters, the frozen ones too, follows the
            student's of the same name; what only the student has, such as a decoder, is left out.
            Buffers stay as they are, the networks here hold constants in them. Default: a copy of
            the student.

    Raises:
        ValueError: If ``module`` has a parameter that the student lacks, or has in another shape.
    """

    def __init__(self, student: nn.Module, module: nn.Module | None = None) -> None:
        super().__init__(copy.deepcopy(student) if module is None else module)
        mine = dict(self.module.named_parameters())
        self._left_out = {name for name, _ in student.named_parameters() if name not in mine}
        self.pairs(student)

    def pairs(self, student: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
        """Teacher and student parameter of each name, matched by name and shape.

        Raises:
            ValueError: If the two do not hold the same parameters; names the first five.
        """
        mine = dict(self.module.named_parameters())
        theirs = {n: p for n, p in student.named_parameters() if n not in self._left_out}
        wrong = [
            name
            for name in [*mine, *(n for n in theirs if n not in mine)]
            if name not in mine or name not in theirs or mine[name].shape != theirs[name].shape
        ]
        if wrong:
            raise ValueError(
                f"EMATeacher: teacher and student differ in {len(wrong)} parameters: "
                f"{', '.join(wrong[:5])}; build the teacher from this student"
            )
        return {name: (mine[name], theirs[name]) for name in mine}

    def update_(self, student: nn.Module, momentum: float | Tensor) -> None:
        """``teacher <- momentum * teacher + (1 - momentum) * student`` for every parameter.

        Args:
            student: A module with the parameters of the one copied.
            momentum: In [0, 1].
        """
        pairs = self.pairs(student).values()
        ema_update_([t for t, _ in pairs], [s for _, s in pairs], momentum)
