"""What goes wrong around a run, and what the run then does: kills, signals, damage, full disks, numbers that are none.

Run by make test-faults. Some run in this process, where a kill is an exception that nothing in the product may catch;
others run real processes and kill them. Random kills by the hundred steps are tests/soak.py.
"""
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
import zlib
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

import data
import evaluate
import grpo_video
import model
import run as run_
import runtime
import sft_video
import toy
from conftest import ROOT
from data import load_questions, step_batch
from soak import descendants, is_free, last_step, parent_of, wait, writer
from test_train import eval_args, grpo_args, metrics_of, sft_args

pytestmark = pytest.mark.faults

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SMALL = dict(prompts_per_step=2, num_workers=0)
TINY = dict(**SMALL, max_completion_length=8, group_size=4)  # of GRPO: no answer parses, so nothing is learned


class Killed(BaseException):
    """Stands for a SIGKILL."""


@pytest.fixture(autouse=True)
def signals_of_pytest():
    """A run that ends by an error leaves its handlers to its process, and this process goes on."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def reward_noise(monkeypatch):
    """Rewards that differ among any completions, so that eight tokens are enough to learn from."""
    monkeypatch.setattr(grpo_video, "accuracy_reward", lambda text, example: float(zlib.crc32(text.encode()) % 2))


def sft(folder, **changes):
    return sft_video.main(sft_args(folder, **{**SMALL, "max_steps": 8, "save_every": 1, "learning_rate": 1e-3,
                                              "keep_checkpoints": 9, **changes}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, world):
    """Eight steps of SFT, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("trained")
    sft(folder)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    """A copy that a test may spoil, with the checkpoints after 6, 7 and 8 steps."""
    early = shutil.ignore_patterns(*(f"step_00000{n}" for n in range(1, 6)))
    return Path(shutil.copytree(trained, tmp_path / "run", ignore=early))


def weights(folder):
    return load_file(Path(folder) / "final/model.safetensors")


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def contents(folder):
    """name -> bytes, of everything below a folder but the lock, which each process writes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "lock"}


def launched(monkeypatch, capfd, script, *flags):
    """(exit status, stdout, stderr) of a script that runs as a command does, but in this process, and fails."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return ended.value.code, *capfd.readouterr()


def as_flags(**changes):
    return [word for name, value in changes.items() for word in (f"--{name}", str(value))]


# ----------------------------------------------------------------------------------------------------------------------
# Processes of their own, for what no exception can stand for.

@pytest.fixture
def start(tmp_path):
    """A function that starts a command, its output in a file; whatever still lives at the end of the test is killed."""
    started, path = [], f"{Path(sys.executable).parent}:{os.environ['PATH']}"

    def start(*command, **environment):
        log = tmp_path / f"log{len(started)}.txt"
        with open(log, "w") as file:
            process = subprocess.Popen(
                list(map(str, command)), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONUNBUFFERED": "1", **environment})
        process.text = lambda: log.read_text(errors="replace")
        process.finish = lambda: process.wait(300)
        started.append(process)
        return process

    yield start
    for process in started:
        for pid in [process.pid, *descendants(process.pid)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        process.wait()


def ranks(*command):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *command]


def workers_of(torchrun):
    """The ranks' processes, in no order."""
    return [pid for pid in descendants(torchrun.pid) if parent_of(pid) == torchrun.pid]


def wait_for_step(process, folder, step):
    wait(lambda: last_step(folder) >= step or process.poll() is not None)
    assert process.poll() is None, process.text()[-4000:]


def alive(pid):
    """Whether a process runs, or could: neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def hooked(tmp_path, code):
    """A script that does `code` in each rank and then runs the script that is its first argument, as a command."""
    hook = tmp_path / "hook.py"
    hook.write_text(f"import os, runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nRANK = int(os.environ.get('RANK', 0))\n"
                    f"{code}\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n")
    return str(hook)


SFT_FLAGS = as_flags(prompts_per_step=2, num_workers=0, save_every=5, learning_rate=1e-3, max_steps=24)
# Forty tokens, because with fewer no answer parses and nothing would be learned.
GRPO_FLAGS = as_flags(prompts_per_step=2, num_workers=1, save_every=5, group_size=4, max_completion_length=40,
                      max_steps=24, print_every=1)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, world):
    """The run of GRPO_FLAGS on two ranks, left alone."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = ranks("grpo_video.py", *GRPO_FLAGS, "--output_dir", str(folder))
    ran = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                         stderr=subprocess.STDOUT, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout[-8000:]
    return folder


def numbers(folder):
    """metrics.jsonl without seconds and without what is counted since a resumption."""
    return [{name: value for name, value in line.items()
             if not name.endswith("_s") and "unreadable" not in name and name != "skipped_steps"}
            for line in metrics_of(folder)]


def assert_same_run(a, b):
    assert same_weights(a, b)
    assert numbers(a) == numbers(b)
    assert (a / "completions.txt").read_text() == (b / "completions.txt").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# One writer.

def test_a_folder_has_one_writer_and_workers_do_not_outlive_torchrun(tmp_path, world, start):
    folder = tmp_path / "run"
    first = start(*ranks("sft_video.py", *SFT_FLAGS, "--max_steps", "1000", "--output_dir", folder))
    wait_for_step(first, folder, 6)
    host, pid = (folder / "lock").read_text().split()
    workers = workers_of(first)
    assert host == os.uname().nodename and int(pid) in workers
    for resume in (False, True):
        with pytest.raises(ValueError, match=f"process {pid} on {host}"):
            sft(folder, max_steps=2, resume=resume)
    # Torchrun alone is killed, while the ranks cannot notice it: they still hold the folder.
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    first.kill()
    first.wait()
    before = contents(folder)
    with pytest.raises(ValueError, match=f"process {pid} on {host}"):
        sft(folder, max_steps=2, resume=True)
    assert contents(folder) == before and not (tmp_path / "run.old1").exists()
    for worker in workers:
        os.kill(worker, signal.SIGCONT)
    # A rank looks every half second; the rest is for a machine that is busy.
    assert wait(lambda: not any(map(alive, workers)) and is_free(folder), 60) < 20


def test_a_resumed_run_is_a_writer_too(run, monkeypatch):
    # Asked from another process: to its own, a POSIX lock is always free.
    code = (f"import fcntl\nfile = open({str(run / 'lock')!r}, 'a')\n"
            "try:\n    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)\n    print('free')\n"
            "except OSError:\n    print('held')")

    def state():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout

    seen, report = [], run_.report
    monkeypatch.setattr(run_, "report", lambda folder: seen.append(state()) or report(folder))
    sft(run, resume=True)
    assert seen == ["held\n"] and state() == "free\n"  # the run has ended, though its process has not


def test_a_folder_with_a_users_own_file_is_refused(run, capfd):
    (run / "notes.txt").write_text("mine")
    before = contents(run)
    with pytest.raises(ValueError, match="notes.txt.*not written by a run"):
        sft(run)
    assert contents(run) == before and not run.with_name("run.old1").exists()
    (run / "notes.txt").unlink()
    sft(run, max_steps=1, save_every=0)
    assert contents(run.with_name("run.old1")).keys() == before.keys() - {"notes.txt"}


def test_a_folder_of_files_that_no_run_has_written_is_refused(tmp_path, world):
    # One of them has the very name of a run's lock, which a run writes first of all.
    files = {"beach.jpg": b"sand", "lock": b"of a house"}
    (tmp_path / "photos").mkdir()
    for name, content in files.items():
        (tmp_path / "photos" / name).write_bytes(content)
    with pytest.raises(ValueError, match="beach.jpg.*not written by a run"):
        sft(tmp_path / "photos")
    assert {path.name: path.read_bytes() for path in (tmp_path / "photos").iterdir()} == files


def test_evaluations_in_a_runs_folder_move_along(run, tmp_path):
    # As in the README: out/results/grpo_seed0/full is the evaluation of the run in out/results/grpo_seed0.
    few = dict(eval_files=["annotations/validation_L1.jsonl"], max_questions=2, num_workers=0)
    evaluate.main(eval_args(run / "full", **few))
    sft(run, max_steps=1, save_every=0)
    assert (tmp_path / "run.old1/full/samples.jsonl").exists() and not (run / "full").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints: a whole one is always there, and nothing else is ever resumed from.

def test_the_newest_checkpoints_stay_and_sha256sum_accepts_them(tmp_path, world):
    sft(tmp_path, max_steps=4, keep_checkpoints=3)
    assert checkpoints(tmp_path) == ["step_000002", "step_000003", "step_000004"]
    for folder in (tmp_path / "checkpoints").iterdir():
        files = sorted(path.name for path in folder.iterdir())
        listed = sorted(line.split("  ")[1] for line in (folder / "SHA256SUMS").read_text().splitlines())
        assert files == sorted([*listed, "SHA256SUMS"]) and ".metadata" in listed
        subprocess.run(["sha256sum", "-c", "--strict", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


DAMAGE = {"a bit of the data": ("*.distcp", flip), "half of the data": ("*.distcp", halve),
          "half of .metadata": (".metadata", halve), "no data": ("*.distcp", Path.unlink),
          "no .metadata": (".metadata", Path.unlink), "empty sums": ("SHA256SUMS", lambda file: file.write_text("")),
          "half of the sums": ("SHA256SUMS", lambda file: file.write_text(file.read_text().split("\n")[0] + "\n"))}


def damage(checkpoint, kind):
    pattern, spoil = DAMAGE[kind]
    for file in checkpoint.glob(pattern):
        spoil(file)


def test_damaged_checkpoints_are_left_out_and_an_older_one_is_taken(trained, tmp_path, capfd):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for step, kind in enumerate(DAMAGE, start=2):
        damage(run / f"checkpoints/step_{step:06d}", kind)
    sft(run, resume=True, save_every=0)
    said = capfd.readouterr().out
    assert re.findall(r"step_00000(\d) is damaged: \S", said) == list("8765432") and "resuming after step 1" in said
    assert same_weights(run, trained)
    assert [m["step"] for m in metrics_of(run)] == list(range(8))


def test_without_any_whole_checkpoint_nothing_is_resumed(run):
    for step, kind in ((6, "a bit of the data"), (7, "no .metadata"), (8, "empty sums")):
        damage(run / f"checkpoints/step_{step:06d}", kind)
    before = contents(run)
    with pytest.raises(ValueError, match="no whole checkpoint"):
        sft(run, resume=True)
    assert contents(run).keys() == before.keys()
    assert all(contents(run)[name] == before[name] for name in before if name != "args.json")


def test_damaged_checkpoints_of_later_steps_do_not_push_out_good_ones(run, trained, monkeypatch):
    # The one after 7 steps is written anew, and then the machine goes down.
    damage(run / "checkpoints/step_000007", "a bit of the data")
    damage(run / "checkpoints/step_000008", "a bit of the data")
    with monkeypatch.context() as patch:
        kill_at_update(patch, 2)
        with pytest.raises(Killed):
            sft(run, resume=True, keep_checkpoints=1)
    sft(run, resume=True, keep_checkpoints=1)
    assert same_weights(run, trained) and checkpoints(run) == ["step_000008"]


def at_update(patch, number, action):
    """`action(optimizer)` after the optimizer's update of this number, counted from 1.

    An update at rate 0, by which torch makes AdamW's state before it loads one, is none.
    """
    step, calls = torch.optim.AdamW.step, []

    def update(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        calls.extend([1] if self.param_groups[0]["lr"] else [])
        if calls and len(calls) == number:
            calls.append("done")
            action(self)
        return result
    patch.setattr(torch.optim.AdamW, "step", update)


def kill_at_update(patch, number):
    def kill(_):
        raise Killed
    at_update(patch, number, kill)


def kill_in_save(patch, where):
    """The next save of a checkpoint is killed."""
    replace, rmtree = Path.replace, shutil.rmtree

    def killed(*_, **__):
        raise Killed

    def replaced(path, target):
        return killed() if Path(target).name == "SHA256SUMS" else replace(path, target)

    def removed(path, *args, **kwargs):
        if not (Path(path) / "SHA256SUMS").exists():
            return rmtree(path, *args, **kwargs)
        next(Path(path).glob("*.distcp")).unlink()
        killed()

    if where == "before the data":
        patch.setattr(run_.dcp, "save", killed)
    elif where == "in the data":
        patch.setattr(FileSystemWriter, "write_data", killed)
    elif where == "after the data":
        patch.setattr(FileSystemWriter, "finish", killed)
    elif where == "before the sums":
        patch.setattr(Path, "replace", replaced)
    else:
        patch.setattr(shutil, "rmtree", removed)


@pytest.mark.parametrize("where", [
    "before the data", "in the data",
    "after the data", "before the sums", "while the old one is removed"])
def test_a_kill_inside_a_save_leaves_a_whole_checkpoint(run, trained, monkeypatch, capfd, where):
    shutil.rmtree(run / "checkpoints/step_000008")
    with monkeypatch.context() as patch:
        kill_in_save(patch, where)
        # The library wraps what is raised inside of it.
        with pytest.raises((Killed, run_.dcp.api.CheckpointException)):
            sft(run, resume=True, keep_checkpoints=1)
    capfd.readouterr()
    sft(run, resume=True, keep_checkpoints=1)
    last = 8 if where == "while the old one is removed" else 7
    assert f"resuming after step {last}" in capfd.readouterr().out
    assert same_weights(run, trained) and checkpoints(run)[-1] == "step_000008"


def test_a_kill_inside_the_first_save_is_no_reason_to_refuse(trained, tmp_path, capfd):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for folder in (run / "checkpoints").iterdir():  # as they are before they are sealed
        (folder / "SHA256SUMS").unlink()
    sft(run, resume=True, save_every=0)
    assert "no checkpoint yet" in capfd.readouterr().out and same_weights(run, trained)


def test_damaged_checkpoints_do_not_count_among_the_newest(trained, tmp_path, capfd):
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for step in (7, 8):
        damage(run / f"checkpoints/step_{step:06d}", "a bit of the data")
    sft(run, resume=True, save_every=7, keep_checkpoints=2)
    assert "resuming after step 6" in capfd.readouterr().out
    assert checkpoints(run) == ["step_000006", "step_000007"]  # 7 was damaged, and is saved anew


@pytest.mark.parametrize("what, value", [
    ("weight", float("nan")), ("exp_avg", float("nan")),
    ("exp_avg_sq", float("inf"))])
def test_a_broken_model_never_replaces_a_good_checkpoint(run, monkeypatch, capfd, what, value):
    shutil.rmtree(run / "checkpoints/step_000008")
    before = contents(run / "checkpoints")

    def spoil(optimizer):
        weight = optimizer.param_groups[0]["params"][0]
        tensor = weight if what == "weight" else optimizer.state[weight][what]
        with torch.no_grad():
            (tensor.to_local() if isinstance(tensor, DTensor) else tensor).view(-1)[0] = value

    with monkeypatch.context() as patch:
        at_update(patch, 1, spoil)
        with pytest.raises(FloatingPointError, match="not finite"):
            sft(run, resume=True, keep_checkpoints=1)
    assert contents(run / "checkpoints") == before
    if what == "weight":  # the way on that the error names
        sft(run, resume=True, change=["learning_rate"], learning_rate=1e-4)
        assert "resuming after step 7" in capfd.readouterr().out
        assert all(weight.isfinite().all() for weight in weights(run).values())


def test_a_disk_without_room_for_a_checkpoint_is_named_in_time(run, tmp_path, monkeypatch):
    def disk(free):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - free, free))
    before = contents(run / "checkpoints")
    disk(2_000_000)
    for folder, resume in ((tmp_path / "new", False), (run, True)):
        with pytest.raises(OSError, match=r"needs 0\.\d+ GB of disk space and 0\.00 GB are free"):
            sft(folder, resume=resume)
    assert contents(run / "checkpoints") == before
    # There is room at first, and none when it comes to the save.
    at_update(monkeypatch, 1, lambda _: disk(2_000_000))
    disk(10**9)
    shutil.rmtree(run / "checkpoints/step_000008")
    with pytest.raises(OSError, match="disk space"):
        sft(run, resume=True, keep_checkpoints=1)
    assert checkpoints(run) == ["step_000006", "step_000007"]
    disk(10**9)
    sft(run, resume=True)


# ----------------------------------------------------------------------------------------------------------------------
# A resumption is of the same run, or it is refused.

def test_a_run_without_its_settings_is_not_resumed(run):
    before = contents(run)
    halve(run / "args.json")
    with pytest.raises(ValueError, match="args.json.*cannot be read"):
        sft(run, resume=True)
    (run / "args.json").unlink()
    with pytest.raises(ValueError, match="args.json.*cannot be read"):
        sft(run, resume=True)
    del before["args.json"]
    assert contents(run) == before


def test_half_written_settings_are_never_there(tmp_path, world, monkeypatch):
    # As on a full disk: the write of args.json breaks off in the middle.
    write_text = Path.write_text

    def half(path, text, *args, **kwargs):
        if not path.name.startswith("args.json"):
            return write_text(path, text, *args, **kwargs)
        write_text(path, text[:len(text) // 2])
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", half)
        with pytest.raises(OSError, match="No space left"):
            sft(tmp_path / "run", max_steps=1)
    assert not (tmp_path / "run/args.json").exists()
    # What was left is no obstacle, not even to a job that always says --resume.
    sft(tmp_path / "run", max_steps=1, save_every=0, resume=True)
    assert not list((tmp_path / "run").glob("*.part"))


def test_a_training_file_that_was_edited_is_another_run(tmp_path, world):
    lines = (world / "annotations/training_with_cot_6k.jsonl").read_text().splitlines(keepends=True)[:6]
    file = tmp_path / "own.jsonl"
    file.write_text("".join(lines))
    sft(tmp_path / "run", train_file=str(file), max_steps=1, save_every=0)
    file.write_text("".join(lines[::-1]))
    with pytest.raises(ValueError, match=r"own\.jsonl was another file when the run began"):
        sft(tmp_path / "run", train_file=str(file), max_steps=1, save_every=0, resume=True)
    file.write_text("".join(lines))
    sft(tmp_path / "run", train_file=str(file), max_steps=1, save_every=0, resume=True)


def test_what_is_left_out_is_named_from_here_and_may_not_change_either(tmp_path, questions, monkeypatch):
    records = [{"sample_id": q.id, "video": q.video.name if q.video else "", "image": q.image.name, "correct": True}
               for q in questions[:3]]
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / "blind.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    left_out = dict(leave_out=["blind.jsonl"], max_steps=1, save_every=1)
    grpo(tmp_path / "run", **left_out)
    (tmp_path / "blind.jsonl").write_text("".join(lines[:2]))
    with pytest.raises(ValueError, match="blind.jsonl was another file"):
        grpo(tmp_path / "run", **left_out, resume=True)


def test_flags_change_only_by_name(run, trained, capfd):
    other = dict(resume=True, max_steps=9, learning_rate=1e-4)
    with pytest.raises(ValueError, match=r"--learning_rate 0.0001 \(it was 0.001\), --max_steps 9 \(it was 8\)"
                                         ".*--change learning_rate max_steps"):
        sft(run, **other)
    with pytest.raises(ValueError, match=r"--max_steps 9 \(it was 8\)"):  # to change one is not to change all
        sft(run, **other, change=["learning_rate"])
    sft(run, **other, change=["learning_rate", "max_steps"])
    assert [m["step"] for m in metrics_of(run)] == list(range(9)) and not same_weights(run, trained)
    # From now on these are its flags.
    sft(run, **other)
    with pytest.raises(ValueError, match=r"--learning_rate 0.001 \(it was 0.0001\)"):
        sft(run, resume=True, max_steps=9)


def test_logs_have_each_step_once_after_a_kill(tmp_path, reward_noise, world, monkeypatch):
    flags = dict(**TINY, max_steps=3, save_every=1, print_every=1)
    grpo_video.main(grpo_args(tmp_path / "straight", **flags))
    with monkeypatch.context() as patch:
        kill_at_update(patch, 3)
        with pytest.raises(Killed):
            grpo_video.main(grpo_args(tmp_path / "run", **flags))
    # After one step there is a checkpoint; the second was logged, and a kill has torn the line of the third.
    assert [m["step"] for m in metrics_of(tmp_path / "run")] == [0, 1]
    shutil.rmtree(tmp_path / "run/checkpoints/step_000002")
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 2, "reward": 0.')
    grpo_video.main(grpo_args(tmp_path / "run", **flags, resume=True))
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    assert re.findall(r"^--- step (\d+)", (tmp_path / "run/completions.txt").read_text(), re.M) == list("012")
    assert metrics_of(tmp_path / "straight")[-1]["grad_norm"] > 0


def test_resuming_a_finished_run_changes_nothing(tmp_path, reward_noise, world):
    flags = dict(**TINY, max_steps=2, save_every=1, print_every=1)
    grpo_video.main(grpo_args(tmp_path, **flags))
    before = contents(tmp_path)
    grpo_video.main(grpo_args(tmp_path, **flags, resume=True))
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    for name in before.keys() - {"args.json", "report.json"}:
        assert after[name] == before[name], name
    reports = [json.loads(files["report.json"]) for files in (before, after)]
    assert reports[0]["seconds"] == reports[1]["seconds"] and reports[0]["tokens"] == reports[1]["tokens"] > 0


def test_a_kill_in_the_export_leaves_nothing_that_looks_finished(run, trained, monkeypatch):
    shutil.rmtree(run / "final")

    def killed(*_, **__):
        raise Killed
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", killed)  # the weights are already written
        with pytest.raises(Killed):
            sft(run, resume=True)
    assert not (run / "final").exists()
    umask = os.umask(0o027)
    try:
        sft(run, resume=True)
    finally:
        os.umask(umask)
    assert contents(run / "final") == contents(trained / "final")
    assert {stat.S_IMODE(path.stat().st_mode) for path in (run / "final").iterdir()} == {0o640}
    assert not list(run.glob("*.part"))


def test_a_checkpoint_becomes_a_model_without_a_process_group(trained, tmp_path):
    hook = hooked(tmp_path, "import torch.distributed\ntorch.distributed.init_process_group = None")
    command = [sys.executable, hook, "run.py", str(trained / "checkpoints/step_000008"), str(tmp_path / "step_8")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert contents(tmp_path / "step_8") == contents(trained / "final")
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert again.returncode == 1 and again.stderr.strip().endswith("is there already; give another folder")
    assert contents(tmp_path / "step_8") == contents(trained / "final")
    command[-2:] = [str(trained / "checkpoints/step_000002"), str(tmp_path / "step_2")]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=240)
    earlier, last = (load_file(tmp_path / f"step_{n}/model.safetensors") for n in (2, 8))
    assert any(not torch.equal(earlier[name], last[name]) for name in last)


# ----------------------------------------------------------------------------------------------------------------------
# Signals: a checkpoint at the next step, status 75, and a line with the command that goes on.

STOPPED = re.compile(r"stopped by a signal after (\d+) steps; to go on: (.*)")


def stopped(process):
    """(steps, command) of a run that a signal has stopped; torchrun's summary has the line once more."""
    found = set(STOPPED.findall(process.text()))
    assert len(found) == 1, f"{found}\n{process.text()[-4000:]}"
    assert "killed by signal" not in process.text()  # DataLoader's, of the workers that are ended on purpose
    steps, command = found.pop()
    return int(steps), shlex.split(command)


def test_a_signal_stops_a_run_at_its_next_step(tmp_path, trained, monkeypatch, capfd):
    with monkeypatch.context() as patch:
        at_update(patch, 2, lambda _: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as ended:
            sft(tmp_path, save_every=0)
    assert ended.value.code == 75
    steps = int(STOPPED.search(capfd.readouterr().err)[1])
    assert steps in (2, 3)  # a thread hears it, soon
    assert checkpoints(tmp_path) == [f"step_{steps:06d}"] and len(metrics_of(tmp_path)) == steps
    sft(tmp_path, save_every=0, resume=True)
    assert same_weights(tmp_path, trained) and numbers(tmp_path) == numbers(trained)


def test_plain_python_is_stopped_by_signals_and_resumed_by_the_command_it_prints(tmp_path, world, start):
    folder, done = tmp_path / "a folder", 0  # which needs quotes
    command = ["python", "sft_video.py", *SFT_FLAGS, "--num_workers", "1", "--output_dir", str(folder)]
    for number in (signal.SIGINT, signal.SIGUSR1):
        process = start(*command)
        wait_for_step(process, folder, done + 2)
        if number == signal.SIGINT:  # Ctrl-C goes to the whole group, and so to the workers that decode
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert process.finish() == 75
        done, command = stopped(process)
        assert "Traceback" not in process.text()
        assert len(metrics_of(folder)) == done and checkpoints(folder)[-1] == f"step_{done:06d}"
    process = start(*command)
    assert process.finish() == 0 and f"resuming after step {done}" in process.text()
    sft(tmp_path / "straight", max_steps=24, save_every=0)
    assert same_weights(folder, tmp_path / "straight") and numbers(folder) == numbers(tmp_path / "straight")


def test_torchrun_is_stopped_by_signals_and_resumed_by_the_command_it_prints(tmp_path, undisturbed, start):
    folder, done = tmp_path / "run", 0
    command = ranks("grpo_video.py", *GRPO_FLAGS, "--output_dir", str(folder))
    for target in ("one rank", "torchrun and the ranks", "torchrun"):
        process = start(*command, TORCH_ELASTIC_SHUTDOWN_TIMEOUT="300")
        wait_for_step(process, folder, done + 2)
        workers = workers_of(process)
        if target == "one rank":  # not the one that writes
            os.kill(next(pid for pid in workers if pid != writer(folder)), signal.SIGTERM)
        elif target == "torchrun":  # Ctrl-C
            process.send_signal(signal.SIGINT)
        else:  # as scancel does; torchrun passes it on, so that a rank gets two
            for pid in (process.pid, *workers):
                os.kill(pid, signal.SIGTERM)
        assert process.finish() not in (0, -signal.SIGKILL)
        done, command = stopped(process)
        if target == "one rank":
            assert process.returncode == 1 and re.search(r"exitcode\s*: 75", process.text())
        assert len(metrics_of(folder)) == done and checkpoints(folder)[-1] == f"step_{done:06d}"
        assert command[0] == "torchrun" and "--resume" in command
        command.insert(1, "--standalone")  # the usual port may be another's
    process = start(*command)
    assert process.finish() == 0 and f"resuming after step {done}" in process.text()
    assert_same_run(folder, undisturbed)


def test_a_second_signal_ends_a_rank_that_waits_for_another(tmp_path, world, start):
    folder = tmp_path / "run"
    process = start(*ranks("sft_video.py", *SFT_FLAGS, "--max_steps", "1000", "--output_dir", folder))
    wait_for_step(process, folder, 1)
    rank_0 = writer(folder)
    rank_1, = set(workers_of(process)) - {rank_0}
    os.kill(rank_1, signal.SIGSTOP)
    logged = last_step(folder)
    os.kill(rank_0, signal.SIGTERM)
    first = time.monotonic()
    # Stuck in a collective, with the first signal pending.
    wait(lambda: time.monotonic() - first > 2.5)
    assert alive(rank_0) and last_step(folder) <= logged + 1
    os.kill(rank_0, signal.SIGTERM)
    assert wait(lambda: not alive(rank_0), 60) < 10
    os.kill(rank_1, signal.SIGKILL)
    assert process.finish() == 1 and re.search(r"exitcode\s*: 75", process.text())


def test_slurm_starts_a_job_again_and_again_until_it_is_done(tmp_path, undisturbed, start):
    folder = tmp_path / "run"
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "scontrol").write_text(f"#!/bin/bash\necho $* >> {tmp_path}/requeued\n")
    (bin_ / "scontrol").chmod(0o755)
    flags = shlex.join(GRPO_FLAGS)
    (tmp_path / "job.sh").write_text(f"""#!/bin/bash
#SBATCH --signal=B:USR1@600 --requeue
trap 'kill -USR1 $(cut -d" " -f2 {folder}/lock); wait; scontrol requeue $SLURM_JOB_ID' USR1
torchrun --standalone --nproc_per_node 2 grpo_video.py {flags} --output_dir {folder} --resume & wait
""")
    environment = {"SLURM_JOB_ID": "42", "PATH": f"{bin_}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = 0
    for times in (1, 2):
        job = start("bash", tmp_path / "job.sh", **environment)
        wait_for_step(job, folder, done + 2)
        job.send_signal(signal.SIGUSR1)
        job.finish()
        done, _ = stopped(job)
        assert (tmp_path / "requeued").read_text() == "requeue 42\n" * times
    job = start("bash", tmp_path / "job.sh", **environment)
    assert job.finish() == 0 and f"resuming after step {done}" in job.text()
    assert (tmp_path / "requeued").read_text() == "requeue 42\n" * 2
    assert_same_run(folder, undisturbed)


# ----------------------------------------------------------------------------------------------------------------------
# Errors: one line for what a user can mend, a trace for what only we can.

@pytest.mark.parametrize("flags, line", [
    (["--train_file", "nowhere.jsonl"], r"ValueError \(rank 0, .*data.py:\d+\): .*nowhere.jsonl: cannot be read.*"),
    (["--model", "assets"], r"ValueError \(rank 0, .*runtime.py:\d+\): --model assets: .*"),
    (["--seed", "-1"], r"ValueError \(.*\): --seed -1: must be >= 0.*"),
    (["--learning_rate", "inf"], r"ValueError \(.*\): --learning_rate inf: must be .*finite"),
    (["--max_grad_norm", "nan"], r"ValueError \(.*\): --max_grad_norm nan: must be .*"),
    (["--output_dir", ""], r"ValueError \(.*\): --output_dir '': name a folder")], ids=lambda x: " ".join(x[:1]))
def test_a_users_error_is_one_line_and_touches_nothing(run, monkeypatch, capfd, world, flags, line):
    before, at_home = contents(run), sorted(ROOT.iterdir())
    status, _, said = launched(monkeypatch, capfd, "sft_video.py", "--output_dir", run, "--max_steps", 1, *flags)
    assert status == 1 and re.fullmatch(line, said.strip()), said
    assert contents(run) == before and not run.with_name("run.old1").exists() and sorted(ROOT.iterdir()) == at_home


def test_a_mistake_of_the_program_shows_its_trace(tmp_path, monkeypatch, capfd, world):
    def wrong(*_):
        raise TypeError("one of our own")
    monkeypatch.setattr(data, "step_batch", wrong)
    status, _, said = launched(monkeypatch, capfd, "sft_video.py", "--output_dir", tmp_path / "run", "--max_steps", 1)
    assert status == 1 and "Traceback" in said and "in wrong" in said
    assert re.match(r"TypeError \(rank 0, .*\): one of our own", said.strip().splitlines()[-1])


def without_a_tensor(folder):
    """A copy of the base whose file lacks the weights of a norm."""
    shutil.copytree(toy.BASE, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("layers.0.input_layernorm.weight"))]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_torchruns_summary_has_the_line_of_an_error(tmp_path, world, start):
    # The error is rank 0's, which alone reads the file. The other hears of it at once, and may be the first to end.
    process = start(*ranks("sft_video.py", *SFT_FLAGS, "--model", without_a_tensor(tmp_path / "base"),
                           "--output_dir", tmp_path / "run"))
    assert process.finish() == 1
    summary = process.text()[process.text().index("Root Cause"):]
    assert re.search(r"exitcode\s*: 1 ", summary) and "<N/A>" not in summary
    assert re.search(r"ValueError \(rank \d, loading, runtime.py:\d+\): (ValueError of rank 0: )?"
                     r"--model \S+: .*input_layernorm", summary)
    assert not (tmp_path / "run").exists()


def test_a_script_does_not_end_by_way_of_the_interpreters_end(tmp_path, world):
    # There, threads that still need Python abort the process: seen as status -6 of runs that had done all their work.
    hook = hooked(tmp_path, "import types\nclass Trap:\n    def __del__(self, abort=os.abort):\n        abort()\n"
                            "sys.modules['late'] = types.ModuleType('late')\nsys.modules['late'].trap = Trap()")
    (tmp_path / "nothing.py").write_text("")
    short = ["sft_video.py", *SFT_FLAGS, "--max_steps", "1", "--output_dir"]
    commands = [tmp_path / "nothing.py"], [*short, tmp_path / "run"], [*short, ""]
    ended = [subprocess.run([sys.executable, hook, *map(str, command)], cwd=ROOT, capture_output=True, timeout=240)
             for command in commands]
    assert [process.returncode for process in ended] == [-signal.SIGABRT, 0, 1], ended
    assert (tmp_path / "run/final/model.safetensors").exists() and b"name a folder" in ended[2].stderr


# ----------------------------------------------------------------------------------------------------------------------
# Numbers that are none.

def grpo(folder, **changes):
    return grpo_video.main(grpo_args(folder, **{**TINY, "max_steps": 3, "save_every": 1, "learning_rate": 1e-3,
                                                **changes}))


def json_lines(file):
    """The values of a file of JSON lines, as JSON defines it: without NaN and Infinity."""
    def refuse(name):
        raise ValueError(name)
    return [json.loads(line, parse_constant=refuse) for line in file.read_text().splitlines()] if file.exists() else []


def questions_of_step(step, questions, per_step=2, seed=0):
    return [questions[index].id for _, index in step_batch(step, per_step, len(questions), seed)]


@pytest.fixture(scope="module")
def questions(world):
    return load_questions("annotations/training_6k.jsonl", world)


def nan_in_the_sampler(patch):
    """The copy that samples gets a NaN after the first update."""
    copy_weights, calls = runtime.copy_weights, []

    def copy(policy, target):
        copy_weights(policy, target)
        calls.append(1)
        if len(calls) == 2:
            next(iter(target.model.language_model.layers[0].parameters())).view(-1)[0] = float("nan")
    patch.setattr(runtime, "copy_weights", copy)


def after_the_first(patch, owner, name, spoil):
    """From the second call on a function returns `spoil` of what it returned."""
    function, calls = getattr(owner, name), []

    def spoilt(*args, **kwargs):
        calls.append(1)
        result = function(*args, **kwargs)
        return result if len(calls) == 1 else spoil(result)
    patch.setattr(owner, name, spoilt)


def spoilt_by(owner, name, spoil):
    return lambda patch: after_the_first(patch, owner, name, spoil)


NAN, INF = float("nan"), float("inf")
NOT_FINITE = {  # what -> (how it comes about, the phase in which it is found, what the error says)
    "the sampler": (nan_in_the_sampler, "rollout", "sampler's log-probs of question {}"),
    "log-probs": (spoilt_by(model.Policy, "forward", lambda found: (found[0] * NAN, found[1])),
                  "update", "log-probs or loss of question {}"),
    "advantages": (spoilt_by(grpo_video, "group_advantages", lambda found: found * NAN),
                   "update", "loss of question {}"),
    "loss with a finite gradient": (
        spoilt_by(grpo_video, "grpo_token_loss", lambda found: (found[0] + INF, *found[1:])),
        "update", "loss of question {}"),
    "gradient": (spoilt_by(grpo_video, "grpo_token_loss", lambda found: (found[0] * 1e38, *found[1:])),
                 "update", "the gradient norm is (inf|nan)"),
    "a number that is only logged": (spoilt_by(model.Policy, "forward", lambda found: (found[0], found[1] + INF)),
                                     "log", "not finite: entropy")}


@pytest.mark.parametrize("what", NOT_FINITE)
def test_a_number_that_is_not_finite_ends_the_run_with_its_place(tmp_path, monkeypatch, capfd, reward_noise, questions,
                                                                 what):
    spoil, phase, message = NOT_FINITE[what]
    with monkeypatch.context() as patch:
        spoil(patch)
        with pytest.raises(FloatingPointError) as error:
            grpo(tmp_path, learn_flat_groups=True, max_steps=2, save_every=1 if what == "gradient" else 0)
    ids = questions_of_step(1, questions)
    found = re.search(message.format(r"([\w, -]+)"), str(error.value))
    assert found, error.value
    if "{}" in message:
        assert set(found[1].removesuffix(" are not finite").split(" are")[0].split(", ")) <= set(ids)
    assert runtime.where() == f"rank 0, step 1, {phase}"
    assert [m["step"] for m in json_lines(tmp_path / "metrics.jsonl")] == [0]
    if what == "gradient":  # the checkpoint is good, and the way that the error names goes on
        grpo(tmp_path, learn_flat_groups=True, max_steps=2, resume=True, change=["learning_rate"], learning_rate=1e-4)
        assert "resuming after step 1" in capfd.readouterr().out
        assert all(weight.isfinite().all() for weight in weights(tmp_path).values())


def test_a_reward_that_is_nan_ends_the_run(tmp_path, monkeypatch, questions):
    monkeypatch.setattr(grpo_video, "accuracy_reward", lambda text, example: float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        grpo(tmp_path)
    assert json_lines(tmp_path / "metrics.jsonl") == []


def test_sft_with_a_loss_that_is_not_finite_ends_with_its_question(tmp_path, monkeypatch, world):
    after_the_first(monkeypatch, model.Policy, "forward", lambda found: (found[0] - float("inf"), found[1]))
    with pytest.raises(FloatingPointError, match="log-probs of question"):
        sft(tmp_path)
    assert [m["step"] for m in json_lines(tmp_path / "metrics.jsonl")] == [0]
    assert checkpoints(tmp_path) == ["step_000001"]


def test_nan_on_one_rank_ends_all_with_its_place(tmp_path, world, start, questions):
    hook = hooked(tmp_path, """
import model
forward, calls = model.Policy.forward, []
def spoilt(*args, **kwargs):
    calls.append(1)
    logps, entropy = forward(*args, **kwargs)
    return (logps * float('nan') if RANK == 1 and len(calls) > 1 else logps), entropy
model.Policy.forward = spoilt""")
    folder = tmp_path / "run"
    process = start(*ranks(hook, "grpo_video.py", *GRPO_FLAGS, "--learn_flat_groups", "True", "--save_every", "1",
                           "--output_dir", folder))
    assert process.finish() == 1
    # Of all ranks: within one second torchrun takes any for the first, also the one that only lost its neighbour.
    summary = process.text()[process.text().index("Failures:"):]
    name = questions_of_step(1, questions)[1]
    assert re.search(rf"FloatingPointError \(rank 1, step 1, update, .*log-probs or loss of question {name} are not "
                     "finite; resume .*--change learning_rate", summary)
    assert [m["step"] for m in json_lines(folder / "metrics.jsonl")] == [0] and checkpoints(folder) == ["step_000001"]


def test_no_clipping_is_a_norm_without_bound(tmp_path, world):
    for name, norm in (("none", 0.0), ("huge", 1e30), ("small", 1e-3)):
        sft(tmp_path / name, max_steps=2, save_every=0, max_grad_norm=norm)
    assert same_weights(tmp_path / "none", tmp_path / "huge")
    assert not same_weights(tmp_path / "none", tmp_path / "small")


# ----------------------------------------------------------------------------------------------------------------------
# Data that cannot be read.

def image_world(root, world, keep):
    """A data root with the first questions that have an image and no video, at most `keep`."""
    for name in ("training_6k", "validation_L1"):
        lines = [line for line in (world / f"annotations/{name}.jsonl").read_text().splitlines()
                 if not json.loads(line)["task_progress_metadata"]][:keep]
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / f"annotations/{name}.jsonl").write_text("\n".join(lines) + "\n")
        for question in load_questions(f"annotations/{name}.jsonl", root):
            question.image.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(world / question.image.relative_to(root), question.image)
    return root


def test_too_many_unreadable_videos_end_the_run_after_200(tmp_path, world):
    root = image_world(tmp_path / "data", world, 40)
    gone = load_questions("annotations/training_6k.jsonl", root)[:4]
    for question in gone:
        question.image.unlink()
    flags = dict(data_root=str(root), prompts_per_step=40, group_size=2, max_completion_length=2, max_steps=6,
                 save_every=0)
    with pytest.raises(ValueError, match="20 of 200 questions could not be read.*--max_bad_frac") as error:
        grpo(tmp_path / "run", **flags)
    assert all(f"question {question.id}: {question.image}" in str(error.value) for question in gone)
    assert [m["unreadable"] for m in metrics_of(tmp_path / "run")] == [4] * 5
    # Seldom enough is a matter of taste, and the run goes on where it was.
    grpo(tmp_path / "run", **flags, max_bad_frac=0.2, resume=True)
    assert [m["step"] for m in metrics_of(tmp_path / "run")] == list(range(6))


def test_a_rank_that_cannot_read_anything_ends_the_run(tmp_path, world, start):
    # As on a node on which the disk with the videos is not mounted: rank 1 has the annotations alone.
    root = image_world(tmp_path / "data", world, 40)
    (tmp_path / "bare").mkdir()
    shutil.copytree(root / "annotations", tmp_path / "bare/annotations")
    hook = hooked(tmp_path, f"if RANK == 1:\n    sys.argv += ['--data_root', {str(tmp_path / 'bare')!r}]")
    folder = tmp_path / "run"
    process = start(*ranks(hook, "grpo_video.py", "--model", toy.BASE, "--data_root", root, "--output_dir", folder,
                           *as_flags(prompts_per_step=40, group_size=2, max_completion_length=2, max_steps=8,
                                     num_workers=0)))
    assert process.finish() == 1
    assert "100 of 200 questions could not be read" in process.text() and "unreadable videos" in process.text()
    lines = metrics_of(folder)
    assert len(lines) == 5
    assert all((m["unreadable_frac"], m["unreadable_frac_worst_rank"], m["unreadable"]) == (0.5, 1, 20) for m in lines)


def test_a_few_unreadable_videos_of_one_rank_are_a_sign_of_trouble():
    metrics = dict(lr=1e-6, grad_norm=1.0, unreadable_frac=0.0125, unreadable_frac_worst_rank=0.1)  # one of eight ranks
    assert "unreadable" in run_.health(metrics, {})
    assert run_.health({**metrics, "unreadable_frac_worst_rank": 0.0125}, {}) == "ok"


def test_a_step_of_which_nothing_can_be_read_is_skipped_and_counted(tmp_path, world, capfd, reward_noise):
    root = image_world(tmp_path / "data", world, 8)
    questions = load_questions("annotations/training_6k.jsonl", root)
    for _, index in step_batch(1, 2, 8, 0):
        questions[index].image.write_bytes(b"not a picture")
    flags = dict(data_root=str(root), max_steps=4)
    grpo(tmp_path / "run", **flags, keep_checkpoints=4)
    lines = metrics_of(tmp_path / "run")
    assert [(m["step"], m["unreadable"], m["skipped_steps"]) for m in lines] == [(0, 0, 0), (2, 0, 1), (3, 0, 1)]
    said = capfd.readouterr().out
    assert all(f"step 1: left out question {id_}" in said for id_ in questions_of_step(1, questions))
    # A resumption that meets the same step again gets past it.
    shutil.copytree(tmp_path / "run/final", tmp_path / "straight/final")
    for checkpoint in ("step_000002", "step_000003", "step_000004"):
        shutil.rmtree(tmp_path / "run/checkpoints" / checkpoint)
    grpo(tmp_path / "run", **flags, save_every=0, resume=True)
    assert "resuming after step 1" in capfd.readouterr().out
    assert same_weights(tmp_path / "run", tmp_path / "straight")
    assert [m["step"] for m in metrics_of(tmp_path / "run")] == [0, 2, 3]


def test_sft_skips_a_step_of_which_nothing_can_be_read_and_ends_if_that_is_all(tmp_path, world, monkeypatch):
    read, bad = data.VideoDataset.__getitem__, []

    def unreadable(self, pair):
        example = read(self, pair)
        example.error = example.error or ("no such file" if pair in bad else "")
        return example
    monkeypatch.setattr(data.VideoDataset, "__getitem__", unreadable)
    bad += step_batch(1, 2, 704, 0)
    sft(tmp_path / "run", max_steps=3, save_every=0)
    assert [(m["step"], m["skipped_steps"]) for m in metrics_of(tmp_path / "run")] == [(0, 0), (2, 1)]
    bad += [pair for step in range(3) for pair in step_batch(step, 2, 704, 0)]
    with pytest.raises(ValueError, match="6 of 6 questions could not be read"):
        sft(tmp_path / "none", max_steps=3, save_every=0)
    assert not (tmp_path / "none/final").exists()


def test_broken_files_are_named_and_counted(tmp_path, world, capfd):
    root = image_world(tmp_path / "data", world, 20)
    questions = load_questions("annotations/training_6k.jsonl", root)
    questions[3].image.unlink()
    questions[5].image.write_bytes(b"garbage")
    grpo(tmp_path / "run", data_root=str(root), prompts_per_step=20, max_steps=1, max_completion_length=2,
         save_every=0)
    m, = metrics_of(tmp_path / "run")
    assert (m["unreadable"], m["unreadable_frac"]) == (2, 0.1)
    said = capfd.readouterr()
    assert all(f"left out question {questions[n].id}: {questions[n].image}" in said.out for n in (3, 5))
    assert "unreadable videos" in said.err


def test_an_evaluation_of_which_nothing_can_be_read_fails(tmp_path, world, capfd):
    root = image_world(tmp_path / "data", world, 4)
    few = dict(data_root=str(root), eval_files=["annotations/validation_L1.jsonl"], num_workers=0)
    files = [question.image for question in load_questions(few["eval_files"][0], root)]
    files[0].unlink()
    row, *_ = evaluate.main(eval_args(tmp_path / "some", **few))
    assert row["unreadable"] == 1
    assert re.search(r"!!! 1 of 4 questions could not be read and count as wrong; .* !!!", capfd.readouterr().out)
    for file in files[1:]:
        file.unlink()
    with pytest.raises(ValueError, match="4 of 4 questions could not be read"):
        evaluate.main(eval_args(tmp_path / "none", **few))


def kill_an_evaluation(patch, batches):
    """It is killed while it answers the batch after so many."""
    answer, calls = evaluate.answer, []

    def killed(*args):
        calls.append(1)
        if len(calls) > batches:
            raise Killed
        return answer(*args)
    patch.setattr(evaluate, "answer", killed)


FEW = dict(eval_files=["annotations/validation_L1.jsonl"], max_questions=12, batch_size=2, max_completion_length=12)


def half_an_evaluation(folder):
    """Six of twelve questions are answered, and a kill has torn the line of another; returns those that are answered.

    A mark in each answer, to see whether it is kept.
    """
    with pytest.MonkeyPatch.context() as patch:
        kill_an_evaluation(patch, 3)
        with pytest.raises(Killed):
            evaluate.main(eval_args(folder, **FEW, num_workers=0))
    run_.LOCKS.clear()  # as the end of a process does
    file, = folder.glob("samples_rank*.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == 6
    marked = "".join(json.dumps({**record, "response": record["response"] + " MARK"}) + "\n" for record in records)
    file.write_text(marked + '{"file": "annotations/vali')
    return {record["sample_id"] for record in records}


def assert_evaluation_went_on(folder, straight, answered):
    one, two = ([json.loads(line) for line in (place / "samples.jsonl").read_text().splitlines()]
                for place in (straight, folder))
    assert {r["sample_id"] for r in two if r["response"].endswith(" MARK")} == answered
    assert one == [{**record, "response": record["response"].removesuffix(" MARK")} for record in two]
    assert (folder / "results.json").exists() and not list(folder.glob("samples_rank*"))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, world):
    folder = tmp_path_factory.mktemp("evaluated")
    evaluate.main(eval_args(folder, **FEW, num_workers=0))
    return folder


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path, evaluated):
    answered = half_an_evaluation(tmp_path / "run")
    evaluate.main(eval_args(tmp_path / "run", **FEW, num_workers=0, resume=True))
    assert_evaluation_went_on(tmp_path / "run", evaluated, answered)
    before = contents(tmp_path / "run")
    evaluate.main(eval_args(tmp_path / "run", **FEW, num_workers=0, resume=True))  # nothing is left to do
    assert contents(tmp_path / "run")["samples.jsonl"] == before["samples.jsonl"]
    with pytest.raises(ValueError, match="--max_completion_length 13"):
        evaluate.main(eval_args(tmp_path / "run", **{**FEW, "max_completion_length": 13}, resume=True))


def test_an_evaluation_that_is_killed_between_its_files_counts_nothing_twice(tmp_path, evaluated, monkeypatch):
    # At the end: all answers are in one file, and still in those of the ranks. The same when it is resumed.
    def killed(path, *_, **__):
        raise Killed
    for resume in (False, True):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "unlink", killed)
            evaluate.main(eval_args(tmp_path / "run", **FEW, num_workers=0, resume=resume))
    evaluate.main(eval_args(tmp_path / "run", **FEW, num_workers=0, resume=True))
    assert_evaluation_went_on(tmp_path / "run", evaluated, set())


def test_a_killed_evaluation_goes_on_on_other_ranks(tmp_path, evaluated, start):
    answered = half_an_evaluation(tmp_path / "run")
    flags = [word for name, value in FEW.items() if name != "eval_files" for word in (f"--{name}", value)]
    process = start(*ranks("evaluate.py", "--eval_files", *FEW["eval_files"], *flags, "--num_workers", "0",
                           "--output_dir", tmp_path / "run", "--resume"))
    assert process.finish() == 0, process.text()[-4000:]
    assert_evaluation_went_on(tmp_path / "run", evaluated, answered)


def test_training_on_an_evaluation_file_is_said_aloud(tmp_path, world, capfd):
    grpo(tmp_path / "L1", train_file="annotations/validation_L1.jsonl", max_steps=1, save_every=0)
    assert re.search(r"!!! \S*validation_L1.jsonl .* !!!", capfd.readouterr().out)
    grpo(tmp_path / "train", max_steps=1, save_every=0)
    assert "!!!" not in capfd.readouterr().out


def test_a_model_without_all_its_tensors_or_with_more_is_refused(tmp_path, world):
    base = without_a_tensor(tmp_path / "less")
    with pytest.raises(ValueError, match="--model .*missing.*input_layernorm"):
        grpo(tmp_path / "run", model=str(base))
    with pytest.raises(ValueError, match="--model .*missing.*input_layernorm"):
        evaluate.main(eval_args(tmp_path / "eval", **FEW, model=str(base)))
    shutil.copytree(toy.BASE, tmp_path / "more")
    tensors = load_file(toy.BASE / "model.safetensors")
    save_file({**tensors, "model.adapter.weight": torch.zeros(2)}, tmp_path / "more/model.safetensors",
              metadata={"format": "pt"})
    with pytest.raises(ValueError, match="--model .*unexpected.*adapter"):
        grpo(tmp_path / "run", model=str(tmp_path / "more"))
    assert not (tmp_path / "run").exists() and not (tmp_path / "eval").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Ranks that hang or die.

def test_a_rank_that_hangs_ends_the_run_in_time(tmp_path, world, start):
    folder = tmp_path / "run"
    process = start(*ranks("sft_video.py", *SFT_FLAGS, "--max_steps", "1000", "--timeout_minutes", "0.1",
                           "--output_dir", folder))
    wait_for_step(process, folder, 2)
    rank_0 = writer(folder)
    rank_1, = set(workers_of(process)) - {rank_0}
    step = last_step(folder)
    os.kill(rank_1, signal.SIGSTOP)
    assert 4 < wait(lambda: not alive(rank_0), 120) < 60
    os.kill(rank_1, signal.SIGKILL)  # as torchrun does, when it has waited half a minute for it to end
    assert process.finish() == 1
    found = re.search(r"rank 0, step (\d+), (\w+): for (\d+) s now; does another rank hang", process.text())
    assert found and step <= int(found[1]) <= step + 2 and found[2] in ("update", "log", "checkpoint")
    assert rf"(rank 0, step {found[1]}, {found[2]}, " in process.text()[process.text().index("Root Cause"):]


def test_a_rank_that_is_killed_ends_the_run_at_once_and_it_can_be_resumed(tmp_path, undisturbed, start):
    folder = tmp_path / "run"
    process = start(*ranks("grpo_video.py", *GRPO_FLAGS, "--output_dir", folder))
    wait_for_step(process, folder, 7)
    rank_0 = writer(folder)
    rank_1, = set(workers_of(process)) - {rank_0}
    os.kill(rank_1, signal.SIGKILL)
    assert wait(lambda: not alive(rank_0), 60) < 20
    assert process.finish() == 1 and re.search(r"Signal 9 \(SIGKILL\) received by PID " + str(rank_1), process.text())
    process = start(*ranks("grpo_video.py", *GRPO_FLAGS, "--output_dir", folder, "--resume"))
    wait_for_step(process, folder, 12)
    for pid in [process.pid, *descendants(process.pid)]:  # the whole tree: the machine is gone
        os.kill(pid, signal.SIGKILL)
    process.wait()
    wait(lambda: is_free(folder), 60)
    process = start(*ranks("grpo_video.py", *GRPO_FLAGS, "--output_dir", folder, "--resume"))
    assert process.finish() == 0 and "resuming after step" in process.text()
    assert_same_run(folder, undisturbed)


def test_another_number_of_ranks_resumes_the_same_run(tmp_path, undisturbed):
    # Two ranks have saved after 20 steps; one goes on.
    run = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    while checkpoints(run)[-1] != "step_000020":
        shutil.rmtree(run / "checkpoints" / checkpoints(run)[-1])
    grpo_video.main(grpo_args(run, prompts_per_step=2, num_workers=1, save_every=5, group_size=4, max_steps=24,
                              print_every=1, resume=True))
    two, one = numbers(undisturbed), numbers(run)
    assert one[:20] == two[:20] and len(one) == 24
    for a, b in zip(one[20:], two[20:], strict=True):
        for name in ("reward", "accuracy", "parse_rate", "completion_length"):
            assert a[name] == b[name]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6, abs=1e-12)
    assert any(m["grad_norm"] > 0 for m in one[20:])


# ----------------------------------------------------------------------------------------------------------------------
# What a long run uses up, and what a model from strangers may not do.

def in_use():
    """(resident MB, descriptors, threads, processes below, zombies among them) of this process."""
    status = Path("/proc/self/status").read_text()
    value = {name: int(re.search(rf"{name}:\s*(\d+)", status)[1]) for name in ("VmRSS", "Threads")}
    below = descendants(os.getpid())
    return (value["VmRSS"] / 1024, len(os.listdir("/proc/self/fd")), value["Threads"], len(below),
            sum(not alive(pid) for pid in below))


def test_a_long_run_uses_up_nothing(tmp_path, world, monkeypatch, reward_noise):
    used, advantages = [], grpo_video.group_advantages
    monkeypatch.setattr(grpo_video, "group_advantages", lambda *args: used.append(in_use()) or advantages(*args))
    grpo(tmp_path, max_steps=80, save_every=10, num_workers=1, frame_cache="")
    # Buffers of the first steps are no leak. A tenth of a MB a step would be.
    early, late = used[20:40], used[60:80]
    memory, descriptors, threads, processes, zombies = zip(*late)
    assert min(memory) - min(m for m, *_ in early) < 4
    assert max(descriptors) <= max(d for _, d, *_ in early)
    assert max(threads) <= max(t for _, _, t, *_ in early)
    assert max(processes) <= 3 and max(zombies) <= 1  # a worker, a decoder of a video, and one that it has yet to reap


def test_only_safetensors_are_read_and_no_code_of_a_model_is_run(tmp_path, world):
    mark = tmp_path / "was_here"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {mark}",)
    pickled = Path(shutil.copytree(toy.BASE, tmp_path / "pickled"))
    (pickled / "model.safetensors").unlink()
    torch.save({"weight": Evil()}, pickled / "pytorch_model.bin")
    with pytest.raises((ValueError, OSError), match="safetensors"):
        grpo(tmp_path / "run", model=str(pickled))
    mapped = Path(shutil.copytree(toy.BASE, tmp_path / "mapped"))
    (mapped / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((mapped / name).read_text())
        settings["auto_map"] = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model",
                                "AutoTokenizer": ["evil.Model", None]}
        (mapped / name).write_text(json.dumps(settings))
    (mapped / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    try:  # to run as a Qwen2-VL, or to refuse, are both right
        grpo(tmp_path / "run", model=str(mapped), max_steps=1, save_every=0)
    except ValueError as error:
        assert "mapped" in str(error)
    assert not mark.exists()
