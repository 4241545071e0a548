"""Plain PyTorch as the authors' training loops do their step: what most users start from.

Written from a description of the released code's behaviour, not from that code: all patches are
embedded, indices are repeated to full width for the gathers, attention is a softmax between two
matrix products, AdamW is PyTorch's default, the gradient norm is taken parameter by parameter and
not used, the EMA is a Python loop with a temporary for each parameter, the position tables
included, and the host waits for the device at every step: for each logged loss, and for all of it.
"""

import math

import torch
from torch import Tensor

from peers.base import Batch
from peers.plain import Plain, PlainMAE

_LOGGED = {"mae": 1, "rc_mae": 3, "dbot": 1, "sdae": 1}  # losses read by the host in a step


class Official(Plain):
    """The authors' style of step; its mathematics is that of :class:`Plain`."""

    name = "official"

    @staticmethod
    def attend(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
        return (weights.softmax(dim=-1) @ v).transpose(1, 2)

    def network(self, weights: dict[str, Tensor]) -> torch.nn.Module:
        network = _RepeatingMAE(**self.case.sizes, target=self.case.target, **self._layers)
        network.load_state_dict(weights)
        return network

    def make_optimizer(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        return torch.optim.AdamW(
            self.groups(), lr=recipe.lr, betas=recipe.betas, eps=recipe.adam_eps
        )

    @torch.no_grad()
    def move_teacher(self) -> None:
        momentum = self.recipe.momentum
        pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
        for teacher, student in pairs:
            teacher.mul_(momentum).add_((1 - momentum) * student)

    def step(self, batch: Batch) -> None:
        loss = self.loss(batch.imgs, self.masks(batch))
        for _ in range(_LOGGED[self.case.method]):
            if not math.isfinite(loss.item()):
                raise RuntimeError("the loss is not finite")
        loss.backward()
        self.update()
        if batch.imgs.is_cuda:
            torch.cuda.synchronize()

    def update(self) -> None:
        norms = [p.grad.detach().norm(2) for p in self._students]
        torch.stack(norms).norm(2)
        super().update()


class _RepeatingMAE(PlainMAE):
    """Gathers with indices repeated to full width in memory."""

    def forward(self, imgs: Tensor, ids_keep: Tensor, ids_restore: Tensor) -> Tensor:
        latent = self.encode(_gather(self.embed(imgs), ids_keep))
        return self.decode(latent, ids_restore)

    def decode(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        x = self.decoder_embed(latent)
        hidden = ids_restore.shape[1] + 1 - x.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).repeat(len(x), hidden, 1)
        patches = _gather(torch.cat([x[:, 1:], mask_tokens], dim=1), ids_restore)
        return self.predict(torch.cat([x[:, :1], patches], dim=1))


def _gather(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(1, ids[:, :, None].repeat(1, 1, x.shape[-1]))
