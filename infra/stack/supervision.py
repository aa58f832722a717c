"""supervisord keeps the services running: it starts them, starts them again when they die, and keeps their logs."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
import xmlrpc.client
from configparser import RawConfigParser
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

from supervisor.xmlrpc import Faults, SupervisorTransport

from infra.stack.services import Service
from infra.stack.settings import write_private

# A shell that waits for the command, also after a TERM to all of them, and then ends what is left of its process group, itself
# included.
_TOGETHER = ("/bin/sh", "-c", 'trap : TERM; "$@" & while kill -0 $! 2>/dev/null; do wait $!; done; kill -KILL 0', "sh")


def configuration(folder: Path, services: list[Service]) -> str:
    """supervisord's file. It holds the services' environments, secrets and all, and is private for it."""
    parser = RawConfigParser()
    parser.read_dict(
        {
            "supervisord": {
                "logfile": folder / "log" / "supervisord.log",
                "pidfile": folder / "supervisord.pid",
                "childlogdir": folder / "log",
                "directory": folder,
                "minfds": 4096,
                "umask": "077",
            },
            "unix_http_server": {"file": _socket(folder), "chmod": "0700"},
            "rpcinterface:supervisor": {
                "supervisor.rpcinterface_factory": "supervisor.rpcinterface:make_main_rpcinterface",
            },
        }
    )
    for service in services:
        environment = ",".join(f'{name}="{_escaped(value)}"' for name, value in service.environment.items())
        options: dict[str, Any] = {
            "command": _escaped(shlex.join([*(_TOGETHER if service.together else ()), *service.command])),
            "environment": environment,
            "autostart": "false",  # in our order
            "autorestart": "true",
            "startsecs": 2,
            "startretries": 20,
            "stopsignal": service.stop_signal,
            "stopwaitsecs": service.stop_seconds,
            "stopasgroup": "true" if service.together else "false",
            "killasgroup": "true",
            # PostgreSQL's user may not be allowed into the stack's folder.
            "directory": "/" if service.user is not None else folder,
            "redirect_stderr": "true",
            "stdout_logfile": folder / "log" / f"{service.name}.log",
            "stdout_logfile_maxbytes": "50MB",
            "stdout_logfile_backups": 3,
        }
        if service.user is not None:
            options["user"] = service.user
        parser.read_dict({f"program:{service.name}": options})
    text = StringIO()
    parser.write(text)
    return text.getvalue()


class Supervisor:
    """The supervisord of a stack's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def _server(self) -> Any:
        """A connection of its own for each call: one that was cut off is of no more use."""
        transport = SupervisorTransport(None, None, f"unix://{_socket(self.folder)}")
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)

    def is_running(self) -> bool:
        try:
            self._server.supervisor.getState()
        except (OSError, xmlrpc.client.Error):
            return False
        return True

    def start(self, services: list[Service]) -> None:
        """The daemon itself, with no service in it running yet."""
        (self.folder / "log").mkdir(exist_ok=True)
        path = self.folder / "supervisord.conf"
        write_private(path, configuration(self.folder, services))
        done = subprocess.run(
            [sys.executable, "-m", "supervisor.supervisord", "-c", str(path)], capture_output=True, text=True, cwd=self.folder
        )
        if done.returncode != 0:
            raise RuntimeError(f"supervisord did not start: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        deadline = time.monotonic() + 20
        while not self.is_running():
            if time.monotonic() > deadline:
                raise RuntimeError(f"supervisord does not answer; its log is {self.folder / 'log' / 'supervisord.log'}")
            time.sleep(0.1)

    def start_service(self, name: str) -> None:
        """Asks for it, without waiting until it is ready; one that runs is left alone."""
        with _ignoring(Faults.ALREADY_STARTED):
            self._server.supervisor.startProcess(name, False)

    def stop_service(self, name: str) -> None:
        """Returns when it has ended; one that does not run is left alone."""
        with _ignoring(Faults.NOT_RUNNING):
            self._server.supervisor.stopProcess(name, True)

    def states(self) -> dict[str, dict[str, Any]]:
        """Service -> `statename`, `pid`, `start` (seconds since 1970), `spawnerr`."""
        return {info["name"]: info for info in self._server.supervisor.getAllProcessInfo()}

    def shut_down(self) -> None:
        with suppress(OSError, xmlrpc.client.Error):
            self._server.supervisor.shutdown()
        deadline = time.monotonic() + 30
        while self.is_running() and time.monotonic() < deadline:
            time.sleep(0.1)


class _ignoring(suppress):
    """Suppresses the supervisor's fault of one number."""

    def __init__(self, fault: int) -> None:
        super().__init__(xmlrpc.client.Fault)
        self.fault = fault

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        return isinstance(error, xmlrpc.client.Fault) and error.faultCode == self.fault


def _socket(folder: Path) -> Path:
    return folder / "supervisor.sock"


def _escaped(value: str) -> str:
    return value.replace("%", "%%")
