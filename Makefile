# make demo: see it learn. make test: the fast suite. Each target sets up what it needs first.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# a worker a core, one thread each; a file's tests stay together
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

.PHONY: help setup demo test test-all lint types docs clean

help:
	@echo "make demo      set up, train janus_tiny by its own certainty and by the judge, compare (minutes, no GPU)"
	@echo "make test      set up, run the fast tests"
	@echo "make test-all  the slow ones too"
	@echo "make lint      ruff: its rules, and its format"
	@echo "make types     mypy, on the folders that pyproject.toml names"
	@echo "make docs      write docs/architecture.md anew from the modules' first lines"
	@echo "make clean     remove the virtual environment and caches; outputs/ stays"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed; make $(MAKECMDGOALS) PYTHON=python3.12, say" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/python run.py -m reward=nsc,oracle

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# made beside its target and moved there: a module that cannot be read leaves the page as it was
docs: $(READY)
	$(BIN)/python -m tests.support.architecture > docs/architecture.md.part
	mv docs/architecture.md.part docs/architecture.md

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
