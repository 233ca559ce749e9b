# `make demo` needs Python 3.10+ with venv, and make; `make test` a C++ compiler too. Nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LIGHT := "not heavy and not full and not torture"

.PHONY: demo test test-heavy torture verify-all lint docs format clean

demo: $(READY)  ## the main job: a small model learns Python in three minutes
	$(BIN)/dstrain run --zero 2 --pipeline 4

# Two at a time where a test is one process; those that start ranks have the cores to themselves.
test: lint  ## lint, then all tests but the heavy ones
	$(BIN)/python -m pytest -m $(LIGHT) -n 2 --dist loadfile tests/unit tests/data tests/model
	$(BIN)/python -m pytest -m $(LIGHT) tests/distributed tests/e2e tests/torture

test-heavy: $(READY)  ## what takes minutes
	$(BIN)/python -m pytest -m heavy

torture: $(READY)  ## a hundred kills, and some with real interpreters
	$(BIN)/python -m pytest -m "torture or heavy" tests/torture

verify-all: $(READY)  ## every layout with every choice, every family in every way; more than an hour
	$(BIN)/python -m pytest -m full

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(READY)  ## the pages that are written by the code
	$(BIN)/python -m dstrain.plan.layout_table > docs/layouts.md
	$(BIN)/python -m dstrain.model.trials.families > docs/models.md

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dstrain needs Python 3.10 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)
