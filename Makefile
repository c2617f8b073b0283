# Each target sets up what it needs; a second call reuses what is there.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PYTHONDONTWRITEBYTECODE :=

.DEFAULT_GOAL := help
.PHONY: help environment corpus open-sounds quickstart smoke ablation ablation-corpora ablation-smoke test test-all lint bench bench-bank bench-data bench-train requirements clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

environment: $(INSTALLED)  ## make .venv with the pinned packages

# Byte-compiled once here: otherwise every Ray worker compiles torch and deepspeed anew.
$(INSTALLED): requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9,<1"
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --compile-bytecode -r requirements.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

corpus: $(INSTALLED)  ## render the sampled scenes (pip alone)
	$(BIN)/ask-dist corpus build sampled-scenes

open-sounds: $(INSTALLED)  ## compose scenes of real recordings (needs apt-get, no root)
	$(BIN)/ask-dist corpus build open-sounds

quickstart: corpus  ## set up, train on the sampled scenes, print the table
	$(BIN)/ask-dist train configs/quickstart.yaml --resume

smoke: $(INSTALLED)  ## the quickstart in a small form, two minutes
	$(BIN)/ask-dist corpus build sampled-scenes shards/smoke --train 400 --validation 50 --test 100
	$(BIN)/ask-dist train configs/quickstart.yaml name=smoke --overwrite optimization.epochs=2 \
	  data.train=shards/smoke/train data.validation=shards/smoke/validation data.test=shards/smoke/test
	$(BIN)/ask-dist search runs/smoke "two loud piano notes" -k 3

ablation-corpora: $(INSTALLED)  ## the corpora of the ablation
	$(BIN)/ask-dist corpus build sampled-scenes shards/ablation --train 10000
	$(BIN)/ask-dist corpus build open-sounds
	$(BIN)/ask-dist corpus build open-sounds shards/open_sounds_wide --test 2400

ablation: ablation-corpora  ## every arm of configs/ablation.yaml, hours; goes on where it was interrupted
	$(BIN)/ask-dist ablate configs/ablation.yaml

ablation-smoke: $(INSTALLED)  ## every arm on a few scenes, three minutes
	$(BIN)/ask-dist corpus build sampled-scenes shards/smoke --train 400 --validation 50 --test 100
	$(BIN)/ask-dist ablate configs/ablation.yaml --smoke corpora.sampled_2500.shards=shards/smoke \
	  corpora.sampled_10000.shards=shards/smoke corpora.recordings.shards=shards/none corpora.recordings_wide.shards=shards/none

test: $(INSTALLED)  ## all tests but the slow ones, then the checks of style and types
	$(BIN)/python -m pytest -m "not slow"
	$(MAKE) lint

test-all: $(INSTALLED)  ## the slow tests too
	$(BIN)/python -m pytest

lint: $(INSTALLED)  ## ruff, and mypy on the modules without Ray
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: corpus  ## runs/bench/bench.json: trainer, loader, bank and knowledge step against their yardsticks
	$(BIN)/python -m ask_dist.bench

bench-bank: corpus open-sounds  ## runs/bench/bank.json: the bank and the refiner as a service, and the constants of `ask-dist plan`
	$(BIN)/python -m ask_dist.bench.service

bench-data: corpus  ## runs/bench/data.json: packing and reading against their yardsticks
	$(BIN)/python -m ask_dist.bench.data

bench-train: corpus open-sounds  ## runs/bench/train.json: whole runs by encoder, ZeRO stage, precision and chunk
	$(BIN)/python -m ask_dist.bench.train

requirements: $(INSTALLED)  ## pin requirements.txt anew from pyproject.toml
	$(BIN)/uv pip compile --quiet --no-header --no-emit-index-url --no-annotate --python-version 3.11 \
	  --extra corpora --extra pretrained --extra tensorboard --extra dev -o requirements.txt pyproject.toml

clean:  ## remove the environment, shards and runs
	rm -rf $(VENV) runs .cache
	find shards -mindepth 1 -maxdepth 1 ! -name README.md -exec rm -rf {} +
