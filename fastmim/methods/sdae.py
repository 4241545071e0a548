"""SdAE: predict what a moving average of the encoder makes of the masked patches, in folds."""

from typing import Literal

import torch
from torch import Tensor

from fastmim.methods.base import Clock, Losses, Method, cosine_momentum, seeded
from fastmim.nn import EMATeacher, MaskedAutoencoder
from fastmim.ops import Masks, feature_loss, num_keep


class SdAE(Method):
    """Self-distilled masked autoencoder (Chen et al., ECCV 2022, arXiv:2208.00449).

    The teacher sees masked patches only, cut into folds that do not see each other, so that each
    of its views holds about as much as the student's. The EMA moves cls token, position table,
    patch embedding, blocks and final norm.

    Args:
        autoencoder: The student, with ``target="features"``.
        mask_ratio: Fraction of patches removed, in (0, 1).
        folds: Parts into which the masked patches are cut; must divide their number. 0: the
            teacher sees the whole image.
        cosine_dim: ``feature``: the similarity of two tokens. ``token``: as the released code has
            it, of a feature along the tokens of a fold.
        momentum: Of the teacher at the start of the run, in [0, 1], or after the warm-up.
        momentum_end: At its end; both read at the epoch, as in the released code.
        momentum_warmup_epochs: Epochs in which the momentum climbs to ``momentum``.
        momentum_start: Where it climbs from.
        teacher_update: When the teacher moves: after every ``epoch`` or every ``step``.
        teacher_every: Only after every so many of them (``ema_frequent`` of the released code).
        teacher_init: ``own``: random weights and a random position table, as in the released code.
            ``student``: the student's.
        seed: Of the teacher's own weights.

    Raises:
        ValueError: If the student predicts something else than ``features``, the ratio leaves no
            visible or no masked patch, or an option is out of range.
    """

    target = "features"
    teacher: EMATeacher

    def __init__(
        self,
        autoencoder: MaskedAutoencoder,
        *,
        mask_ratio: float = 0.75,
        folds: int = 3,
        cosine_dim: Literal["feature", "token"] = "feature",
        momentum: float = 0.96,
        momentum_end: float = 0.99,
        momentum_warmup_epochs: int = 0,
        momentum_start: float = 0.0,
        teacher_update: Literal["epoch", "step"] = "epoch",
        teacher_every: int = 1,
        teacher_init: Literal["own", "student"] = "own",
        seed: int = 0,
    ) -> None:
        super().__init__(autoencoder, mask_ratio)
        masked = autoencoder.num_patches - num_keep(autoencoder.num_patches, mask_ratio)
        if folds < 0 or (folds and masked % folds):
            fits = [n for n in range(1, masked + 1) if masked % n == 0]
            raise ValueError(
                f"SdAE: {folds} folds do not divide {masked} masked patches; expected one of "
                f"{', '.join(map(str, fits))}, or 0 for a teacher that sees the whole image"
            )
        for name, value in (
            ("momentum", momentum),
            ("momentum_end", momentum_end),
            ("momentum_start", momentum_start),
        ):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"SdAE: expected {name} in [0, 1], got {value}")
        if momentum_warmup_epochs < 0 or teacher_every < 1:
            raise ValueError(
                "SdAE: expected momentum_warmup_epochs of at least 0 and teacher_every of at least "
                f"1, got {momentum_warmup_epochs} and {teacher_every}"
            )
        self.folds = folds
        self.kind = {"feature": "cosine", "token": "cosine_token"}[cosine_dim]
        self.momentum = momentum
        self.momentum_end = momentum_end
        self.momentum_warmup_epochs = momentum_warmup_epochs
        self.momentum_start = momentum_start
        self.teacher_every = teacher_every
        self.teacher_follows = teacher_update
        with seeded(seed):
            encoder = autoencoder.fresh_encoder(drop_path=0.0)
            encoder.initialize_as_timm()
        if teacher_init == "student":
            weights = autoencoder.state_dict()
            encoder.load_state_dict({name: weights[name] for name in encoder.state_dict()})
        weight = autoencoder.patch_embed.proj.weight
        self.teacher = EMATeacher(autoencoder, encoder.to(weight.device, weight.dtype))

    def forward(
        self,
        imgs: Tensor,
        masks: Masks | None = None,
        *,
        draws: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Losses:
        masks = self.masks_for(imgs) if masks is None else masks
        if target is None:
            with torch.no_grad():
                target = self.teach(imgs, masks)
        pred = self.student.predict(imgs, masks, draws=draws)  # (B, N - K, D)
        ids = None if self.folds else masks.ids_masked
        if self.folds:
            pred = pred.reshape(target.shape)
        loss = feature_loss(pred, target, kind=self.kind, ids=ids)
        return Losses(loss, {"feature": loss.detach()})

    def teach(self, imgs: Tensor, masks: Masks) -> Tensor:
        """(B * F, (N - K) / F, D): features of the masked patches; without folds (B, N, D)."""
        teacher = self.teacher.module
        if not self.folds:
            return teacher.encode_image(imgs)[:, 1:]
        return teacher.encode_patches(imgs, masks.ids_masked, folds=self.folds)[:, 1:]

    def teacher_momentum(self, clock: Clock) -> float:
        turn = clock.epoch if self.teacher_follows == "epoch" else clock.step
        if (turn + 1) % self.teacher_every:
            return 1.0  # not its turn
        warmup = self.momentum_warmup_epochs
        if clock.epoch < warmup:
            climbed = clock.epoch / max(1, warmup - 1)
            return self.momentum_start + (self.momentum - self.momentum_start) * climbed
        progress = (clock.epoch - warmup) / (clock.epochs - warmup)
        return cosine_momentum(self.momentum, progress, self.momentum_end)

    def update_teacher(self, momentum: float | None = None) -> None:
        """Move the teacher towards the student; for loops that do not use ``fastmim.train``.

        Args:
            momentum: In [0, 1]. Default: the momentum given at construction.
        """
        self.teacher.update_(self.student, self.momentum if momentum is None else momentum)
