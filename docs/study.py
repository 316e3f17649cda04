"""The study: runs what is listed in docs/arms.py, and keeps what came of it. What it found is in docs/study.md.

    python docs/study.py                    # the toy world: runs what is missing, two at a time
    python docs/study.py --only S1 -j 4     # the runs of one question, four at a time; or runs by their names
    python docs/study.py --only tuning      # of the rates: before they are chosen, no more than this
    python docs/study.py --quick            # one seed, a quarter of the questions, into out/study_quick
    python docs/study.py --print            # the commands that are missing; runs nothing
    python docs/study.py --only S1 --model Qwen/Qwen2-VL-7B-Instruct --data_root DIR --out out/7b --processes 8 -j 1

A run is a few commands, its parts: train, evaluate, measure. The numbers of each part go to the run's summary, a small
JSON file in docs/study/ that is committed: what a summary has is not run again, on any machine. Models and samples lie
in out/study/. After a kill the same command goes on where it stopped, in the middle of a training run too (--resume). A
part whose command is no longer the one in its summary is run again.

To add a question: its runs into docs/arms.py, its table into docs/study_report.py, its picture into
docs/study_pictures.py. `make study` runs and draws.

What is trained again, on another machine say, may come out with other weights, by rounding; then nothing that was
measured of the old ones is kept.
"""
import argparse
import itertools
import json
import os
import re
import shlex
import signal
import string
import subprocess
import sys
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from docs.arms import (  # noqa: E402
    BLIND,
    CANDIDATES,
    EVALUATIONS,
    FRESH,
    GRPO,
    LEVELS,
    MEASURED,
    RUNS,
    SEEDS,
    SFT,
    STUDIES,
    TEACHERS,
    TUNING,
    Run,
    measured,
    name_at,
    seeds_of,
)
from run import sha256, write_whole  # noqa: E402
from toy import CLAIMS, NEXT, check_claims  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------------
# From a run to its commands.

@dataclass(frozen=True)
class Setting:
    """Where a study runs. Its defaults are the toy world's."""
    model: str = "toy"
    data_root: str = "toy"
    out: str = "out/study"
    summaries: str = "docs/study"
    budget: int = 2112  # questions, counted with repetitions: three times the 704 of the training file
    sft_batch: int = 32  # questions a step, the default of sft_video.py there
    grpo_batch: int = 8
    max_questions: int = 0  # of a file, in evaluations; 0: all
    processes: int = 1  # of a command, by torchrun
    flags: tuple[str, ...] = ()  # of every command

    @property
    def toy(self) -> bool:
        return self.data_root == "toy"

    def complete(self, command: list[str]) -> list[str]:
        """A command with the user's own flags, over which those that make a run what it is win, and the data root."""
        return [command[0], *self.flags, *command[1:], *([] if self.toy else ["--data_root", self.data_root])]

    def folder(self, run: Run, seed: int) -> str:
        return f"{self.out}/{run.name}_seed{seed}" if run.script else f"{self.out}/{run.name}"

    def model_of(self, run: Run, seed: int) -> str:
        return f"{self.folder(run, seed)}/final" if run.script else self.model

    def train_file(self, name: str) -> str:
        """A file of the study, as the scripts' --train_file wants it: seen from the data root."""
        data_root = "out/toy" if self.toy else self.data_root
        return os.path.relpath(os.path.realpath(ROOT / self.out / "data" / f"{name}.jsonl"),
                               os.path.realpath(ROOT / data_root))


def file_command(name: str, seed: int, setting: Setting) -> list[str]:
    """The command that writes a training file of the study."""
    output = f"{setting.out}/data/{name}.jsonl"
    if name.startswith("own"):
        return setting.complete(["docs/own_answers.py", "--model", setting.model, "--seed", f"{seed}", "--output_file",
                                 output])
    if name.startswith("habit"):
        return ["docs/habit.py", name.removeprefix("habit"), output]
    if part_of := re.match(r"(sft|grpo)(\d+)_seed", name):
        source = "training_with_cot_6k" if part_of[1] == "sft" else "training_6k"
        root = "out/toy" if setting.toy else setting.data_root
        return ["docs/subset.py", f"{root}/annotations/{source}.jsonl", part_of[2], f"{seed}", output]
    return ["docs/teachers.py", name, output]


def files_of(run: Run, seed: int, part: str) -> list[str]:
    """The files of the study that a part reads."""
    if part.startswith("blind"):
        return ["habit" + part.removeprefix("blind").partition("_")[0]]
    return [run.train_file.format(seed=seed)] if part == "train" and run.train_file else []


def parts(run: Run, seed: int, setting: Setting) -> dict[str, list[str]]:
    """part -> its command, without the interpreter."""
    folder, model, found = setting.folder(run, seed), setting.model_of(run, seed), {}
    if run.script:
        batch = setting.sft_batch if run.script == SFT else setting.grpo_batch
        start = setting.model_of(RUNS[run.after], seed) if run.after else setting.model
        found["train"] = [
            run.script, *shlex.split(run.flags), "--model", start, "--max_steps",
            f"{max(1, round(run.share * setting.budget) // batch)}", "--seed", f"{seed}", "--output_dir", folder]
        if run.train_file:
            found["train"] += ["--train_file", setting.train_file(run.train_file.format(seed=seed))]
        if run.leave_out:
            base = setting.folder(RUNS["base"], seed)
            found["train"] += ["--leave_out", *(f"{base}/{part}/samples.jsonl" for part in run.leave_out)]
        found["train"] += (["--learning_rate", f"{run.rate:g}"] if setting.toy else
                           ["--prompts_per_step", f"{batch}", *shlex.split(run.real_flags)])
    evaluate = ["evaluate.py", "--model", model, "--max_questions", f"{setting.max_questions}"]
    if setting.toy and seed == SEEDS[0] and run.name in STUDIES["tuning"]:
        found["tuning"] = [*evaluate, "--eval_files", *TUNING, "--output_dir", f"{folder}/tuning"]
    for part in measured(run.name):
        if part in EVALUATIONS:
            with_levels = not setting.toy or run.name in STUDIES["S1"] and part in ("full", "random")
            files = [*(LEVELS if with_levels else ()), *(FRESH if setting.toy else ())]
            found[part] = [*evaluate, *EVALUATIONS[part].split(), "--eval_files", *files, "--output_dir",
                           f"{folder}/{part}"]
        elif part == "attention":
            found[part] = ["attention.py", "--model", model, "--output_dir", f"{folder}/attention"]
        elif part == "distance":
            found[part] = ["docs/distance.py", "--model", setting.model, "--trained", model, "--output_file",
                           f"{folder}/distance.json"]
        elif setting.toy:  # S10: of the base, in the toy world
            (file,), number = files_of(run, seed, part), part.rpartition("_")[2]
            found[part] = [*evaluate, "--video", "blank", "--eval_files", setting.train_file(file), "--seed", number,
                           "--output_dir", f"{folder}/{part}"]
    return {part: setting.complete(command) for part, command in found.items()}


# ----------------------------------------------------------------------------------------------------------------------
# What is kept of a part: small enough to be committed, enough to compute anything from.

def agrees(record: dict) -> bool | None:
    """Whether an answer follows from its reasoning: the option it concludes with, and in the toy world the step that it
    names as the next one, are what is answered. None where it concludes nothing, or nothing is answered."""
    if record["concluded"] is None or record["parsed"] is None:
        return None
    said = NEXT.search(record["response"].split("</think>")[0])
    answered = record["options"][string.ascii_uppercase.index(record["parsed"])]
    return record["concluded"] == record["parsed"] and (said is None or said.group(1).strip() == answered)


def summarise_answers(samples: Path) -> dict:
    """file -> of its questions with a video, in the order of their ids, a character each: right (1, 0, or . where no
    answer was found), agrees (1, 0, or . for None) and tasks (a for the first of `goals`); and, in the toy world, kind
    of claim -> [how many hold, how many there are]."""
    of_file = defaultdict(list)
    for record in map(json.loads, samples.read_text().splitlines()):
        if record["video"]:
            of_file[Path(record["file"]).stem].append(record)
    summary = {}
    for file, records in of_file.items():
        records.sort(key=lambda record: record["sample_id"])
        claims = {kind: [0, 0] for kind in CLAIMS}
        for r in records:
            for kind, _, holds in check_claims(r["response"], r["goal"], tuple(r["progress"]), tuple(r["options"])):
                claims[kind] = [claims[kind][0] + holds, claims[kind][1] + 1]
        goals = sorted({r["goal"] for r in records})
        summary[file] = {
            "goals": goals, "tasks": "".join(chr(ord("a") + goals.index(r["goal"])) for r in records),
            "right": "".join("." if r["parsed"] is None else f"{r['correct']:d}" for r in records),
            "agrees": "".join("." if (found := agrees(r)) is None else f"{found:d}" for r in records),
            "claims": claims}
    return summary


def summarise_training(folder: Path) -> dict:
    """Which weights came out, in how many seconds of steps, and for GRPO the share of sampled answers that were right:
    24 means one after another; and of its last 24 steps the other rewards, and how many tokens were clipped."""
    weights = "".join(sha256(file) for file in sorted((folder / "final").glob("*.safetensors")))
    seconds = json.loads((folder / "report.json").read_text())["seconds"]["step_s"]
    summary = {"weights": weights, "seconds": round(seconds)}
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if "accuracy" in metrics[0]:
        parts = np.array_split([line["accuracy"] for line in metrics], min(24, len(metrics)))
        summary["curve"] = [round(float(part.mean()), 4) for part in parts]
        for name in ("process", "agreement", "clip_frac"):
            values = [line[name] for line in metrics[-24:] if name in line]
            summary[name] = round(float(np.mean(values)), 4) if values else None
    return summary


def summarise_attention(file: Path) -> dict:
    """All of attention.json but the questions' own, the heads and the layers."""
    table = json.loads(file.read_text())["models"][0]
    kinds = {kind: {"vision": found["vision_all_layers"], "entropy": found["entropy"] and sum(found["entropy"]) / len(
        found["entropy"])} for kind, found in table["kinds"].items()}
    return {"questions": table["questions"], "max_entropy": table["max_entropy"], "kinds": kinds,
            "hiding": table["hiding"],
            **{key: {name: value for name, value in (table[key] or {}).items()
                     if name not in ("heads", "layers", "picked_heads")} for key in ("diagonal", "place")}}


def numbers_of(part: str, folder: Path) -> dict:
    """The numbers of a part that has just run."""
    if part == "train":
        return summarise_training(folder)
    if part == "attention":
        return summarise_attention(folder / "attention/attention.json")
    if part == "distance":
        return json.loads((folder / "distance.json").read_text())
    return summarise_answers(folder / part / "samples.jsonl")


# ----------------------------------------------------------------------------------------------------------------------
# Running them.

COST = {SFT: 60, GRPO: 210, "evaluate.py": 40, "attention.py": 60, "docs/distance.py": 20}  # seconds, for the bar alone


class Study:
    """Runs what is missing, several runs at a time; all that it knows is in files."""

    def __init__(self, setting: Setting, jobs: int, asked: set[str] | None = None):
        """asked: the parts that are wanted beside training; None: all."""
        self.setting, self.jobs, self.asked = setting, jobs, asked
        self.locks, self.guard = defaultdict(threading.RLock), threading.Lock()
        self.processes, self.stopping = set(), False
        threads = max(1, (os.cpu_count() or 1) // jobs)
        self.env = {"OMP_NUM_THREADS": f"{threads}", "GOMP_SPINCOUNT": "1000", **os.environ}

    def lock(self, *thing) -> threading.RLock:
        """What several runs need is made once; the others wait for it."""
        with self.guard:
            return self.locks[thing]

    def summary_file(self, run: Run, seed: int) -> Path:
        return ROOT / self.setting.summaries / f"{Path(self.setting.folder(run, seed)).name}.json"

    def summary(self, run: Run, seed: int) -> dict:
        file = self.summary_file(run, seed)
        return json.loads(file.read_text()) if file.exists() else {}

    def missing(self, run: Run, seed: int) -> dict[str, list[str]]:
        """The parts that the summary lacks, or has of another command: part -> command."""
        summary, wanted = self.summary(run, seed), parts(run, seed, self.setting)
        if self.asked is not None:
            wanted = {part: command for part, command in wanted.items() if part == "train" or part in self.asked}
        begins_anew = run.after and "train" in self.missing(RUNS[run.after], seed)
        if run.script and (begins_anew or summary.get("train", {}).get("command") != shlex.join(wanted["train"])):
            return wanted  # what was measured of another model does not hold for this one
        return {part: command for part, command in wanted.items()
                if summary.get(part, {}).get("command") != shlex.join(command)}

    def do(self, run: Run, seed: int) -> None:
        """Runs the missing parts of a run."""
        with self.lock(run.name, seed):
            if self.missing(run, seed) and run.script:
                self.train(run, seed)
            for part, command in self.missing(run, seed).items():
                self.run_part(run, seed, part, command)

    def train(self, run: Run, seed: int) -> None:
        """Sees to it that the model of a run is on this machine, and what it begins with before."""
        with self.lock(run.name, seed):
            there = (ROOT / self.setting.model_of(run, seed) / "config.json").exists()
            if there and "train" not in self.missing(run, seed):
                return
            if run.after:
                self.train(RUNS[run.after], seed)
            for part in run.leave_out:
                self.answer(part)
            self.run_part(run, seed, "train", parts(run, seed, self.setting)["train"])

    def answer(self, part: str) -> None:
        """Sees to it that what the base has answered is on this machine."""
        base = RUNS["base"]
        with self.lock(base.name, SEEDS[0]):
            if self.lacks_answers(part):
                self.run_part(base, SEEDS[0], part, parts(base, SEEDS[0], self.setting)[part])

    def lacks_answers(self, part: str) -> bool:
        samples = ROOT / self.setting.folder(RUNS["base"], SEEDS[0]) / part / "samples.jsonl"
        return not samples.exists() or part in self.missing(RUNS["base"], SEEDS[0])

    def run_part(self, run: Run, seed: int, part: str, command: list[str]) -> None:
        """Runs a part and keeps its numbers in the summary, which is begun anew for other weights."""
        folder, summary = Path(self.setting.folder(run, seed)), self.summary(run, seed)
        place, before = ROOT / folder / ("" if part == "train" else part), summary.get(part, {}).get("command")
        if before not in (None, shlex.join(command)) and place.exists():  # what another command left is out of the way
            place.rename(next(path for n in itertools.count(1) if not (path := Path(f"{place}.old{n}")).exists()))
        for name in files_of(run, seed, part):
            self.make_file(name, seed)
        self.call(f"{folder.name} {part}", command)
        numbers = {"command": shlex.join(command), **numbers_of(part, ROOT / folder)}
        if part == "train" and summary.get("train", {}).get("weights") != numbers.get("weights"):
            summary = {}
        self.summary_file(run, seed).parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.summary_file(run, seed), json.dumps(summary | {part: numbers}, indent=1) + "\n")

    def make_file(self, name: str, seed: int) -> None:
        with self.lock(name):
            if self.lacks_file(name):
                self.call(name, file_command(name, seed, self.setting))

    def lacks_file(self, name: str) -> bool:
        """Or it may have been changed: a teacher is written at once. The others may be in use."""
        return name in TEACHERS or not (ROOT / self.setting.out / "data" / f"{name}.jsonl").exists()

    def call(self, name: str, command: list[str]) -> None:
        """Runs one command to its end. RuntimeError, with its last lines, if it fails."""
        if self.stopping:
            raise RuntimeError("stopped")
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", f"{self.setting.processes}"]
        several = self.setting.processes > 1 and command[0] in (SFT, GRPO, "evaluate.py", "docs/own_answers.py")
        resume = ["--resume"] if command[0] in (SFT, GRPO, "evaluate.py") else []
        log = ROOT / self.setting.out / "logs" / f"{name.replace(' ', '_')}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "w") as stream:
            process = subprocess.Popen([sys.executable, *(ranks if several else []), *command, *resume], cwd=ROOT,
                                       env=self.env, stdout=stream, stderr=subprocess.STDOUT)
            self.processes.add(process)
            if self.stopping:  # since the question above
                process.terminate()
            status = process.wait()
            self.processes.discard(process)
        if status:
            raise RuntimeError(f"{name} ended with {status}: {shlex.join(command)}\n{log}:\n{log.read_text()[-1500:]}")
        self.bar.update(COST.get(command[0], 10))
        self.bar.set_postfix_str(name)

    def run(self, names: list[str], seeds: tuple[int, ...]) -> None:
        """All runs of these names; the first failure ends it, when what is running then has been stopped."""
        jobs = [(RUNS[name], seed) for name in dict.fromkeys(names) for seed in seeds_of(name, seeds)]
        for number in (signal.SIGTERM, signal.SIGHUP):  # or the commands would go on by themselves
            signal.signal(number, lambda *_: sys.exit(1))
        left = [command[0] for job in jobs for command in self.missing(*job).values()]
        left += [RUNS[run.after].script for run, seed in jobs if run.after and self.missing(run, seed)]
        self.bar = tqdm(total=sum(COST.get(script, 10) for script in left), unit="s", dynamic_ncols=True,
                        desc=f"{len(jobs)} runs, {len(left)} parts left")
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                futures = [pool.submit(self.do, *job) for job in jobs]
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                self.stopping = True
                for process in list(self.processes):
                    process.terminate()  # which saves a checkpoint
                pool.shutdown(cancel_futures=True)
                raise
            finally:
                self.bar.close()


def choose_rate(arm: str, summary_of) -> float:
    """The learning rate of an arm by the rule of docs/arms.py; summary_of(name) is what its first seed gave."""
    def right(rate: float) -> int:
        return sum(answers["right"].count("1") for key, answers in summary_of(name_at(arm, rate))["tuning"].items()
                   if key != "command")
    return max(sorted(CANDIDATES[arm]), key=right)  # the first of equals: the smallest


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=list(STUDIES), choices=[*STUDIES, *RUNS], metavar="NAME",
                        help=f"questions ({', '.join(STUDIES)}) or runs ({', '.join(RUNS)})")
    parser.add_argument("-j", "--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="one seed, a quarter of the budget, 100 questions a file")
    parser.add_argument("--print", action="store_true", help="print the commands that are missing and run nothing")
    parser.add_argument("--model", default="toy")
    parser.add_argument("--data_root", default="toy")
    parser.add_argument("--processes", type=int, default=1, help="of each command, by torchrun")
    parser.add_argument("--out", help="folder of models, samples, and of the summaries of all but the study itself")
    parser.add_argument("--budget", type=int, help="questions that each arm learns from, repetitions counted")
    parser.add_argument("--max_questions", type=int, help="of each file, in evaluations")
    parser.add_argument("--sft_batch", type=int, help="questions in a step of SFT, on real data")
    parser.add_argument("--flags", default="", help="for every command, such as '--image_size 112 --frame_cache DIR'; "
                                                    "what a run is about stays")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        setting = make_setting(args)
    except ValueError as error:
        sys.exit(str(error))
    names = [name for item in args.only for name in STUDIES.get(item, [item])
             if setting.toy or not RUNS[name].toy_only]
    study = Study(setting, args.jobs, asked_parts(args.only))
    seeds = tuple(args.seeds[:1] if args.quick or args.only == ["tuning"] else args.seeds)
    if args.print:
        print_commands(study, names, seeds)
        return
    if setting.toy:
        for flags in ([], ["--fresh", "1"], ["--fresh", "4"]):
            subprocess.run([sys.executable, "toy.py", *flags], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    study.run(names, seeds)
    for arm in CANDIDATES if setting.toy and "tuning" in args.only and SEEDS[0] in seeds else ():
        print(f"{arm}: {choose_rate(arm, lambda name: study.summary(RUNS[name], SEEDS[0])):g}")


def asked_parts(only: list[str]) -> set[str] | None:
    """What is measured for these questions; None, everything, where a run is named. Before a rate is chosen nothing
    but its tuning is looked at."""
    if not all(name in MEASURED for name in only):
        return None
    parts = {part for question in only for part in MEASURED[question].split()}
    return parts | {part for blind in BLIND.values() for part in blind} if "S10" in only else parts


def make_setting(args) -> Setting:
    """ValueError for flags that would mix one study with another."""
    toy = args.data_root == "toy"
    default = Setting() if toy else Setting(budget=6000, sft_batch=128)  # the paper's
    # The study itself, or its quick form.
    own = toy and args.model == "toy" and not (args.budget or args.flags or args.max_questions)
    if not (own or args.out):
        raise ValueError("another --model, --data_root, --budget, --max_questions or --flags is another study: give it "
                         "a folder, --out")
    if toy and args.sft_batch:
        raise ValueError(f"--sft_batch {args.sft_batch}: of real data alone; the toy world's is {default.sft_batch}")
    out = args.out or default.out + ("_quick" if args.quick else "")
    return replace(default, model=args.model, data_root=args.data_root, processes=args.processes, out=out,
                   budget=args.budget or default.budget // (4 if args.quick else 1),
                   summaries=default.summaries if own and not (args.quick or args.out) else f"{out}/summaries",
                   flags=tuple(shlex.split(args.flags)),
                   sft_batch=args.sft_batch or default.sft_batch,
                   max_questions=args.max_questions or (100 if args.quick else 0))


def print_commands(study: Study, names: list[str], seeds: tuple[int, ...]) -> None:
    """Everything that is missing, in an order in which it can be run."""
    ranks = f"torchrun --nproc_per_node {study.setting.processes}" if study.setting.processes > 1 else "python"
    done = set()
    if study.setting.toy:
        print("python toy.py --fresh 1\npython toy.py --fresh 4")

    def show(run: Run, seed: int, only_model: bool = False) -> None:
        missing = {} if only_model else study.missing(run, seed)
        there = (ROOT / study.setting.model_of(run, seed) / "config.json").exists()
        train = "train" in missing or (missing or only_model) and not there
        if run.script and train and (run.name, seed) not in done:
            done.add((run.name, seed))
            if run.after:
                show(RUNS[run.after], seed, only_model=True)
            for part in filter(study.lacks_answers, run.leave_out):
                show_part(RUNS["base"], SEEDS[0], part)
            missing = {"train": ()} | missing
        for part in missing:
            show_part(run, seed, part)

    def show_part(run: Run, seed: int, part: str) -> None:
        files = filter(study.lacks_file, files_of(run, seed, part))
        commands = [file_command(name, seed, study.setting) for name in files]
        for command in map(shlex.join, [*commands, parts(run, seed, study.setting)[part]]):
            alone = command.startswith(("attention.py", "docs/")) and not command.startswith("docs/own_answers.py")
            if command not in done:
                print("python" if alone else ranks, command)
                done.add(command)

    for name in dict.fromkeys(names):
        for seed in seeds_of(name, seeds):
            show(RUNS[name], seed)


if __name__ == "__main__":
    main()
