"""Flow runs of one deployment: started, watched by asking again and again, cancelled.

A server that is away is waited for, as long as the caller says; what waiting cannot cure ends in a `Stop`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import State, StateType
from prefect.client.schemas.sorting import ArtifactSort
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.utilities.urls import url_for
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_fixed

from components.redaction import without_secrets
from infra.ci.report import EXIT_CODES, Outcome, Stop, say

AWAY_SECONDS = 180.0
"""How long a server that has answered before may be away."""

FIRST_CONTACT_SECONDS = 10.0
"""With a last attempt that hangs (four connections of 5 s each), a server that is not there is given up in 32 s."""

CANCEL_SECONDS = 4.0
"""GitHub kills a cancelled job ten seconds after its first signal."""

TIMEOUT = httpx.Timeout(15.0, connect=5.0)


@dataclass
class Job:
    """One flow run that is wanted, and what became of it."""

    config: str
    """What it is for, as the user named it."""
    parameters: dict[str, Any]
    key: str
    """Idempotency key: the same one again finds the same flow run."""
    run: UUID | None = None
    asked: bool = False
    """Whether the server may have a flow run of it."""
    page: str | None = None
    shown: str = ""
    """The progress line printed last."""
    crashed: float | None = None
    """When it was first seen crashed (monotonic clock)."""
    outcome: Outcome | None = None


class Server:
    """A Prefect server and one deployment of it."""

    def __init__(self, client: SyncPrefectClient, address: str, deployment: str) -> None:
        self._client, self.address, self.deployment = client, address, deployment
        try:
            self._deployment_id = self._call(FIRST_CONTACT_SECONDS, client.read_deployment_by_name, deployment).id
        except ObjectNotFound as error:
            advice = "create it with `prefect deploy`, or name another one in SAE_DEPLOYMENT"
            raise Stop(3, f"there is no deployment '{deployment}' on {address}: {advice}") from error

    def start(self, parameters: dict[str, Any], tags: list[str], key: str, patience: float = AWAY_SECONDS) -> UUID:
        """Create a flow run, or find the one that the same key created; Stop 2 where the parameters are not accepted."""
        create, named = self._client.create_flow_run_from_deployment, {"parameters": parameters, "idempotency_key": key}
        try:
            return UUID(str(self._call(patience, create, self._deployment_id, tags=tags, **named).id))
        except httpx.HTTPStatusError as error:
            raise Stop(2, f"the deployment '{self.deployment}' does not accept the parameters: {_detail(error)}") from error

    def state(self, run: UUID) -> State[Any] | None:
        """The flow run's state now; raises ObjectNotFound where the run was deleted."""
        found: State[Any] | None = self._call(AWAY_SECONDS, self._client.read_flow_run, run).state
        return found

    def cancel(self, run: UUID) -> None:
        """Ask for the end of a flow run; one that has ended already stays as it is."""
        state: State[Any] = State(type=StateType.CANCELLING, message="the CI job that waited for it was cancelled")
        self._call(CANCEL_SECONDS, self._client.set_flow_run_state, run, state)

    def artifacts(self, run: UUID, keys: list[str]) -> dict[str, Any]:
        """The newest artifact of each key that this run left; those of its subflows belong to other runs."""
        chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]), key=ArtifactFilterKey(any_=keys))
        read = self._client.read_artifacts
        found = self._call(AWAY_SECONDS, read, artifact_filter=chosen, sort=ArtifactSort.CREATED_DESC)
        return {str(artifact.key): artifact.data for artifact in reversed(found)}

    def page(self, run: UUID) -> str | None:
        """The flow run's page in the UI."""
        return without_secrets(url_for("flow-run", obj_id=run) or "") or None

    def _call(self, patience: float, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Repeat a call while the server is away; Stop 3 where it stays away, refuses us, or is no Prefect API."""
        server = f"the Prefect server {self.address}"
        retrying = Retrying(
            retry=retry_if_exception(_passes), stop=stop_after_delay(patience), wait=wait_fixed(2.0), reraise=True,
            before_sleep=_say_once,
        )  # fmt: skip
        try:
            return retrying(call, *arguments, **named)
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (401, 403):
                raise Stop(3, f"{server} refuses the credentials in PREFECT_API_AUTH_STRING") from error
            if not _passes(error):
                raise
            raise Stop(3, f"{server} keeps answering with an error: {_detail(error)}; see its log") from error
        except httpx.TransportError as error:
            cause = f"{type(error).__name__}: {error}".rstrip(": ")
            raise Stop(3, f"{server} cannot be reached ({cause}): is it running, and PREFECT_API_URL right?") from error
        except ValueError as error:  # neither JSON nor what Prefect's models expect
            advice = "PREFECT_API_URL usually ends in /api"
            raise Stop(3, f"{self.address} does not answer as a Prefect API does: {advice}") from error


@contextmanager
def connect(deployment: str) -> Iterator[Server]:
    """The server of PREFECT_API_URL; Stop 3 where it cannot be reached or lacks the deployment."""
    address = without_secrets(PREFECT_API_URL.value() or "")
    if not address:
        # Prefect would start a temporary server of its own, on which there is no deployment.
        raise Stop(3, "PREFECT_API_URL is not set: set it to the API of the Prefect server, such as https://HOST/api")
    with ExitStack() as stack:
        # Prefect's own retries sleep for minutes and say nothing.
        stack.enter_context(temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}))
        try:
            client = stack.enter_context(get_client(httpx_settings={"timeout": TIMEOUT}, sync_client=True))
        except (ValueError, httpx.InvalidURL) as error:
            raise Stop(3, f"PREFECT_API_URL: '{address}' is not an address of a Prefect API: {error}") from error
        yield Server(client, address, deployment)


def start(server: Server, jobs: Sequence[Job], tags: list[str]) -> None:
    """Create the flow runs; where the deployment refuses one, those before it are cancelled and the Stop goes on."""
    for job in jobs:
        job.asked = True
        try:
            job.run = server.start(job.parameters, tags, job.key)
        except Stop as stop:
            if stop.exit_code != 2:
                raise
            job.outcome = Outcome(job.config, "Invalid", str(stop))
            cancel(server, jobs, f"{job.config} was not accepted")
            raise Stop(2, f"{job.config}: {stop}") from stop
        job.page = server.page(job.run)


def follow(
    server: Server, jobs: Sequence[Job], minutes: float, grace: float, pause: float, verdicts: Collection[str] = EXIT_CODES
) -> None:
    """Wait until each has its outcome, printing a line whenever a state changes; when the time is over the rest goes on.

    grace: seconds in which a crashed run may be rescheduled; verdicts: names of Completed states, where others are failures.
    """
    deadline = time.monotonic() + minutes * 60
    while waiting := [job for job in jobs if job.outcome is None]:
        for job in waiting:
            _look(server, job, grace, time.monotonic() >= deadline, verdicts)
        if any(job.outcome is None for job in jobs):
            time.sleep(pause)


def cancel(server: Server, jobs: Sequence[Job], why: str) -> None:
    """Cancel what was started and has not ended; what cannot be cancelled is said and left."""
    for job in jobs:
        if not job.asked or job.outcome is not None:
            continue
        try:
            # A signal may come between the request and its answer: the same key finds what the request created.
            server.cancel(job.run or server.start(job.parameters, ["ci"], job.key, patience=CANCEL_SECONDS))
            reason = f"{why}, and the flow run told to end"
        except Exception as error:
            reason = f"{why}; the flow run could not be, and may go on: {error}"
        job.outcome = Outcome(job.config, "Cancelled", reason, job.page)
        say(f"{job.config}: {reason}")


def table_rows(data: Any) -> list[dict[str, Any]]:
    """The rows of a table artifact; none where it is anything else."""
    try:
        data = json.loads(data) if isinstance(data, str) else data
    except ValueError:
        return []
    return [row for row in data if isinstance(row, dict)] if isinstance(data, list) else []


def _look(server: Server, job: Job, grace: float, late: bool, verdicts: Collection[str]) -> None:
    """Read the flow run once and note what has changed, or how it ended."""
    assert job.run is not None
    try:
        state = server.state(job.run)
    except ObjectNotFound:
        job.outcome = Outcome(job.config, "Failed", f"flow run {job.run} does not exist any more")
        return
    name, message = (state.name or state.type.value.title(), state.message or "") if state else ("Unknown", "")
    line = ", ".join(part for part in (f"{job.config}: {name}", message, job.page) if part)
    if line != job.shown:
        say(line)
        job.shown = line
    now = time.monotonic()
    job.crashed = (job.crashed or now) if state and state.is_crashed() else None
    if job.crashed and now - job.crashed < grace and not late:
        return  # an automation may give it to another worker
    if state and state.is_final():
        verdict = name if state.is_completed() or name == "TimedOut" else state.type.value.title()
        if state.is_completed() and verdicts and name not in verdicts:
            verdict, message = "Failed", f"the flow ended as {name}, which is no verdict ({', '.join(verdicts)}) {message}"
        job.outcome = Outcome(job.config, verdict, message or "the flow gave no reason", job.page)
        found = server.artifacts(job.run, ["metrics", "gates", "mlflow-run"])
        job.outcome.metrics, job.outcome.gates = table_rows(found.get("metrics")), table_rows(found.get("gates"))
        job.outcome.mlflow = str(found.get("mlflow-run") or "")
    elif late:
        hint = "; is a worker of its work pool running?" if name in ("Scheduled", "Late", "Pending") else ""
        reason = f"it was still {name} when the time to wait was over, and goes on{hint}"
        job.outcome = Outcome(job.config, "StillRunning", reason, job.page)


def _passes(error: BaseException) -> bool:
    """Whether the same call may work a little later."""
    if isinstance(error, httpx.HTTPStatusError):
        code = error.response.status_code
        return code in (408, 425, 429) or code >= 500 or (code == 403 and "Invalid CSRF token" in error.response.text)
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)


def _say_once(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    if state.attempt_number == 1 and isinstance(error, httpx.HTTPStatusError):
        say(f"the Prefect server answers {_detail(error)}; trying again")
    elif state.attempt_number == 1:
        say(f"the Prefect server is away ({type(error).__name__}); trying again")


def _detail(error: Any) -> str:
    """What the server says about a refusal, without the request's headers that Prefect's own message would show."""
    try:
        detail = error.response.json().get("detail", "")
    except (ValueError, AttributeError):
        detail = ""
    return f"HTTP {error.response.status_code} {detail}".strip()[:1000]
