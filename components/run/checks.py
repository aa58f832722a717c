"""Whatever would stop a run later, looked for before it begins."""

from __future__ import annotations

from components import storage
from components.corpus.sources import require_chat_templates
from components.language_model.loading import load_encoder, require_runnable
from components.run.late_checks import check_later_steps
from components.run.online import require_online
from components.run.specification import Specification
from components.settings import UserError


def check(run: Specification, only_data: bool = False, evaluated: bool = True, attended: bool = True) -> None:
    """Raise a UserError for anything that would stop the run later: device, inputs, root.

    only_data: activations are made and nothing is trained on them, so held-out documents are as good as others.
    evaluated: the SAE is measured, on text spliced into the model, which must give next-token logits.
    attended: somebody waits for the answer. A run that nobody watches is as patient with an object store here as later.
    """
    config = run.config
    reason = without_evaluation(run)
    if evaluated and not only_data and reason is not None:
        raise UserError(f"{reason}; use `sae extract` and `sae train`")
    require_runnable(run.source, run.device)
    _check_text(run)
    if config.activations.split != "train" and not only_data:
        raise UserError("activations.split: an SAE is trained on 'train'; 'held_out' is for `sae extract` alone")
    seconds = storage.PROBE_SECONDS if attended else storage.PATIENCE_SECONDS
    storage.require_writable(config.storage.root, "storage.root", seconds)
    require_online(run)
    if evaluated and not only_data:
        _check_measured(run)
    check_later_steps(config, run.d_sae, run.registered_model, evaluated and not only_data)


def without_evaluation(run: Specification) -> str | None:
    """Why an SAE on this model and corpus cannot be evaluated, None where it can."""
    name, family = run.config.language_model.name, run.model.family
    if family == "encoder":
        return f"language_model.name: '{name}' is a text encoder without next-token logits, which an evaluation needs"
    return None


def require_text(run: Specification, what: str) -> None:
    """A UserError for an SAE whose corpus is images, where something is to be done that is known of text alone."""
    if run.of_images:
        raise UserError(f"corpus.source: {what} text, and the corpus is 'images'; accepted is an SAE on text")


def require_prompts(run: Specification) -> None:
    """A UserError where the coder reads what comes of images alone."""
    if run.of_images and not run.model.layout().of_text:
        name = run.config.language_model.name
        raise UserError(f"sae: '{run.hook_point}' of '{name}' reads images alone, so there is nothing that a text does there")


def _check_measured(run: Specification) -> None:
    """That an SAE on images is asked for nothing that reads text."""
    evaluation, interpretation = run.config.evaluation, run.config.interpretation
    for field, wanted in (
        ("evaluation.probing", evaluation.probing is not None),
        ("evaluation.absorption", evaluation.absorption is not None),
        ("interpretation.safety", interpretation.safety),
    ):
        if wanted:
            require_text(run, f"{field} reads")


def _check_text(run: Specification) -> None:
    """That the model reads text as the corpus has it, where it is to be read."""
    if run.of_images:
        return
    corpus, name = run.config.corpus, run.config.language_model.name
    if run.model.reads_images:
        raise UserError(
            f"corpus.source: '{run.hook_point}' of '{name}' reads images; accepted is 'images', not '{corpus.source}'"
        )
    longest = run.model.longest_text
    if longest is not None and corpus.context_length > longest:
        raise UserError(
            f"corpus.context_length: {corpus.context_length} is more than the {longest} tokens that '{name}' can read"
        )
    require_chat_templates(corpus, load_encoder(run.source).render)
