"""The model card of a version, in Markdown: what it is, how good it is, how to use it, how to make it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Protocol

from components.evaluation.probing_table import lines, sizes
from components.registry.gates import markdown_table
from components.registry.model_files import FILES_TAG
from components.registry.records import Imported, Lineage
from components.registry.versions import PATH_TAG, STABILITY_TAG, WEIGHTS_TAG, reproduction_commands

_METRICS = {
    "loss_recovered": "share of the language model's loss that survives splicing the SAE in; 1 is perfect",
    "explained_variance": "1 is perfect, 0 the mean predictor",
    "l0": "features active per token",
    "dead_fraction": "features that never fired on the evaluation tokens",
    "ce_loss_clean": "nats per token, language model as it is",
    "ce_loss_sae": "nats per token, SAE spliced in",
    "ce_loss_mean": "nats per token, mean activation spliced in",
    "ce_loss_zero": "nats per token, zeros spliced in",
    "kl_divergence": "nats per token, clean against spliced",
    "mse": "per dimension",
    "cosine_similarity": "of activation and reconstruction",
    "norm_ratio": "of reconstruction to activation; under 1 is shrinkage",
}


_DESCRIPTION_LENGTH = 5_000  # a VARCHAR of MLflow's; SQLite alone takes more
_REST = "\n\nThe whole card is `MODEL_CARD.md` in the run's folder `sae`.\n"


class _Decided(Protocol):
    @property
    def alias(self) -> str: ...
    @property
    def reason(self) -> str: ...
    @property
    def report(self) -> dict[str, Any]: ...


def _what(configuration: dict[str, Any]) -> tuple[str, str]:
    """What a configuration makes, and where."""
    training = configuration["training"]
    if training.get("crosscoder"):
        return "A crosscoder", ", ".join(training["crosscoder"])
    place = training.get("hook_point") or configuration["activations"]["hook_points"][0]
    if training.get("target"):
        return "A transcoder", f"{place} to {training['target']}"
    return "A sparse autoencoder", place


def model_card(
    name: str,
    version: str,
    metrics: dict[str, Any],
    lineage: Lineage,
    tags: dict[str, str],
    decision: _Decided,
    optional: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """tags: of the version. metrics: by name, with `_low` and `_high` beside those that have a confidence interval. optional:
    what was measured besides, by kind."""
    configuration = lineage.configuration
    corpus, model, training = configuration["corpus"], configuration["language_model"], configuration["training"]
    what, hook_point = _what(configuration)
    text = corpus.get("dataset") or corpus["source"]
    imported = lineage.imported
    place = {"language model": _with_revision(model), "hook point": hook_point}
    made_elsewhere = {**place, **{f"imported, {key}": value for key, value in (imported or ())}}
    recipe = {
        **place,
        "corpus": f"{text}, {corpus['train_tokens']:,} tokens for training, sequences of {corpus['context_length']}",
        "SAE": ", ".join(f"{key} {value}" for key, value in configuration["sae"].items() if value is not None),
        "training": ", ".join(f"{key} {_short(value)}" for key, value in training.items() if value is not None),
        "seed": configuration["seed"],
    }
    code = lineage.code
    commit = code.get("mlflow.source.git.commit", "not a checkout")
    changed = ", with changes that are not committed" if code.get("sae.git_dirty") == "true" else ""
    origin = {
        "training started from": lineage.start.location if lineage.start else "not ours" if imported else "new weights",
        "MLflow run": lineage.mlflow_run,
        "Prefect flow run": lineage.prefect_flow_run or "none",
        "git commit": commit + changed,
        "activation dataset": "not ours" if lineage.imported else f"{lineage.dataset_digest} at {lineage.dataset_url}",
        "token dataset": f"{lineage.token_digest} at {lineage.token_url}",
        "weights (SHA-256)": tags[WEIGHTS_TAG],
        "`MODEL_FILES.json` (SHA-256)": tags.get(FILES_TAG, "none"),
    }
    measured = f"{metrics['evaluation_tokens']:,} held-out tokens" if "evaluation_tokens" in metrics else "held-out tokens"
    return f"""# {name}, version {version}

{what} on the activations of `{model["name"]}` at `{hook_point}`: float32 activations `[n, d_in]` in, features
`[n, d_sae]` and what they write `[n, d_out]` out. It is for studying what the language model represents; a feature's
meaning is a hypothesis until it is tested by an intervention.

## Recipe

{_list(made_elsewhere if imported else recipe)}

## Quality

On {measured} of documents that were not trained on; intervals are what the evaluation recorded.

{_metric_table(metrics)}

{_probes(optional or {})}{_stability(tags)}## Gates

When it was registered: **{decision.alias}**. {decision.reason}.

{markdown_table(decision.report)}
## How to load

```python
import mlflow

model = mlflow.pyfunc.load_model("models:/{name}/{version}")
model.predict(activations)  # {{"features": ..., "reconstruction": ...}}
```

`load_model` runs the Python file that the registry holds. Whoever does not trust its store checks the files first: the
version's tag `{FILES_TAG}` is the SHA-256 of `MODEL_FILES.json`, and that lists the SHA-256 of every other file.

The SAE alone, without code, is the folder `{tags[PATH_TAG]}` of the model; it loads in SAELens 6:

```python
folder = mlflow.artifacts.download_artifacts("models:/{name}/{version}/{tags[PATH_TAG]}")
SAE.load_from_disk(folder)
```

## Lineage

{_list(origin)}

## How to reproduce

{_reproduction(f"{name}/{version}", imported)}
"""


def _reproduction(version: str, imported: Imported | None) -> str:
    commands = "".join(f"    {command}\n" for command in reproduction_commands(version, imported))
    promise = (
        "The configuration is the one that it was measured with; how it was trained is not known here."
        if imported
        else "With the same code, on the same kind of machine with the same number of threads, the weights have the checksum "
        "above."
    )
    return f"{commands}\n{promise}"


def _probes(optional: Mapping[str, Mapping[str, Any]]) -> str:
    """The section on probes; nothing where none were asked for."""
    table = [line for line in lines(optional.get("probing", {})) if line.kind in ("sae", "random_directions", "dense")]
    if not table:
        return ""
    every = sizes(table)
    rows = [f"| {line.task} | {line.label} | {' | '.join(line.cell(k, line.kind == 'sae') for k in every)} |" for line in table]
    head = f"| task | probe reads | {' | '.join(f'k = {k}' for k in every)} |\n|{'---|' * (2 + len(every))}"
    body = "\n".join(rows)
    return f"""## Probes

Balanced accuracy, 0.5 by chance, on documents that the probe has not seen; the rest is in `evaluation.json`.

{head}
{body}

"""


def _stability(tags: dict[str, str]) -> str:
    """The section on features that the champion has, too; nothing where there was none."""
    if STABILITY_TAG not in tags:
        return ""
    found = json.loads(tags[STABILITY_TAG])
    shares = {name: "not defined" if value is None else f"{value:.1%}" for name, value in found.items() if "share" in name}
    return f"""## Features against the champion, version {found["champion"]}

Of features that fire. Persisted: each other's nearest by decoder direction, with a cosine over 0.7; by reconstruction: each
counted by the mean length that it adds. `stability/stability.parquet` in the MLflow run has them one by one.

| | this version | version {found["champion"]} |
|---|---|---|
| features that fire | {found["firing"]} | {found["champion_firing"]} |
| persisted | {found["persisted"]} ({shares["persisted_share"]}) | {found["persisted"]} ({shares["kept_share"]}) |
| persisted, by reconstruction | {shares["persisted_share_by_reconstruction"]} | {shares["kept_share_by_reconstruction"]} |
| near one that has a nearer partner | {found["split"]} (split) | {found["merged"]} (merged) |
| without a partner | {found["new"]} (new) | {found["vanished"]} (vanished) |

"""


def shortened(card: str) -> str:
    """As much of the card, in whole lines, as MLflow's table takes for a version's description."""
    if len(card) <= _DESCRIPTION_LENGTH:
        return card
    kept = card[: _DESCRIPTION_LENGTH - len(_REST)].rpartition("\n")[0]
    return kept + _REST


def _with_revision(model: dict[str, Any]) -> str:
    own = f"{model['name']} at {model['revision']}" if model.get("revision") else str(model["name"])
    return f"{own} and {_with_revision(model['second'])}" if model.get("second") else own


def _short(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _list(rows: dict[str, Any]) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in rows.items())


def _metric_table(metrics: dict[str, Any]) -> str:
    lines = ["| metric | value | interval | meaning |", "|---|---|---|---|"]
    for name, meaning in _METRICS.items():
        if name not in metrics:
            continue
        value = metrics[name]
        low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
        interval = f"{low:.5g} to {high:.5g}" if low is not None and high is not None else ""
        lines.append(f"| `{name}` | {'null' if value is None else f'{value:.5g}'} | {interval} | {meaning} |")
    return "\n".join(lines)
