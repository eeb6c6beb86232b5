# `make quickstart` and `make test` are all a fresh machine needs; both install first if they must.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help setup quickstart test check format clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

setup: $(INSTALLED)  ## create .venv with the pinned dependencies

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "infalign needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(INSTALLED)

quickstart: $(INSTALLED)  ## the whole method on a tiny model, in minutes, without network
	$(BIN)/infalign quickstart

test: $(INSTALLED)  ## the whole test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

check: $(INSTALLED)  ## formatting, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(INSTALLED)  ## put the code into the shape that `make check` wants
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove the environment and caches (never your runs)
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
