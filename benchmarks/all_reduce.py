"""Times the all-reduce of a tensor-parallel layer on all GPUs of this machine: benchmarks/all_reduce.py OUT.json

One process a GPU (``--size`` for fewer). For rows 1 to 1024 of 2048, 4096 and 5120 bfloat16: the sum with the residual
add and RMSNorm after it through NCCL, through torch's symmetric memory and through kernels/all_reduce.py, unfused and
fused; first checked, then as replays of a CUDA graph of 50 calls (medians, of the first rank). A variant that fails is
named with its error and left out; after 120 s everything is ended, and what there is by then is written.
"""

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

# NVLink multicast is none of what is compared, and must stay off on machines that share their GPUs.
os.environ["NCCL_NVLS_ENABLE"] = "0"
os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"

import torch
from torch import Tensor

from nanovllm_bento.bench.environment import environment, write_result
from nanovllm_bento.kernels import all_reduce as one_shot
from nanovllm_bento.kernels.launch import num_sms
from nanovllm_bento.kernels.norm import add_rms_norm
from nanovllm_bento.layers.parallel import ParallelGroup

ROWS = [1, 4, 16, 64, 128, 256, 512, 1024]
HIDDEN = [4096, 5120, 2048]
MAX_ROW_BYTES = 2 * max(HIDDEN)
CALLS, REPLAYS = 50, 15
LIMIT = 120.0
EPS = 1e-6
MAX_POLLS = 20_000_000
"""Some 5 s: what does not come by then never will."""
Call = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Variant:
    """make: (rows, hidden) -> what is called with x, residual and weight and gives the norm and the new residual."""

    name: str
    make: Callable[[int, int], Call]
    fits: Callable[[int, int], bool] = lambda rows, hidden: True
    sums: bool = True  # over the ranks; what does not is only timed


class Rank(logging.Handler):
    """One process: its group over GPUs, one over CPUs to agree on what failed, and a pipe to the parent."""

    def __init__(self, rank: int, size: int, folder: Path, pipe: Connection) -> None:
        super().__init__(logging.WARNING)
        logging.getLogger("nanovllm_bento").addHandler(self)
        one_shot.MOST_BYTES[size] = max(ROWS) * MAX_ROW_BYTES  # all that is measured
        self.rank, self.size, self.folder, self.pipe = rank, size, folder, pipe
        self.device = torch.device("cuda", rank)
        self.control = ParallelGroup.connect(rank, size, folder / "control", torch.device("cpu"), timeout=LIMIT)
        self.group = ParallelGroup.connect(
            rank, size, folder / "group", self.device, timeout=LIMIT, max_row_bytes=MAX_ROW_BYTES
        )
        self.torch_group: Any = None
        self.symmetric: Tensor | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """What the package logs, above all why the GPUs cannot share memory."""
        self.tell("note", text=record.getMessage())

    def tell(self, kind: str, **what: Any) -> None:
        if self.rank == 0 or kind in ("error", "done"):
            self.pipe.send((kind, {"rank": self.rank, **what}))

    def together(self, what: str, act: Callable[[], Any]) -> tuple[bool, Any]:
        """``act`` on all ranks; whether none failed. An error goes to the parent."""
        result, failed = None, 0
        try:
            result = act()
            torch.cuda.synchronize()
        except Exception as error:
            failed = 1
            self.tell("error", where=what, error=last_words(error))
        return self.control.minimum(-failed, torch.device("cpu")) == 0, result

    def run(self) -> None:
        if self.group.workspace is None:
            self.tell("note", text="CUDA IPC failed; trying torch's symmetric memory for the workspace")
            self.together("workspace over symmetric memory", self.use_symmetric_memory)
        workspace = self.group.workspace
        self.tell("note", text=f"workspace: {workspace and (workspace.max_rows, workspace.row_bytes)}")
        for variant in self.variants():
            began = time.perf_counter()
            for hidden in HIDDEN:
                for rows in ROWS:
                    if variant.fits(rows, hidden) and not self.measure(variant, rows, hidden):
                        return
            self.tell("note", text=f"{variant.name}: {time.perf_counter() - began:.1f} s")

    def measure(self, variant: Variant, rows: int, hidden: int) -> bool:
        """Whether this process can go on."""
        where = f"{variant.name}, {rows} rows of {hidden}"
        good, call = self.together(f"{where}: setup", lambda: variant.make(rows, hidden))
        if good and variant.sums:
            good, _ = self.together(f"{where}: check", lambda: self.check(call, rows, hidden))
        if good:
            good, us = self.together(f"{where}: time", lambda: self.time(call, rows, hidden))
        if good:
            self.tell("result", variant=variant.name, rows=rows, hidden=hidden, us=round(us, 2))
        return good or self.device_lives()

    def device_lives(self) -> bool:
        """Whether no rank's GPU has failed for good (then nothing more can be measured in these processes)."""
        try:
            torch.cuda.synchronize()
            torch.zeros(1, device=self.device).item()
            failed = 0
        except Exception:
            failed = 1
        return self.control.minimum(-failed, torch.device("cpu")) == 0

    def variants(self) -> list[Variant]:
        group = self.group
        workspace = replace(group.workspace, max_polls=MAX_POLLS) if group.workspace is not None else None

        def nccl_norm(rows: int, hidden: int) -> Call:
            alone = ParallelGroup(group.rank, group.size, group.process_group)
            return lambda x, residual, weight: add_rms_norm(alone.all_reduce(x), residual, weight, EPS)

        def ours_norm(rows: int, hidden: int) -> Call:
            assert workspace is not None
            return lambda x, residual, weight: add_rms_norm(one_shot.all_reduce(x, workspace), residual, weight, EPS)

        def fused_by(per_sm: int) -> Callable[[int, int], Call]:
            def make(rows: int, hidden: int) -> Call:
                assert workspace is not None
                used = replace(workspace, max_programs=per_sm * num_sms(self.device))
                return lambda x, residual, weight: one_shot.all_reduce_add_rms_norm(x, residual, weight, EPS, used)

            return make

        def local_norm(rows: int, hidden: int) -> Call:
            return lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS)

        def torch_norm(rows: int, hidden: int) -> Call:
            import torch.distributed._symmetric_memory as symmetric

            name = self.join_torch_group()
            buffer = symmetric.empty(rows * hidden, dtype=torch.bfloat16, device=self.device).view(rows, hidden)
            symmetric.rendezvous(buffer, name)

            def call(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
                buffer.copy_(x)  # where a product cannot write into the buffer itself
                total = torch.ops.symm_mem.one_shot_all_reduce(buffer, "sum", name)
                return add_rms_norm(total, residual, weight, EPS)

            return call

        def fits(rows: int, hidden: int) -> bool:
            return workspace is not None and rows <= workspace.max_rows and 2 * hidden <= workspace.row_bytes

        return [
            Variant("norm alone", local_norm, sums=False),
            Variant("nccl + norm", nccl_norm),
            Variant("one-shot fused", fused_by(1), fits),
            Variant("one-shot + norm", ours_norm, fits),
            # Only where two programs fit on an SM for certain: all must run at once.
            Variant(
                "fused, 2 an SM",
                fused_by(2),
                lambda rows, hidden: fits(rows, hidden) and rows > num_sms(self.device) and hidden <= 4096,
            ),
            Variant("torch + norm", torch_norm, lambda rows, hidden: rows <= 256),
        ]

    def inputs(self, rows: int, hidden: int) -> tuple[list[Tensor], Tensor, Tensor]:
        """All ranks' parts, the residual and the weight: the same on every rank."""
        generator = torch.Generator(device=self.device).manual_seed(rows * 10_000 + hidden)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, device=self.device, generator=generator).bfloat16()

        return [randn(rows, hidden) for _ in range(self.size)], randn(rows, hidden), randn(hidden)

    def check(self, call: Call, rows: int, hidden: int) -> None:
        parts, residual, weight = self.inputs(rows, hidden)
        for _ in range(3):
            normed, total = call(parts[self.rank].clone(), residual.clone(), weight)
            wanted, wanted_total = one_shot.all_reduce_add_rms_norm_reference(parts, residual.clone(), weight, EPS)
            torch.testing.assert_close(total, wanted_total, rtol=1.6e-2, atol=3.2e-2)
            torch.testing.assert_close(normed, wanted, rtol=3.2e-2, atol=3.2e-2)

    def time(self, call: Call, rows: int, hidden: int) -> float:
        """Microseconds a call."""
        parts, residual, weight = self.inputs(rows, hidden)
        x = parts[self.rank]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(x, residual, weight)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                call(x, residual, weight)
        for _ in range(2):
            graph.replay()
        torch.cuda.synchronize()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        times = [a.elapsed_time(b) for a, b in pairwise(events)]
        return statistics.median(times) * 1e3 / CALLS

    def join_torch_group(self) -> Any:
        if self.torch_group is None:
            from torch import distributed as dist

            store = dist.FileStore(str(self.folder / "torch"), self.size)
            dist.init_process_group("nccl", store=store, rank=self.rank, world_size=self.size, device_id=self.device)
            dist.all_reduce(torch.ones(1, device=self.device))
            torch.cuda.synchronize()
            self.torch_group = dist.group.WORLD
        return self.torch_group.group_name

    def use_symmetric_memory(self) -> None:
        import torch.distributed._symmetric_memory as symmetric

        name = self.join_torch_group()
        max_rows = one_shot.MOST_BYTES[self.size] // MAX_ROW_BYTES
        words = one_shot.Workspace.inbox_bytes(self.size, max_rows, MAX_ROW_BYTES) // 4
        self.symmetric = symmetric.empty(words, dtype=torch.int32, device=self.device)
        self.symmetric.fill_(one_shot.EMPTY)
        torch.cuda.synchronize()
        addresses = symmetric.rendezvous(self.symmetric, name).buffer_ptrs
        self.group.workspace = one_shot.Workspace(
            self.rank,
            self.size,
            max_rows,
            MAX_ROW_BYTES,
            torch.tensor(addresses, dtype=torch.int64, device=self.device),
            torch.zeros(max_rows, dtype=torch.int32, device=self.device),
        )


def rank_main(rank: int, size: int, folder: str, pipe: Connection) -> None:
    try:
        Rank(rank, size, Path(folder), pipe).run()
    except Exception as error:
        pipe.send(("error", {"rank": rank, "where": "rank", "error": last_words(error)}))
    pipe.send(("done", {"rank": rank}))
    pipe.close()
    os._exit(0)  # without the destructors of NCCL, which may wait for each other


def last_words(error: Exception) -> list[str]:
    """Where it came from, without the folders of this machine, and what it says."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    lines = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}: {frame.line}" for frame in frames]
    return [*lines, *str(error).splitlines()[:12], f"{type(error).__name__}: {error}"[:300]]


def collect(size: int, folder: str) -> dict[str, Any]:
    """Start the ranks, gather what they tell, and end them, at the latest after LIMIT seconds."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {"results": [], "errors": [], "notes": [], "finished": False}
    processes = []
    pipes: dict[Any, int] = {}
    receiver: Any
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=rank_main, args=(rank, size, folder, sender), daemon=True)
        process.start()
        sender.close()
        processes.append(process)
        pipes[receiver] = rank
    end = time.monotonic() + LIMIT
    done: set[int] = set()
    while pipes and (left := end - time.monotonic()) > 0:
        for receiver in wait(list(pipes), timeout=left):
            rank = pipes[receiver]
            try:
                kind, what = receiver.recv()
            except (EOFError, OSError):
                del pipes[receiver]
                if rank not in done:
                    found["errors"].append({"rank": rank, "where": "process", "error": ["it ended without a word"]})
                    end = min(end, time.monotonic() + 10)  # the others wait for it in vain
                continue
            if kind == "done":
                done.add(rank)
            elif kind == "note":
                found["notes"].append(what["text"])
                print(what["text"], flush=True)
            else:
                found[kind + "s"].append(what)
                if kind == "error":
                    print(f"rank {rank}, {what['where']}: {what['error'][-1]}", file=sys.stderr, flush=True)
    found["finished"] = len(done) == size
    if not found["finished"]:
        print(f"ended before all was measured: ranks {sorted(set(range(size)) - done)} did not finish", file=sys.stderr)
    for process in processes:
        process.join(1)
        if process.is_alive():
            process.kill()
    return found


def topology() -> list[str]:
    """How the GPUs are linked, as nvidia-smi says."""
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [str(error)]
    return done.stdout.splitlines()[: torch.cuda.device_count() + 1]


def show(results: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(result["variant"] for result in results))
    times = {(r["variant"], r["rows"], r["hidden"]): r["us"] for r in results}
    print(f"\n{'µs a call':>12}" + "".join(f"{name:>17}" for name in names))
    for hidden in HIDDEN:
        for rows in ROWS:
            cells = [times.get((name, rows, hidden)) for name in names]
            print(f"{rows:>5} × {hidden:<4}" + "".join(f"{'-' if us is None else f'{us:.1f}':>17}" for us in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?", help="JSON result; printed where not given")
    parser.add_argument("--size", type=int, help="ranks; as many as there are GPUs")
    arguments = parser.parse_args()
    size = arguments.size or torch.cuda.device_count()
    if not 2 <= size <= torch.cuda.device_count():
        raise SystemExit(f"{size} ranks on {torch.cuda.device_count()} GPUs: two are needed, and one for each rank")
    with tempfile.TemporaryDirectory() as folder:
        found = collect(size, folder)
    show(found["results"])
    result = {"environment": environment(), "size": size, "calls": CALLS, "replays": REPLAYS}
    result |= {"topology": topology(), **found}
    if arguments.out is None:
        print(json.dumps({key: result[key] for key in ("errors", "notes", "finished")}, indent=2))
    write_result(result, arguments.out)
    raise SystemExit(0 if found["finished"] and not found["errors"] else 1)


if __name__ == "__main__":
    main()
