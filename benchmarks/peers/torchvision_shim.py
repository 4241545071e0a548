"""Names of torchvision, for the import statements of timm and lightly where it is not installed.

Both import it and use nothing of it in what is measured here: ViT blocks and MAE's building blocks.
Every name is a class without content, so anything that did use one would fail or be seen in
``match``. The modules are there while the import runs and are removed afterwards: to all other
code torchvision stays absent.
"""

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType

_LIBRARY = "torchvision"


class _Empty(type):
    """A class whose constants, such as those of an enumeration, are their own names."""

    def __getattr__(cls, name: str) -> str:
        if not name.isupper():
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


class _Names(ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _Empty(name, (), {"__module__": self.__name__})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == _LIBRARY:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Names(spec.name)

    def exec_module(self, module):
        pass


@contextlib.contextmanager
def torchvision_for_imports() -> Iterator[None]:
    """While the block runs, any name of torchvision can be imported, if it is not installed."""
    if importlib.util.find_spec(_LIBRARY) is not None:
        yield
        return
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.partition(".")[0] == _LIBRARY]:
            del sys.modules[name]
