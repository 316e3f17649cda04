"""The numbers of the study (docs/study.py), computed from its summaries: accuracies, differences, intervals."""
import functools
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from docs.arms import CANDIDATES, FRESH, LEVELS, RUNS, S6, chosen, measured  # noqa: E402
from docs.habit import HABIT, make_file  # noqa: E402
from toy import make_records  # noqa: E402

LEVEL_FILES, FRESH_FILES = ([Path(file).stem for file in files] for files in (LEVELS, FRESH))
LABELS = {
    "base": "base", "sft": "SFT", "own": "SFT on own right answers", "grpo": "GRPO", "lora": "GRPO by LoRA",
    "few_grpo": "64 by SFT, then GRPO", "half_grpo": "half SFT, half GRPO", "blank": "GRPO on blank videos",
    "reversed": "SFT, reversed", "skips": "SFT, skips", "hallucinates": "SFT, hallucinates", "terse": "SFT, terse",
    "wrong": "SFT, 35% wrong", "paraphrase": "SFT, paraphrase", "kl_0.02": "GRPO, KL 0.02", "kl_0.1": "GRPO, KL 0.1"}


def arm_of(name: str) -> str:
    """The arm of a run: without its learning rate."""
    arm = re.sub(r"_\de-\d+$", "", name)
    return arm if arm in CANDIDATES else name


def label(name: str) -> str:
    """An arm's label, with the learning rate where it is not the one that was chosen."""
    arm = arm_of(name)
    tried = arm in CANDIDATES and name != chosen(arm)
    return LABELS[arm] + (f", {name.removeprefix(arm)[1:]}" if tried else "")


def load(folder: Path) -> dict[str, list[dict]]:
    """name -> the summaries of its seeds, in order; of one that is not complete what it was tuned with alone."""
    summaries = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    known, found = {part for summary in summaries.values() for part in summary}, defaultdict(dict)
    for stem, summary in summaries.items():
        name, _, seed = stem.partition("_seed")
        if name not in RUNS or not known & set(measured(name)) <= summary.keys():  # not through yet
            summary = {part: summary[part] for part in ("train", "tuning") if part in summary}
        found[name][int(seed or 0)] = summary
    return {name: [of_name[seed] for seed in sorted(of_name)] for name, of_name in found.items()}


def seeds_with(runs: dict, name: str, part: str, file: str = "") -> list[dict]:
    """The numbers of a part, or of one file in it, of every seed that has them."""
    found = [summary[part] for summary in runs.get(name, ()) if part in summary]
    return [numbers[file] for numbers in found if file in numbers] if file else found


def right(runs: dict, name: str, video: str, files: list[str]) -> np.ndarray:
    """(seeds, questions) of 0 and 1, over several files one behind the other; (0, 0) where something is missing."""
    of_files = [[[char == "1" for char in answers["right"]] for answers in seeds_with(runs, name, video, file)]
                for file in files]
    if len({len(seeds) for seeds in of_files}) != 1 or not of_files[0]:
        return np.zeros((0, 0))
    return np.concatenate([np.array(seeds, float) for seeds in of_files], axis=1)


def accuracies(runs: dict, name: str, video: str, files: list[str]) -> np.ndarray:
    """Percent for each seed: the mean over files, which weigh the same."""
    of_files = [right(runs, name, video, [file]) for file in files]
    return np.mean([100 * answers.mean(axis=1) for answers in of_files], axis=0) if all(map(len, of_files)) else (
        np.zeros(0))


def difference(runs: dict, a: str, b: str, files: list[str], draws: int = 10_000, parts=("full", "full")):
    """Accuracy of a minus that of b on the same questions, in points: (mean, low, high, whether the seeds are apart);
    None where one of them has not been measured. `parts`: which evaluation of each. The interval: `contrast`."""
    ours, theirs = (accuracies(runs, name, part, files) for name, part in zip((a, b), parts))
    if not (len(ours) and len(theirs)):
        return None
    apart = ours.min() > theirs.max() or theirs.min() > ours.max()
    return *contrast(runs, [(1, a, parts[0]), (-1, b, parts[1])], files, draws), bool(apart)


@functools.cache
def draw_tasks(goals_of_files: tuple[tuple[str, ...], ...], draws: int) -> list[np.ndarray]:
    """How often each task is drawn, (draws, tasks) for each file. Files about the same tasks share it."""
    rng, found = np.random.default_rng(0), {}
    return [found.setdefault(goals, rng.multinomial(len(goals), [1 / len(goals)] * len(goals), draws))
            for goals in goals_of_files]


def contrast(runs: dict, signed: list[tuple[int, str, str]], files: list[str], draws: int = 10_000):
    """A sum of accuracies on the same questions, each (sign, run, evaluation), in points: (mean, low, high).

    The mean over files of the mean over their questions; a question's value is its mean over seeds. The interval is the
    95% bootstrap interval over tasks: what is asked about one task is right or wrong together, in all files.
    """
    asked_in, means = [seeds_with(runs, *signed[0][1:], file)[0] for file in files], []
    all_times = draw_tasks(tuple(tuple(asked["goals"]) for asked in asked_in), draws)
    for file, asked, times in zip(files, asked_in, all_times):
        for _, name, part in signed:  # the same questions
            assert seeds_with(runs, name, part, file)[0]["tasks"] == asked["tasks"], (name, part, file)
        tasks, num_tasks = np.array([ord(char) - ord("a") for char in asked["tasks"]]), len(asked["goals"])
        values = 100 * sum(sign * right(runs, name, part, [file]).mean(axis=0) for sign, name, part in signed)
        sums, counts = np.bincount(tasks, values, num_tasks), np.bincount(tasks, minlength=num_tasks)
        means.append((values.mean(), (times @ sums) / np.maximum(times @ counts, 1)))
    low, high = np.percentile(np.mean([drawn for _, drawn in means], axis=0), (2.5, 97.5))
    return float(np.mean([mean for mean, _ in means])), float(low), float(high)


def distance_of(runs: dict, name: str) -> np.ndarray:
    return np.array([numbers["forward_kl"] for numbers in seeds_with(runs, name, "distance")])


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's: the correlation of ranks, equal values sharing the mean of theirs."""
    ranks = [(v[:, None] > v).sum(axis=1) + (v[:, None] == v).sum(axis=1) / 2 for v in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def on_fresh(runs: dict, name: str, part: str = "full") -> list[dict]:
    """The answers of every seed that has answered the fresh files."""
    return [answers for answers in seeds_with(runs, name, part) if set(FRESH_FILES) <= answers.keys()]


def gain(runs: dict, name: str, files: list[str]) -> np.ndarray:
    """What its own videos gain it against those of other questions, in points, of each seed; empty where one of the two
    was not measured."""
    full, other = (accuracies(runs, name, part, files) for part in ("full", "random"))
    return full - other if len(full) == len(other) else np.zeros(0)


def incoherent(runs: dict, name: str) -> np.ndarray:
    """Of the right answers whose reasoning concludes with an option, the percentage that does not follow from it."""
    found = []
    for summary in on_fresh(runs, name):
        pairs = [pair for file in FRESH_FILES for pair in zip(summary[file]["right"], summary[file]["agrees"])]
        concluded = [agrees for is_right, agrees in pairs if is_right == "1" and agrees != "."]
        if concluded:
            found.append(100 * concluded.count("0") / len(concluded))
    return np.array(found)


def claims(runs: dict, name: str, kind: str) -> np.ndarray:
    """The percentage of claims of a kind that hold, on fresh questions; empty where not one in ten has any."""
    found = []
    for summary in on_fresh(runs, name):
        held, made = np.sum([summary[file]["claims"][kind] for file in FRESH_FILES], axis=0)
        if made > sum(len(summary[file]["right"]) for file in FRESH_FILES) / 10:
            found.append(100 * held / made)
    return np.array(found)


def looked(runs: dict, name: str, *path: str) -> np.ndarray:
    """A number of attention.py of each seed that has it."""
    found = []
    for numbers in seeds_with(runs, name, "attention"):
        for key in path:
            numbers = (numbers or {}).get(key)
        if numbers is not None:
            found.append(numbers["mean"] if isinstance(numbers, dict) else numbers)
    return np.array(found)


# ----------------------------------------------------------------------------------------------------------------------
# What the questions themselves say, drawn again from the toy world.

@functools.cache
def steps_done_in(file: str, number: int) -> np.ndarray:
    """How many steps are done in the first `number` questions with a video of a fresh level or of a file of S10, in the
    order of summaries, which is that of their ids as text: (questions,)."""
    level, habit = re.fullmatch(r"fresh(\d+)_(L\d)", file), re.fullmatch(r"habit(\d+)", file)
    records = make_records(level[2], int(level[1])) if level else make_file(int(habit[1]))
    asked = sorted([r for r in records if r["task_progress_metadata"]][:number], key=lambda r: str(r["sample_id"]))
    return np.array([len(record["task_progress_metadata"]) for record in asked])


def steps_per_shown(runs: dict, name: str) -> np.ndarray:
    """Steps said for each step shown, on fresh questions, of each seed."""
    return np.array([sum(summary[file]["claims"]["step"][1] for file in FRESH_FILES)
                     / sum(steps_done_in(file, len(summary[file]["right"])).sum() for file in FRESH_FILES)
                     for summary in on_fresh(runs, name)])


def accuracy_where(runs: dict, name: str, by_habit: bool, part: str = "full") -> np.ndarray:
    """Percent right of the fresh questions whose answer is the recipe's second step, or of the others, of each seed:
    the mean over files."""
    found = []
    for file in FRESH_FILES if on_fresh(runs, name, part) else ():
        answers = right(runs, name, part, [file])
        asked = np.isin(steps_done_in(file, answers.shape[1]), HABIT) == by_habit
        found.append(100 * answers[:, asked].mean(axis=1))
    return np.mean(found or [[]], axis=0)


def trained_with() -> dict[str, str]:
    """S6: what a run was trained with -> its name."""
    return {"base": "base", **{f"trained with {n} frames": run.name for n, run in S6["frames"].items()},
            "trained without image": S6["image"]["without"].name}
