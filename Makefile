# `make demo` and `make test` set everything up and run; both work on a fresh clone without a GPU.
PYTHON ?= python3
# Which torch to install: a plain `torch` brings gigabytes of CUDA libraries on Linux.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml | cksum | cut -d' ' -f1)
DEMO := build/demo

.PHONY: setup demo native tensorrt-lean serving test lint typecheck format clean

setup: $(STAMP)

$(STAMP):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	rm -f $(VENV)/.installed-*
	touch $@

# Build, validate and generate from `tiny`, with a budget small enough that a short prompt is already sparse; then the same
# with a small model trained to find what a question asks for, and its answers.
demo: setup
	$(BIN)/socket-trt build --model tiny --output $(DEMO) --force \
		--sink 32 --window 32 --budget 0.05 --min-length 0 --page-size 32
	$(BIN)/socket-trt validate $(DEMO)
	$(BIN)/socket-trt generate $(DEMO) --prompt-file docs/method.md --max-tokens 64
	$(BIN)/socket-trt build --model benchmarks/models/retriever-small --output $(DEMO)-retriever --force \
		--sink 4 --window 4 --budget 0.1 --min-length 0 --page-size 16 --max-seq-len 1024
	$(BIN)/socket-trt validate $(DEMO)-retriever
	$(BIN)/socket-trt eval $(DEMO)-retriever --suite single,haystack --samples 8

# The CUDA library and the plugins, for two architectures: enough to know that they compile, load and check arguments.
NATIVE_ARCHITECTURES ?= 80;90
native: setup
	@if command -v nvcc > /dev/null; then \
		$(BIN)/cmake -B build/native -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
			-DPython3_EXECUTABLE=$(abspath $(BIN)/python) "-DSOCKET_TRT_ARCHITECTURES=$(NATIVE_ARCHITECTURES)" && \
		$(BIN)/cmake --build build/native; \
	else \
		echo "WARNING: nvcc is not on PATH: the native library is NOT built, its tests will be skipped" >&2; \
	fi

# tritonserver and the Python of its stubs, which needs an older NumPy than the rest.
SERVING := build/serving
SERVING_STAMP := $(SERVING)/.installed-$(shell cat serving/requirements.txt | cksum | cut -d' ' -f1)
serving: $(SERVING_STAMP)

$(SERVING_STAMP):
	$(PYTHON) -m venv --clear $(SERVING)
	$(SERVING)/bin/python -m pip install --quiet --no-deps --requirement serving/requirements.txt
	touch $@

# Runtimes of TensorRT whose registries load the plugins on a machine without a GPU.  Two versions cannot live in one
# environment; pinned, because a test names what the registry of each version was seen to do.
TENSORRT_LEAN := build/tensorrt-lean/10.16.1.11 build/tensorrt-lean/11.4.0.106
tensorrt-lean: $(TENSORRT_LEAN)

$(TENSORRT_LEAN): | setup
	@$(BIN)/python -m pip install --quiet --no-deps --target $@.part \
		tensorrt-lean-cu13-libs==$(@F) tensorrt-lean-cu13-bindings==$(@F) && mv $@.part $@ || \
		echo "WARNING: TensorRT's lean runtime $(@F) is NOT installed, tests of its registry will be skipped" >&2

test: setup lint typecheck native tensorrt-lean serving
	$(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@files=$$(git ls-files '*.cu' '*.cuh' '*.cpp' '*.h'); \
		if [ -n "$$files" ]; then $(BIN)/clang-format --dry-run --Werror $$files; else echo "no native code to lint"; fi

typecheck: setup
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	@files=$$(git ls-files '*.cu' '*.cuh' '*.cpp' '*.h'); if [ -n "$$files" ]; then $(BIN)/clang-format -i $$files; fi

clean:
	rm -rf $(VENV) build
