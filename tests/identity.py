"""Two checkouts, one result: shows that a change of the code has moved no number.

    python tests/identity.py OLD NEW          two checkouts of this repository; about three minutes

Runs GRPO (once plainly, once with old log-probs, KL and small micro-batches), SFT and an evaluation of what GRPO has
trained in both, with one thread and one seed, and compares bit by bit: metrics.jsonl (seconds and what is derived from
them aside), samples.jsonl and the exported weights. NEW reads a copy of the videos that OLD has made, since the video
encoder does not write the same bytes twice. Names that have changed are in NAMES.
"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

# Keys of metrics.jsonl and samples.jsonl in checkouts before 2026-11-25: old name -> new name.
NAMES = {"format_rate": "format", "bad_videos": "unreadable", "actor_gap": "sampler_gap", "group": "part"}
RUNS = {  # in this order; {} is the folder of the run
    "grpo": "grpo_video.py --max_steps 12 --output_dir {}/grpo",
    "grpo_kl": "grpo_video.py --max_steps 3 --kl_coef 0.1 --num_updates 2 --micro_batch_size 12 --rollout_prompts 3 "
               "--loss_agg token_mean --output_dir {}/grpo_kl",
    "sft": "sft_video.py --max_steps 6 --output_dir {}/sft",
    "eval": "evaluate.py --model {}/grpo/final --output_dir {}/eval",
}


def run_all(checkout: Path, folder: Path) -> None:
    """The runs of one checkout, below `folder`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    for name, command in RUNS.items():
        words = [word.replace("{}", str(folder)) for word in command.split()]
        done = subprocess.run([sys.executable, *words], cwd=checkout, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{checkout}: {name} failed\n{done.stderr[-3000:]}")


def read_lines(path: Path) -> list[dict]:
    """A JSONL file under today's names, without what the clock says."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [{NAMES.get(key, key): value for key, value in record.items() if not key.endswith("_s")}
            for record in records]


def differences(old: Path, new: Path) -> list[str]:
    """What is not the same in the two folders; empty if nothing differs."""
    found = []
    for name in ("grpo/metrics.jsonl", "grpo_kl/metrics.jsonl", "sft/metrics.jsonl", "eval/samples.jsonl"):
        a, b = read_lines(old / name), read_lines(new / name)
        if len(a) != len(b):
            found.append(f"{name}: {len(a)} lines, {len(b)} lines")
        for i, (line_a, line_b) in enumerate(zip(a, b)):
            keys = [key for key in sorted(line_a) if line_a[key] != line_b.get(key)]  # a new key moves no number
            found += [f"{name}, line {i + 1}: {key} {line_a.get(key)} != {line_b.get(key)}" for key in keys]
    for name in ("grpo", "grpo_kl", "sft"):
        a, b = (load_file(folder / name / "final/model.safetensors") for folder in (old, new))
        found += [f"{name}: weights {key}" for key in sorted(a.keys() | b.keys())
                  if key not in a or key not in b or not a[key].equal(b[key])]
    return found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / side for side in ("old", "new")]
        old, new = (Path(checkout).resolve() for checkout in sys.argv[1:3])
        run_all(old, folders[0])
        shutil.rmtree(new / "out/toy", ignore_errors=True)
        shutil.copytree(old / "out/toy", new / "out/toy")
        run_all(new, folders[1])
        found = differences(*folders)
    print("\n".join(found[:40]) or "identical: metrics, answers and weights")
    sys.exit(bool(found))
