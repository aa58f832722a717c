"""How the threads of torch wait, which is settled when its library is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping

WAIT = ("OMP_WAIT_POLICY", "PASSIVE")
"""libgomp's threads spin while they wait for each other, and keep the cores from whatever else runs: two trainings at once
were slower in sum than one (`benchmarks/README.md`)."""


def with_patient_threads(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that loads torch; what the user has set stays."""
    name, value = WAIT
    return {name: value, **environment}


def make_threads_patient() -> None:
    """For this process, before torch is loaded."""
    os.environ.setdefault(*WAIT)
