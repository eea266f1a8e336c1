# `make quick`: environment, rendering, then the whole pipeline at small sizes, a look in five minutes. `make repro`: the real
#   sizes. `make test`: the same set-up, then the tests
#   (`make test-all`: also the slow ones: killed stages, the comparison, a real robot's recordings).
#   PYTHON=python3.12     another interpreter (3.11 or 3.12)
#   PIP_ARGS="..."        more arguments for pip, e.g. --extra-index-url https://download.pytorch.org/whl/cpu
#   DVC_ARGS="..."        more arguments for dvc repro, e.g. --pull --allow-missing; PYTEST_ARGS for pytest; COMPARE_ARGS
#                         for `make compare`, e.g. --only 'vpp-*' (first: python -m svam.experiments plan); PLAN=FILE for another

SHELL := /bin/bash
VENV := .venv
# The first interpreter that is 3.11 or 3.12; when there is none, the check below says so.
PYTHON ?= $(or $(shell for p in python3 python3.11 python3.12; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' >/dev/null 2>&1 && echo $$p && break; done),python3)
PIP_ARGS ?=
DVC_ARGS ?=
PYTEST_ARGS ?=
# Test files that run at the same time (tests/conftest.py says which begin first).
JOBS ?= 2
COMPARE_ARGS ?=
PLAN ?= svam/experiments/plan.yaml

export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
unexport PYTHONHOME

.PHONY: help setup quick repro status test test-all lint lock table compare clean
help:
	@sed -n '1,7s/^# *//p' $(firstword $(MAKEFILE_LIST)); echo "Targets: setup quick repro status test test-all lint lock table compare clean"

setup: $(VENV)/.installed $(VENV)/.renders

repro: setup
	python -m stages.check_params
	dvc repro $(DVC_ARGS)

# A look, not a result: what differs from params.yaml are `-S` arguments of an experiment, which DVC runs beside the workspace.
quick: setup
	@git config user.email >/dev/null && git config user.name >/dev/null || { \
		echo "DVC keeps the run as a commit, which needs a name: git config user.name NAME; git config user.email ADDRESS" >&2; exit 1; }
	dvc exp remove --quiet quick 2>/dev/null || true
	arguments="$$(python -m svam.presets args quick)" && eval "dvc exp run --temp --name quick $$arguments"
	rm -rf .cache/quick && mkdir -p .cache/quick
	run="$$(git for-each-ref --format='%(refname)' --count 1 'refs/exps/*/*/quick')" && \
		git archive "$$run" data/report data/foresight | tar -x -C .cache/quick --strip-components 1 && \
		dvc get --quiet . data/films --rev "$$run" --out .cache/quick/films
	@echo "A look, not a result: .cache/quick/report/index.html, with tables in report/results.md and foresight/foresight.md"

test: setup
	python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m 'not slow' $(PYTEST_ARGS)

# Also the tests marked `slow`.
test-all: setup
	python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(VENV)/.installed
	ruff check .
	ruff format --check .
	mypy

# What would run, before anything does: first the digests of the code, which show what an edit changes.
status: $(VENV)/.installed
	dvc repro --quiet code
	dvc status

# Does dvc.lock belong to the code and params that are here?
lock: $(VENV)/.installed
	@python .ci/lock_belongs.py

# Results and the params that differ. Results are the columns without a dot; they stay also where all rows agree.
table: $(VENV)/.installed
	@COLUMNS=$${COLUMNS:-240} dvc exp show --no-pager --only-changed --drop '^(data|svam|stages)/.*|Created' \
		--keep '^(?!(seed|threads|rev|typ|parent)$$)[a-z_]+$$'

# Variants at equal budget: experiments that are not finished yet, then the paired table.
compare: setup
	python -m svam.experiments run --plan $(PLAN) $(COMPARE_ARGS)
	python -m svam.experiments table --plan $(PLAN)

# The environment only; DVC's outputs and cache stay.
clean:
	rm -rf $(VENV) *.egg-info

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null || { \
		echo "Python 3.11 or 3.12 is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 | head -n 1); name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "'$(PYTHON)' cannot make virtual environments; on Debian or Ubuntu run: sudo apt-get install python3-venv" >&2; exit 1; }
	[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

# Without a stamp when nothing renders: the next call tries again.
$(VENV)/.renders: $(VENV)/.installed
	@.ci/opengl.sh $(VENV)/bin/python && touch $@ || true
