#!/usr/bin/env bash
# Compile, validate and time the engine directories that make.py wrote, on a machine with a GPU and TensorRT:
#
#     benchmarks/gpu_machine/run.sh ENGINES OUTPUT [SECONDS]
#
# PYTHON names the interpreter that has TensorRT (python3).  Every step has a limit of its own (SECONDS, 120) and the next
# ones go on after a failure; OUTPUT gets their whole output, TensorRT's messages with their times among it, in log.txt,
# and the benchmarks' JSON.
set -uo pipefail
cd "$(dirname "$0")/../.."
engines=$1 output=$2 limit=${3:-120}
mkdir -p "$output"

step() { # step NAME COMMAND...: run socket-trt, keep all it says, show the end
    local name=$1 begin=$SECONDS status
    shift
    timeout -k 5 "$limit" "${PYTHON:-python3}" -X faulthandler -m socket_trt.cli.main --log debug "$@" > "$output/step.txt" 2>&1
    status=$?
    echo "=== $name: status $status, $((SECONDS - begin)) s" | tee -a "$output/log.txt"
    cat "$output/step.txt" >> "$output/log.txt"
    tail -n 14 "$output/step.txt" | cut -c1-220
    return $status
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee -a "$output/log.txt"
for engine in "$engines"/tiny "$engines"/*; do
    name=$(basename "$engine")
    [[ -f $engine/reference.npz && ! -f $engine/engine.plan ]] || continue # tiny came first, and the large ones come last
    step "compile $name" compile "$engine" && step "validate $name" validate "$engine"
done
step "compile llama3-8b" compile "$engines/llama3-8b" &&
    step "bench llama3-8b" bench "$engines/llama3-8b" --random-weights --cases "${CASES:-1x128K,4x128K,1x512K}" \
        --prefill 8192 --layers --output "$output/bench-llama3-8b.json"
step "compile one layer, R = 10" compile "$engines/llama3-8b-1layer" &&
    step "bench one layer, R = 10" bench "$engines/llama3-8b-1layer" --random-weights --cases 1x140K,1x18K --steps 200 \
        --output "$output/bench-1layer.json"
rm -f "$output/step.txt"
