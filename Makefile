# make setup | train | test | slow | check | format | aot | bench | gpu-a | gpu-b | wheels | clean
# PYTHON=python3.12 picks the interpreter of a new .venv; ARGS="..." is passed on to the command; WORKERS=8 runs the tests
# in eight processes.
# make gpu-a and gpu-b install nothing: they run in .venv (VENV=...) if it exists, else with PYTHON as it is; WHEELS="dir …"
# names the directories that `make wheels` filled, RESULTS=dir the directory for their results.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup train test slow check format aot bench gpu-a gpu-b wheels clean

WHEELS ?=
RESULTS ?= benchmarks/results/gpu
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

help:
	@echo "make setup    a virtual environment in $(VENV) with everything the tests need"
	@echo "make train    train the default small model on the built-in examples (CPU or GPU, minutes)"
	@echo "make test     run the tests"
	@echo "make slow     run all slow tests and benchmarks, and write the results to benchmarks/results/slow.json (an hour)"
	@echo "make check    lint, formatting and types"
	@echo "make format   apply the formatter and the safe lint fixes"
	@echo "make aot      compile the GPU kernels without a GPU, and print their registers, spills and shared memory"
	@echo "make bench    run the benchmarks"
	@echo "make gpu-a    on a machine with a CUDA GPU: test that perce runs there, and which way is faster (5 minutes)"
	@echo "make gpu-b    on the same machine: compare the op with its peers, and run its tests (27 minutes)"
	@echo "make wheels   collect the packages that a GPU machine without network lacks into build/wheels/a, b, c1, …"
	@echo "make clean    remove .venv, caches and build outputs (runs/ stays)"

setup: $(STAMP)

# Whether .venv is complete is tested by pip, not python: an interrupted `venv` leaves an interpreter without pip.
# pip would compile the modules on one core, and those of the packages' own tests too. Some packages have files that no
# Python compiles, such as templates.
$(STAMP): pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -q --disable-pip-version-check --no-compile -e '.[test]' -c constraints.txt
	@$(BIN)/python -m compileall -qq -j 0 -x /tests/ $(VENV)/lib || true
	@touch $@

train: $(STAMP)
	$(BIN)/python -m perce.train $(ARGS)

# One process per core, each with one thread. The tests of a file run in one process: they share objects slow to make.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests -n $(WORKERS) --dist loadfile $(ARGS)

# Tests first, then benchmarks. A failure does not stop the rest, and sets the exit status. The file is rewritten after
# every test.
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
	$(BIN)/python -m tests.helpers.aot $(ARGS)

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks/ --benchmark-only $(ARGS)

gpu-a:
	$(GPU_PYTHON) -m benchmarks.gpu.decide --results $(RESULTS) $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

gpu-b:
	$(GPU_PYTHON) -m benchmarks.gpu.compare --results $(RESULTS) $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

wheels:
	$(GPU_PYTHON) -m benchmarks.gpu.wheels

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
