#!/usr/bin/env bash
# Two GPUs and mixtures of experts: benchmarks/parallel_gpu.sh OUT 8B [32B [30B-A3B]]
#
# Folders that hold those models' config.json (weights are random, load_format=dummy). On a machine with two GPUs: the tests that
# need two, the sums over the ranks, 8B on one GPU and then on both, with nothing beside either, 32B on both, and last 30B-A3B and
# its layers on one. Ten minutes with all of them. Results in OUT: all_reduce.json, step_ring.json, moe.json, and
# NAME/report.json, which docs/parallelism.md quotes.
set -uo pipefail
out=$1 dense=$2 large=${3:-} experts=${4:-}
mkdir -p "$out"
export NANOVLLM_LOAD_FORMAT=dummy

report() {
    local name=$1 model=$2
    shift 2
    timeout 200 python3 -m nanovllm_bento.cli bench report --repeat 2 --model "$model" --random-weights --no-plots --out "$out/$name" "$@" \
        >"$out/$name.log" 2>&1
    echo "$name: exit status $?"
}

tests() {
    timeout 300 python3 -m pytest -q -c /dev/null --rootdir . -p no:cacheprovider --import-mode=importlib "$@" >"$out/tests.log" 2>&1
    echo "tests: $(tail -1 "$out/tests.log")"
}

tests tests/gpu/test_all_reduce_cuda.py tests/gpu/test_tensor_parallel_cuda.py
python3 benchmarks/all_reduce.py "$out/all_reduce.json" >"$out/all_reduce.log" 2>&1
python3 benchmarks/step_ring.py --readers 1 --output "$out/step_ring.json" >"$out/step_ring.log" 2>&1
CUDA_VISIBLE_DEVICES=0 report 8B "$dense" --sections throughput,steps --num-seqs 1,256
NANOVLLM_TENSOR_PARALLEL_SIZE=2 report 8B-tp2 "$dense" --sections throughput,steps --num-seqs 1,256
[ -z "$large" ] || NANOVLLM_TENSOR_PARALLEL_SIZE=2 report 32B-tp2 "$large" --sections throughput --num-seqs 1,256
[ -n "$experts" ] || exit 0
python3 benchmarks/moe.py "$out/moe.json" >"$out/moe.log" 2>&1
report 30B-A3B "$experts" --sections throughput,steps --num-seqs 1,16,64,256
