"""The base job template of a work pool, and the Job that a worker makes of it.

    python infra/kubernetes/render.py template gpu   # for `prefect work-pool create --base-job-template FILE`
    python infra/kubernetes/render.py job gpu        # what the cluster is sent, to be looked at or validated

It needs PyYAML and nothing else, so that it runs where Prefect is not installed.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
PLACEHOLDER = re.compile(r"{{\s*(\w+)\s*}}")
# What the worker sets for every flow run.
SAMPLE = {
    "name": "quiet-otter",
    "command": "prefect flow-run execute",
    "env": {"PREFECT__FLOW_RUN_ID": "00000000-0000-0000-0000-000000000000"},
    "labels": {"prefect.io/flow-run-name": "quiet-otter"},
}
ABSENT = object()


def pools(folder: Path = HERE) -> list[str]:
    """Names of the work pools."""
    return list(yaml.safe_load((folder / "pools.yaml").read_text()))


def template(pool: str, folder: Path = HERE) -> dict[str, Any]:
    """The base job template with the defaults of `pool`."""
    made = json.loads((folder / "job-template.json").read_text())
    properties = made["variables"]["properties"]
    for name, value in yaml.safe_load((folder / "pools.yaml").read_text())[pool].items():
        if name not in properties:
            raise ValueError(
                f"pools.yaml: {pool}.{name} is no variable of job-template.json; there are {', '.join(properties)}"
            )
        properties[name]["default"] = value
    return made


def fill(value: Any, variables: dict[str, Any]) -> Any:
    """`value` with its placeholders replaced, as Prefect does it.

    A string that is one placeholder takes the variable's value with its type, and vanishes with its key where that is null.
    """
    if isinstance(value, dict):
        filled = {key: fill(item, variables) for key, item in value.items()}
        return {key: item for key, item in filled.items() if item is not ABSENT}
    if isinstance(value, list):
        return [item for item in (fill(item, variables) for item in value) if item is not ABSENT]
    if not isinstance(value, str):
        return value
    missing = {name for name in PLACEHOLDER.findall(value) if name not in variables}
    if missing:
        raise ValueError(f"job-template.json: {value!r} names {', '.join(sorted(missing))}, which is no variable")
    if whole := PLACEHOLDER.fullmatch(value):
        found = variables[whole[1]]
        return ABSENT if found is None else copy.deepcopy(found)
    return PLACEHOLDER.sub(lambda match: str(variables[match[1]]), value)


def job(pool: str, folder: Path = HERE) -> dict[str, Any]:
    """The Job of one flow run with nothing set but what the worker sets."""
    made = template(pool, folder)
    defaults = {name: schema.get("default") for name, schema in made["variables"]["properties"].items()}
    manifest: dict[str, Any] = fill(made["job_configuration"]["job_manifest"], {**defaults, **SAMPLE})
    pod = manifest["spec"]["template"]["spec"]
    # Prefect refuses a template without these two in the pod, where Kubernetes has no such fields: a cluster drops them with
    # a warning, and strict validation would refuse them. Those that count stand one level up.
    del pod["parallelism"], pod["completions"]
    container = pod["containers"][0]
    container["args"] = shlex.split(container["args"])
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    return manifest


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("template", "job") or sys.argv[2] not in pools():
        sys.exit(f"usage: render.py template|job {'|'.join(pools())}")
    if sys.argv[1] == "template":
        print(json.dumps(template(sys.argv[2]), indent=2))
    else:
        print(yaml.safe_dump(job(sys.argv[2]), sort_keys=False), end="")
