#!/usr/bin/env python3
"""vLLM's offline throughput on the seed workload: benchmarks/peer_vllm.py MODEL RESULT.jsonl

For `nanovllm-bento bench report --peer vLLM=RESULT.jsonl`. One engine serves all numbers of sequences, since none of
its settings depends on them (up to 256): its start, which takes minutes when cold, is paid once. Each result is a line
that is added to the file as soon as it is there, so that a second call can add those with --kv-dtype fp8.

As ours: all sequences handed over at once as token ids, temperature 0.6, end of sequence ignored, prefix cache off,
CUDA graphs on, no detokenizing, max_model_len 4096, 90% of the GPU's memory; one warm-up request, untimed; wall clock
of the one generate call.
"""

import argparse
import json
import os
import time
from itertools import islice
from pathlib import Path
from typing import Any

from nanovllm_bento.bench.workloads import seed_workload


def measure(llm: Any, sampling: Any, num_seqs: int, repeat: int) -> dict[str, Any]:
    seconds, workload = [], None
    for workload in islice(seed_workload(num_seqs), repeat):
        prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts]
        params = [sampling(max_tokens=n) for n in workload.output_lens]
        started = time.perf_counter()
        done = llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - started)
        got = sum(len(output.outputs[0].token_ids) for output in done)
        if got != workload.num_output_tokens:
            raise RuntimeError(f"vLLM yielded {got} tokens where {workload.num_output_tokens} were asked for")
    assert workload is not None
    total = workload.num_output_tokens
    return {
        "seqs": num_seqs,
        "in_tokens": workload.num_input_tokens,
        "out_tokens": total,
        "run_s": [round(s, 3) for s in seconds],
        "tok_s_first": round(total / seconds[0], 1),
        "tok_s_best": round(total / min(seconds), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("result", type=Path)
    parser.add_argument("--num-seqs", default="256,64,16,1")
    parser.add_argument("--kv-dtype", default="auto", choices=["auto", "fp8"])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--load-format", default="auto", choices=["auto", "dummy"], help="dummy: random weights")
    args = parser.parse_args()
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    started = time.perf_counter()
    import torch
    import vllm  # type: ignore[import-not-found]

    llm = vllm.LLM(
        args.model,
        max_model_len=4096,
        max_num_seqs=256,
        gpu_memory_utilization=0.9,
        enable_prefix_caching=False,
        kv_cache_dtype=args.kv_dtype,
        load_format=args.load_format,
        generation_config="vllm",
        disable_log_stats=True,
    )
    load_s = round(time.perf_counter() - started, 1)

    def sampling(**options: Any) -> Any:
        return vllm.SamplingParams(temperature=0.6, ignore_eos=True, detokenize=False, **options)

    llm.generate([{"prompt_token_ids": [1] * 16}], sampling(max_tokens=16), use_tqdm=False)
    about = {"engine": "vllm", "version": vllm.__version__, "torch": torch.__version__}
    about |= {"gpu": torch.cuda.get_device_name(), "kv_dtype": args.kv_dtype, "load_s": load_s}
    for num_seqs in map(int, args.num_seqs.split(",")):
        line = json.dumps({**about, **measure(llm, sampling, num_seqs, args.repeat)})
        print(line, flush=True)
        with args.result.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
