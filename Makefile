# The commands of everyday: setup, demo, test, lint, types, clean.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# A machine with GPUs may want another build, e.g. `make setup TORCH=torch`.
TORCH ?= torch==2.13.0
# Files of tests that run at a time. Many start up to four ranks of their own.
JOBS ?= 2
ARGS ?=

BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint types clean

# Everything that the other targets need; does nothing while pyproject.toml is unchanged.
setup: $(STAMP)

# torch comes first so that the chosen build stays; DeepSpeed is installed without compiling its
# extensions, which it builds when they are used.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -e '.[test,dev]'
	touch $(STAMP)

# Prepares text, trains, grows, trains from scratch for comparison, and prints what came out.
demo: setup
	PATH="$(BIN):$$PATH" bash launchers/demo.sh

# ARGS go to pytest: make test ARGS='-k growth'
test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: setup
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
