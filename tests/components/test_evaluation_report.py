"""The report as a page that stands alone, and the classes of tokens that it shows."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np

from components.evaluation.record import About, EvaluationRecord
from components.evaluation.report import render
from components.evaluation.token_classes import CLASSES, TokenClasses


class Words:
    """A tokenizer of a few pieces, some written as byte-level BPE and some as SentencePiece write them."""

    pieces = ("<s>", "Ġthe", "▁cat", "s", "12", "Ġ3", ".", "\n", "Hello", "_x", "�")
    all_special_ids = (0,)

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[number] for number in ids]

    def decode(self, ids):
        return self.pieces[ids[0]].replace("Ġ", " ").replace("▁", "")


def test_tokens_are_classed_by_their_text_and_what_is_before_them():
    found = TokenClasses(Words()).of(np.array([[0, 8, 3, 1, 2, 3, 4, 5, 6, 3, 7, 8, 9, 10]]))
    expected = [
        "other", "word start", "word continuation", "word start", "word start", "word continuation", "number", "number",
        "punctuation", "word start", "whitespace", "word start", "word continuation", "other",
    ]  # fmt: skip
    assert [CLASSES[number] for number in found[0]] == expected


def record() -> EvaluationRecord:
    interval = {"explained_variance_low": 0.8, "explained_variance_high": 0.9}
    losses = {"ce_loss_clean": 2.0, "ce_loss_sae": 2.2, "ce_loss_zero": 9.0, "ce_loss_mean": 8.0}
    quality = {"explained_variance": 0.85, "loss_recovered": 0.97, "l0": 12.0}
    group = {"tokens": 10, **losses, **quality}
    row = {**quality, "ce_loss": 2.2, "kl_divergence": 0.1, "mse": 0.5, "cosine_similarity": 0.9, "tokens": 10}
    return EvaluationRecord(
        digest="0123456789abcdef",
        identity={},
        device="cpu",
        about=About(
            name="<b>mine</b>", language_model="tiny", hook_point="resid_post.1", architecture="relu", d_in=4, d_sae=8
        ),
        metrics={
            **losses, **quality, **interval, "kl_divergence": 0.1, "mse": 0.5, "dead_fraction": 0.25,
            "evaluation_tokens": 1000, "evaluation_documents": 3, "loss_recovered_mean": None,
        },
        breakdown={
            "position": [{**group, "first": 1, "last": 1}, {**group, "first": 2, "last": 3}],
            "token_class": [{**group, "token_class": "number", "explained_variance": None}],
        },
        baselines=[{"name": "sae", **row}, {"name": "pca", **row, "loss_recovered": None}],
    )  # fmt: skip


def test_the_report_stands_alone_and_shows_what_was_measured():
    earlier = [{"name": "version 3", "l0": 9.0, "explained_variance": 0.8, "loss_recovered": None}]
    page = render(record(), np.array([0.5, 0.01, 0.0, 1e-3]), earlier)
    for outside in ("http:", "https:", "src=", "<script", "@import", "url("):
        assert outside not in page
    assert "&lt;b&gt;mine&lt;/b&gt;" in page
    assert "<b>mine" not in page
    assert "0.8000 to 0.9000" in page
    assert "version 3" in page
    assert "1 fired on none" in page
    charts = page.split("<svg")[1:]
    assert len(charts) == 6
    for chart in charts:
        ElementTree.fromstring("<svg" + chart.split("</svg>")[0] + "</svg>")


def test_a_report_of_a_dead_sae_without_a_loss_gap_is_still_a_page():
    metrics = {**record().metrics, "loss_recovered": None, "explained_variance": None, "dead_fraction": 1.0}
    nothing = {"metrics": metrics, "baselines": [], "breakdown": {"position": [], "token_class": []}}
    empty = record().model_copy(update=nothing)
    assert "4 fired on none" in render(empty, np.zeros(4), [])
