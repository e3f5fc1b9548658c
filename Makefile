# `make run` and `make test` set up .venv on first use and again when the lock changes. They change nothing outside .venv
# and your cache, but for the outputs of a run. ARGS reach the program: make run ARGS="model=tiny_llama parallel=tp2".

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
PYTHON := $(VENV)/bin/python
UV := $(VENV)/uv/bin/uv
ARGS ?=
# How many processes run tests, each with ranks of its own.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))
PYTEST := $(PYTHON) -m pytest -o cache_dir=$(VENV)/pytest
PARALLEL := -n $(WORKERS) --dist loadfile

# Compiled modules and the tools' caches stay inside .venv.
unexport PYTHONDONTWRITEBYTECODE PYTHONHOME VIRTUAL_ENV
export PYTHONPYCACHEPREFIX := $(abspath $(VENV))/pycache
export HYPOTHESIS_STORAGE_DIRECTORY := $(abspath $(VENV))/hypothesis
export RUFF_CACHE_DIR := $(abspath $(VENV))/ruff
export MYPY_CACHE_DIR := $(abspath $(VENV))/mypy

# Where a Python 3.12 may be: on PATH, among pyenv's versions, or known to uv. A shim that fails when it is run doesn't count.
define find_python
for candidate in python3.12 python3 "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.12*/bin/python3.12 \
    "$$(command -v uv >/dev/null && uv python find 3.12 2>/dev/null || true)"; do
  if [ -n "$$candidate" ] && "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then
    echo "$$candidate"; exit 0
  fi
done
{ echo "megabridge needs Python 3.12 or newer with venv; the newest here is $$(python3 --version 2>&1 || echo none)."
  echo "Get one with: apt-get install python3.12-venv, or pyenv install 3.12, or uv python install 3.12; then run make again."
} >&2
exit 1
endef
export find_python

.PHONY: help venv run test test-system test-gpu test-memory test-curves test-plans test-grid lowest lint format lock wheel clean

help:  ## What can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## /  make \1\t/'

run: venv  ## The main job: fine-tune SmolLM2-135M-Instruct on this machine and publish it
	@$(PYTHON) -m megabridge.run $(ARGS)

test: venv  ## All tests
	@$(PYTEST) $(PARALLEL) $(ARGS)

test-system: venv  ## Tests on a real SLURM and on two hosts (network namespaces); installs Debian's packages where it may
	@.ci/system-packages
	@$(PYTEST) -rs tests/system $(ARGS)

test-memory: venv  ## Converts a 3 GB model in 1.5 GB of memory; takes 12 GB of disk
	@MEGABRIDGE_MEMORY_GB=3 $(PYTEST) tests/test_memory.py $(ARGS)

test-curves: venv  ## The real model on real text: the same losses under every layout, with all parameters and with LoRA
	@MEGABRIDGE_CURVES=1 $(PYTEST) tests/training/test_smollm2.py $(ARGS)

test-plans: venv  ## Plans the largest published models for hundreds and thousands of ranks
	@MEGABRIDGE_PLANS=1 $(PYTEST) tests/planning/test_plans.py $(ARGS)

test-grid: venv  ## Every family and many random shapes under every layout, of which make test makes a covering choice
	@MEGABRIDGE_GRID=1 $(PYTEST) $(PARALLEL) -m 'grid or cover' $(ARGS)

test-gpu: venv  ## Tests that need one CUDA device
	@MEGABRIDGE_PLATFORM=cuda $(PYTEST) -rs tests/gpu $(ARGS)

lowest: $(UV)  ## All tests with the lowest versions that pyproject.toml allows, in an environment of their own
	@$(PYTHON) -m venv $(VENV)/lowest
	@$(UV) pip install --quiet --python $(VENV)/lowest/bin/python --resolution lowest-direct --editable '.[dev]'
	@PATH=$(abspath $(VENV))/lowest/bin:$$PATH $(VENV)/lowest/bin/python -m pytest -o cache_dir=$(VENV)/pytest $(PARALLEL) $(ARGS)

lint: venv  ## Style, types, and who imports whom
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy
	@$(VENV)/bin/lint-imports --cache-dir $(VENV)/import_linter

format: venv  ## Formats the code
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

lock: $(UV)  ## Takes the newest versions that pyproject.toml allows into requirements.lock
	@$(UV) pip compile --quiet --python $(PYTHON) --universal --upgrade --generate-hashes --extra dev \
	  --no-header --no-emit-index-url pyproject.toml --output-file requirements.lock

wheel: venv  ## dist/megabridge-*.whl
	@$(UV) build --quiet --wheel --no-build-isolation --python $(PYTHON) --out-dir dist

venv: $(VENV)/.installed  ## Only the environment

clean:  ## Removes the environment and what was built
	@rm -rf $(VENV) dist

$(PYTHON):
	@python=$$(bash -c "$$find_python"); echo "Making $(VENV) with $$python"; "$$python" -m venv $(VENV)

# Without uv for this machine, pip does the same, more slowly.
$(UV): requirements.uv | $(PYTHON)
	@mkdir -p $(dir $@)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --upgrade --target $(VENV)/uv -r requirements.uv \
	  || { echo "uv can't be had; pip is used instead."; printf '#!/bin/sh\nexit 1\n' > $@; chmod +x $@; }
	@touch $@

$(VENV)/.locked: requirements.lock $(UV)
	@echo "Installing the locked packages"
	@if $(UV) --version >/dev/null 2>&1; then \
	  $(UV) pip sync --quiet --python $(PYTHON) --require-hashes requirements.lock; \
	else \
	  $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock; \
	fi
	@touch $@

$(VENV)/.installed: $(VENV)/.locked pyproject.toml
	@if $(UV) --version >/dev/null 2>&1; then \
	  $(UV) pip install --quiet --python $(PYTHON) --no-deps --no-build-isolation --editable .; \
	else \
	  $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .; \
	fi
	@touch $@
