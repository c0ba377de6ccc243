# `make help` lists the targets. Variables: PYTHON (the interpreter for the virtual environment), CONFIG (a
# configuration file), DATA (a conversation for the demo), PIP_ARGS (further options of pip install), BOOT_DIR (where
# install-boot writes instead of systemd's folder).
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SERVICE := $(VENV)/.service-installed
DEVELOPMENT := $(VENV)/.development-installed
PIP_INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check --no-input $(PIP_ARGS)
FUZZ_REQUESTS ?= 100000

ifdef CONFIG
export MEMORY_CONFIG := $(CONFIG)
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help start-pc2 stop-pc2 status logs tail-errors demo test lint type coverage fuzz bench install-boot uninstall-boot clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

start-pc2: $(SERVICE) ## Install what is missing, start all programs, wait until they are healthy (CONFIG=file)
	@$(PY) scripts/pc2.py start

stop-pc2: ## Stop all programs
	@if [ -e $(SERVICE) ]; then $(PY) scripts/pc2.py stop; else echo "not running"; fi

status: ## Show every program and agent: address, state, pid, uptime, since when and why
	@if [ -e $(SERVICE) ]; then $(PY) scripts/pc2.py status; else echo "not installed"; exit 3; fi

logs: $(SERVICE) ## Follow the log files
	@$(PY) scripts/pc2.py logs

tail-errors: $(SERVICE) ## Follow the errors of all programs (ARGS="--severity error --since 2h")
	@$(PY) scripts/tail_error_bus.py $(ARGS)

demo: $(SERVICE) ## Store a long conversation and ask about it (DATA=file)
	@$(PY) examples/demo.py $(if $(DATA),"$(DATA)")

test: lint type ## Lint, types and all tests
	@$(PY) -m pytest

lint: $(DEVELOPMENT) ## Check style and format
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

type: $(DEVELOPMENT) ## Check types
	@$(PY) -m mypy

coverage: $(DEVELOPMENT) ## Run the tests and report the branches they take
	@$(PY) -m pytest --cov --cov-report=term

fuzz: $(DEVELOPMENT) ## Send mutated requests to a running service (FUZZ_REQUESTS=n)
	@FUZZ_REQUESTS=$(FUZZ_REQUESTS) $(PY) -m pytest --timeout=3600 tests/acceptance/test_fuzz.py

bench: $(SERVICE) ## Measure round trips and throughput
	@$(PY) bench/run.py

install-boot: $(SERVICE) ## Have systemd start all programs at boot, with the CONFIG and MEMORY_* of now
	@$(PY) scripts/boot.py install $(if $(BOOT_DIR),--dir "$(BOOT_DIR)")

uninstall-boot: $(SERVICE) ## Undo install-boot; what runs goes on
	@$(PY) scripts/boot.py uninstall $(if $(BOOT_DIR),--dir "$(BOOT_DIR)")

clean: stop-pc2 ## Stop the programs; remove the virtual environment and caches, never data/
	@rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov build dist *.egg-info
	@find . -name __pycache__ -type d -not -path './data/*' -prune -exec rm -rf {} +

# The stamps are younger than the requirements they were made from, so an unchanged checkout installs nothing.
$(SERVICE): requirements.txt
	@sh scripts/prerequisites.sh "$(PYTHON)"
	@echo "creating $(VENV) with $(PYTHON)"
	@"$(PYTHON)" -m venv $(VENV)
	@echo "installing requirements.txt (the first time this takes minutes: PyTorch is large)"
	@$(PIP_INSTALL) -r requirements.txt
	@touch $@

$(DEVELOPMENT): requirements-dev.txt $(SERVICE)
	@echo "installing requirements-dev.txt"
	@$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@
