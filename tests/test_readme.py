"""What the README and the pages beside it promise: lines, files, flags and names that are really there."""
import dataclasses
import re

import pytest

import attention
import evaluate
import grpo_video
import sft_video
from conftest import ROOT
from data import load_questions

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / page for page in ("README.md", "docs/variants.md", "docs/performance.md", "docs/scaling.md",
                                  "docs/reliability.md", "docs/study.md", "assets/toy_base/README.md")]


def test_the_lines_to_read_in_ten_minutes_are_the_maths_and_the_loop():
    maths, loop = (tuple(map(int, pair)) for pair in re.findall(r"\(grpo_video\.py#L(\d+)-L(\d+)\)", README))
    lines = (ROOT / "grpo_video.py").read_text().splitlines()
    assert lines[maths[0] - 1] == "# 3 advantage"
    assert lines[maths[1] - 1].startswith("    return mask / (num_completions")
    assert lines[loop[0] - 1].startswith("    for step, examples")
    assert lines[loop[1] - 1].startswith("        run.log(metrics")
    assert maths[1] - maths[0] < 110 and loop[1] - loop[0] < 75


def test_the_steps_have_one_numbering():
    lines = (ROOT / "grpo_video.py").read_text().splitlines()
    for number, name in enumerate(("sample", "reward", "advantage", "ratio", "objective", "KL", "update"), start=1):
        assert any(line.startswith(f"    {number} {name}") for line in lines), "docstring"
        assert any(re.match(rf"# (\d .*, )?{number} {name}", line) for line in lines), "section"
        assert any(re.match(rf" +# (\d .*, )?{number} {name}", line) for line in lines), "loop"
        assert f"| {number} {name} |" in README
    for line in (ROOT / "sft_video.py").read_text().splitlines():
        if step := re.match(r" *# ([1-7]) (\w+)", line):
            assert step[2] in ("sample", "ratio", "update", "the"), line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_exist(page):
    text = page.read_text()
    headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                for line in text.splitlines() if line.startswith("#")}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        assert not file or (page.parent / file).exists(), target
        assert file or anchor in headings, target


def test_flags_that_are_named_exist():
    scripts = grpo_video.Args, sft_video.Args, evaluate.Args, attention.Args
    known = {field.name for args in scripts for field in dataclasses.fields(args)}
    others = {"attention", "device", "nproc_per_node", "nnodes", "node_rank", "master_addr", "standalone", "fresh",
              "rounds", "trl", "signal", "requeue", "open", "only", "again", "dry", "index",
              "tokens", "show", "quick", "print", "processes", "flags", "out"}
    for page in PAGES:
        for flag in re.findall(r"(?<![\w-])--(?:no_)?([a-z_]+)", page.read_text()):
            assert flag in known | others, f"{page.name}: --{flag}"


def test_the_example_files_for_ones_own_data_load_and_are_quoted(world):
    for name in ("own_multiple_choice", "own_free_form"):
        path = ROOT / f"docs/{name}.jsonl"
        questions = load_questions(path, world)
        assert len(questions) == 5 and all(question.gold and question.video.is_file() for question in questions)
        assert path.read_text().splitlines()[0] in README
