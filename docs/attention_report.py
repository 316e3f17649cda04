"""The tables and the pictures of what attention.py has measured: printed and drawn from its attention.json alone.

    python docs/attention_report.py out/toy_attention        # again: attention.py does this at its end

    attention.png           each kind of token over the layers; below, the words that name a step: what they look at,
                            and what they lose without it
    attention_tokens.png    of one question, each token of the reasoning over the time steps of the video
    attention_frames.png    of the same question, the frames, and where in them the words of its steps look
The question is the one, of the first 32, of which the answers name most steps.
"""
import base64
import itertools
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no screen needed
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import PixelSettings, cached_video  # noqa: E402

KINDS = ("reasoning", "answer", "step")
COLOURS, MARKS = ("#d98c3f", "#2b6cb0", "#222222", "#8a8f98"), "osD^"  # of models; they differ in grey too
FRAME = "#c1440e"  # round the time steps that show what a token names
CAPTION = "A row: where the model looks as it chooses this token.\nFramed: the time steps that show what it names."
MOST_ROWS = 48  # tokens of a picture, the first ones


def unpack(packed: dict) -> np.ndarray:
    values = np.frombuffer(base64.b64decode(packed["data"]), np.uint8).reshape(packed["shape"])
    return packed["scale"] * values


def short_name(model: str) -> str:
    """out/toy_grpo/final -> toy_grpo"""
    return next((part for part in reversed(Path(model).resolve().parts) if part != "final"), model)


def numbers(values: list[float | None], width: int = 10, digits: int = 0) -> str:
    return "".join("-".rjust(width) if value is None else f"{value:{width}.{digits}f}" for value in values)


def print_layers(table: dict) -> None:
    """One model, a line per layer: % of attention on vision tokens, nats of entropy over them, % of the diagonals."""
    kinds, ends = [table["kinds"].get(kind) for kind in KINDS], [table["diagonal"], table["place"]]
    print(f"\n{short_name(table['model'])}: {table['questions']} questions, {table['image_only']} with an image alone; "
          f"{table['unreadable']} more could not be read\n{'':10}{'attention on vision tokens, %':>30}   "
          f"{'entropy there, nats':>30}{'diagonal, %':>16}{'place, %':>10}\n{'layer':10}"
          + "   ".join(2 * ["".join(f"{kind:>10}" for kind in KINDS)]))
    for layer in range(len(next(filter(None, kinds))["vision"])):
        print(f"{layer:<10}" + numbers([kind and 100 * kind["vision"][layer] for kind in kinds]) + "   "
              + numbers([kind and kind["entropy"][layer] for kind in kinds], digits=2) + "      "
              + numbers([end and 100 * end["layers"][layer] for end in ends]))
    print("uniform   " + numbers([kind and 100 * kind["uniform_vision"] for kind in kinds]) + "   "
          + numbers([kind and table["max_entropy"] for kind in kinds], digits=2) + "      "
          + numbers([end and 100 * end["chance"] for end in ends]))


def print_models(tables: list[dict]) -> None:
    """All models side by side: what attention shows, and under it what is lost without it; then a sentence each."""
    def cell(table: dict, *keys: str, scale: float = 100, digits: int = 0) -> str:
        for key in keys:
            table = table and table.get(key)
        if not table:
            return "-"
        mean, low, high = (f"{scale * table[key]:.{digits}f}" for key in ("mean", "low", "high"))
        return f"{mean} ({low} to {high}), n = {table['n']}"

    rows = {"": [short_name(table["model"]) for table in tables],
            "Attention of the words that name a step, %": [""] * len(tables)}
    for name, keys in {"on vision tokens": ("kinds", "step", "vision_all_layers"),
                       "diagonal, all heads": ("diagonal", "all"), "diagonal, picked heads": ("diagonal", "picked"),
                       "  how far above chance": ("diagonal", "picked_above_chance"),
                       "  same words, another question's video": ("diagonal", "other_video"),
                       "place, picked heads (chance is 50)": ("place", "picked")}.items():
        rows[f"  {name}"] = [cell(table, *keys) for table in tables]
    rows["Nats that each of them loses if hidden are"] = [""] * len(tables)
    for name, key in (("the time steps that show its step", "own"), ("as many others", "others"),
                      ("all: another question's video is shown", "other_video")):
        rows[f"  {name}"] = [cell(table, "hiding", key, scale=1, digits=2) for table in tables]
    print()
    for name, cells in [row for row in rows.items() if {*row[1]} != {"-"}]:
        print(f"{name:44}" + "".join(f"{cell:>32}" for cell in cells))
    print("(95% bootstrap intervals over n questions)\n")
    for table in tables:
        print(f"{short_name(table['model'])}: {verdict(table)}")


def verdict(table: dict) -> str:
    """What attention and hiding say together."""
    (kind, found), end, hiding = next(iter(table["kinds"].items())), table["diagonal"], table["hiding"]
    text = (f"of the attention of its {kind} tokens {100 * np.mean(found['vision']):.0f}% is on vision tokens "
            f"(uniform: {100 * found['uniform_vision']:.0f})")
    if end:
        says, other = "look at" if end["picked_above_chance"]["low"] > 0 else "do not look at", end["other_video"]
        if says == "look at" and other and other["high"] >= end["picked"]["low"]:
            says = "look, whatever is shown there, at"
        text += f"; its words {says} the time steps of the step that they name ("
        text += f"{100 * end['picked']['mean']:.0f}%, chance {100 * end['chance']:.0f}"
        text += f", on another video {100 * end['other_video']['mean']:.0f})" if end["other_video"] else ")"
    if hiding.get("own"):
        need = "need these time steps" if hiding["difference"]["low"] > 0 else "do not need these time steps"
        text += (f"; they {need}: {hiding['own']['mean']:.2f} nats are lost without them, "
                 f"{hiding['others']['mean']:.2f} without others")
    if not end:
        text += ("; its answers name two steps too seldom for a diagonal" if hiding.get("own") else
                 "; which time steps show what it names is not known, or it names no step")
    return text + "."


# ----------------------------------------------------------------------------------------------------------------------
# Pictures.

def draw_numbers(tables: list[dict], file: Path) -> None:
    """Above, layer by layer, the vision share of each kind of token; below, what the words that name a step look at."""
    figure, (tops, (frames, dots, bars)) = plt.subplots(2, 3, figsize=(11, 6.4), layout="constrained")
    columns = {"diagonal,\nall heads": ("diagonal", "all"), "diagonal,\npicked heads": ("diagonal", "picked"),
               "the same on\nother video": ("diagonal", "other_video"), "place,\npicked heads": ("place", "picked")}
    for m, table in enumerate(tables):
        colour, shift = COLOURS[m % 4], 0.2 * (m - (len(tables) - 1) / 2)
        line = dict(color=colour, marker=MARKS[m % 4], markersize=5)
        for axes, kind in zip(tops, KINDS):
            axes.set(title=f"{kind} tokens", xlabel="layer", ylabel="attention on vision tokens, %")
            if of_kind := table["kinds"].get(kind):
                axes.plot(100 * np.array(of_kind["vision"]), label=short_name(table["model"]), **line)
                axes.axhline(100 * of_kind["uniform_vision"], color=colour, linestyle=":", linewidth=1.2)
        of_kind = table["kinds"].get("step") or table["kinds"].get("reasoning")
        if of_kind and of_kind["frames"]:
            times = range(1, table["time_steps"] + 1)
            frames.plot(times, 100 * np.mean(of_kind["frames"], 0), **line)
            frames.plot(times, 100 * np.array(of_kind["uniform_frames"]), color=colour, linestyle=":", linewidth=1.2)
        for x, (measure, which) in enumerate(columns.values()):
            if found := table[measure] and table[measure][which]:
                dots.errorbar(x + shift, 100 * found["mean"], 100 * whiskers(found), capsize=3, **line)
                dots.plot(x + shift + np.array([-0.09, 0.09]), 2 * [100 * table[measure]["chance"]], color="black")
        for x, key in enumerate(("own", "others", "other_video")):
            if found := table["hiding"].get(key):
                place, width = x + 4 * shift / len(tables), 0.72 / len(tables)
                bars.bar(place, found["mean"], width, yerr=whiskers(found), capsize=3, edgecolor=colour,
                         color=colour if key == "own" else "white", hatch="////" if key == "others" else None)
                bars.annotate(f"{found['mean']:.2f}", (place, max(found["high"], 0)), (0, 3), ha="center",
                              textcoords="offset points", fontsize=8 if len(tables) < 4 else 6)
    handles = [plt.Line2D([], [], color="black", linestyle=":", label="uniform")]
    tops[0].legend(handles=tops[0].get_lines()[::2] + handles, frameon=False, fontsize=8)
    frames.set(title="step tokens over the video", xlabel="time step (two frames)",
               ylabel="attention, mean of layers, %")
    dots.set(title="do a step's words look where it is?", ylabel="%   (black: chance)", ylim=(0, 105))
    dots.set_xticks(range(len(columns)), columns, fontsize=7.5)
    dots.set_xlim(-0.5, len(columns) - 0.5)
    bars.set(title="do they need it?", ylabel="nats lost by each word", xlim=(-0.6, 2.6))
    bars.axhline(0, color="black", linewidth=0.8)
    bars.set_xticks(range(3), ("hidden: where\nthe step is shown", "hidden:\nas many others", "shown:\nanother video"),
                    fontsize=7.5)
    for axes in (*tops, frames, dots, bars):
        axes.spines[["top", "right"]].set_visible(False)
    for axes in (*tops, frames, bars):
        low, high = axes.get_ylim()
        axes.set_ylim(low if axes is bars else 0, high + 0.1 * (high - low))
    figure.savefig(file, dpi=160)
    plt.close(figure)


def whiskers(found: dict) -> np.ndarray:
    return np.array([[found["mean"] - found["low"]], [found["high"] - found["mean"]]])


def framed(one: dict, token: int) -> list[int]:
    """The time steps that show what a token names; none where it names nothing, or this is not known."""
    steps = {step for which, step, _ in one["named"] if which == token}
    return [t for t, step in enumerate(one["shown"] or []) if step in steps]


def runs(one: dict) -> list[tuple[int, int, str]]:
    """(first time step, last, the step that they show), one after another."""
    found = [(step, [t for t, _ in run]) for step, run in itertools.groupby(enumerate(one["shown"] or []),
                                                                           lambda pair: pair[1])]
    return [(times[0], times[-1], one["steps"][step]) for step, times in found]


def draw_tokens(ones: list[dict], names: list[str], file: Path) -> None:
    """The reasoning down, time steps across, a panel for each model."""
    rows = [one["token_kinds"]["reasoning"][:MOST_ROWS] for one in ones]
    weights = [100 * unpack(one["frames"]) for one in ones]
    most = max(w[tokens].max(initial=0) for w, tokens in zip(weights, rows))
    figure, grid = plt.subplots(1, len(ones), figsize=(1.4 + 3.9 * len(ones), 2 + 0.2 * max(map(len, rows))),
                                layout="constrained", squeeze=False)
    for axes, one, tokens, w, name in zip(grid[0], ones, rows, weights, names):
        image = axes.imshow(w[tokens], cmap="Blues", vmin=0, vmax=most, aspect="auto")
        for y, token in enumerate(tokens):
            for t in framed(one, token):
                axes.add_patch(plt.Rectangle((t - 0.46, y - 0.45), 0.92, 0.9, fill=False, edgecolor=FRAME, lw=1.4))
        for first, last, step in runs(one):
            axes.plot([first - 0.4, last + 0.4], [-0.8, -0.8], color="black", linewidth=1.5, clip_on=False)
            axes.text((first + last) / 2, -1, step.replace(" ", "\n"), ha="center", va="bottom", fontsize=8)
        axes.set_yticks(range(len(tokens)), [one["tokens"][token].strip() for token in tokens], fontsize=8)
        axes.set_xticks(range(w.shape[1]), range(1, w.shape[1] + 1), fontsize=8)
        axes.set(xlabel="time step of the video (two frames)", ylim=(max(map(len, rows)) - 0.5, -0.5))
        axes.set_title(name, pad=42, fontsize=10)
        axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=grid[0], label="% of a token's attention", shrink=0.7)
    figure.supxlabel(CAPTION, fontsize=8)
    figure.savefig(file, dpi=160)
    plt.close(figure)


def draw_frames(ones: list[dict], names: list[str], pixels: np.ndarray, file: Path) -> None:
    """The first frame of each time step, and below it where in it words look, a block for each model."""
    time = ones[0]["frames"]["shape"][1]
    rows = [([token for token in one["placed"] if token in one["token_kinds"]["step"]] or one["placed"])[:10]
            for one in ones]
    maps = [dict(zip(one["placed"], 100 * unpack(one["places"]))) for one in ones]
    most = max(places[token].max() for places, tokens in zip(maps, rows) for token in tokens)
    wide, deep = len(ones) * (time + 2), 1 + max(map(len, rows))
    figure, axes = plt.subplots(figsize=(0.9 + 0.62 * wide, 0.7 + 0.62 * (deep + 0.7)), layout="constrained")
    for m, (one, tokens, places, name) in enumerate(zip(ones, rows, maps, names)):
        left = m * (time + 2)  # a cell is 1 x 1, with a gap of 0.1
        axes.text(left + time / 2, -0.5, name, ha="center", fontsize=11)
        for t in range(time):
            axes.text(left + t + 0.45, -0.12, t + 1, ha="center", fontsize=8)
            axes.imshow(pixels[2 * t], extent=(left + t, left + t + 0.9, 0.9, 0))
        for y, token in enumerate(tokens, start=1):
            axes.text(left - 0.15, y + 0.5, one["tokens"][token].strip(), ha="right", va="center", fontsize=9)
            for t in range(time):
                image = axes.imshow(places[token][t], cmap="Blues", vmin=0, vmax=most,
                                    extent=(left + t, left + t + 0.9, y + 0.9, y))
                shows = t in framed(one, token)
                axes.add_patch(plt.Rectangle((left + t, y), 0.9, 0.9, fill=False, lw=2 if shows else 0.5,
                                             edgecolor=FRAME if shows else "#bbbbbb"))
    axes.set(xlim=(-1.6, wide - 1.9), ylim=(deep, -0.7), xticks=[], yticks=[], aspect="equal")
    axes.set_xlabel(f"Above: the frames, by time step. {CAPTION}", fontsize=8)
    axes.set_frame_on(False)
    figure.colorbar(image, ax=axes, label="% of a token's attention", shrink=0.7)
    figure.savefig(file, dpi=160)
    plt.close(figure)


def report(folder: Path) -> None:
    results = json.loads((folder / "attention.json").read_text())
    tables, settings = results["models"], results["settings"]
    for table in tables:
        print_layers(table)
    print_models(tables)
    files, heads = ["attention.png"], {"diagonal": "heads picked by diagonal", "place": "heads picked by place"}
    names = [f"{short_name(table['model'])}\n({heads.get(table['samples_heads'], 'all heads')})" for table in tables]
    draw_numbers(tables, folder / files[0])
    shared = list(zip(*(table["samples"] for table in tables)))  # the same questions for all models
    if shared:
        ones = max(shared, key=lambda ones: min(len({step for _, step, _ in one["named"]}) for one in ones))
        pixels = {key: settings[key] for key in ("fps", "min_frames", "num_frames", "image_size")}
        files += ["attention_tokens.png", "attention_frames.png"]
        draw_tokens(ones, names, folder / files[1])
        frames, _ = cached_video(Path(ones[0]["video"]), PixelSettings(**pixels, cache=settings["frame_cache"]))
        draw_frames(ones, [short_name(table["model"]) for table in tables], frames, folder / files[2])
    print(f"wrote {', '.join(files)} to {folder}")


if __name__ == "__main__":
    report(Path(sys.argv[1]))
