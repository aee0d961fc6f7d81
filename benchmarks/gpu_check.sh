#!/usr/bin/env bash
# Everything that wants a GPU machine, in one run: benchmarks/gpu_check.sh MODEL OUT [PEER=FILE...]
# MODEL: a folder with Qwen3-0.6B's shapes (random weights are said to be such). Runs the report with every section, beside
# the peers' results, then tests/gpu. Results in OUT. With DEMO=FILE.gguf also what an fp8 KV cache costs in quality.
set -uo pipefail
model=$1 out=$2
shift 2
mkdir -p "$out"
cli() { python3 -c 'from nanovllm_bento.cli import main; main()' "$@"; }
options=()
for peer in "$@"; do options+=(--peer "$peer"); done
if [ -n "${DEMO:-}" ]; then
    python3 benchmarks/kv_quality.py "$DEMO" "$out/kv_quality.json" README.md CONTRIBUTING.md docs/*.md LICENSE
    options+=(--quality "$out/kv_quality.json")
fi
cli bench report --out "$out" --model "$model" --random-weights --kv-cache-dtype auto,fp8_e4m3 --no-plots "${options[@]}" \
    >"$out/report.log" 2>&1
echo "report: exit status $?, $(tail -1 "$out/report.log")"
benchmarks/gpu_tests.sh "$out/tests"
