"""``bench``: the benchmarks' commands."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nanovllm_bento.bench.serve_options import LoadOptions
from nanovllm_bento.cli.options import with_settings
from nanovllm_bento.cli.serve import serve_command, service_folder, settings_environment
from nanovllm_bento.cli.terminal import console, fail
from nanovllm_bento.config import EngineConfig, ServiceConfig

bench_app = typer.Typer(
    no_args_is_help=True, help="Benchmarks. Each one has a JSON result that says where it was measured."
)

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
