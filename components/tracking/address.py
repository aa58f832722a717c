"""Which MLflow a configuration means: its address, without asking it, and without MLflow's own import."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from components import storage
from components.settings import UserError
from components.tracking.settings import TrackingSettings, uri_problem

URI_VARIABLE, USER_VARIABLE, PASSWORD_VARIABLE = (f"MLFLOW_TRACKING_{name}" for name in ("URI", "USERNAME", "PASSWORD"))


def tracking_uri(settings: TrackingSettings, root: str) -> str:
    """Settings, then environment, then a SQLite file under a local root; a UserError where none is possible."""
    uri = settings.uri
    if not uri and (uri := os.environ.get(URI_VARIABLE)):
        problem = uri_problem(uri)
        if problem is not None:
            raise UserError(f"{URI_VARIABLE}: {problem}")
    if uri:
        return _without_login(uri)
    if not storage.is_local(root):
        raise UserError(f"tracking.uri: not given, and storage.root '{root}' cannot hold a database; name an MLflow server")
    path = storage.local_path(root).resolve() / "mlflow.db"
    for mark in "?#":
        if mark in str(path):
            raise UserError(
                f"storage.root: '{root}' has a '{mark}' in its path, where the address of a database ends; name another folder "
                "or an MLflow server in tracking.uri"
            )
    return f"sqlite:///{path}"


def _without_login(uri: str) -> str:
    """A server's user and password go where MLflow reads them: its errors, links and records show the address."""
    parts = urlsplit(uri)
    if not is_server(uri) or "@" not in parts.netloc:
        return uri
    os.environ[USER_VARIABLE], os.environ[PASSWORD_VARIABLE] = unquote(parts.username or ""), unquote(parts.password or "")
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def is_server(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def is_file(uri: str) -> bool:
    return uri.startswith("sqlite:")


def file_of(uri: str) -> Path:
    return Path(uri.removeprefix("sqlite:///"))
