"""Broken files of every kind are noticed by `infra/lint.py`, and names that refer to nothing by the checks here.

`make lint-infra` runs this in .venv-infra, which has the tools; elsewhere what needs them is skipped.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import yaml

from infra import lint

ROOT = Path(__file__).parent.parent
HAS_TOOLS = importlib.util.find_spec("kubernetes_validate") is not None


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
        unknown = set(service.get("networks", [])) - set(compose["networks"])
        problems += [f"{name} is in the network {network}, which is not there" for network in unknown]
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


REFERENCES = {"compose references": compose_references, "terraform references": terraform_references}

BREAKS = [
    ("compose schema", "infra/compose.yaml", "    image: postgres:", "    imagine: postgres:"),
    ("compose schema", "infra/compose.yaml", "restart: unless-stopped", "restart: [unless-stopped]"),
    ("compose references", "infra/compose.yaml", "s3: {condition: service_healthy}", "s4: {condition: service_healthy}"),
    ("compose references", "infra/compose.yaml", "${POSTGRES_PASSWORD:?", "${POSTGRES_PASSWROD:?"),
    ("compose references", "infra/compose.yaml", "networks: [storage]", "networks: [stroage]"),
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


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for part in ("infra", ".ci", ".github", "mlflow"):
        if (ROOT / part).exists():
            shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__", ".env"))
    return tmp_path


def problems(check: str, root: Path) -> list[str]:
    if check not in REFERENCES and not HAS_TOOLS:
        pytest.skip("the tools are in .venv-infra: make lint-infra")
    return (REFERENCES | lint.CHECKS)[check](root)


@pytest.mark.parametrize("check", [*REFERENCES, *lint.CHECKS])
def test_the_files_as_they_are_pass(check: str) -> None:
    assert problems(check, ROOT) == []


@pytest.mark.parametrize(("check", "name", "old", "new"), BREAKS)
def test_a_broken_file_is_noticed(copy: Path, check: str, name: str, old: str, new: str) -> None:
    file = copy / name
    file.parent.mkdir(parents=True, exist_ok=True)
    text = file.read_text() if old else ""
    assert old in text, "the table no longer fits the file"
    file.write_text(text.replace(old, new, 1) if old else new)
    assert problems(check, copy)
