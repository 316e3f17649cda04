"""The scripts end to end on the toy world: ranks, micro-batches, resume, bad videos, bad input, SFT, evaluation."""
import json
import os
import shutil
import subprocess
import sys
import types
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

import evaluate
import grpo_video
import model
import runtime
import sampler
import sft_video
import toy
from bench import normalised
from conftest import QWEN2_VL, ROOT
from data import VideoDataset, load_questions, step_batch
from runtime import parse_args


def grpo_args(output_dir, **changes):
    return grpo_video.Args(**{**grpo_video.TOY, "output_dir": str(output_dir), "max_steps": 1,
                              "max_completion_length": 40, "num_workers": 1, "save_every": 0, **changes})


def sft_args(output_dir, **changes):
    return sft_video.Args(**{**sft_video.TOY, "output_dir": str(output_dir), "max_steps": 1, "num_workers": 1,
                             "save_every": 0, **changes})


def torchrun(script, ranks, *flags):
    """Runs a script on several processes, under the same float64 as the tests themselves."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
               "tests/float64.py", script, *flags]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


def update(final, base=toy.BASE):
    """What training has added to the base, all weights in one vector."""
    after, before = load_file(Path(final) / "model.safetensors"), load_file(Path(base) / "model.safetensors")
    return torch.cat([(after[name].double() - before[name].double()).flatten() for name in sorted(before)])


def relative_difference(a, b):
    return (torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)).item()


def metrics_of(output_dir):
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def small_world(root, world, keep=8):
    """A data root of its own with a few questions, whose files a test may spoil."""
    (root / "annotations").mkdir(parents=True)
    for name in ("training_6k", "training_with_cot_6k", "validation_L1"):
        lines = (world / f"annotations/{name}.jsonl").read_text().splitlines()
        (root / f"annotations/{name}.jsonl").write_text("\n".join(lines[:keep]) + "\n")
    for folder in ("videos", "images"):
        shutil.copytree(world / folder, root / folder)
    return root


# ----------------------------------------------------------------------------------------------------------------------
# Ranks and micro-batches split a sum, and nothing else.

@pytest.fixture(scope="module")
def one_process_run(tmp_path_factory, world):
    """One float64 step with every part of the objective switched on."""
    output_dir = tmp_path_factory.mktemp("one")
    grpo_video.main(grpo_args(output_dir, **COMMON))
    m, = metrics_of(output_dir)
    assert m["group_std"] > 0, "no reward differs within a group: the update would show nothing"
    assert m["clip_frac"] > 0
    # Before the first update the learner is the sampler; after it, not the reference.
    assert m["sampler_gap"] < 1e-9 and m["kl"] > 0
    return output_dir


# The clip is so narrow that the second update clips: its ratios are against the policy that sampled.
COMMON = dict(dtype="float64", kl_coef=0.1, num_updates=2, learning_rate=1e-4, prompts_per_step=4, print_every=1,
              clip_low=1e-4, clip_high=1e-4)


def test_two_ranks_make_the_update_of_one(one_process_run, tmp_path):
    settings = {**COMMON, "max_steps": 1, "max_completion_length": 40}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    torchrun("grpo_video.py", 2, *flags, "--micro_batch_size", "5", "--output_dir", str(tmp_path / "two"))
    one, two = (metrics_of(folder)[0] for folder in (one_process_run, tmp_path / "two"))
    for name in one:
        if not name.endswith("_s"):
            rel = 1e-9 if name in ("loss", "kl", "entropy", "grad_norm") else 1e-6  # rewards are float32
            assert one[name] == pytest.approx(two[name], rel=rel, abs=rel), name
    assert relative_difference(update(tmp_path / "two/final"), update(one_process_run / "final")) < 1e-9


@pytest.mark.parametrize("naive", ["False", pytest.param("True", marks=pytest.mark.slow)])
def test_ranks_agree_on_an_untied_model_with_several_end_tokens(tmp_path, world, naive):
    # As hub folders are: the generation config lists two end tokens, the config one. All ranks must know both.
    # The embedding is gathered for each call, so that all ranks must call it equally often.
    base = tmp_path / "base"
    shutil.copytree(toy.BASE, base)
    qwen = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    config = qwen.config
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    untied = Qwen2VLForConditionalGeneration(config)
    untied.load_state_dict({**qwen.state_dict(), "lm_head.weight": qwen.lm_head.weight.detach().clone()})
    untied.generation_config = qwen.generation_config
    early = AutoTokenizer.from_pretrained(base).convert_tokens_to_ids(" (A)")  # where a completion names option A
    untied.generation_config.eos_token_id = [config.text_config.eos_token_id, early]
    untied.save_pretrained(base)
    flags = {"dtype": "float64", "prompts_per_step": 10, "max_steps": 1, "max_completion_length": 40,
             "learning_rate": 1e-4}
    torchrun("grpo_video.py", 2, "--model", str(base), *(w for k, v in flags.items() for w in (f"--{k}", str(v))),
             "--naive", naive, "--output_dir", str(tmp_path / "two"))
    grpo_video.main(grpo_args(tmp_path / "one", **flags, model=str(base)))
    one, two = (metrics_of(tmp_path / name)[0] for name in ("one", "two"))
    assert one["completion_length"] == two["completion_length"]
    assert round(10 * one["flat_group_frac"]) % 2, "both ranks may have learned equally many rows"
    assert one["format"] < 0.95, "few rows ended at the second end token"
    assert relative_difference(update(tmp_path / "two/final", base), update(tmp_path / "one/final", base)) < 1e-9


@pytest.mark.parametrize("changes", [
    dict(micro_batch_size=3), dict(rollout_prompts=1), dict(gradient_checkpointing=True), dict(naive=True),
    dict(naive=True, micro_batch_size=5)])
def test_micro_batches_do_not_change_the_update(one_process_run, tmp_path, changes):
    grpo_video.main(grpo_args(tmp_path, **COMMON, **changes))
    assert relative_difference(update(tmp_path / "final"), update(one_process_run / "final")) < 1e-9


def test_the_seed_changes_the_run_and_the_same_seed_repeats_it(one_process_run, tmp_path):
    for seed, same in ((0, True), (1, False)):
        grpo_video.main(grpo_args(tmp_path / str(seed), **COMMON, seed=seed))
        difference = relative_difference(update(tmp_path / str(seed) / "final"), update(one_process_run / "final"))
        assert (difference < 1e-9) == same


def test_no_reward_signal_and_no_kl_means_no_gradient(tmp_path, world):
    # With a completion length of 1 nothing parses: every group is flat.
    grpo_video.main(grpo_args(tmp_path, max_completion_length=1))
    m, = metrics_of(tmp_path)
    assert m["flat_group_frac"] == 1 and m["grad_norm"] == 0
    assert m["truncated_frac"] == 1 and m["completion_length"] == 1
    assert "entropy" not in m  # nothing was learned that it could be measured on


def test_flat_groups_cost_no_learning_and_change_nothing(tmp_path, world, monkeypatch):
    # Three steps, with momentum: a group without signal that is left out must not leave out anything else.
    seen = []
    monkeypatch.setattr(grpo_video, "group_advantages", lambda rewards, use_std, f=grpo_video.group_advantages: (
        seen.append(rewards.tolist()) or f(rewards, use_std)))
    changes = dict(dtype="float64", prompts_per_step=8, max_steps=3, learning_rate=1e-4, loss_agg="token_mean", seed=11)
    work = []
    for name, keep in (("skip", False), ("keep", True)):
        with counting(monkeypatch) as done:
            grpo_video.main(grpo_args(tmp_path / name, **changes, learn_flat_groups=keep))
        work.append((done["logits"], done["decoded tokens"]))
    flat = [[len(set(group)) == 1 for group in rewards] for rewards in seen]
    assert {reward for rewards in seen for group in rewards if len(set(group)) == 1 for reward in group} == {0.0, 1.0}
    skip, keep = (metrics_of(tmp_path / name) for name in ("skip", "keep"))
    names = ("reward", "group_std", "flat_group_frac", "completion_length", "truncated_frac", "loss", "grad_norm")
    for step, (a, b) in enumerate(zip(skip, keep, strict=True)):
        assert a["flat_group_frac"] == sum(flat[step]) / 8
        for name in names:
            assert a[name] == pytest.approx(b[name], rel=1e-9, abs=1e-12), name
    assert relative_difference(update(tmp_path / "skip/final"), update(tmp_path / "keep/final")) < 1e-9
    (learned, decoded), (all_learned, all_decoded) = work
    assert decoded == all_decoded and learned < all_learned


def skip_two_copies(copy_weights):
    """The first copy of the weights is made, and the one of the export; those after the two steps are not."""
    calls = []
    return lambda policy, target: calls.append(1) or len(calls) in (2, 3) or copy_weights(policy, target)


def test_sampler_gap_tells_when_the_sampler_is_not_the_learner(tmp_path, world, monkeypatch):
    grpo_video.main(grpo_args(tmp_path / "right", dtype="float64", max_steps=2, prompts_per_step=4, micro_batch_size=8))
    monkeypatch.setattr(runtime, "copy_weights", skip_two_copies(runtime.copy_weights))  # the sampler stays as it was
    grpo_video.main(grpo_args(tmp_path / "stale", dtype="float64", max_steps=2, prompts_per_step=4, micro_batch_size=8))
    right, stale = ([m["sampler_gap"] for m in metrics_of(tmp_path / name)] for name in ("right", "stale"))
    assert max(right) < 1e-9 and stale[0] < 1e-9 and stale[1] > 1e-4


def test_flat_groups_can_be_kept_for_their_kl(tmp_path, world):
    changes = dict(dtype="float64", prompts_per_step=8, max_steps=3, learning_rate=1e-4, kl_coef=1.0)
    for name, keep in (("skip", False), ("keep", True)):
        grpo_video.main(grpo_args(tmp_path / name, **changes, learn_flat_groups=keep))
    assert relative_difference(update(tmp_path / "skip/final"), update(tmp_path / "keep/final")) > 1e-4


# ----------------------------------------------------------------------------------------------------------------------
# Work: what a step puts through the models, counted; and what ranks say to each other while they sample.

@contextmanager
def counting(monkeypatch):
    """What a run puts through the models, seen from outside; a dict of counts."""
    done = Counter()

    def watch(module, name, size):
        function = getattr(module, name)

        def counted(*args, **kwargs):
            for key, count in size(*args).items():
                done[key] += count
            return function(*args, **kwargs)
        patch.setattr(module, name, counted)

    with monkeypatch.context() as patch:
        watch(sampler.GroupCache, "prefill", lambda cache, prompts: {
            "prefill tokens": len(prompts.ids), "patches": len(prompts.pixel_values)})
        watch(sampler.GroupCache, "feed", lambda cache, token: {"decoded tokens": len(token)})
        watch(model.Policy, "shared_states", lambda policy, prompts, rows, ids, mask: {
            "learner tokens": len(prompts.ids) + int(mask.sum()), "patches": len(prompts.pixel_values)})
        watch(model, "token_logps", lambda hidden, weight, *_: {"logits": len(hidden) * len(weight)})
        yield done


@pytest.mark.parametrize("changes, passes", [(dict(), 1), (dict(num_updates=2), 3), (dict(kl_coef=0.1), 2),
                                             (dict(num_updates=2, kl_coef=0.1), 4)])
def test_a_step_does_the_work_that_it_should(tmp_path, world, tokenizer, monkeypatch, changes, passes):
    # One update and no KL is one pass: neither old nor reference log-probs. All prompts once a pass, whatever G is.
    with counting(monkeypatch) as done:
        grpo_video.main(grpo_args(tmp_path, prompts_per_step=3, micro_batch_size=24, learn_flat_groups=True, **changes))
    m, = metrics_of(tmp_path)
    dataset = VideoDataset(load_questions("annotations/training_6k.jsonl", world), tokenizer, QWEN2_VL, toy.PIXELS, 0)
    examples = [dataset[pair] for pair in step_batch(0, 3, len(dataset), 0)]
    prompt_tokens = sum(len(e.prompt_ids) for e in examples)
    patches = sum(len(x) for e in examples for x in (e.pixel_values_videos, e.pixel_values) if x is not None)
    tokens = round(m["completion_length"] * 3 * 8)
    assert done["prefill tokens"] == prompt_tokens
    assert done["patches"] == (1 + passes) * patches
    assert done["learner tokens"] == passes * (prompt_tokens + tokens)
    assert done["logits"] == passes * tokens * len(tokenizer)
    assert done["decoded tokens"] >= tokens - 3 * 8  # the first token of a row comes from its prompt's pass


def test_the_report_adds_up_the_metrics(tmp_path, world):
    changes = dict(prompts_per_step=2, max_steps=3, save_every=2, max_completion_length=8)
    grpo_video.main(grpo_args(tmp_path, **changes))
    report, metrics = json.loads((tmp_path / "report.json").read_text()), metrics_of(tmp_path)
    assert report["seconds"].keys() == {"data_s", "rollout_s", "score_s", "update_s", "step_s"}
    assert report["peak_bytes"] > 1e8
    for name, seconds in report["seconds"].items():
        assert seconds == pytest.approx(sum(m[name] for m in metrics))
    assert report["seconds"]["step_s"] == pytest.approx(sum(report["seconds"].values()) / 2)
    assert report["tokens"] == round(sum(m["completion_length"] * 2 * 8 for m in metrics))
    grpo_video.main(grpo_args(tmp_path, **changes, resume=True))
    assert json.loads((tmp_path / "report.json").read_text())["tokens"] == report["tokens"]  # of the whole run


@pytest.mark.slow
def test_sampling_touches_no_collective_and_a_rollout_takes_equally_many_whatever_its_length(world):
    counts = json.loads(torchrun("tests/bench.py", 2, "--collectives").splitlines()[-1])["counts"]["ours"]
    assert counts["of these in sampling"] == 0 < counts["in a sharded forward pass"]
    # The weights are gathered a unit at a time, as in a forward pass: the tower's layers and its rest, five layers of
    # the text model, the root.
    blocks = json.loads((toy.BASE / "config.json").read_text())["vision_config"]["depth"]
    assert counts["in a rollout of 32 tokens"] == counts["in a rollout of 64 tokens"] == blocks + 1 + 5 + 1


@pytest.mark.slow
def test_the_bench_runs(tmp_path):
    output = tmp_path / "bench.json"
    command = [sys.executable, "tests/bench.py", "--only", "B3", "--rounds", "1", "--output", str(output)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    rows = json.loads(output.read_text())["rows"]
    for row, C in zip(rows, (256, 64), strict=True):
        naive, ours = row["counts"]["naive"], row["counts"]["ours"]
        assert naive["text tokens"] == 8 * (900 + C) and ours["text tokens"] == 900 + 8 * C
        assert naive["logits"] == ours["logits"] and naive["vision patches"] == ours["vision patches"] == 4 * 729


# ----------------------------------------------------------------------------------------------------------------------
# Length.

def test_the_longest_prompt_is_known_without_reading_a_video(world, tokenizer):
    questions = load_questions("annotations/training_6k.jsonl", world)[:40]
    settings = grpo_args("unused").pixel_settings()
    for video in ("full", "text_only", "no_image"):
        dataset = VideoDataset(questions, tokenizer, QWEN2_VL, settings, 0, video)
        longest = max(len(dataset[0, i].prompt_ids) for i in range(len(questions)))
        # The text of most letters is not always that of most tokens.
        assert longest - 4 <= dataset.longest_prompt() <= longest + 4
    videos = [question for question in questions if question.video]
    for num_frames, image_size in ((8, 56), (128, 112), (16, 448)):
        settings = grpo_args("unused", num_frames=num_frames, image_size=image_size).pixel_settings()
        both = VideoDataset(videos, tokenizer, QWEN2_VL, settings, 0).longest_prompt()
        none = VideoDataset(videos, tokenizer, QWEN2_VL, settings, 0, "text_only").longest_prompt()
        assert both - none == (num_frames // 2 + 1) * (image_size // 28) ** 2 + 2 * 2  # and where each begins and ends


@pytest.mark.parametrize("main, make_args", [(grpo_video.main, grpo_args), (sft_video.main, sft_args),
                                             (evaluate.main, lambda *a, **k: eval_args(*a, **k))])
def test_prompts_longer_than_the_model_allows_are_refused_before_anything_is_loaded(tmp_path, world, main, make_args,
                                                                                  monkeypatch):
    monkeypatch.setattr(runtime, "read_qwen", None)
    # 8 x 256 vision tokens of the video alone, and the toy base was made for 2,048.
    with pytest.raises(ValueError, match=r"--num_frames 16 --image_size 448: prompts of up to \d+ tokens.*the 2048 "):
        main(make_args(tmp_path / "run", image_size=448))
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Resume and output folders.

@pytest.mark.parametrize("script, make_args", [(grpo_video, grpo_args), (sft_video, sft_args)])
def test_resumed_run_is_bit_identical(tmp_path, world, script, make_args):
    common = dict(prompts_per_step=4, max_steps=4, save_every=3)
    final = script.main(make_args(tmp_path, **common))
    straight, lines = load_file(final / "model.safetensors"), metrics_of(tmp_path)
    shutil.rmtree(final)
    script.main(make_args(tmp_path, **common, resume=True))  # from step 3: the last step is run again
    resumed, again = load_file(final / "model.safetensors"), metrics_of(tmp_path)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert [line["step"] for line in again] == [0, 1, 2, 3] and again[3]["loss"] == lines[3]["loss"]


def test_resume_begins_where_there_is_nothing_and_takes_other_flags_only_on_purpose(tmp_path, world):
    short = dict(prompts_per_step=1, max_completion_length=1, max_steps=2)
    grpo_video.main(grpo_args(tmp_path / "run", **short, save_every=1, resume=True))
    assert [m["step"] for m in metrics_of(tmp_path / "run")] == [0, 1]
    with pytest.raises(ValueError, match="--learning_rate 0.5 .it was 0.0002.*--change learning_rate"):
        grpo_video.main(grpo_args(tmp_path / "run", **short, resume=True, learning_rate=0.5))
    on_purpose = dict(learning_rate=0.5, change=["learning_rate", "max_steps"])
    grpo_video.main(grpo_args(tmp_path / "run", **{**short, "max_steps": 3}, resume=True, **on_purpose))
    assert [m["lr"] for m in metrics_of(tmp_path / "run")] == pytest.approx([2e-4, 1e-4, 0.5 / 3])
    assert json.loads((tmp_path / "run/args.json").read_text())["learning_rate"] == 0.5


def test_an_earlier_run_is_moved_aside(tmp_path, world):
    for _ in range(2):
        grpo_video.main(grpo_args(tmp_path / "run", prompts_per_step=1, max_completion_length=1))
    assert (tmp_path / "run.old1/metrics.jsonl").exists() and (tmp_path / "run/final/model.safetensors").exists()
    # A mistake must not touch it: a wrong file, or a model inside the folder that would be moved.
    for mistake, match in ((dict(train_file="nowhere.jsonl"), "nowhere.jsonl"),
                           (dict(model=str(tmp_path / "run/final")), "lies in --output_dir")):
        with pytest.raises(ValueError, match=match):
            grpo_video.main(grpo_args(tmp_path / "run", **mistake))
    assert (tmp_path / "run/final/model.safetensors").exists() and not (tmp_path / "run.old2").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Bad videos and bad input.

def test_unreadable_videos_weigh_nothing_and_are_counted(tmp_path, world):
    # Rank 0 and rank 1 get four questions each; all of rank 1 are spoilt, so it has nothing of its own to learn from.
    root = small_world(tmp_path / "data", world, keep=8)
    questions = load_questions("annotations/training_6k.jsonl", root)
    for _, index in step_batch(0, 8, 8, 0, rank=1, world_size=2):
        questions[index].image.write_bytes(b"not a picture")
    flags = ["--dtype", "float64", "--prompts_per_step", "8", "--max_steps", "1", "--data_root", str(root),
             "--model", str(toy.BASE), "--image_size", "56", "--max_completion_length", "40",
             "--learning_rate", "1e-4", "--kl_coef", "0.1"]
    torchrun("grpo_video.py", 2, *flags, "--output_dir", str(tmp_path / "two"))
    m, = metrics_of(tmp_path / "two")
    assert m["unreadable"] == 4
    assert m["completion_length"] < 30  # about 20 tokens each, of the four that can be read
    # The same update as one process makes of the same eight questions, four of them unreadable.
    changes = dict(dtype="float64", prompts_per_step=8, data_root=str(root), learning_rate=1e-4, kl_coef=0.1)
    grpo_video.main(grpo_args(tmp_path / "one", **changes))
    assert metrics_of(tmp_path / "one")[0]["unreadable"] == 4
    assert relative_difference(update(tmp_path / "two/final"), update(tmp_path / "one/final")) < 1e-9


@pytest.mark.slow
def test_sft_ranks_with_less_to_learn_keep_pace(tmp_path, world):
    # Rank 1 has no micro-batch, rank 0 has two: unmatched collectives would hang here.
    root = small_world(tmp_path / "data", world, keep=4)
    questions = load_questions("annotations/training_with_cot_6k.jsonl", root)
    for _, index in step_batch(0, 4, 4, 0, rank=1, world_size=2):
        questions[index].image.write_bytes(b"not a picture")
    flags = ["--dtype", "float64", "--prompts_per_step", "4", "--max_steps", "1", "--data_root", str(root),
             "--model", str(toy.BASE), "--image_size", "56", "--micro_batch_size", "1", "--warmup_ratio", "0",
             "--learning_rate", "1e-4"]
    torchrun("sft_video.py", 2, *flags, "--output_dir", str(tmp_path / "two"))
    sft_video.main(sft_args(tmp_path / "one", dtype="float64", prompts_per_step=4, data_root=str(root),
                            warmup_ratio=0.0, learning_rate=1e-4, frame_cache=""))
    assert metrics_of(tmp_path / "one")[0]["unreadable"] == metrics_of(tmp_path / "two")[0]["unreadable"] == 2
    assert relative_difference(update(tmp_path / "two/final"), update(tmp_path / "one/final")) < 1e-9


def test_a_step_without_any_readable_sample_is_skipped_and_a_run_without_any_ends(tmp_path, world):
    root = small_world(tmp_path / "data", world, keep=4)
    for script, make_args, file in ((grpo_video, grpo_args, "training_6k"),
                                    (sft_video, sft_args, "training_with_cot_6k")):
        images = [question.image for question in load_questions(f"annotations/{file}.jsonl", root)]
        (_, first), = step_batch(0, 1, 4, 0)
        images[first].rename(tmp_path / "away")
        changes = dict(data_root=str(root), prompts_per_step=1, max_steps=3, max_bad_frac=1.0, frame_cache="")
        script.main(make_args(tmp_path / file, **changes))
        (tmp_path / "away").rename(images[first])
        metrics = metrics_of(tmp_path / file)
        assert [(m["step"], m["skipped_steps"]) for m in metrics] == [(1, 1), (2, 1)]
        assert [m["unreadable_frac"] for m in metrics] == [1 / 2, 1 / 3] and metrics[0]["unreadable"] == 0
    shutil.rmtree(root / "images")
    for script, make_args in ((grpo_video, grpo_args), (sft_video, sft_args)):
        with pytest.raises(ValueError, match="4 of 4 questions could not be read(.*\nquestion .*No such file){4}"):
            script.main(make_args(tmp_path / "run", data_root=str(root), prompts_per_step=4))


def test_each_trainer_refuses_the_others_file(tmp_path, world):
    with pytest.raises(ValueError, match="for SFT"):
        grpo_video.main(grpo_args(tmp_path, train_file="annotations/training_with_cot_6k.jsonl"))
    with pytest.raises(ValueError, match="no 'response'"):
        sft_video.main(sft_args(tmp_path, train_file="annotations/training_6k.jsonl"))
    with pytest.raises(ValueError, match="for SFT"):
        evaluate.main(evaluate.Args(**{**evaluate.TOY, "eval_files": ["annotations/training_with_cot_6k.jsonl"],
                                       "output_dir": str(tmp_path)}))


def test_toy_defaults_apply_without_data_root_and_flags_win(capsys):
    flags = ["--learning-rate=0.5", "--no_advantage_std", "--output_dir", "seed"]
    toy_run = parse_args(grpo_video.Args, grpo_video.TOY, flags)
    assert (toy_run.learning_rate, toy_run.advantage_std) == (0.5, False)
    assert toy_run.image_size == grpo_video.TOY["image_size"]
    printed = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    origins = {"learning_rate": "flag", "advantage_std": "flag", "image_size": "toy world", "seed": "default"}
    assert all(printed[name].endswith(origin) for name, origin in origins.items())
    real = parse_args(grpo_video.Args, grpo_video.TOY, ["--model", "M", "--data_root", "D"])
    assert real == grpo_video.Args(model="M", data_root="D")  # the paper's
    for half in (["--model", "Qwen/Qwen2-VL-7B-Instruct"], ["--data_root", "D"]):
        with pytest.raises(ValueError, match="needs --(data_root|model)"):
            parse_args(grpo_video.Args, grpo_video.TOY, half)


def test_a_small_model_takes_the_toys_settings_on_any_data(capsys):
    for small in ("toy", str(toy.BASE)):
        args = parse_args(grpo_video.Args, grpo_video.TOY, ["--model", small, "--data_root", "D", "--kl_coef", "0.5"])
        assert args == grpo_video.Args(**{**grpo_video.TOY, "model": small, "data_root": "D", "kl_coef": 0.5})


@pytest.mark.parametrize("name", ["own_multiple_choice", "own_free_form"])
def test_ones_own_questions_are_trained_on_and_evaluated(tmp_path, world, name):
    file = str(ROOT / f"docs/{name}.jsonl")
    grpo_video.main(grpo_args(tmp_path / "run", train_file=file, prompts_per_step=5, learning_rate=1e-3))
    m, = metrics_of(tmp_path / "run")
    assert 0 <= m["accuracy"] <= m["parse_rate"] <= 1 and m["unreadable"] == 0
    row, *_ = evaluate.main(eval_args(tmp_path / "eval", eval_files=[file]))
    assert row["n"] == 5 and row["chance"] == pytest.approx(1 / 3 if name == "own_multiple_choice" else 0)
    records = [json.loads(line) for line in (tmp_path / "eval/samples.jsonl").read_text().splitlines()]
    if name == "own_free_form":  # graded by text, where the base answers anything at all
        assert all(r["correct"] == (r["parsed"] is not None and r["parsed"].lower() == r["gold"]) for r in records)


def test_a_new_reward_is_one_line_and_is_logged_by_itself(tmp_path, world, monkeypatch):
    table = grpo_video.reward_table
    monkeypatch.setattr(grpo_video, "reward_table", lambda args: {
        **table(args), "short": (0.5, lambda completion, example: float(len(completion) < 60))})
    grpo_video.main(grpo_args(tmp_path, prompts_per_step=2, format_weight=0.25))
    m, = metrics_of(tmp_path)
    assert m["reward"] == pytest.approx(m["accuracy"] + 0.25 * m["format"] + 0.5 * m["short"])


def test_tensorboard_gets_every_metric_or_is_refused(tmp_path, world, monkeypatch):
    monkeypatch.setattr(runtime, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tensorboard: .*not installed"):
        grpo_args(tmp_path, tensorboard=True)
    written = []
    board = types.ModuleType("torch.utils.tensorboard")  # in place of a package that is no dependency
    board.SummaryWriter = lambda folder, purge_step: types.SimpleNamespace(
        add_scalar=lambda *scalar: written.append((folder, *scalar)), flush=lambda: written.append("flushed"))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setattr(runtime, "find_spec", lambda name: board)
    grpo_video.main(grpo_args(tmp_path, prompts_per_step=1, max_completion_length=8, tensorboard=True))
    m, = metrics_of(tmp_path)
    assert written == [*((str(tmp_path), name, value, 0) for name, value in m.items()), "flushed"]


# ----------------------------------------------------------------------------------------------------------------------
# SFT.

def test_sft_targets_are_the_response_and_its_end_token(tokenizer, world):
    for question in load_questions("annotations/training_with_cot_6k.jsonl", world)[:3]:
        target = sft_video.encode_response(tokenizer, question.response)
        assert tokenizer.decode(target) == question.response + "<|im_end|>"


def test_sft_loss_is_hugging_faces(tmp_path, tokenizer, world):
    # One step of records that Hugging Face sees one at a time, with labels of -100 on the prompt.
    sft_video.main(sft_args(tmp_path, prompts_per_step=4, micro_batch_size=3, max_questions=4))
    questions = load_questions("annotations/training_with_cot_6k.jsonl", world)[:4]
    records = VideoDataset(questions, tokenizer, QWEN2_VL, toy.PIXELS, 0)
    qwen = Qwen2VLForConditionalGeneration.from_pretrained(toy.BASE, dtype=torch.float32)
    total = count = 0
    for example in (normalised(records[0, i]) for i in range(4)):
        response = torch.tensor(tokenizer(example.question.response + "<|im_end|>")["input_ids"])
        ids = torch.cat([example.prompt_ids, response])
        after = example.position_ids.max() + 1 + torch.arange(len(response))
        labels = torch.cat([torch.full_like(example.prompt_ids, -100), response])
        names = ("pixel_values_videos", "video_grid_thw", "pixel_values", "image_grid_thw")
        pixels = {name: getattr(example, name) for name in names if getattr(example, name) is not None}
        position_ids = torch.cat([example.position_ids, after.expand(3, -1)], 1)
        with torch.no_grad():
            loss = qwen(input_ids=ids[None], position_ids=position_ids[:, None], labels=labels[None], **pixels).loss
        total, count = total + loss.item() * len(response), count + len(response)
    assert metrics_of(tmp_path)[0]["loss"] == pytest.approx(total / count, rel=1e-5)


def test_sft_two_ranks_make_the_update_of_one(tmp_path, world):
    flags = ["--dtype", "float64", "--prompts_per_step", "6", "--max_steps", "1", "--warmup_ratio", "0"]
    torchrun("sft_video.py", 2, *flags, "--micro_batch_size", "2", "--output_dir", str(tmp_path / "two"))
    sft_video.main(sft_args(tmp_path / "one", dtype="float64", prompts_per_step=6, warmup_ratio=0.0))
    assert relative_difference(update(tmp_path / "two/final"), update(tmp_path / "one/final")) < 1e-9


def test_learning_rate_warms_up_and_decays():
    rates = [sft_video.learning_rate_at(step, 46, 2e-5, 0.1) for step in range(46)]
    assert rates[0] == pytest.approx(2e-5 / 5) and rates[4] == pytest.approx(2e-5) and rates[5] == pytest.approx(2e-5)
    assert all(a > b for a, b in zip(rates[5:], rates[6:])) and 0 < rates[-1] < 1e-7
    assert sft_video.learning_rate_at(0, 1, 1.0, 0.1) == 1.0  # a run of one step is all peak


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation.

def eval_args(output_dir, **changes):
    return evaluate.Args(**{**evaluate.TOY, "output_dir": str(output_dir), "num_workers": 1, **changes})


def test_evaluation_does_not_depend_on_ranks_or_batches(tmp_path, world):
    files = ["annotations/validation_L1.jsonl", "annotations/validation_L3.jsonl"]
    rows = evaluate.main(eval_args(tmp_path / "one", max_questions=21, eval_files=files))
    torchrun("evaluate.py", 2, "--max_questions", "21", "--batch_size", "4", "--eval_files", *files,
             "--output_dir", str(tmp_path / "two"))
    one, two = ((tmp_path / name / "samples.jsonl").read_text() for name in ("one", "two"))
    assert one == two and one.count("\n") == 42
    assert json.loads((tmp_path / "one/results.json").read_text())["table"] == rows
    assert [row["n"] for row in rows if not row["part"]] == [21, 21]
    for file in files:
        parts = [row for row in rows if row["file"] == file and row["part"] in ("with a video", "image only")]
        assert sum(row["n"] for row in parts) == 21
    domains = {place for place, _ in toy.NEW_GOALS.values()}  # of L3
    assert sum(row["n"] for row in rows if row["part"] in domains) == 21
    # Any number can be computed again from samples.jsonl.
    records = [json.loads(line) for line in one.splitlines()]
    assert sum(r["parsed"] == r["gold"] for r in records) == sum(row["correct"] for row in rows if not row["part"])


def test_a_mistake_does_not_touch_an_earlier_evaluation(tmp_path, world):
    few = dict(max_questions=4, eval_files=["annotations/validation_L1.jsonl"])
    evaluate.main(eval_args(tmp_path / "out", **few))
    for mistake in (dict(eval_files=["annotations/validation_L1.jsonl", "nowhere.jsonl"]), dict(num_frames=7)):
        with pytest.raises(ValueError, match="nowhere|num_frames"):
            evaluate.main(eval_args(tmp_path / "out", **{**few, **mistake}))
    assert (tmp_path / "out/results.json").exists() and not (tmp_path / "out.old1").exists()


def test_the_base_is_middling(tmp_path, world):
    # Wide bounds around 30 to 50%: these are 96 of its 352 L1 questions.
    row, *_ = evaluate.main(eval_args(tmp_path, max_questions=96, eval_files=["annotations/validation_L1.jsonl"]))
    assert 0.85 < row["parse_rate"] < 1 and 0.25 < row["accuracy"] < 0.6


def test_unreadable_samples_stay_in_the_denominator(tmp_path, world):
    root = small_world(tmp_path / "data", world, keep=6)
    for question in load_questions("annotations/validation_L1.jsonl", root)[:2]:
        question.image.unlink()
    files = ["annotations/validation_L1.jsonl"]
    row, *_ = evaluate.main(eval_args(tmp_path / "out", data_root=str(root), eval_files=files))
    assert (row["n"], row["unreadable"]) == (6, 2) and row["parse_rate"] <= 4 / 6
    records = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    bad = [r for r in records if r["error"]]
    assert len(bad) == 2 and not any(r["correct"] or r["response"] or r["parsed"] for r in bad)
