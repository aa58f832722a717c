"""An explainer's server that is busy, silent, rude or hostile, and answers that are none."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from completions import Handler, Reply, quick, serving, slept, usage

from components.interpretation.explanations.asking import Charged, Unavailable
from components.interpretation.explanations.cost import Answers, Budget, Prices
from components.interpretation.explanations.endpoint import retry_after
from components.interpretation.explanations.prompts import read_explanation, read_judgements
from components.interpretation.explanations.scoring import balanced_accuracy

KEY = "sk-planted-8f2c"
MESSAGES = [{"role": "user", "content": "héllo"}]


def rude(status: int = 200, content: bytes = b"", **headers: str) -> Reply:
    return lambda handler, _: handler.send(status, content, **headers)


def well(handler: Handler, body: dict[str, Any]) -> None:
    handler.say("fine", usage(body))


def in_turn(*replies: Reply) -> Any:
    return lambda number, _body: replies[min(number, len(replies) - 1)]


def test_a_busy_server_is_waited_for_as_long_as_it_asks():
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    with serving(in_turn(rude(429, Retry_After="7"), rude(503, Retry_After=later), well)) as server:
        assert quick(server.base, "m", None).ask(MESSAGES, 20).text == "fine"
        assert "Authorization" not in server.requests[0][1]
    assert slept[0] == 7
    assert 20 < slept[1] <= 30
    assert [retry_after(header, 0.0) for header in (None, "soon", "-5", "1e9", "nan")] == [None, None, 0.0, 120.0, None]


def test_a_server_that_stays_busy_or_is_not_there_is_given_up():
    with serving(in_turn(rude(500))) as server:
        with pytest.raises(Unavailable, match="did not answer 3 times: status 500"):
            quick(server.base, "m", None).ask(MESSAGES, 20)
        assert len(server.requests) == 3
        base = server.base
    with pytest.raises(Unavailable, match="did not answer 3 times"):
        quick(base, "m", None).ask(MESSAGES, 20)


def test_a_refusal_or_redirect_ends_it_at_once_and_the_key_goes_nowhere():
    with serving(in_turn(well)) as other:
        for status in (400, 401, 403, 404, 307):
            with serving(in_turn(rude(status, b"no", Location=f"{other.base}/chat/completions"))) as server:
                with pytest.raises(Unavailable, match=f"refuses: status {status}"):
                    quick(server.base, "m", KEY).ask(MESSAGES, 20)
                assert len(server.requests) == 1
        assert other.requests == []


def cut_off(handler: Handler, _body: dict[str, Any]) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def silent(handler: Handler, _body: dict[str, Any]) -> None:
    time.sleep(0.5)
    handler.close_connection = True


def chat(content: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


@pytest.mark.parametrize(
    "reply",
    [
        rude(content=b""), rude(content=b"<html>"), rude(content=b"[]"), rude(content=b"null"),
        rude(content=b'{"choices": []}'),
        rude(content=b'{"choices": [{"message": {}}]}'), rude(content=chat(None)), rude(content=chat("  \n")),
        rude(content=chat(["a"])), rude(content=b"[" * 100_000), rude(content=chat("x" * (1 << 22))), rude(content=b"\xff\xfe"),
        cut_off, silent,
    ],
)  # fmt: skip
def test_what_is_no_answer_counts_as_paid_for_at_the_most_and_stops_after_a_few(reply: Reply, tmp_path: Path):
    with serving(in_turn(reply)) as server:
        budget = Budget(1.0)
        explainer = quick(server.base, "m", None, timeout=0.2)
        answers = Answers(explainer, str(tmp_path), Prices(1000.0, 1000.0), budget, 20)
        with pytest.raises(Charged):
            answers.ask(MESSAGES)
        worst = (6 + 64 + 20) * 1e-3  # bytes of it, what a template may add, the answer
        assert budget.spent == pytest.approx(worst)
        for attempt in range(1, 4):
            with pytest.raises(Charged):
                answers.ask(MESSAGES, attempt)
        with pytest.raises(Unavailable, match="no usable answer 5 times in a row"):
            answers.ask(MESSAGES, 4)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("told", [{"prompt_tokens": -5, "completion_tokens": 3}, {"prompt_tokens": "1"}, "free", [], {}])
def test_a_bill_that_is_none_is_taken_for_the_worst(told: Any, tmp_path: Path):
    with serving(in_turn(lambda handler, _: handler.say("fine", told))) as server:
        budget = Budget(1.0)
        assert Answers(quick(server.base, "m", None), str(tmp_path), Prices(1000.0, 1000.0), budget, 20).ask(MESSAGES) == "fine"
    assert budget.spent == pytest.approx(0.09)


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("EXPLANATION: a thing", "a thing"), ("thinking\n[EXPLANATION]: a  thing \nmore", "a thing"), ("a thing", "a thing"),
        ("EXPLANATION: one\nEXPLANATION: two", "one"), ("EXPLANATION:   ", "EXPLANATION:"), ("...", None),
        ("\u200b\u202e", None),
        ("x" * 500, None), ("**Explanation:** a thing", "** a thing"),
    ],
)  # fmt: skip
def test_explanations_are_read(answer: str, read: str | None):
    assert read_explanation(answer) == read


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("[1, 0]", [True, False]), ("I think [0,0,0] or better:\n[0, 1].", [False, True]), ("[true, false]", [True, False]),
        ("[1]", None), ("[1, 2]", None), ("[1, 0.0]", None), ("", None), ("[[1, 0]]", [True, False]), ('["1", "0"]', None),
        ("[1,", None),
    ],
)  # fmt: skip
def test_judgements_are_read_or_are_none(answer: str, read: list[bool] | None):
    assert read_judgements(answer, 2) == read


def test_balanced_accuracy_weighs_both_sides_alike():
    assert balanced_accuracy([(True, True)] * 9 + [(False, True)]) == 0.5
    assert balanced_accuracy([(True, True), (True, False), (False, False)]) == 0.75
    assert balanced_accuracy([(True, True), (False, None)]) is None  # nothing is known of one side
    assert balanced_accuracy([(True, True), (False, False), (True, None), (True, None), (False, None)]) is None
    assert balanced_accuracy([]) is None
