"""The Prefect server as a retrain sees it: one deployment, its flow runs, and what they leave behind.

Every call waits while the server is away, for as long as the caller says; what waiting cannot cure ends in a `Stop`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from uuid import UUID

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_fixed

from infra.ci.report import say, without_password

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

AWAY_SECONDS = 180.0
"""How long a server that has answered before may be away."""

FIRST_CONTACT_SECONDS = 10.0
"""With a last attempt that hangs (four connections of 5 s each), a server that is not there is given up in 32 s."""

CONNECT_SECONDS, ANSWER_SECONDS = 5.0, 15.0


class Stop(Exception):
    """The end of the whole retrain: one sentence and the exit code."""

    def __init__(self, exit_code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


class Gone(Exception):
    """The flow run was deleted."""


class Server:
    """`with Server("retrain/ci") as server:`; raises a Stop with code 3 where it cannot be reached or lacks the deployment."""

    def __init__(self, deployment: str) -> None:
        self.deployment = deployment
        self._stack = ExitStack()

    def __enter__(self) -> Server:
        # Imported here: a wrong configuration is refused without the seconds that this takes.
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

        self.address = without_password(PREFECT_API_URL.value() or "")
        if not self.address:
            # Prefect would start a temporary server of its own, on which there is no deployment.
            raise Stop(3, "PREFECT_API_URL is not set: set it to the API of the Prefect server, such as https://HOST/api")
        with ExitStack() as stack:
            # Prefect's own retries sleep for minutes and say nothing; `_call` does both better.
            stack.enter_context(temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}))
            try:
                import httpx

                timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
                client = get_client(httpx_settings={"timeout": timeout}, sync_client=True)
                self._client = stack.enter_context(client)
            except (ValueError, httpx.InvalidURL) as error:
                raise Stop(3, f"PREFECT_API_URL: '{self.address}' is not an address of a Prefect API: {error}") from error
            self._deployment_id = self._find()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *details: object) -> None:
        self._stack.close()

    def start(self, parameters: dict[str, Any], tags: list[str], key: str, patience: float = AWAY_SECONDS) -> FlowRun:
        """Create a flow run, or find the one that the same key created before.

        Raises a Stop with code 2 where the deployment does not accept the parameters.
        """
        import httpx

        try:
            run: FlowRun = self._call(
                patience,
                self._client.create_flow_run_from_deployment,
                self._deployment_id,
                parameters=parameters,
                tags=tags,
                idempotency_key=key,
            )
            return run
        except httpx.HTTPStatusError as error:
            raise Stop(2, f"the deployment '{self.deployment}' does not accept the parameters: {_detail(error)}") from error

    def read(self, run: UUID) -> FlowRun:
        """The flow run as it is now; raises Gone where there is none."""
        from prefect.exceptions import ObjectNotFound

        try:
            found: FlowRun = self._call(AWAY_SECONDS, self._client.read_flow_run, run)
            return found
        except ObjectNotFound as error:
            raise Gone(f"flow run {run} does not exist any more") from error

    def cancel(self, run: UUID, patience: float) -> None:
        """Ask for the end of a flow run; one that has ended already stays as it is."""
        from prefect.client.schemas.objects import State, StateType

        state: State[Any] = State(type=StateType.CANCELLING, message="the CI job that waited for it was cancelled")
        self._call(patience, self._client.set_flow_run_state, run, state)

    def artifacts(self, run: UUID, keys: list[str]) -> dict[str, Any]:
        """The newest artifact of each key that this run left; those of its subflows belong to other runs."""
        from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
        from prefect.client.schemas.sorting import ArtifactSort

        chosen = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]), key=ArtifactFilterKey(any_=keys))
        newest: dict[str, Any] = {}
        for artifact in self._call(
            AWAY_SECONDS, self._client.read_artifacts, artifact_filter=chosen, sort=ArtifactSort.CREATED_DESC
        ):
            newest.setdefault(str(artifact.key), artifact.data)
        return newest

    def page(self, run: UUID) -> str | None:
        """The flow run's page in the UI."""
        from prefect.utilities.urls import url_for

        return without_password(url_for("flow-run", obj_id=run) or "") or None

    def _find(self) -> UUID:
        from prefect.exceptions import ObjectNotFound

        try:
            return UUID(str(self._call(FIRST_CONTACT_SECONDS, self._client.read_deployment_by_name, self.deployment).id))
        except ObjectNotFound as error:
            raise Stop(
                3,
                f"there is no deployment '{self.deployment}' on {self.address}: create it with `prefect deploy`, "
                "or name another one in SAE_DEPLOYMENT",
            ) from error

    def _call(self, patience: float, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Repeat a call while the server is away; a Stop with code 3 where it stays away, refuses us, or is no Prefect API."""
        import httpx

        retrying = Retrying(
            retry=retry_if_exception(_away),
            stop=stop_after_delay(patience),
            wait=wait_fixed(2.0),
            before_sleep=_say_once,
            reraise=True,
        )
        try:
            return retrying(call, *arguments, **named)
        except httpx.HTTPStatusError as error:
            if error.response.status_code in (401, 403):
                raise Stop(
                    3, f"the Prefect server {self.address} refuses the credentials in PREFECT_API_AUTH_STRING"
                ) from error
            if not _away(error):
                raise
            sentence = f"the Prefect server {self.address} keeps answering with an error: {_detail(error)}"
            raise Stop(3, f"{sentence}; see its log") from error
        except httpx.TransportError as error:
            cause = f"{type(error).__name__}: {error}".rstrip(": ")
            raise Stop(
                3, f"the Prefect server {self.address} cannot be reached ({cause}): is it running, and PREFECT_API_URL right?"
            ) from error
        except ValueError as error:  # neither JSON nor what Prefect's models expect
            raise Stop(
                3, f"{self.address} does not answer as a Prefect API does: PREFECT_API_URL usually ends in /api"
            ) from error


def table_rows(data: Any) -> list[dict[str, Any]]:
    """The rows of a table artifact; none where it is anything else."""
    if isinstance(data, str):
        try:
            data = json.loads(data)
        except ValueError:
            return []
    return [row for row in data if isinstance(row, dict)] if isinstance(data, list) else []


def _away(error: BaseException) -> bool:
    """Whether the same call may work a little later."""
    import httpx

    if isinstance(error, httpx.HTTPStatusError):
        code = error.response.status_code
        return code in (408, 425, 429) or code >= 500 or (code == 403 and "Invalid CSRF token" in error.response.text)
    return isinstance(error, httpx.TransportError) and not isinstance(error, httpx.UnsupportedProtocol)


def _say_once(state: RetryCallState) -> None:
    if state.attempt_number == 1 and state.outcome is not None:
        say(f"the Prefect server is away ({type(state.outcome.exception()).__name__}); trying again")


def _detail(error: Any) -> str:
    """What the server says about a refusal, without the request's headers that Prefect's own message would show."""
    try:
        detail = error.response.json().get("detail", "")
    except (ValueError, AttributeError):
        detail = ""
    return f"HTTP {error.response.status_code} {detail}".strip()[:1000]
