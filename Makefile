# make test      install into .venv and run the tests
# make demo      install, train the toy world's policy by GRPO, compare it with its base on L1, L2 and L3
# make results   the README's table and picture: GRPO and SFT with three seeds each
# make clean     remove the toy world and all runs on it; runs on real data (out/grpo, out/sft, out/eval) stay

PYTHON ?= python3
BIN = .venv/bin
SEEDS = 0 1 2

.PHONY: test demo results clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt
	touch $@

test: .venv/installed
	$(BIN)/python -m pytest -q tests

demo: .venv/installed
	$(BIN)/torchrun --standalone grpo_video.py --output_dir out/demo/grpo_seed0
	$(BIN)/torchrun --standalone evaluate.py --output_dir out/demo/base
	$(BIN)/torchrun --standalone evaluate.py --model out/demo/grpo_seed0/final --output_dir out/demo/grpo_seed0/eval --compare out/demo/base
	$(BIN)/python docs/results.py out/demo

results: .venv/installed
	$(BIN)/torchrun --standalone evaluate.py --output_dir out/results/base
	for seed in $(SEEDS); do for method in grpo sft; do run=out/results/$${method}_seed$$seed; \
	$(BIN)/torchrun --standalone $${method}_video.py --seed $$seed --output_dir $$run && \
	$(BIN)/torchrun --standalone evaluate.py --model $$run/final --output_dir $$run/eval --compare out/results/base || exit 1; done; done
	$(BIN)/python docs/results.py out/results docs/results.png

clean:
	rm -rf out/toy out/toy_* out/demo* out/results* .pytest_cache __pycache__ tests/__pycache__
