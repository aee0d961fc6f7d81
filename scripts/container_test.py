#!/usr/bin/env python3
"""Proves the container where there is no container engine: builds it, runs it, and does to it what Kubernetes does.

    make container-test            (as root, on Debian; needs what `make venv-dev` installs)

1. A base image by debootstrap (kept for the next time), the Bento with the demo model, its image by `bentoml
   containerize --backend buildah`.
2. `buildah run --isolation chroot`: the entrypoint answers a chat request, and SIGTERM ends it with 0.
3. As Kubernetes runs it: the image's user without capabilities, its entrypoint as process 1, a root file system that is
   read-only but for /tmp and /cache. Cold start by phases; the engine is killed while it streams; SIGTERM comes while
   it streams; a model that is not there.

What is measured goes to benchmarks/results/container.json, what was done to docs/container-test.log.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from nanovllm_bento.bench.environment import environment, write_result
from nanovllm_bento.bench.startup import engine_phases, free_port
from nanovllm_bento.hub import cache_dir

ROOT = Path(__file__).resolve().parent.parent
PYTHON = Path(sys.executable)
SUITE = "bookworm"
"""Debian's release whose Python is the one of bentofile.yaml."""
BASE, PACKAGES = f"localhost/nanovllm-base:{SUITE}", f"localhost/nanovllm-packages:{SUITE}"
IMAGE = "localhost/nanovllm:container-test"
CONTAINER = "nanovllm-container-test"
BUILDAH = {"BUILDAH_ISOLATION": "chroot", "BUILDAH_FORMAT": "docker"}
"""Without a user namespace or runc only this isolation works; OCI's own format has no health check."""
GRACE = 60
"""shutdown_grace_seconds, as the containers have it: longer than a slow machine takes for an answer."""
JAIL = """
set -e
root=$1; shift
touch "$root/etc/hosts"
mount --bind "$root" "$root"; mount -o remount,bind,ro "$root"
mount --bind /etc/hosts "$root/etc/hosts"
mount -t proc proc "$root/proc"; mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"; mount -t tmpfs -o uid=1034,gid=1034 tmpfs "$root/cache"
exec chroot "$root" /usr/bin/setpriv --reuid=1034 --regid=1034 --clear-groups --no-new-privs --bounding-set=-all -- "$@"
"""
"""What a container engine does for securityContext: readOnlyRootFilesystem, runAsNonRoot, capabilities drop ALL."""
QUESTION = {
    "model": "demo",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
}


class Failed(Exception):
    """What did not hold."""


class Log:
    """Says what is done and keeps it for docs/: without this machine's folders and without hosts."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.started = time.monotonic()

    def __call__(self, text: str) -> None:
        line = f"[{time.monotonic() - self.started:6.1f}] {text}"
        print(line, flush=True)
        self.lines += [clean(part) for part in line.splitlines()]

    def write(self, path: Path) -> None:
        path.write_text("\n".join(self.lines) + "\n")


def clean(text: str) -> str:
    """Without folders of this machine, addresses of registries, and colours."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"(https?|file)://(?!127\.0\.0\.1|localhost)\S+", "(address)", text)
    text = re.sub(r"/var/lib/containers/\S+", "(image)", text.replace(str(ROOT), "."))
    return text.replace(str(cache_dir()), "(cache)").replace(str(Path.home()), "~")


log = Log()


def run(*command: str, env: dict[str, str] | None = None, cwd: Path = ROOT, quiet: bool = True) -> str:
    """Standard output of a command. Raises Failed with its last lines."""
    if not quiet:
        log("$ " + shlex.join(Path(part).name if part == str(PYTHON) else part for part in command))
    done = subprocess.run(command, cwd=cwd, env=os.environ | BUILDAH | (env or {}), capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
        raise Failed(f"{shlex.join(command)} ended with {done.returncode}:\n{tail}")
    return done.stdout.strip()


def check(holds: bool, what: str) -> None:
    """Say that something holds. Raises Failed."""
    if not holds:
        raise Failed(what)
    log(f"ok: {what}")


# -- images -----------------------------------------------------------------------------------------------------------


def install_tools() -> None:
    """buildah and debootstrap, from Debian."""
    missing = [tool for tool in ("buildah", "debootstrap") if shutil.which(tool) is None]
    if missing:
        run("apt-get", "update", "-qq")
        run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing, quiet=False)


def has_image(name: str) -> bool:
    return name in run("buildah", "images", "--format", "{{.Name}}:{{.Tag}}").split()


def make_base(cache: Path) -> None:
    """Debian with Python, as small as python:3.11-slim; from the cache if an earlier run left it there."""
    if has_image(BASE):
        log("the base image is here from an earlier run")
        return
    archive = cache / f"base-{SUITE}.tar"
    if not archive.exists():
        with tempfile.TemporaryDirectory() as folder:
            log(f"$ debootstrap --variant=minbase --include=python3,python3-pip,ca-certificates {SUITE} base")
            run("debootstrap", "--variant=minbase", "--include=python3,python3-pip,ca-certificates", SUITE, folder)
            for pattern in ("var/cache/apt/*.bin", "var/cache/apt/archives/*.deb", "var/lib/apt/lists/*_*"):
                for path in Path(folder).glob(pattern):
                    path.unlink()
            for name in ("doc", "man", "locale", "info"):
                shutil.rmtree(Path(folder) / "usr/share" / name, ignore_errors=True)
            partial = archive.with_suffix(".part")
            run("tar", "-C", folder, "-cf", str(partial), ".")
            partial.rename(archive)
    container = run("buildah", "from", "scratch")
    run("buildah", "add", "-q", container, str(archive), "/")
    run("buildah", "commit", "-q", "--rm", container, BASE)


def make_packages_image() -> bool:
    """The base with this machine's package settings, for the stage that installs packages.

    Local folders of wheels are copied, indexes in local folders left out. Returns whether there is a torch for CPUs.
    """
    listed = run(str(PYTHON), "-m", "pip", "config", "list")
    settings = dict(re.findall(r"^\S+\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
    wheels = [Path(link) for link in settings.get("find-links", "").split()]
    wheels = [folder for folder in wheels if folder.is_dir()]
    container = run("buildah", "from", BASE)
    environment = {"UV_FIND_LINKS": " ".join(map(str, wheels)), "UV_DEFAULT_INDEX": settings.get("index-url", "")}
    for folder in wheels:
        run("buildah", "copy", "-q", container, str(folder), str(folder))
    certificates = settings.get("cert") or os.environ.get("SSL_CERT_FILE")
    if certificates:
        run("buildah", "copy", "-q", container, certificates, "/etc/ssl/certs/ca-certificates.crt")
        environment |= dict.fromkeys(("SSL_CERT_FILE", "PIP_CERT"), "/etc/ssl/certs/ca-certificates.crt")
    for name, value in environment.items():
        if value:
            run("buildah", "config", "--env", f"{name}={value}", container)
    run("buildah", "commit", "-q", "--rm", container, PACKAGES)
    return any(found for folder in wheels for found in folder.glob("torch-*+cpu-*.whl"))


def containerize(tag: str, env: dict[str, str], has_torch: bool) -> None:
    """The image of a Bento. From the file system's root: BentoML's template must lie below the current folder."""
    command = [str(PYTHON), "-m", "bentoml", "containerize", tag, "--backend", "buildah", "-t", IMAGE]
    command += ["--opt", f"build-arg=BASE_IMAGE={BASE}", "--opt", f"build-arg=PACKAGES_IMAGE={PACKAGES}"]
    if has_torch:
        command += ["--opt", "build-arg=TORCH_BACKEND="]
    run(*command, env=env, cwd=Path("/"), quiet=False)


def size(path: Path) -> int:
    """MiB of a folder or file."""
    return int(subprocess.run(["du", "-sm", str(path)], capture_output=True, text=True).stdout.split()[0])


def describe_image(root: Path) -> dict[str, Any]:
    """Size of the image and of its biggest parts, in MiB; raises Failed if it holds what it should not."""
    site = next((root / "app/.venv/lib").glob("python3*")) / "site-packages"
    packages = {path.name: size(path) for path in site.iterdir() if path.is_dir()}
    biggest = dict(sorted(packages.items(), key=lambda item: -item[1])[:8])
    unwanted = {"transformers", "accelerate", "nvidia", "triton", "pytest", "pip", "uv"}
    check(unwanted.isdisjoint(packages), "no package in the image that is one of " + ", ".join(sorted(unwanted)))
    source = root / "home/bentoml/bento/src"
    ours = {"service.py", "nanovllm_bento", "bentofile.yaml", "README.md", "LICENSE", "__pycache__"}
    check({path.name for path in source.iterdir()} <= ours, "nothing in the image's source but the service")
    return {
        "total_mib": size(root),
        "base_mib": size(root / "usr") + size(root / "var") + size(root / "etc"),
        "packages_mib": size(site),
        "model_mib": size(root / "home/bentoml/bento/models"),
        "source_mib": size(source),
        "biggest_packages_mib": biggest,
    }


# -- running it -------------------------------------------------------------------------------------------------------


class Running:
    """A container that runs. ``lines``: what it has said."""

    def __init__(self, command: list[str], env: dict[str, str], port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.started = time.monotonic()
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def find(self, text: str) -> psutil.Process:
        """The process of the container whose command holds ``text``, the first that was started."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                line = " ".join(child.cmdline())
                if text in line and "buildah" not in line and "setpriv" not in line:
                    return child
        raise Failed(f"no process {text!r} in the container")

    def wait_ready(self, timeout: float = 120.0) -> dict[str, float]:
        """Seconds from its start until it answered HTTP, and until it was ready."""
        seconds: dict[str, float] = {}
        while self.seconds < timeout:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                status = httpx.get(self.url + "/readyz").status_code
                seconds.setdefault("answers_http", round(self.seconds, 2))
                if status == 200:
                    return seconds | {"ready": round(self.seconds, 2)}
            time.sleep(0.02)
        raise Failed("the container does not get ready:\n" + "\n".join(self.lines[-30:]))

    def chat(self, **options: Any) -> str:
        """The answer to the question, without a stream."""
        answer = httpx.post(self.url + "/v1/chat/completions", json=QUESTION | options, timeout=120)
        if answer.status_code != 200:
            raise Failed(f"{answer.status_code}: {answer.text}")
        return str(answer.json()["choices"][0]["message"]["content"])

    def stream(self, **options: Any) -> Iterator[str]:
        """The pieces of an answer, with a stream. Raises Failed if it ends in any way but [DONE]."""
        body = QUESTION | {"stream": True} | options
        with httpx.stream("POST", self.url + "/v1/chat/completions", json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise Failed(f"the stream ended with {event['error']}")
                    for choice in event["choices"]:
                        yield choice["delta"].get("content") or ""
        raise Failed("the stream broke")

    def end(self, timeout: float = 60.0) -> int:
        """Wait for its end; the exit code."""
        code = self.process.wait(timeout=timeout)
        self._reader.join(5)
        return code


@contextlib.contextmanager
def running(command: list[str], env: dict[str, str], port: int) -> Iterator[Running]:
    """A container that is gone at the context's end, whatever happens."""
    container = Running(command, env, port)
    try:
        yield container
    except Exception:
        log("the container said:\n" + "\n".join(container.lines[-30:]))
        raise
    finally:
        if container.process.poll() is None:
            for child in psutil.Process(container.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill()
            container.process.kill()
            container.process.wait()


def image_settings() -> dict[str, Any]:
    """The image's configuration: Env, User, Entrypoint, WorkingDir, Healthcheck."""
    described = json.loads(run("buildah", "inspect", "--type", "image", IMAGE))
    return dict(described["Docker"]["config"])


def with_buildah(settings: dict[str, Any]) -> None:
    """The documented way: buildah run, the entrypoint, one question."""
    port = free_port()
    serve = [*settings["Entrypoint"], "serve", "--port", str(port)]
    command = ["buildah", "run", "--isolation", "chroot", CONTAINER, "--", *serve]
    log("$ " + shlex.join(command))
    with running(command, os.environ | BUILDAH, port) as container:
        container.wait_ready()
        check("Paris" in container.chat(max_tokens=32), "buildah run: the container answers a chat request")
        main = container.find("bentoml serve")
        check(set(main.uids()) == {1034}, "buildah run: its processes are not root's")
        main.send_signal(signal.SIGTERM)
        check(container.end() == 0, "buildah run: SIGTERM ends it with exit code 0")


def as_kubernetes_would(root: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Process 1, no capabilities, read-only root. Returns what was measured."""
    env = dict(entry.split("=", 1) for entry in settings["Env"]) | {"NANOVLLM_SHUTDOWN_GRACE_SECONDS": str(GRACE)}
    port = free_port()
    jail = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", JAIL, "jail", str(root)]
    # Without BentoML's entrypoint.sh: nothing of this needs a shell.
    serve = ["/app/.venv/bin/bentoml", "serve", env["BENTO_PATH"], "--port", str(port)]
    log("$ (process 1, user 1034, no capabilities, read-only root) " + shlex.join(serve))
    with running([*jail, *serve], env, port) as container:
        cold = container.wait_ready()
        pieces = container.stream(max_tokens=32)
        answer = next(piece for piece in pieces if piece)
        cold["first_token"] = round(container.seconds, 2)
        answer += "".join(pieces)
        check("Paris" in answer, "it answers a chat request as a stream")
        check("Paris" in container.chat(max_tokens=32), "and without one")
        health = httpx.get(container.url + "/health")
        check(health.status_code == 200, "/health says 200")
        log(next(line for line in container.lines if "ready on " in line))
        phases = engine_phases("\n".join(container.lines))
        main = container.find("bentoml serve")
        check(set(main.uids()) == {1034}, "its processes are not root's")
        check(namespace_pid(main.pid) == 1, "bentoml serve is process 1")
        check(capabilities(main.pid) == 0, "it has no capabilities")
        probe = subprocess.run(
            [
                "nsenter",
                "-t",
                str(main.pid),
                "-m",
                "-r",
                "-S",
                "1034",
                "-G",
                "1034",
                *settings["Healthcheck"]["Test"][1:],
            ],
            env=env | {"BENTOML_PORT": str(port)},
            capture_output=True,
            text=True,
        )
        check(probe.returncode == 0, f"the image's health check passes {probe.stderr[-300:]}".strip())

        expected = "".join(container.stream(max_tokens=64, ignore_eos=True))
        pieces = container.stream(max_tokens=64, ignore_eos=True)
        text = next(piece for piece in pieces if piece)
        engine = container.find("nanovllm_bento.engine.worker")
        engine.kill()
        killed = time.monotonic()
        text += "".join(pieces)
        recovery = round(time.monotonic() - killed, 2)
        check(len(text) > 100, f"SIGKILL of the engine: the stream went on to its end, {recovery} s later")
        same = text == expected
        log(f"the same text as without the fault: {same}")
        container.wait_ready()

        pieces = container.stream(max_tokens=64, ignore_eos=True)
        next(piece for piece in pieces if piece)
        main.send_signal(signal.SIGTERM)
        told = time.monotonic()
        time.sleep(0.3)
        with contextlib.suppress(httpx.TransportError):
            check(httpx.get(container.url + "/readyz").status_code == 503, "SIGTERM: /readyz says 503")
        check(len("".join(pieces)) > 100, "SIGTERM: the running stream comes to its end")
        check(container.end() == 0, "SIGTERM: exit code 0")
        drain = round(time.monotonic() - told, 2)
        check(drain < GRACE + 10, f"SIGTERM: ended after {drain} s, within the grace time")

    port = free_port()
    serve = ["/app/.venv/bin/bentoml", "serve", env["BENTO_PATH"], "--port", str(port)]
    with running([*jail, *serve], env | {"NANOVLLM_MODEL": "./no/such/model"}, port) as container:
        check(container.end() == 1, "a model that is not there: exit code 1")
        check(any("./no/such/model" in line for line in container.lines), "and the log says so")
    return {
        "cold_start_seconds": cold,
        "engine_phases_seconds": phases,
        "engine_killed_stream_done_after_seconds": recovery,
        "engine_killed_same_text": same,
        "sigterm_drain_seconds": drain,
    }


def namespace_pid(pid: int) -> int:
    """Its number in its own process namespace."""
    return int(status_field(pid, "NSpid").split()[-1])


def capabilities(pid: int) -> int:
    return int(status_field(pid, "CapEff"), 16) | int(status_field(pid, "CapBnd"), 16)


def status_field(pid: int, name: str) -> str:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return line.partition(":")[2].strip()
    raise Failed(f"no {name} in /proc/{pid}/status")


def test(cache: Path, model: str) -> dict[str, Any]:
    """All of it; returns the result. Raises Failed."""
    install_tools()
    started = time.monotonic()
    make_base(cache)
    has_torch = make_packages_image()
    base_seconds = round(time.monotonic() - started, 1)
    env = {"BENTOML_HOME": str(cache / "bentoml"), "BENTOML_DO_NOT_TRACK": "True", "BENTOML_NO_LOCAL_URL": "1"}
    shutil.rmtree(cache / "bentoml/bentos", ignore_errors=True)  # or it would not be built again
    started = time.monotonic()
    tag = run(str(PYTHON), "scripts/bento.py", "--model", model, env=env, quiet=False).splitlines()[-1]
    bento_seconds = round(time.monotonic() - started, 1)
    bento = Path(run(str(PYTHON), "-m", "bentoml", "get", tag, "-o", "path", env=env).replace("\n", ""))
    bento_mib = round(sum(path.stat().st_size for path in bento.rglob("*") if path.is_file()) / 2**20, 1)
    log(f"built {tag}: {bento_mib} MiB without the model, {bento_seconds} s")
    started = time.monotonic()
    containerize(tag, env, has_torch)
    image_seconds = round(time.monotonic() - started, 1)
    subprocess.run(["buildah", "rm", CONTAINER], capture_output=True, env=os.environ | BUILDAH)
    run("buildah", "from", "--name", CONTAINER, IMAGE)
    try:
        root = Path(run("buildah", "mount", CONTAINER))
        settings = image_settings()
        image = describe_image(root)
        log(f"built the image in {image_seconds} s: {json.dumps(image)}")
        check(settings["User"] == "1034:1034", "the image's user is a number, and not root")
        check("Healthcheck" in settings, "the image has a health check")
        with_buildah(settings)
        measured = as_kubernetes_would(root, settings)
    finally:
        subprocess.run(["buildah", "rm", CONTAINER], capture_output=True, env=os.environ | BUILDAH)
    return {
        "benchmark": "container",
        "environment": environment() | {"command": "make container-test"},
        "model": model,
        "base": f"Debian {SUITE} (debootstrap, minbase)",
        "base_seconds": base_seconds,
        "bento_seconds": bento_seconds,
        "bento_mib": bento_mib,
        "image_seconds": image_seconds,
        "image": image,
        **measured,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="the model to put into the image")
    parser.add_argument("--cache", type=Path, default=cache_dir() / "container", help="where the base image is kept")
    parser.add_argument("--result", type=Path, default=ROOT / "benchmarks/results/container.json")
    parser.add_argument("--log", type=Path, default=ROOT / "docs/container-test.log")
    options = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        print("Error: needs root on Debian. With Docker: make container, make container-run.", file=sys.stderr)
        return 2
    options.cache.mkdir(parents=True, exist_ok=True)
    try:
        result = test(options.cache, options.model)
    except Failed as error:
        log(f"FAILED: {error}")
        return 1
    finally:
        log.write(options.log)
    write_result(result, options.result)
    log("all of it holds")
    log.write(options.log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
