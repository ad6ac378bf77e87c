# `make demo` and `make test` need Python >= 3.11 and nothing else: each makes its own environment.
PYTHON ?= python3
VENVS ?= .
DEMO := $(VENVS)/.venv-demo
TEST := $(VENVS)/.venv-test

.PHONY: help demo test lint bench soak fleet repeat schedules mutants clean

help:
	@echo "make demo   a voice bot's turn with and without prefetching, side by side"
	@echo "make test   linters, type checks and all tests"
	@echo "make bench  the benchmark table"
	@echo "make soak   ten minutes of traffic, failures and a Redis that comes and goes"
	@echo "make fleet  failovers of a real cluster and of Sentinel under traffic: some minutes"
	@echo "make repeat all tests twenty times on a loaded machine, threads switching all the time"
	@echo "make schedules  the core's threads in every order with up to two switches: some minutes"
	@echo "make mutants  change the core line by line; do the tests notice?"
	@echo "make clean  remove the environments"

demo: $(DEMO)/installed
	$(DEMO)/bin/python -m examples.voice_bot $(ARGS)

test: lint
	$(TEST)/bin/python -m pytest $(ARGS)

lint: $(TEST)/installed
	$(TEST)/bin/ruff check .
	$(TEST)/bin/ruff format --check .
	$(TEST)/bin/mypy

bench: $(TEST)/installed
	$(TEST)/bin/python -m benchmarks --json out/benchmarks.json --picture docs/benchmarks.png $(ARGS)

soak: $(TEST)/installed
	$(TEST)/bin/python -m tests.tools.soak --seconds 600 $(ARGS)

fleet: $(TEST)/installed
	$(TEST)/bin/python -m tests.tools.fleet $(ARGS)

repeat: $(TEST)/installed
	$(TEST)/bin/python -m tests.tools.repeated $(ARGS)

schedules: $(TEST)/installed
	SCHEDULES_DEEP=1 $(TEST)/bin/python -m pytest -s --timeout 1200 tests/flights/test_schedules.py $(ARGS)

mutants: $(TEST)/installed
	$(TEST)/bin/pip install --quiet --disable-pip-version-check --editable '.[mutation]'
	$(TEST)/bin/python -m tests.tools.mutants $(ARGS)

$(DEMO)/installed: pyproject.toml
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/pip install --quiet --disable-pip-version-check --editable '.[examples]'
	@touch $@

$(TEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(TEST)
	$(TEST)/bin/pip install --quiet --disable-pip-version-check --editable '.[lint]'
	@touch $@

clean:
	rm -rf $(DEMO) $(TEST)
