"""`sae ui`: MLflow's pages on what a configuration's runs have made."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from flows.cli.terminal import Config, Overrides, command, terminal


def ui(
    config: Config = "quickstart",
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 5000,
) -> None:
    """Open the MLflow UI on what CONFIG's runs have made."""
    with command(False):
        from components.redaction import redacted
        from components.run.config import load_config
        from components.tracking.store import quiet_mlflow, tracking_uri

        settings = load_config(config, overrides or ())
        uri = tracking_uri(settings.tracking, settings.storage.root)
        if uri.startswith(("http://", "https://")):
            terminal().print(f"The MLflow server of these runs is {redacted(uri)}")
            return
        quiet_mlflow()
        os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
        # Not an argument: the process list shows those to every user, and the URI may hold a password.
        os.environ["MLFLOW_BACKEND_STORE_URI"] = uri
        terminal(stderr=True).print(f"MLflow UI of {redacted(uri)}: http://127.0.0.1:{port}  (Ctrl-C ends it)")
        server = [sys.executable, "-m", "mlflow", "server", "--port", str(port)]
        os.execv(server[0], server)
