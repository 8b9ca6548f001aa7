# The two commands: `make quickstart` and `make test`. Both set up .venv first, where it is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: quickstart test clean-venv

quickstart: $(VENV)/ready
	$(BIN)/python scripts/sweep.py quickstart $(ARGS)

test: $(VENV)/ready-dev
	$(BIN)/python -m pytest

$(VENV)/ready: requirements.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nanoPE needs Python 3.11 or newer: make PYTHON=python3.12 …")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/ready-dev: requirements-dev.txt $(VENV)/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean-venv:
	rm -rf $(VENV)
