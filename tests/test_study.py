"""The study: its driver, the files it makes, what it measures, and that docs/study.md shows what was measured."""
import itertools
import json
import math
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import attention
import distance
import evaluate
import grpo_video
import habit
import own_answers
import runtime
import sft_video
import study
import study_numbers
import study_pictures
import study_report
import subset
import teachers
import tiny
import toy
from data import build_options, load_questions
from docs import arms

ROOT = Path(__file__).resolve().parent.parent
SUMMARIES = study_report.load(ROOT / "docs/study")
ON_PAGE = set(re.findall(r"^## (S\d+):", (ROOT / "docs/study.md").read_text(), re.MULTILINE))


# ----------------------------------------------------------------------------------------------------------------------
# What is committed.

def test_rates_are_those_that_the_rule_chooses():
    for arm in study.CANDIDATES:
        assert study.choose_rate(arm, lambda name: SUMMARIES[name][0]) == arms.RATES[arm], arm


def test_the_rule_takes_the_smallest_of_equals():
    answers = {"sft_3e-5": "110.", "sft_1e-4": "0111", "sft_3e-4": "1110", "sft_1e-3": "0000", "sft_3e-3": "...1"}
    found = study.choose_rate("sft", lambda name: {"tuning": {"command": "111111", "file": {"right": answers[name]}}})
    assert found == 1e-4


def test_tables_and_pictures_are_those_of_the_summaries():
    assert study_report.stale(SUMMARIES) == []


def test_a_changed_summary_makes_tables_and_pictures_stale():
    name = arms.chosen("grpo")
    changed = json.loads(json.dumps(SUMMARIES))
    answers = changed[name][0]["full"][study_report.FRESH_FILES[0]]
    answers["right"] = "0" * len(answers["right"])
    pictures = {f"study_{question.lower()}.png" for question in ON_PAGE - {"S4"}}  # GRPO is in all of them
    assert pictures | {"table S1", "table S2 differences", "table S5"} <= set(study_report.stale(changed))


@pytest.mark.parametrize("question", [*sorted(ON_PAGE), "tuning"])
def test_all_runs_on_the_page_are_there_of_the_commands_of_today(question):
    """A seed that is left out would be a choice; a run whose flags were changed, drawn as something that it is not."""
    driver = study.Study(study.Setting(), 1, study.asked_parts([question]))
    for name in arms.STUDIES[question]:
        for seed in study.seeds_of(name, study.SEEDS):
            assert not driver.missing(study.RUNS[name], seed), (name, seed)


def test_the_order_of_questions_is_that_of_the_summaries():
    """What the toy world draws again, steps and goals, belongs to the answers that the summaries keep."""
    for file in study_numbers.FRESH_FILES:
        answers = SUMMARIES["base"][0]["full"][file]
        records = toy.make_records(file[-2:], int(file[5]))
        records = sorted((r for r in records if r["video_basename"]), key=lambda r: str(r["sample_id"]))
        assert [answers["goals"][ord(task) - 97] for task in answers["tasks"]] == [r["task_goal"] for r in records]
        steps = [len(r["task_progress_metadata"]) for r in records]
        assert study_numbers.steps_done_in(file, len(answers["right"])).tolist() == steps
        few = [r["sample_id"] for r in toy.make_records(file[-2:], int(file[5])) if r["video_basename"]][:30]
        of_few = [done for done, r in zip(steps, records) if r["sample_id"] in few]  # an evaluation of a part of it
        assert study_numbers.steps_done_in(file, 30).tolist() == of_few


def test_accuracy_where_the_habit_is_right_and_wrong_is_that_of_the_questions():
    runs = {"x": [{"full": {file: {"right": "".join("1" if done in (1, 4) else ".0"[i % 2] for i, done in enumerate(
        study_numbers.steps_done_in(file, 320)))} for file in study_numbers.FRESH_FILES}}]}
    found = [study_numbers.accuracy_where(runs, "x", by_habit).tolist() for by_habit in (True, False)]
    assert found == [[100], [0]] and study_numbers.accuracies(runs, "x", "full", study_numbers.FRESH_FILES) == 40


@pytest.mark.parametrize("run", study.RUNS.values(), ids=lambda run: run.name)
def test_every_arm_learns_from_the_budget(run):
    setting, questions = study.Setting(), 0
    for share in [run] + ([study.RUNS[run.after]] if run.after else []):
        if share.script:
            command = study.parts(share, 0, setting)["train"]
            steps = int(command[command.index("--max_steps") + 1])
            questions += steps * (setting.sft_batch if share.script == study.SFT else setting.grpo_batch)
    whole = {"base": 0, "few": setting.budget // 11, "half": setting.budget // 2}
    assert questions == whole.get(run.name, setting.budget)


# ----------------------------------------------------------------------------------------------------------------------
# Statistics.

def made_up(seed: int, questions: int = 60) -> dict:
    """Two models equally good on the whole, three seeds each; on each of 12 tasks, shared by the files, one is better,
    by chance."""
    rng, tasks = random.Random(seed), "".join(chr(97 + i % 12) for i in range(questions))
    level = {name: {task: rng.uniform(0.2, 0.8) for task in set(tasks)} for name in "ab"}
    return {name: [{"full": {file: {
        "goals": sorted(set(tasks)), "tasks": tasks,
        "right": "".join("1" if rng.random() < level[name][task] else rng.choice("0.") for task in tasks)}
        for file in study_report.FRESH_FILES}} for _ in range(3)] for name in "ab"}


def test_a_difference_is_that_of_the_means():
    runs, files = made_up(0), study_report.FRESH_FILES
    mean, low, high, apart = study_report.difference(runs, "a", "b", files)
    counts = {name: [sum(seed["full"][file]["right"].count("1") for file in files) for seed in runs[name]]
              for name in "ab"}
    assert mean == pytest.approx(100 * (sum(counts["a"]) - sum(counts["b"])) / 3 / 180)
    assert low < mean < high
    assert apart == (min(counts["a"]) > max(counts["b"]) or min(counts["b"]) > max(counts["a"]))


def test_files_weigh_the_same_and_seeds_need_not_be_as_many():
    """By hand: 1 of 2 questions against 0 of 2, 1 of 4 against 1 of 4, and 0 of 1 against 1 of 1."""
    def answers(*rights):
        return {"full": {file: {"goals": ["x"], "tasks": "a" * len(right), "right": right}
                         for file, right in zip(study_numbers.FRESH_FILES, rights)}}

    runs = {"a": [answers("10", "1000", "0")], "b": [answers("00", "0100", "1"), answers("00", "0001", "1")]}
    files = study_numbers.FRESH_FILES
    assert study_numbers.difference(runs, "a", "b", files)[0] == pytest.approx((50 + 0 - 100) / 3)
    assert study_numbers.accuracies(runs, "b", "full", files).tolist() == pytest.approx([(0 + 25 + 100) / 3] * 2)
    more = [(1, "a", "full"), (-1, "b", "full"), (1, "b", "full"), (1, "b", "full")]
    assert study_numbers.contrast(runs, more, files)[0] == pytest.approx((50 + 50 + 100) / 3)
    runs["b"][0]["full"][files[0]]["tasks"] = "ab"
    with pytest.raises(AssertionError):  # other questions
        study_numbers.difference(runs, "a", "b", files)


@pytest.mark.parametrize("lacking", ["random", "fresh", "questions"])
def test_the_report_draws_what_there_is(lacking, tmp_path):
    """Of a study that asked one question, of one on real data, of a quick one."""
    changed = json.loads(json.dumps(SUMMARIES))
    for summary in [summary for seeds in changed.values() for summary in seeds]:
        if lacking == "random":
            summary.pop("random", None)
        for part in [summary[part] for part in arms.EVALUATIONS if part in summary]:
            for file in set(part) - {"command"}:
                if lacking == "fresh" and "fresh" in file:
                    del part[file]
                elif lacking == "questions":
                    part[file] |= {"right": part[file]["right"][:70], "tasks": part[file]["tasks"][:70],
                                   "agrees": part[file]["agrees"][:70]}
    study_report.tables(changed)
    for name, numbers in study_report.drawn_numbers(changed).items():
        study_pictures.DRAW[name](numbers)
    study_pictures.plt.close("all")


def test_an_interval_covers_as_often_as_it_says():
    """About 95 in 100, somewhat less for 12 tasks. An interval over questions would cover in some 70."""
    covered = sum(low <= 0 <= high for low, high in (
        study_report.difference(made_up(seed), "a", "b", study_report.FRESH_FILES, draws=400)[1:3]
        for seed in range(200)))
    assert 170 <= covered <= 196


def test_forward_kl_is_the_mean_over_completions_and_its_error_that_of_questions():
    rng = np.random.default_rng(0)
    base, trained = rng.normal(size=(2, 6, 5))
    mean, error = distance.forward_kl(torch.tensor(base), torch.tensor(trained), group_size=2)
    of_question = [sum(sum(base[n] - trained[n]) for n in (i, i + 1)) / 2 for i in (0, 2, 4)]
    assert mean == pytest.approx(sum(of_question) / 3)
    spread = sum((x - mean) ** 2 for x in of_question) / 2
    assert error == pytest.approx(math.sqrt(spread / 3))


def test_a_model_is_at_no_distance_from_itself_and_at_some_from_another(tmp_path, world):
    flags = dict(grpo_video.TOY) | dict(model=str(toy.BASE), data_root=str(world), num_workers=0, num_questions=16,
                                        output_file=str(tmp_path / "d.json"))
    distance.main(distance.Args(**flags, trained=str(toy.BASE)))
    same = json.loads((tmp_path / "d.json").read_text())
    assert abs(same["forward_kl"]) < 1e-4 and same["completions"] == 128
    other = tmp_path / "other"
    shutil.copytree(toy.BASE, other)
    weights = load_file(other / "model.safetensors")
    name = "model.norm.weight"
    save_file(weights | {name: weights[name] * 10}, other / "model.safetensors", metadata={"format": "pt"})
    distance.main(distance.Args(**flags, trained=str(other)))
    assert json.loads((tmp_path / "d.json").read_text())["forward_kl"] > 1


# ----------------------------------------------------------------------------------------------------------------------
# The training files.

@pytest.fixture(scope="module")
def told():
    """teacher -> its records, and those of the world's own."""
    own = [toy.make_sft_record(record) for record in toy.make_records("train")]
    return {"own": own, **{teacher: teachers.write_records(teacher) for teacher in study.TEACHERS}}


@pytest.mark.parametrize("percent", arms.HABITS)
def test_the_habit_answers_as_many_questions_as_the_file_says(percent):
    """The habit: the recipe's second step. The world's own questions are kept as far as there are enough of a kind."""
    own, records = toy.make_records("train"), habit.make_file(percent)
    seen = [record for record in records if record["video_basename"]]
    by_habit = np.mean([record["answer"] == toy.RECIPES[record["task_goal"].lower()][1] for record in seen])
    assert by_habit == percent / 100
    assert [record["sample_id"] for record in records] == list(range(len(own)))
    assert len({record["video_id"] for record in records}) == len(own)
    for group in (lambda r: r["task_goal"], lambda r: not r["video_basename"]):
        assert Counter(map(group, records)) == Counter(map(group, own))
    of_points = Counter(len(record["task_progress_metadata"]) for record in seen)
    assert of_points[1] == of_points[4] and max(of_points[n] for n in (2, 3, 5)) <= min(
        of_points[n] for n in (2, 3, 5)) + 1
    for record in records:  # as the world makes them
        done = len(record["task_progress_metadata"])
        recipe = toy.RECIPES[record["task_goal"].lower()]
        assert record["answer"] == recipe[done] and set(record["negative_answers"]) == set(recipe) - {recipe[done]}
    new = [record["video_id"] for record in records if "fresh" in record["video_id"]]
    others = {r["video_id"] for other in arms.HABITS if other != percent for r in habit.make_file(other)}
    assert new and not others & set(new)  # two at a time would write each other's files


def test_parts_of_both_training_files_hold_the_same_questions(tmp_path, world, monkeypatch):
    monkeypatch.chdir(world.parent)  # the study names files as they are seen from where it runs
    ids = {}
    for source in ("training_6k", "training_with_cot_6k"):
        for seed in "01":
            subset.main([f"{world.name}/annotations/{source}.jsonl", "16", seed, str(tmp_path / "part.jsonl")])
            lines = (tmp_path / "part.jsonl").read_text().splitlines(keepends=True)
            whole = (world / f"annotations/{source}.jsonl").read_text().splitlines(keepends=True)
            assert [line for line in whole if line in lines] == lines and len(lines) == 44
            ids[source, seed] = [json.loads(line)["sample_id"] for line in lines]
    (first, second), (same, _) = ([ids[source, seed] for seed in "01"] for source in (
        "training_6k", "training_with_cot_6k"))
    assert first == same and len(set(first) & set(second)) < 15


def test_teachers_change_nothing_but_the_response(told):
    for records in told.values():
        for record, own in zip(records, told["own"], strict=True):
            assert {**record, "response": ""} == {**own, "response": ""}


def test_teachers_answer_rightly_but_for_the_one_who_errs_in_a_third(told):
    for teacher, records in told.items():
        wrong = [record["response"][-10:] != own["response"][-10:] for record, own in zip(records, told["own"])]
        assert (0.3 < np.mean(wrong) < 0.4) if teacher == "wrong" else not any(wrong), teacher


def test_each_teacher_reasons_as_its_name_says(told):
    def seen(record):
        return toy.steps_said(record["response"])

    pairs = {teacher: list(zip(records, told["own"])) for teacher, records in told.items()}
    assert all(seen(record) == [] for record, _ in pairs["skips"])
    assert all(seen(record) is None for record, _ in pairs["terse"])
    for record, own in pairs["reversed"]:
        text, (sees, concludes) = record["response"], own["response"][7:].split("</think>")[0].split(" Next")
        assert text.startswith(f"<think>Next{concludes} {sees}</think>")
    assert all(seen(record) == seen(own) for record, own in pairs["wrong"])
    # Each different step is another with a probability of 0.4, less the chance that a random one is the same.
    steps = [(a, b) for record, own in pairs["hallucinates"] if len(seen(record)) == len(seen(own))
             for a, b in set(zip(seen(record), seen(own)))]
    assert 0.35 < np.mean([a != b for a, b in steps]) < 0.45
    for record, own in pairs["hallucinates"]:  # as many beats, though two steps may have become one
        assert len({text["response"].count(",") + text["response"].count("still") for text in (record, own)}) == 1


def test_own_answers_are_right_ended_and_asked_as_grpo_asks(tmp_path, world):
    flags = dict(grpo_video.TOY) | dict(model=str(toy.BASE), data_root=str(world), num_workers=0, max_questions=16,
                                        seed=5, output_file=str(tmp_path / "own.jsonl"))
    own_answers.main(own_answers.Args(**flags))
    records = load_questions(tmp_path / "own.jsonl", world)
    sources = {question.id: question for question in load_questions("annotations/training_6k.jsonl", world)[:16]}
    assert 8 <= len(records) <= 16
    for record in records:
        source = sources[record.id]
        options, gold = build_options(source, 5, 0)
        assert all(f"\n{letter}. {option}\n" in record.text for letter, option in zip("ABCD", options))
        assert (record.video, record.image) == (source.video, source.image)
        assert record.response.endswith(f"<answer>{gold}</answer>")
    sft_video.main(sft_video.Args(**dict(sft_video.TOY) | dict(
        model=str(toy.BASE), data_root=str(world), num_workers=0, train_file=str(tmp_path / "own.jsonl"), max_steps=1,
        prompts_per_step=8, output_dir=str(tmp_path / "sft"))))


def test_own_answers_that_no_training_file_may_have_are_left_out(tmp_path, world, monkeypatch):
    """A base may write a special token, its name, into an answer that is right all the same."""
    texts = itertools.cycle([f"<think>{said}.</think><answer>B</answer>" for said in ("<|im_start|>", "")])
    monkeypatch.setattr(own_answers, "answer_texts", lambda _, examples, ids, *__: [next(texts) for _ in ids])
    monkeypatch.setattr(grpo_video, "accuracy_reward", lambda text, example: 1.0)
    flags = dict(grpo_video.TOY) | dict(model=str(toy.BASE), data_root=str(world), num_workers=0, max_questions=8,
                                        output_file=str(tmp_path / "own.jsonl"))
    own_answers.main(own_answers.Args(**flags))
    assert {question.response for question in load_questions(tmp_path / "own.jsonl", world)} == {
        "<think>.</think><answer>B</answer>"}


# ----------------------------------------------------------------------------------------------------------------------
# The driver.

def wait_for(condition, limit_s=120):
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < limit_s
        time.sleep(0.2)


def test_what_is_missing_is_run_and_nothing_twice(tmp_path, monkeypatch):
    setting, calls = replace(study.Setting(), out="out/study_test", summaries=str(tmp_path)), []
    driver = study.Study(setting, 1)
    monkeypatch.setattr(driver, "call", lambda name, command: calls.append(name))
    weights = iter("aabc")
    monkeypatch.setattr(study, "numbers_of", lambda part, folder: {"weights": next(weights)} if part == "train" and (
        folder.name == "few_grpo_seed0") else {})
    run = study.RUNS["few_grpo"]
    of_model = ["few_seed0 train", "few_grpo_seed0 train"]
    measured = [f"few_grpo_seed0 {part}" for part in ("full", "random", "distance", "attention")]
    driver.do(run, 0)
    assert calls == of_model + measured
    calls.clear()
    driver.do(run, 0)
    assert calls == []  # models are gone, but all numbers are there
    file = driver.summary_file(run, 0)
    summary = json.loads(file.read_text())
    del summary["random"]
    file.write_text(json.dumps(summary))
    driver.do(run, 0)
    assert calls == of_model + measured[1:2]  # the model is needed for it
    calls.clear()
    del summary["full"]
    file.write_text(json.dumps(summary))
    driver.do(run, 0)
    assert calls == of_model + measured  # it came out with other weights: nothing of the old ones is kept
    calls.clear()
    summary["train"]["command"] += " --seed 7"
    file.write_text(json.dumps(summary))
    driver.do(run, 0)
    assert calls == of_model + measured  # another command, another model
    assert json.loads(file.read_text()).keys() == {"train", "full", "random", "distance", "attention"}


def test_what_is_left_out_has_been_answered_before(tmp_path, monkeypatch):
    """S10: the file, then the base's blind answers to it, then the training that leaves them out."""
    setting, calls = replace(study.Setting(), out=f"{tmp_path}/out", summaries=f"{tmp_path}/summaries"), []

    def call(name, command):
        calls.append(name)
        if command[0] == "evaluate.py":
            (tmp_path / "out" / name.replace(" ", "/")).mkdir(parents=True)
            (tmp_path / "out" / name.replace(" ", "/") / "samples.jsonl").touch()
        if command[0] == "docs/habit.py":
            (tmp_path / "out/data").mkdir(parents=True)
            (tmp_path / "out/data/habit30.jsonl").touch()

    driver = study.Study(setting, 1, study.asked_parts(["S10"]))
    monkeypatch.setattr(driver, "call", call)
    monkeypatch.setattr(study, "numbers_of", lambda part, folder: {})
    driver.do(study.RUNS["habit30_left"], 0)
    assert calls == ["habit30", "base blind30_0", "base blind30_1", "habit30_left_seed0 train",
                     "habit30_left_seed0 full", "habit30_left_seed0 random"]
    calls.clear()
    driver.do(study.RUNS["habit30_left"], 1)
    assert calls == [f"habit30_left_seed1 {part}" for part in ("train", "full", "random")]


def test_what_is_left_out_is_of_the_same_file():
    for percent, run in arms.S10["left out"].items():
        assert run.train_file == f"habit{percent}" and run.leave_out == (f"blind{percent}_0", f"blind{percent}_1")
        blind = study.parts(arms.base, 0, study.Setting())
        for part in run.leave_out:
            assert blind[part][blind[part].index("--eval_files") + 1] == study.Setting().train_file(run.train_file)


def test_a_question_asks_for_its_own_parts(tmp_path):
    driver = study.Study(replace(study.Setting(), summaries=str(tmp_path)), 1, study.asked_parts(["S7"]))
    assert [*driver.missing(arms.point, 0)] == ["train", "full", "distance"]
    driver.asked = study.asked_parts(["S6", "grpo_2e-5"])  # by name: everything
    assert {"frames_8", "no_image", "random", "attention", "tuning"} <= driver.missing(arms.point, 0).keys()
    driver.asked = study.asked_parts(["tuning"])
    assert [*driver.missing(arms.point, 0)] == ["train", "tuning"]


def test_the_users_flags_do_not_undo_what_a_run_is_about():
    setting = replace(study.Setting(), data_root="there", flags=("--num_frames", "12", "--image_size", "112"))
    for n in arms.FRAMES:
        command = study.parts(arms.S6["frames"][n], 0, setting)["train"]
        args = runtime.parse_args(grpo_video.Args, {}, command[1:])
        assert (args.num_frames, args.image_size, args.data_root) == (12 if n == 16 else n, 112, "there")


@pytest.mark.parametrize("toy_world", [True, False])
def test_every_command_of_the_study_is_one_that_its_script_takes(toy_world, capsys, monkeypatch):
    """On real data those that ask something there."""
    monkeypatch.setattr(runtime, "is_small", lambda model: toy_world)  # none of them has been trained here
    where = [] if toy_world else ["--data_root", "there", "--model", "mine", "--out", "out/mine"]
    setting = study.make_setting(study.parse(where))
    runs = [run for run in study.RUNS.values() if toy_world or not run.toy_only]
    for run in runs:
        for command in study.parts(run, 0, setting).values():
            module = SCRIPTS[command[0]]
            runtime.parse_args(module.Args, {}, command[1:])
    assert len(runs) > (90 if toy_world else 30)


def test_what_another_command_left_is_moved_aside(tmp_path, monkeypatch):
    """--resume would refuse it."""
    driver = study.Study(replace(study.Setting(), out=str(tmp_path / "out"), summaries=str(tmp_path)), 1)
    monkeypatch.setattr(driver, "call", lambda name, command: None)
    monkeypatch.setattr(study, "numbers_of", lambda part, folder: {})
    run = study.RUNS["base"]
    driver.do(run, 0)
    (tmp_path / "out/base/full").mkdir(parents=True)
    (tmp_path / "out/base/random").mkdir()
    summary = json.loads(driver.summary_file(run, 0).read_text())
    summary["full"]["command"] += " --max_questions 7"
    driver.summary_file(run, 0).write_text(json.dumps(summary))
    driver.do(run, 0)
    assert {path.name for path in (tmp_path / "out/base").iterdir()} == {"full.old1", "random"}
    driver.do(run, 0)  # the same command: nothing to move
    assert not (tmp_path / "out/base/random.old1").exists()


def test_runs_that_need_the_same_thing_make_it_once(tmp_path, monkeypatch):
    """Several at a time: `own` at three rates learns from one file."""
    setting, calls = replace(study.Setting(), out="out/study_test", summaries=str(tmp_path)), []
    driver = study.Study(setting, 3)

    def call(name, command):
        time.sleep(0.05)
        if command[0] == "docs/own_answers.py":
            (tmp_path / "made").touch()
        calls.append(name)

    monkeypatch.setattr(driver, "call", call)
    monkeypatch.setattr(study, "numbers_of", lambda part, folder: {})
    monkeypatch.setattr(study.Path, "exists", lambda path: (
        (tmp_path / "made").is_file() if path.name == "own_seed0.jsonl" else path.is_file()))
    driver.run([study.name_at("own", rate) for rate in study.CANDIDATES["own"]], (0,))
    assert calls.count("own_seed0") == 1 and sum(name.endswith("train") for name in calls) == 3


def test_another_study_needs_a_folder_of_its_own():
    for flags in (["--budget", "88"], ["--model", "mine"], ["--flags", "--dtype float64"], ["--data_root", "there"],
                  ["--max_questions", "9"]):
        with pytest.raises(ValueError, match="--out"):
            study.make_setting(study.parse(flags))
        setting = study.make_setting(study.parse([*flags, "--out", "out/other"]))
        assert (setting.out, setting.summaries) == ("out/other", "out/other/summaries")
    assert study.make_setting(study.parse(["--quick"])).summaries == "out/study_quick/summaries"
    assert study.make_setting(study.parse([])) == study.Setting()


def test_a_failure_ends_the_study_and_says_where(tmp_path):
    setting = replace(study.Setting(), out=f"{tmp_path}/out", summaries=str(tmp_path), model="no_such_model")
    message = r"base full ended with 1: evaluate.py (.|\n)*no_such_model needs --data_root"
    with pytest.raises(RuntimeError, match=message):
        study.Study(setting, 1).run(["base"], (0,))


@pytest.mark.slow
def test_a_run_from_start_to_picture_and_again_after_a_kill(tmp_path):
    """The study in the form of a minute: one arm, trained, evaluated, measured, drawn."""
    command = [sys.executable, "docs/study.py", "--quick", "--only", "kl_0.02", "--budget", "176", "--flags",
               "--max_questions 24", "--max_questions", "24", "--out", str(tmp_path / "out")]
    log, metrics = tmp_path / "out/logs/kl_0.02_seed0_train.txt", tmp_path / "out/kl_0.02_seed0/metrics.jsonl"
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 2)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) != 0
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resuming after step" in log.read_text()
    summary = json.loads((tmp_path / "out/summaries/kl_0.02_seed0.json").read_text())
    assert summary.keys() == {"train", "full", "random", "distance"}
    assert 16 < len(summary["full"]["fresh4_L1"]["right"]) <= 24
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "0 parts left" in again.stderr
    study_report.main(tmp_path / "out/summaries")
    assert Image.open(tmp_path / "out/study_s3.png").size[0] > 1000


# ----------------------------------------------------------------------------------------------------------------------
# On real data.

SCRIPTS = {"sft_video.py": sft_video, "grpo_video.py": grpo_video, "evaluate.py": evaluate, "attention.py": attention,
           "docs/distance.py": distance, "docs/own_answers.py": own_answers}


@pytest.mark.slow
def test_the_comparison_on_real_data_is_the_commands_that_are_printed(tmp_path, world, monkeypatch, capsys):
    """Every command of S1 for a folder as it lies on the hub, in the order in which it is printed, in this process."""
    model, out = tiny.write_as_on_the_hub(tmp_path / "model"), tmp_path / "out"
    study.main(["--print", "--only", "S1", "--seeds", "0", "--model", str(model), "--data_root", str(world), "--out",
                str(out), "--budget", "16", "--sft_batch", "4", "--max_questions",
                "6", "--flags", "--image_size 56 --num_frames 4 --max_questions 6 --num_workers 0"])
    commands = [shlex.split(line)[1:] for line in capsys.readouterr().out.splitlines()]
    scripts = [command[0] for command in commands]
    assert scripts.count("sft_video.py") == 4 and scripts.count("grpo_video.py") == 5
    assert scripts.count("evaluate.py") == 2 * 8 and scripts.count("docs/distance.py") == 7
    monkeypatch.chdir(ROOT)
    for command in commands:
        module = SCRIPTS[command[0]]
        if command[0] == "docs/own_answers.py":
            # A random model has no right answer to give: one that answers A.
            monkeypatch.setattr(own_answers, "answer_texts", lambda _, examples, ids, *__: (
                ["<think>I see.</think><answer>A</answer>"] * len(ids)))
        module.main(runtime.parse_args(module.Args, getattr(module, "TOY", grpo_video.TOY), command[1:]))
        capsys.readouterr()
    setting = study.make_setting(study.parse(["--model", str(model), "--data_root", str(world), "--out", str(out)]))
    for run in map(study.RUNS.get, arms.STUDIES["S1"]):
        folder = out / Path(setting.folder(run, 0)).name
        for video in ("full", "random"):
            assert set(study.numbers_of(video, folder)) == {"validation_L1", "validation_L2", "validation_L3"}
        if run.script:
            assert study.numbers_of("distance", folder)["completions"] > 0
