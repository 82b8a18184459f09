# `make help` lists the targets. Everything runs in .venv, which `make env` makes; nothing else is touched.

PYTHON ?= python3
VENV   ?= .venv
# More options for pip, for instance the address of PyTorch's CPU index:
#   make env PIP_ARGS="--extra-index-url ADDRESS"
PIP_ARGS ?=
# One thread a process: on few cores, threads of several processes slow each other down.
WORKERS  ?= 2
PYTEST_ARGS ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# veRL and TRL do not go together in one environment.
VERL_VENV  ?= .venv-verl
VERL_BIN   := $(VERL_VENV)/bin
VERL_STAMP := $(VERL_VENV)/.installed

export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1
export OPENBLAS_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false
# Nothing here needs a model hub; a slow network must not be able to change a result.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export MPLBACKEND := Agg
export NO_MKDOCS_2_WARNING := 1

.DEFAULT_GOAL := help
.PHONY: help env env-verl demo demo-reference demo-verl test test-verl test-verl-versions lint format typing unit bench bench-rivals docs wheel clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP)  ## make .venv with TRL and all that development needs

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 10) and f"{sys.executable} is Python {v[0]}.{v[1]}, and 3.10 or later is needed. Name another one: make env PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt --editable ".[trl,report,dev]"
	@touch $@

env-verl: $(VERL_STAMP)  ## make .venv-verl with veRL and what its tests and demo need

$(VERL_STAMP): pyproject.toml constraints-verl.txt
	$(PYTHON) -m venv $(VERL_VENV)
	$(VERL_BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints-verl.txt --editable ".[verl,verl-dev]"
	@touch $@

demo: env  ## train eight domains plain and guarded, then print the table and draw the figure
	$(BIN)/python -m benchmarks.demo

demo-verl: env-verl  ## the real veRL trainer on the CPU: two domains in turn, plain and guarded, then a table
	$(VERL_BIN)/python -m examples.verl.two_domains

test: lint test-verl unit  ## everything that must pass: lint, types, tests, doctests, README

lint: env typing  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# mypy sees the two source folders as the one package they are installed as.
typing:
	@rm -rf build/typing && mkdir -p build/typing/interference_guard
	@ln -s "$(CURDIR)"/src/interference_guard/* "$(CURDIR)/integrations" build/typing/interference_guard/

format: env  ## sort imports and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

unit: env  ## pytest alone; PYTEST_ARGS="-k name" chooses
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-verl: env-verl  ## the tests of veRL in their own environment
	$(VERL_BIN)/python -m pytest tests/verl $(PYTEST_ARGS)

# Beside what veRL 0.9 needs; a folder earlier on the path replaces veRL alone.
VERL_OLDER := 0.7.1 0.8.0
test-verl-versions: env-verl  ## the guard's engine in earlier releases of veRL
	@set -e; for version in $(VERL_OLDER); do \
	    folder="$(CURDIR)/build/verl-$$version"; \
	    test -d "$$folder" || $(VERL_BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) \
	        --no-deps --target "$$folder" "verl==$$version"; \
	    PYTHONPATH="$$folder" $(VERL_BIN)/python -m pytest tests/verl/test_engine.py tests/verl/test_saving.py $(PYTEST_ARGS); \
	done

demo-reference: env  ## an ability known from before training, plain and protected, one seed
	$(BIN)/python -m benchmarks.reference --seeds 0 --out demo

bench: env  ## most of the committed results again (hours); the pages name the command of each
	$(BIN)/python -m benchmarks.forgetting
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.recovery
	$(BIN)/python -m benchmarks.reference
	$(BIN)/python -m benchmarks.paper
	$(BIN)/python -m benchmarks.tooling
	$(BIN)/python -m benchmarks.precision

bench-rivals: env  ## the guard against other methods, its ablations, what is predicted (many hours; goes on where it stopped)
	$(BIN)/python -m benchmarks.rivals --bed digits
	$(BIN)/python -m benchmarks.rivals --bed gym
	$(BIN)/python -m benchmarks.rivals.cost
	$(BIN)/python -m benchmarks.rivals.figure
	$(BIN)/python -m benchmarks.ablations --bed digits
	$(BIN)/python -m benchmarks.prediction --bed digits
	$(BIN)/python -m benchmarks.width

docs: env  ## build the site into site/
	$(BIN)/mkdocs build --strict

wheel: env  ## build the source archive and the wheel into dist/
	$(BIN)/python -m build --outdir dist

clean:  ## remove what the targets above made, but not .venv
	rm -rf build dist site *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv*/*' -prune -exec rm -rf {} +

distclean: clean  ## and the environments too
	rm -rf $(VENV) $(VERL_VENV)
