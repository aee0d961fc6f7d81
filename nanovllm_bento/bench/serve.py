"""``nanovllm-bento bench serve``: load on a server with OpenAI's API, and what its clients saw.

The parts: serve_options (what is asked for), serve_workload (what is sent, and when), serve_processes and serve_client
(who sends it), serve_http (how answers are read), serve_stats (the numbers), serve_report and serve_plots (how they are
shown). ``python -m nanovllm_bento.bench.serve`` is the same command where typer is not installed.
"""

import argparse
import http.client
import json
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin
from urllib.parse import urlsplit

from nanovllm_bento.bench.environment import environment, write_result
from nanovllm_bento.bench.serve_messages import Progress
from nanovllm_bento.bench.serve_options import LoadOptions, RunShape
from nanovllm_bento.bench.serve_processes import ClientError, run_load
from nanovllm_bento.bench.serve_stats import summarize
from nanovllm_bento.bench.serve_workload import make_work
from nanovllm_bento.errors import ConfigError, NanoVLLMError

WARMUP_STREAM = 1_000_000  # the number of its prompts' stream: never one of a run's
RETRY_SECONDS = 0.5

OnProgress = Callable[[str, int, Sequence[Progress], float], None]
"""(name of the run, requests in all, progress of each process, seconds since its start)."""


class NoServerError(NanoVLLMError):
    """No server answers, or not as OpenAI's API does."""


def bench_serve(
    options: LoadOptions,
    *,
    say: Callable[[str], None] = lambda text: None,
    on_progress: OnProgress = lambda name, total, progress, seconds: None,
) -> dict[str, Any]:
    """Every run that the options ask for, one after another.

    Raises ConfigError, NoServerError and ClientError. Requests that fail are part of the result.
    """
    served = served_model(options) if options.model is None or options.ready_timeout else ""
    model = options.model or served
    if options.warmup:
        say(f"warm-up: {options.warmup} requests")
        first = options.runs[0]
        shape = RunShape(options.warmup, None, first.max_concurrency or min(options.warmup, 32))
        gathered = run_load(options, shape, make_work(options, shape, model, stream=WARMUP_STREAM), model)
        failed = [r.detail or r.failure for d in gathered.done for r in d.records if r.failure is not None]
        if failed:
            say(f"{len(failed)} of the warm-up's requests failed: {failed[0]}")
    runs = []
    for number, shape in enumerate(options.runs):
        work = make_work(options, shape, model, stream=number + 10)
        for warning in work.warnings:
            say(warning)

        def shown(
            progress: Sequence[Progress], seconds: float, name: str = shape.name, n: int = work.num_requests
        ) -> None:
            on_progress(name, n, progress, seconds)

        gathered = run_load(options, shape, work, model, on_progress=shown)
        found = summarize(gathered.done, gathered.start, slo=options.slo, ignore_eos=options.ignore_eos)
        runs.append(
            {
                "name": "trace" if work.times is not None else shape.name,
                "request_rate": shape.request_rate,
                "max_concurrency": shape.max_concurrency,
                "burstiness": options.burstiness if shape.request_rate else None,
                "interrupted": gathered.interrupted,
                "workload": work.describe,
                **found,
            }
        )
        if gathered.interrupted:
            say("stopped: what had not ended by then is left out")
            break
    return {
        "benchmark": "serve",
        "environment": environment(),
        "url": options.url,
        "endpoint": options.path,
        "model": model,
        "settings": options.recorded(),
        "runs": runs,
    }


def served_model(options: LoadOptions) -> str:
    """The first name in /v1/models; waits up to ready_timeout for a server. Raises NoServerError."""
    deadline = time.monotonic() + options.ready_timeout
    while True:
        try:
            return _get_model(options)
        except NoServerError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(RETRY_SECONDS)


def _get_model(options: LoadOptions) -> str:
    status, _ = _get(options, "/health")
    if status == 503:  # other servers may have no such path
        raise NoServerError(f"the server at {options.url} is not ready yet; --ready-timeout waits for it.")
    status, body = _get(options, "/v1/models")
    if status != 200:
        text = body[:200].decode(errors="replace")
        raise NoServerError(f"{options.url}/v1/models answers {status}: {text}")
    try:
        return str(json.loads(body)["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise NoServerError(f"{options.url}/v1/models names no model; give --model.") from None


def _get(options: LoadOptions, path: str) -> tuple[int, bytes]:
    url = urlsplit(options.url)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname or "127.0.0.1", url.port, timeout=30)
    try:
        connection.request("GET", f"{url.path}{path}", headers=options.headers)
        response = connection.getresponse()
        return response.status, response.read()
    except (OSError, http.client.HTTPException) as error:
        raise NoServerError(f"no server answers at {options.url} ({error}).") from None
    finally:
        connection.close()


def run_command(options: LoadOptions, json_file: Path | None, *, plots: bool, redraw: Path | None = None) -> int:
    """The command behind both command lines: measure (or read ``redraw``), show, write, plot. Returns the exit status:
    1 if any request failed."""
    from nanovllm_bento.bench import serve_plots, serve_report

    if plots and (json_file is not None or redraw is not None):
        serve_plots.require_matplotlib()
    display = serve_report.Display()
    if redraw is not None:
        result = serve_report.read(redraw)
    else:
        with display:
            result = bench_serve(options, say=display.say, on_progress=display.progress)
    display.result(result)
    if json_file is not None:
        write_result(result, json_file)
        display.say(f"wrote {json_file}")
    target = json_file or redraw
    if plots and target is not None:
        for path in serve_plots.write_plots(result, target):
            display.say(f"wrote {path}")
    return 1 if any(run["requests"]["failed"] or run["interrupted"] for run in result["runs"]) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line without typer. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m nanovllm_bento.bench.serve", description=__doc__)
    for name, field in LoadOptions.model_fields.items():
        flag, kind = "--" + name.replace("_", "-"), _plain(field.annotation)
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=field.description)
        elif kind is list:
            parser.add_argument(flag, action="append", default=None, help=field.description)
        else:
            parser.add_argument(flag, type=kind, default=None, help=(field.description or "").replace("%", "%%"))
    parser.add_argument("--json", type=Path, dest="json_file", help="File for the result; a plot is drawn beside it.")
    parser.add_argument("--plots", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--from", type=Path, dest="redraw", help="Measure nothing: show and draw a result again.")
    given = vars(parser.parse_args(arguments))
    json_file, plots, redraw = given.pop("json_file"), given.pop("plots"), given.pop("redraw")
    try:
        return run_command(LoadOptions.create(**given), json_file, plots=plots, redraw=redraw)
    except (NanoVLLMError, ClientError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


def _plain(annotation: Any) -> type:
    """How argparse is to read an option; what it may be is checked by the options themselves."""
    if get_origin(annotation) in (Union, types.UnionType):
        annotation = next(a for a in get_args(annotation) if a is not type(None))
    if get_origin(annotation) is list:
        return list
    return str if get_origin(annotation) is Literal else annotation


if __name__ == "__main__":
    raise SystemExit(main())
