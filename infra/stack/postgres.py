"""Debian's PostgreSQL: where it is, a cluster in a folder, databases in the cluster."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from contextlib import closing
from hashlib import sha256
from pathlib import Path

import psycopg2
from psycopg2 import sql

from infra.stack.settings import DATABASES, write_private

SUPERUSER = "sae"
MISSING = "PostgreSQL is not installed: `apt-get install postgresql` (any version from 14 on), or put initdb on the PATH"


def tool(name: str) -> Path | None:
    """A program of PostgreSQL: from the PATH, or where Debian keeps it."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    on_path = shutil.which(name)
    return Path(on_path) if on_path else found[-1] if found else None


def owner() -> str | None:
    """The user that PostgreSQL is to run as, None where it is ourselves; it refuses to run as root.

    Raises a RuntimeError where we are root and there is no user for it.
    """
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("postgres").pw_name
    except KeyError:
        raise RuntimeError("PostgreSQL does not run as root, and there is no user 'postgres' to run it as") from None


def data_folder(stack_folder: Path) -> Path:
    """Where the cluster of a stack is kept: in the stack's folder, or, where PostgreSQL runs as another user, to whom that
    folder is closed, under `/var/lib`."""
    if owner() is None:
        return stack_folder / "postgres"
    return Path("/var/lib/sae-foundry") / sha256(str(stack_folder).encode()).hexdigest()[:12]


def run_as(user: str | None) -> dict[str, int]:
    """Arguments of `subprocess` for that user."""
    if user is None:
        return {}
    entry = pwd.getpwnam(user)
    return {"user": entry.pw_uid, "group": entry.pw_gid}


def initialise(folder: Path, password: str) -> None:
    """A cluster in `folder`, whose superuser has that password; nothing where there is one."""
    if (folder / "PG_VERSION").exists():
        return
    initdb = tool("initdb")
    if initdb is None:
        raise RuntimeError(MISSING)
    user = owner()
    # Beside it, and renamed when it is whole: a cluster that is half made looks like one.
    made, password_file = folder.with_name(f"{folder.name}.new"), folder.with_name(f"{folder.name}.password")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    write_private(password_file, password)
    if user is not None:
        made.parent.chmod(0o711)
        for path in (made, password_file):
            shutil.chown(path, user, user)
    command = [
        initdb, "-D", made, "-U", SUPERUSER, f"--pwfile={password_file}", "--auth=scram-sha-256", "-E", "UTF8", "--locale=C",
    ]  # fmt: skip
    try:
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, **run_as(user))
    finally:
        password_file.unlink()
    if done.returncode != 0:
        raise RuntimeError(f"initdb failed: {done.stderr.strip().splitlines()[-1]}")
    made.rename(folder)


def command(folder: Path, port: int, *more: str) -> list[str]:
    """What serves the cluster, in the foreground and on loopback only."""
    postgres = tool("postgres")
    if postgres is None:
        raise RuntimeError(MISSING)
    options = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        # 20 flow runs, two servers with pools of their own
        "max_connections": "300",
    }
    settings = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
    return [str(postgres), "-D", str(folder), *settings, *more]


def databases_are_there(port: int, password: str) -> bool:
    """Whether the server is up; the databases are made where they are not there."""
    place = {"host": "127.0.0.1", "port": port, "user": SUPERUSER, "password": password, "dbname": "postgres"}
    try:
        with closing(psycopg2.connect(**place, connect_timeout=3)) as connection:
            connection.autocommit = True
            cursor = connection.cursor()
            cursor.execute("select datname from pg_database")
            for name in set(DATABASES) - {row[0] for row in cursor.fetchall()}:
                cursor.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    except psycopg2.OperationalError:
        return False
    return True
