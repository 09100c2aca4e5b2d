# `make demo` shows the product at work, `make test` proves it. Both install what they need into .venv, and only what changed.

PYTHON ?= python3
TESTERS ?= 4
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEVELOPING := $(VENV)/.installed-dev

.PHONY: demo test check soak db-init db-migrate db-reset clean

demo: $(INSTALLED) ## first audio: migrate, enqueue, run the real worker, verify, show
	$(BIN)/dgx-music demo

test: $(DEVELOPING) ## run the tests, on SQLite and on a PostgreSQL that comes with them
	$(BIN)/pytest --numprocesses $(TESTERS) --dist worksteal

check: $(DEVELOPING) ## everything: format, lint, types, migrations, tests with coverage
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	DGX_MUSIC_DATABASE_URL=sqlite:///$(VENV)/check.db $(BIN)/alembic upgrade head
	DGX_MUSIC_DATABASE_URL=sqlite:///$(VENV)/check.db $(BIN)/alembic check
	$(BIN)/pytest --numprocesses $(TESTERS) --dist worksteal --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

soak: $(DEVELOPING) ## the long fault runs
	$(BIN)/pytest -m "soak or any_driver" --both-drivers --timeout=900

db-init: $(INSTALLED) ## create the database and its tables
	$(BIN)/dgx-music db init

db-migrate: $(INSTALLED) ## bring the tables to this version
	$(BIN)/dgx-music db migrate

db-reset: $(INSTALLED) ## drop all data; asks first
	$(BIN)/dgx-music db reset

clean: ## remove the environment and what the demo left
	rm -rf $(VENV) demo

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "dgx-music needs Python 3.11 or newer; say which with: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[musicgen]'
	@touch $@

$(DEVELOPING): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[musicgen,dev]'
	@touch $@
