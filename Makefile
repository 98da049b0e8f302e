# `make help` lists the targets. Everything is installed into .venv; nothing outside this folder is touched.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CONFIG ?=
DATA ?=
SET ?=
PORT ?= 8080
CLUSTER ?=
PIPELINE ?=
RELEASE ?=
CANARY ?=
SERVING ?=
WATCH_MINUTES ?=
WATCH_REQUESTS ?=
RUN_ARGUMENTS = $(if $(CONFIG),--config '$(CONFIG)') $(if $(DATA),--data '$(DATA)') $(foreach s,$(SET),--set '$(s)')
RELEASE_ARGUMENTS = $(if $(RELEASE),--release '$(RELEASE)') $(if $(CANARY),--canary '$(CANARY)') \
  $(if $(SERVING),--serving '$(SERVING)') $(if $(WATCH_MINUTES),--watch-minutes '$(WATCH_MINUTES)') \
  $(if $(WATCH_REQUESTS),--watch-requests '$(WATCH_REQUESTS)')
CLUSTER_ARGUMENTS = $(RUN_ARGUMENTS) $(if $(CLUSTER),--cluster '$(CLUSTER)') $(if $(PIPELINE),--pipeline '$(PIPELINE)') \
  $(RELEASE_ARGUMENTS)

.DEFAULT_GOAL := help
.PHONY: help setup pipeline-run pipeline-compile pipeline-submit pipeline-upload pipeline-schedule pipeline-runs release \
  serve images images-test images-pin test test-unit test-integration test-e2e bench lint chart-lint chart-readme \
  format constraints clean

help: ## list the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  %-18s %s\n", $$1, $$2}'

setup: $(VENV)/.stamp-run ## install what the pipeline needs into .venv

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v < (3, 14) else \
	  f"Python 3.10 to 3.13 is needed, {sys.executable} is {v.major}.{v.minor}; try make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-run: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV) (once; PyTorch is large)"
	$(INSTALL) --editable '.[pipeline,train]'
	@touch $@

$(VENV)/.stamp-serve: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), with what serves (once)"
	$(INSTALL) --editable '.[pipeline,train,predictor,gateway]'
	@touch $@ $(VENV)/.stamp-run

$(VENV)/.stamp-dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing into $(VENV), with the tools for tests (once)"
	$(INSTALL) --editable '.[pipeline,train,distributed,predictor,gateway,dev]'
	@touch $@ $(VENV)/.stamp-run $(VENV)/.stamp-serve

pipeline-run: $(VENV)/.stamp-run ## run the pipeline here: [CONFIG=run.yaml] [DATA=folder or s3://…] [SET="field=value …"]
	@$(BIN)/python -m pipelines.run $(RUN_ARGUMENTS)

pipeline-compile: $(VENV)/.stamp-run ## compile for Kubeflow: [CONFIG=run.yaml] [CLUSTER=cluster.yaml] [PIPELINE=release] [OUT=…]
	@$(BIN)/python -m pipelines.compile $(CLUSTER_ARGUMENTS) $(if $(OUT),--out '$(OUT)')

pipeline-submit: $(VENV)/.stamp-run ## start a run on Kubeflow: [CONFIG=run.yaml] [CLUSTER=cluster.yaml] [WAIT=1] [PIPELINE=release CANARY=10 SERVING=namespace]
	@$(BIN)/python -m pipelines.kubeflow submit $(CLUSTER_ARGUMENTS) $(if $(WAIT),--wait)

pipeline-upload: $(VENV)/.stamp-run ## make a version of the pipeline on Kubeflow, if it changed
	@$(BIN)/python -m pipelines.kubeflow upload $(CLUSTER_ARGUMENTS)

pipeline-schedule: $(VENV)/.stamp-run ## run it again and again: CRON="0 0 2 * * *" (six fields, UTC) [CONFIG=…] [CLUSTER=…]
	@$(BIN)/python -m pipelines.kubeflow schedule $(CLUSTER_ARGUMENTS) --cron '$(CRON)'

pipeline-runs: $(VENV)/.stamp-run ## the last runs and the schedules on Kubeflow
	@$(BIN)/python -m pipelines.kubeflow runs

release: $(VENV)/.stamp-run ## let champion name an approved release: TRUSTED=reviewer.pub [RELEASE=candidate]
	@$(BIN)/python -m pipelines.release $(if $(RELEASE),--release '$(RELEASE)') $(if $(TRUSTED),--trusted $(TRUSTED))

serve: $(VENV)/.stamp-serve ## serve the approved release with its page: [CANDIDATE=1] [RELEASE=…] [TRUSTED=…] [PORT=8080]
	@$(BIN)/python -m serving.local --port $(PORT) $(if $(CANDIDATE),--candidate) $(if $(RELEASE),--release '$(RELEASE)') \
	  $(if $(TRUSTED),--trusted $(TRUSTED))

images: | $(BIN)/python ## build the images with docker, podman or buildah: [NAMES=gateway] [VARIANT=gpu] [RELEASE=1]
	@$(BIN)/python -m images.build $(NAMES) $(if $(VARIANT),--variant '$(VARIANT)') $(if $(RELEASE),--release)

images-test: $(VENV)/.stamp-dev ## build the images on a stand-in base and run each read-only (root, Debian)
	@$(BIN)/python -m images.check

images-pin: | $(BIN)/python ## write the bases' digests into images/bases.env, from their registry
	@$(BIN)/python -m images.bases

test: $(VENV)/.stamp-dev ## run all tests
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-unit: $(VENV)/.stamp-dev ## run the fast tests, which need no server
	@$(BIN)/python -m pytest -n 2 --dist loadfile tests/unit

test-integration: $(VENV)/.stamp-dev ## run the tests against real servers
	@$(BIN)/python -m pytest tests/integration

test-e2e: $(VENV)/.stamp-dev ## run the pipeline's tests
	@$(BIN)/python -m pytest tests/e2e

bench: $(VENV)/.stamp-dev ## measure a claim of speed against its peers: NAME=train
	@$(BIN)/python -m benchmarks.$(NAME) $(ARGUMENTS)

lint: $(VENV)/.stamp-dev ## ruff (lint and format) and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

chart-lint: $(VENV)/.stamp-dev ## lint the chart with each of its values files: helm, yamllint, checkov
	@test -x .venv-lint/bin/checkov || { $(PYTHON) -m venv .venv-lint && .venv-lint/bin/pip install --quiet checkov yamllint; }
	@PATH="$(CURDIR)/.venv-lint/bin:$$PATH" $(BIN)/python charts/lint.py

chart-readme: $(VENV)/.stamp-dev ## write the chart's README from its values
	@$(BIN)/python charts/readme.py

format: $(VENV)/.stamp-dev ## let ruff format and mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

constraints: $(VENV)/.stamp-dev ## write constraints.txt from the versions installed in .venv, with every extra
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[gateway,predictor,pipeline,train,distributed,dev]'
	@$(BIN)/python .ci/constraints.py > constraints.tmp && mv constraints.tmp constraints.txt

clean: ## remove the workspace of finished steps and caches; runs/ and the store stay
	rm -rf .medforge/workspace .pytest_cache .mypy_cache .ruff_cache build dist
