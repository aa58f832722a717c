"""What the stack is made of: its folder, its ports, its secrets, and the environments that follow from them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PREFIX = "foundry"
"""Folder of the bucket `sae` under which everything is stored."""
LIMIT = "gpu"
"""Prefect's global concurrency limit that a training waits for."""
POOLS = ("cpu", "gpu")
DATABASES = ("mlflow", "prefect")
BUCKETS = ("sae", "mlflow")
ADMIN = "admin"
AT_ONCE = 2
"""Flow runs of a pool at the same time; a run of the quickstart takes about 1 GB."""
_GRPC = 10_000  # SeaweedFS listens there as well, so many above each of its ports


@dataclass(frozen=True, kw_only=True)
class Ports:
    s3: int = 8333
    s3_master: int = 9333
    s3_volume: int = 9340
    s3_filer: int = 8888
    postgres: int = 5433
    """Not 5432, where Debian's own cluster may run."""
    mlflow: int = 5000
    prefect: int = 4200


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """Made at the first start, kept in a file that only its owner reads."""

    postgres: str
    mlflow_admin: str
    mlflow_session: str
    prefect: str
    s3_access: str
    s3_secret: str


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A stack in a folder of its own; several may stand side by side on other ports."""

    folder: Path
    postgres_folder: Path
    """Of the database, which may run as another user, to whom `folder` may be closed."""
    ports: Ports
    secrets: Secrets

    @property
    def mlflow_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.mlflow}"

    @property
    def prefect_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.prefect}/api"

    @property
    def s3_url(self) -> str:
        return f"http://127.0.0.1:{self.ports.s3}"

    @property
    def storage_root(self) -> str:
        return f"s3://{BUCKETS[0]}/{PREFIX}"

    @property
    def prefect_login(self) -> str:
        """User and password of the Prefect server: without them any page open in a browser here could start flow runs."""
        return f"{ADMIN}:{self.secrets.prefect}"

    @property
    def mlflow_database(self) -> str:
        """Without the password, which the environment has: an address ends up in logs."""
        return f"postgresql+psycopg2://sae@127.0.0.1:{self.ports.postgres}/mlflow"

    def client_environment(self) -> dict[str, str]:
        """For everything that uses the stack: `sae`, `prefect`, Python; the workers have it too."""
        return {
            "PREFECT_API_URL": self.prefect_url,
            "PREFECT_API_AUTH_STRING": self.prefect_login,
            "MLFLOW_TRACKING_URI": self.mlflow_url,
            "MLFLOW_TRACKING_USERNAME": ADMIN,
            "MLFLOW_TRACKING_PASSWORD": self.secrets.mlflow_admin,
            "AWS_ENDPOINT_URL": self.s3_url,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": self.secrets.s3_access,
            "AWS_SECRET_ACCESS_KEY": self.secrets.s3_secret,
            "SAE_STORAGE_ROOT": self.storage_root,
            "SAE_TRAINING_LIMIT": LIMIT,
        }

    def prefect_environment(self) -> dict[str, str]:
        """For Prefect's own processes, whose settings and profiles must not be those of whoever started the stack."""
        return {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": self.prefect_url,
            "PREFECT_API_AUTH_STRING": self.prefect_login,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        }

    def worker_environment(self) -> dict[str, str]:
        return {
            **self.client_environment(),
            **self.prefect_environment(),
            "PREFECT_LOGGING_EXTRA_LOGGERS": "components",
            # What the automation `dead-runs-are-crashed` listens for.
            "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
            # The n-th wait is 2^n seconds: a server may be away for four minutes, and no flow run notices.
            "PREFECT_CLIENT_MAX_RETRIES": "7",
            # Seconds between two looks for work: with 10, the default, an unchanged retrain waits longer than it runs.
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),  # see `components/threads.py`
        }

    def prefect_server_environment(self) -> dict[str, str]:
        return {
            **self.prefect_environment(),
            "PREFECT_SERVER_API_AUTH_STRING": self.prefect_login,
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": self.prefect_url.removesuffix("/api"),
            "PREFECT_SERVER_API_HOST": "127.0.0.1",
            # Not `--port`: with that, the UI goes on naming port 4200.
            "PREFECT_SERVER_API_PORT": str(self.ports.prefect),
            # In parts, as the server tells these and hides an address: `sae doctor` then knows that it is PostgreSQL.
            "PREFECT_SERVER_DATABASE_DRIVER": "postgresql+asyncpg",
            "PREFECT_SERVER_DATABASE_HOST": "127.0.0.1",
            "PREFECT_SERVER_DATABASE_PORT": str(self.ports.postgres),
            "PREFECT_SERVER_DATABASE_NAME": "prefect",
            "PREFECT_SERVER_DATABASE_USER": "sae",
            "PREFECT_SERVER_DATABASE_PASSWORD": self.secrets.postgres,
            # Seconds for a statement and for a connection: with 10 and 5, the defaults, a busy machine makes it answer 500.
            "PREFECT_SERVER_DATABASE_TIMEOUT": "60",
            "PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT": "60",
            # In memory, which is the default, a restart would forget who holds a place under the limit, for ever.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        }

    def mlflow_environment(self) -> dict[str, str]:
        """`mlflow/server.env`, with the addresses of this stack."""
        return {
            **_assignments(REPOSITORY / "mlflow" / "server.env"),
            "MLFLOW_BACKEND_STORE_URI": self.mlflow_database,
            "MLFLOW_S3_ENDPOINT_URL": self.s3_url,
            "AWS_ACCESS_KEY_ID": self.secrets.s3_access,
            "AWS_SECRET_ACCESS_KEY": self.secrets.s3_secret,
            "AWS_DEFAULT_REGION": "us-east-1",
            "PGPASSWORD": self.secrets.postgres,
            "MLFLOW_AUTH_CONFIG_PATH": str(self.folder / "basic_auth.ini"),
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.secrets.mlflow_admin,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": self.secrets.mlflow_session,
        }


def load(folder: Path) -> Stack | None:
    """The stack that was made in that folder, None where there is none."""
    path = folder / "stack.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return Stack(
        folder=folder,
        postgres_folder=Path(content["postgres_folder"]),
        ports=Ports(**content["ports"]),
        secrets=Secrets(**content["secrets"]),
    )


def load_or_make(folder: Path, postgres_folder: Path, free_ports: bool) -> Stack:
    """The stack of that folder, made now if it is not there; with `free_ports`, on ports that nobody uses. The folder, which
    holds the secrets and all data, is closed to others."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    stack = load(folder)
    if stack is None:
        stack = Stack(
            folder=folder,
            postgres_folder=postgres_folder,
            ports=_free() if free_ports else Ports(),
            secrets=Secrets(**{name: secrets.token_urlsafe(24) for name in Secrets.__dataclass_fields__}),
        )
    elif stack.postgres_folder != postgres_folder and not postgres_folder.exists():
        # Made when the folder was open to the user that PostgreSQL runs as.
        postgres_folder.parent.mkdir(parents=True, exist_ok=True)
        postgres_folder.parent.chmod(0o711)
        shutil.move(stack.postgres_folder, postgres_folder)
        stack = replace(stack, postgres_folder=postgres_folder)
    content = {"postgres_folder": str(stack.postgres_folder), "ports": asdict(stack.ports), "secrets": asdict(stack.secrets)}
    write_private(folder / "stack.json", json.dumps(content, indent=2))
    return stack


def write_private(path: Path, content: str) -> None:
    """A file that only its owner may read, from its first byte on; it appears whole."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    staged.unlink(missing_ok=True)
    with os.fdopen(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as stream:
        stream.write(content)
    staged.replace(path)


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free() -> Ports:
    found = (port for port in range(21_000, 30_000) if port_is_free(port) and port_is_free(port + _GRPC))
    return Ports(**{name: next(found) for name in Ports.__dataclass_fields__})


def _assignments(path: Path) -> dict[str, str]:
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs: list[Any] = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {name: value for name, _, value in pairs}
