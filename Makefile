# The two commands are `make demo` and `make test`; each sets up what it needs, from pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test test-slow lint clean

setup: $(VENV)/.installed  ## .venv with millstream in it

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + ": make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed tests/requirements-s3.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r tests/requirements-s3.txt
	@touch $@

demo: setup  ## digits, end to end, with a report page
	$(BIN)/millstream demo

test: $(VENV)/.installed-test  ## what must hold, in minutes
	$(BIN)/python -m pytest -q

test-slow: $(VENV)/.installed-test  ## kill matrices and long races
	$(BIN)/python -m pytest -q -m slow

lint: $(VENV)/.installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) millstream-demo *.egg-info .pytest_cache .ruff_cache .hypothesis
