# Trimtab's one door. `make` alone lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help

TRIMTAB_CACHE ?= $(HOME)/.cache/trimtab
export TRIMTAB_CACHE
export UV_CACHE_DIR ?= $(TRIMTAB_CACHE)/uv
# The engines of many libraries ask a hub for news; nothing here needs one.
export HF_HUB_OFFLINE ?= 1

UV_VERSION := 0.13.9
UV := $(TRIMTAB_CACHE)/uv-$(UV_VERSION)/bin/uv

# The development environment is keyed by what it holds, outside the tree.
VENV := $(TRIMTAB_CACHE)/venv-$(shell sha256sum < locks/dev.txt | cut -c1-12)
PYTHON := $(VENV)/bin/python
export PYTHONPATH := core:operator:trainer_image:server_image:.
PYTEST := $(PYTHON) -m pytest
LAB := python3 -m lab

.PHONY: help
help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(UV):
	@echo "uv $(UV_VERSION) → $(dir $@)"
	@python3 -m venv $(TRIMTAB_CACHE)/uv-$(UV_VERSION)
	@$(TRIMTAB_CACHE)/uv-$(UV_VERSION)/bin/pip install -q --disable-pip-version-check uv==$(UV_VERSION)

$(VENV)/.complete: | $(UV)
	@echo "development environment → $(VENV) (about a minute, five with cold caches)"
	@rm -rf $(VENV) && $(UV) venv -q -p 3.11 $(VENV)
	@$(UV) pip sync -q -p $(PYTHON) --require-hashes locks/dev.txt
	@touch $@

.PHONY: venv
venv: $(VENV)/.complete ## Make the development environment

# ---------------------------------------------------------------- the cluster

.PHONY: cluster cluster-env cluster-down images
cluster: ## Start the local cluster (or check the one that KUBECONFIG names)
	@$(LAB) up

cluster-env: ## Print the exports that reach the cluster
	@$(LAB) env

cluster-down: ## Stop the local cluster; nothing of it stays but the caches
	@$(LAB) down

images: ## Build and push the three images; print their references
	@$(LAB) images

.PHONY: install uninstall
install: venv ## Install the chart into the cluster with Helm
	@$(PYTHON) -m demo.install

uninstall: venv ## Remove the chart from the cluster
	@$(PYTHON) -m demo.install --remove

.PHONY: demo
demo: venv ## The main job, from nothing: YAML, tuned, merged, answering
	@$(PYTHON) -m demo

# ---------------------------------------------------------------- checks and tests

.PHONY: check format generate
check: venv ## Format, lint, types, import contracts, generated files, chart
	@$(PYTHON) -m ruff format --check -q .
	@$(PYTHON) -m ruff check -q .
	@$(VENV)/bin/lint-imports --config .importlinter | tail -n 3
	@$(PYTHON) -m mypy core operator/trimtab_operator trainer_image/trimtab_trainer server_image/trimtab_server lab demo
	@$(PYTHON) -m trimtab_operator.crdgen --check
	@$(PYTHON) -m tests.matrix --check
	@$(LAB) helm lint --quiet helm/trimtab

format: venv ## Format the code
	@$(PYTHON) -m ruff format -q .
	@$(PYTHON) -m ruff check -q --fix .

generate: venv ## Write crds/, the chart's copy and the reference from the models
	@$(PYTHON) -m trimtab_operator.crdgen
	@$(PYTHON) -m tests.matrix

.PHONY: test test-unit test-golden test-api test-e2e
test: ## Every tier, from nothing
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory test-unit
	@$(MAKE) --no-print-directory test-api
	@$(MAKE) --no-print-directory test-e2e

# The files are shared out over the cores, which several ranks then share: a hang is known later than when one file runs
# alone. Tiny tensors gain nothing from threads. Each process keeps about 2 GiB.
test-unit: venv ## Pure code, stores and trainers on this computer; golden files
	@OMP_NUM_THREADS=1 $(PYTEST) -n logical --maxprocesses 4 --dist loadfile -o timeout=300 tests/unit tests/golden

test-api: venv ## The operator against a real API server
	@$(LAB) build control-plane
	@$(PYTEST) tests/api

test-e2e: venv ## The whole line on a real node
	@$(PYTEST) tests/e2e

.PHONY: bench
bench: venv ## Speed, side by side with what others do
	@$(PYTHON) -m bench

# On a machine with GPUs that holds torch already, PYTHON=python3 takes its own.
.PHONY: test-gpu bench-gpu
test-gpu: ## What only a GPU can show; without one all is skipped
	@$(PYTEST) tests/gpu

bench-gpu: ## Tokens/s, MFU and memory on one GPU (ROWS="--tiny" runs without one)
	@$(PYTHON) -m bench.gpu $(ROWS)

# ---------------------------------------------------------------- versions

FLAGS := --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
	--no-emit-index-url --no-annotate --no-header --generate-hashes
COMPILE := $(UV) pip compile pyproject.toml $(FLAGS)

.PHONY: lock
lock: | $(UV) ## Compile locks/ from pyproject.toml
	@$(COMPILE) --extra store --extra operator --extra trainer --extra server --group dev \
		--override locks/dev-overrides.txt -o locks/dev.txt
	@$(COMPILE) --extra operator -o locks/operator.txt
	@$(COMPILE) --extra trainer -o locks/trainer.txt
	@$(COMPILE) --extra engine -o locks/server-vllm.txt
	@$(COMPILE) --extra engine-cpu --override locks/cpu-overrides.txt -o locks/server-vllm-cpu.txt
	@echo torch | $(UV) pip compile - $(FLAGS) --constraint locks/trainer.txt -o locks/torch.txt
	@$(UV) pip compile --group image $(FLAGS) -o locks/image.txt
