# `make demo` needs Python 3.10+ with venv, and make; `make test` a C++ compiler too. Nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Where torch comes from, and options for every `pip install`: docs/getting-started.md. PyPI's torch for Linux brings
# CUDA's libraries, gigabytes, also where there is no GPU:
#     make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
PIP_ARGS ?=
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
# Two files at a time: a test that starts ranks waits for them half of its time. In the order of their names: the
# last ones, those of tests/unit, are short, so that neither of the two waits long for the other.
# Compiled first, for the thousands of processes that the tests start, also where PYTHONDONTWRITEBYTECODE is set.
COMPILE := $(BIN)/python -m compileall -q dstrain tests
PYTEST := $(COMPILE) && $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=15

.PHONY: demo test test-heavy test-gpu test-lowest torture verify-all lint docs lock audit format clean

demo: $(READY)  ## the main job: a small model learns Python in three minutes
	$(BIN)/dstrain run --zero 2 --pipeline 4

test: lint  ## lint, then all tests but the heavy ones
	$(PYTEST) -m "not heavy and not full and not torture and not gpu"

test-heavy: $(READY)  ## what takes minutes
	$(PYTEST) -m heavy

test-gpu: $(READY)  ## on a machine with GPUs: layouts, attention, memory and time; ten minutes with one GPU
	DS_ACCELERATOR=cuda $(BIN)/python -m pytest -m gpu tests/gpu

test-lowest: $(READY)  ## a slice of the tests with the lowest versions that pyproject.toml allows; part of test-heavy
	$(BIN)/python -m pytest -m heavy tests/e2e/test_lowest_versions.py

torture: $(READY)  ## a hundred kills, and some with real interpreters
	$(BIN)/python -m pytest -m "torture or heavy" tests/torture

verify-all: $(READY)  ## every layout with every choice, every family, every errno and signal; hours
	$(COMPILE) && $(BIN)/python -m pytest -n 2 --dist load --durations=15 -m full

# ShellCheck's SC1091 and SC2329: slurm.sbatch reads a file that is not here, and has a function that a signal calls.
lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck --exclude=SC1091,SC2329 .ci/run launch/docker.sh launch/slurm.sbatch image/c++ image/dstrain-*

docs: $(READY)  ## the pages, and the table of DeepSpeed's keys, that are written by the code; then the site, in site/
	$(BIN)/python -m tools.deepspeed_keys.table > dstrain/config/deepspeed_keys.json
	$(BIN)/python -m tools.layouts_page > docs/layouts.md
	$(BIN)/python -m tools.models_page > docs/models.md
	$(BIN)/python -m tools.configuration_page > docs/configuration.md
	$(BIN)/python -m tools.modules_page > docs/modules.md
	$(BIN)/python -m tools.migration_page > docs/migration.md
	$(BIN)/python -m tools.deepspeed_keys_page > docs/deepspeed-keys.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lock: $(READY)  ## constraints.txt and requirements/; newer versions: UPGRADE="--upgrade-package NAME torch==VERSION"
	$(BIN)/python -m tools.lock $(UPGRADE)

audit: $(READY)  ## the versions of constraints.txt against known vulnerabilities; says so where there is no network
	$(BIN)/python -m tools.audit $(AUDIT)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site .mypy_cache .ruff_cache .pytest_cache

# torch alone: an index of torch's builds need not have the versions that the other packages are pinned to.
$(VENV)/.torch: constraints.txt
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10) and "dstrain needs Python 3.10 or newer, this is " + sys.version)'
	"$(PYTHON)" -m venv $(VENV)
	$(PIP) $(if $(TORCH_INDEX),--no-deps --index-url '$(TORCH_INDEX)') torch
	touch $@

$(READY): pyproject.toml $(VENV)/.torch
	$(PIP) -e '.[dev]'
	touch $@
