# `make bench` and `make test` are the two commands of the README. Each makes .venv when missing.
PYTHON ?= python3
BIN := .venv/bin
STORE ?= results-store

.PHONY: bench bench-all smoke test lint phantom-pictures clean

# The stamp is renewed when the dependencies change.
.venv/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

bench: .venv/.installed
	$(BIN)/ssl3d bench --preset quick --methods scratch,gvsl --tasks shc,sac,ccc,sbm --store $(STORE)

smoke: .venv/.installed
	$(BIN)/ssl3d bench --preset smoke --methods scratch,gvsl --tasks shc,sac,ccc,sbm --store $(STORE)/smoke

test: .venv/.installed lint
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
