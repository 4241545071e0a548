"""Functions that build a model of a published size, as the authors' modules have them."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from torch import nn

from fastmim.models import MODELS

Model = TypeVar("Model", bound=nn.Module)


def factory(cls: type[Model], name: str, **sizes) -> Callable[..., Model]:
    """``name(**kwargs)`` builds a ``cls``; ``kwargs`` win over the sizes.

    Args:
        cls: A class of the module that the function is for.
        name: Of the function.
        **sizes: Arguments of ``cls``. Default: those of ``name`` in
            :data:`fastmim.models.MODELS`, and layer norms with eps 1e-6.
    """
    sizes = sizes or {**MODELS[name], "norm_layer": partial(nn.LayerNorm, eps=1e-6)}

    def make(**kwargs) -> Model:
        return cls(**{**sizes, **kwargs})

    make.__name__ = make.__qualname__ = name
    make.__module__ = cls.__module__
    make.__doc__ = f"A {cls.__name__} of this size; ``kwargs`` are its arguments and win."
    return make
