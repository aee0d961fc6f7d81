#!/usr/bin/env python3
"""What the load generator itself costs: benchmarks/load_client.py [--json RESULT.json]

A server that does nothing but send prepared bytes is put under load by one client process of ``bench serve``: answers
of one chunk (what a request costs), and many open streams whose chunks come apart from each other (what a chunk costs,
at its dearest: each wakes the client once). From the client's own CPU time follows what one process can see; beyond
half of that its results are marked client-bound. The server shares the machine, so CPU time counts, not throughput.
"""

import argparse
import asyncio
import multiprocessing
import time
from pathlib import Path
from typing import Any

from nanovllm_bento.bench.environment import environment, write_result
from nanovllm_bento.bench.serve import bench_serve
from nanovllm_bento.bench.serve_options import LoadOptions
from nanovllm_bento.bench.startup import free_port

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"cmpl-0123456789abcdef01234567","object":"text_completion","created":1700000000,"model":"m",'
    b'"system_fingerprint":null,"choices":[{"index":0,"text":" hello","logprobs":null,"finish_reason":null}],'
    b'"usage":null}\n\n'
)
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)


def last_chunk(num_chunks: int) -> bytes:
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":512,"completion_tokens":%d}}\n\n' % num_chunks
    events = EVENT.replace(b'"finish_reason":null', b'"finish_reason":"length"') + usage + b"data: [DONE]\n\n"
    return b"%x\r\n%b\r\n0\r\n\r\n" % (len(events), events)


def serve(port: int, num_chunks: int, interval: float) -> None:
    """Answers of num_chunks chunks, ``interval`` seconds apart."""
    last = last_chunk(num_chunks)

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]))
                writer.write(HEAD)
                for _ in range(num_chunks - 1):
                    await asyncio.sleep(interval)
                    writer.write(CHUNK)
                writer.write(last)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> None:
        await (await asyncio.start_server(connection, "127.0.0.1", port, backlog=4096)).serve_forever()

    from uvloop import run

    run(main())


def measure(num_chunks: int, interval: float, **options: Any) -> dict[str, Any]:
    """CPU microseconds of the one client process, over a whole run."""
    port = free_port()
    server = multiprocessing.Process(target=serve, args=(port, num_chunks, interval), daemon=True)
    server.start()
    try:
        time.sleep(1.0)
        url = f"http://127.0.0.1:{port}"
        (run,) = bench_serve(LoadOptions.create(base_url=url, model="m", processes=1, **options))["runs"]
    finally:
        server.terminate()
        server.join()
    assert not run["requests"]["failed"], run["requests"]["failures"]
    (process,) = run["client"]["processes"]
    cpu = process["cpu_share"] * run["seconds"]
    return {
        "chunks_per_answer": num_chunks,
        "concurrency": run["max_concurrency"],
        "requests": process["requests"],
        "chunks": process["chunks"],
        "cpu_share": process["cpu_share"],
        "us_per_request": round(1e6 * cpu / process["requests"], 2),
        "us_per_chunk": round(1e6 * cpu / process["chunks"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    short = measure(1, 0.0, max_concurrency="32", num_prompts="10000")
    streams = measure(128, 0.02, max_concurrency="256", num_prompts="1024")
    result = {
        "benchmark": "load_client",
        "environment": environment(),
        "short": short,
        "streams": streams,
        "requests_per_s_of_a_full_core": round(1e6 / short["us_per_request"]),
        "chunks_per_s_of_a_full_core": round(1e6 / streams["us_per_chunk"]),
    }
    write_result(result, args.json)


if __name__ == "__main__":
    main()
