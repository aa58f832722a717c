"""Whether the Prefect server that flows would use is there, and has what deployments need."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from urllib.parse import quote

import httpx

from components.doctor.check import NO_ANSWER, Answer, Check, ask, clock_check, explained
from components.redaction import redacted

WORK_POOLS = ("cpu", "gpu")
_SECTION = "Prefect"


def api_url() -> str | None:
    """The server of the environment or of the active Prefect profile; None where a run starts its own."""
    from prefect.settings import get_current_settings

    return get_current_settings().api.url


def prefect_checks(limit: str | None = None) -> Iterator[Check]:
    """Server, credentials, version, database, work pools, and the global concurrency limit that a training waits for."""
    from prefect.settings import get_current_settings

    url = api_url()
    if not url:
        if get_current_settings().server.ephemeral.enabled:
            found = "PREFECT_API_URL is not set: `sae run` starts a temporary server of its own"
            yield Check(_SECTION, "server", "ok", found)
        else:
            advice = "Set PREFECT_API_URL to a server, or unset PREFECT_SERVER_EPHEMERAL_ENABLED."
            yield Check(_SECTION, "server", "failure", "no server is named, and temporary ones are switched off", advice)
        if limit:
            advice = "Set PREFECT_API_URL to the server that has the limit, or unset SAE_TRAINING_LIMIT."
            yield Check(_SECTION, "training limit", "failure", f"a temporary server has no limit '{limit}'", advice)
        return
    server, shown = _client(url), redacted(url)
    try:
        health = ask("/health", server)
    except NO_ANSWER as error:
        advice = "Start the server (`prefect server start`), correct PREFECT_API_URL, or unset it for a temporary server."
        yield Check(_SECTION, "server", "failure", f"{shown} does not answer: {explained(error)}", advice)
        return
    yield from clock_check("Prefect", health)
    if health.status != 200 or health.body.strip() != b"true":
        advice = "Correct PREFECT_API_URL: it ends in `/api`, such as http://127.0.0.1:4200/api."
        yield Check(_SECTION, "server", "failure", f"{shown}/health answers {health.status}, not as Prefect does", advice)
        return
    yield Check(_SECTION, "server", "ok", f"{shown} answers in {health.seconds * 1e3:.0f} ms")
    version = ask("/admin/version", server)
    if version.status != 200:
        yield Check(_SECTION, "API", "failure", *_refusal(version))
        return
    yield _version(str(json.loads(version.body)))
    yield from _database(server)
    for pool in WORK_POOLS:
        yield _work_pool(server, pool)
    yield _limit(server, limit)


def _client(url: str) -> httpx.Client:
    """With the credentials of Prefect's settings; Prefect's own client repeats what fails for minutes."""
    from prefect.settings import get_current_settings

    settings = get_current_settings()
    headers, auth = dict(settings.client.custom_headers), None
    if settings.api.auth_string is not None:
        user, _, password = settings.api.auth_string.get_secret_value().partition(":")
        auth = httpx.BasicAuth(user, password)
    elif settings.api.key is not None:
        headers["Authorization"] = f"Bearer {settings.api.key.get_secret_value()}"
    trusted = ssl.create_default_context(cafile=settings.api.ssl_cert_file or None)
    verify = False if settings.api.tls_insecure_skip_verify else trusted
    return httpx.Client(base_url=url.rstrip("/"), headers=headers, auth=auth, verify=verify)


def _refusal(answer: Answer) -> tuple[str, str]:
    if answer.status == 401:
        return "answers 401: who asks is not known", "Set PREFECT_API_AUTH_STRING to the `user:password` of the server."
    return f"answers {answer.status}", "Look at the log of the Prefect server, and at proxies before it."


def _version(theirs: str) -> Check:
    import prefect
    from packaging.version import Version

    ours = prefect.__version__
    if Version(theirs).release[:2] == Version(ours).release[:2]:
        return Check(_SECTION, "version", "ok", f"{theirs}, as here" if theirs == ours else f"{theirs}, here {ours}")
    different = Version(theirs).major != Version(ours).major
    found = f"the server is {theirs}, here is {ours}"
    advice = f"Install prefect=={ours} on the server: deployments are tested with one version on both sides."
    return Check(_SECTION, "version", "failure" if different else "warning", found, advice)


def _database(server: httpx.Client) -> Iterator[Check]:
    answer = ask("/admin/settings", server)
    if answer.status != 200:
        return
    database = json.loads(answer.body).get("server", {}).get("database", {})
    driver, address = str(database.get("driver") or ""), str(database.get("connection_url") or "")
    if "postgresql" in driver or address.startswith("postgresql") or database.get("host"):
        yield Check(_SECTION, "database", "ok", "PostgreSQL")
    elif "sqlite" in driver or address.startswith("sqlite"):
        advice = "Give the server PostgreSQL (PREFECT_SERVER_DATABASE_CONNECTION_URL): SQLite locks when many flows run."
        yield Check(_SECTION, "database", "warning", "SQLite", advice)
    else:  # the server hides its connection URL, for the password in it
        found = "the server does not tell; if it is SQLite, the default, it locks when many flows run"
        yield Check(_SECTION, "database", "skipped", found)


def _work_pool(server: httpx.Client, name: str) -> Check:
    check = f"pool {name}"
    answer = ask(f"/work_pools/{name}", server)
    if answer.status == 404:
        advice = f"Make it where deployments are to use it: `prefect work-pool create --type process {name}`."
        return Check(_SECTION, check, "warning", "there is no such work pool", advice)
    if answer.status != 200:
        return Check(_SECTION, check, "failure", *_refusal(answer))
    pool = json.loads(answer.body)
    if pool.get("is_paused"):
        return Check(_SECTION, check, "warning", "paused", f"Let it go on: `prefect work-pool resume {name}`.")
    answer = ask(f"/work_pools/{name}/workers/filter", server, {})
    workers = json.loads(answer.body) if answer.status == 200 else []
    online = [worker for worker in workers if worker.get("status") == "ONLINE"]
    if online or pool.get("status") == "READY":
        return Check(_SECTION, check, "ok", f"{len(online)} of {len(workers)} workers online")
    seen = max((worker.get("last_heartbeat_time") or "" for worker in workers), default="")
    found = f"no worker online, the last one was seen at {seen[:19]}" if seen else "no worker has ever been seen"
    return Check(
        _SECTION, check, "warning", found, f"Start one where the work is to be done: `prefect worker start --pool {name}`."
    )


def _limit(server: httpx.Client, name: str | None) -> Check:
    if not name:
        found = "SAE_TRAINING_LIMIT and execution.training_limit are not set: trainings do not wait for each other"
        return Check(_SECTION, "training limit", "ok", found)
    answer = ask(f"/v2/concurrency_limits/{quote(name, safe='')}", server)
    if answer.status == 404:
        advice = f"Make it: `prefect gcl create {name} --limit 1`; training does not start without it."
        return Check(_SECTION, "training limit", "failure", f"there is no limit '{name}', for which a training waits", advice)
    if answer.status != 200:
        return Check(_SECTION, "training limit", "failure", *_refusal(answer))
    limit = json.loads(answer.body)
    found = f"'{name}' lets {limit['limit']} train at once, {limit['active_slots']} do"
    if not limit["active"]:
        advice = f"Switch it on: `prefect gcl update {name} --active`."
        return Check(_SECTION, "training limit", "warning", f"{found}, and it is switched off", advice)
    return Check(_SECTION, "training limit", "ok", found)
