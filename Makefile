# make quickstart   set everything up in .venv, then run the main job: rooms, shards, training, squads, report
# make test         set up what the tests need, then run all of them but the next
# make test-faults  runs that are killed, stopped, starved and resumed elsewhere: about eight minutes on two busy cores
# make bench        set up the other libraries, then measure speed and memory beside them: bench.json
# make lint         formatting, lint and types
# TORCH_INDEX=URL   take torch from this index, e.g. PyTorch's index of CPU wheels on a machine without a GPU

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Several processes (those of faults mostly wait); see tests/conftest.py for who runs what.
PYTEST := $(BIN)/python -m pytest --no-loadscope-reorder
PYTEST_ARGS ?=
BENCH_ARGS ?=

.PHONY: help install quickstart test test-faults bench lint format clean

help:
	@sed -n 's/^# \(make.*\)/\1/p' Makefile

quickstart: $(VENV)/.installed
	$(BIN)/modsquad quickstart

test: $(VENV)/.installed-dev
	$(PYTEST) --numprocesses 2 $(PYTEST_ARGS)

test-faults: $(VENV)/.installed-dev
	$(PYTEST) --numprocesses 3 -m faults $(PYTEST_ARGS)

bench: $(VENV)/.installed-bench
	$(BIN)/modsquad bench $(BENCH_ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(VENV)/.installed

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(VENV)/.installed: pyproject.toml constraints.txt $(VENV)/.torch
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP_INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed
	$(PIP_INSTALL) --editable '.[bench]'
	@touch $@

# Without a GPU the CPU build (a tenth of the size) is taken wherever a package source offers it.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11: set PYTHON=/path/to/python3.11"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ echo "error: no virtual environment could be made: apt-get install python3-venv"; exit 2; }
	@echo "Installing torch $(TORCH) and the other pinned dependencies into $(VENV)"
ifdef TORCH_INDEX
	$(PIP_INSTALL) --index-url $(TORCH_INDEX) torch==$(TORCH)
else
	@if ! command -v nvidia-smi >/dev/null && $(PIP_INSTALL) 'torch==$(TORCH)+cpu' 2>/dev/null; then :; \
		else $(PIP_INSTALL) torch==$(TORCH); fi
endif
	@touch $@
