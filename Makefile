# latentize: `make` lists the targets. Needs Python 3.11 or newer and a package index, nothing else.
#
#   PYTHON   interpreter that .venv is made with
#   OUT      where `make demo` writes
#   ARGS     passed on: make test ARGS="-k rope", make bench ARGS="--help"
#   JOBS     parallel test processes
#   ENGINE   which environment `make engines` makes: llama.cpp, transformers or vllm; all if not given
#   PIP_ARGS passed to pip install. On Linux the torch of PyPI brings CUDA along; for the small CPU build:
#            make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON   ?= python3
VENV     ?= .venv
OUT      ?= demo-out
ARGS     ?=
JOBS     ?= 2
PIP_ARGS ?=
ENGINE   ?=
RESULTS  ?=

BIN     := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt $(PIP_ARGS)
# Stamps: installed to run, installed to develop.
RUN     := $(VENV)/.stamp-run
DEV     := $(VENV)/.stamp-dev

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast check docs bench venv engines test-engines clean
.NOTPARALLEL:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(RUN) ## convert, check, heal and measure the bundled model; prints where the report is
	$(BIN)/latentize demo $(OUT)

# One thread each, or the processes fight over the cores.
test: $(DEV) ## all tests that need no GPU, engine or network
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

test-fast: $(DEV) ## the inner loop: tests of single modules that take no more than moments
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m 'not slow and not gpu and not engine and not network' tests/unit $(ARGS)

docs: $(DEV) ## the documentation as a site in build/docs; a broken link is an error
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs

# pyright runs on node. Without one on the machine it would fetch it from nodejs.org; the index has it too.
check: $(DEV) ## lint, formatting, types, import order
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@command -v node >/dev/null || $(INSTALL) 'pyright[nodejs]'
	$(BIN)/pyright
	$(BIN)/lint-imports

engines: ## environments with llama.cpp, transformers, vLLM in .engines: 20 minutes, 5 GB; ENGINE=vllm makes one
	PYTHON=$(PYTHON) PIP_ARGS='$(PIP_ARGS)' scripts/engines.sh $(ENGINE)

# One after the other: each engine takes the cores that there are. RESULTS keeps what was measured.
test-engines: $(DEV) engines ## the tests that need them; RESULTS=benchmarks/results/engines.json keeps the numbers
	LATENTIZE_ENGINE_RESULTS=$(RESULTS) $(BIN)/python -m pytest tests/engine -m 'engine or not engine' $(ARGS)

bench: $(RUN) ## compare the conversion methods on the bundled model
	$(BIN)/python benchmarks/methods.py $(ARGS)

venv: $(DEV) ## .venv with everything to develop

clean: ## remove what was built or cached (.venv stays)
	rm -rf build dist demo-out .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf

# Not bin/python: that exists even where making the environment failed half-way.
$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "latentize needs Python 3.11 or newer, $(PYTHON) is older or absent; try: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUN): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing latentize into $(VENV)"
	$(INSTALL) -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing latentize and its development tools into $(VENV)"
	$(INSTALL) -e '.[dev]'
	@touch $(RUN) $@
