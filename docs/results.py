"""The tables and the picture of a folder of runs on the toy world, as `make demo` and `make results` lay them out.

    python docs/results.py out/demo                 # prints the tables, writes out/demo/results.png
    python docs/results.py out/results FILE.png     # the picture elsewhere

Any evaluation below the folder is a line of the table: out/results/grpo_seed0/random is "grpo", --video random. Runs
whose names differ by their seed alone (grpo_seed0, grpo_seed1) share one. A run with a metrics.jsonl is a curve.
Accuracies are those of the questions with a video.
"""
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import VIDEO  # noqa: E402
from toy import CLAIMS, check_claims  # noqa: E402

LABELS = {"sft": "SFT", "grpo": "GRPO", "grpo_lora": "GRPO by LoRA", "grpo_blank": "GRPO on blank videos"}
COLOURS = {"base": "#8a8f98", "sft": "#d98c3f", "grpo": "#2b6cb0", "grpo_lora": "#6b9bd1", "grpo_blank": "#222222"}


def run_name(run: Path) -> str:
    return re.sub(r"_seed\d+$", "", run.name)


def find(folder: Path, pattern: str) -> list[Path]:
    """Files below the folder, but none of runs and evaluations that were moved aside (.old1)."""
    paths = sorted(folder.glob(pattern))
    return [path for path in paths if not re.search(r"\.old\d+/", path.relative_to(folder).as_posix())]


def read_evaluations(folder: Path) -> dict[tuple[str, str], list[dict]]:
    """(run, --video) -> for each seed the lines of its questions with a video, by file: [{"L1": line, ..}, ..]."""
    found = defaultdict(lambda: defaultdict(dict))
    for path in find(folder, "*/*/results.json"):
        results = json.loads(path.read_text())
        if "table" not in results:
            raise ValueError(f"{path}: written by an earlier version of evaluate.py; evaluate again, or move it away")
        lines = {Path(line["file"]).stem.removeprefix("validation_"): line
                 for line in results["table"] if line["part"] == "with a video"}
        found[run_name(path.parent.parent), results["settings"]["video"]][path.parent.parent].update(lines)
    runs, videos = ["base", "sft", "grpo"], list(VIDEO)  # others behind them, by name
    places = {key: (runs.index(key[0]) if key[0] in runs else len(runs), key[0], videos.index(key[1])) for key in found}
    return {key: list(found[key].values()) for key in sorted(found, key=places.get)}


def print_accuracies(evaluations: dict) -> None:
    """In Markdown: accuracy with its 95% Wilson interval; over seeds the mean, and the lowest to the highest bound."""
    files = list(dict.fromkeys(file for seeds in evaluations.values() for lines in seeds for file in lines))
    counts = {file: next(lines[file]["n"] for seeds in evaluations.values() for lines in seeds if file in lines)
              for file in files}
    heads = [f"{file} (n = {n})" for file, n in counts.items()]
    print("| greedy accuracy, questions with a video | " + " | ".join(heads) + " |")
    print("|---" * (len(files) + 1) + "|")
    for (run, video), seeds in evaluations.items():
        cells = []
        for file in files:
            lines = [seed[file] for seed in seeds if file in seed]
            mean = np.mean([100 * line["accuracy"] for line in lines]) if lines else 0
            low, high = (100 * end(line[key] for line in lines) if lines else 0
                         for end, key in ((min, "wilson_low"), (max, "wilson_high")))
            cells.append(f"{mean:.1f} ({low:.0f} to {high:.0f})" if lines else "")
        print(f"| {run}, `{video}`, {len(seeds)} run{'s' if len(seeds) > 1 else ''} | " + " | ".join(cells) + " |")


def print_claims(folder: Path) -> None:
    """In Markdown: how many of the claims of each kind hold that the reasoning makes about questions with a video."""
    held = defaultdict(lambda: defaultdict(list))  # run -> (file, kind) -> whether each claim holds
    for path in find(folder, "*/full/samples.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            if record["video"]:
                file, progress = Path(record["file"]).stem.removeprefix("validation_"), tuple(record["progress"])
                checked = check_claims(record["response"], record["goal"], progress, tuple(record["options"]))
                for kind, _, holds in checked:
                    held[run_name(path.parent.parent)][file, kind].append(holds)
    print("\n| % of claims that hold | " + " | ".join(CLAIMS) + " |\n" + "|---" * (len(CLAIMS) + 1) + "|")
    for run, claims in held.items():
        for file in dict.fromkeys(file for file, _ in claims):
            cells = [claims[file, kind] for kind in CLAIMS]
            shares = [f"{100 * np.mean(cell):.0f} ({len(cell)})" if cell else "none" for cell in cells]
            print(f"| {run}, {file} | " + " | ".join(shares) + " |")


def smooth(values: list[float], width: int = 9) -> np.ndarray:
    """A centred moving mean that shrinks at the ends, so that no step is lost."""
    return np.array([np.mean(values[max(0, i - width // 2):i + width // 2 + 1]) for i in range(len(values))])


def draw(folder: Path, evaluations: dict, picture: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(2, 3))
    labelled = set()
    for path in find(folder, "*/metrics.jsonl"):
        metrics = [json.loads(line) for line in path.read_text().splitlines()]
        run = run_name(path.parent)
        if "accuracy" in metrics[0]:
            left.plot([m["step"] for m in metrics], smooth([100 * m["accuracy"] for m in metrics]),
                      color=COLOURS.get(run), alpha=0.8, label=None if run in labelled else LABELS.get(run, run))
            labelled.add(run)
    left.axhline(25, color="black", linewidth=0.8, linestyle=":")
    left.text(0, 19, "chance", fontsize=8)
    left.set(xlabel="GRPO step", ylabel="% of sampled answers right", ylim=(0, 100), title="Training: a line per seed")
    if labelled:
        left.legend(loc="lower right", frameon=False, fontsize=8)

    bars = {key: seeds for key, seeds in evaluations.items() if key[1] in ("full", "random")}
    files = list(dict.fromkeys(file for seeds in bars.values() for lines in seeds for file in lines))
    files = files[-3:]  # the fresh ones, if any
    x, width = np.arange(len(files)), 0.85 / max(1, len(bars))
    for i, ((run, video), seeds) in enumerate(bars.items()):
        accuracies = np.array([[100 * lines[file]["accuracy"] if file in lines else np.nan for file in files]
                               for lines in seeds])
        place = x + (i - len(bars) / 2 + 0.5) * width
        colour = COLOURS.get(run, f"C{i}")
        label = LABELS.get(run, run) if video == "full" else "with other videos"  # below its own, in the same colour
        right.bar(place, accuracies.mean(0), width * 0.92, label=label, edgecolor=colour,
                  color=colour if video == "full" else "white", hatch=None if video == "full" else "////")
        for level, mean in enumerate(accuracies.mean(0)):
            if not np.isnan(mean):
                right.text(place[level], mean + 2, f"{mean:.0f}", ha="center", fontsize=7)
        if len(accuracies) > 1:
            for seed in accuracies:
                right.plot(place, seed, "o", color="black", markersize=2)
    right.axhline(25, color="black", linewidth=0.8, linestyle=":")
    names = {"L1": "same kitchens, same tasks", "L2": "new kitchens, same tasks", "L3": "new kitchens, new tasks"}
    right.set_xticks(x, [f"{file.replace('_', ' ')}\n{names.get(file[-2:], '')}" for file in files], fontsize=8)
    right.set(ylabel="greedy accuracy, %", ylim=(0, 115), title="Held-out questions with a video")
    right.legend(loc="upper center", ncols=4, frameon=False, fontsize=7, columnspacing=1.5, handlelength=1.5)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=160)
    print(f"wrote {picture}", file=sys.stderr)  # the tables alone go to standard output, and to docs/results.md


def main(folder: Path, picture: Path) -> None:
    evaluations = read_evaluations(folder)
    if not evaluations:
        raise ValueError(f"{folder}: no RUN/EVALUATION/results.json in it; "
                         "see `make demo` in the Makefile for the layout")
    print_accuracies(evaluations)
    print_claims(folder)
    draw(folder, evaluations, picture)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    main(folder, Path(sys.argv[2]) if len(sys.argv) > 2 else folder / "results.png")
