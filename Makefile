# `make demo` shows the product at work. `make test` runs the tests. `make help` lists the rest.
# Each target installs what it needs into .venv, and installs again only if the packages changed.

PYTHON ?= python3
TESTERS ?= 4
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SERVING := $(VENV)/.installed-web
DEVELOPING := $(VENV)/.installed-dev
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt
PYTEST := $(BIN)/pytest --numprocesses $(TESTERS) --dist worksteal
WITH_COVERAGE := --cov --cov-report=term:skip-covered --cov-fail-under=90
CHECK_DATABASE := $(VENV)/check.db

KERNELS := .venv-kernels

.PHONY: help web demo test test-web test-kernels check install format lint migrations build soak \
	db-init db-migrate db-reset clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

web: $(SERVING) ## open http://127.0.0.1:8321: the page, with the untrained model (noise) as its worker
	DGX_MUSIC_MODEL=$${DGX_MUSIC_MODEL:-musicgen-tiny-untrained} $(BIN)/dgx-music web --with-worker

demo: $(INSTALLED) ## make the first audio: enqueue three prompts, run the real worker, check the files
	@$(BIN)/dgx-music demo

test: $(DEVELOPING) ## run the tests, on SQLite and on a PostgreSQL that is installed with them
	$(PYTEST) $(COVERAGE)

test-web: $(DEVELOPING) ## run the tests of the page in a real browser: Debian's Chromium
	@command -v chromium chromium-browser >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
		&& apt-get update -qq && apt-get install --yes --no-install-recommends chromium; } || true
	@command -v chromium chromium-browser >/dev/null || { printf '%s\n' \
		"THE PAGE IS NOT TESTED: Chromium is missing." "Install it as root: apt-get install chromium"; \
		test -z "$$CI"; exit $$?; }
	@if command -v chromium chromium-browser >/dev/null; then $(BIN)/pytest --numprocesses 2 -m browser tests/browser; fi

test-kernels: $(KERNELS)/.installed ## run the GPU's kernels in Triton's interpreter, on a CPU, and compile them for GPUs
	TRITON_INTERPRET=1 $(KERNELS)/bin/python -m pytest --numprocesses 2 \
		-W ignore::DeprecationWarning tests/inference/kernels
	$(KERNELS)/bin/python -m pytest --numprocesses 2 \
		-W ignore::DeprecationWarning tests/inference/kernels/test_compiled.py

check: COVERAGE := $(WITH_COVERAGE)
check: lint migrations test build ## run all that CI runs: the tests with coverage, 90 % at least

install: $(DEVELOPING) ## install what tests and checks need

format: $(DEVELOPING) ## format the code and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(DEVELOPING) ## check format, style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

migrations: $(DEVELOPING) ## migrate an empty database and compare it with the models
	rm -f $(CHECK_DATABASE)*
	DGX_MUSIC_DATABASE_URL=sqlite:///$(CHECK_DATABASE) $(BIN)/alembic upgrade head
	DGX_MUSIC_DATABASE_URL=sqlite:///$(CHECK_DATABASE) $(BIN)/alembic check

build: $(DEVELOPING) ## build sdist and wheel into dist/ and check their metadata
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*

soak: $(DEVELOPING) ## run the long tests: worker processes that are killed again and again
	$(BIN)/pytest -m "soak or any_driver" --both-drivers --timeout=900 -o faulthandler_timeout=1800

db-init: $(INSTALLED) ## create the database and its tables
	$(BIN)/dgx-music db init

db-migrate: $(INSTALLED) ## migrate the database to this version
	$(BIN)/dgx-music db migrate

db-reset: $(INSTALLED) ## delete all data; asks first
	$(BIN)/dgx-music db reset

clean: ## remove .venv, the demo's files and the built packages
	rm -rf $(VENV) $(KERNELS) demo dist

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "dgx-music needs Python 3.11 or newer. Name one: make PYTHON=python3.12 …"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): $(VENV)/bin/python pyproject.toml constraints.txt
	@test -e $@ || printf '%s\n' \
		"Installing dgx-music with torch and transformers into $(VENV), once. It takes some minutes" \
		"and about 1.4 GB of disk; several GB more if pip chooses a build of torch with CUDA."
	$(INSTALL) --editable '.[musicgen]'
	@touch $@

$(SERVING): $(INSTALLED)
	$(INSTALL) --editable '.[musicgen,web]'
	@touch $@

$(DEVELOPING): $(INSTALLED)
	@test -e $@ || echo "Installing the tools for development into $(VENV): about 0.3 GB more."
	$(INSTALL) --editable '.[musicgen,dev]'
	@touch $@

# Triton's interpreter does not work with numpy 2.4. All other packages are those of .venv.
$(KERNELS)/.installed: $(DEVELOPING)
	rm -rf $(KERNELS)
	$(BIN)/python -m venv $(KERNELS)
	$(KERNELS)/bin/python -m pip install --disable-pip-version-check --no-deps numpy==2.3.5 triton==3.6.0
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"), "$(CURDIR)/src", sep="\n")' \
		> "$$($(KERNELS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/project.pth"
	@touch $@
