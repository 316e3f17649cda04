"""What the model gets to see (--video), and what of the training file is left out as it is answered without looking."""
import dataclasses
import json
import random
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2VLForConditionalGeneration

import evaluate
import grpo_video
import sft_video
import toy
from conftest import PIXELS, QWEN2_VL
from data import (
    VIDEO,
    VideoDataset,
    control_frames,
    file_names,
    leave_out,
    load_questions,
    patchify,
    read_image,
    read_video,
)
from model import Policy, collate_prompts
from runtime import load_tokenizer
from test_train import eval_args, grpo_args, metrics_of, relative_difference, sft_args, small_world, torchrun, update


@pytest.fixture(scope="module")
def questions(world):
    return load_questions("annotations/training_6k.jsonl", world)


def shown(questions, tokenizer, video, seed=0):
    return VideoDataset(questions, tokenizer, QWEN2_VL, PIXELS, seed, video)


@pytest.fixture(scope="module")
def index(questions):
    return next(i for i, question in enumerate(questions) if len(question.progress) == 3)


# ----------------------------------------------------------------------------------------------------------------------
# What an example holds under each setting.

def test_frames_of_each_setting_equal_a_loop():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 2, 3, 3), np.uint8)
    before = pixels.copy()
    for video in VIDEO:
        out = control_frames(pixels, video, random.Random(0))
        assert out.shape == pixels.shape and out.dtype == np.uint8
        for f in range(6):
            if video == "blank":
                assert (out[f] == 128).all()
            elif video == "reversed":
                assert (out[f] == pixels[5 - f]).all()
            elif video == "single_frame":
                assert (out[f] == pixels[5]).all()
            elif video == "shuffled":
                assert sum((out[f] == frame).all() for frame in pixels) == 1
            else:
                assert (out[f] == pixels[f]).all()
    assert (pixels == before).all()
    for seed in range(9):
        assert (control_frames(pixels[:2], "shuffled", random.Random(seed)) == pixels[1::-1]).all()
    shuffled = [control_frames(pixels, "shuffled", random.Random(seed)) for seed in range(50)]
    own, orders = pixels[:, 0, 0, 0].tolist(), {tuple(frames[:, 0, 0, 0].tolist()) for frames in shuffled}
    assert len(orders) > 40 and tuple(own) not in orders and all(sorted(order) == sorted(own) for order in orders)


def test_only_the_video_changes(questions, tokenizer, index):
    full = shown(questions, tokenizer, "full")[0, index]
    frames, _ = read_video(questions[index].video, PIXELS)
    image, _ = patchify(read_image(questions[index].image, PIXELS), QWEN2_VL)
    assert torch.equal(full.pixel_values_videos, patchify(frames, QWEN2_VL)[0])
    wanted = {"blank": np.full_like(frames, 128), "reversed": frames[::-1],
              "single_frame": np.stack([frames[-1]] * len(frames))}
    for video in ("blank", "shuffled", "reversed", "single_frame", "random"):
        example = shown(questions, tokenizer, video)[0, index]
        assert torch.equal(example.pixel_values, image)
        assert (example.options, example.gold, example.prompt_text) == (full.options, full.gold, full.prompt_text)
        assert not torch.equal(example.pixel_values_videos, full.pixel_values_videos)
        if video != "random":  # another video may be shorter
            assert torch.equal(example.prompt_ids, full.prompt_ids)
            assert torch.equal(example.position_ids, full.position_ids)
        if video in wanted:
            assert torch.equal(example.pixel_values_videos, patchify(wanted[video].copy(), QWEN2_VL)[0])


def test_questions_without_a_video_stay_as_they_are(questions, tokenizer):
    i = next(i for i, question in enumerate(questions) if not question.video)
    full = shown(questions, tokenizer, "full")[0, i]
    for video in set(VIDEO) - {"text_only", "no_image"}:
        example = shown(questions, tokenizer, video)[0, i]
        assert example.pixel_values_videos is None and torch.equal(example.pixel_values, full.pixel_values)


def test_another_video_is_one_of_another_progress_and_follows_from_seed_and_epoch(questions, tokenizer, index):
    videos = {question.video: question for question in questions if question.video}
    others = shown(questions, tokenizer, "random").other_videos(questions[index])
    assert {len(videos[path].progress) for path in others} == {1, 2, 4, 5}
    assert set(others) == {path for path, question in videos.items() if len(question.progress) != 3}  # so not its own
    elsewhere = [question for question in questions if question.video and len(question.progress) != 3]
    few = [questions[index], *elsewhere[:6]]
    patches = {str(question.video): patchify(read_video(question.video, PIXELS)[0], QWEN2_VL)[0] for question in few}

    def drawn(seed, epoch):
        values = shown(few, tokenizer, "random", seed)[epoch, 0].pixel_values_videos
        return next(path for path, own in patches.items() if own.shape == values.shape and torch.equal(own, values))

    by_seed, by_epoch = {drawn(seed, 0) for seed in range(20)}, {drawn(0, epoch) for epoch in range(20)}
    assert len(by_seed) > 3 and len(by_epoch) > 3 and str(questions[index].video) not in by_seed | by_epoch
    assert drawn(3, 5) == drawn(3, 5)


def test_where_a_file_tells_no_progress_any_other_video_will_do(questions, tokenizer):
    untold = [dataclasses.replace(question, progress=()) for question in questions if question.video][:4]
    others = shown(untold, tokenizer, "random").other_videos(untold[0])
    assert set(others) == {question.video for question in untold[1:]}
    alike = [question for question in questions if len(question.progress) == 2][:3]
    for lonely in (untold[:1], alike):
        with pytest.raises(ValueError, match="--video random: there is no other video for question"):
            shown(lonely, tokenizer, "random")
        assert len(shown(lonely, tokenizer, "blank")) == len(lonely)


def test_text_only_has_no_vision_token_and_needs_no_file(questions, tokenizer, index, tmp_path):
    lost = dataclasses.replace(questions[index], video=tmp_path / "gone.mp4", image=tmp_path / "gone.png")
    example = shown([lost], tokenizer, "text_only")[0, 0]
    assert not example.error and example.pixel_values is None and example.pixel_values_videos is None
    pads = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>", "<|vision_start|>"])
    assert not torch.isin(example.prompt_ids, torch.tensor(pads)).any()
    assert torch.equal(example.position_ids, torch.arange(len(example.prompt_ids)).expand(3, -1))
    assert all(shown([lost], tokenizer, video)[0, 0].error for video in ("full", "blank", "reversed"))


def test_no_image_is_the_video_alone(questions, tokenizer, index):
    """As if the question had none; and one without a video is text."""
    without = dataclasses.replace(questions[index], image=None)
    example, same = shown(questions, tokenizer, "no_image")[0, index], shown([without], tokenizer, "full")[0, 0]
    assert example.pixel_values is None and example.image_grid_thw is None
    for name in ("prompt_ids", "position_ids", "pixel_values_videos"):
        assert torch.equal(getattr(example, name), getattr(same, name))
    i = next(i for i, question in enumerate(questions) if not question.video)
    assert torch.equal(shown(questions, tokenizer, "no_image")[0, i].prompt_ids,
                       shown(questions, tokenizer, "text_only")[0, i].prompt_ids)


def test_text_only_logps_equal_hugging_faces(questions, tokenizer):
    qwen = Qwen2VLForConditionalGeneration.from_pretrained(toy.BASE, dtype=torch.float64)
    examples = [shown(questions, tokenizer, "text_only")[0, i] for i in (0, 1)]
    target = torch.tensor([tokenizer("<think>I see wash pot.</think><|im_end|>")["input_ids"]] * 2)
    prompts, mask = collate_prompts(examples, torch.device("cpu")), torch.ones_like(target).bool()
    mine = Policy(qwen, torch.float64)(prompts, torch.tensor([0, 1]), target, mask)[0]
    for row, example, ids in zip(mine, examples, target):
        logits = qwen(input_ids=torch.cat([example.prompt_ids, ids])[None]).logits[0]
        theirs = logits.log_softmax(-1)[len(example.prompt_ids) - 1:-1].gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(row, theirs, rtol=0, atol=1e-9)


def test_unknown_settings_are_refused(questions, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="--video 'grey': must be one of full, text_only, no_image, blank"):
        shown(questions, tokenizer, "grey")
    for main, args in ((grpo_video.main, grpo_args), (sft_video.main, sft_args), (evaluate.main, eval_args)):
        with pytest.raises(ValueError, match="--video 'grey'"):
            main(args(tmp_path / "out", video="grey"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_whose_vision_tokens_are_not_the_models_is_an_error(tmp_path):
    """Else a prompt would hold no vision token that the model knows, and it would train without any video."""
    base = tmp_path / "base"
    shutil.copytree(toy.BASE, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "video_token_id": config["video_token_id"] + 1}))
    with pytest.raises(ValueError, match=r"<\|video_pad\|> is token \d+ of its tokenizer and \d+ of its config"):
        load_tokenizer(str(base))
    (base / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(base)  # knows no vision token at all
    for script, args in ((grpo_video, grpo_args), (sft_video, sft_args), (evaluate, eval_args)):
        with pytest.raises(ValueError, match=r"<\|image_pad\|> is token None of its tokenizer"):
            script.main(args(tmp_path / "out", model=str(base)))


def test_a_run_says_what_its_prompts_hold(questions, tokenizer):
    say = {video: shown(questions, tokenizer, video).describe_prompt() for video in VIDEO}
    i = next(i for i, question in enumerate(questions) if question.video)
    example = shown(questions, tokenizer, "full")[0, i]
    frames, tokens = 2 * int(example.video_grid_thw[0, 0]), int(example.video_grid_thw.prod()) // 4
    video = f"video of {frames} frames of 56 x 56 pixels ({tokens} vision tokens)"
    assert f"{video}, image of 56 x 56 pixels (4 vision tokens)" in say["full"]
    assert say["full"].startswith("704 questions, 640 with a video; --video full: the video; prompt of question ")
    assert say["full"].endswith(f"{len(example.prompt_ids)} tokens in all")
    assert "no video, no image" in say["text_only"] and "--video text_only" in say["text_only"]
    lost = dataclasses.replace(questions[i], video=questions[i].video.with_name("gone.mp4"))
    assert "none of 1 could be read, the last: " in shown([lost], tokenizer, "full").describe_prompt()
    said = shown([lost, questions[i]], tokenizer, "full").describe_prompt()
    assert f"prompt of question {questions[i].id}: video" in said


# ----------------------------------------------------------------------------------------------------------------------
# In the trainers and in evaluation.

def test_training_blind_is_training_on_grey_files(tmp_path, world):
    """One step of --video blank is one step on the same questions whose videos are grey files."""
    args = dict(dtype="float64", prompts_per_step=8, learning_rate=1e-4, frame_cache="", kl_coef=0.1)
    root = small_world(tmp_path / "data", world, keep=8)
    grpo_video.main(grpo_args(tmp_path / "blind", data_root=str(root), video="blank", **args))
    grpo_video.main(grpo_args(tmp_path / "seeing", data_root=str(root), **args))
    assert json.loads((tmp_path / "blind/args.json").read_text())["video"] == "blank"
    for question in load_questions("annotations/training_6k.jsonl", root):
        if question.video:
            toy.write_video(question.video, np.full((32, 56, 56, 3), 128, np.uint8))
    grpo_video.main(grpo_args(tmp_path / "grey", data_root=str(root), **args))
    blind, grey, seeing = (metrics_of(tmp_path / name)[0] for name in ("blind", "grey", "seeing"))
    assert (blind["completion_length"], blind["reward"]) == (grey["completion_length"], grey["reward"])
    # Not to the last bit: H.264's grey is not exact.
    assert relative_difference(update(tmp_path / "blind/final"), update(tmp_path / "grey/final")) < 0.05
    assert relative_difference(update(tmp_path / "blind/final"), update(tmp_path / "seeing/final")) > 0.1


@pytest.mark.slow
def test_two_ranks_without_any_pixels_make_the_update_of_one(tmp_path, world):
    # The base has never met a prompt without an image and answers none; a little SFT on such prompts teaches it to.
    model = sft_video.main(sft_args(tmp_path / "sft", video="text_only", max_steps=8, learning_rate=1e-3))
    flags = dict(model=str(model), dtype="float64", prompts_per_step=8, learning_rate=1e-4, video="text_only",
                 micro_batch_size=20)
    words = [w for k, v in {**flags, "max_steps": 1, "max_completion_length": 40}.items() for w in (f"--{k}", str(v))]
    torchrun("grpo_video.py", 2, *words, "--output_dir", str(tmp_path / "two"))
    grpo_video.main(grpo_args(tmp_path / "one", **flags))
    one, two = (update(tmp_path / name / "final", model) for name in ("one", "two"))
    assert one.norm() > 0 and relative_difference(two, one) < 1e-9


def test_evaluation_takes_training_files_and_its_seed_orders_their_options(tmp_path, world):
    options, few = [], dict(eval_files=["annotations/training_6k.jsonl"], max_questions=12)
    for seed in (0, 1):
        rows = evaluate.main(eval_args(tmp_path / str(seed), **few, seed=seed, video="blank"))
        assert rows[0]["n"] == 12 and rows[0]["chance"] == 0.25
        records = [json.loads(line) for line in (tmp_path / str(seed) / "samples.jsonl").read_text().splitlines()]
        options.append({r["sample_id"]: r["options"] for r in records})
        by_id = {question.id: question for question in load_questions("annotations/training_6k.jsonl", world)}
        for r in records:
            question = by_id[r["sample_id"]]
            assert r["options"]["ABCD".index(r["gold"])] == question.answer and r["question"] == question.text
            assert (r["video"], r["image"]) == file_names(question) and tuple(r["progress"]) == question.progress
        assert json.loads((tmp_path / str(seed) / "results.json").read_text())["settings"]["video"] == "blank"
    assert options[0].keys() == options[1].keys() and options[0] != options[1]
    with pytest.raises(ValueError, match="questions are not the same.*--seed"):
        evaluate.main(eval_args(tmp_path / "2", **few, compare=str(tmp_path / "1")))


def write_answers(path, questions, right):
    with path.open("w") as file:
        for question in questions:
            video, image = file_names(question)
            answer = {"sample_id": question.id, "video": video, "image": image, "correct": question.id in right}
            file.write(json.dumps(answer) + "\n")
    return str(path)


def test_questions_are_left_out_that_all_evaluations_answered(questions, tmp_path, world):
    few = questions[:20]
    ids = [question.id for question in few]
    one = write_answers(tmp_path / "1.jsonl", few, ids[:8])
    two = write_answers(tmp_path / "2.jsonl", few, ids[4:12])
    assert leave_out(questions, []) == questions
    assert [s.id for s in leave_out(few, [one])] == ids[8:]
    assert [s.id for s in leave_out(few, [one, two])] == ids[:4] + ids[8:]
    assert leave_out(questions, [one])[:12] == questions[8:20]  # an evaluation of a part of the file
    cot = {s.id: s for s in load_questions("annotations/training_with_cot_6k.jsonl", world)}
    assert [s.id for s in leave_out([cot[i] for i in ids], [one])] == ids[8:]  # the SFT file has the same ids


def test_evaluations_of_other_questions_are_refused(questions, tmp_path, world):
    few = questions[:20]
    level = load_questions("annotations/validation_L1.jsonl", world)  # its ids are 0, 1, 2, .. as well
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"correct": false}\n')
    for path, match in ((write_answers(tmp_path / "L1.jsonl", level, {s.id for s in level}), "none of its questions"),
                        (write_answers(tmp_path / "other.jsonl", questions[30:40], set()), "none of its questions"),
                        (str(torn), "not the samples.jsonl"),
                        (str(tmp_path / "nowhere.jsonl"), "not the samples.jsonl"),
                        (str(world / "annotations/training_6k.jsonl"), "not the samples")):
        with pytest.raises(ValueError, match=match):
            leave_out(few, [path])
    both = write_answers(tmp_path / "both.jsonl", [*level, *few], {s.id for s in level} | {few[0].id})
    assert len(leave_out(few, [both])) < len(few)  # evaluated together with a level: its questions are told apart
    with pytest.raises(ValueError, match="named twice"):
        leave_out(few, [both, both])
    everything = write_answers(tmp_path / "all.jsonl", few, {s.id for s in few})
    with pytest.raises(ValueError, match="no question to learn from"):
        leave_out(few, [everything])
    record = json.loads((world / "annotations/training_with_cot_6k.jsonl").read_text().split("\n")[0])
    del record["sample_id"]
    (tmp_path / "unnamed.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match="needs a 'sample_id' in every training record; 1 have none"):
        leave_out(load_questions(tmp_path / "unnamed.jsonl", world), [everything])


@pytest.mark.parametrize("module, args, file", [(grpo_video, grpo_args, "training_6k"),
                                                (sft_video, sft_args, "training_with_cot_6k")])
def test_the_trainers_leave_out_what_an_evaluation_answered(tmp_path, world, capsys, module, args, file):
    root = small_world(tmp_path / "data", world, keep=8)
    questions = load_questions("annotations/training_6k.jsonl", root)
    blind = write_answers(tmp_path / "blind.jsonl", questions, {s.id for s in questions[:5]})
    module.main(args(tmp_path / "run", data_root=str(root), leave_out=[blind], prompts_per_step=3, max_steps=0,
                     num_epochs=1))
    assert f"annotations/{file}.jsonl: 3 questions" in capsys.readouterr().out
    assert len(metrics_of(tmp_path / "run")) == 1  # 3 questions, 3 a step


# ----------------------------------------------------------------------------------------------------------------------
# Two evaluations side by side.

def record(i, parsed, gold="A", video=True, part="", file="annotations/validation_L1.jsonl"):
    return {"file": file, "sample_id": str(i), "part": part, "video": "x.mp4" if video else "",
            "options": ["w", "x", "y", "z"], "gold": gold, "parsed": parsed, "correct": parsed == gold,
            "truncated": False, "error": ""}


def test_comparison_counts_what_a_loop_counts():
    rng = random.Random(0)
    answers = [(rng.choice("ABCD"), rng.choice(["A", "A", "B", None]), rng.choice(["A", "C", "D", None]),
                rng.random() < 0.8) for _ in range(200)]
    a = [record(i, x, gold, video) for i, (gold, x, _, video) in enumerate(answers)]
    b = [record(i, y, gold, video) for i, (gold, _, y, video) in enumerate(answers)]
    rows = {row["part"]: row for row in evaluate.compare(a, b[::-1], "there")}
    assert list(rows) == ["", "with a video", "image only"]
    for part, keep in (("", (True, False)), ("with a video", (True,)), ("image only", (False,))):
        both = only_a = only_b = neither = flips = 0
        for gold, x, y, video in answers:
            if video in keep:
                both += x == gold and y == gold
                only_a += x == gold and y != gold
                only_b += x != gold and y == gold
                neither += x != gold and y != gold
                flips += x != y
        row, n = rows[part], both + only_a + only_b + neither
        assert (row["both"], row["only_a"], row["only_b"], row["neither"]) == (both, only_a, only_b, neither)
        assert row["n"] == n and row["flip_rate"] == flips / n and row["chance"] == 0.25
        assert row["difference"] == pytest.approx((both + only_a) / n - (both + only_b) / n)
        assert row["missed"] == only_a + neither and row["accuracy_on_missed"] == only_a / (only_a + neither)
        assert row["mcnemar_p"] == evaluate.mcnemar_p(only_a, only_b)
        assert row["difference_interval"][0] < row["difference"] < row["difference_interval"][1]


@pytest.mark.parametrize("p", [(0.3, 0.2, 0.2, 0.3), (0.5, 0.3, 0.02, 0.18), (0.85, 0.1, 0.02, 0.03)])
def test_paired_intervals_hold_the_true_difference_19_times_in_20(p):
    counts = np.random.default_rng(0).multinomial(60, p, size=4000)
    held = 0
    for _, only_a, only_b, _ in counts.tolist():
        low, high = evaluate.paired_interval(only_a, only_b, 60)
        held += low <= p[1] - p[2] <= high
    assert 0.93 < held / 4000 < 0.99


def test_paired_interval_by_hand():
    # 100 questions, 20 only a, 8 only b: (20 - 8) / 102 +- 1.96 sqrt(29 - 144 / 102) / 102
    middle, half = 12 / 102, 1.959964 * 27.58824**0.5 / 102
    assert evaluate.paired_interval(20, 8, 100) == pytest.approx((middle - half, middle + half), rel=1e-5)
    assert evaluate.paired_interval(0, 0, 0) == (-1.0, 1.0) and evaluate.paired_interval(5, 0, 5)[1] <= 1


def test_the_run_with_its_videos_comes_first_in_either_order(tmp_path, world, capsys):
    few = dict(max_questions=22, eval_files=["annotations/validation_L1.jsonl"])
    evaluate.main(eval_args(tmp_path / "full", **few))
    evaluate.main(eval_args(tmp_path / "blind", video="text_only", compare=str(tmp_path / "full"), **few))
    evaluate.main(eval_args(tmp_path / "full2", compare=str(tmp_path / "blind"), **few))
    compared = [json.loads((tmp_path / name / "results.json").read_text())["compared"] for name in ("blind", "full2")]
    assert compared[0]["table"] == compared[1]["table"] and compared[0]["table"][0]["n"] == 22
    assert [(c["a"]["video"], c["b"]["video"]) for c in compared] == [("full", "text_only")] * 2
    assert compared[0]["a"]["output_dir"] == str(tmp_path / "full")
    assert compared[0]["b"]["output_dir"] == str(tmp_path / "blind")
    printed = capsys.readouterr().out
    assert printed.count("--video full\nb: ") == 2 and printed.count("multi-modal gain") == 2
    for damage, match in ((lambda folder: (folder / "args.json").write_text('{"grader": "strict"}'), "earlier version"),
                          (lambda folder: (folder / "args.json").unlink(), "no samples.jsonl and args.json")):
        damage(tmp_path / "full")
        with pytest.raises(ValueError, match=match):
            evaluate.main(eval_args(tmp_path / "late", compare=str(tmp_path / "full"), **few))
    assert not (tmp_path / "late").exists()


def test_published_numbers_stand_beside_no_blind_run():
    records = [record(i, "A", file="x/validation_L1.jsonl") for i in range(2432)]
    assert evaluate.summarise(records)[0]["published"] == (34.79, 43.79, 46.01)
    assert evaluate.summarise(records, "random")[0]["published"] is None
