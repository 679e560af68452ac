#!/usr/bin/env bash
# Train the large retriever and compare the methods on it, on a machine with one H100 or H200, in one call:
#
#     benchmarks/gpu_machine/quality.sh OUTPUT [SECONDS]
#
# takes SECONDS (570) at most, 300 of them training.  PYTHON names the interpreter (python3) with torch and transformers.
# The native library is built meanwhile, unless it is there.  OUTPUT gets retriever-large/, quality.json, .md and .png, each
# as far as it goes, and the logs; what is missing at the end says log.txt.
set -uo pipefail
cd "$(dirname "$0")/../.."
output=$1 total=${2:-570} python=${PYTHON:-python3} length=${LENGTH:-8192} size=${SIZE:-large}
mkdir -p "$output"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>&1 | tee "$output/log.txt"

if ! "$python" -c 'import sys; from socket_trt.native import library_path; sys.exit(library_path() is None)'; then
    (cmake -B build/native -G Ninja -DSOCKET_TRT_ARCHITECTURES=90 && cmake --build build/native) > "$output/native.log" 2>&1 &
fi
timeout -k 5 $((total - 60)) "$python" -m benchmarks.train_retriever --size "$size" --output "$output/retriever-$size" \
    --time-limit $((total * 53 / 100)) --samples 64 ${TRAIN_OPTIONS:-} 2>&1 | tee -a "$output/log.txt" | grep --line-buffered -v Warning
wait
left=$((total - SECONDS))
timeout -k 5 "$left" "$python" -m benchmarks.quality --checkpoint "$output/retriever-$size" --length "$length" \
    --samples 24 --batch 24 --measured 4 --library-samples 8 --sink 16 --window 16 --time-limit $((left - 25)) \
    --output "$output" --name quality ${QUALITY_OPTIONS:-} 2>> "$output/log.txt" | tail -n 60
echo "status ${PIPESTATUS[0]}, $SECONDS s" | tee -a "$output/log.txt"
