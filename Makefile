# Two commands for a fresh machine: `make run` and `make test`. PYTHON chooses the interpreter (3.10 to 3.13).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Test processes at once; one that has nothing left takes tests from the others.
JOBS ?= 2
# What the sample task of `make run` does, in its workspace.
WORK ?= git init -q . && echo hi > a && git add a && git status --short

.PHONY: run test soak lint bench clean

run: $(VENV)/.dev
	$(BIN)/python -m oz_worker dev -- '$(WORK)'

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal $(ARGS)

soak: $(VENV)/.test
	$(BIN)/python -m pytest -q -m soak $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(VENV)/.bench
	$(BIN)/python scripts/bench.py $(ARGS)

# One stamp for each extra that is installed; anew when the metadata changed.
$(VENV)/.%: setup.cfg pyproject.toml oz_worker/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "make: $(PYTHON) is older than 3.10; choose another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || \
	  { echo "make: $(PYTHON) cannot make a virtual environment; on Debian install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@

clean:
	rm -rf .venv .venv-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
