# make run: set everything up and run the default federation.   make test: set up and pass the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OUTDIR ?= results
NAME ?= bilingual
REAL ?= ../shared/data
COMPILE = $(BIN)/pip-compile --quiet --strip-extras --no-emit-index-url --no-emit-find-links \
  --no-emit-trusted-host
# Tests that share what a module sets up stay on one processor.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile
# What failed last is remembered apart from what `make test` remembers, which may run beside them.
ON_SCHEDULERS := --override-ini addopts=-ra -o cache_dir=$(VENV)/.pytest
JOB ?= workflows/numbers/job.yml
DATA ?= data

.PHONY: help setup run data compare experiment experiment-data test test-fast test-acceptance test-experiments test-schedulers test-faults lint types docs lock clean
help: ## show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(READY) ## make the virtual environment from the lock file
$(READY): requirements.lock torch.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than 3.11: make PYTHON=python3.12 …" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r torch.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

data: data/karolina/numbers/train.jsonl ## make the data of the default federation
data/karolina/numbers/train.jsonl: workflows/numbers/generate.py | $(READY)
	$(BIN)/python $< data

run: $(READY) data ## run the default federation; leaves model, history and report in results/
	@rm -rf $(OUTDIR)/global_model
	$(BIN)/streamflow run --quiet --outdir $(OUTDIR) streamflow.yml > /dev/null
	@echo "model    $(OUTDIR)/global_model"
	@echo "history  $(OUTDIR)/history.jsonl"
	@echo "scores   $(OUTDIR)/evaluation.json"
	@echo "report   $(OUTDIR)/report.html"

compare: $(READY) data ## federated, each facility alone, and pooled data: a table (JOB, DATA)
	$(BIN)/crossfl compare $(JOB) --data $(DATA) --outdir $(OUTDIR)/compare

experiment: experiment-data ## an experiment, small: federated, each site alone, pooled (NAME)
	CROSSFL_MODELS=data/models $(BIN)/crossfl compare workflows/experiments/$(NAME)/job.yml \
	  --data data/experiments/$(NAME) --outdir $(OUTDIR)/experiments/$(NAME)

experiment-data: $(READY) ## the data of an experiment, by facility, in data/experiments (NAME, REAL)
	workflows/experiments/prepare.sh "$(NAME)" "$(REAL)" $(BIN)/python

test: $(READY) ## lint, types and every test
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest $(PARALLEL) $(AGAIN)

test-fast: $(READY) ## the tests that take about a minute, to run after every change
	$(BIN)/python -m pytest -m fast $(PARALLEL) $(AGAIN)

test-acceptance: $(READY) ## the default federation for real, and what each facility learns alone
	$(BIN)/python -m pytest --override-ini addopts=-ra $(AGAIN) tests/acceptance/test_default_job.py

test-experiments: $(READY) ## each experiment through the engine, cut short; what federation is for
	$(BIN)/python -m pytest --override-ini addopts=-ra tests/acceptance/test_experiments.py

test-schedulers: $(READY) ## real sshd and Slurm on this machine, as root; see environments/testbed
	environments/testbed/install.sh
	$(BIN)/python -m pytest $(ON_SCHEDULERS) $(AGAIN) tests/schedulers

test-faults: $(READY) ## faults injected into real runs, as root, on the same testbed; FAULTS=full for more
	environments/testbed/install.sh
	$(BIN)/python -m pytest $(ON_SCHEDULERS) --timeout 420 $(AGAIN) tests/faults

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m crossfl.protocol.generate --check
	$(BIN)/sphinx-build -q -W --keep-going -b dummy -d $(VENV)/.docs docs $(VENV)/.docs

docs: $(READY) ## the documentation as a site, in docs/site
	$(BIN)/sphinx-build -q -W --keep-going -b html -d $(VENV)/.docs docs docs/site
	@echo "docs     docs/site/index.html"

types: $(READY) ## write what follows from the protocol: CWL records, docs/reference, JSON Schemas
	$(BIN)/python -m crossfl.protocol.generate

lock: $(READY) ## renew requirements.lock within the ranges of pyproject.toml, torch as in torch.lock
	sed -n 's/^\([^ #]*==[^ ]*\).*/\1/p' requirements.lock torch.lock > $(VENV)/pins.txt
	$(COMPILE) --no-header --all-extras --allow-unsafe --constraint torch.lock \
	  --output-file $(VENV)/pins.txt pyproject.toml
	sed -i 's/^\(torch==[0-9.]*\)+cpu$$/\1/' $(VENV)/pins.txt
	CUSTOM_COMPILE_COMMAND="make lock" $(COMPILE) --no-annotate --generate-hashes \
	  --unsafe-package torch --unsafe-package pip \
	  --output-file requirements.lock $(VENV)/pins.txt
	sed -i -e '/^$$/,$$d' -e '6a # Install it with --no-deps, and torch.lock after it.' \
	  requirements.lock

clean: ## remove what make made, but not results/
	rm -rf $(VENV) data
