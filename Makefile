# Every target makes the virtual environment it needs first; a second run starts at once.
#
#   make setup   everything a contributor needs        make bench      the benchmarks (BENCH_ARGS="...")
#   make demo    the demo (DEMO_ARGS="...")            make popi-demo  the demo of POPI
#   make test    the tests (TEST_ARGS="...")           make test-slow  the tests left out by default
#   make lint    ruff and mypy                         make format     ruff's formatter and safe fixes
#   make test-numerics  the numerical tests, as on another processor (PROCESSOR=avx2, THREADS=3)
#   make native  the C++ extension for CPUs, where there is a compiler; tests and benchmarks build it too
#   make docs    the documentation, into site/         make clean      remove the environment and caches
#
# PYTHON=python3.12 chooses the interpreter, VENV=path the environment, JOBS=4 the number of test processes.
# make test VENV=.venv-newest PINS= tests with the newest releases that pyproject.toml allows.

PYTHON ?= python3
VENV ?= .venv
PINS ?= -c constraints.txt
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
JOBS ?= auto
# Names in tests/processors.py.
PROCESSOR ?= avx2
THREADS ?= 3
# What computes with floating-point numbers, by PyTorch's own products above all.
NUMERICAL := $(wildcard tests/golden tests/mirror tests/models tests/native tests/ops tests/reference tests/training tests/tree \
	tests/evaluation tests/generation tests/popi/test_p*.py tests/test_f*.py tests/test_implementations.py \
	tests/test_known_failures.py tests/test_l*.py tests/test_token_weights.py tests/test_weighting.py)

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help
.PHONY: help setup demo popi-demo test test-slow test-numerics lint format bench docs native clean
# Two installs into one environment at once would break it.
.NOTPARALLEL:

PY := $(VENV)/bin/python
READY := $(VENV)/.nextquill

help:
	@sed -n '3,9s/^#  *//p' Makefile

setup: $(READY)-dev

demo: $(READY)-cli
	$(VENV)/bin/nextquill demo $(DEMO_ARGS)

popi-demo: $(READY)-cli
	$(VENV)/bin/nextquill popi demo $(DEMO_ARGS)

# Half of a single file's time would go into starting workers: conftest.py then takes none.
PYTEST := $(PY) -m pytest --numprocesses $(JOBS) --dist worksteal

test: $(READY)-test $(READY)-native
	@echo "Running the tests; all of them take a few minutes."
	@$(PYTEST) $(TEST_ARGS)

test-slow: $(READY)-test $(READY)-native
	@echo "Running the tests that make test leaves out; all of them take a quarter of an hour."
	@$(PYTEST) -m slow $(TEST_ARGS)

test-numerics: $(READY)-test $(READY)-native
	@echo "Running the numerical tests as on another processor ($(PROCESSOR)), with $(THREADS) threads."
	@$(PY) tests/processors.py $(PROCESSOR) $(THREADS) $(PYTEST) $(NUMERICAL) $(TEST_ARGS)

lint: $(READY)-dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY)-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

native: $(READY)-native

bench: $(READY)-cli $(READY)-native
	$(PY) -m benchmarks.run $(BENCH_ARGS)

docs: $(READY)-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet --site-dir site

clean:
	rm -rf .venv build site dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . \( -name __pycache__ -o -name .ruff_cache \) -type d -prune -exec rm -rf {} +

ifneq ($(shell test -w . && echo writable),writable)
$(error $(CURDIR) cannot be written to: copy it to a folder that can, and run make there)
endif

# If a part of the environment, or its Python, was removed, the environment is made again.
MISSING := $(shell [ ! -e $(READY)-contents ] || xargs ls -dL <$(READY)-contents 2>&1 >/dev/null | head -n 1)
ifneq ($(MISSING),)
$(info The environment in $(VENV) is incomplete ($(MISSING)): making it again.)
$(shell rm -f $(READY)-*)
endif

$(READY)-venv:
	@"$(PYTHON)" -c '' >/dev/null 2>&1 || { echo "There is no $(PYTHON) that runs: install Python 3.10 or newer, or name one with PYTHON=path."; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"nextquill needs Python 3.10 or newer, {sys.executable} is {sys.version.split()[0]}: name another with PYTHON=path.")'
	"$(PYTHON)" -m venv --clear $(VENV)
	@touch $@

# An extra contains the ones before it, so installing it makes those ready too.
$(READY)-cli: CONTAINS := cli
$(READY)-test: CONTAINS := cli test
$(READY)-docs: CONTAINS := cli docs
$(READY)-dev: CONTAINS := cli test docs dev

$(READY)-cli $(READY)-test $(READY)-docs $(READY)-dev: $(READY)-%: pyproject.toml constraints.txt | $(READY)-venv
	@if [ -e $(READY)-installing ]; then echo "The last installation did not finish: starting from an empty environment."; \
	$(PYTHON) -m venv --clear $(VENV); touch $(READY)-venv; fi; touch $(READY)-installing
	@echo "Installing nextquill[$*] into $(VENV); the first time takes a few minutes."
	@$(PY) -m pip install -qq --progress-bar off --disable-pip-version-check --no-input $(PINS) -e '.[$*]'
	@ls -d $(PY) $(VENV)/lib/python*/site-packages/* | grep -v 'info$$\|__pycache__' >$(READY)-contents
	@rm $(READY)-installing
	@touch $(addprefix $(READY)-,$(CONTAINS))

# Optional: without a compiler everything works, with plain PyTorch in its place.
$(READY)-native: $(wildcard csrc/* csrc/src/* csrc/nextquill_ext/*) | $(READY)-venv
	@if ! command -v $${CXX:-c++} g++ clang++ >/dev/null; then \
		echo "No C++ compiler, so no native kernels: plain PyTorch takes their place."; \
	elif echo "Building the native kernels into $(VENV)."; \
		$(PY) -m pip install -qq --progress-bar off --disable-pip-version-check --no-input --no-deps --force-reinstall ./csrc \
		>$(VENV)/native.log 2>&1; then touch $@; \
	else echo "The native kernels did not build ($(VENV)/native.log says why): plain PyTorch takes their place."; fi
