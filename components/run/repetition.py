"""Repetitions of what was trained before: the words in `RunConfig.rerun` that are the user's, and those that are ours."""

from __future__ import annotations

BASE_TAG, RERUN_TAG = "sae.base_digest", "sae.rerun"
"""Of a version: what its user asked for (`Specification.base_digest`), and which repetition of it this is."""
_OURS = "retrain"
"""Stands for the user's word where there is none."""


def repetition(rerun: str | None, why: str) -> str:
    """`RunConfig.rerun` of a repetition: the user's own word, if there is one, and ours."""
    return f"{asked_for(rerun) or _OURS}+{why}"


def asked_for(rerun: str | None) -> str | None:
    """The user's own word."""
    word = None if rerun is None else rerun.partition("+")[0]
    return None if word == _OURS else word
