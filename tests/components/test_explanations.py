"""Explanations by a server that speaks the protocol, also rudely, and by a model that runs here."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from completions import Handler, Reply, quick, sensible, serving, usage
from transformers import AutoTokenizer

from components import steps
from components.evaluation.held_out import HeldOut
from components.interpretation.explanations import prompts
from components.interpretation.explanations.asking import Answer
from components.interpretation.explanations.cost import Answers, Budget, CapReached, Prices
from components.interpretation.explanations.evidence import Evidence, gather
from components.interpretation.explanations.local import LocalExplainer
from components.interpretation.explanations.prompts import Excerpt
from components.interpretation.explanations.scoring import batches, questions_of, score
from components.interpretation.explanations.table import Explanation, carried, interpretable_share, read_explanations
from components.language_model.loading import load_encoder
from components.registry.gates import Bound, load_gates
from components.registry.promotion import promote
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.settings import UserError
from components.steps.interpretation import held_out_pass

KEY = "sk-planted-8f2c"
MESSAGES = [{"role": "user", "content": "héllo"}]


@pytest.fixture(scope="module")
def made(tiny_tree_in: Callable[[Path], dict], tmp_path_factory: pytest.TempPathFactory) -> dict:
    tree = tiny_tree_in(tmp_path_factory.mktemp("explained"))
    tree["interpretation"] = {"tokens": 1_400, "examples": 3, "drawn": 10}
    tree["interpretation"]["explainer"] = {
        "model": "m", "key_variable": "SOME_API_KEY", "input_price": 1.0, "output_price": 2.0, "shown": 8, "scored": 10,
    }  # fmt: skip
    tree["evaluation"] = {"tokens": 900, "reference_tokens": 1_000, "baselines": []}
    run = resolve(parse_config(tree))
    for step in (steps.extract, steps.train, steps.evaluate, steps.interpret):
        step(run)
    return tree


@pytest.fixture
def plan(made: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Specification:
    """With feature data, in a folder of its own."""
    monkeypatch.setenv("SOME_API_KEY", KEY)
    root = tmp_path / "root"
    shutil.copytree(made["storage"]["root"], root)
    return resolve(parse_config({**made, "storage": {"root": str(root)}}))


def asking(plan: Specification, **explainer: Any) -> Specification:
    settings = plan.config.interpretation
    changed = settings.model_copy(update={"explainer": settings.explainer.model_copy(update=explainer)})
    return plan.model_copy(update={"config": plan.config.model_copy(update={"interpretation": changed})})


def explained(plan: Specification, server: Any, count: int = 6, cap: float = 1.0, **explainer: Any) -> dict[str, Any]:
    return steps.explain(asking(plan, endpoint=server.base, **explainer), count, [], cap, False)


def test_features_are_explained_scored_shown_and_found_and_nothing_is_paid_twice(plan: Specification, capfd):
    with serving(sensible) as server:
        found = explained(plan, server)
        assert (found["explained"], found["failed"], found["stopped"]) == (6, {}, None)
        assert found["requests"] == len(server.requests) > 6
        path, headers, body = server.requests[0]
        assert (path, headers["Authorization"], body["model"]) == ("/v1/chat/completions", f"Bearer {KEY}", "m")
        paid = sum(one["prompt_tokens"] * 1e-6 + one["completion_tokens"] * 2e-6 for one in server.answered)
        assert found["spent"] == pytest.approx(paid, abs=1e-6)
        assert paid <= found["estimate_at_most"]
        assert paid / 4 < found["estimate"] < paid * 4

        asked = len(server.requests)
        assert explained(plan, server)["requests"] == 0
        (Path(plan.sae_url) / "interpretation" / "explanations.parquet").unlink()  # as if it had been killed before the end
        again = explained(plan, server)
        assert (again["explained"], again["requests"], again["spent"], again["estimate_at_most"]) == (6, 0, 0.0, 0.0)
        assert len(server.requests) == asked

    weights = plan.training_record().weights_sha256
    table = read_explanations(plan.sae_url, weights)
    assert len(table) == 6
    assert read_explanations(plan.sae_url, "other weights") == {}
    feature, best = max(table.items(), key=lambda item: item[1].detection or 0)
    assert best.detection >= 0.6  # features of random weights; one token says something of them
    assert {type(one.intruder) for one in table.values()} <= {float, type(None)}
    assert max(one.intruder or 0 for one in table.values()) > 0.5
    assert max(one.specificity or 0 for one in table.values()) > 2
    assert sum(one.detection is not None and one.fuzzing is not None for one in table.values()) >= 3  # some fire everywhere
    shown = steps.show_feature(plan, feature)
    assert shown["explained"]["explanation"] == best.explanation == shown["row"]["explanation"]
    word = best.explanation.split()[-1]
    assert feature in [row["feature"] for row in steps.search_explanations(plan, f"FIRES {word}", 10)]
    assert steps.search_explanations(plan, "no-such-word", 10) == []
    piece = (Path(plan.sae_url) / "browser" / "words" / "00000.js").read_text()
    assert json.loads(piece.removeprefix("words(0, ").removesuffix(");"))[feature][-1] == best.explanation
    # The key is nowhere but in the request.
    for file in Path(plan.config.storage.root).rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    assert KEY not in "".join(capfd.readouterr())


def test_a_gate_asks_for_an_interpretable_share_of_what_was_explained_before_or_after_the_run_is_registered(
    plan: Specification, tmp_path: Path
):
    gates = tmp_path / "explained.yaml"
    gates.write_text(
        "evaluation_tokens: 100\nbounds: {interpretable_share: {at_least: 0.01}, scored_explanations: {at_least: 2}}\n"
        "champion: {must_improve: false}\n"
    )
    tracking = plan.config.tracking.model_copy(update={"gates": str(gates)})
    run = plan.model_copy(update={"config": plan.config.model_copy(update={"tracking": tracking})})
    with steps.tracked(run, {}) as open_run:
        outcome = steps.register(run, open_run)
        client, name = open_run.client, outcome.registered_model
    assert outcome.alias == "challenger"
    assert "interpretable_share (no explanation of its features has been scored yet" in outcome.alias_reason
    assert "interpretation/interpretable_share" not in client.get_run(outcome.mlflow_run).data.metrics
    assert "feature_map.png" in {entry.path for entry in client.list_artifacts(outcome.mlflow_run)}

    with serving(sensible) as server:
        explained(run, server, 6)
    scores = [one.detection for one in read_explanations(run.sae_url, run.training_record().weights_sha256).values()]
    known = [score for score in scores if score is not None]
    share = sum(score >= 0.7 for score in known) / len(known)
    logged = client.get_run(outcome.mlflow_run).data.metrics
    assert (logged["interpretation/interpretable_share"], logged["interpretation/scored_explanations"]) == (share, len(known))
    for wanted, alias in ((share + 0.01, "challenger"), (share, "champion")):
        asked = load_gates(str(gates)).model_copy(update={"bounds": {"interpretable_share": Bound(at_least=wanted)}})
        decision = promote(client, name, "1", asked)
        assert decision.alias == alias, decision.reason
    row = next(row for row in decision.report["gates"] if row["gate"] == "interpretable_share")
    assert row["measured"] == f"{share:.5g}"


def test_explanations_of_an_earlier_version_and_those_without_a_score_count_for_no_share():
    def one(feature: int, detection: float | None, carried_from: str | None = None) -> Explanation:
        return Explanation(
            feature=feature, explanation="x", detection=detection, fuzzing=None, explainer="m", carried_from=carried_from
        )

    assert interpretable_share([one(0, None), one(1, 0.9, "3")]) == {}
    found = interpretable_share([one(0, 0.7), one(1, 0.69), one(2, 0.5), one(3, 1.0), one(4, None), one(5, 0.1, "3")])
    assert found == {"interpretable_share": 0.5, "scored_explanations": 4}


def test_a_run_that_dies_goes_on_without_paying_again(plan: Specification, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("components.interpretation.explanations.endpoint.Endpoint", quick)

    def dying(number: int, body: dict[str, Any]) -> Reply:
        return sensible(number, body) if number % 16 < 14 else lambda handler, _: handler.send(401, b"{}")

    answered = 0
    with serving(dying) as server:
        for _ in range(20):
            found = explained(plan, server, 3, concurrency=2)
            answered += found["requests"]
            if found["stopped"] is None:
                break
            assert "refuses: status 401" in found["stopped"]
        assert found["total"] == 3
        assert answered == len(server.answered)
        texts = [json.dumps(body["messages"]) for _, _, body in server.requests]
    assert answered == len(set(texts))


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("cap", [0.0, 0.01, 0.03])
def test_the_cap_is_never_exceeded(plan: Specification, cap: float, told: bool):
    def dear(_number: int, _body: dict[str, Any]) -> Reply:
        """Charges for every byte, says so or does not."""

        def reply(handler: Handler, body: dict[str, Any]) -> None:
            charged.append(usage(body, per_token=1, written=body["max_tokens"]))
            handler.say("[1]" if "JSON" in body["messages"][0]["content"] else "EXPLANATION: x", charged[-1] if told else None)

        return reply

    charged: list[dict[str, int]] = []
    with serving(dear) as server:
        found = explained(plan, server, cap=cap)
    paid = sum(one["prompt_tokens"] * 1e-6 + one["completion_tokens"] * 2e-6 for one in charged)
    assert paid <= found["spent"] + 1e-6 <= cap + 2e-6
    assert found["stopped"] == "the cost cap is reached"
    assert (found["requests"] == 0) == (cap == 0)


def test_many_threads_never_spend_more_than_there_is():
    budget, random = Budget(1.0), np.random.default_rng(0)
    worsts = random.random(400) * 0.1

    def work(some: np.ndarray) -> None:
        for worst in some:
            try:
                budget.reserve(worst)
            except CapReached:
                continue
            time.sleep(0)
            budget.settle(worst, worst * 0.5)

    threads = [threading.Thread(target=work, args=(part,)) for part in np.split(worsts, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert 0.8 < budget.spent <= 1.0


def test_a_hostile_answer_is_shown_as_text_or_not_at_all(plan: Specification):
    hostile = "EXPLANATION: </script><script>alert(1)</script>\x1b[31m\u202eevil\x00 [bold]x[/bold]" + "y" * 10_000

    def reply(_number: int, body: dict[str, Any]) -> Reply:
        return lambda handler, body: handler.say(hostile, usage(body))

    with serving(reply) as server:
        found = explained(plan, server, count=2)
    assert found["explained"] == 2
    for one in read_explanations(plan.sae_url, plan.training_record().weights_sha256).values():
        assert one.explanation.startswith("</script><script>alert(1)</script> [31m evil [bold]x[/bold]")
        assert len(one.explanation) <= prompts.LONGEST
        assert (one.detection, one.fuzzing) == (None, None)
    for path in (Path(plan.sae_url) / "browser").rglob("*.js"):
        if path.name not in ("browser.js", "map.js", "page.js", "data.js"):  # ours; all others hold data
            assert not re.search("[<\x1b\u202e\x00]", path.read_text()), path


# Evidence


def test_evidence_is_what_the_features_do_and_what_is_scored_was_not_shown(plan: Specification):
    held_out = held_out_pass(plan, HeldOut(url=plan.token_url, manifest=plan.token_manifest()))
    features = [0, 3, 11, 40]
    some = gather(held_out, features, 8, 10, str)
    batches = list(held_out.batches())
    tokens = torch.cat([torch.tensor(batch.block.tokens).long() for batch in batches]).numpy()
    activations = torch.cat([batch.activations() for batch in batches]).numpy()
    windows = {}
    for row in range(len(tokens)):
        for place in range(tokens.shape[1]):
            start = max(0, place - 23)
            windows.setdefault(tuple(map(str, tokens[row, start : place + 9])), []).append((row, start, place))
    assert [one.feature for one in some] == features
    for one in some:
        taken: set[tuple[int, int]] = set()
        assert 1 <= len(one.shown) <= 8
        assert len(one.firing) <= 10
        assert len(one.silent) <= 10
        assert one.largest == max(max(excerpt.activations) for excerpt in one.shown)
        for excerpt in (*one.shown, *one.firing):
            row, start, place = next(
                (row, start, place)
                for row, start, place in windows[excerpt.tokens]
                if np.allclose(activations[row, start : start + len(excerpt.tokens), one.feature], excerpt.activations)
            )
            assert activations[row, place, one.feature] > 0
            own = {(row, at) for at in range(place - 15, place + 16)}
            assert not taken & own
            taken |= own
        for excerpt in one.silent:
            assert any(
                not activations[row, start : start + len(excerpt.tokens), one.feature].any()
                for row, start, _ in windows[excerpt.tokens]
            )
    assert sum(len(one.silent) for one in some) >= 10
    single = gather(held_out, [11], 8, 10, str)
    assert single[0] == some[2]


def test_fuzzing_marks_as_many_wrong_tokens_and_none_of_the_right_ones(plan: Specification):
    held_out = held_out_pass(plan, HeldOut(url=plan.token_url, manifest=plan.token_manifest()))
    (one,) = gather(held_out, [11], 8, 10, lambda token: f"{token}.")
    asked = questions_of(one)
    right = {excerpt.marked(excerpt.firing) for excerpt in one.firing}
    assert {question.text for question in asked["fuzzing"] if question.truth} == right
    for question in asked["fuzzing"]:
        if not question.truth:
            source = next(
                excerpt for excerpt in one.firing if excerpt.plain == question.text.replace("<<", "").replace(">>", "")
            )
            marked = [part.count(".") for part in re.findall("<<(.*?)>>", question.text)]
            assert sum(marked) == min(sum(source.firing), len(source.tokens) - sum(source.firing))
            assert question.text not in right
    assert {question.text for question in asked["detection"]} == {excerpt.plain for excerpt in (*one.firing, *one.silent)}
    assert "<<" not in "".join(question.text for question in asked["detection"])
    assert Excerpt(("a", "b", "c", "d"), (0, 1, 1, 0)).marked([False, True, True, False]) == "a<<bc>>d"


def test_intruders_are_found_without_the_explanation_and_grades_are_averaged(tmp_path: Path):
    firing = tuple(Excerpt(("a", f"word{number}", " X", "b"), (0.0, 0.0, 2.0, 0.0)) for number in range(22))
    silent = tuple(Excerpt((f"c{number}", " d", " e", " f"), (0.0, 0.0, 0.0, 0.0)) for number in range(9))
    evidence = Evidence(feature=4, largest=2.0, shown=firing[:2], firing=firing, silent=silent)
    trials = batches("says nothing", evidence, 5, ("intruder",))["intruder"]
    assert len(trials) == 5  # four texts in which it fires for each
    assert [sorted(one.truth for one in trial) for _, trial in trials] == [[False, True, True, True, True]] * 5
    assert len({[one.truth for one in trial].index(False) for _, trial in trials}) > 1
    texts = [one.text for _, trial in trials for one in trial]
    assert len(set(texts)) == 25
    assert all(text.count("<<") == 1 for text in texts)
    assert "says nothing" not in json.dumps([messages for messages, _ in trials])

    class Judge:
        name = "judge"

        def __init__(self, intruder: Callable[[list[str]], str], grades: str) -> None:
            self.intruder, self.grades = intruder, grades

        def ask(self, messages: Any, answer_tokens: int) -> Answer:
            some = re.split(r"(?:^|\n\n)Text \d+: ", messages[1]["content"])[1:]
            if "does not belong" in messages[0]["content"]:
                return Answer(self.intruder(some), 1, 1)
            return Answer(str(json.loads(self.grades)[: len(some)]), 1, 1)

        def close(self) -> None: ...

    def scored(name: str, judge: Judge) -> dict[str, float | None]:
        answers = Answers(judge, str(tmp_path / name), Prices(0, 0), Budget(0.0), 20)
        return score(answers, "x", evidence, 5, ("intruder", "specificity"))

    knows = scored(
        "knows", Judge(lambda some: str([next(n for n, text in enumerate(some, 1) if "<< X>>" not in text)]), "[3, 3, 2, 1, 0]")
    )
    assert knows == {"detection": None, "fuzzing": None, "intruder": 1.0, "specificity": pytest.approx((4 * 9 + 6) / 22)}
    first = sum(not trial[0].truth for _, trial in trials) / 5
    assert scored("first", Judge(lambda _: "[1]", "[4, 0, 0, 0, 0]")) == {**knows, "intruder": first, "specificity": None}
    assert scored("none", Judge(lambda _: "[6]", "[true, 1, 1, 1, 1]")) == dict.fromkeys(knows)


def test_explanations_carry_over_to_persisted_features_and_own_ones_stay():
    def said(feature: int, text: str) -> Explanation:
        return Explanation(feature=feature, explanation=text, detection=0.9, fuzzing=None, explainer="m")

    matches = {
        1: {"status": "persisted", "nearest": 10, "cosine": 0.9}, 2: {"status": "persisted", "nearest": 11, "cosine": 0.8},
        3: {"status": "split", "nearest": 12, "cosine": 0.8}, 4: {"status": "persisted", "nearest": 13, "cosine": 0.8},
    }  # fmt: skip
    found = carried(
        {2: said(2, "own")}, {10: said(10, "ten"), 11: said(11, "eleven"), 12: said(12, "twelve")}, matches, "version 3"
    )
    assert {feature: one.explanation for feature, one in found.items()} == {1: "ten", 2: "own"}
    assert (found[1].feature, found[1].carried_from, found[1].carried_feature, found[1].carried_cosine) == (
        1,
        "version 3",
        10,
        0.9,
    )
    assert found[2].carried_from is None


@pytest.mark.parametrize("template", [None, "{% for one in messages %}{{ one.role }}: {{ one.content }}\n{% endfor %}"])
def test_a_model_that_runs_here_answers(plan: Specification, tiny_model: str, template: str | None, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    if template is not None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(model)
    answer = LocalExplainer(str(model), torch.device("cpu")).ask([{"role": "user", "content": "the sparse feature"}], 5)
    words = len(load_encoder(plan.source).encode(["the sparse feature\n\n"])[0])
    assert (answer.input_tokens > words) is (template is not None)  # the role is there, too
    assert answer.output_tokens <= 5
    found = steps.explain(asking(plan, model=str(model), input_price=None, answer_tokens=16, scored=2), 1, [], 0.0, False)
    assert found["spent"] == 0.0
    assert found["explained"] + len(found["failed"]) == 1
    assert found["requests"] >= 1


def test_mistakes_are_told_before_anything_is_asked(plan: Specification):
    for changes, said in (
        ({"model": None}, "interpretation.explainer.model: not given"),
        ({"endpoint": "http://localhost:1/v1", "input_price": None}, "input_price and output_price: not given"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            steps.explain(asking(plan, **changes), 3, [], None, False)
    with pytest.raises(UserError, match="--feature: 64 is not accepted: there are 0 to 63"):
        steps.explain(asking(plan), 3, [64], None, False)
    for address in ("localhost:8000", "ftp://a/b", "http://u:p@host/v1", "https://host/v1?key=x"):
        with pytest.raises(UserError, match=r"interpretation\.explainer\.endpoint"):
            parse_config({"interpretation": {"explainer": {"endpoint": address}}})


def test_an_estimate_asks_nothing(plan: Specification):
    with serving(sensible) as server:
        found = steps.explain(asking(plan, endpoint=server.base), 4, [], None, True)
        assert server.requests == []
    assert 0 < found["estimate"] < found["estimate_at_most"]


def test_answers_of_another_question_or_explainer_are_not_taken(tmp_path: Path):
    class Echo:
        name = "a"

        def ask(self, messages: Any, answer_tokens: int) -> Answer:
            return Answer(f"{self.name} {messages[0]['content']}", 1, 1)

        def close(self) -> None: ...

    first = Answers(Echo(), str(tmp_path), Prices(0, 0), Budget(0.0), 20)
    assert first.ask(MESSAGES) == "a héllo"
    assert first.ask([{"role": "user", "content": "b"}]) == "a b"
    other = Echo()
    other.name = "b"
    assert Answers(other, str(tmp_path), Prices(0, 0), Budget(0.0), 20).ask(MESSAGES) == "b héllo"
    for file in tmp_path.iterdir():
        file.write_text("{")  # damaged
    assert first.ask(MESSAGES) == "a héllo"
