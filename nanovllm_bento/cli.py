"""The command ``nanovllm-bento``: serve · chat · bench · models · doctor.

The options of ``serve`` and ``bench offline`` are made from EngineConfig and ServiceConfig, so a setting exists once.
Nothing heavy is imported before a command needs it.
"""

import inspect
import json
import math
import os
import platform
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

import nanovllm_bento
from nanovllm_bento.bench.serve_options import LoadOptions
from nanovllm_bento.config import ENV_PREFIX, EngineConfig, ServiceConfig
from nanovllm_bento.errors import NanoVLLMError

SERVICE = "service:NanoVLLM"
PANELS: dict[type[BaseModel], str] = {EngineConfig: "Engine", ServiceConfig: "Service"}
"""Settings that environment variables set too, and where --help shows them."""
SHUTDOWN_MARGIN = 5
"""Seconds between the end of the grace time and the cutting of what is still connected."""
PATHS = ("api_keys_file", "ipc_dir")
"""Settings that name a file or folder: relative to where the command is typed, not to the service's folder."""
NAMING = (
    ("demo", "SmolLM2-135M-Instruct, fetched once (98 MB), for a first try"),
    ("a folder", "a Hugging Face checkpoint: config.json, tokenizer.json, *.safetensors"),
    ("a .gguf file", "tokenizer and chat template come from its metadata"),
    ("owner/name", "a model of the Hugging Face Hub, downloaded when it is not cached"),
    ("name:version", "a model of the BentoML model store"),
)

app = typer.Typer(
    name="nanovllm-bento",
    help="A compact LLM engine, served with BentoML.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench_app = typer.Typer(
    no_args_is_help=True, help="Benchmarks. Each one has a JSON result that says where it was measured."
)
app.add_typer(bench_app, name="bench")
console = Console()


def main() -> None:
    """Entry point: errors raised on purpose are shown as one line, exit status 2 for those of the caller."""
    try:
        app()
    except NanoVLLMError as error:
        fail(str(error))


def fail(message: str, status: int = 2) -> None:
    """Print an error and exit."""
    print(f"Error: {message}", file=sys.stderr)
    raise SystemExit(status)


# -- options made from the settings -----------------------------------------------------------------------------------


def with_settings(
    *models: type[BaseModel], skip: Iterable[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace a command's ``**settings`` by one option per field of the models (None when not given)."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command)
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        hints = {name: hint for name, hint in command.__annotations__.items() if name != "settings"}
        taken = {p.name for p in parameters} | set(skip)
        for model in models:
            for name, field in model.model_fields.items():
                if name in taken:
                    continue
                kind: Any = option_type(field.annotation)
                hint: Any = Annotated[kind | None, option(model, name)]
                parameters.append(
                    inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)
                )
                hints[name] = hint

        def call(*args: Any, **kwargs: Any) -> None:
            command(*args, **kwargs)

        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        call.__annotations__ = hints
        return call

    return decorate


def option(model: type[BaseModel], name: str) -> Any:
    """typer's description of one setting: --its-name, its choices, its default and its environment variable."""
    field = model.model_fields[name]
    flag = "--" + name.replace("_", "-")
    flags = [f"{flag}/--no-{name.replace('_', '-')}"] if option_type(field.annotation) is bool else [flag]
    chosen = choices(field.annotation)
    text = [field.description or "", " | ".join(chosen) + "." if chosen else ""]
    default = f"Default: {'none' if field.default is None else field.default}"
    if model in PANELS:
        text.append(f"{default}; or {ENV_PREFIX}{name.upper()}.")
    elif field.default not in (None, []):
        text.append(f"{default}.")
    panel = PANELS.get(model)
    return typer.Option(*flags, help=" ".join(filter(None, text)), show_default=False, rich_help_panel=panel)


def option_type(annotation: Any) -> Any:
    """The type an option is parsed as; choices and bounds are checked by the settings themselves."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    return annotation if annotation in (bool, int, float, Path, list[str]) else str


def choices(annotation: Any) -> list[str]:
    """The values of a Literal; empty for any other type."""
    return [str(value) for value in get_args(annotation)] if get_origin(annotation) is Literal else []


# -- serve ------------------------------------------------------------------------------------------------------------


def service_folder() -> Path:
    """The folder that holds service.py: the checkout or the unpacked Bento this package runs from.

    Raises SystemExit when there is none.
    """
    for folder in (Path(nanovllm_bento.__file__).parents[1], Path.cwd()):
        if (folder / "service.py").is_file():
            return folder
    fail("service.py was not found. Run this from a checkout of nanovllm_bento, or serve its Bento: bentoml serve TAG.")
    raise AssertionError


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


@app.command()
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
    command = serve_command(host, port, [*shutdown_options(service_config), *extra])
    os.execv(command[0], command)


def shutdown_options(config: ServiceConfig) -> list[str]:
    """The service ends what is open by itself after its grace time; uvicorn cuts connections only later."""
    return ["--timeout-graceful-shutdown", str(math.ceil(config.shutdown_grace_seconds) + SHUTDOWN_MARGIN)]


# -- chat -------------------------------------------------------------------------------------------------------------


@app.command()
def chat(
    base_url: Annotated[str, typer.Option(help="Where the server listens.")] = "http://127.0.0.1:3000",
    model: Annotated[str | None, typer.Option(help="Model to ask; default: the first that is served.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0)] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens in an answer, at most.")] = 512,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY")] = None,
) -> None:
    """Talk to a running server. /reset forgets the conversation, /exit (or Ctrl-D) ends."""
    import httpx

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    client = httpx.Client(base_url=base_url.removesuffix("/").removesuffix("/v1"), headers=headers, timeout=None)
    start: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    with client:
        try:
            model = model or client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        except httpx.HTTPError as error:
            fail(f"no server answers at {base_url} ({error}). Start one: nanovllm-bento serve --model demo")
        console.print(f"[bold]{model}[/bold] · /reset · /exit")
        while True:
            try:
                text = console.input("[bold cyan]> [/bold cyan]").strip()
            except (EOFError, KeyboardInterrupt):
                return
            if text == "/exit":
                return
            if text == "/reset":
                messages = list(start)
                continue
            if not text:
                continue
            messages.append({"role": "user", "content": text})
            body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True}
            if temperature is not None:
                body["temperature"] = temperature
            answer = ""
            try:
                for piece in stream_chat(client, body):
                    answer += piece
                    console.out(piece, end="", highlight=False)
            except KeyboardInterrupt:
                pass  # leaving the stream cancels the request; what came so far stays in the conversation
            except (httpx.HTTPError, RuntimeError) as error:
                console.print(f"[red]{error}[/red]", markup=True)
                messages.pop()
                continue
            console.print()
            messages.append({"role": "assistant", "content": answer})


def stream_chat(client: Any, body: dict[str, Any]) -> Iterator[str]:
    """The pieces of one streamed answer. Raises RuntimeError with the server's words if it refuses or fails."""
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(error_message(response.read(), response.status_code))
        for line in response.iter_lines():
            data = line.removeprefix("data:").strip()
            if not line.startswith("data:") or data == "[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(event["error"].get("message", data))
            for choice in event.get("choices", ()):
                yield choice.get("delta", {}).get("content") or ""


def error_message(body: bytes, status: int) -> str:
    """The message of an error in OpenAI's shape, or the body's beginning."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}: {body[:200].decode(errors='replace')}"


# -- bench ------------------------------------------------------------------------------------------------------------

JsonFile = Annotated[
    Path | None, typer.Option("--json", help="File for the result; default: print it.", dir_okay=False)
]


@bench_app.command("offline")
@with_settings(EngineConfig)
def bench_offline(
    model: Annotated[str, typer.Option(help="Model, named as for serve.")] = "demo",
    num_seqs: Annotated[int, typer.Option(min=1, help="Sequences, all handed over at once.")] = 256,
    input_len: Annotated[
        int | None, typer.Option(min=1, help="Fixed prompt length; default: the seed workload.")
    ] = None,
    output_len: Annotated[int | None, typer.Option(min=1, help="Fixed output length (greedy).")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Runs; the first and the best are reported.")] = 3,
    peer: Annotated[str | None, typer.Option(help="transformers: run it on the same prompts (fixed lengths).")] = None,
    preset: Annotated[
        str | None, typer.Option(help="cpu: 64 in, 48 out, batch 1, 8, 32, against transformers in fp32 and bf16.")
    ] = None,
    json_file: JsonFile = None,
    **settings: Any,
) -> None:
    """Throughput of LLM.generate: the seed workload, fixed lengths, or the CPU comparison."""
    from nanovllm_bento.bench import offline
    from nanovllm_bento.bench.environment import write_result

    if preset not in (None, "cpu"):
        fail(f"--preset is cpu, got {preset!r}.")
    if peer not in (None, "transformers"):
        fail(f"--peer is transformers, got {peer!r}.")
    if (input_len is None) != (output_len is None):
        fail("give both --input-len and --output-len, or neither for the seed workload.")
    if peer and input_len is None and not preset:
        fail("--peer needs --input-len and --output-len: transformers has no continuous batching.")
    given = {name: value for name, value in settings.items() if value is not None}
    say = Console(stderr=True).print
    if preset == "cpu":
        result = offline.bench_cpu(model, repeat=repeat, settings=given, say=say)
    else:
        dtypes = list(offline.PEER_DTYPES) if peer else []
        result = offline.bench_offline(
            model,
            num_seqs=num_seqs,
            input_len=input_len,
            output_len=output_len,
            repeat=repeat,
            peers=dtypes,
            settings=given,
            say=say,
        )
        for row in result["results"]:
            say(f"{row['engine']}: first {row['tok_s_first']} tok/s, best {row['tok_s_best']} tok/s")
    write_result(result, json_file)


@bench_app.command("scheduler")
def bench_scheduler(
    num_seqs: Annotated[int, typer.Option(min=1, help="Running sequences.")] = 256,
    num_steps: Annotated[int, typer.Option(min=10, help="Decode steps to time.")] = 2000,
    prompt_len: Annotated[int, typer.Option(min=16, help="Tokens of the prompt that is looked up.")] = 4096,
    json_file: JsonFile = None,
) -> None:
    """Time of the scheduler and the block manager per decode step, and of a prefix look-up; no model runs."""
    from nanovllm_bento.bench.environment import write_result
    from nanovllm_bento.bench.scheduler import bench_scheduler as run

    write_result(run(num_seqs=num_seqs, num_steps=num_steps, prompt_len=prompt_len), json_file)


@bench_app.command("startup")
@with_settings(EngineConfig, ServiceConfig)
def bench_startup(
    model: Annotated[str, typer.Option(help="Model, named as for serve.")] = "demo",
    repeat: Annotated[int, typer.Option(min=1)] = 3,
    json_file: JsonFile = None,
    **settings: Any,
) -> None:
    """Time from spawning bentoml serve to ready, and to the first token."""
    from nanovllm_bento.bench.environment import write_result
    from nanovllm_bento.bench.startup import bench_startup as run
    from nanovllm_bento.bench.startup import free_port

    port = free_port()
    env = settings_environment({"model": model, **settings})
    command = serve_command("127.0.0.1", port)
    write_result(run(command, service_folder(), env, model=model, port=port, repeat=repeat), json_file)


@bench_app.command("serve")
@with_settings(LoadOptions)
def bench_serve(
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="File for the result; plots are drawn beside it.", dir_okay=False),
    ] = None,
    plots: Annotated[bool, typer.Option(help="Draw plots; they need the extra 'bench'.")] = True,
    from_file: Annotated[
        Path | None, typer.Option("--from", help="Measure nothing: show a result again, and draw its plots.")
    ] = None,
    **settings: Any,
) -> None:
    """Load on a server with OpenAI's API: TTFT, TPOT, ITL, E2E latency, goodput, throughput.

    Exit status 1 if a request failed, which the output explains.
    """
    from nanovllm_bento.bench.serve import run_command
    from nanovllm_bento.bench.serve_processes import ClientError

    try:
        status = run_command(LoadOptions.create(**settings), json_file, plots=plots, redraw=from_file)
    except ClientError as error:
        fail(str(error), status=1)
    if status:
        raise SystemExit(status)


@bench_app.command("report")
@with_settings(EngineConfig)
def bench_report(
    out: Annotated[Path, typer.Option(help="Folder for report.json, report.md and plots.", file_okay=False)],
    model: Annotated[str, typer.Option(help="Model, named as for serve.")] = "demo",
    sections: Annotated[
        str | None,
        typer.Option(help="Some of throughput,steps,prefill,prefix,ttft,memory,kernels,startup; all.", metavar="A,B"),
    ] = None,
    num_seqs: Annotated[
        str | None, typer.Option(help="Numbers of sequences; default: 1,16,64,256, on a CPU 1,4.", metavar="N,N")
    ] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option(help="KV cache types, one engine each: auto,fp8_e4m3.", metavar="A,B")
    ] = "auto",
    repeat: Annotated[int, typer.Option(min=1, help="Throughput runs; the first and the best are reported.")] = 2,
    seed_max_len: Annotated[
        int | None, typer.Option(min=100, help="Longest prompt and output of the seed workload; on a CPU 128.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help="Another engine's throughput beside ours, NAME=FILE; may be repeated.", metavar="NAME=FILE"),
    ] = None,
    quality: Annotated[
        Path | None, typer.Option(help="JSON to include as the report's section on quality.", dir_okay=False)
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Say that the model's weights are random (dummy ones are known).")
    ] = False,
    plots: Annotated[bool, typer.Option(help="Draw plots; they need the extra 'bench'.")] = True,
    from_file: Annotated[
        Path | None,
        typer.Option("--from", help="Measure nothing: write a report.json again, with plots, peers and quality."),
    ] = None,
    **settings: Any,
) -> None:
    """The evaluation report: speed against the roofline and peers, step times, prefix cache, kernels, memory, start-up.

    Exit status 1 if a section failed.
    """
    from nanovllm_bento.bench import compare, report
    from nanovllm_bento.bench.plots import require_matplotlib

    if plots:
        require_matplotlib()
    peers = {}
    for given in peer or []:
        name, _, path = given.partition("=")
        if not name or not path:
            fail(f"--peer is NAME=FILE, got {given!r}.")
        peers[name] = compare.read_peer(Path(path))
    say = Console(stderr=True).print
    judged = compare.read_result(quality) if quality else None
    if from_file is not None:
        result = compare.read_result(from_file)
        if result.get("benchmark") != "report":
            fail(f"--from wants a report.json; {from_file} is not one.")
        result["peers"] = {**result["peers"], **peers}
        result["quality"] = judged or result["quality"]
    else:
        try:
            counts = [int(n) for n in num_seqs.split(",")] if num_seqs else []
        except ValueError:
            counts = [0]
        if any(n < 1 for n in counts):
            fail(f"--num-seqs is numbers from 1 with commas between, got {num_seqs!r}.")
        options = report.Options(
            model,
            out,
            sections=sections.split(",") if sections else report.SECTIONS,
            num_seqs=counts,
            kv_cache_dtypes=[compare.kv_name(kind) for kind in kv_cache_dtype.split(",")],
            repeat=repeat,
            seed_max_len=seed_max_len,
            random_weights=random_weights,
            peers=peers,
            quality=judged,
            settings={name: value for name, value in settings.items() if value is not None},
        )
        result = report.run_report(options, say=say)
    for written in report.finish(result, out, plots=plots):
        say(f"wrote {written}")
    if failed := report.failed_sections(result):
        fail(f"failed, in whole or in part: {', '.join(failed)}. The report says why.", status=1)


@bench_app.command("compare")
def bench_compare(
    old: Annotated[Path, typer.Argument(help="A result: report.json, or of bench offline or bench serve.")],
    new: Annotated[Path, typer.Argument(help="Another of the same benchmark.")],
    threshold: Annotated[str, typer.Option(help="Changes up to this are taken as noise.")] = "3%",
    fail_on_regression: Annotated[
        bool, typer.Option("--fail", help="Exit status 1 if a number got worse by more, or is missing.")
    ] = False,
) -> None:
    """Two result files, number by number; regressions are marked."""
    from nanovllm_bento.bench import compare

    a, b = compare.read_result(old), compare.read_result(new)
    changes = compare.compare_results(a, b, compare.parse_threshold(threshold))
    for line in compare.differences(a, b):
        console.print(f"[yellow]not the same: {line}[/yellow]", highlight=False)
    table = Table("number", "old", "new", "change", "", box=None)
    for change in changes:
        style, said = ("red", "worse") if change.regressed else ("green", "better") if change.improved else ("", "")
        values = (f"{change.old:,.6g}", f"{change.new:,.6g}", f"{change.change:+.1%}")
        table.add_row(change.name, *values, said, style=style)
    console.print(table, highlight=False)
    missing = compare.lost(a, b)
    for name in missing:
        console.print(f"[red]only in {old.name}: {name}[/red]", highlight=False)
    worse = sum(change.regressed for change in changes)
    console.print(f"{len(changes)} numbers, {worse} worse by more than {threshold}, {len(missing)} missing.")
    if fail_on_regression and (worse or missing):
        raise SystemExit(1)


# -- models, doctor ---------------------------------------------------------------------------------------------------


@app.command()
def models() -> None:
    """Supported architectures, how a model is named, and the models found on this machine."""
    from nanovllm_bento.models.registry import SUPPORTED_ARCHITECTURES

    console.print("[bold]Architectures[/bold]")
    for architecture in sorted(SUPPORTED_ARCHITECTURES):
        console.print(f"  {architecture}")
    table = Table(title="A model is named as", title_justify="left", title_style="bold", box=None, show_header=False)
    for name, text in NAMING:
        table.add_row(f"  {name}", text)
    console.print(table)
    console.print("[bold]Found here[/bold]")
    found = list(local_models())
    for name, where in found:
        console.print(f"  {name}  [dim]{where}[/dim]")
    if not found:
        console.print("  none yet")


def local_models() -> Iterator[tuple[str, str]]:
    """(name, which cache) of models that need no download: the demo, the Hub's cache and the BentoML model store."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from nanovllm_bento.hub import DEMO_NAME, cache_dir

    if any((cache_dir() / DEMO_NAME).glob("*.gguf")):
        yield DEMO_NAME, "this package's cache"
    try:
        for repo in sorted(scan_cache_dir().repos, key=lambda repo: repo.repo_id):
            if repo.repo_type == "model":
                yield repo.repo_id, f"Hub cache, {repo.size_on_disk_str}"
    except CacheNotFound:
        pass
    import bentoml

    for stored in bentoml.models.list():
        yield str(stored.tag), "BentoML model store"


@app.command()
def doctor() -> None:
    """What this machine offers and what the engine would choose on it."""
    for name, value in diagnose():
        console.print(f"[bold]{name:<22}[/bold] {value}", highlight=False)


def diagnose() -> Iterator[tuple[str, str]]:
    """(subject, finding) of everything that decides how the engine runs here."""
    import torch

    from nanovllm_bento.bench.environment import cpu, gpu, package_versions
    from nanovllm_bento.kernels.attention import explain_backends, select_backend
    from nanovllm_bento.kernels.linear import best_cpu_dtype
    from nanovllm_bento.serving.resources import explain_devices

    yield "nanovllm_bento", nanovllm_bento.__version__
    yield "Python", platform.python_version()
    yield from package_versions().items()
    processor = cpu()
    yield "CPU", f"{processor['model']}, {processor['cores']} cores, {processor['memory_gib']} GiB"
    yield "CPU capability", f"{processor['torch_capability']} ({', '.join(processor['flags']) or 'no known features'})"
    yield "torch threads", str(processor["torch_threads"])
    for card in gpu():
        yield "GPU", f"{card['name']}, {card['memory_mib']} MiB, driver {card['driver']}"
    yield "GPUs for serving", explain_devices(EngineConfig.create())
    cuda = torch.cuda.is_available()
    yield "device", "cuda" if cuda else "cpu (torch sees no GPU)"
    # For 64 and 128, the head dims of most models; an engine says at its start what it took for its own.
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else best_cpu_dtype()
    yield "dtype", f"{dtype} (auto{', the checkpoint decides' if cuda else ', the faster one on this CPU'})"
    block_size = EngineConfig.model_fields["block_size"].default
    for kv_dtype in (dtype, torch.float8_e4m3fn) if cuda else (dtype,):
        for head_dim in (64, 128):
            case: dict[str, Any] = {
                "num_heads": 16,
                "num_kv_heads": 8,
                "head_dim": head_dim,
                "dtype": dtype,
                "kv_dtype": kv_dtype,
                "block_size": block_size,
                "device": device,
            }
            try:
                chosen = select_backend("auto", **case)
                found = f"{chosen.name} (auto)"
            except NanoVLLMError as error:
                found = str(error)
            kv = "" if kv_dtype == dtype else ", fp8 KV"
            yield f"attention, {head_dim}{kv}", found
            for name, reason in explain_backends(**case):
                if reason is not None:
                    yield "", f"not {name}: {reason}"
    yield "CUDA graphs", "decode steps, unless enforce_eager or the torch backend" if cuda else "none on a CPU"


if __name__ == "__main__":
    main()
