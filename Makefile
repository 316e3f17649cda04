# make test   install into .venv and run the tests
# make demo   install, train the toy world's policy by GRPO, compare it with its base on L1, L2 and L3
# make clean  remove what these two have made, but not .venv

PYTHON ?= python3
BIN = .venv/bin

.PHONY: test demo clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt
	touch $@

test: .venv/installed
	$(BIN)/python -m pytest -q tests

demo: .venv/installed
	$(BIN)/torchrun grpo_video.py --output_dir out/demo
	$(BIN)/torchrun evaluate.py --output_dir out/demo/eval_base
	$(BIN)/torchrun evaluate.py --model out/demo/final --output_dir out/demo/eval_grpo --compare out/demo/eval_base

clean:
	rm -rf out .pytest_cache __pycache__ tests/__pycache__
