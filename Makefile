# Everyday commands: setup, demo, test, lint, types, clean.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# A machine with GPUs may need another build, e.g. `make setup TORCH=torch`.
TORCH ?= torch==2.13.0
# Test files that run in parallel. Many of them start up to four ranks.
JOBS ?= 2
ARGS ?=

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint types clean

# Create the environment of the other targets; does nothing while its two inputs are unchanged.
setup: $(STAMP)

# TORCH selects the build of torch, and a CUDA build requires its own triton. So neither is
# constrained; triton is pinned where torch does not install it. DeepSpeed is installed without
# compiling its extensions, which it builds on first use.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	grep -vE '^(torch|triton)==' constraints.txt > $(VENV)/constraints.txt
	$(PIP) $(TORCH)
	$(BIN)/python -m pip show -q triton 2> /dev/null || $(PIP) $$(grep '^triton==' constraints.txt)
	DS_BUILD_OPS=0 $(PIP) -e '.[test,dev]'
	touch $(STAMP)

# Prepare text, train and grow a model, train the same model from scratch, and compare both.
demo: setup
	PATH="$(BIN):$$PATH" bash launchers/demo.sh

# ARGS are passed to pytest: make test ARGS='-k growth'
test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell

types: setup
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
