"""Public names that import their module when they are first used (PEP 562): torch and Brevitas take seconds to import."""

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping

__all__ = ["lazy_names"]


def lazy_names(
        package: str, modules: Mapping[str, str],
        submodules: Iterable[str] = ()) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: the package's ``__name__``. modules: public name -> module that defines it. submodules: those that are reachable
            as attributes without an import of their own.
    """
    namespace, submodules = vars(sys.modules[package]), frozenset(submodules)

    def __getattr__(name: str) -> object:
        if name in submodules:
            return importlib.import_module(f"{package}.{name}")
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        namespace[name] = value = getattr(importlib.import_module(modules[name]), name)  # found at once the next time
        return value

    def __dir__() -> list[str]:
        return sorted({*namespace, *modules, *submodules})

    return __getattr__, __dir__
