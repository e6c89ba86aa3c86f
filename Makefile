# The two commands of a newcomer: make demo, make test. Each sets up .venv first, once.
PYTHON ?= python3
export PYTHON

.PHONY: demo test lint setup clean

demo: .venv/ready
	.venv/bin/python train_net.py --config-file configs/demo.yaml

test: .venv/ready
	.venv/bin/python -m pytest

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

setup: .venv/ready

.venv/ready: requirements.txt setup.py tools/setup_venv.sh tools/install_detectron2.py
	tools/setup_venv.sh

clean:
	rm -rf .venv outputs
