"""The command ``nanovllm-bento``: serve · chat · bench · models · doctor.

The options of ``serve`` and ``bench offline`` are made from EngineConfig and ServiceConfig, so a setting exists once.
Nothing heavy is imported before a command needs it.
"""

import typer

from nanovllm_bento.cli import bench, chat, machine, serve
from nanovllm_bento.cli.terminal import fail
from nanovllm_bento.errors import NanoVLLMError

app = typer.Typer(
    name="nanovllm-bento",
    help="A compact LLM engine, served with BentoML.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve.serve)
app.command()(chat.chat)
app.add_typer(bench.bench_app, name="bench")
app.command()(machine.models)
app.command()(machine.doctor)


def main() -> None:
    """Entry point: errors raised on purpose are shown as one line, exit status 2 for those of the caller."""
    try:
        app()
    except NanoVLLMError as error:
        fail(str(error))
