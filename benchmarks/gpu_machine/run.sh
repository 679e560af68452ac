#!/usr/bin/env bash
# Compile, validate and time the engine directories that make.py wrote, on a machine with a GPU and TensorRT:
#
#     benchmarks/gpu_machine/run.sh ENGINES OUTPUT [SECONDS]
#
# PYTHON names the interpreter that has TensorRT (python3).  The first small model goes alone and fills the timing cache, so
# that the others, JOBS (3) at a time, take a third of its time; each build holds 7 GB of the GPU's memory.  The large ones,
# which are timed, go one by one after them.  PARTS ("small large") leaves some out.  Every step has a limit of its own
# (SECONDS, 180) and the next ones go on after a failure.  OUTPUT gets the whole output of each engine's steps, TensorRT's
# messages with their times among it, in ENGINE.log, and the benchmarks' JSON.
set -uo pipefail
cd "$(dirname "$0")/../.."
engines=$1 output=$2 limit=${3:-180}
mkdir -p "$output"

step() { # step ENGINE COMMAND...: run socket-trt, keep all it says in the engine's log, show how it ended
    local log=$output/$(basename "$1").log begin=$SECONDS status
    shift
    timeout -k 5 "$limit" "${PYTHON:-python3}" -X faulthandler -m socket_trt.cli.main --log debug "$@" >> "$log" 2>&1
    status=$?
    echo "=== $*: status $status, $((SECONDS - begin)) s"
    return $status
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
small() {
    local engine first=1
    for engine in "$engines"/*; do
        [[ -f $engine/reference.npz && ! -f $engine/engine.plan ]] || continue
        while (($(jobs -rp | wc -l) >= ${JOBS:-3})); do wait -n; done
        if ((first)); then
            step "$engine" compile "$engine" && { step "$engine" validate "$engine" & }
        else
            { step "$engine" compile "$engine" && step "$engine" validate "$engine"; } &
        fi
        first=0
    done
    wait
}

large() {
    local large=$engines/llama3-8b single=$engines/llama3-8b-1layer
    step "$large" compile "$large" &&
        step "$large" bench "$large" --random-weights --cases "${CASES:-1x128K,4x128K,1x512K}" --prefill 8192 --layers \
            --output "$output/bench-llama3-8b.json"
    step "$single" compile "$single" &&
        step "$single" bench "$single" --random-weights --cases 1x140K,1x18K --steps 200 --output "$output/bench-1layer.json"
}

for part in ${PARTS:-small large}; do "$part"; done
