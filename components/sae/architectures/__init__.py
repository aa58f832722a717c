"""The architectures, one file each: those that ship, and those of installed packages that name a module of theirs under the
entry point `sae_foundry.architectures`."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from inspect import getmembers, isabstract, isclass
from pkgutil import iter_modules

from components.sae.coder import Coder

ENTRY_POINT = "sae_foundry.architectures"


@cache
def architectures() -> dict[str, type[Coder]]:
    """The class of each architecture by its name."""
    modules = [import_module(f"{__name__}.{found.name}") for found in iter_modules(__path__)]
    modules += [import_module(point.module) for point in entry_points(group=ENTRY_POINT)]
    found = {}
    for module in modules:
        for _, kind in getmembers(module, isclass):
            if issubclass(kind, Coder) and not isabstract(kind) and kind.__module__ == module.__name__:
                found[kind.Settings.model_fields["architecture"].default] = kind
    return found
