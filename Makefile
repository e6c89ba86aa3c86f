# A newcomer's two commands are make demo and make test. Every target sets up .venv first, once.
PYTHON ?= python3
export PYTHON
# Waiting threads sleep instead of spinning. A training step of the demo took 6 s instead of 50 s on
# two cores that other programs used too (load 11), and 1.4 s with and without it on idle cores.
export OMP_WAIT_POLICY ?= PASSIVE

# The tests of `make check`: the method, the config, the documents and one training.
FAST_TESTS := tests/fisher tests/evaluation tests/tuning/test_masked_update.py \
  tests/tuning/test_selected_weights.py tests/test_architecture.py tests/test_config.py \
  tests/test_config_slips.py tests/test_links.py tests/test_old_names.py \
  tests/engine/test_trainer.py::test_three_stages_write_what_they_promise

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types notebooks docs setup clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: .venv/ready  ## train FisherTune on the built-in street scenes and score it (8 minutes)
	.venv/bin/python train_net.py --config-file configs/demo.yaml --resume

# Two processes with a thread each use two cores better than one process with two threads.
test: .venv/ready  ## run all tests
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile

check: lint types  ## lint, types and the fast tests (at most 90 seconds)
	.venv/bin/python -m pytest -q $(FAST_TESTS)

lint: .venv/ready  ## check style, docstrings and format (ruff)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: .venv/ready  ## check the package's types (mypy)
	.venv/bin/mypy

notebooks: .venv/ready  ## execute the notebooks and write their outputs
	.venv/bin/python tools/run_notebooks.py

docs: .venv/ready  ## write API pages from the docstrings to outputs/docs/index.html
	.venv/bin/pdoc --docformat google --math --output-directory outputs/docs fishertune_d2 \
	  $(addprefix fishertune_d2.,config fisher export plan train bench analysis doctor)

setup: .venv/ready  ## set up .venv only

clean:  ## delete .venv and outputs
	rm -rf .venv outputs

.venv/ready: requirements.txt pyproject.toml setup.py tools/setup_venv.sh tools/install_detectron2.py
	tools/setup_venv.sh
