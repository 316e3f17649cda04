"""tests/gpu.py on a CPU: its dry run writes finite rows, goes on where it was interrupted, and reports what fails."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from conftest import ROOT

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run_gpu(*flags, root=ROOT):
    return subprocess.run([sys.executable, "tests/gpu.py", *map(str, flags)], cwd=root, env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=600)


def parts_in(file):
    run, = json.loads(file.read_text())["runs"]
    return run["parts"]


@pytest.fixture(scope="module")
def interrupted_and_resumed(tmp_path_factory, world):
    """A dry run that gets Ctrl-C in its second part, then the same command again: the file, both outputs, part a."""
    file = tmp_path_factory.mktemp("gpu") / "gpu.json"
    flags = ["--dry-run", "--output", str(file)]
    process = subprocess.Popen([sys.executable, "tests/gpu.py", *flags], cwd=ROOT, env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not (file.exists() and "b" in parts_in(file)):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    first = process.communicate(timeout=60)[0]
    assert process.returncode == 130, first
    before = parts_in(file)
    assert before["a"]["status"] == "ok" and before["b"]["status"] == "running", before
    return file, run_gpu(*flags), before


def test_every_part_writes_finite_rows(interrupted_and_resumed):
    file, run, _ = interrupted_and_resumed
    assert run.returncode == 0, run.stdout + run.stderr
    parts = parts_in(file)
    assert list(parts) == list("abcdefghi")
    for letter, part in parts.items():
        if letter == "f" and part["status"].startswith("skipped: "):
            assert "trl" in part["status"] and not part["rows"]  # it is no part of requirements.txt
            continue
        assert part["status"] == "ok" and len(part["rows"]) > 0
        for row in part["rows"]:
            assert row["ok"] and row["what"]
            numbers = [x for x in row.values() if isinstance(x, (int, float))]
            assert all(math.isfinite(x) for x in numbers)
        assert any(len(row) > 3 for row in part["rows"]), f"{letter} has no numbers"
    assert sum("limit" in row for row in parts["a"]["rows"]) > 20
    repeated, = (row for row in parts["e"]["rows"] if "repeated_steps" in row)
    assert repeated["repeated_steps"] >= 2 and repeated["relative_difference"] == 0  # on a CPU, to the last bit


def test_an_interrupted_run_goes_on(interrupted_and_resumed):
    file, run, before = interrupted_and_resumed
    assert "a. oracles ... done before, skipped" in run.stdout and "b. decoding ... done" not in run.stdout
    parts = parts_in(file)
    assert parts["a"] == before["a"], "a part that was done has been run again"
    assert parts["b"]["status"] == "ok" and parts["b"]["rows"]
    assert not list(file.parent.glob("*.tmp"))


def test_a_part_that_fails_is_named_and_costs_the_others_nothing(tmp_path):
    # A copy of the code with two faults: a scale of the sampler's attention, and a learner that raises.
    root = tmp_path / "copy"
    for folder in ("tests", "assets"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, root)
    for name, right, wrong in (("sampler.py", "/ math.sqrt(d)  # (R", "/ math.sqrt(d + 1)  # (R"),
                               ("tests/bench.py", "logps.mean().backward()", 'raise RuntimeError("no learner")')):
        text = (root / name).read_text()
        assert text.count(right) == 1
        (root / name).write_text(text.replace(right, wrong))
    run = run_gpu("--dry-run", "--only", "a", "c", "g", "--output", tmp_path / "gpu.json", root=root)
    assert run.returncode == 1, run.stdout + run.stderr
    lines = {line[0]: line for line in run.stdout.splitlines() if " ... " in line}
    assert "FAILED" in lines["a"] and "sampler against learner" in lines["a"]
    assert "FAILED" in lines["c"] and "no learner" in lines["c"]
    assert lines["g"].endswith("ok")
    parts = parts_in(tmp_path / "gpu.json")
    assert {letter: part["status"] for letter, part in parts.items()} == {"a": "FAILED", "c": "FAILED", "g": "ok"}
    wrong = {row["what"] for row in parts["a"]["rows"] if not row["ok"]}
    assert "toy float32: sampler against learner, largest gap in nats" in wrong
    assert "toy float32: log-probs of shared prompts, largest error in nats" not in wrong  # the learner is right
    assert any("generate" in row["what"] and row["ok"] for row in parts["c"]["rows"]), "the rows before are lost"


def test_without_a_gpu_it_says_what_it_would_do(tmp_path):
    run = run_gpu("--output", tmp_path / "gpu.json")
    assert run.returncode == 2 and "needs a GPU" in run.stdout and not (tmp_path / "gpu.json").exists()
    assert [line[:3] for line in run.stdout.splitlines() if " Needs " in line] == [f"{x}. " for x in "abcdefghi"]
    refused = run_gpu("--dry-run", "--output", ROOT / "docs/gpu.json")
    assert refused.returncode == 2 and "leaves docs/gpu.json alone" in refused.stderr


def test_rows_of_another_gpu_stay_and_serve_no_other(tmp_path, monkeypatch):
    import gpu
    args = type("Args", (), {"output": str(tmp_path / "gpu.json")})
    for name in ("one", "another"):
        monkeypatch.setattr(gpu, "machine", lambda name=name: {"gpu": name})
        assert gpu.store(args, lambda parts: None) == {}
        gpu.store(args, lambda parts, name=name: parts.update(a={"status": name}))
    monkeypatch.setattr(gpu, "machine", lambda: {"gpu": "one"})
    assert gpu.store(args, lambda parts: None) == {"a": {"status": "one"}}
