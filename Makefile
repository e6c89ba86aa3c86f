# The two commands of a newcomer: make demo, make test. Each sets up .venv first, once.
PYTHON ?= python3
export PYTHON

.PHONY: demo test notebooks lint docs setup clean

demo: .venv/ready
	.venv/bin/python train_net.py --config-file configs/demo.yaml --resume

test: .venv/ready
	.venv/bin/python -m pytest

notebooks: .venv/ready
	.venv/bin/python tools/run_notebooks.py

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# API pages from the docstrings: outputs/docs/index.html.
docs: .venv/ready
	.venv/bin/pdoc --docformat google --math --output-directory outputs/docs fishertune_d2 \
	  $(addprefix fishertune_d2.,config fisher export plan train bench analysis doctor)

setup: .venv/ready

.venv/ready: requirements.txt setup.py tools/setup_venv.sh tools/install_detectron2.py
	tools/setup_venv.sh

clean:
	rm -rf .venv outputs
