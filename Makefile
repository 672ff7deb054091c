# The whole lab in two commands: `make lab` and `make test`. `make` alone lists the rest.
# `make lab TORCH=cpu` installs PyTorch without its CUDA libraries: 2 GB of disk in place of 6.

PYTHON ?= python3
RUN := .venv/bin/python
# On a terminal pip shows what it fetches; into a file it would write a line for each package.
PIP := $(RUN) -m pip install --disable-pip-version-check $(shell [ -t 2 ] || echo --quiet)
ROOMS := $(wildcard lab04/*.py lab04/*/*.py lab04/*/*.cpp)
WEIGHTS := $(wildcard lora-news/adapter/*.json lora-news/adapter/*.safetensors) lora-news/headlines/train.csv lora-news/headlines/test.csv
BERT_BASE := quantised-model-bert-base

.DEFAULT_GOAL := help
unexport PYTHONSAFEPATH # under it `python -m benchmark` is not found
.PHONY: help lab test bench bench-bert-base bench-peers bench-steps bench-families bench-file elsewhere examples pictures readme train clean
.NOTPARALLEL:
.DELETE_ON_ERROR:

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 26

lab: quantised-model-torch/manifest.json quantised-model-optimum/manifest.json quantised-model-tensorrt/manifest.json ## quantise three ways, compare on three headlines
	@$(RUN) predict.py
	@echo "Wrote quantised-model-torch/ quantised-model-optimum/ quantised-model-tensorrt/ confidence_*.png, all in this folder"

test: .venv/installed-tests ## lint, types and tests
	$(RUN) -m pip check
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest -n 2 --dist worksteal # neither process idles while the other has tests left

bench: lab .venv/installed-bench ## measure quality and speed into results/, about ten minutes on a quiet machine
	$(RUN) -m benchmark

bench-peers: lab .venv/installed-bench .venv/installed-peers ## the same beside what one would otherwise use
	$(RUN) -m benchmark --peers --tag peers

bench-bert-base: .venv/installed-bench ## size and speed of the original lab's BERT-base, with random weights
	$(RUN) -m benchmark.studies.bert_base models/bert-base
	$(RUN) lab04-torch.py --model models/bert-base --output $(BERT_BASE)-torch
	$(RUN) lab04-optimum.py --model models/bert-base --output $(BERT_BASE)-optimum
	$(RUN) lab04-nvidia.py --model models/bert-base --output $(BERT_BASE)-tensorrt || [ $$? -eq 3 ]
	$(RUN) -m benchmark --model models/bert-base --random-weights --tag bert-base \
		--artefacts $(BERT_BASE)-torch $(BERT_BASE)-optimum $(BERT_BASE)-tensorrt

bench-steps: .venv/installed-bench ## what each step of the INT8 preparation, and each idea of the engine, is worth
	$(RUN) -m benchmark.studies.steps
	$(RUN) -m benchmark.studies.ideas

bench-families: .venv/installed-bench ## which families of networks the INT8 labs serve, how fast and how faithfully
	$(RUN) -m benchmark.studies.families

elsewhere: lab .venv/installed-tests ## the ONNX artefact in C#, Node, the browser, old and emulated runtimes: 2 GB into .elsewhere/
	$(RUN) -m benchmark.studies.elsewhere
	$(RUN) -m pytest -rs tests/test_elsewhere.py

examples: lab .venv/installed-bench ## what the README shows of single headlines, half a minute
	$(RUN) -m benchmark.studies.single_headlines

pictures: .venv/installed-bench ## draw the pictures of docs/int8.md from our own weights
	$(RUN) -m benchmark.studies.pictures

bench-file: lab .venv/installed-bench ## a million headlines through predict.py --csv, on one core and on all: half an hour
	$(RUN) -m benchmark.studies.million

readme: .venv/installed ## write the figures of README.md and docs/ from results/
	$(RUN) -m benchmark --readme

train: .venv/installed-train ## train the adapter anew, with AG News from the hub
	$(RUN) lora-news/train.py

clean: ## remove what `make lab` wrote, but for the environment
	rm -rf quantised-model-*/ confidence_*.png models/

quantised-model-torch/manifest.json: lab04-torch.py $(ROOMS) $(WEIGHTS) .venv/installed
	$(RUN) lab04-torch.py

quantised-model-optimum/manifest.json: lab04-optimum.py $(ROOMS) $(WEIGHTS) .venv/installed
	$(RUN) lab04-optimum.py

# Exit code 3 says that there is no TensorRT engine on this machine: a row with its reason, not a failure.
quantised-model-tensorrt/manifest.json: lab04-nvidia.py $(ROOMS) $(WEIGHTS) .venv/installed
	$(RUN) lab04-nvidia.py || [ $$? -eq 3 ]

.venv/installed: requirements.txt
	@echo "Installing requirements.txt into .venv (about $(if $(TORCH),2,6) GB, some minutes)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "the lab needs Python 3.11 or newer: make PYTHON=python3.11 lab")'
	@$(PYTHON) -m venv .venv || { echo "Python cannot make environments here; on Debian or Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	$(if $(TORCH),$(PIP) --index-url https://download.pytorch.org/whl/$(TORCH) $$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt))
	$(PIP) -r requirements.txt
	@touch $@

.venv/installed-%: .venv/installed requirements/%.txt
	$(PIP) -r requirements.txt -r requirements/$*.txt
	@touch $@

.venv/installed-tests: .venv/installed requirements/test.txt requirements/bench.txt requirements/train.txt
	$(PIP) -r requirements.txt -r requirements/bench.txt -r requirements/train.txt -r requirements/test.txt
	@touch $@
