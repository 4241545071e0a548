"""The plain step with one part replaced by a library's GPU kernel."""

import importlib

import torch
from torch import Tensor, nn

from peers.plain import Plain


class FlashAttention(Plain):
    """:class:`Plain` with flash-attn on packed qkv: no copies before or after it."""

    name = "flash-attn"
    modules = ("flash_attn",)
    dtypes = ("bf16",)
    needs_gpu = True

    @staticmethod
    def attend(qkv: Tensor) -> Tensor:
        return importlib.import_module("flash_attn").flash_attn_qkvpacked_func(qkv)


class XFormers(Plain):
    """:class:`Plain` with ``xformers.ops.memory_efficient_attention``."""

    name = "xformers"
    modules = ("xformers.ops",)
    needs_gpu = True
    dtypes = ("bf16",)

    @staticmethod
    def attend(qkv: Tensor) -> Tensor:
        attention = importlib.import_module("xformers.ops").memory_efficient_attention
        return attention(*qkv.unbind(2))


class Liger(Plain):
    """:class:`Plain` with Liger's LayerNorm."""

    name = "liger"
    modules = ("liger_kernel.transformers",)
    needs_gpu = True
    dtypes = ("fp32", "bf16")

    @property
    def norm(self) -> type[nn.Module]:
        return importlib.import_module("liger_kernel.transformers").LigerLayerNorm


class Apex(Plain):
    """:class:`Plain` with apex's FusedAdam and its multi-tensor EMA."""

    name = "apex"
    modules = ("apex.optimizers", "amp_C")
    needs_gpu = True
    dtypes = ("fp32", "bf16")

    def make_optimizer(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        self._overflow = torch.zeros(1, dtype=torch.int32, device=self.case.device)
        return importlib.import_module("apex.optimizers").FusedAdam(
            self.groups(), lr=recipe.lr, betas=recipe.betas, eps=recipe.adam_eps, adam_w_mode=True
        )

    def move_teacher(self) -> None:
        momentum = self.recipe.momentum
        applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
        axpby = importlib.import_module("amp_C").multi_tensor_axpby
        lists = [self._teachers, [p.detach() for p in self._students], self._teachers]
        applier(axpby, self._overflow, lists, momentum, 1 - momentum, -1)  # -1: no overflow check
