# Two commands matter: `make run` and `make test`. Each sets up .venv from nothing.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
APP ?= demo_app
# Real processes wait as much as they compute: three tests at a time keep two cores busy.
JOBS ?= 3
SHELL := /bin/bash
.DEFAULT_GOAL := help

.PHONY: help run test lint types layers unit state integration lowest test-slow consistency bench bench-quick setup setup-test clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

run: setup  ## the demo on http://127.0.0.1:8000 (APP=your_module:app for your own)
	@exec $(BIN)/sharedcluster run $(APP)

test: setup-test lint types layers  ## lint, types, layers and every test but the slow ones
	@# What fails beside others is asked again alone, and has to pass then. Both outcomes stay on the screen.
	$(BIN)/python -m pytest tests -m "not slow and not alone" --numprocesses=$(JOBS) --dist=worksteal || \
		$(BIN)/python -m pytest tests -m "not slow and not alone" --last-failed --last-failed-no-failures=none
	$(BIN)/python -m pytest tests -m alone
	$(BIN)/python tests/gevent_pytest.py tests/state -m "not slow"

lint: setup-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup-test
	$(BIN)/mypy

layers: setup-test
	$(BIN)/lint-imports

unit: setup-test  ## the pure parts only
	$(BIN)/python -m pytest tests/unit

state: setup-test  ## the shared state against a real Redis, plain and under gevent
	$(BIN)/python -m pytest tests/state
	$(BIN)/python tests/gevent_pytest.py tests/state

integration: setup-test  ## real clusters
	$(BIN)/python -m pytest tests/integration -m "not alone" --numprocesses=$(JOBS) --dist=worksteal
	$(BIN)/python -m pytest tests/integration -m alone

test-slow: setup-test  ## storms, fuzzing, soak
	$(BIN)/python -m pytest tests/slow -m slow

lowest: .venv-lowest/.stamp  ## the pure parts and the state with the oldest releases that pyproject.toml allows
	.venv-lowest/bin/python -m pytest tests/unit tests/state -m "not slow and not alone" --numprocesses=$(JOBS) --dist=worksteal

consistency: setup-test  ## 200,000 operations on a cluster under faults, checked against the guarantees; one minute to ten
	$(BIN)/python -m tests.slow.consistency

bench:  ## the whole comparison with other servers; about twenty minutes
	$(PYTHON) -m benchmarks install
	.bench/venv/bin/python -m benchmarks run

bench-quick:  ## only the rows that have a bar; under three minutes, once the other servers are installed
	$(PYTHON) -m benchmarks install
	.bench/venv/bin/python -m benchmarks run --quick

setup: .venv/.run-stamp
setup-test: .venv/.test-stamp

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed; none was found on PATH." >&2; exit 2; }
	$(PYTHON) -m venv .venv

.venv/.run-stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.venv/.test-stamp: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@ .venv/.run-stamp

.venv-lowest/.stamp: pyproject.toml scripts/lowest-releases
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info >= (3, 14))' || { echo "make lowest needs Python 3.11 to 3.13, for which there are wheels of gevent 24.11: PYTHON=python3.13" >&2; exit 2; }
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) scripts/lowest-releases > .venv-lowest/releases.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check --constraint .venv-lowest/releases.txt --editable '.[all,test]'
	@touch $@

clean:
	rm -rf .venv .venv-lowest .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
