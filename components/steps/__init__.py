"""The steps of the line, one file each: from a specification to what the step leaves behind.

Every step returns at once where its result is there already, and continues where a killed one stopped.
"""

from components.steps.evaluation import (
    evaluate,
    evaluate_together,
    evaluation_job,
    evaluation_reference,
    finish_evaluation,
    measure_baselines,
    measure_span,
)
from components.steps.explanation import explain, search_explanations
from components.steps.extraction import extract, extracted, extraction_of, require_dataset
from components.steps.feature_export import export_features
from components.steps.finding import attribute, search_direction
from components.steps.given import evaluate_given, export_given, import_given
from components.steps.interpretable import feature_map
from components.steps.interpretation import (
    browser_address,
    interpret,
    interpretation_exclusion,
    interpretation_job,
    list_features,
    look_at_span,
    search_features,
    show_feature,
)
from components.steps.modalities import multimodal, search_pictures
from components.steps.outcome import comparison, finished_run, is_news, run_address, summary
from components.steps.registration import log_results, register, require_evaluated, tracked
from components.steps.saebench import require_autoencoder, write_saebench
from components.steps.safety import examine, multilingual, require_safety, safety_page, safety_report, safety_sets
from components.steps.steering import steer, steering_effect
from components.steps.tokens import prepare_tokens
from components.steps.training import launch_training, profile, replay, train, training_tokens

__all__ = [
    "attribute",
    "browser_address",
    "comparison",
    "evaluate",
    "evaluate_given",
    "evaluate_together",
    "evaluation_job",
    "evaluation_reference",
    "examine",
    "explain",
    "export_features",
    "export_given",
    "extract",
    "extracted",
    "extraction_of",
    "feature_map",
    "finish_evaluation",
    "finished_run",
    "import_given",
    "interpret",
    "interpretation_exclusion",
    "interpretation_job",
    "is_news",
    "launch_training",
    "list_features",
    "log_results",
    "look_at_span",
    "measure_baselines",
    "measure_span",
    "multilingual",
    "multimodal",
    "prepare_tokens",
    "profile",
    "register",
    "replay",
    "require_autoencoder",
    "require_dataset",
    "require_evaluated",
    "require_safety",
    "run_address",
    "safety_page",
    "safety_report",
    "safety_sets",
    "search_direction",
    "search_explanations",
    "search_features",
    "search_pictures",
    "show_feature",
    "steer",
    "steering_effect",
    "summary",
    "tracked",
    "train",
    "training_tokens",
    "write_saebench",
]  # fmt: skip
