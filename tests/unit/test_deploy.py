"""deploy/: what its files name exists, and their numbers agree. scripts/deploy_check.py gives them to their tools."""

import json
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from nanovllm_bento.config import ENV_PREFIX, EngineConfig, ServiceConfig
from nanovllm_bento.engine.messages import EngineInfo, EngineStats
from nanovllm_bento.serving.metrics import Metrics
from scripts import deploy_check
from scripts.deploy_check import DEPLOY, load_yaml

KUBERNETES = DEPLOY / "kubernetes"
PORT = 3000
ENV_NAMES = {ENV_PREFIX + name.upper() for config in (EngineConfig, ServiceConfig) for name in config.model_fields}
ENV_NAMES.add("NANOVLLM_CACHE")  # hub.py
CUSTOM_METRICS = re.compile(r"\bnanovllm(?:_slo)?:[a-z0-9_:]+")


def files(*suffixes: str) -> list[Path]:
    found = [path for path in DEPLOY.rglob("*") if path.suffix in suffixes and "secrets" not in path.parts]
    assert found
    return sorted(found)


def ids(path: Path) -> str:
    return str(path.relative_to(DEPLOY))


@pytest.fixture(scope="module")
def samples() -> list[Any]:
    """What /metrics says: a service whose engine is ready."""
    metrics = Metrics(ServiceConfig.create(env={}), "m", engine_config=EngineConfig.create(env={}))
    info = EngineInfo(4096, 100, 16, 8, [0], 8, "fcfs", "float32", "cpu", {})
    text = metrics.render(EngineStats(num_blocks=8), info).decode()
    return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def all_expressions() -> Iterator[tuple[str, str]]:
    yield from deploy_check.rule_expressions()
    yield from deploy_check.dashboard_expressions()
    yield from deploy_check.scaler_expressions()


def recorded() -> set[str]:
    return {name for name, _ in deploy_check.rule_expressions() if ":" in name}


def manifests() -> Iterator[dict[str, Any]]:
    for path in sorted(KUBERNETES.rglob("*.yaml")):
        yield from load_yaml(path)


def one(kind: str, **where: str) -> dict[str, Any]:
    (found,) = [
        document
        for document in manifests()
        if document.get("kind") == kind and all(document["metadata"][key] == value for key, value in where.items())
    ]
    return found


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    return load_yaml(DEPLOY / "compose" / name)[0]["services"]


def container() -> dict[str, Any]:
    (only,) = one("Deployment")["spec"]["template"]["spec"]["containers"]
    return only


def patches(kustomization: Path) -> Iterator[dict[str, Any]]:
    for patch in load_yaml(kustomization)[0].get("patches", []):
        yield from deploy_check.parse_yaml(patch["patch"])


# ---- files


@pytest.mark.parametrize("path", files(".yaml", ".yml"), ids=ids)
def test_yaml_parses(path: Path) -> None:
    assert load_yaml(path)


@pytest.mark.parametrize("path", files(".yaml", ".yml", ".json", ".sh", ".md"), ids=ids)
def test_no_tabs_no_trailing_space_and_a_last_newline(path: Path) -> None:
    text = path.read_text()
    assert "\t" not in text and text.endswith("\n") and not re.search(r" +$", text, re.MULTILINE)


def test_kustomizations_name_files_that_exist() -> None:
    for path in [*KUBERNETES.rglob("kustomization.yaml"), DEPLOY / "grafana" / "kustomization.yaml"]:
        (kustomization,) = load_yaml(path)
        names = kustomization.get("resources", []) + kustomization.get("components", [])
        for generator in kustomization.get("configMapGenerator", []):
            names += generator.get("files", [])
        for name in names:
            assert (path.parent / name).exists(), f"{path}: {name}"


def test_mounts_of_compose_exist() -> None:
    for service in compose().values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / "compose" / source).exists(), source
    assert (DEPLOY / "compose" / "make_secrets.sh").stat().st_mode & stat.S_IXUSR


def test_secrets_are_in_no_repository() -> None:
    ignored = (DEPLOY / "compose" / ".gitignore").read_text().split()
    assert "secrets/" in ignored and ".env" in ignored
    assert not [document for document in manifests() if document.get("kind") == "Secret"]


# ---- metrics


def test_every_metric_of_rules_dashboard_and_scaler_is_exposed(samples: list[Any]) -> None:
    exposed = {sample.name for sample in samples} | recorded()
    for name, expression in all_expressions():
        for metric in CUSTOM_METRICS.findall(expression):
            assert metric in exposed, f"{name}: {metric}"
    dashboard = json.loads(deploy_check.DASHBOARD.read_text())
    for variable in dashboard["templating"]["list"]:
        for metric in CUSTOM_METRICS.findall(variable.get("definition", "")):
            assert metric in exposed, f"{variable['name']}: {metric}"


def test_every_bound_and_label_value_of_a_query_is_exposed(samples: list[Any]) -> None:
    """A bucket that no histogram has would make an alert that never fires."""
    selector = re.compile(r"(nanovllm:[a-z0-9_:]+)\{([^}]*)\}")
    checked = 0
    for name, expression in all_expressions():
        for metric, labels in selector.findall(expression):
            of_metric = [sample.labels for sample in samples if sample.name == metric]
            for label, operator, value in re.findall(r"(\w+)(=~|!=|=)\"([^\"]*)\"", labels):
                if label in ("job", "instance", "namespace") or value.startswith("$"):
                    continue  # Prometheus's, or chosen in Grafana
                values = {found[label] for found in of_metric}
                matching = {v for v in values if re.fullmatch(value if operator == "=~" else re.escape(value), v)}
                assert matching, f"{name}: {metric}{{{label}{operator}{value!r}}} of {sorted(values)}"
                checked += 1
    assert checked > 20


def test_labels_of_the_dashboard_are_exposed(samples: list[Any]) -> None:
    known = {label for sample in samples for label in sample.labels} | {"instance", "job"}
    for name, expression in deploy_check.dashboard_expressions():
        for labels in re.findall(r"by \(([^)]*)\)", expression):
            assert set(labels.split(", ")) <= known, name


def test_rules_use_what_is_recorded_and_only_that() -> None:
    used = {m for _, e in deploy_check.rule_expressions() for m in re.findall(r"nanovllm_slo:[a-z0-9_:]+", e)}
    assert used == recorded()


def test_an_unready_service_shows_no_cache_config(samples: list[Any]) -> None:
    """NanovllmNotReady and the panel of ready replicas rest on it."""
    assert "nanovllm:cache_config_info" in {sample.name for sample in samples}
    unready = Metrics(ServiceConfig.create(env={}), "m").render(None).decode()
    assert "cache_config_info" not in unready and "num_requests_waiting" in unready


def test_kubernetes_and_the_rule_file_hold_the_same_rules() -> None:
    deploy_check.check_operator_rules()


def test_every_alert_is_tested_both_ways_and_says_what_to_do() -> None:
    fires, silent = set(), set()
    for test in load_yaml(deploy_check.RULE_TESTS)[0]["tests"]:
        for check in test.get("alert_rule_test", []):
            (fires if check["exp_alerts"] else silent).add(check["alertname"])
    alerts = [r for g in load_yaml(deploy_check.RULES)[0]["groups"] for r in g["rules"] if "alert" in r]
    names = {alert["alert"] for alert in alerts}
    assert fires == names and silent == names
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert set(alert["annotations"]) == {"summary", "description", "runbook"}
        path, _, heading = alert["annotations"]["runbook"].partition("#")
        headings = re.findall(r"^#+ (.*)$", (DEPLOY.parent / path).read_text(), re.MULTILINE)
        assert heading in [text.lower().replace(" ", "-") for text in headings]


def test_alerts_agree_with_the_settings_they_speak_of() -> None:
    text = deploy_check.RULES.read_text()
    config = ServiceConfig.create(env={})
    assert f"engine_start_timeout ({config.engine_start_timeout:g} s)" in text
    assert f"engine_max_restarts = {config.engine_max_restarts}" in text


def test_panels_have_their_own_ids_and_do_not_overlap() -> None:
    panels = json.loads(deploy_check.DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        grid = panel["gridPos"]
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
        assert panel["type"] == "row" or panel["description"], panel["title"]


# ---- settings


@pytest.mark.parametrize("path", files(".yaml", ".yml", ".sh", ".md"), ids=ids)
def test_every_setting_that_is_named_exists(path: Path) -> None:
    text = path.read_text()
    # compose.yaml has variables of its own for what is no setting of the service
    own = {"NANOVLLM_IMAGE", "NANOVLLM_PORT", "NANOVLLM_GPUS", "NANOVLLM_STOP_GRACE_PERIOD"}
    allowed = ENV_NAMES | (own if path.suffix == ".md" or "compose" in path.parts else {"NANOVLLM_PORT"})
    assert set(re.findall(r"\bNANOVLLM_[A-Z0-9_]+\b", text)) <= allowed


def test_settings_in_files_are_valid() -> None:
    settings: dict[str, str] = {}
    for path in KUBERNETES.rglob("kustomization.yaml"):
        for generator in load_yaml(path)[0].get("configMapGenerator", []):
            settings |= dict(literal.split("=", 1) for literal in generator.get("literals", []))
    settings |= {item["name"]: item["value"] for item in load_yaml(deploy_check.BENTOCLOUD)[0]["envs"]}
    assert settings
    EngineConfig.create(env=settings)
    ServiceConfig.create(env=settings)


# ---- ports and paths


def test_probes_ask_paths_that_need_no_key() -> None:
    open_paths = ServiceConfig.create(env={}).api_key_open_paths.split(",")
    probes = {name: container()[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz",
    }  # fmt: skip
    assert {probe["path"] for probe in probes.values()} <= set(open_paths)
    assert f"http://127.0.0.1:{PORT}/readyz" in compose()["nanovllm"]["healthcheck"]["test"][-1]


def test_bentocloud_names_the_service() -> None:
    (deployment,) = load_yaml(deploy_check.BENTOCLOUD)
    (name,) = deployment["services"]
    assert f'name="{name}"' in (deploy_check.ROOT / "service.py").read_text()
    assert deployment["bento"].startswith(f"{name}:")


def test_everything_speaks_to_the_one_port() -> None:
    (port,) = container()["ports"]
    assert port == {"name": "http", "containerPort": PORT}
    assert one("Service")["spec"]["ports"][0]["targetPort"] == "http"
    assert one("NetworkPolicy")["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": "http"}]
    assert one("ServiceMonitor")["spec"]["endpoints"][0]["port"] == one("Service")["spec"]["ports"][0]["name"]
    jobs = {job["job_name"]: job for job in load_yaml(DEPLOY / "prometheus" / "prometheus.yml")[0]["scrape_configs"]}
    assert jobs["nanovllm"]["dns_sd_configs"][0]["port"] == PORT
    assert jobs["nanovllm"]["dns_sd_configs"][0]["names"] == ["nanovllm"] and "nanovllm" in compose()
    assert compose()["nanovllm"]["ports"][0].endswith(f":{PORT}")


def test_compose_opens_ports_to_this_machine_alone() -> None:
    for service in compose().values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_selectors_find_the_pods() -> None:
    labels = one("Deployment")["spec"]["template"]["metadata"]["labels"]
    for selector in (
        one("Deployment")["spec"]["selector"]["matchLabels"],
        one("Service")["spec"]["selector"],
        one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    monitor = one("ServiceMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= one("Service")["metadata"]["labels"].items()
    assert one("Service")["metadata"]["labels"][monitor["jobLabel"]] == "nanovllm"  # up{job="nanovllm"}
    assert one("ScaledObject")["spec"]["scaleTargetRef"]["name"] == one("Deployment")["metadata"]["name"]


def test_secret_keys_are_mounted_where_the_service_looks() -> None:
    (base,) = load_yaml(KUBERNETES / "base" / "kustomization.yaml")
    settings = dict(literal.split("=") for literal in base["configMapGenerator"][0]["literals"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container()["volumeMounts"]}
    (keys,) = [v for v in one("Deployment")["spec"]["template"]["spec"]["volumes"] if v["name"] == "api-keys"]
    assert settings["NANOVLLM_API_KEYS_FILE"] == f"{mounts['api-keys']}/{keys['secret']['items'][0]['path']}"
    credentials = one("ServiceMonitor")["spec"]["endpoints"][0]["authorization"]["credentials"]
    assert credentials["name"] == keys["secret"]["secretName"]
    service = compose()["nanovllm"]
    assert service["environment"]["NANOVLLM_API_KEYS_FILE"] == f"/run/secrets/{service['secrets'][0]}"
    assert compose()["prometheus"]["secrets"] == ["metrics_key"]


# ---- time


def seconds(text: str) -> int:
    match = re.fullmatch(r"(?:\$\{\w+:-)?(\d+)s\}?", text)
    assert match, text
    return int(match[1])


def test_grace_periods_lie_above_what_draining_takes() -> None:
    """docs/operations.md: ten seconds above shutdown_grace_seconds, and what a preStop takes besides."""
    grace = ServiceConfig.create(env={}).shutdown_grace_seconds
    (base,) = load_yaml(KUBERNETES / "base" / "kustomization.yaml")
    settings = dict(literal.split("=") for literal in base["configMapGenerator"][0]["literals"])
    assert float(settings["NANOVLLM_SHUTDOWN_GRACE_SECONDS"]) == grace
    pod = one("Deployment")["spec"]["template"]["spec"]
    pre_stop = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= pre_stop + grace + 10
    service = compose()["nanovllm"]
    assert f":-{grace:g}}}" in service["environment"]["NANOVLLM_SHUTDOWN_GRACE_SECONDS"]
    assert seconds(service["stop_grace_period"]) >= grace + 10


def test_nothing_gives_up_before_the_engine_may_have_started() -> None:
    timeout = ServiceConfig.create(env={}).engine_start_timeout
    assert one("Deployment")["spec"]["progressDeadlineSeconds"] > timeout
    assert seconds(compose()["nanovllm"]["healthcheck"]["start_period"]) >= timeout
    assert load_yaml(deploy_check.BENTOCLOUD)[0]["services"]["nanovllm"]["cold_start_timeout"] > timeout


# ---- least privilege


def test_pods_meet_the_restricted_standard() -> None:
    pod = one("Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not pod["automountServiceAccountToken"] and not pod["enableServiceLinks"]
    assert one("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


def test_containers_of_compose_may_do_nothing_but_their_work() -> None:
    for name, service in compose().items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service["user"].startswith("0") and "healthcheck" in service and "cap_add" not in service, name


def test_what_is_written_lies_on_volumes() -> None:
    env = {item["name"]: item.get("value") for item in container()["env"]} | compose()["nanovllm"]["environment"]
    assert env["NANOVLLM_CACHE"].startswith("/cache/")
    mounts = [mount["mountPath"] for mount in container()["volumeMounts"]]
    assert "/cache" in mounts and "/tmp" in mounts
    assert "cache:/cache" in compose()["nanovllm"]["volumes"]
    assert compose()["nanovllm"]["tmpfs"][0].startswith("/tmp:")


# ---- GPUs


def test_tensor_parallel_has_its_gpus_and_shared_memory() -> None:
    path = KUBERNETES / "components" / "tensor-parallel" / "kustomization.yaml"
    (size,) = [literal.split("=")[1] for literal in load_yaml(path)[0]["configMapGenerator"][0]["literals"]]
    (patch,) = patches(path)
    pod = patch["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == size
    assert pod["containers"][0]["volumeMounts"] == [{"name": "shm", "mountPath": "/dev/shm"}]
    assert pod["volumes"][0]["emptyDir"]["medium"] == "Memory"
    gpu = compose("compose.gpu.yaml")["nanovllm"]
    assert gpu["deploy"]["resources"]["reservations"]["devices"][0]["count"] == "${NANOVLLM_GPUS:-1}"
    assert gpu["environment"]["NANOVLLM_TENSOR_PARALLEL_SIZE"] == "${NANOVLLM_GPUS:-1}" and gpu["shm_size"]
