# `make demo` and `make test` need git, make and Python 3.11 or newer, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-lowest test-optuna lint clean

help:  ## Show what there is to make.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(VENV)/.installed  ## Run the whole job on an embedded model: search, table, int8 model.
	$(BIN)/optuna-quantune demo

test: $(VENV)/.installed-dev  ## Lint, type-check and run the tests.
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -n 2

test-lowest:  ## Run the tests with the lowest versions that pyproject.toml admits.
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint tests/lowest.txt --editable '.[dev]'
	.venv-lowest/bin/python -m pytest -n 2

test-optuna: $(VENV)/.installed-dev  ## Run the sampler tests of Optuna's source distribution.
	$(BIN)/python tests/optuna_sdist.py

lint: $(VENV)/.installed-dev  ## Check style and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@ $(VENV)/.installed

clean:  ## Remove the virtual environment and caches.
	rm -rf $(VENV) .venv-lowest .mypy_cache .pytest_cache .ruff_cache
