# make test      install into .venv and run the tests, on two cores
# make test-slow run the slow ones, five minutes more: the dry run of `make gpu`, the bench, scaling, runs of all families
# make test-faults   real processes, really killed, stopped and starved, six minutes more
# make test-page the page of docs/page.py in headless Chromium, which has to be installed
# make lint      check the style (pyproject.toml)
# make demo      install, train the toy world's policy by GRPO, compare it with its base on L1, L2 and L3, seeing and
#                blind, look at where both look, and put it all on a page
# make results   SFT, GRPO, GRPO by LoRA and GRPO on blank videos under every --video, three seeds each: docs/results.md
# make study     the study of docs/study.md: what is missing of its runs, then tables and pictures; six hours for all
# make study-quick   S1 and S2 with one seed, a quarter of the questions, in out/study_quick: eight minutes
# make gpu       what only a GPU can tell, in half an hour on one of 80 GB, into docs/gpu.json; `make gpu PYTHON=...` picks
#                a Python that has torch for the GPU and the other packages of requirements.txt: nothing is installed
# make clean     remove the toy world and all runs on it; runs on real data (out/grpo, out/sft, out/eval) stay

PYTHON ?= python3
BIN = .venv/bin
SEEDS = 0 1 2
LEVELS = $(foreach level,L1 L2 L3,annotations/validation_$(level).jsonl)
# Threads that wait spin less: hardly slower on a quiet machine, twice as fast on a busy one (docs/performance.md).
export GOMP_SPINCOUNT ?= 1000
FRESH = $(foreach level,L1 L2 L3,annotations/fresh3_$(level).jsonl)

.PHONY: test test-slow test-faults test-page lint demo results study study-quick gpu clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt
	touch $@

.venv/dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install -r requirements-dev.txt
	touch $@

test: .venv/dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not faults and not page" tests

test-slow: .venv/dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m slow tests

test-faults: .venv/dev
	$(BIN)/python -m pytest -q -m faults tests

test-page: .venv/dev
	$(BIN)/python -m pytest -q -m page tests

lint: .venv/dev
	$(BIN)/ruff check .

evaluate = $(BIN)/torchrun --standalone evaluate.py --output_dir

demo: .venv/installed
	$(BIN)/torchrun --standalone grpo_video.py --output_dir out/demo/grpo_seed0
	$(evaluate) out/demo/base/full
	$(evaluate) out/demo/base/random --video random --compare out/demo/base/full
	$(evaluate) out/demo/grpo_seed0/full --model out/demo/grpo_seed0/final --compare out/demo/base/full
	$(evaluate) out/demo/grpo_seed0/random --model out/demo/grpo_seed0/final --video random --compare out/demo/grpo_seed0/full
	$(BIN)/python docs/results.py out/demo
	$(BIN)/python attention.py --model toy out/demo/grpo_seed0/final --output_dir out/demo/attention
	$(BIN)/python docs/page.py out/demo/base/full out/demo/grpo_seed0/full --attention out/demo/attention/attention.json \
	--output out/demo/page.html

results: .venv/installed
	$(BIN)/python toy.py --fresh 3
	for video in full text_only blank random shuffled reversed single_frame; do \
	$(evaluate) out/results/base/$$video --video $$video --eval_files $(LEVELS) $(FRESH) || exit 1; done
	for seed in $(SEEDS); do for run in "sft sft_video.py" "grpo grpo_video.py" "grpo_blank grpo_video.py --video blank" \
	"grpo_lora grpo_video.py --lora_rank 16 --learning_rate 1e-3"; do set -- $$run; \
	name=$$1_seed$$seed; shift; $(BIN)/torchrun --standalone $$@ --seed $$seed --output_dir out/results/$$name || exit 1; \
	for video in full random; do \
	$(evaluate) out/results/$$name/$$video --model out/results/$$name/final --video $$video --eval_files $(LEVELS) $(FRESH) || exit 1; done; done; done
	for run in sft_seed0 grpo_seed0; do for video in text_only blank shuffled reversed single_frame; do \
	$(evaluate) out/results/$$run/$$video --model out/results/$$run/final --video $$video --eval_files $(LEVELS) $(FRESH) || exit 1; done; done
	$(evaluate) out/results/grpo_blank_seed0/blank --model out/results/grpo_blank_seed0/final --video blank --eval_files $(LEVELS) $(FRESH)
	$(BIN)/python docs/results.py out/results | tee docs/results.md

study: .venv/installed
	$(BIN)/python docs/study.py
	$(BIN)/python docs/study_report.py

study-quick: .venv/installed
	$(BIN)/python docs/study.py --quick --only S1 S2
	$(BIN)/python docs/study_report.py out/study_quick/summaries

gpu:
	$(PYTHON) tests/gpu.py

clean:
	rm -rf out/toy out/toy_* out/demo* out/results* out/study* .pytest_cache __pycache__ tests/__pycache__
