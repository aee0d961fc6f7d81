#!/usr/bin/env bash
# Everything of this version that wants a GPU machine, in one run: benchmarks/gpu_check.sh MODEL OUT [python3]
# Runs tests/gpu, shows that MODEL answers on the GPU, and times the seed workload and the CPU comparison. Results in OUT.
set -uo pipefail
model=$1 out=$2 python=${3:-python3}
mkdir -p "$out"
cli() { "$python" -c 'from nanovllm_bento.cli import main; main()' "$@"; }
echo "== tests/gpu"
"$python" -m pytest -q -c /dev/null --rootdir . -p no:cacheprovider --import-mode=importlib tests/gpu 2>&1 | tail -15
echo "== doctor"
cli doctor 2>&1 | tail -40
echo "== answers"
"$python" - "$model" <<'PY'
import sys

from nanovllm_bento import LLM, SamplingParams

for dtype in ("bfloat16", "float32"):
    llm = LLM(sys.argv[1], device="cuda", dtype=dtype)
    (output,) = llm.chat(
        [{"role": "user", "content": "What is the capital of France?"}],
        SamplingParams(temperature=0, max_tokens=32),
        use_tqdm=False,
    )
    print(dtype, llm.core.info, output.outputs[0].text)
    del llm
PY
echo "== seed workload"
cli bench offline --model "$model" --device cuda --repeat 2 --json "$out/offline_cuda.json" 2>&1 | tail -3
echo "== CPU"
"$(dirname "$0")/cpu_on_two_cores.sh" "$model" "$out/offline_cpu_two_cores.json" "$python" 2>&1 | tail -8
