"""What it costs to bring a step's inputs to the tensor-parallel ranks: from publish until the last rank has them.

    python benchmarks/step_ring.py [--readers 1 3 7] [--output FILE]

Processes on one machine, one step in eight milliseconds, as 8B models have them on two GPUs (the writer is busy in
between, as rank 0 is). 4 KB are the inputs of 256 decode rows. ``received``: from before publish until receive has
returned in every reader; ``publish``: the time it takes rank 0. Microseconds. Readers watch the memory for as long as
the engine's ranks do before they sleep (spin), or sleep at once (doorbell); spinning needs a core for every process.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from nanovllm_bento.bench.environment import environment, write_result
from nanovllm_bento.engine.ranks import SPIN_SECONDS
from nanovllm_bento.engine.step_ring import RingReader, RingShape, RingWriter, create_ring

SIZES = {"4 KB": 4096, "64 KB": 64 * 1024, "1 MB": 1024 * 1024}


def read(index: int, ring_fd: int, doorbell_fd: int, shape: dict[str, int], spin_seconds: float) -> None:
    """A reader: prints how long each message took, in nanoseconds."""
    reader = RingReader(
        ring_fd,
        msgspec.convert(shape, RingShape),
        index,
        socket.socket(fileno=doorbell_fd),
        spin_seconds=spin_seconds,
    )
    took: list[int] = []
    try:
        while True:
            message = reader.receive()
            took.append(time.perf_counter_ns() - int.from_bytes(message[:8], "little"))
    except EOFError:
        print(json.dumps(took))


def busy_until(moment: int) -> None:
    while time.perf_counter_ns() < moment:
        pass


def measure(num_readers: int, spin_seconds: float, count: int, gap_us: float) -> dict[str, Any]:
    shape = RingShape(num_readers)
    fd = create_ring(shape)
    pairs = [socket.socketpair() for _ in range(num_readers)]
    writer = RingWriter(fd, shape, [ours for ours, _ in pairs], timeout=30.0)
    processes = []
    for index, (_, theirs) in enumerate(pairs):
        what = {
            "index": index,
            "ring_fd": fd,
            "doorbell_fd": theirs.fileno(),
            "shape": msgspec.to_builtins(shape),
            "spin_seconds": spin_seconds,
        }
        command = [sys.executable, __file__, "--read", json.dumps(what)]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[fd, theirs.fileno()]))
        theirs.close()
    publish: list[int] = []
    warm_up = 100

    def wait_for_readers() -> None:
        while any(writer.progress(i)[0] < writer.num_published for i in range(num_readers)):
            time.sleep(0.001)

    for size in SIZES.values():
        payload = bytearray(size)
        for i in range(warm_up + count):
            began = time.perf_counter_ns()
            payload[:8] = began.to_bytes(8, "little")
            writer.publish(payload)
            publish.append(time.perf_counter_ns() - began)
            if i == 0:
                wait_for_readers()  # they have started
            busy_until(began + int(gap_us * 1000))
        wait_for_readers()
    for ours, _ in pairs:
        ours.close()
    took = [json.loads(process.communicate()[0]) for process in processes]
    writer.close()
    os.close(fd)
    last = [max(each) for each in zip(*took, strict=True)]
    result = {}
    for i, name in enumerate(SIZES):
        begin = i * (warm_up + count) + warm_up
        result[name] = {
            "received": summary(last[begin : begin + count]),
            "publish": summary(publish[begin : begin + count]),
        }
    return result


def summary(nanoseconds: list[int]) -> dict[str, float]:
    ordered = sorted(nanoseconds)
    median, p99 = statistics.median(ordered), ordered[int(0.99 * (len(ordered) - 1))]
    return {"median_us": round(median / 1000, 1), "p99_us": round(p99 / 1000, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readers", type=int, nargs="+", default=[1])
    parser.add_argument("--count", type=int, default=500, help="steps of each size")
    parser.add_argument("--gap-us", type=float, default=8000.0, help="from step to step")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--read", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read is not None:
        return read(**json.loads(options.read))
    cores = len(os.sched_getaffinity(0))
    results = []
    for num_readers in options.readers:
        for name, spin_seconds in (("spin", SPIN_SECONDS), ("doorbell", 0.0)):
            if name == "spin" and cores < num_readers + 1:
                continue
            measured = measure(num_readers, spin_seconds, options.count, options.gap_us)
            results.append({"readers": num_readers, "wait": name, "sizes": measured})
            for size, row in measured.items():
                received, publish = row["received"], row["publish"]
                print(
                    f"{num_readers} readers, {name:8} {size:>5}: received {received['median_us']:7.1f} µs "
                    f"(p99 {received['p99_us']:.1f}), publish {publish['median_us']:7.1f} "
                    f"(p99 {publish['p99_us']:.1f})",
                    file=sys.stderr,
                )
    settings = {"count": options.count, "gap_us": options.gap_us, "spin_seconds": SPIN_SECONDS}
    write_result({"environment": environment(), "settings": settings, "results": results}, options.output)


if __name__ == "__main__":
    main()
