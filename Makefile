# make setup | train | test | slow | check | format | aot | bench | gpu | clean
# PYTHON=python3.12 picks the interpreter of a new .venv; ARGS="..." is passed on to the command.
# make gpu installs nothing: it runs in .venv (VENV=...) where that is, else with PYTHON as it is; BUDGET=seconds is for
# its benchmarks, WHEELS=dir holds wheels of missing packages, RESULTS=dir takes what it found.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train test slow check format aot bench gpu clean

BUDGET ?= 260
WHEELS ?=
RESULTS ?= benchmarks/results
WHEELS_SITE := $(CURDIR)/build/wheels
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
# In this order, for the time may end before they do. A blocked CUDA call hears no signal: a thread ends the run.
GPU_TESTS := $(addprefix tests/test_gpu_,device.py promises.py lse_gemm.py row_loss.py stored.py driver.py cost.py)
GPU_PYTEST := --timeout 60 --timeout-method thread --tb short --disable-warnings -rf --durations 10

help:
	@echo "make setup    a virtual environment in $(VENV) with everything the tests need"
	@echo "make train    train the default small model on the built-in examples (CPU or GPU, minutes)"
	@echo "make test     run the tests"
	@echo "make slow     run all slow tests and benchmarks, and write what came to benchmarks/results/slow.json (50 minutes)"
	@echo "make check    lint, formatting and types"
	@echo "make format   apply the formatter and the safe lint fixes"
	@echo "make aot      compile the GPU kernels without a GPU: registers, spills, shared memory"
	@echo "make bench    run the benchmarks"
	@echo "make gpu      on a machine with a CUDA GPU: the GPU tests, and the GPU benchmarks (10 minutes)"
	@echo "make clean    remove .venv, caches and build outputs (runs/ stays)"

setup: $(STAMP)

# pip, not python, tells whether .venv is whole: an interrupted `venv` leaves an interpreter without pip.
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[test]' -c constraints.txt
	@touch $@

train: $(STAMP)
	$(BIN)/python -m perce.train $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest tests $(ARGS)

# Tests first, then benchmarks; failures end nothing, and the status is theirs. The file is rewritten after every test.
slow: $(STAMP)
	$(BIN)/python -m pytest tests benchmarks -m "slow and not gpu" --benchmark-enable -p benchmarks.slow_record \
		--record benchmarks/results/slow.json --continue-on-collection-errors -rf $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

aot: $(STAMP)
	$(BIN)/python -m tests.aot $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

# At most 10 minutes: a few tests, for wrong kernels need no timing; the benchmarks; the tests of the kernels. Each part
# runs whatever those before it say, none can take the time of another, and a failure of any is that of the target.
gpu: export PYTHONPATH := $(if $(WHEELS),$(WHEELS_SITE):$(WHEELS_SITE)/nvidia_cutlass_dsl/dsl_packages:)$(PYTHONPATH)
gpu:
	@$(GPU_PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu: expected a CUDA GPU, found none')"
	-$(if $(WHEELS),$(GPU_PYTHON) -m pip install -q --no-index --no-deps --no-compile --upgrade --target $(WHEELS_SITE) $(WHEELS)/*.whl)
	@mkdir -p $(RESULTS); set -o pipefail; status=0; \
	timeout -k 5 80 $(GPU_PYTHON) -m pytest tests/test_gpu_device.py -m gpu -k statistics_and_gradients -x $(GPU_PYTEST) \
		2>&1 | tee $(RESULTS)/gpu_smoke.log || status=1; \
	timeout -k 5 $$(($(BUDGET) + 30)) $(GPU_PYTHON) -m benchmarks.gpu.run --budget $(BUDGET) --results $(RESULTS) \
		2>&1 | tee $(RESULTS)/gpu_benchmarks.log || status=1; \
	CUBLAS_WORKSPACE_CONFIG=:4096:8 timeout -k 5 190 $(GPU_PYTHON) -m pytest $(GPU_TESTS) -m "not slow" \
		--maxfail 8 $(GPU_PYTEST) $(ARGS) 2>&1 | tee $(RESULTS)/gpu_tests.log || status=1; \
	exit $$status

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
