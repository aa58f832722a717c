"""Retrains from CI: inputs, exit codes and the report; against a real server in integration/test_ci_retrain.py."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import State, StateType
from typer.testing import CliRunner

from components import storage
from infra.ci import flow_runs, report, run
from infra.ci.flow_runs import Job, follow, table_rows
from infra.ci.report import Outcome, Stop
from infra.ci.retrain import app, checked

HOSTILE = "a|b `c` <script>x</script>\n::error::y [z](https://evil.example) *d* @team #7 \x1b[2J\u202eback"


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command with these variables; its exit code, all its output, and what it wrote to GitHub's files."""
    for name in ("GITHUB_SHA", "GITHUB_RUN_ID", "GITHUB_REPOSITORY"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str, **environment: str) -> SimpleNamespace:
        files = {name: tmp_path / name for name in ("GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT", "SAE_COMMENT_FILE")}
        for path in files.values():
            path.unlink(missing_ok=True)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        result = CliRunner().invoke(app, arguments, env={name: str(path) for name, path in files.items()})
        texts = {name: path.read_text() if path.exists() else "" for name, path in files.items()}
        return SimpleNamespace(
            code=result.exit_code,
            output=result.output,
            summary=texts["GITHUB_STEP_SUMMARY"],
            outputs=texts["GITHUB_OUTPUT"],
            comment=texts["SAE_COMMENT_FILE"],
        )

    return run


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("sae: {d_sea: 64}", r"bad\.yaml: sae\.d_sea: there is no such field, did you mean 'd_sae'\?"),
        ("training: {tokens: -1}", r"bad\.yaml: training\.tokens: -1 is not accepted"),
        ("- 1", r"bad\.yaml' holds a list"),
        ("a: [", r"bad\.yaml' is not YAML"),
    ],
)
def test_a_wrong_configuration_ends_before_any_server_is_asked(call, tmp_path: Path, text: str, wanted: str):
    bad = tmp_path / "bad.yaml"
    bad.write_text(text)
    # Were the server asked, it would be 3: nothing listens there.
    done = call(SAE_CONFIGS=f"quickstart\n{bad}", PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.code == 2
    assert re.search(wanted, done.output)
    assert done.outputs == "verdict=Invalid\n"
    assert "not started" in done.summary


def test_other_wrong_inputs_exit_with_2(call):
    assert call().code == 2
    assert call("quickstart", SAE_FORCE="perhaps").code == 2
    assert call("quickstart", SAE_FORCE="", SAE_DEPLOYMENT="retrain").code == 2
    assert call("quickstart", SAE_TIMEOUT_MINUTES="soon").code == 2


def test_the_tree_is_sent_as_it_is_written(tmp_path: Path):
    path = tmp_path / "own.yaml"
    path.write_text("name: own\nsae: {d_sae: 64}\n")
    first, shipped = checked([str(path), "quickstart", str(path)], True, "c" * 40, "ci-1-1")
    config, parameters, key = first
    assert config == str(path)
    assert parameters == {"config": {"name": "own", "sae": {"d_sae": 64}}, "force": True, "commit": "c" * 40}
    assert key.startswith("ci-1-1-own-")
    assert shipped[1]["config"]["name"] == "quickstart"
    assert checked([str(path)], True, None, "ci-1-1")[0][2] == key
    assert checked([str(path)], True, None, "ci-1-2")[0][2] != key
    path.write_text("name: own\nsae: {d_sae: 128}\n")
    assert checked([str(path)], True, None, "ci-1-1")[0][2] != key


def test_a_configuration_on_an_object_store(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "read_bytes", lambda url: b"name: far\n")
    (far,) = checked(["s3://bucket/far.yaml"], False, None, "ci-1-1")
    assert far[1]["config"] == {"name": "far"}


def test_a_server_that_is_not_there_is_one_sentence_soon(call, prefect_api, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flow_runs, "FIRST_CONTACT_SECONDS", 1.0)
    prefect_api("http://someone:hidden@127.0.0.1:9/api")
    started = time.monotonic()
    done = call("quickstart")
    assert time.monotonic() - started < 10
    assert done.code == 3
    assert "error the Prefect server http://127.0.0.1:9/api cannot be reached" in done.output
    assert "hidden" not in done.output + done.summary
    assert done.outputs == "verdict=Unreachable\n"


def test_no_server_is_named(call, prefect_api):
    prefect_api(None)
    done = call("quickstart")
    assert done.code == 3
    assert "PREFECT_API_URL is not set" in done.output


@pytest.mark.parametrize(
    ("status", "body", "wanted"),
    [
        (401, '{"exception_message": "Unauthorized"}', "refuses the credentials in PREFECT_API_AUTH_STRING"),
        (404, '{"detail": "Deployment not found"}', "there is no deployment 'retrain/ci'"),
        (200, "<!doctype html>", "PREFECT_API_URL usually ends in /api"),
    ],
)
def test_a_server_that_does_not_help(call, prefect_api, status: int, body: str, wanted: str):
    with answering((status, body)) as url:
        prefect_api(url)
        done = call("quickstart")
    assert done.code == 3
    assert wanted in done.output


def test_a_server_that_answers_with_an_error_is_not_said_to_be_away(call, prefect_api, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flow_runs, "FIRST_CONTACT_SECONDS", 5.0)
    with answering((500, '{"detail": "a number out of range"}')) as url:
        prefect_api(url)
        done = call("quickstart")
    assert done.code == 3
    assert "the Prefect server answers HTTP 500 a number out of range; trying again" in done.output
    assert "is away" not in done.output


def test_a_deployment_is_waited_for_by_asking_again(prefect_api, capsys):
    """As `prefect deployment run --watch`, without the stream of events: this server has none."""
    known = {"id": str(uuid4()), "flow_id": str(uuid4()), "name": "quickstart"}
    states = ["PENDING", "RUNNING", "RUNNING", "COMPLETED"]
    looks = [json.dumps({**known, "state": {"type": state}}) for state in states]
    for ends, code in ((looks, 0), ([*looks[:2], looks[1].replace("RUNNING", "FAILED")], 1)):
        answers = [json.dumps(known), json.dumps({**known, "state": {"type": "SCHEDULED"}}), *ends, "[]"]
        with answering(*((200, answer) for answer in answers)) as url:
            prefect_api(url)
            assert run.main("pipeline/quickstart", pause=0.01) == code
    assert "pipeline/quickstart: Running" in capsys.readouterr().out


@contextmanager
def answering(*answers: tuple[int, str]) -> Iterator[str]:
    """Address of an API that gives one answer after the other, whatever is asked; the last one again and again."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if "csrf-token" in self.path or "/version" in self.path:
                status, body = 404, "{}"
            else:
                status, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/api"
    server.shutdown()
    server.server_close()


@pytest.fixture
def prefect_api(monkeypatch: pytest.MonkeyPatch):
    """Sets PREFECT_API_URL for Prefect, which has read the environment long ago."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    contexts = []

    def use(url: str | None) -> None:
        unset = set() if url else {PREFECT_API_URL}
        context = temporary_settings({PREFECT_API_URL: url} if url else None, restore_defaults=unset)
        context.__enter__()
        contexts.append(context)

    yield use
    for context in reversed(contexts):
        context.__exit__(None, None, None)


class FakeServer:
    """Gives one state after the other; the last one again and again."""

    def __init__(self, *states: State, artifacts: dict[str, Any] | None = None) -> None:
        self.states, self.found = list(states), artifacts or {}

    def state(self, run: Any) -> State:
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def artifacts(self, run: Any, keys: list[str]) -> dict[str, Any]:
        return self.found


def followed(*states: State, minutes: float = 1, grace: float = 0, **artifacts: Any) -> Outcome:
    job = Job("own", {}, "key", run=uuid4())
    follow(FakeServer(*states, artifacts=artifacts), [job], minutes, grace, 0.01)  # type: ignore[arg-type]
    assert job.outcome is not None
    return job.outcome


RUNNING = State(type=StateType.RUNNING)


@pytest.mark.parametrize(
    ("state", "verdict", "code"),
    [
        (State(type=StateType.COMPLETED, name="Promoted", message="better"), "Promoted", 0),
        (State(type=StateType.COMPLETED, name="NothingToDo", message="same digest"), "NothingToDo", 0),
        (State(type=StateType.COMPLETED, name="Refused", message="l0 too high"), "Refused", 1),
        (State(type=StateType.COMPLETED, message="?"), "Failed", 1),
        (State(type=StateType.FAILED, name="Promoted", message="a lie"), "Failed", 1),
        (State(type=StateType.FAILED, name="TimedOut", message="over 60 s"), "TimedOut", 1),
        (State(type=StateType.CANCELLED, message="by hand"), "Cancelled", 1),
        (State(type=StateType.CRASHED, message="killed"), "Crashed", 1),
    ],
)
def test_how_a_flow_run_ends_decides_the_exit_code(state: State, verdict: str, code: int):
    outcome = followed(RUNNING, state)
    assert (outcome.verdict, report.exit_code([outcome])) == (verdict, code)
    assert state.message in outcome.reason


def test_a_crashed_run_may_come_back():
    crashed = State(type=StateType.CRASHED)
    back = State(type=StateType.SCHEDULED, name="AwaitingRetry")
    done = State(type=StateType.COMPLETED, name="Promoted")
    assert followed(RUNNING, crashed, crashed, back, RUNNING, done, grace=60).verdict == "Promoted"
    started = time.monotonic()
    assert followed(crashed, grace=0.3).verdict == "Crashed"
    assert time.monotonic() - started > 0.3


def test_the_time_to_wait_ends():
    outcome = followed(State(type=StateType.SCHEDULED, name="Late"), minutes=0.002)
    assert outcome.verdict == "StillRunning"
    assert "still Late" in outcome.reason
    assert "worker" in outcome.reason
    assert report.exit_code([outcome]) == 1


def test_a_refused_parameter_cancels_what_was_started():
    cancelled: list[Any] = []

    class Refusing(FakeServer):
        def start(self, parameters: dict[str, Any], tags: list[str], key: str, patience: float = 0) -> Any:
            if key == "second":
                raise Stop(2, "no such field")
            assert tags == ["ci"]
            return uuid4()

        def cancel(self, run: Any) -> None:
            cancelled.append(run)

        def page(self, run: Any) -> None:
            return None

    refusing, both = Refusing(RUNNING), [Job("a.yaml", {}, "first"), Job("b.yaml", {}, "second")]
    with pytest.raises(Stop, match=r"b\.yaml: no such field") as stop:
        flow_runs.start(refusing, both, ["ci"])  # type: ignore[arg-type]
    assert stop.value.exit_code == 2
    assert cancelled == [both[0].run]


def test_one_bad_end_among_many_decides():
    outcomes = [Outcome("a", "Promoted", ""), Outcome("b", "NothingToDo", ""), Outcome("c", "Refused", "")]
    assert (report.exit_code(outcomes[:2]), report.overall(outcomes[:2])) == (0, "Promoted")
    assert (report.exit_code(outcomes), report.overall(outcomes)) == (1, "Refused")
    assert report.overall([*outcomes, Outcome("d", "Crashed", "")]) == "Failed"
    assert report.overall(outcomes[1:2]) == "NothingToDo"


def test_the_report_shows_tables_and_links():
    metrics = table_rows(
        json.dumps([{"metric": "explained_variance", "this version": 0.881234567, "champion": None, "change": "+0.01"}])
    )
    gates = [{"gate": "l0", "verdict": "passed", "measured": 12, "required": "<= 20", "short by": ""}]
    outcome = Outcome("flows/configs/quickstart.yaml", "Promoted", "better", "https://x:y@ui.example/runs/1", metrics, gates)
    outcome.mlflow = "- MLflow run: `abc`\n- [open it](https://mlflow.example/#/runs/abc)"
    text = report.report([outcome], "ab" * 20, "owner/name", "https://github.com")
    assert text.startswith("## Retrain of flows/configs/quickstart.yaml: Promoted\n\nbetter\n")
    assert "| explained_variance | 0.881235 | - | +0.01 |" in text
    assert "| l0 | passed | 12 | &lt;= 20 |  |" in text
    assert "- MLflow run: abc\n- [open it](https://mlflow.example/#/runs/abc)" in text
    assert "(https://ui.example/runs/1)" in text
    assert f"[abababababab](https://github.com/owner/name/commit/{'ab' * 20})" in text
    two = report.report([outcome, Outcome("b", "Crashed", "killed")])
    assert two.startswith("## Retrains: Failed\n")
    assert "## Retrain of b: Crashed\n\nkilled" in two


def test_nothing_that_a_flow_says_is_more_than_text():
    row = {"metric": HOSTILE, "this version": HOSTILE, "champion": HOSTILE, "change": HOSTILE}
    outcome = Outcome(HOSTILE, "Refused", HOSTILE, "javascript:alert(1)", [row], mlflow=f"{HOSTILE}\n[a](javascript:b)")
    text = report.report([outcome], commit="$(id)")
    for forbidden in ("<script", "\x1b", "\u202e", "@team", "#7", "Commit:"):
        assert forbidden not in text
    assert not re.search(r"(?<!\\)\]\((?!https)", text)
    cells = next(line for line in text.splitlines() if line.startswith("| a"))
    assert len(re.findall(r"(?<!\\)\|", cells)) == 5
    assert not re.search(r"(?<!\\)`", text)
    assert len(re.findall(r"(?<!\\)\[", text)) == 1, "only the link that stood in the flow's own Markdown"
    for line in text.splitlines():
        assert "::" not in report.log_line(line)
    assert "##[" not in report.log_line("##[error]x")


def test_a_terminal_gets_the_report_without_the_escapes_of_markdown():
    sentence = r"[Errno 2] a < b & c <= d in C:\x, `y` *z* _u_ @v #1 &lt;w&gt; a|b ~"
    assert report.plain(report.markdown_text(sentence)) == sentence


def test_the_command_prints_plain_text_and_writes_markdown(call):
    done = call("[a<=b].yaml")
    assert done.code == 2
    assert "[a<=b]" in done.output
    assert "&lt;" not in done.output
    assert r"\[a&lt;=b\]" in done.summary


def test_long_reports_fit_into_a_comment():
    rows = [{"metric": "x" * 1000, "this version": number} for number in range(500)]
    text = report.report([Outcome("a", "Refused", "y" * 5000, metrics=rows)])
    assert "300 more rows" in text
    short = report.for_comment(text + "z\n" * 60_000)
    assert len(short) < 65_000
    assert short.endswith("The rest is in the job's summary.\n")


@pytest.mark.parametrize("data", [None, "not JSON", '{"a": 1}', 3, ["text"]])
def test_a_table_that_is_none_is_left_out(data: Any):
    assert table_rows(data) == []
