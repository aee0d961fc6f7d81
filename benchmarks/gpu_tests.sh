#!/usr/bin/env bash
# All of tests/gpu, one process a file side by side (most of the time is Triton compiling): benchmarks/gpu_tests.sh OUT [python3]
# Logs in OUT; prints each file's last line, and of failures what failed. Exit status 1 if any failed.
set -uo pipefail
out=$1 python=${2:-python3}
mkdir -p "$out"
for file in tests/gpu/test_*.py; do
    name=$(basename "$file" .py)
    (
        timeout 400 "$python" -m pytest -q --maxfail=6 -c /dev/null --rootdir . -p no:cacheprovider --import-mode=importlib "$file" \
            --durations=3 >"$out/$name.log" 2>&1
        echo $? >"$out/$name.rc"
    ) &
done
wait
status=0
for rc in "$out"/test_*.rc; do
    log=${rc%.rc}.log
    echo "$(basename "$log" .log): $(tail -1 "$log")"
    if [ "$(cat "$rc")" != 0 ]; then
        status=1
        grep -E "^(E  |FAILED|ERROR)" "$log" | cut -c1-220 | head -14
    fi
done
exit $status
