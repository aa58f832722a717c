"""Installed libraries against the requirements of the installed distribution, which are declared in one place only."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from components.doctor.check import Check

_DISTRIBUTION = "sae-foundry"
_REASONS = {
    "fastapi": "Prefect 3.8.8 allows newer versions of FastAPI and breaks with them: from 0.151 on deployments cannot be made, "
    "and from 0.155 on its server does not start",
}
_ALWAYS_SHOWN = ("fastapi", "torch", "prefect", "mlflow")


def version_checks(requirements: Sequence[str] | None = None, python: str | None = None) -> Iterator[Check]:
    """Python and every required library; by default against what the installed distribution asks for."""
    if requirements is None or python is None:
        try:
            requirements = metadata.requires(_DISTRIBUTION) or []
            python = metadata.metadata(_DISTRIBUTION)["Requires-Python"]
        except metadata.PackageNotFoundError:
            advice = "Install the project into this environment: `make install`, or `pip install -e .` in its folder."
            yield Check("versions", _DISTRIBUTION, "failure", "not installed in this environment", advice)
            return
    yield _python(SpecifierSet(python or ""))
    fine = 0
    for requirement in map(Requirement, requirements):
        check = _library(requirement)
        if check is None:
            continue
        fine += check.status == "ok"
        if check.status != "ok" or requirement.name in _ALWAYS_SHOWN:
            yield check
    yield Check("versions", "libraries", "ok", f"{fine} are installed as required")


def _python(accepted: SpecifierSet) -> Check:
    version = platform.python_version()
    if accepted.contains(version, prereleases=True):
        return Check("versions", "python", "ok", version)
    advice = f"Make the environment again with a Python {accepted}: remove .venv, put that Python on PATH, `make install`."
    return Check("versions", "python", "failure", version, advice)


def _library(requirement: Requirement) -> Check | None:
    """None for a library of another platform, and for one of an extra that is not installed."""
    extra = requirement.marker is not None and "extra" in str(requirement.marker)
    if requirement.marker is not None and not extra and not requirement.marker.evaluate():
        return None
    reason = f" ({_REASONS[requirement.name]})" if requirement.name in _REASONS else ""
    advice = f"Install it as required: `pip install '{requirement.name}{requirement.specifier}'`{reason}."
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return None if extra else Check("versions", requirement.name, "failure", "not installed", advice)
    if requirement.specifier.contains(version, prereleases=True):
        return Check("versions", requirement.name, "ok", version)
    return Check("versions", requirement.name, "failure", f"{version}, where {requirement.specifier} is required", advice)
