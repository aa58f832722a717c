"""The pictures of the docs, as the pages are now: `python docs/screenshots.py`, or with the names of some of them.

Starts a Prefect server of its own, runs the quickstart in an empty folder, starts MLflow on what came of it, and looks at
the pages in headless Chromium (`chromium` on PATH), waiting for what each must show. Minutes; `prefect-form` alone needs no
run. `mlflow-compare` and `mlflow-charts` are of three small runs, `images-feature` is of the model that `vision.py` makes. The
sweep's pictures and matplotlib's are not made here.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from websockets.sync.client import connect

DOCS = Path(__file__).parent
BIN = Path(sys.executable).parent
CHROMIUM = [
    "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-port=0",
]  # fmt: skip
PATIENCE_SECONDS = 180
THREE = ["mlflow-compare", "mlflow-charts"]
IMAGES = "images-feature"
SMALL = ["corpus.train_tokens=200_000", "training.tokens=400_000", "evaluation.tokens=20_000", "interpretation.tokens=10_000"]


@dataclass(frozen=True)
class Shot:
    """A page, and a text that is on it once it is all there."""

    url: str
    shows: str
    width: int
    height: int
    then: str = ""
    """JavaScript that is run before the picture is taken."""


CLOSE_ASSISTANT = "document.querySelector('[aria-label=Close]')?.click();"
SOME_CHARTS = """
const search = document.querySelector('input[placeholder="Search metric charts"]');
const write = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set;
write.call(search, "train/|eval/(explained_variance|l0|loss_recovered)$");
search.dispatchEvent(new Event("input", {bubbles: true}));
"""


def main(names: list[str]) -> None:
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="sae-pictures-")))
        environment = stack.enter_context(_prefect(scratch))
        shots = {"prefect-form": _form(environment)}
        if not names or IMAGES in names:
            shots[IMAGES] = _of_images(environment, scratch / "images")
        if not names or set(names) - {"prefect-form", IMAGES, *THREE}:
            shots |= _of_a_run(environment, scratch, stack)
        if not names or set(names) & set(THREE):
            shots |= _of_three_runs(environment, scratch, stack)
        for name in names or shots:
            _take(shots[name], DOCS / f"{name}.png", scratch)
            print(f"docs/{name}.png", flush=True)


def _form(environment: dict[str, str]) -> Shot:
    for pool in ("cpu", "gpu"):
        subprocess.run([BIN / "prefect", "work-pool", "create", pool, "--type", "process"], env=environment, check=True)
    deploy = [BIN / "prefect", "--no-prompt", "deploy", "--all"]
    subprocess.run(deploy, env=environment, cwd=DOCS.parent, check=True, stdout=subprocess.DEVNULL)
    known = _ask(f"{environment['PREFECT_API_URL']}/deployments/name/pipeline/quickstart")["id"]
    page = environment["PREFECT_API_URL"].removesuffix("/api")
    return Shot(f"{page}/deployments/deployment/{known}/run", "Hook Points", 1400, 1400)


def _of_a_run(environment: dict[str, str], scratch: Path, stack: ExitStack) -> dict[str, Shot]:
    summary = _run(environment, scratch / "whole")
    sae = scratch / "whole" / summary["paths"]["sae"]
    mlflow = _mlflow(environment, scratch / "whole", stack)
    run = summary["mlflow_run"]
    found = _ask(f"{mlflow}/api/2.0/mlflow/runs/get?run_id={run}")["run"]
    experiment = found["info"]["experiment_id"]
    flow_run = next(tag["value"] for tag in found["data"]["tags"] if tag["key"] == "prefect.flow_run_id")
    prefect = environment["PREFECT_API_URL"].removesuffix("/api")
    return {
        "feature-browser": Shot(f"file://{sae}/browser/index.html#612", "Where it fires most", 1100, 1000),
        "evaluation-report": Shot(f"file://{sae}/report.html", "What the language model loses", 1160, 2330),
        "mlflow-run": Shot(f"{mlflow}/#/experiments/{experiment}/runs/{run}", "Metrics", 1500, 1900, CLOSE_ASSISTANT),
        "prefect-run": Shot(f"{prefect}/runs/flow-run/{flow_run}", "register", 1400, 1100),
    }


def _of_three_runs(environment: dict[str, str], scratch: Path, stack: ExitStack) -> dict[str, Shot]:
    folder = scratch / "three"
    runs = [_run(environment, folder, *SMALL, f"sae.k={k}")["mlflow_run"] for k in (6, 12, 24)]
    mlflow = _mlflow(environment, folder, stack)
    experiment = _ask(f"{mlflow}/api/2.0/mlflow/runs/get?run_id={runs[0]}")["run"]["info"]["experiment_id"]
    which = f"runs={json.dumps(runs)}&experiments={json.dumps([experiment])}"
    return {
        "mlflow-compare": Shot(
            f"{mlflow}/#/compare-runs?{urllib.parse.quote(which, safe='=&')}", "Artifacts", 1300, 1900, CLOSE_ASSISTANT
        ),
        "mlflow-charts": Shot(
            f"{mlflow}/#/experiments/{experiment}/runs?compareRunsMode=CHART",
            "matching run",
            1500,
            1700,
            CLOSE_ASSISTANT + SOME_CHARTS,
        ),
    }


def _of_images(environment: dict[str, str], folder: Path) -> Shot:
    """Of the features that fire on at most a twentieth of the patches, and in many images, the one that fires most."""
    subprocess.run([sys.executable, DOCS / "vision.py", folder], env=environment, check=True)
    done = subprocess.run(
        [BIN / "sae", "run", "images.yaml", "--json"], env=environment, cwd=folder, check=True, stdout=subprocess.PIPE
    )
    sae = folder / json.loads(done.stdout)["paths"]["sae"]
    listing = [BIN / "sae", "features", "list", "images.yaml", "--json", "--limit", "1000"]
    found = subprocess.run(listing, env=environment, cwd=folder, check=True, stdout=subprocess.PIPE)
    rows = [row for row in json.loads(found.stdout)["features"] if row["density"] <= 0.05 and row["sequences"] >= 150]
    chosen = max(rows, key=lambda row: row["max"])["feature"]
    return Shot(f"file://{sae}/browser/index.html#{chosen}", "Where it fires most", 1100, 1320)


def _run(environment: dict[str, str], folder: Path, *changed: str) -> dict[str, Any]:
    """The quickstart's summary, run in a folder, with some fields set."""
    folder.mkdir(exist_ok=True)
    command = [str(BIN / "sae"), "run", "quickstart", "--json", *(f"--set={field}" for field in changed)]
    done = subprocess.run(command, env=environment, cwd=folder, check=True, stdout=subprocess.PIPE)
    return dict(json.loads(done.stdout))


def _mlflow(environment: dict[str, str], folder: Path, stack: ExitStack) -> str:
    """The address of a server of what was tracked in a folder."""
    address = f"http://127.0.0.1:{_free_port()}"
    settings = {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{folder}/data/mlflow.db",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    server = [sys.executable, "-m", "mlflow", "server", "--port", address.rpartition(":")[2]]
    stack.enter_context(_running(server, {**environment, **settings}, f"{address}/health", folder))
    return address


def _take(shot: Shot, file: Path, scratch: Path) -> None:
    """A fresh browser for each, so that no page is remembered."""
    profile = Path(scratch / f"profile-{file.stem}")
    with (scratch / "chromium.log").open("a") as log:
        browser = subprocess.Popen([*CHROMIUM, f"--user-data-dir={profile}"], stdout=log, stderr=log)
    try:
        port = _until(lambda: (profile / "DevToolsActivePort").read_text().split()[0])
        request = urllib.request.Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")
        with urllib.request.urlopen(request) as answer:
            target = json.load(answer)["webSocketDebuggerUrl"]
        with connect(target, max_size=None) as page:
            size = {"width": shot.width, "height": shot.height, "deviceScaleFactor": 1, "mobile": False}
            _tell(page, "Emulation.setDeviceMetricsOverride", **size)
            _tell(page, "Page.navigate", url=shot.url)
            there = f"document.body.innerText.includes({json.dumps(shot.shows)})"
            _until(lambda: _tell(page, "Runtime.evaluate", expression=there)["result"]["value"] or None)
            time.sleep(3)  # what fades in
            if shot.then:
                _tell(page, "Runtime.evaluate", expression=shot.then)
                time.sleep(6)
            file.write_bytes(base64.b64decode(_tell(page, "Page.captureScreenshot", format="png")["data"]))
    finally:
        browser.terminate()
        browser.wait()


def _tell(page: Any, method: str, **parameters: Any) -> dict[str, Any]:
    page.send(json.dumps({"id": 1, "method": method, "params": parameters}))
    while True:
        answer = json.loads(page.recv(timeout=PATIENCE_SECONDS))
        if answer.get("id") == 1:
            return dict(answer.get("result", {}))


@contextmanager
def _prefect(scratch: Path) -> Iterator[dict[str, str]]:
    """The environment of a client of a new server."""
    port = _free_port()
    environment = {
        **os.environ,
        "PREFECT_HOME": str(scratch / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "components",
    }
    environment.pop("SAE_STORAGE_ROOT", None)
    server = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1"]
    with _running(server, environment, f"http://127.0.0.1:{port}/api/health", scratch):
        yield environment


@contextmanager
def _running(command: list[str], environment: dict[str, str], ready: str, folder: Path) -> Iterator[None]:
    with (folder / "servers.log").open("a") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
    try:
        _until(lambda: urllib.request.urlopen(ready, timeout=2).status)
        yield
    finally:
        server.terminate()
        server.wait()


def _until(look: Any) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            found = look()
        except (OSError, IndexError, KeyError):
            found = None
        if found is not None:
            return found
        if time.monotonic() > deadline:
            raise TimeoutError("a page or server did not come up")
        time.sleep(0.3)


def _ask(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return json.load(answer)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    if shutil.which("chromium") is None:
        sys.exit("chromium is not installed: sudo apt-get install chromium")
    main(sys.argv[1:])
