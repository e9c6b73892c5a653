# make install | demo | test | slow | lint | types | benchmarks
SHELL := /bin/bash
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.flpriv-installed

.PHONY: install demo test slow lint types benchmarks

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@for python in python3.11 python3.12 python3.13 python3; do \
		$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	done || { echo "flpriv needs Python 3.11 or newer" >&2; exit 1; }; \
	test -x $(BIN)/python || $$python -m venv $(VENV)
	@echo "Installing flpriv and what it needs into $(VENV) (minutes, once)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install
	@$(BIN)/flpriv run

test: install
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

slow: install
	@OMP_NUM_THREADS=1 $(BIN)/pytest -m "slow and not gpu"

lint: install
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: install
	@$(BIN)/mypy flpriv tests $(wildcard examples/*.py)

benchmarks: install
	@for file in $(filter-out tests/benchmarks/test_%,$(wildcard tests/benchmarks/*.py)); do OMP_NUM_THREADS=1 $(BIN)/python $$file || exit; done
