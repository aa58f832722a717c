"""Probes against what is known of made-up passages, and the way of labelled text from files to the run."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from components import steps
from components.corpus.labelled import code_and_prose, list_labelled, read_labelled
from components.corpus.settings import LabelledSettings
from components.evaluation.measurements import sae_spans
from components.evaluation.passages import chosen_texts
from components.evaluation.probing import Passages, chosen, fold_of, probe
from components.evaluation.probing_table import lines, sizes
from components.evaluation.settings import ProbingSettings
from components.evaluation.span_totals import merged
from components.language_model.loading import load_encoder, load_model
from components.run import late_checks
from components.run.config import parse_config
from components.run.specification import resolve
from components.settings import UserError
from components.steps.evaluation import own_sae

CPU = torch.device("cpu")
SETTINGS = ProbingSettings(k=(1, 4))


def passages(
    labels: np.ndarray, documents: np.ndarray, sae: np.ndarray, names: int = 2, x: np.ndarray | None = None
) -> Passages:
    noise = np.random.default_rng(9).normal(size=(len(labels), 8)).astype(np.float32)
    values = {"sae": sae, "coordinates": noise if x is None else x, "random_directions": np.abs(noise)}
    return Passages(
        values={name: value.astype(np.float32) for name, value in values.items()},
        labels=labels,
        documents=documents,
        names=tuple(f"label {number}" for number in range(names)),
    )


def test_the_one_feature_that_says_the_label_is_found_and_noise_stays_at_chance():
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), 60)
    documents = np.arange(180) // 2
    features = np.abs(generator.normal(size=(180, 50))) * 0.1
    for label, feature in enumerate((7, 21, 33)):
        features[labels == label, feature] += 1.0
    found, rows = probe("made", passages(labels, documents, features, names=3), SETTINGS)
    assert found["made/sae_1"] == 1.0 == found["made/sae_1_low"] == found["made/sae_1_high"]
    assert abs(found["made/dense"] - 0.5) < 0.1  # it reads noise here
    assert abs(found["made/random_directions_4"] - 0.5) < 0.1
    assert found["made/random_features_1"] < 0.6 < found["made/sae_1"]
    assert [(row["label"], row["documents"], row["passages"]) for row in rows] == [(f"label {n}", 30, 60) for n in range(3)]
    assert [chosen(features, labels == label, 1).tolist() for label in range(3)] == [[7], [21], [33]]


def test_a_feature_that_only_knows_the_document_says_nothing_of_the_label():
    """Split by passage, the probe would know the test documents and be right every time."""
    documents = np.repeat(np.arange(60), 4)
    labels = documents % 2
    own = np.zeros((240, 60))
    own[np.arange(240), documents] = 1.0
    found, _ = probe("made", passages(labels, documents, own, x=own), ProbingSettings(k=(1, 16)))
    assert abs(found["made/dense"] - 0.5) < 0.1
    assert abs(found["made/sae_16"] - 0.5) < 0.1


def test_features_are_chosen_without_the_passages_that_are_tested():
    """Of 3,000 columns of noise the 16 that differ most on all passages would tell most of 60 labels rightly."""
    generator = np.random.default_rng(3)
    labels, noise = np.arange(60) % 2, np.abs(generator.normal(size=(60, 3000)))
    best = chosen(noise, labels == 0, 16)
    cheating = noise[:, best][labels == 0].mean(axis=0) - noise[:, best][labels == 1].mean(axis=0)
    scores = (noise[:, best] * np.sign(cheating)).sum(axis=1)
    assert ((scores > np.median(scores)) == (labels == 0)).mean() > 0.85
    found, _ = probe("made", passages(labels, np.arange(60), noise), ProbingSettings(k=(16,)))
    assert abs(found["made/sae_16"] - 0.5) < 0.2


def newton(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Balanced logistic regression with a penalty of half the squared weights, bias (last) free, by Newton's method."""
    rows = np.hstack([x, np.ones((len(x), 1))])
    share = np.where(y, len(y) / (2 * y.sum()), len(y) / (2 * (~y).sum()))
    weights, penalty = np.zeros(rows.shape[1]), np.diag([1.0] * x.shape[1] + [0.0])
    for _ in range(50):
        p = 1 / (1 + np.exp(-rows @ weights))
        gradient = rows.T @ (share * (p - y)) + penalty @ weights
        curvature = rows.T @ ((share * p * (1 - p))[:, None] * rows) + penalty
        weights -= np.linalg.solve(curvature, gradient)
    return weights


def test_the_dense_probe_is_the_logistic_regression_written_out():
    generator = np.random.default_rng(5)
    documents = np.arange(120)
    labels = (np.arange(120) % 3 == 0).astype(np.int64)
    x = generator.normal(size=(120, 6)) * [1, 10, 0.1, 1, 1, 1] + labels[:, None] * [0.8, 8.0, 0.02, 0, 0, 0]
    x = x.astype(np.float32)
    made = passages(labels, documents, np.abs(x), x=x)
    found, _ = probe("made", made, SETTINGS)
    fold = fold_of(made, 5)
    right = np.zeros(120)
    for part in range(5):
        train, test = x[fold != part].astype(np.float64), x[fold == part].astype(np.float64)
        mean, spread = train.mean(axis=0), train.std(axis=0)
        weights = newton((train - mean) / spread, labels[fold != part] == 0)
        told = ((test - mean) / spread) @ weights[:-1] + weights[-1] > 0
        right[fold == part] = told == (labels[fold == part] == 0)
    expected = (right[labels == 0].mean() + right[labels == 1].mean()) / 2
    assert 0.6 < expected < 0.95
    assert found["made/dense"] == pytest.approx(expected, abs=1e-12)
    assert sorted(np.bincount(fold[labels == 1]).tolist()) == [8, 8, 8, 8, 8]
    # One passage a document: the bootstrap's spread is that of two binomial shares.
    shares = [right[labels == side].mean() for side in (0, 1)]
    deviation = 0.5 * np.sqrt(sum(p * (1 - p) / n for p, n in zip(shares, (80, 40), strict=True)))
    width = found["made/dense_high"] - found["made/dense_low"]
    assert width == pytest.approx(2 * 1.96 * deviation, rel=0.15)


def test_a_module_falls_into_code_and_docstrings():
    source = '"""What it is.\n\nMore."""\nimport os  # kept\n# a comment\ndef f():\n    "Says."\n    return "not prose"\n'
    code, prose = code_and_prose(source)
    assert code == 'import os  # kept\ndef f():\n    return "not prose"\n'
    assert prose == "What it is.\n\nMore.\n\nSays."
    assert code_and_prose("def (") == ("", "")


def test_the_standard_library_gives_packages_and_prose_without_a_network():
    (packages,) = list_labelled([LabelledSettings()])
    texts = list(read_labelled(LabelledSettings(), 0, packages))
    assert {"json", "email", "asyncio"} <= {text.label for text in texts}
    assert all(text.document.split("/")[1] == text.label for text in texts)
    prose = list(islice(read_labelled(LabelledSettings(source="code_or_prose"), 0, packages), 40))
    assert {text.label for text in prose} == {"code", "prose"}


def test_languages_are_told_apart_on_texts_that_no_probe_has_seen_in_any_language():
    task = LabelledSettings(source="languages")
    (listed,) = list_labelled([task])
    texts = list(read_labelled(task, 0, listed))
    kept = chosen_texts(texts, ProbingSettings(tasks=(task,)), "here")
    assert list(kept) == ["dutch", "english", "french", "german", "italian", "spanish"]
    for found in kept.values():  # of one document in every language
        assert {text.document for text in found} == {f"text {place}" for place in range(10)}
    assert len({text.text for text in texts}) == 60
    letters = np.array(
        [[text.text.lower().count(letter) / len(text.text) for letter in "aeioukwznàéèñüßòùj"] for text in texts]
    )
    labels = np.unique([text.label for text in texts], return_inverse=True)[1]
    documents = np.array([int(text.document.split()[1]) for text in texts])
    values = {"sae": letters, "coordinates": letters, "random_directions": letters[:, :4]}
    values = {name: part.astype(np.float32) for name, part in values.items()}
    found, _ = probe("languages", Passages(values=values, labels=labels, documents=documents, names=tuple(kept)), SETTINGS)
    assert found["languages/dense"] > 0.8  # shares of letters say it


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """40 rows with one of two topics, each of words of its own."""
    path = tmp_path / "labelled.jsonl"
    words = {"a": "alpha beta gamma delta", "b": "import return yield lambda"}
    rows = [{"body": f"{number} {words['ab'[number % 2]]} " * 6, "topic": "ab"[number % 2]} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_probes(tree: dict, path: Path) -> dict:
    task = {"source": "files", "name": "topics", "paths": [str(path)], "text_column": "body", "label_column": "topic"}
    probing = {"tasks": [task], "k": [1, 2], "passage_tokens": 24, "passages_per_document": 1}
    evaluation = {"tokens": 300, "reference_tokens": 500, "baselines": [], "probing": probing}
    return {**tree, "evaluation": evaluation, "training": {**tree["training"], "tokens": 3_000}}


def test_a_run_says_what_its_features_say_of_a_column_of_labels(tiny_tree: dict, labelled: Path):
    tree = with_probes(tiny_tree, labelled)
    tree["evaluation"] |= {"absorption": {"tokens": 2_000}, "meta_structure": {"steps": 20}}
    run = resolve(parse_config(tree))
    late_checks.require_labelled_text(run.config)
    steps.extract(run)
    steps.train(run)
    plain = {name: tree["evaluation"][name] for name in ("tokens", "reference_tokens", "baselines")}
    without = resolve(parse_config({**tree, "evaluation": plain}))
    assert without.run_digest != run.run_digest
    assert without.sae_digest == run.sae_digest
    before = steps.evaluate(without)
    assert before.optional == {}
    record = steps.evaluate(run)
    assert record.metrics == before.metrics
    found = record.optional["probing"]
    assert (found["topics/documents"], found["topics/passages"], found["topics/labels"]) == (40, 40, 2)
    assert found["topics/dense"] > 0.9  # even a random model passes words on
    names = {name.split("/")[1] for name in found}
    assert {f"{kind}_{k}{end}" for kind in ("sae", "coordinates", "random_directions", "random_features") for k in (1, 2)
            for end in ("", "_low", "_high")} <= names  # fmt: skip
    job = steps.evaluation_job(run)  # as workers do it, who hand in sums
    reference = steps.evaluation_reference(job, CPU)
    spans = sae_spans(job.settings, job.text, 2)
    sums = [steps.measure_span(job, reference.mean, reference.exclusion, CPU, span) for span in spans]
    assert steps.finish_evaluation(run, merged(sums), None).optional == record.optional
    assert {"explained_variance", "random_explained_variance_low"} <= set(record.optional["meta_structure"])
    assert record.optional["absorption"]["labels"] > 0  # what a token is made of is in any model's embedding
    with steps.tracked(run, {}) as tracked:
        outcome = steps.register(run, tracked)
    logged = tracked.client.get_run(tracked.run_id).data.metrics
    assert logged["absorption/fraction"] == record.optional["absorption"]["fraction"]
    assert logged["probing/topics/sae_2"] == found["topics/sae_2"]
    assert logged["probing/topics/sae_2_low"] == found["topics/sae_2_low"]
    card = tracked.client.get_model_version(outcome.registered_model, outcome.model_version).description
    assert len(card) <= 5_000
    assert f"| topics | this SAE | {found['topics/sae_1']:.3f} (" in card
    report = Path(run.sae_url, "report.html").read_text()
    assert "What k features say of a label" in report
    assert steps.summary(run, outcome, {}, reused=False).as_json()["optional"]["probing"] == found


def test_a_passage_is_the_mean_over_its_counted_tokens(tiny_tree: dict, labelled: Path, monkeypatch: pytest.MonkeyPatch):
    """One passage at a time, unpadded, in float64 by hand."""
    from components.evaluation import probing as module

    tree = with_probes(tiny_tree, labelled)
    tree["activations"]["exclude"] = {"positions": [2]}
    run = resolve(parse_config(tree))
    steps.extract(run)
    steps.train(run)
    seen: list[Passages] = []
    monkeypatch.setattr(module, "probe", lambda _task, found, _settings: (seen.append(found), ({}, []))[1])
    steps.evaluate(run)
    (found,) = seen
    sae, model, encoder = own_sae(run.sae_url, CPU), load_model(run.source, CPU), load_encoder(run.source)
    settings = run.config.evaluation.probing
    assert settings is not None
    texts = chosen_texts(read_labelled(settings.tasks[0], 0, run.labelled[0]), settings, "f")
    row = 0
    for label, every in enumerate(texts.values()):
        for text in every:
            ids = torch.tensor([[encoder.bos, *encoder.encode([text.text])[0][:24]]])
            x = model.model(ids, output_hidden_states=True).hidden_states[2][0, [1, *range(3, ids.shape[1])]]
            assert found.labels[row] == label
            np.testing.assert_allclose(found.values["coordinates"][row], x.double().mean(dim=0).detach(), atol=1e-5)
            features = sae.reconstruct(x)[0].dense().double().mean(dim=0).detach()
            np.testing.assert_allclose(found.values["sae"][row], features, atol=1e-5)
            row += 1
    assert row == len(found.labels) == 40


def test_labelled_text_is_named_by_its_content_and_not_by_its_place(tiny_tree: dict, labelled: Path, tmp_path: Path):
    first = resolve(parse_config(with_probes(tiny_tree, labelled))).evaluation_identity("0" * 64)
    (tmp_path / "moved").mkdir()
    moved = labelled.rename(tmp_path / "moved" / labelled.name)
    assert resolve(parse_config(with_probes(tiny_tree, moved))).evaluation_identity("0" * 64) == first
    moved.write_text(moved.read_text() + '{"body": "one more", "topic": "a"}\n')
    assert resolve(parse_config(with_probes(tiny_tree, moved))).evaluation_identity("0" * 64) != first


def test_parquet_is_read_like_jsonl(labelled: Path, tmp_path: Path):
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "labelled.parquet")
    found = {}
    for path in (labelled, tmp_path / "labelled.parquet"):
        task = LabelledSettings(source="files", paths=(str(path),), text_column="body", label_column="topic")
        (listed,) = list_labelled([task])
        found[path.suffix] = [(text.text, text.label) for text in read_labelled(task, 0, listed)]
    assert found[".jsonl"] == found[".parquet"] == [(row["body"], row["topic"]) for row in rows]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"label_column": "subject"}, "evaluation.probing.tasks.0.label_column: 'subject' is not in labelled.jsonl:1"),
        ({"text_column": "words"}, "evaluation.probing.tasks.0.text_column: 'words' is not in"),
        ({"label_column": "body"}, "0 of its 40 labels have at least 5 documents"),
        ({"paths": ["nowhere.jsonl"]}, "evaluation.probing.tasks.0.paths: 'nowhere.jsonl' names no file"),
    ],
)
def test_labelled_text_that_does_not_fit_is_one_sentence_before_anything_is_done(
    tiny_tree: dict, labelled: Path, change: dict, sentence: str
):
    tree = with_probes(tiny_tree, labelled)
    tree["evaluation"]["probing"]["tasks"][0] |= change
    with pytest.raises(UserError, match=sentence):
        late_checks.check_later_steps(resolve(parse_config(tree)).config, 64, "name", True)


def test_a_table_has_a_line_for_each_probe():
    metrics = {f"my/task/{kind}_{k}": k / 100 for kind in ("sae", "random_directions") for k in (1, 16)}
    metrics |= {"my/task/sae_1_low": 0.005, "my/task/sae_1_high": 0.02, "my/task/dense": 0.9, "my/task/passages": 3}
    table = lines(metrics)
    assert [(line.task, line.kind) for line in table] == [("my/task", kind) for kind in ("sae", "random_directions", "dense")]
    assert sizes(table) == [1, 16]
    assert [line.cell(1) for line in table] == ["0.010 (0.005 to 0.020)", "0.010", "0.900"]


@pytest.mark.parametrize("place", ["transcoder", "crosscoder"])
def test_a_coder_that_writes_elsewhere_is_probed_by_what_it_reads(tiny_tree: dict, labelled: Path, place: str):
    tree = with_probes(tiny_tree, labelled)
    points = ["mlp_in.1", "mlp_out.1"] if place == "transcoder" else ["resid_post.0", "resid_post.1"]
    where = {"hook_point": points[0], "target": points[1]} if place == "transcoder" else {"crosscoder": points}
    tree["activations"]["hook_points"] = points
    tree["training"] |= where
    tree["evaluation"] |= {"absorption": {"tokens": 500}, "meta_structure": {"steps": 5}}
    run = resolve(parse_config(tree))
    steps.extract(run)
    steps.train(run)
    found = steps.evaluate(run).optional
    assert found["probing"]["topics/dense"] > 0.9
    assert {"topics/sae_2", "topics/sae_2_low"} <= set(found["probing"])
    assert "explained_variance" in found["meta_structure"]
    assert "absorption" not in found  # its features do not add up to what they are read from
    with pytest.raises(UserError, match="--format: SAEBench's core result is of SAEs"):
        steps.require_autoencoder(run)
