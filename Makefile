# SPDX-License-Identifier: Apache-2.0
# What there is to do: `make help`.

NODES ?= 3
GATEWAYS ?= 1
UNIT ?= tests/unit
SHELL := /bin/bash
export PATH := $(CURDIR)/.venv/bin:$(PATH)

PLAYBOOKS = site.yml $(wildcard playbooks/*.yml)

# $(call step,name,command): run it, and say how long it took.
step = @echo "==> $(1)"; begin=$$SECONDS; $(2) && echo "    $(1): $$((SECONDS - begin)) s"

.DEFAULT_GOAL := help
.PHONY: help demo test check lint lint-ansible lint-python unit integration release-test fleet-test fleet-test-all lab-up lab-down lab-status bench clean
# Ansible and the lab use both processors by themselves, and steps print as they go.
.NOTPARALLEL:

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## A serving fleet on this machine, and an answer from it
	@./bootstrap lab
	$(call step,lab,python -m lab up --nodes $(NODES))
	$(call step,site.yml,ansible-playbook -i inventory/lab site.yml)
	@python -m lab.demo

test: ## Linters, unit tests, tests with real programs, the release tests and the fleet test
	@./bootstrap test
	$(call step,check,$(MAKE) --no-print-directory check)
	$(call step,integration,$(MAKE) --no-print-directory integration)
	$(call step,release-test,$(MAKE) --no-print-directory release-test)
	$(call step,fleet-test,$(MAKE) --no-print-directory fleet-test)

# Unit tests that run beside the rest, after the linters, so that two processors end together.
BESIDE = tests/unit/release tests/unit/lab

check: ## Linters and unit tests, on two processors: what to run before each commit
	@$(MAKE) --no-print-directory lint unit UNIT="$(BESIDE)" >.check.log 2>&1 & beside=$$!; \
	$(MAKE) --no-print-directory unit UNIT="tests/unit $(BESIDE:%=--ignore=%)"; unit=$$?; \
	wait $$beside; status=$$?; cat .check.log; rm -f .check.log; \
	[ $$status -eq 0 ] && [ $$unit -eq 0 ]

lint: lint-python lint-ansible ## Linters, type checks and the contracts between packages

lint-python:
	$(call step,ruff check,ruff check .)
	$(call step,ruff format,ruff format --check .)
	$(call step,imports,PYTHONPATH=module_utils lint-imports --no-logo)
	$(call step,shape,python -m pytest tests/unit/test_shape.py)
	$(call step,mypy,mypy)

# A play with every role: `ansible-playbook` reads it from a pipe.
ROLES = <(printf '[{hosts: localhost, roles: [%s]}]' "$$(ls roles | paste -sd,)")

lint-ansible:
	$(call step,yamllint,yamllint --strict .)
	$(call step,syntax check,ansible-playbook -i inventory/example --syntax-check $(PLAYBOOKS) $(ROLES) >/dev/null)
	$(call step,ansible-lint,PATH="$(CURDIR)/.ci/lint:$$PATH" ansible-lint --profile production --offline --strict)

unit: ## Unit tests: no network, no root, no program but git
	@python -m pytest $(UNIT) --ignore tests/unit/test_shape.py

integration: ## Our code with HAProxy, a browser, promtool, libtorrent and systemd's own checks
	@python -m pytest tests/integration

release-test: ## The compiler on vLLM's real releases, from the package index
	@python -m pytest tests/release --capture=no

fleet-test: ## The real playbooks against the lab fleet, as root, but for what takes long
	@python -m pytest tests/fleet -m "not long" --verbose --capture=no --exitfirst

fleet-test-all: ## The same with everything that can break in an upgrade: two hours on 2 cores
	@python -m pytest tests/fleet --verbose --capture=no --exitfirst

lab-up: ## Start the lab fleet: make lab-up NODES=3 GATEWAYS=1
	@./bootstrap lab
	@python -m lab up --nodes $(NODES) --gateways $(GATEWAYS)

lab-down: ## Take the lab fleet down, with everything it made but its cache
	@python -m lab down

lab-status: ## Show the lab's hosts and upstreams
	@python -m lab status

bench: ## Run tests/bench and write reports/bench.json
	@./bootstrap test
	@python -m pytest tests/bench

clean: ## Remove what was generated here, but not .venv and not the lab
	rm -rf build reports .mypy_cache .pytest_cache .ruff_cache .hypothesis
