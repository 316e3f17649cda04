"""Tables and pictures of the study (docs/study.py), from its summaries.

    python docs/study_report.py                             # rewrites tables in docs/study.md and README.md, draws
    python docs/study_report.py out/study_quick/summaries   # prints tables; pictures go beside that folder

A table stands in docs/study.md or README.md between <!-- table NAME --> and <!-- end -->. A picture carries the digest
of the numbers that it was drawn from, so that a test can tell whether it is stale on machines that draw other pixels.
"""
import hashlib
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from docs.study import CANDIDATES, FRESH, LEVELS, RATES, STUDIES, TEACHERS, chosen, name_at  # noqa: E402

PAGES = (HERE / "study.md", HERE.parent / "README.md")
LEVEL_FILES, FRESH_FILES = ([Path(file).stem for file in files] for files in (LEVELS, FRESH))
LABELS = {
    "base": "base", "sft": "SFT", "own": "SFT on own right answers", "grpo": "GRPO", "lora": "GRPO by LoRA",
    "few_grpo": "64 by SFT, then GRPO", "half_grpo": "half SFT, half GRPO", "blank": "GRPO on blank videos",
    "reversed": "SFT, reversed", "skips": "SFT, skips", "hallucinates": "SFT, hallucinates", "terse": "SFT, terse",
    "wrong": "SFT, 35% wrong", "paraphrase": "SFT, paraphrase", "kl_0.02": "GRPO, KL 0.02", "kl_0.1": "GRPO, KL 0.1"}
STEPS = 264  # of GRPO, in the toy world
COLOURS = {"base": "#8a8f98", "sft": "#d98c3f", "own": "#b5563c", "grpo": "#2b6cb0", "lora": "#6b9bd1",
           "few_grpo": "#4a9a8c", "half_grpo": "#86b553", "blank": "#222222", "kl_0.02": "#7f6bc4", "kl_0.1": "#b18bd8"}


def arm_of(name: str) -> str:
    """The arm of a run: without its learning rate."""
    return re.sub(r"_\de-\d+$", "", name)


def label(name: str) -> str:
    """An arm's label, with the learning rate where it is not the one that was chosen."""
    arm = arm_of(name)
    tried = arm in CANDIDATES and name != chosen(arm)
    return LABELS[arm] + (f", {name.removeprefix(arm)[1:]}" if tried else "")


def load(folder: Path) -> dict[str, list[dict]]:
    """name -> the summaries of its seeds, in order; of one that is not complete what it was tuned with alone."""
    found = defaultdict(dict)
    for file in sorted(folder.glob("*.json")):
        (name, _, seed), summary = file.stem.partition("_seed"), json.loads(file.read_text())
        if not {"full", "random"} <= summary.keys() or "train" in summary and "distance" not in summary:
            summary = {part: summary[part] for part in ("train", "tuning") if part in summary}  # not through yet
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


def difference(runs: dict, a: str, b: str, files: list[str], draws: int = 10_000):
    """Accuracy of a minus that of b on the same questions, in points: (mean, low, high, whether the seeds are apart);
    None where one of them has not been measured.

    The mean over files of the mean over their questions; a question's value is its mean over seeds. The interval is the
    95% bootstrap interval over tasks: what is asked about one task is right or wrong together, in all files.
    """
    ours, theirs = accuracies(runs, a, "full", files), accuracies(runs, b, "full", files)
    if not (len(ours) and len(theirs)):
        return None
    rng, means, drawn_of = np.random.default_rng(0), [], {}
    for file in files:
        asked = seeds_with(runs, a, "full", file)[0]
        tasks, num_tasks = np.array([ord(char) - ord("a") for char in asked["tasks"]]), len(asked["goals"])
        # How often each task is drawn: (draws, tasks). Files about the same tasks share it.
        drawn = rng.multinomial(num_tasks, [1 / num_tasks] * num_tasks, draws)
        times = drawn_of.setdefault(tuple(asked["goals"]), drawn)
        values = 100 * np.subtract(*(right(runs, name, "full", [file]).mean(axis=0) for name in (a, b)))
        sums, counts = np.bincount(tasks, values, num_tasks), np.bincount(tasks, minlength=num_tasks)
        means.append((values.mean(), (times @ sums) / np.maximum(times @ counts, 1)))
    low, high = np.percentile(np.mean([drawn for _, drawn in means], axis=0), (2.5, 97.5))
    apart = ours.min() > theirs.max() or theirs.min() > ours.max()
    return float(np.mean([mean for mean, _ in means])), float(low), float(high), bool(apart)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def every_seed(values: np.ndarray, digits: int = 1) -> str:
    """mean (every seed); nothing where nothing was measured."""
    if not len(values):
        return ""
    return f"{values.mean():.{digits}f}" + (
        f" ({', '.join(f'{value:.{digits}f}' for value in values)})" if len(values) > 1 else "")


def over_seeds(values: np.ndarray, digits: int = 1) -> str:
    """mean (lowest to highest)."""
    if not len(values):
        return ""
    span = f" ({values.min():.{digits}f} to {values.max():.{digits}f})" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{span}"


# ----------------------------------------------------------------------------------------------------------------------
# The tables: name -> text.

def tuning_table(runs: dict) -> str:
    rows = []
    for arm, rates in CANDIDATES.items():
        cells = []
        for rate in rates:
            found = accuracies({name: seeds[:1] for name, seeds in runs.items()}, name_at(arm, rate), "tuning",
                               ["fresh1_L1"])
            text = name_at(arm, rate).removeprefix(f"{arm}_") + (f": {found[0]:.1f}" if len(found) else ":")
            cells.append(f"**{text}**" if RATES.get(arm) == rate else text)
        rows.append([LABELS[arm], *cells])
    columns = max(map(len, rows))
    rows = [row + [""] * (columns - len(row)) for row in rows]
    return table(["right of 320 tuning questions with a video, %"] + [""] * (columns - 1), rows)


def accuracy_table(runs: dict, names: list[str], files: list[str]) -> str:
    rows = []
    for name in names:
        for video in ("full", "random"):
            cells = [every_seed(accuracies(runs, name, video, [file])) for file in files]
            rows.append([label(name) + (", other videos" if video == "random" else ""), *cells])
    heads = [file.replace("fresh4_", "fresh ").replace("validation_", "") for file in files]
    return table(["greedy accuracy, %: mean (seeds)", *heads], rows)


def readme_table(runs: dict) -> str:
    """The README's: an arm a line, fresh questions alone."""
    rows = []
    for name in STUDIES["S1"]:
        cells = [over_seeds(accuracies(runs, name, "full", [file])) for file in FRESH_FILES]
        others = [f"{accuracies(runs, name, 'random', [file]).mean():.0f}" for file in FRESH_FILES
                  if len(accuracies(runs, name, "random", [file]))]
        rows.append([f"**{label(name)}**" if name == chosen("grpo") else label(name), *cells, ", ".join(others)])
    return table(["greedy accuracy in %: mean over seeds (lowest to highest)", "same kitchens, same tasks (L1)",
                  "new kitchens (L2)", "new kitchens, new tasks (L3)", "with other videos"], rows)


def difference_table(runs: dict, pairs: list[tuple[str, str]]) -> str:
    rows = []
    for a, b in pairs:
        cells = []
        for files in (*([file] for file in FRESH_FILES), FRESH_FILES):
            if found := difference(runs, a, b, list(files)):
                mean, low, high, apart = found
                text = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
                cells.append(f"**{text}**" if apart and (low > 0 or high < 0) else text)
            else:
                cells.append("")
        rows.append([f"{label(a)} − {label(b)}", *cells])
    return table(["difference in points, 95% interval; bold: claimed", *(f.replace("fresh4_", "fresh ") for f in
                                                                         FRESH_FILES), "all three"], rows)


def distance_of(runs: dict, name: str) -> np.ndarray:
    return np.array([numbers["forward_kl"] for numbers in seeds_with(runs, name, "distance")])


def distance_table(runs: dict, names: list[str]) -> str:
    rows = [[label(name), every_seed(distance_of(runs, name)),
             *(every_seed(accuracies(runs, name, "full", [file])) for file in (FRESH_FILES[0], FRESH_FILES[2]))]
            for name in names if name != "base"]
    return table(["mean (seeds)", "forward KL, nats per completion", "fresh L1, %", "fresh L3, %"], rows)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's: the correlation of ranks, equal values sharing the mean of theirs."""
    ranks = [(v[:, None] > v).sum(axis=1) + (v[:, None] == v).sum(axis=1) / 2 for v in (x, y)]
    return float(np.corrcoef(*ranks)[0, 1])


def correlation_table(runs: dict, names: list[str]) -> str:
    """Distance against accuracy on fresh L3, over single runs that are right on more than 80% of fresh L1."""
    kinds = {"SFT on the flawless teacher, at all its rates": lambda arm: arm == "sft",
             "SFT on any teacher": lambda arm: arm in ("sft", *TEACHERS),
             "GRPO with all weights from the base, at all its rates and KL weights": lambda arm: arm in (
                 "grpo", "kl_0.02", "kl_0.1"),
             "all": lambda arm: True}
    rows = []
    for kind, belongs in kinds.items():
        of_kind = [name for name in names if belongs(arm_of(name)) and len(distance_of(runs, name))]
        l1, l3, distance = (np.concatenate([values(name) for name in of_kind] or [np.zeros(0)]) for values in (
            lambda name: accuracies(runs, name, "full", FRESH_FILES[:1]),
            lambda name: accuracies(runs, name, "full", FRESH_FILES[2:]), lambda name: distance_of(runs, name)))
        good = l1 > 80
        value = f"{rank_correlation(distance[good], l3[good]):+.2f}" if good.sum() > 2 else ""
        rows.append([kind, f"{good.sum()}", value])
    return table(["runs right on more than 80% of fresh L1", "number", "rank correlation of distance and L3"], rows)


def incoherent(runs: dict, name: str) -> np.ndarray:
    """Of the right answers whose reasoning concludes with an option, the percentage that does not follow from it."""
    found = []
    for summary in seeds_with(runs, name, "full"):
        pairs = [pair for file in FRESH_FILES for pair in zip(summary[file]["right"], summary[file]["agrees"])]
        concluded = [agrees for is_right, agrees in pairs if is_right == "1" and agrees != "."]
        if concluded:
            found.append(100 * concluded.count("0") / len(concluded))
    return np.array(found)


def claims(runs: dict, name: str, kind: str) -> np.ndarray:
    """The percentage of claims of a kind that hold, on fresh questions; empty where not one in ten has any."""
    found = []
    for summary in seeds_with(runs, name, "full"):
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


def signature_table(runs: dict, names: list[str]) -> str:
    rows = []
    for name in names:
        full, other = (np.array([accuracies(runs, name, video, [file]) for file in FRESH_FILES])
                       for video in ("full", "random"))
        if not full.size:
            continue
        rows.append([label(name), *map(over_seeds, (
            full[0] - full[2], full.mean(0) - other.mean(0), incoherent(runs, name), claims(runs, name, "step"),
            claims(runs, name, "count")))])
    return table(["mean over seeds", "drop from fresh L1 to L3, points", "gain from its own videos, points",
                  "right answers that the reasoning contradicts, %", "steps said that stand in their place, %",
                  "number of steps right, %"], rows)


def attention_table(runs: dict, names: list[str]) -> str:
    rows = []
    for name in names:
        gain = (accuracies(runs, name, "full", FRESH_FILES[:1]) - accuracies(runs, name, "random", FRESH_FILES[:1]))
        if seeds_with(runs, name, "attention"):
            rows.append([label(name), over_seeds(gain), *(
                over_seeds(scale * looked(runs, name, *path), digits) for path, scale, digits in (
                    (("kinds", "reasoning", "vision"), 100, 1), (("kinds", "reasoning", "entropy"), 1, 2),
                    (("diagonal", "picked"), 100, 0), (("diagonal", "other_video"), 100, 0),
                    (("hiding", "own"), 1, 2), (("hiding", "others"), 1, 2)))])
    return table(["mean over seeds", "gain on fresh L1, points", "attention on vision, %", "its entropy, nats",
                  "diagonal of the best heads, %", "the same with another video, %",
                  "nats a word loses without its own frames", "without as many others"], rows)


def tables(runs: dict) -> dict[str, str]:
    sft, own, grpo, lora = map(chosen, ("sft", "own", "grpo", "lora"))
    return {
        "README": readme_table(runs),
        "tuning": tuning_table(runs),
        "S1": accuracy_table(runs, STUDIES["S1"], FRESH_FILES + LEVEL_FILES),
        "S1 differences": difference_table(runs, [
            (sft, grpo), (own, "base"), (own, grpo), ("few_grpo", grpo), ("half_grpo", grpo), ("half_grpo", sft),
            (lora, grpo), ("blank", "base")]),
        "S2": accuracy_table(runs, [chosen(teacher) for teacher in TEACHERS], FRESH_FILES),
        "S2 differences": difference_table(runs, [(chosen(teacher), grpo) for teacher in ("sft", *TEACHERS)]),
        "S3": distance_table(runs, STUDIES["S3"]),
        "S3 correlations": correlation_table(runs, STUDIES["S3"]),
        "S4": signature_table(runs, STUDIES["S4"]),
        "S4 attention": attention_table(runs, STUDIES["S1"])}


# ----------------------------------------------------------------------------------------------------------------------
# The pictures: name -> what it draws, and how.

def drawn_numbers(runs: dict) -> dict[str, dict]:
    """picture -> all numbers in it; its digest is made of these."""
    s3 = [name for name in STUDIES["S3"] if name != "base" and len(distance_of(runs, name))]
    return {
        "study_s1": {name: {"curves": [numbers["curve"] for numbers in seeds_with(runs, name, "train")
                                       if "curve" in numbers],
                            **{video: [accuracies(runs, name, video, [file]).tolist() for file in FRESH_FILES]
                               for video in ("full", "random")}} for name in STUDIES["S1"]},
        "study_s2": {name: {"all": accuracies(runs, name, "full", FRESH_FILES).tolist(),
                            "L3": accuracies(runs, name, "full", FRESH_FILES[2:]).tolist()} for name in STUDIES["S2"]},
        "study_s3": {name: {"distance": distance_of(runs, name).tolist(),
                            "L1": accuracies(runs, name, "full", FRESH_FILES[:1]).tolist(),
                            "L3": accuracies(runs, name, "full", FRESH_FILES[2:]).tolist()} for name in s3}}


def digest(numbers: dict) -> str:
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def draw_s1(numbers: dict):
    """Left, learning: a line for each seed. Right, bars: accuracy on fresh questions by level, an arm each; hatched, in
    front of it, that with other videos."""
    figure, (left, axes) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(1, 3))
    for name in (chosen("grpo"), "blank"):
        for curve in numbers[name]["curves"]:
            x = (np.arange(len(curve)) + 0.5) / len(curve) * STEPS
            left.plot(x, 100 * np.array(curve), color=COLOURS[arm_of(name)], linewidth=1.2)
    left.set(xlabel="step of GRPO", ylabel="% of sampled answers right", title="Learning")
    left.set(xlim=(0, None), ylim=(0, 118))

    x, width = np.arange(3), 0.86 / len(numbers)
    for i, (name, of_run) in enumerate(numbers.items()):
        place = x + (i - len(numbers) / 2 + 0.5) * width
        for video in ("full", "random"):
            means = [np.mean(seeds) if seeds else np.nan for seeds in of_run[video]]
            style = (dict(color=COLOURS[arm_of(name)], label=label(name)) if video == "full" else
                     dict(color="none", edgecolor="white", hatch="/////", linewidth=0))
            axes.bar(place, means, width * 0.92, **style)
        for spot, seeds in zip(place, of_run["full"]):
            axes.plot([spot] * len(seeds), seeds, "o", color="black", markersize=2)
            if seeds:
                axes.text(spot, max(seeds) + 2, f"{np.mean(seeds):.0f}", ha="center", fontsize=7)
    axes.set_xticks(x, ["L1: same kitchens, same tasks", "L2: new kitchens", "L3: new kitchens, new tasks"], fontsize=8)
    axes.set(ylabel="greedy accuracy, %", ylim=(0, 118),
             title="Fresh questions; hatched: with the videos of other questions; dotted: chance")
    axes.legend(loc="upper center", ncols=4, frameon=False, fontsize=7.5)
    for panel in (left, axes):
        panel.axhline(25, color="black", linewidth=0.8, linestyle=":")
    return figure


def draw_s2(numbers: dict):
    """Dots: mean accuracy over the fresh levels, a line for each teacher, a dot for each seed; hollow: L3 by itself."""
    figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
    numbers = {name: of_run for name, of_run in numbers.items() if of_run["all"]}
    order = sorted(numbers, key=lambda name: np.mean(numbers[name]["all"]))
    for y, name in enumerate(order):
        colour, seeds, new = COLOURS.get(arm_of(name), COLOURS["sft"]), numbers[name]["all"], numbers[name]["L3"]
        axes.hlines(y, 0, np.mean(seeds), color=colour, linewidth=1, alpha=0.5)
        axes.plot(seeds, [y] * len(seeds), "o", color=colour, markersize=5)
        axes.plot(new, [y] * len(new), "D", color=colour, markersize=6, fillstyle="none")
        axes.text(max(seeds) + 2, y, f"{np.mean(seeds):.0f}", va="center", fontsize=8)
    axes.axvline(25, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(order)), [label(name) for name in order], fontsize=8)
    axes.set(xlabel="greedy accuracy, %: dots, mean of fresh L1, L2 and L3; diamonds, L3 (new tasks)", xlim=(0, 105))
    return figure


def draw_s3(numbers: dict):
    """Dots: distance from the base against accuracy on fresh L3; filled where the run is right on > 80% of L1."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    markers = {"sft": "o", "grpo": "o", "own": "s", "lora": "D", "few_grpo": "^", "half_grpo": "v", "blank": "X",
               "kl_0.02": "P", "kl_0.1": "P", "reversed": "<", "skips": ">", "hallucinates": "h", "terse": "p",
               "wrong": "*", "paraphrase": "d"}
    for name, of_run in numbers.items():
        arm, labelled = arm_of(name), False
        colour = COLOURS.get(arm, "#c9a227")
        for x, l1, l3 in zip(of_run["distance"], of_run["L1"], of_run["L3"]):
            axes.plot(x, l3, markers[arm], color=colour, fillstyle="full" if l1 > 80 else "none", markersize=6,
                      label=None if labelled else label(name))
            labelled = True
        if arm in ("sft", "grpo") and name != chosen(arm):
            axes.annotate(name.removeprefix(arm + "_"), (np.mean(of_run["distance"]), np.mean(of_run["L3"])),
                          fontsize=6, xytext=(4, 4), textcoords="offset points")
    axes.set_xscale("log")
    axes.set_xticks([0.3, 1, 3, 10, 30], ["0.3", "1", "3", "10", "30"])
    axes.minorticks_off()
    axes.set(xlabel="KL(base || trained) on prompts of the training file, nats per completion",
             ylabel="accuracy on fresh L3, %", ylim=(0, 100), title="Hollow: right on at most 80% of fresh L1")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=7)
    return figure


DRAW = {"study_s1": draw_s1, "study_s2": draw_s2, "study_s3": draw_s3}


def stale(runs: dict) -> list[str]:
    """What in docs/ is not what these summaries give."""
    text, found = "".join(page.read_text() for page in PAGES), []
    for name, content in tables(runs).items():
        if f"<!-- table {name} -->\n{content}\n<!-- end -->" not in text:
            found.append(f"table {name}")
    for name, numbers in drawn_numbers(runs).items():
        picture = HERE / f"{name}.png"
        if not picture.exists() or Image.open(picture).text.get("Digest") != digest(numbers):
            found.append(picture.name)
    return found


def main(folder: Path) -> None:
    runs, here = load(folder), folder.resolve() == (HERE / "study").resolve()
    for name, content in tables(runs).items():
        print(f"\n{name}\n{content}")
        place = re.compile(rf"(?<=<!-- table {re.escape(name)} -->\n).*?(?=<!-- end -->)", re.DOTALL)
        for page in PAGES if here else ():
            page.write_text(place.sub(lambda _, content=content: content + "\n", page.read_text(), count=1))
    for name, numbers in drawn_numbers(runs).items():
        figure = DRAW[name](numbers)
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig((HERE if here else folder.parent) / f"{name}.png", dpi=160, metadata={"Digest": digest(numbers)})
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "study")
