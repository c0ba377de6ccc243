# `make help` lists the targets. Variables: PYTHON (the interpreter for the virtual environment), CONFIG (a
# configuration file), DATA (conversations for the demo and the benchmarks), PIP_ARGS (further options of pip install),
# BOOT_DIR (where install-boot writes instead of systemd's folder), FROM and TO (files of restore, export and imports),
# JOB, DRY_RUN and AS_OF (of run-job), AGENT, ROLE, NAMESPACES, ACT_FOR, REVOKE and LIST (of keys), MINUTES, SEED and
# ONLY (of torture), FUZZ_REQUESTS (of fuzz), SIZES and RUN (of benchmarks), ARGS (further arguments of a script).
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
SERVICE := $(VENV)/.service-installed
DEVELOPMENT := $(VENV)/.development-installed
CHARTS := $(VENV)/.charts-installed
BENCH := data/bench
PIP_INSTALL = $(PY) -m pip install --quiet --disable-pip-version-check --no-input $(PIP_ARGS)
FUZZ_REQUESTS ?= 100000

ifdef CONFIG
export MEMORY_CONFIG := $(CONFIG)
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help start-pc2 stop-pc2 status logs tail-errors jobs run-job keys backup restore accept-store export import import-facts import-sessions demo test lint type coverage fuzz torture bench bench-due bench-maintenance bench-consolidation bench-embedding bench-retrieval bench-scale bench-growth bench-conditions bench-stages bench-peers bench-check bench-publish bench-charts bench-report install-boot uninstall-boot clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-19s %s\n", $$1, $$2 }' Makefile

start-pc2: $(SERVICE) ## Install what is missing, start all programs, wait until they are healthy (CONFIG=file)
	@$(PY) scripts/pc2.py start

stop-pc2: ## Stop all programs
	@if [ -e $(SERVICE) ]; then $(PY) scripts/pc2.py stop; else echo "not running"; fi

status: ## Show every program and agent: address, state, pid, uptime, since when and why
	@if [ -e $(SERVICE) ]; then $(PY) scripts/pc2.py status; else echo "not installed"; exit 3; fi

logs: $(SERVICE) ## Follow the log files
	@$(PY) scripts/pc2.py logs || test $$? -eq 141 # its reader has gone, as in make logs | head

tail-errors: $(SERVICE) ## Follow the errors of all programs (ARGS="--severity error --since 2h")
	@$(PY) scripts/tail_error_bus.py $(ARGS)

jobs: $(SERVICE) ## Show the maintenance jobs: when each runs next, and how its last run went
	@$(PY) scripts/jobs.py list

run-job: $(SERVICE) ## Run a job now (JOB=consolidation; DRY_RUN=1 shows what it would change; AS_OF=time)
	@$(PY) scripts/jobs.py run "$(JOB)" $(if $(filter-out 0 no false,$(DRY_RUN)),--dry-run) $(if $(AS_OF),--as-of "$(AS_OF)")

keys: $(SERVICE) ## Make the keys of the programs, or one more (AGENT=name ROLE=writer NAMESPACES=home,work; REVOKE=name; LIST=1)
	@$(PY) scripts/keys.py $(if $(AGENT),--agent "$(AGENT)") $(if $(ROLE),--role "$(ROLE)") $(if $(NAMESPACES),--namespaces "$(NAMESPACES)") $(if $(ACT_FOR),--act-for "$(ACT_FOR)") $(if $(REVOKE),--revoke "$(REVOKE)") $(if $(LIST),--list)

backup: $(SERVICE) ## Copy the store to backup.dir, while the service runs or not (DRY_RUN=1 shows what it would do)
	@$(PY) scripts/backup.py $(if $(filter-out 0 no false,$(DRY_RUN)),--dry-run)

restore: $(SERVICE) ## Put a backup in the place of the store, while the service is stopped (FROM=file or latest)
	@$(PY) scripts/restore.py $(if $(FROM),"$(FROM)")

accept-store: $(SERVICE) ## Accept a store that lacks acknowledged writes, while the service is stopped
	@$(PY) scripts/accept_store.py

export: $(SERVICE) ## Write all memories to a file of JSON lines (TO=file; ARGS="--namespace name --vectors")
	@$(PY) scripts/export_memories.py "$(TO)" $(ARGS)

import: $(SERVICE) ## Put the memories of an exported file into the store (FROM=file; ARGS="--overwrite --dry-run")
	@$(PY) scripts/import_memories.py "$(FROM)" $(ARGS)

import-facts: $(SERVICE) ## Put an older knowledge base into the new one (FROM=SQLite or JSONL file; ARGS="--dry-run")
	@$(PY) scripts/import_facts.py $(if $(FROM),"$(FROM)") $(ARGS)

import-sessions: $(SERVICE) ## Put conversations into the session memory (FROM=JSON or JSONL file; ARGS="--user-id ada")
	@$(PY) scripts/import_sessions.py $(if $(FROM),"$(FROM)") $(ARGS)

demo: $(SERVICE) ## Store a long conversation and ask about it (DATA=file)
	@MEMORY_KEY_FILE="$${MEMORY_KEY_FILE:-$(wildcard data/keys/operator.key)}" $(PY) examples/demo.py $(if $(DATA),"$(DATA)")

test: lint type ## Lint, types and all tests; a few that fail beside others run once more alone
	@$(PY) -m pytest -n 4 --dist loadfile --no-loadscope-reorder || { test $$? -eq 1 && \
		echo "these once more, with nothing beside them:" && \
		$(PY) -m pytest --last-failed --last-failed-no-failures none; }

lint: $(DEVELOPMENT) ## Check style, format, and that what is installed is what is pinned
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) scripts/check_pins.py

type: $(DEVELOPMENT) ## Check types
	@$(PY) -m mypy

coverage: $(DEVELOPMENT) ## Run the tests and report the branches they take
	@$(PY) -m pytest --cov --cov-report=term

fuzz: $(DEVELOPMENT) ## Send mutated requests to a running service (FUZZ_REQUESTS=n)
	@FUZZ_REQUESTS=$(FUZZ_REQUESTS) $(PY) -m pytest --timeout=3600 tests/acceptance/test_fuzz.py

torture: $(DEVELOPMENT) ## Run the long fault tests and show a table (MINUTES=5 SEED=n ONLY=part of a title)
	@$(PY) -m tests.torture --minutes $(or $(MINUTES),5) $(if $(SEED),--seed $(SEED)) $(if $(ONLY),--only "$(ONLY)")

bench: $(SERVICE) ## Measure round trips and throughput
	@mkdir -p $(BENCH)
	@$(PY) bench/run.py --json $(BENCH)/service.json $(ARGS)

bench-check: $(SERVICE) ## Measure, and compare with the published ratios (RUN=file: compare that, measure nothing)
	@$(if $(RUN),,$(MAKE) --no-print-directory bench)
	@$(PY) bench/check.py "$(or $(RUN),$(BENCH)/service.json)"

bench-publish: $(SERVICE) ## Make the ratios of the last runs the published ones
	@$(PY) bench/check.py --publish $(wildcard $(BENCH)/service.json $(BENCH)/peers.json)

bench-peers: $(SERVICE) ## Measure the service beside mem0, Chroma and LanceDB (DATA=file; PIP_ARGS; ARGS="--repeats 1")
	@$(PY) bench/peers.py $(if $(DATA),"$(DATA)") --json $(BENCH)/peers.json $(ARGS)

bench-stages: $(SERVICE) ## Take the time of a request apart
	@mkdir -p $(BENCH)
	@$(PY) bench/stages.py --json $(BENCH)/stages.json $(ARGS)

bench-conditions: $(SERVICE) ## Measure requests beside embedding, the start, and the client
	@mkdir -p $(BENCH)
	@$(PY) bench/conditions.py --json $(BENCH)/conditions.json $(ARGS)

bench-growth: $(SERVICE) ## Measure requests in stores of 1,000 to 100,000 memories (DATA=file; SIZES=1000,1000000)
	@mkdir -p $(BENCH)
	@$(PY) bench/growth.py $(if $(DATA),"$(DATA)") $(if $(SIZES),--sizes $(SIZES)) --json $(BENCH)/growth.json $(ARGS)

bench-charts: $(CHARTS) ## Draw the last runs into docs/img
	@$(PY) bench/charts.py $(wildcard $(foreach kind,service peers growth stages,$(BENCH)/$(kind).json))

bench-report: ## Run bench, -stages, -conditions, -growth and -peers one after the other, and draw them (about an hour)
	@$(MAKE) --no-print-directory bench ARGS=--markdown
	@$(MAKE) --no-print-directory bench-stages
	@$(MAKE) --no-print-directory bench-conditions
	@$(MAKE) --no-print-directory bench-growth
	@$(MAKE) --no-print-directory bench-peers ARGS=--markdown
	@$(MAKE) --no-print-directory bench-charts

bench-due: $(SERVICE) ## Time a decay run over 10,000 to 1,000,000 memories with 1,000 due
	@$(PY) bench/due.py

bench-maintenance: $(SERVICE) ## Measure reads and adds while maintenance runs, and without it
	@$(PY) bench/maintenance.py

bench-consolidation: $(SERVICE) ## Measure what consolidation costs in recall (DATA=file)
	@$(PY) bench/consolidation.py $(if $(DATA),"$(DATA)")

bench-embedding: $(SERVICE) ## Measure the embedding worker beside plain sentence-transformers (DATA=file)
	@$(PY) bench/embedding.py $(if $(DATA),"$(DATA)")

bench-retrieval: $(SERVICE) ## Measure what the searches find of long conversations (DATA=file)
	@$(PY) bench/retrieval.py $(if $(DATA),"$(DATA)")

bench-scale: $(SERVICE) ## Measure searches among 1,000 to 1,000,000 synthetic memories (DATA=file; SIZES=1000,10000)
	@$(PY) bench/scale.py $(if $(DATA),"$(DATA)") $(if $(SIZES),--sizes $(SIZES))

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

$(CHARTS): requirements-bench.txt $(SERVICE)
	@echo "installing requirements-bench.txt"
	@$(PIP_INSTALL) -r requirements-bench.txt
	@touch $@

$(DEVELOPMENT): requirements-dev.txt $(SERVICE)
	@echo "installing requirements-dev.txt"
	@$(PIP_INSTALL) -r requirements-dev.txt
	@touch $@
