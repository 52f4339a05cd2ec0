# Every target makes the virtual environment it needs first; a second run starts at once.
#
#   make setup   everything a contributor needs        make bench      the benchmarks (BENCH_ARGS="...")
#   make demo    the demo (DEMO_ARGS="...")            make docs       the documentation, into site/
#   make test    the tests (TEST_ARGS="...")           make test-slow  the tests left out by default
#   make lint    ruff and mypy                         make format     ruff's formatter and safe fixes
#   make native  the C++ extension for CPUs, where there is a compiler; tests and benchmarks build it too
#   make clean   remove the environment and caches
#
# PYTHON=python3.12 chooses the interpreter, VENV=path the environment.

PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-builtin-rules
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format bench docs native clean
# Two installs into one environment at once would break it.
.NOTPARALLEL:

PY := $(VENV)/bin/python
READY := $(VENV)/.nextquill

help:
	@sed -n '3,8s/^#  *//p' Makefile

setup: $(READY)-dev

demo: $(READY)-cli
	$(VENV)/bin/nextquill demo $(DEMO_ARGS)

test: $(READY)-test $(READY)-native
	$(PY) -m pytest $(TEST_ARGS)

test-slow: $(READY)-test $(READY)-native
	$(PY) -m pytest -m slow $(TEST_ARGS)

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

$(READY)-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and f"nextquill needs Python 3.10 or newer, {sys.executable} is {sys.version.split()[0]}: set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# An extra contains the ones before it, so installing it makes those ready too.
$(READY)-cli: CONTAINS := cli
$(READY)-test: CONTAINS := cli test
$(READY)-docs: CONTAINS := cli docs
$(READY)-dev: CONTAINS := cli test docs dev

$(READY)-cli $(READY)-test $(READY)-docs $(READY)-dev: $(READY)-%: pyproject.toml constraints.txt | $(READY)-venv
	@echo "Installing nextquill[$*] into $(VENV); the first time takes a few minutes."
	@$(PY) -m pip install -qq --progress-bar off --disable-pip-version-check --no-input -c constraints.txt -e '.[$*]'
	@touch $(addprefix $(READY)-,$(CONTAINS))

# Optional: without a compiler everything works, with plain PyTorch in its place.
$(READY)-native: $(wildcard csrc/* csrc/src/* csrc/nextquill_ext/*) | $(READY)-venv
	@echo "Building the native extension into $(VENV)."
	@if $(PY) -m pip install -qq --progress-bar off --disable-pip-version-check --no-input --no-deps --force-reinstall ./csrc; \
	then touch $@; else echo "It did not build (see above); going on without it."; fi
