"""``chat``: talk to a running server."""

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from nanovllm_bento.cli.terminal import console, fail


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
