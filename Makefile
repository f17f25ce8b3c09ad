.PHONY: demo test lint clean

VENV := .venv
PYTHON := $(VENV)/bin/python
# The first Python on the path that is 3.11 or 3.12.
SYSTEM_PYTHON := $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)

demo: $(VENV)/installed ## install, fetch the weights, open the app
	$(PYTHON) app.py

test: $(VENV)/installed-tests ## the same, then run every test
	$(PYTHON) -m bapo fetch --base smollm2-135m
	$(PYTHON) -m pytest

lint: $(VENV)/installed-tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV)

$(VENV)/installed: requirements.txt
	@test -n "$(SYSTEM_PYTHON)" || { echo "BAPO needs Python 3.11 or 3.12 (python3, python3.11 or python3.12)."; exit 1; }
	@echo "Installing into $(VENV): the first time takes some minutes."
	$(SYSTEM_PYTHON) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' requirements.txt)"
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-tests: $(VENV)/installed tests/requirements.txt
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt
	touch $@
