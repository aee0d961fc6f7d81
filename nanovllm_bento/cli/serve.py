"""``serve``: check what can be checked, then become ``bentoml serve``."""

import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

import nanovllm_bento
from nanovllm_bento.cli.options import with_settings
from nanovllm_bento.cli.terminal import fail
from nanovllm_bento.config import ENV_PREFIX, EngineConfig, ServiceConfig

SERVICE = "service:NanoVLLM"
SHUTDOWN_MARGIN = 5
"""Seconds between the end of the grace time and the cutting of what is still connected."""
PATHS = ("api_keys_file", "ipc_dir")
"""Settings that name a file or folder: relative to where the command is typed, not to the service's folder."""


def service_folder() -> Path:
    """The folder that holds service.py: the checkout or the unpacked Bento this package runs from.

    Raises SystemExit when there is none.
    """
    for folder in (Path(nanovllm_bento.__file__).parents[1], Path.cwd()):
        if (folder / "service.py").is_file():
            return folder
    fail("service.py was not found. Run this from a checkout of nanovllm_bento, or serve its Bento: bentoml serve TAG.")


def serve_command(host: str, port: int, extra: Iterable[str] = ()) -> list[str]:
    """The ``bentoml serve`` to run, with this very interpreter."""
    return [
        *(sys.executable, "-m", "bentoml", "serve", SERVICE),
        *("--working-dir", str(service_folder()), "--host", host, "--port", str(port)),
        *extra,
    ]


def settings_environment(settings: dict[str, Any]) -> dict[str, str]:
    """Settings as environment variables for the service; a model's relative path is made absolute.

    Raises ConfigError for what the service would refuse, so that it is said at once.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    EngineConfig.create(**{n: v for n, v in given.items() if n in EngineConfig.model_fields})
    ServiceConfig.create(**{n: v for n, v in given.items() if n in ServiceConfig.model_fields})
    if "model" in given and Path(given["model"]).exists():
        given["model"] = str(Path(given["model"]).resolve())
    given |= {name: str(Path(given[name]).resolve()) for name in PATHS if name in given}
    return {ENV_PREFIX + name.upper(): str(value) for name, value in given.items()}


@with_settings(EngineConfig, ServiceConfig)
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 3000,
    bentoml_options: Annotated[
        list[str] | None,
        typer.Argument(
            help="After --: options of bentoml serve itself, such as --ssl-certfile FILE.",
            metavar="[-- OPTIONS]",
            show_default=False,
        ),
    ] = None,
    **settings: Any,
) -> None:
    """Serve a model over HTTP (OpenAI's API) through bentoml serve."""
    from nanovllm_bento.engine.ipc_folder import keep_folders_over_exec
    from nanovllm_bento.engine.process_client import prestart_engine
    from nanovllm_bento.hub import load_config_dict, resolve_model
    from nanovllm_bento.models.config import ModelConfig
    from nanovllm_bento.serving.resources import check_devices

    extra = bentoml_options or []
    if extra and not extra[0].startswith("-"):
        fail(f"{extra[0]!r} is not an option. A model is named with --model; options of bentoml serve follow --.")
    os.environ.update(settings_environment(settings))
    config, service_config = EngineConfig.create(), ServiceConfig.create()
    check_devices(config)
    # A model that cannot be had or run is said here, where the user looks, and a download shows its progress.
    ModelConfig.from_dict(load_config_dict(resolve_model(config.model, config.revision)))
    # exec keeps this process's pid, which names the service that the engine belongs to.
    prestart_engine(config, service_config, os.getpid())
    keep_folders_over_exec()
    command = serve_command(host, port, [*shutdown_options(service_config), *extra])
    os.execv(command[0], command)


def shutdown_options(config: ServiceConfig) -> list[str]:
    """The service ends what is open by itself after its grace time; uvicorn cuts connections only later."""
    return ["--timeout-graceful-shutdown", str(math.ceil(config.shutdown_grace_seconds) + SHUTDOWN_MARGIN)]
