#!/usr/bin/env bash
# Serve Llama-3-8B's shapes in tritonserver, with SOCKET and dense, and load them, on a machine with a GPU and no network:
#
#     PYTHON=PREFIX/bin/python3 benchmarks/gpu_machine/serving.sh ENGINES OUTPUT [SECONDS]
#
# takes SECONDS (570) at most.  ENGINES has the NAMES (llama3-8b-serving llama3-8b-serving-dense) that make.py wrote.  PREFIX
# is an environment with TensorRT and what docs/development.md names; SOCKET_TRT_PLUGIN names the plugin library, where it is
# not in build/.  OPTIONS are the load generator's.  OUTPUT gets serving.json and .md, row by row, and the logs.
set -uo pipefail
cd "$(dirname "$0")/../.."
engines=$1 output=$2 total=${3:-570} python=${PYTHON:-python3}
read -r -a names <<< "${NAMES:-llama3-8b-serving llama3-8b-serving-dense}"
read -r -a options <<< "${OPTIONS:---rate 0.25,inf --requests 32 --prompt-tokens 16384-57344 --output-tokens 64-256}"
deploy=${DEPLOY_OPTIONS---random-weights}
mkdir -p "$output"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$output/log.txt"

# The server's stubs run the python3 of the same environment.
SOCKET_TRT_SERVING=$("$python" -c 'import sys; print(sys.prefix)') || exit 2
export SOCKET_TRT_SERVING
[[ -e $SOCKET_TRT_SERVING/bin/python3 ]] || ln -s "$(basename "$python")" "$SOCKET_TRT_SERVING/bin/python3"
"$python" - << 'CHECK' || exit 2
import importlib.util, sys
needed = ("pytriton", "tritonclient.grpc.aio", "tokenizers", "jinja2", "rich", "typer")
missing = [name for name in needed if not importlib.util.find_spec(name.split(".")[0])]
if missing:
    sys.exit(f"error: {sys.executable} lacks {', '.join(missing)} (docs/development.md)")
CHECK

arguments=()
for name in "${names[@]}"; do
    arguments+=(--engine "$name=$engines/$name")
    if [[ ! -f $engines/$name/engine.plan ]] && grep -q '"backend": "tensorrt"' "$engines/$name/build.json"; then
        timeout -k 5 $((total / 3)) "$python" -m socket_trt.cli.main --log debug compile "$engines/$name" \
            > "$output/compile-$name.log" 2>&1
        echo "compile $name: status $?, $SECONDS s" | tee -a "$output/log.txt"
    fi
done
timeout -k 20 $((total - SECONDS - 25)) "$python" -m benchmarks.serving "${arguments[@]}" "${options[@]}" \
    --deploy-options="$deploy" --output "$output/serving" 2>> "$output/log.txt"
echo "serving: status $?, $SECONDS s" | tee -a "$output/log.txt"
tail -n 30 "$output/log.txt" | cut -c1-240
