"""The pictures of the study (docs/study.py): name -> all numbers in it, and how they are drawn."""
import hashlib
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from docs.arms import S5, S7, S8, S9, S10, STUDIES, chosen, grid, write_rate  # noqa: E402
from docs.study_numbers import (  # noqa: E402
    FRESH_FILES,
    LABELS,
    accuracies,
    accuracy_where,
    arm_of,
    claims,
    distance_of,
    incoherent,
    label,
    seeds_with,
    steps_per_shown,
    trained_with,
)

COLOURS = {"base": "#8a8f98", "sft": "#d98c3f", "own": "#b5563c", "grpo": "#2b6cb0", "lora": "#6b9bd1",
           "few_grpo": "#4a9a8c", "half_grpo": "#86b553", "blank": "#222222", "kl_0.02": "#7f6bc4", "kl_0.1": "#b18bd8"}


def drawn_numbers(runs: dict) -> dict[str, dict]:
    """picture -> all numbers in it; its digest is made of these."""
    def levels(name: str, part: str = "full") -> dict:
        return {"all": accuracies(runs, name, part, FRESH_FILES).tolist(),
                "L1": accuracies(runs, name, part, FRESH_FILES[:1]).tolist(),
                "L3": accuracies(runs, name, part, FRESH_FILES[2:]).tolist()}

    def along(axes: dict) -> dict:
        return {axis: {f"{value}": levels(run.name) for value, run in values.items()} for axis, values in axes.items()}

    s3 = [name for name in STUDIES["S3"]
          if len(distance_of(runs, name)) and len(accuracies(runs, name, "full", FRESH_FILES))]
    return {
        "study_s1": {name: {"curves": [numbers["curve"] for numbers in seeds_with(runs, name, "train")
                                       if "curve" in numbers],
                            **{video: [accuracies(runs, name, video, [file]).tolist() for file in FRESH_FILES]
                               for video in ("full", "random")}} for name in STUDIES["S1"]},
        "study_s2": {name: levels(name) for name in STUDIES["S2"]},
        "study_s3": {name: {"distance": distance_of(runs, name).tolist(), **levels(name)} for name in s3},
        "study_s5": along(S5),
        "study_s6": {what: {part: levels(name, part) for part in ("full", "frames_8", "frames_4", "no_image")}
                     for what, name in trained_with().items()},
        "study_s7": {"axes": along(S7), "grid": {f"{size}": {write_rate(rate): levels(run.name)["all"]
                                                             for (g, rate), run in grid.items() if g == size}
                                                 for size in (4, 8, 16)}},
        "study_s8": along(S8),
        "study_s9": {value: {"accuracy, %": levels(run.name)["all"],
                             "right answers contradicted by\ntheir reasoning, %": incoherent(runs, run.name).tolist(),
                             "steps said that stand in their place, %": claims(runs, run.name, "step").tolist(),
                             "steps said for each shown": steps_per_shown(runs, run.name).tolist()}
                     for value, run in S9["rewards"].items()},
        "study_s10": {what: {f"{percent}": {
            "all": levels(run.name)["all"], "random": levels(run.name, "random")["all"],
            **{f"{by_habit}": accuracy_where(runs, run.name, by_habit).tolist() for by_habit in (True, False)}}
            for percent, run in values.items()} for what, values in S10.items()}}


def digest(numbers: dict) -> str:
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def draw_s1(numbers: dict):
    """Left, learning: a line for each seed. Right, bars: accuracy on fresh questions by level, an arm each; hatched, in
    front of it, that with other videos."""
    figure, (left, axes) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=(1, 3))
    for name in (chosen("grpo"), "blank"):
        for curve in numbers[name]["curves"]:
            x = (np.arange(len(curve)) + 0.5) / len(curve) * 100
            left.plot(x, 100 * np.array(curve), color=COLOURS[arm_of(name)], linewidth=1.2)
    left.set(xlabel="% of GRPO's steps", ylabel="% of sampled answers right", title="Learning")
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
    if numbers:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=7)
    return figure


def put_seeds(axes, x, seeds: list[float], colour: str, marker: str = "o", **style) -> None:
    """A mark for each seed, at x or, for rows, at y = x."""
    axes.plot([x] * len(seeds), seeds, marker, color=colour, **({"markersize": 4} | style))


def draw_s5(numbers: dict):
    """Lines: accuracy against the number of different questions, SFT and GRPO; left, all levels; right, L3."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained", sharey=True)
    for axes, level in zip(panels, ("all", "L3")):
        for method, of_method in numbers.items():
            places = [704 // int(divisor) for divisor, found in of_method.items() if found[level]]
            found = [found[level] for found in of_method.values() if found[level]]
            axes.plot(places, [np.mean(seeds) for seeds in found], color=COLOURS[method], label=LABELS[method])
            for place, seeds in zip(places, found):
                put_seeds(axes, place, seeds, COLOURS[method])
        axes.set_xscale("log", base=2)
        axes.set_xticks([44, 88, 176, 352, 704], ["44", "88", "176", "352", "704"])
        axes.set(xlabel="different questions; 2,112 are learned from", ylim=(60, 100),
                 title={"all": "mean of fresh L1, L2, L3", "L3": "fresh L3, new tasks"}[level])
    panels[0].set_ylabel("greedy accuracy, %")
    panels[0].legend(frameon=False)
    return figure


def draw_s6(numbers: dict):
    """Left, lines: answering with fewer frames, a line for each training. Right, dots: with and without the image."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    colours = dict(zip(numbers, ("#8a8f98", "#2b6cb0", "#4a9a8c", "#d98c3f", "#7f6bc4")))
    parts = ("full", "frames_8", "frames_4")
    for what, of_run in numbers.items():
        places = [i for i, part in enumerate(parts) if of_run[part]["all"]]
        if what != "trained without image":
            left.plot(places, [np.mean(of_run[parts[i]]["all"]) for i in places], color=colours[what], label=what)
            for i in places:
                put_seeds(left, i, of_run[parts[i]]["all"], colours[what])
        if what in ("base", "trained with 16 frames", "trained without image"):
            name = what.replace(" with 16 frames", " with image")
            means = [np.mean(of_run[part]["all"]) for part in ("full", "no_image") if of_run[part]["all"]]
            right.plot(range(len(means)), means, color=colours[what], label=name)
            for i, part in enumerate(("full", "no_image")):
                put_seeds(right, i, of_run[part]["all"], colours[what])
    left.set_xticks(range(3), ["16 frames", "8", "4"])
    left.set(xlabel="answering with", ylabel="accuracy, mean of fresh L1, L2, L3, %", ylim=(0, 100))
    right.set_xticks([0, 1], ["with the image", "without it"])
    right.set(xlabel="answering", xlim=(-0.5, 1.5))
    for axes in (left, right):
        axes.axhline(25, color="black", linewidth=0.8, linestyle=":")
        axes.legend(frameon=False, fontsize=7.5, loc="upper right")
    return figure


def draw_rows(axes, numbers: dict, colour: str) -> None:
    """Rows of dots, a row for each value of each axis: accuracy over all levels; diamonds, L3."""
    y, ticks = 0.0, []
    for axis, values in numbers.items():
        axes.text(-0.02, y, axis, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=8,
                  fontweight="bold")
        for value, of_run in values.items():
            y += 1
            ticks.append((y, value))
            for level, marker, fill in (("all", "o", "full"), ("L3", "D", "none")):
                axes.plot(of_run[level], [y] * len(of_run[level]), marker, color=colour, markersize=4, fillstyle=fill)
            if of_run["all"]:
                axes.text(1.01, y, f"{np.mean(of_run['all']):.0f}", transform=axes.get_yaxis_transform(), va="center",
                          fontsize=8)
        y += 1.4
    axes.set_yticks(*zip(*ticks), fontsize=8)
    axes.set(ylim=(y - 0.4, -0.8), xlabel="dots: accuracy, mean of fresh L1, L2, L3, %; diamonds: fresh L3")
    axes.grid(axis="x", alpha=0.3)


def draw_s7(numbers: dict):
    """Left, rows of dots: what is varied. Right: group size by learning rate."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 6.4), layout="constrained", width_ratios=(3, 2))
    draw_rows(left, numbers["axes"], COLOURS["grpo"])
    sizes, rates = list(numbers["grid"]), list(next(iter(numbers["grid"].values())))
    means = np.array([[np.mean(numbers["grid"][size][rate] or np.nan) for rate in rates] for size in sizes])
    right.imshow(means, cmap="Blues", vmin=60, vmax=100, aspect="auto")
    for (i, j), mean in np.ndenumerate(means):
        seeds = numbers["grid"][sizes[i]][rates[j]]
        if seeds:
            text = f"{mean:.1f}\n({', '.join(f'{seed:.0f}' for seed in seeds)})"
            right.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if mean > 80 else "black")
    right.set_xticks(range(len(rates)), rates)
    right.set_yticks(range(len(sizes)), sizes)
    right.set(xlabel="learning rate", ylabel="group size", title="Accuracy, mean of the fresh levels (seeds), %")
    return figure


def draw_s8(numbers: dict):
    """Left, a line: accuracy against the share of rewards that are flipped. Right, rows of dots: what helps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", width_ratios=(2, 3))
    for level, style in (("all", "-"), ("L3", "--")):
        found = {int(share.strip("%")): of_run[level] for share, of_run in numbers["rewards flipped"].items()
                 if of_run[level]}
        left.plot(list(found), [np.mean(seeds) for seeds in found.values()], style, color=COLOURS["grpo"],
                  label={"all": "mean of fresh L1, L2, L3", "L3": "fresh L3"}[level])
        for share, seeds in found.items():
            put_seeds(left, share, seeds, COLOURS["grpo"], fillstyle="full" if level == "all" else "none")
    left.set(xlabel="rewards flipped, %", ylabel="greedy accuracy, %", ylim=(0, 100))
    left.axhline(25, color="black", linewidth=0.8, linestyle=":")
    left.legend(frameon=False, loc="lower left", fontsize=8)
    draw_rows(right, {"at 30%": numbers["at 30%"]}, COLOURS["grpo"])
    return figure


def draw_s9(numbers: dict):
    """Rows of dots, a panel for each thing measured: what the further rewards do."""
    kinds = list(next(iter(numbers.values())))
    figure, panels = plt.subplots(1, len(kinds), figsize=(11, 2.6), layout="constrained", sharey=True)
    for axes, kind in zip(panels, kinds):
        for y, of_run in enumerate(numbers.values()):
            axes.plot(of_run[kind], [y] * len(of_run[kind]), "o", color=COLOURS["grpo"], markersize=5)
        axes.set_title(kind, fontsize=8)
        axes.grid(axis="x", alpha=0.3)
        axes.set(ylim=(len(numbers) - 0.5, -0.5))
    panels[0].set_yticks(range(len(numbers)), list(numbers), fontsize=8)
    return figure


def draw_s10(numbers: dict):
    """Lines against the share of the questions that are answered without the video: left, what the own videos gain;
    right, accuracy where the habit is right and where it is wrong."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for what, colour in (("all questions", COLOURS["grpo"]), ("left out", COLOURS["sft"])):
        of_shares = {int(percent): found for percent, found in numbers[what].items() if found["random"]}
        gains = {percent: np.subtract(found["all"], found["random"]) for percent, found in of_shares.items()}
        left.plot(list(gains), [gain.mean() for gain in gains.values()], color=colour, label=what)
        for percent, gain in gains.items():
            put_seeds(left, percent, gain, colour)
        for by_habit, style in (("True", "-"), ("False", "--")):
            right.plot(list(of_shares), [np.mean(found[by_habit]) for found in of_shares.values()], style, color=colour,
                       label=f"{what}, habit {'right' if by_habit == 'True' else 'wrong'}")
            for percent, found in of_shares.items():
                put_seeds(right, percent, found[by_habit], colour, fillstyle="full" if by_habit == "True" else "none")
    left.set(ylabel="gain from its own videos, points", ylim=(-5, 80))
    right.set(ylabel="greedy accuracy, %", ylim=(0, 105))
    for axes in (left, right):
        axes.set_xlabel("questions of the training file that the habit answers, %")
        axes.set_xticks([0, 30, 40, 60, 90])
        axes.legend(frameon=False, fontsize=8)
    return figure


DRAW = {"study_s1": draw_s1, "study_s2": draw_s2, "study_s3": draw_s3, "study_s5": draw_s5, "study_s6": draw_s6,
        "study_s7": draw_s7, "study_s8": draw_s8, "study_s9": draw_s9, "study_s10": draw_s10}


def save(name: str, numbers: dict, folder: Path) -> None:
    """Draws a picture into a file that carries the digest of its numbers."""
    figure = DRAW[name](numbers)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / f"{name}.png", dpi=160, metadata={"Digest": digest(numbers)})
    plt.close(figure)
