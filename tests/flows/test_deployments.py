"""`prefect.yaml` and the automations: every key is one that Prefect reads, every flow is there and takes its parameters."""

from __future__ import annotations

import importlib
import inspect
from copy import deepcopy
from pathlib import Path
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
import yaml
from prefect.cli.deploy._models import (
    ConcurrencyLimitSpec,
    DeploymentConfig,
    PrefectYamlModel,
    RawScheduleConfig,
    WorkPoolConfig,
)
from prefect.client.schemas.schedules import CronSchedule
from prefect.events.schemas.automations import AutomationCore
from prefect.flows import load_flow_from_entrypoint
from pydantic import BaseModel

from components.run.config import parse_config, read_config
from infra.stack.registration import AUTOMATIONS, load_automation
from infra.stack.settings import POOLS, REPOSITORY

TREE = yaml.safe_load((REPOSITORY / "prefect.yaml").read_text())
DEPLOYMENTS = TREE["deployments"]
NAMES = {f"{load_flow_from_entrypoint(found['entrypoint']).name}/{found['name']}" for found in DEPLOYMENTS}
FILES = sorted(AUTOMATIONS.glob("*.yaml"))


def unknown_keys(tree: Any) -> list[str]:
    """Keys of a `prefect.yaml` that Prefect would pass over in silence."""
    # `definitions` is ours: YAML anchors have to stand somewhere.
    found = _beyond(PrefectYamlModel, tree, allowed={"definitions"})
    for deployment in tree["deployments"]:
        found += _beyond(DeploymentConfig, deployment)
        found += _beyond(WorkPoolConfig, deployment.get("work_pool", {}))
        found += [key for schedule in deployment.get("schedules", []) for key in _beyond(RawScheduleConfig, schedule)]
        limit = deployment.get("concurrency_limit")
        found += _beyond(ConcurrencyLimitSpec, limit) if isinstance(limit, dict) else []
    return found


def _beyond(model: type[BaseModel], tree: dict, allowed: frozenset[str] | set[str] = frozenset()) -> list[str]:
    known = {*model.model_fields, *(field.alias for field in model.model_fields.values() if field.alias)}
    return sorted(set(tree) - known - allowed)


def test_prefect_reads_every_key():
    assert unknown_keys(TREE) == []


@pytest.mark.parametrize("place", ["uppermost", "deployment", "work_pool", "schedule", "concurrency_limit"])
def test_a_key_that_prefect_would_pass_over_is_found_out(place: str):
    tree = deepcopy(TREE)
    nightly = next(found for found in tree["deployments"] if found["name"] == "nightly")
    spoilt = {
        "uppermost": tree,
        "deployment": nightly,
        "work_pool": nightly["work_pool"],
        "schedule": nightly["schedules"][0],
        "concurrency_limit": nightly["concurrency_limit"],
    }[place]
    spoilt["time_zone"] = "Etc/UTC"
    assert unknown_keys(tree) == ["time_zone"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=[f"{found['entrypoint']}:{found['name']}" for found in DEPLOYMENTS])
def test_every_deployment_has_a_flow_that_takes_its_parameters_and_a_pool_of_ours(deployment: dict):
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert flow.validate_parameters(deployment["parameters"])
    assert deployment["work_pool"]["name"] in POOLS
    assert deployment["description"]
    for schedule in deployment.get("schedules", []):
        CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"])
        ZoneInfo(schedule["timezone"])
    # the flow's file, and not one of the same name somewhere else
    module = importlib.import_module(deployment["entrypoint"].rpartition(".")[0])
    assert Path(inspect.getfile(module)).parent == REPOSITORY / "flows"


def test_what_issue_and_readme_promise_is_deployed():
    wanted = {
        "pipeline/quickstart", "extract/cpu", "extract/gpu", "train/gpu", "evaluate/cpu", "sweep/gpu", "nightly/nightly",
        "retrain/ci",
    }  # fmt: skip
    assert wanted == NAMES


def test_the_form_is_the_configurations_own_schema():
    flow = load_flow_from_entrypoint("flows.pipeline.pipeline")
    schema = flow.parameters.model_dump()
    definitions = schema["definitions"]
    training = definitions["TrainingSettings"]["properties"]
    assert training["learning_rate"]["description"].startswith("Adam's step size")
    assert definitions["RunConfig"]["additionalProperties"] is False


def _in_the_form(properties: dict) -> list[str]:
    """Their order there: by `position` alone, as PostgreSQL keeps no other."""
    return sorted(properties, key=lambda name: properties[name]["position"])


def test_the_form_begins_with_what_people_set():
    definitions = load_flow_from_entrypoint("flows.pipeline.pipeline").parameters.model_dump()["definitions"]
    wanted = {
        "RunConfig": ["name", "language_model", "corpus", "activations", "sae", "training", "evaluation"],
        "CorpusSettings": ["source", "paths", "dataset", "subset", "text_column", "train_tokens"],
        "TrainingSettings": ["tokens", "batch_size", "learning_rate"],
    }
    for name, first in wanted.items():
        assert _in_the_form(definitions[name]["properties"])[: len(first)] == first
    assert _in_the_form(definitions["RunConfig"]["properties"])[-2:] == ["storage", "execution"]
    for architecture in definitions["RunConfig"]["properties"]["sae"]["oneOf"]:
        assert _in_the_form(architecture["properties"])[:3] == ["architecture", "expansion_factor", "d_sae"]


def test_the_deployed_quickstart_is_the_one_that_ships():
    shipped = parse_config(yaml.safe_load(read_config("quickstart")))
    assert parse_config(TREE["definitions"]["quickstart"]) == shipped


def _automation(path: Path) -> AutomationCore:
    def deployment_id(name: str):
        assert name in NAMES, f"{path.name} names a deployment that prefect.yaml has not"
        return uuid4()

    return load_automation(path, deployment_id, uuid4)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_automation_is_one_and_prefect_reads_every_key(path: Path):
    automation = _automation(path)
    assert automation.name == path.stem
    assert automation.enabled
    tree = yaml.safe_load(path.read_text())
    assert _beyond(AutomationCore, tree) == []
    assert _beyond(type(automation.trigger), tree["trigger"]) == []
    for action, given in zip(automation.actions, tree["actions"], strict=True):
        assert _beyond(type(action), given, allowed={"deployment", "block"}) == []


def test_there_are_automations_for_what_the_readme_says():
    assert [path.stem for path in FILES] == [
        "crashed-runs-continue", "dead-runs-are-crashed", "failure-is-told", "new-data-is-extracted", "promotion-is-checked",
    ]  # fmt: skip
