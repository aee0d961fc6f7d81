#!/usr/bin/env bash
# The HTTP side, ours and vLLM's on one GPU machine: benchmarks/http_gpu.sh MODEL OUT
#
# Servers one after the other, each under the same load of `bench serve` (random prompts of 512 token ids, 128 tokens out,
# streaming, ignore_eos, temperature 0.6, no prefix cache): ours with its defaults, vLLM as it comes, vLLM with 4 API processes
# and a stream interval of 4; SERVERS="ours vllm" runs some of them, and ours-one-worker is one more. vLLM is looked for in
# $SITE_VLLM. Results: OUT/SERVER-closed.json (256, 64 and 1 at a time) and OUT/SERVER-rate.json (16 requests a second).
set -uo pipefail
model=$1 out=$2 port=8200
mkdir -p "$out"

load() {
    local name=$1 url=http://127.0.0.1:$port options
    options=(--base-url "$url" --model bench --random-input-len 512 --random-output-len 128 --ignore-eos --temperature 0.6 --no-plots)
    python3 -m nanovllm_bento.bench.serve "${options[@]}" --warmup 64 --max-concurrency 256,64,1 \
        --num-prompts "${PROMPTS:-2560,1280,32}" --json "$out/$name-closed.json" >"$out/$name.log" 2>&1
    echo "$name, closed: exit status $?"
    python3 -m nanovllm_bento.bench.serve "${options[@]}" --seed 1 --warmup 8 --request-rate 16 --num-prompts 200 \
        --json "$out/$name-rate.json" >>"$out/$name.log" 2>&1
    echo "$name, 16 a second: exit status $?"
}

ready() { # until the server's engine is
    for _ in $(seq 300); do
        python3 -c "import urllib.request as u; u.urlopen('http://127.0.0.1:$port/health', timeout=2)" 2>/dev/null && return
        sleep 0.5
    done
    return 1
}

stop() { # a process group, until it is gone
    kill -TERM -- "-$1" 2>/dev/null
    for _ in $(seq 300); do
        kill -0 -- "-$1" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL -- "-$1" 2>/dev/null
}

ours() {
    NANOVLLM_MODEL=$model NANOVLLM_SERVED_MODEL_NAME=bench NANOVLLM_MAX_MODEL_LEN=4096 NANOVLLM_ENABLE_PREFIX_CACHING=false \
        setsid env "$@" python3 -m bentoml serve service:NanoVLLM --port $port >"$out/server-$name.log" 2>&1 &
}

vllm() {
    # from another folder, so that none of ours shadows a package
    (cd /tmp && PYTHONPATH=$SITE_VLLM exec setsid python3 -m vllm.entrypoints.cli.main serve "$model" --served-model-name bench \
        --host 127.0.0.1 --port $port --max-model-len 4096 --generation-config vllm --no-enable-prefix-caching "$@" \
        >"$out/server-$name.log" 2>&1) &
}

out=$(realpath "$out")
for name in ${SERVERS:-ours vllm vllm-api4}; do
    case $name in
    ours) ours ;;
    ours-one-worker) ours NANOVLLM_WORKERS=1 ;;
    vllm) vllm ;;
    vllm-api4) vllm --api-server-count 4 --stream-interval 4 ;;
    esac
    server=$!
    ready && load "$name"
    stop "$server"
    tail -2 "$out/server-$name.log"
done
