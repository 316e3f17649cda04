"""The statistics of evaluate.py against brute force and published values."""
import itertools
import json
import math

import pytest

import evaluate
import results as results_script
import toy
from evaluate import compare, mcnemar_p, print_table, summarise, wilson_interval


@pytest.mark.parametrize("correct, n", [(0, 10), (1, 10), (5, 10), (10, 10), (81, 263), (1, 1), (0, 1), (500, 1000)])
def test_wilson_interval_holds_the_proportions_that_a_score_test_accepts(correct, n):
    # Its definition: all p with |correct / n - p| <= 1.96 sqrt(p (1 - p) / n). Scan them.
    grid = [i / 100_000 for i in range(100_001)]
    accepted = [p for p in grid if abs(correct / n - p) <= 1.959964 * math.sqrt(p * (1 - p) / n) + 1e-12]
    low, high = wilson_interval(correct, n)
    assert low == pytest.approx(min(accepted), abs=2e-5) and high == pytest.approx(max(accepted), abs=2e-5)


def test_wilson_interval_of_a_published_example():
    # Newcombe (1998), table I: 81 of 263 -> 0.2553 to 0.3662.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("only_ours, only_theirs", [(0, 0), (1, 0), (3, 3), (7, 2), (0, 9), (10, 4)])
def test_mcnemar_equals_counting_all_coin_flips(only_ours, only_theirs):
    n = only_ours + only_theirs
    observed = abs(only_ours - only_theirs)
    extreme = sum(abs(2 * sum(flips) - n) >= observed for flips in itertools.product((0, 1), repeat=n))
    assert mcnemar_p(only_ours, only_theirs) == pytest.approx(extreme / 2 ** n)


def record(i, parsed, gold="A", part="", file="annotations/validation_L1.jsonl", error=""):
    return {"file": file, "sample_id": str(i), "part": part, "video": "x.mp4", "options": ["w", "x", "y", "z"],
            "gold": gold, "parsed": parsed, "correct": parsed == gold, "truncated": False, "error": error}


def test_summary_counts_everything_that_was_asked():
    records = [record(0, "A"), record(1, "B"), record(2, None), record(3, None, error="unreadable")]
    row, = summarise(records)
    assert (row["n"], row["correct"], row["parse_rate"], row["unreadable"]) == (4, 1, 0.5, 1)
    assert row["published"] is None  # four samples are not the published split


def test_summary_by_domain_and_published_numbers(capsys):
    domains = ["Daily life", "Hobbies", "Recreation", "Work"]
    records = [record(i, "A", part=domains[i % 4], file="x/validation_L3.jsonl") for i in range(1321)]
    rows = summarise(records)
    assert [row["part"] for row in rows] == ["", *domains] and sum(row["n"] for row in rows[1:]) == 1321
    assert rows[0]["published"] == (31.57, 38.15, 44.89) and rows[2]["published"] == (32.30, 41.02, 45.08)
    print_table(rows)
    assert "31.57 / 38.15 / 44.89" in capsys.readouterr().out


def test_comparison_pairs_by_id_and_refuses_other_questions():
    ours = [record(0, "A"), record(1, "A"), record(2, "B"), record(3, "A")]
    theirs = [record(3, "B"), record(2, "A"), record(1, "B"), record(0, "A")]
    row, = compare(ours, theirs, "there")
    assert (row["only_a"], row["only_b"], row["difference"]) == (2, 1, 0.25)
    for different in (theirs[:3], [*theirs[:3], record(0, "A", gold="C")], [*theirs, record(9, "A")]):
        with pytest.raises(ValueError, match="--compare there: 1 questions"):
            compare(ours, different, "there")


def test_a_wrong_comparison_folder_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="no samples.jsonl"):
        evaluate.main(evaluate.Args(compare=str(tmp_path)))
    with pytest.raises(ValueError, match="--grader 'lenient'"):
        evaluate.Args(grader="lenient")


def test_first_letter_grader_is_there_for_parity():
    assert evaluate.PARSERS["first_letter"]("<answer>Apple</answer>", ("x", "y")) == "A"
    assert evaluate.PARSERS["strict"]("<answer>Apple</answer>", ("x", "y")) is None
    assert json.dumps(evaluate.TOY)


def test_results_script_counts_seeds_and_not_earlier_runs(tmp_path, capsys):
    row = {"file": "annotations/validation_L1.jsonl", "part": "with a video", "n": 10, "accuracy": 0.3,
           "wilson_low": 0.1, "wilson_high": 0.6}
    step = toy.RECIPES["make tea"][0]
    answer = {**record(0, "A"), "goal": "Make tea", "progress": [step],
              "response": f"<think>I see {step}, cut pot. Next is w (A).</think><answer>B</answer>"}
    runs = (("base/full", 0.3, "full"), ("grpo_seed0/full", 0.8, "full"), ("grpo_seed1/full", 0.9, "full"),
            ("grpo_seed1/random", 0.2, "random"), ("grpo_seed0.old1/full", 0.1, "full"),
            ("grpo_seed0/full.old1", 0.1, "full"))
    for folder, accuracy, video in runs:
        (tmp_path / folder).mkdir(parents=True)
        whole = {**row, "part": "", "accuracy": 0.0}  # with the questions that have no video: not what is compared
        results = {"table": [whole, {**row, "accuracy": accuracy}], "settings": {"video": video}}
        (tmp_path / folder / "results.json").write_text(json.dumps(results))
        (tmp_path / folder / "samples.jsonl").write_text(json.dumps(answer) + "\n")
        (tmp_path / folder).parent.joinpath("metrics.jsonl").write_text(json.dumps({"step": 0, "accuracy": 0.5}) + "\n")
    results_script.main(tmp_path, tmp_path / "picture.png")
    printed = capsys.readouterr().out
    assert "| grpo, `full`, 2 runs | 85.0 (10 to 60) |" in printed
    assert "| grpo, `random`, 1 run | 20.0 (10 to 60) |" in printed
    assert "| base, L1 | 50 (2) | 0 (1) | 0 (1) | 100 (1) | 0 (1) |" in printed  # step, count, next, option, answer
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no RUN/EVALUATION"):
        results_script.main(tmp_path / "base/full", tmp_path / "picture.png")
