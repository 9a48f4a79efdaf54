# Every target works alone from a fresh clone. Another interpreter: make demo PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-all style wheel clean

help:  ## show these lines
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

demo: .venv/base  ## teach the pocket model a dog (minutes, CPU, no network after the install); ends with the run folder
	@$(BIN)/dreambooth

test: .venv/dev  ## all tests, offline
	$(BIN)/python -m pytest

test-fast: .venv/dev  ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow and not exhaustive"

test-all: .venv/dev  ## every test, also those that take minutes or a machine's own services
	$(BIN)/python -m pytest -m ""

style: .venv/dev  ## lint, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: .venv/dev  ## dist/dreambooth-*.whl, with conf/ and the pocket weights inside
	@$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	@rm -rf build dreambooth.egg-info
	@ls dist/*.whl

clean:  ## remove .venv, dist and caches; outputs/ stays
	rm -rf .venv dist build *.egg-info .pytest_cache .ruff_cache .mypy_cache

.venv/base: setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/dev: .venv/base
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,slurm,test]"
	@touch $@
