"""A run that is killed, stopped and damaged every 20 to 40 steps, against the same run left alone.

    python tests/soak.py                         # 300 steps on two ranks of the toy world, about ten minutes
    python tests/soak.py --steps 100 --seed 1    # another, shorter story

After each event the run is started again with --resume and nothing else. In the end both runs must be one: the same
weights bit by bit, the same numbers in metrics.jsonl, each step and each printed completion once. Exit status 1 if not.
A line for each event says what was done and what the resumption said; docs/soak.txt is the output of a whole run.
"""
import argparse
import fcntl
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
SAVE_EVERY = 10
LIMIT_S = 600  # of any single wait: generous, because other processes may want the cores
# Completions of up to 40 tokens: about 20 are sampled, answers parse, and so there is something to learn.
FLAGS = f"--prompts_per_step 2 --max_completion_length 40 --num_workers 1 --save_every {SAVE_EVERY} --print_every 5"


class Launch:
    """torchrun with two ranks, its output in a file."""

    def __init__(self, output_dir: Path, log: Path, steps: int, *more: str):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                   "grpo_video.py", "--max_steps", str(steps), "--output_dir", str(output_dir), *FLAGS.split(), *more]
        self.output_dir, self.log = output_dir, log
        with open(log, "w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
                                            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                                                 "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(LIMIT_S)})

    def ended(self) -> bool:
        return self.process.poll() is not None

    def wait_for_step(self, step: int) -> bool:
        """True as soon as the step is logged; False if the run has ended before."""
        wait(lambda: self.ended() or last_step(self.output_dir) >= step)
        return last_step(self.output_dir) >= step and not self.ended()

    def wait_until_loaded(self) -> None:
        wait(lambda: self.ended() or re.search("after step|no checkpoint", self.said()))

    def said(self) -> str:
        """What it printed about where it goes on."""
        return "; ".join(re.findall(r"resuming after step \d+|no checkpoint yet|\S+ is damaged: [^\n]+",
                                    self.log.read_text(errors="replace"))).replace(f"{self.output_dir}/", "")


def wait(condition, limit_s: float = LIMIT_S) -> float:
    """Polls until the condition holds; returns the seconds. TimeoutError after limit_s."""
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > limit_s:
            raise TimeoutError(f"waited {limit_s} s in vain")
        time.sleep(0.05)
    return time.monotonic() - start


def last_step(output_dir: Path) -> int:
    """The last step of metrics.jsonl whose line is whole; -1 if there is none."""
    file = output_dir / "metrics.jsonl"
    found = re.findall(r'^\{"step": (\d+).*\}\n', file.read_text(), re.MULTILINE) if file.exists() else []
    return int(found[-1]) if found else -1


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, by /proc; ranks have sessions of their own, so that no group holds them all."""
    children = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, below = [], [pid]
    while below:
        below = [child for parent in below for child in children.get(parent, [])]
        found += below
    return found


def writer(output_dir: Path) -> int:
    """The process of rank 0."""
    return int((output_dir / "lock").read_text().split()[1])


def is_free(output_dir: Path) -> bool:
    """Whether no process writes to the folder any more."""
    with open(output_dir / "lock", "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def kill(pids: list[int], number: int) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass


def disturb(launch: Launch, what: str, rng: random.Random) -> None:
    torchrun, rank_0 = launch.process.pid, writer(launch.output_dir)
    if what == "SIGKILL of the whole tree":
        kill([torchrun, *descendants(torchrun)], signal.SIGKILL)
    elif what == "SIGKILL of torchrun alone":
        kill([torchrun], signal.SIGKILL)
    elif what == "SIGKILL of one rank":
        ranks = [pid for pid in descendants(torchrun) if parent_of(pid) == torchrun]
        kill([rng.choice(sorted(ranks))], signal.SIGKILL)
    else:
        kill([rank_0 if what.endswith("rank 0") else torchrun], signal.SIGTERM)
    launch.process.wait(LIMIT_S)


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


EVENTS = ("SIGKILL of the whole tree", "SIGKILL of torchrun alone", "SIGKILL of one rank", "SIGTERM to rank 0",
          "SIGTERM to torchrun")


def flip_a_bit(output_dir: Path, rng: random.Random) -> str:
    """Spoils the newest whole checkpoint; the one before it has to serve."""
    folder = max(file.parent for file in output_dir.glob("checkpoints/*/SHA256SUMS"))
    file = rng.choice(sorted(folder.glob("*.distcp")))
    place, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
    with open(file, "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1 << bit]))
    return f"bit {bit} of byte {place} of {folder.name}/{file.name} flipped"


def numbers(output_dir: Path) -> list[dict]:
    """metrics.jsonl without seconds, and without what is counted since a resumption."""
    lines = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items()
             if not name.endswith("_s") and "unreadable" not in name and name != "skipped_steps"} for line in lines]


def differences(straight: Path, disturbed: Path, steps: int) -> list[str]:
    """What is not the same, in words."""
    found = []
    a, b = (load_file(folder / "final/model.safetensors") for folder in (straight, disturbed))
    base = load_file(ROOT / "assets/toy_base/model.safetensors")
    if a.keys() != b.keys() or (unequal := [name for name in a if not torch.equal(a[name], b[name])]):
        found.append(f"final weights differ: {unequal[:3]}")
    if all(torch.equal(a[name], base[name].to(a[name].dtype)) for name in a):
        found.append("the run has learned nothing: equal weights show nothing")
    one, two = numbers(straight), numbers(disturbed)
    if [line["step"] for line in two] != list(range(steps)):
        found.append(f"metrics.jsonl has the steps {[line['step'] for line in two]}")
    if wrong := [line["step"] for line, other in zip(one, two) if line != other]:
        found.append(f"metrics.jsonl differs in the steps {wrong[:10]}")
    one, two = ((folder / "completions.txt").read_text() for folder in (straight, disturbed))
    entries = re.findall(r"^--- step (\d+)", two, re.MULTILINE)
    if entries != [str(step) for step in range(0, steps, 5)]:
        found.append(f"completions.txt has the steps {entries}")
    if one != two:
        found.append("completions.txt differs")
    return found


def soak(steps: int, seed: int, folder: Path) -> list[str]:
    """Both runs; returns what differs."""
    rng, straight, disturbed = random.Random(seed), folder / "straight", folder / "disturbed"
    start = time.monotonic()
    launch = Launch(straight, folder / "straight.log", steps)
    if launch.process.wait(LIMIT_S + 10 * steps):
        return [f"the undisturbed run failed, see {launch.log}"]
    print(f"undisturbed: {steps} steps in {time.monotonic() - start:.0f} s", flush=True)

    start, at, count, kinds = time.monotonic(), rng.randint(20, 40), 0, []
    flips = set(rng.sample(range(2, max(4, steps // 30 - 1)), 2))  # not the first: there must be two checkpoints
    launch = Launch(disturbed, folder / "disturbed_00.log", steps)
    while at < steps and launch.wait_for_step(at):
        kinds = kinds or rng.sample(EVENTS, len(EVENTS))  # each kind as often as any other
        what = kinds.pop()
        disturb(launch, what, rng)
        stopped = re.findall(r"^stopped by a signal after \d+ steps", launch.log.read_text(errors="replace"), re.M)
        line = [f"step {last_step(disturbed):3}", what + f" ({launch.process.returncode})", *stopped[:1]]
        # At once but for the lock: whoever outlives torchrun must let go of the folder by itself.
        line.append(f"folder free after {wait(lambda: is_free(disturbed), 60):.1f} s")
        if count in flips:
            line.append(flip_a_bit(disturbed, rng))
        count, before = count + 1, last_step(disturbed)
        launch = Launch(disturbed, folder / f"disturbed_{count:02}.log", steps, "--resume")
        launch.wait_until_loaded()
        print("; ".join(line), "->", launch.said() or f"ended with {launch.process.poll()}", flush=True)
        if what.startswith("SIGTERM") and count - 1 not in flips and f"step {before + 1}" not in launch.said():
            return [f"stopped after step {before}, but: {launch.said()}"]
        at += rng.randint(20, 40)
    if status := launch.process.wait(LIMIT_S + 10 * steps):
        return [f"the disturbed run ended with {status}, see {launch.log}"]
    print(f"disturbed: {steps} steps, {count} events, in {time.monotonic() - start:.0f} s", flush=True)
    if not count:
        return ["nothing has happened: more steps, please"]
    return differences(straight, disturbed, steps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of what happens and when, not of the training")
    args = parser.parse_args()
    print(f"python tests/soak.py --steps {args.steps} --seed {args.seed}: two ranks, {FLAGS}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="soak_"))
    found = soak(args.steps, args.seed, folder)
    if found:
        print("NOT THE SAME: " + "; ".join(found) + f". All is in {folder}")
        sys.exit(1)
    shutil.rmtree(folder)
    print("the same: final weights bit by bit, every number of metrics.jsonl, every entry of completions.txt")
