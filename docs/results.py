"""The table and the picture of a folder of runs on the toy world, as `make demo` and `make results` lay them out.

    python docs/results.py out/demo                        # prints the table, writes out/demo/results.png
    python docs/results.py out/results docs/results.png    # the picture in the README

Expected in the folder: base/ (an evaluation of the base model) and any of grpo_seed*/ and sft_seed*/ (training runs, each
with its evaluation in eval/).
"""
import json
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

COLOURS = {"base": "#8a8f98", "SFT": "#d98c3f", "GRPO": "#2b6cb0"}


def levels(folder: Path) -> dict[str, dict]:
    """The row of each evaluated file: {"L1": {...}, ...}."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return {Path(row["file"]).stem.removeprefix("validation_"): row for row in rows if not row["group"]}


def smooth(values: list[float], width: int = 9) -> np.ndarray:
    """A centred moving mean that shrinks at the ends, so that no step is lost."""
    return np.array([np.mean(values[max(0, i - width // 2):i + width // 2 + 1]) for i in range(len(values))])


def main(folder: Path, picture: Path) -> None:
    base = levels(folder / "base")
    runs = {name: sorted(path for path in folder.iterdir() if re.fullmatch(rf"{prefix}_seed\d+", path.name))  # not .old1
            for name, prefix in (("SFT", "sft"), ("GRPO", "grpo"))}
    runs = {name: paths for name, paths in runs.items() if paths}
    evals = {name: [levels(path / "eval") for path in paths] for name, paths in runs.items()}

    # The table, in Markdown: accuracy with its 95% Wilson interval; over seeds the mean, and the lowest to the highest bound.
    print("| | " + " | ".join(f"{level} (n = {row['n']})" for level, row in base.items()) + " |")
    print("|---" * (len(base) + 1) + "|")
    print("| base | " + " | ".join(f"{r['accuracy']:.1%} ({r['wilson_low']:.1%} to {r['wilson_high']:.1%})" for r in base.values()) + " |")
    for name, seeds in evals.items():
        cells = []
        for level in base:
            rows = [seed[level] for seed in seeds]
            low, high = min(row["wilson_low"] for row in rows), max(row["wilson_high"] for row in rows)
            cells.append(f"{np.mean([row['accuracy'] for row in rows]):.1%} ({low:.1%} to {high:.1%})")
        print(f"| {name}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''} | " + " | ".join(cells) + " |")

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for path in runs.get("GRPO", []):
        metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        left.plot([m["step"] for m in metrics], smooth([100 * m["accuracy"] for m in metrics]), color=COLOURS["GRPO"], alpha=0.8)
    left.axhline(25, color="black", linewidth=0.8, linestyle=":")
    left.text(0, 26, "chance", fontsize=8)
    left.set(xlabel="GRPO step", ylabel="% of sampled answers right", ylim=(0, 100),
             title="Training: one line per seed (mean of 9 steps)")

    width = 0.8 / (1 + len(evals))
    x = np.arange(len(base))
    bars = {"base": [[row["accuracy"] for row in base.values()]]}
    bars |= {name: [[seed[level]["accuracy"] for level in base] for seed in seeds] for name, seeds in evals.items()}
    for i, (name, accuracies) in enumerate(bars.items()):
        accuracies = 100 * np.array(accuracies)  # (seeds, levels)
        place = x + (i - len(bars) / 2 + 0.5) * width
        right.bar(place, accuracies.mean(0), width * 0.92, color=COLOURS[name], label=name)
        for level, mean in enumerate(accuracies.mean(0)):
            right.text(place[level], 2, f"{mean:.0f}", ha="center", fontsize=9, color="white")
        if len(accuracies) > 1:
            for seed in accuracies:
                right.plot(place, seed, "o", color="black", markersize=2.5)
        else:
            rows = [base[level] if name == "base" else evals[name][0][level] for level in base]
            ends = 100 * np.array([[r["accuracy"] - r["wilson_low"] for r in rows], [r["wilson_high"] - r["accuracy"] for r in rows]])
            right.errorbar(place, accuracies[0], yerr=ends, fmt="none", color="black", capsize=2, linewidth=0.8)
    right.axhline(25, color="black", linewidth=0.8, linestyle=":")
    names = {"L1": "same kitchens,\nsame tasks", "L2": "new kitchens,\nsame tasks", "L3": "new kitchens,\nnew tasks"}
    right.set_xticks(x, [f"{level}\n{names.get(level, '')}" for level in base])
    right.set(ylabel="greedy accuracy, %", ylim=(0, 105), title="Held-out questions")
    right.legend(loc="upper right", ncols=3, frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=160)
    print(f"\nwrote {picture}")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    main(folder, Path(sys.argv[2]) if len(sys.argv) > 2 else folder / "results.png")
