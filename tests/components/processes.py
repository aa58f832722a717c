"""Training processes that this one has started, and those that they have started."""

from __future__ import annotations

from contextlib import suppress

import psutil

_MODULE = "components.training.process"


def training_processes() -> list[psutil.Process]:
    """Those that run; one that ends meanwhile is none."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if _MODULE in " ".join(child.cmdline()):
                found.append(child)
    return found


def ranks() -> dict[int, psutil.Process]:
    """The processes of a parallel training, by their rank."""
    found = {}
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if _MODULE in " ".join(child.cmdline()) and "RANK" in child.environ():
                found[int(child.environ()["RANK"])] = child
    return found
