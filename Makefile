# `make demo` and `make test` need Python >= 3.11 and nothing else: each makes its own environment.
PYTHON ?= python3
VENVS ?= .
DEMO := $(VENVS)/.venv-demo
TEST := $(VENVS)/.venv-test

PLACES := $(VENVS)/.venv-places
RUNTIMES := $(VENVS)/.venv-runtimes
DOCS := $(VENVS)/.venv-docs

.PHONY: help demo test docs lint lowest versions runtimes places bench soak fleet repeat deep schedules mutants clean

help:
	@echo "make demo   a voice bot's turn with and without prefetching, side by side"
	@echo "make test   linters, type checks and all tests"
	@echo "make docs   the site with its reference, built strictly and looked at in Chromium: out/site"
	@echo "make lowest the library's tests with the oldest dependencies that it supports"
	@echo "make versions  the same, and with each Python that this machine has"
	@echo "make runtimes  Gunicorn, Celery and Streamlit, started for real"
	@echo "make places the stores and frameworks where a prefetch is found, and their table"
	@echo "make bench  the benchmark table"
	@echo "make soak   ten minutes of traffic, failures and a Redis that comes and goes"
	@echo "make fleet  failovers of a real cluster and of Sentinel under traffic: some minutes"
	@echo "make repeat all tests twenty times on a loaded machine, threads switching all the time"
	@echo "make deep   interrupts and re-enters the core at every step, in all its ways: some minutes"
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

docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict
	EXTRAS_REQUIRED=1 $(DOCS)/bin/python -m pytest tests/site $(ARGS)

lowest: $(TEST)/installed
	$(TEST)/bin/pip install --quiet --disable-pip-version-check --editable '.[versions]'
	$(TEST)/bin/python -m tests.tools.versions --only lowest $(ARGS)

versions: $(TEST)/installed
	$(TEST)/bin/pip install --quiet --disable-pip-version-check --editable '.[versions]'
	$(TEST)/bin/python -m tests.tools.versions $(ARGS)

runtimes: $(RUNTIMES)/installed
	EXTRAS_REQUIRED=1 $(RUNTIMES)/bin/python -m pytest tests/runtimes $(ARGS)

places: $(PLACES)/installed
	EXTRAS_REQUIRED=1 $(PLACES)/bin/python -m pytest tests/places $(ARGS)
	$(PLACES)/bin/python -m tests.places

bench: $(TEST)/installed
	$(TEST)/bin/python -m benchmarks --json out/benchmarks.json --picture docs/benchmarks.png $(ARGS)

soak: $(TEST)/installed
	$(TEST)/bin/python -m tests.tools.soak --seconds 600 $(ARGS)

fleet: $(TEST)/installed
	$(TEST)/bin/python -m tests.tools.fleet $(ARGS)

repeat: $(TEST)/installed
	$(TEST)/bin/python -m tests.tools.repeated $(ARGS)

deep: $(TEST)/installed
	DEEP=1 STATE_MACHINE_EXAMPLES=2000 $(TEST)/bin/python -m pytest --timeout 1200 tests/flights/test_interrupted.py tests/flights/test_reentrant.py tests/flights/test_state_machine.py $(ARGS)

schedules: $(TEST)/installed
	DEEP=1 $(TEST)/bin/python -m pytest -s --timeout 3600 tests/flights/test_schedules.py $(ARGS)

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

$(RUNTIMES)/installed: pyproject.toml
	$(PYTHON) -m venv $(RUNTIMES)
	$(RUNTIMES)/bin/pip install --quiet --disable-pip-version-check --editable '.[runtimes]'
	@touch $@

$(PLACES)/installed: pyproject.toml
	$(PYTHON) -m venv $(PLACES)
	$(PLACES)/bin/pip install --quiet --disable-pip-version-check --editable '.[places]'
	@touch $@

$(DOCS)/installed: pyproject.toml
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

clean:
	rm -rf $(DEMO) $(TEST) $(RUNTIMES) $(PLACES) $(DOCS)
