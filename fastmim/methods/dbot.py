"""dBOT: predict features of a frozen teacher, which the student replaces stage by stage."""

import random
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmim.methods.base import Losses, Method, seeded
from fastmim.nn import FrozenTeacher, MaskedAutoencoder
from fastmim.ops import Masks, feature_loss


class DBOT(Method):
    """Masked autoencoder distilled from bootstrapped teachers (Liu et al., arXiv:2209.03917).

    The first teacher is random. In every later stage the trained student is the teacher and the
    student starts anew. The target is the output of the teacher's last block for the whole image;
    the loss is that of the masked patches and of the cls token.

    Args:
        autoencoder: The first student, with ``target="tokens"``.
        mask_ratio: Fraction of patches removed, in (0, 1).
        stage_depths: Blocks of the student's encoder in each stage. Default: as they are.
        teacher_depth: Blocks of the first, random teacher; 0: a random patch projection. Default:
            those of the student.
        teachers: For each stage another teacher, or None for the method's own.
        projection: Give the student's head the width of each teacher; otherwise a teacher of
            another width is refused.
        stage_carry: Keep the bias of the patch embedding where a stage begins, as the released
            code does.
        teacher_norm: Take the teacher's features after its final norm.
        norm_features: Normalise the teacher's features of each token.
        seed: Of the weights of later stages.

    Raises:
        ValueError: If the student predicts something else than ``tokens``, the ratio leaves no
            visible or no masked patch, or a teacher does not fit.
    """

    target = "tokens"
    has_stages = True
    student: MaskedAutoencoder
    teacher: FrozenTeacher

    def __init__(
        self,
        autoencoder: MaskedAutoencoder,
        *,
        mask_ratio: float = 0.75,
        stage_depths: Sequence[int] = (),
        teacher_depth: int | None = None,
        teachers: Sequence[FrozenTeacher | None] = (),
        projection: bool = True,
        stage_carry: bool = True,
        teacher_norm: bool = False,
        norm_features: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(autoencoder, mask_ratio)
        depth = len(autoencoder.blocks)
        if stage_depths and stage_depths[0] != depth:
            raise ValueError(
                f"DBOT: expected a student of stage_depths[0] = {stage_depths[0]} blocks, got "
                f"{depth}"
            )
        self.stage_depths = tuple(stage_depths)
        self.teacher_depth = depth if teacher_depth is None else teacher_depth
        self.projection = projection
        self.stage_carry = stage_carry
        self.teacher_norm = teacher_norm
        self.norm_features = norm_features
        self.seed = seed
        self._teachers = tuple(teachers)  # a tuple hides them: only the current one is registered
        self.stage = 0
        for teacher in filter(None, teachers):  # those of later stages too: before any training
            self._projects(teacher, autoencoder)
        self.check_stages(max(len(teachers), len(stage_depths)))
        self._set_teacher(self._given(0) or self._copy(self.teacher_depth))
        self._fit_head(self.student)

    @classmethod
    def student_options(cls, drop_path: float) -> dict:
        return {**super().student_options(drop_path), "decoder_drop_path": drop_path}

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
        pred = self.student.predict(imgs, masks, draws=draws)  # (B, 1 + N - K, D), cls first
        ids = F.pad(masks.ids_masked + 1, (1, 0))
        if target.shape[1] == self.student.num_patches:  # a teacher without cls token
            pred, ids = pred[:, 1:], masks.ids_masked
        loss = feature_loss(
            pred, target, kind="smooth_l1", ids=ids, normalize=self.norm_features, beta=2.0
        )
        return Losses(loss, {"feature": loss.detach()})

    def teach(self, imgs: Tensor, masks: Masks) -> Tensor:
        """(B, N + 1, D): features of the whole images, cls token first; or (B, N, D)."""
        return self.teacher(imgs, self.student, final_norm=self.teacher_norm)

    def check_stages(self, count: int) -> None:
        for stage in range(1, count):
            if self._given(stage) is None:
                self._head_for(self.student.embed_dim, self.student)

    def begin_stage(self, stage: int) -> None:
        """The trained student becomes the teacher, unless another is given, and starts anew.

        Its weights are a function of seed and stage, so that every process has the same; drawn by
        each from its own state, as in the released code, they would differ.

        Args:
            stage: From 1, one more than the stage before.
        """
        if stage != self.stage + 1:
            raise ValueError(f"DBOT: expected stage {self.stage + 1}, got {stage}")
        trained = self.student
        self._set_teacher(self._given(stage) or self._copy(len(trained.blocks)))
        self.stage = stage
        depth = len(trained.blocks)
        if self.stage_depths:
            depth = self.stage_depths[min(stage, len(self.stage_depths) - 1)]
        with self._seeded("student"):
            fresh = trained.fresh(depth=depth)
        self._fit_head(fresh)
        if self.stage_carry:
            fresh.patch_embed.proj.bias.data.copy_(trained.patch_embed.proj.bias)
        weight = trained.patch_embed.proj.weight
        self.student = fresh.to(weight.device, weight.dtype).train(trained.training)

    def _given(self, stage: int) -> FrozenTeacher | None:
        return self._teachers[stage] if stage < len(self._teachers) else None

    def _copy(self, depth: int) -> FrozenTeacher:
        """An encoder with the student's weights, as far as it has as many blocks."""
        with self._seeded("teacher"):
            encoder = self.student.fresh_encoder(depth=depth, drop_path=0.0)
        encoder.to(self.student.patch_embed.proj.weight.dtype)
        state = {**encoder.state_dict(), **self.student.state_dict()}
        encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
        return FrozenTeacher(encoder)

    def _set_teacher(self, teacher: FrozenTeacher) -> None:
        weight = self.student.patch_embed.proj.weight
        self.teacher = teacher.to(weight.device)

    def _fit_head(self, student: MaskedAutoencoder) -> None:
        """Let the student predict as many features as the teacher gives."""
        width = self._projects(self.teacher, student)
        if width is not None:
            with self._seeded("head"):
                student.resize_head(width)

    @torch.no_grad()
    def _projects(self, teacher: FrozenTeacher, student: MaskedAutoencoder) -> int | None:
        """The width of a teacher if it is not that of the student's head; tries it on an image."""
        embed = self.student.patch_embed
        weight = embed.proj.weight
        device = next(teacher.parameters(), weight).device  # those of later stages are not moved
        imgs = weight.new_zeros(1, embed.in_chans, *embed.img_size, device=device)
        return self._head_for(teacher(imgs, self.student).shape[-1], student)

    def _head_for(self, width: int, student: MaskedAutoencoder) -> int | None:
        predicted = student.head.out_features
        if width == predicted:
            return None
        if not self.projection:
            raise ValueError(
                f"DBOT: a teacher gives {width} features, the student predicts {predicted}; allow "
                f"projection, or create the student with target_dim={width}"
            )
        return width

    def _seeded(self, purpose: str) -> AbstractContextManager[None]:
        """Random weights as a function of seed, stage and purpose."""
        return seeded(random.Random(f"{self.seed} {self.stage} {purpose}").getrandbits(63))
