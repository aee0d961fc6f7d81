#!/usr/bin/env bash
# The CPU comparison against transformers on two physical cores of a larger machine:
#   benchmarks/cpu_on_two_cores.sh MODEL RESULT.json [python3]
# Picks one hardware thread of each of two cores, so that it measures what a two-core machine would.
set -euo pipefail
model=$1 result=$2 python=${3:-python3}
cores=$(lscpu -p=CPU,CORE | grep -v '^#' | sort -t, -k2,2n -u | cut -d, -f1 | head -2 | paste -sd,)
echo "on hardware threads $cores of $(lscpu | sed -n 's/^Model name: *//p')"
OMP_NUM_THREADS=2 taskset -c "$cores" "$python" -c 'from nanovllm_bento.cli import main; main()' \
    bench offline --preset cpu --model "$model" --device cpu --json "$result"
