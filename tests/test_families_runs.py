"""Runs of each family's tiny random model: trainers, ranks, LoRA, a frozen tower, checkpoints, exports, evaluation.

    torchrun --nproc_per_node 2 tests/float64.py tests/test_families_runs.py MODELS OUT grpo   one on two ranks

A random model answers nothing right. So rewards are drawn from the text of the answer, but for the questions that rank
1 has in the second step on two ranks: all of theirs are 0, so that this rank has nothing to learn while rank 0 has.
"""
import copy
import functools
import itertools
import re
import shutil
import sys
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import conftest
import evaluate
import grpo_video
import runtime
import sft_video
import tiny
import toy
from data import FAMILIES, VideoDataset, load_questions, step_batch
from model import Policy, collate_prompts, vision_token_ids
from run import export_checkpoint
from runtime import load_config, load_family, load_tokenizer, parse_args
from test_families import hf_inputs, own_positions
from test_model import load_args
from test_train import eval_args, grpo_args, metrics_of, relative_difference, sft_args, torchrun, update
from tiny import LIKE_QWEN3

pytestmark = pytest.mark.slow  # what `make test` has no time for

COMMON = dict(dtype="float64", prompts_per_step=2, max_steps=2, learning_rate=1e-3, num_workers=0)
GRPO = dict(COMMON, kl_coef=0.1, num_updates=2, clip_low=1e-4, clip_high=1e-4, group_size=4, max_completion_length=12)
RUNS = {  # name: (the script, its arguments, what is changed of them)
    "grpo": (grpo_video, grpo_args, GRPO),
    "lora": (grpo_video, grpo_args, {**GRPO, "lora_rank": 4, "lora_alpha": 12.0}),
    "frozen": (grpo_video, grpo_args, {**GRPO, "freeze_vision": True}),
    "blind": (grpo_video, grpo_args, {**GRPO, "video": "text_only"}),
    "sft": (sft_video, sft_args, COMMON)}
RESUMED = ("grpo", "lora", "frozen")


def image_size(family: str) -> int:
    return 64 if family in LIKE_QWEN3 else 56  # 2 x 2 tokens


@functools.cache
def questions_of(models: Path) -> tuple[list, set[str]]:
    """The questions that GRPO runs learn, and the ids of those whose answers are all worth 0."""
    questions = load_questions(str(models / "training_6k.jsonl"), toy.ROOT)
    return questions, {questions[i].id for _, i in step_batch(1, GRPO["prompts_per_step"], len(questions), 0, 1, 2)}


def start(models: Path, family: str, name: str, folder: Path, **changes) -> Path:
    """A run of RUNS in `folder`; returns its final/."""
    script, make_args, settings = RUNS[name]
    _, flat = questions_of(models)
    file = f"training_{'with_cot_' if script is sft_video else ''}6k.jsonl"
    table = {"accuracy": (1.0, lambda text, example: (
        zlib.crc32(text.encode()) / 2**32 if example.question.id not in flat else 0.0))}
    args = make_args(folder, **{**settings, "model": str(models / family), "data_root": str(toy.ROOT),
                                "train_file": str(models / file), "image_size": image_size(family), **changes})
    with mock.patch.object(grpo_video, "reward_table", lambda args: table):
        return script.main(args)


# ----------------------------------------------------------------------------------------------------------------------
# What the tests share.

@pytest.fixture(scope="module")
def models(tmp_path_factory, world):
    """A folder with a model of each family, and the files of few questions that all runs learn: long ones take long."""
    folder = tmp_path_factory.mktemp("models")
    for file in ("training_6k", "training_with_cot_6k"):
        lines = (world / f"annotations/{file}.jsonl").read_text().splitlines(keepends=True)
        (folder / f"{file}.jsonl").write_text("".join(lines[:24]))
    for family in FAMILIES:
        tiny.write(folder / family, family, tied=family == "qwen2_vl")  # releases are tied below 7B or 8B
    return folder


@pytest.fixture(scope="module")
def runs(models, tmp_path_factory):
    """A function: the folder of a run of RUNS in one process, made when it is first asked for, and its policy."""
    root, made = tmp_path_factory.mktemp("runs"), {}

    def run(family: str, name: str) -> tuple[Path, Policy]:
        if (family, name) not in made:
            kept, load_policy = [], runtime.load_policy

            def load_and_keep(*args, **kwargs):
                kept.append(load_policy(*args, **kwargs))
                return kept[-1]
            with mock.patch.object(runtime, "load_policy", load_and_keep):
                start(models, family, name, root / family / name, save_every=int(name in RESUMED))
            made[family, name] = root / family / name, kept[0]
        return made[family, name]
    return run


@pytest.fixture(scope="module")
def batches(models):
    """A function: examples (one without a video) and the arguments of `Policy`: two completions of each, of random
    words and other lengths."""
    @functools.cache
    def batch(family: str, video: str = "full"):
        folder, settings = str(models / family), grpo_args("unused", image_size=image_size(family)).pixel_settings()
        dataset = VideoDataset(questions_of(models)[0], load_tokenizer(folder), load_family(folder), settings, 0, video)
        image = next(i for i, question in enumerate(dataset.questions) if not question.video)
        examples = [dataset[0, i] for i in (image, 0, 1)]
        generator, rows = torch.Generator().manual_seed(0), 2 * len(examples)
        ids = torch.randint(0, 200, (rows, 9), generator=generator)
        mask = torch.arange(9) < torch.randint(1, 10, (rows, 1), generator=generator)
        banned = vision_token_ids(SimpleNamespace(config=load_config(folder)), ids.device)
        return examples, (collate_prompts(examples, ids.device), torch.arange(rows) // 2, ids, mask, 1.0, banned)
    return batch


def hugging_faces(qwen, examples, _prompts, row_prompt, ids, mask, _temperature, banned):
    """The log-probs of all completions' tokens, (M,), of Hugging Face's own forward pass, one row at a time."""
    rows = []
    for n, own in enumerate(row[seen] for row, seen in zip(ids, mask)):
        example = examples[row_prompt[n]]
        logits = qwen(**hf_inputs(qwen, example, own), position_ids=own_positions(example, len(own))).logits[0]
        logps = logits.index_fill(1, banned, -torch.inf).log_softmax(-1)[-len(own) - 1:-1]
        rows.append(logps.gather(1, own[:, None])[:, 0])
    return torch.cat(rows)


def hf_model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()


def weights_of(final: Path) -> dict:
    return load_file(final / "model.safetensors")


def same_runs(models: Path, family: str, one: Path, other: Path) -> None:
    """Up to rounding."""
    same_metrics(one, other, 1e-8)
    assert relative_difference(*(update(folder / "final", models / family) for folder in (one, other))) < 1e-7


def same_metrics(one: Path, other: Path, rel: float) -> None:
    for a, b in zip(metrics_of(one), metrics_of(other), strict=True):
        for name in ("loss", "kl", "entropy", "grad_norm", "reward", "completion_length"):
            if name in a:  # rewards are float32
                assert a[name] == pytest.approx(b[name], rel=max(rel, 1e-6 * (name == "reward")), abs=1e-12), name


# ----------------------------------------------------------------------------------------------------------------------
# One process.

@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_ragged_rows_are_hugging_faces_with_and_without_checkpointing(models, batches, family):
    examples, batch = batches(family)
    mask = batch[3]
    weights = torch.randn(int(mask.sum()), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    learned = {}
    for name in ("theirs", "rows", "shared", "checkpointed"):
        qwen = hf_model(models / family).train()
        if name == "checkpointed":
            enable = getattr(qwen, "activation_checkpointing_enable", None) or qwen.gradient_checkpointing_enable
            enable({"use_reentrant": False})  # as load_policy does
        logps = (hugging_faces(qwen, examples, *batch) if name == "theirs" else
                 Policy(qwen, torch.float64, naive=name == "rows")(*batch)[0][mask])
        (logps * weights).sum().backward()
        learned[name] = qwen
    assert all(p.grad is not None and p.grad.any() for p in learned["theirs"].parameters())
    for name in ("rows", "shared", "checkpointed"):
        conftest.same_gradients(learned[name], learned["theirs"], 1e-9)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_exports_its_policy(models, batches, runs, family):
    examples, batch = batches(family)

    def logps(qwen):
        with torch.no_grad():
            return hugging_faces(qwen, examples, *batch)

    base = logps(hf_model(models / family))
    for name in ("grpo", "lora"):
        folder, policy = runs(family, name)
        assert max(m["sampler_gap"] for m in metrics_of(folder)) < 1e-9
        with torch.no_grad():
            ours = policy(*batch)[0][batch[3]]
        final = logps(hf_model(folder / "final"))
        torch.testing.assert_close(final, ours, rtol=0, atol=1e-11)
        assert (final - base).abs().max() > 0.01, "the run has learned nothing"
        export_checkpoint(folder / "checkpoints/step_000002", folder / "of_checkpoint")
        again, weights = weights_of(folder / "of_checkpoint"), weights_of(folder / "final")
        assert all(torch.equal(again[weight], weights[weight]) for weight in weights)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)  # peft only warns of adapters that the file lacks
        adapted = peft.PeftModel.from_pretrained(hf_model(models / family), folder / "adapters")
    torch.testing.assert_close(logps(adapted), final, rtol=0, atol=1e-5)  # it keeps adapters in float32


@pytest.mark.parametrize("name", tuple(RUNS))
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_frozen_stays_and_all_else_learns(models, runs, family, name):
    base, final = weights_of(models / family), weights_of(runs(family, name)[0] / "final")
    assert final.keys() == base.keys()
    for weight in base:
        tower = "visual" in weight
        learns = {"lora": re.search(r"\.layers\..*proj(_\w+)?\.weight$", weight) and not tower,
                  "frozen": not tower, "blind": not tower}.get(name, True)
        assert torch.equal(final[weight], base[weight].double()) != bool(learns), weight


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_resumed_run_is_bit_identical(models, runs, tmp_path, family, name):
    folder, _ = runs(family, name)
    shutil.copytree(folder, tmp_path / name)
    shutil.rmtree(tmp_path / name / "checkpoints/step_000002")  # the second of two steps is run again
    shutil.rmtree(tmp_path / name / "final")
    start(models, family, name, tmp_path / name, save_every=1, resume=True)
    same_metrics(tmp_path / name, folder, 0)
    final, again = weights_of(folder / "final"), weights_of(tmp_path / name / "final")
    assert all(torch.equal(final[weight], again[weight]) for weight in final)


@pytest.mark.parametrize("name", ["grpo", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_change_nothing(models, runs, tmp_path, family, name):
    start(models, family, name, tmp_path, gradient_checkpointing=True)
    same_runs(models, family, tmp_path, runs(family, name)[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_is_evaluated_with_and_without_its_videos(runs, tmp_path, family):
    folder, _ = runs(family, "grpo")
    told = []
    for video in ("full", "text_only", "blank"):
        row, *_ = evaluate.main(eval_args(
            tmp_path / video, model=str(folder / "final"), data_root=str(toy.ROOT), image_size=image_size(family),
            eval_files=["annotations/validation_L1.jsonl"], max_questions=4, max_completion_length=12, num_workers=0,
            video=video, compare=str(tmp_path / "full") if told else ""))
        assert (row["n"], row["unreadable"]) == (4, 0)
        told.append((tmp_path / video / "samples.jsonl").read_text())
    assert len(set(told)) == 3, "the model does not see what it is shown"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_takes_part_where_there_is_nothing_to_see_or_to_learn(models, batches, family):
    examples, (_, _, ids, mask, temperature, banned) = batches(family, "text_only")
    qwen = hf_model(models / family).train()
    with torch.no_grad():
        blind = hugging_faces(qwen, examples, *batches(family, "text_only")[1])
    nothing = (collate_prompts([], ids.device), torch.zeros(0, dtype=torch.int64), ids[:0], mask[:0])
    for batch in (batches(family, "text_only")[1], (*nothing, temperature, banned)):
        policy = Policy(copy.deepcopy(qwen), torch.float64)
        logps, _ = policy(*batch)
        assert logps.shape == batch[2].shape
        torch.testing.assert_close(logps[batch[3]], blind[:int(batch[3].sum())], rtol=0, atol=1e-12)
        logps.sum().backward()
        for name, weight in policy.named_parameters():  # under FSDP it is this gradient that the other ranks wait for
            assert weight.grad is not None, name
            assert weight.grad.any() == (len(logps) > 0 and "visual" not in name), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sampler_computes_what_the_sharded_policy_does_to_the_last_bit_of_bfloat16(models, batches, device, family):
    args = load_args(model=str(models / family), dtype="bfloat16")
    policy = runtime.load_policy(args, device)
    sampler = Policy(runtime.make_sampler(policy, device), torch.bfloat16)
    _, batch = batches(family)
    with torch.no_grad():
        assert torch.equal(policy(*batch)[0], sampler(*batch)[0])


def test_an_image_size_that_a_family_cannot_cut_is_refused_with_one_that_it_can(models, tmp_path, world):
    # The toy world's 56 pixels, which any small model gets for default.
    args = parse_args(grpo_video.Args, grpo_video.TOY, ["--model", str(models / "qwen3_vl"), "--output_dir",
                                                        str(tmp_path / "run")])
    with pytest.raises(ValueError, match="image_size is 56; for this model it must be a multiple of 32, such as 64"):
        grpo_video.main(args)
    assert not (tmp_path / "run").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Two processes.

@pytest.mark.parametrize("names", [["grpo"], ["lora", "frozen", "blind", "sft"]])
def test_two_ranks_make_the_updates_of_one(models, runs, tmp_path, names):
    torchrun("tests/test_families_runs.py", 2, str(models), str(tmp_path), *names)
    for family, name in itertools.product(FAMILIES, names):
        one, two = runs(family, name)[0], tmp_path / family / name
        assert all(m["grad_norm"] > 0 for m in metrics_of(one))
        if name != "sft":
            assert [m["flat_group_frac"] for m in metrics_of(one)] == [0, 0.5], "rank 1 has learned in both steps"
        same_runs(models, family, two, one)


if __name__ == "__main__":
    models, out = map(Path, sys.argv[1:3])
    for family, name in itertools.product(FAMILIES, sys.argv[3:]):
        start(models, family, name, out / family / name)
    runtime.end(0)
