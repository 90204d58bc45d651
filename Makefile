# make compare: the pocket comparison, from a fresh clone to the verdict.  make check, make test: what CI runs.
# PYTHON=/path/to/python3.12 chooses the interpreter that .venv is made from; PYTEST= are options of pytest, by default two processes.

SHELL := /bin/bash
.DEFAULT_GOAL := help
PYTHON ?=
PYTEST ?= -n 2
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help compare test check format interop clean

help:
	@echo "make compare   install into .venv if needed, run 'rog compare --seeds 3' on the pocket world, print the verdict"
	@echo "make test      install the test extra if needed, run the test suite"
	@echo "make check     formatting, lint, types, import layers"
	@echo "make format    let ruff format and fix the code"
	@echo "make interop   install the real clip-retrieval into .venv-interop if needed, test rog against it"
	@echo "make clean     remove .venv, .venv-interop and the tools' caches; results under runs/ stay"

compare: .venv/.installed
	$(BIN)/rog compare --seeds 3

test: .venv/.installed-test
	$(BIN)/python -m pytest $(PYTEST)

check: .venv/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.installed-test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

interop: .venv/.installed-test .venv-interop/.installed
	$(BIN)/python -m pytest -m interop tests/interop

clean:
	rm -rf .venv .venv-interop .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@for candidate in $(if $(PYTHON),"$(PYTHON)",python3.12 python3.11 python3); do \
	    if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
	        echo "making .venv with $$candidate ($$("$$candidate" --version))"; \
	        "$$candidate" -m venv .venv && exit 0 || exit 2; \
	    fi; \
	done; \
	echo "no Python 3.11 or 3.12 with its venv module found$(if $(PYTHON), at $(PYTHON)) (python3 here: $$(python3 --version 2>&1));" \
	     "install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2

# The test install holds the plain one, so it leaves both stamps.
.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the pinned set of constraints.txt into .venv (about 3 minutes, 8 GB)"
	$(INSTALL) -e .
	@touch $@

.venv/.installed-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing the pinned set of constraints.txt and the test tools into .venv (about 3 minutes, 8 GB)"
	$(INSTALL) -e '.[test]'
	@touch .venv/.installed $@

# clip-retrieval and rog exclude each other's libraries, so it has an environment of its own.
.venv-interop/.installed: tests/interop/constraints.txt | $(BIN)/python
	@echo "installing clip-retrieval into .venv-interop (about 3 minutes, 7 GB)"
	$(BIN)/python -m venv .venv-interop
	.venv-interop/bin/python -m pip install --quiet --disable-pip-version-check -c $< clip-retrieval setuptools
	@touch $@
