"""Tables and pictures of the study (docs/study.py), from its summaries.

    python docs/study_report.py                             # rewrites tables in docs/study.md and README.md, draws
    python docs/study_report.py out/study_quick/summaries   # prints tables; pictures go beside that folder

A table stands in docs/study.md or README.md between <!-- table NAME --> and <!-- end -->. A picture carries the digest
of the numbers that it was drawn from, so that a test can tell whether it is stale on machines that draw other pixels.
"""
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from docs.arms import (  # noqa: E402
    BLIND,
    CANDIDATES,
    DIVISORS,
    RATES,
    S5,
    S7,
    S8,
    S9,
    S10,
    STUDIES,
    TEACHERS,
    Run,
    base,
    chosen,
    grid,
    name_at,
    point,
    write_rate,
)
from docs.habit import HABIT  # noqa: E402
from docs.study_numbers import (  # noqa: E402
    FRESH_FILES,
    LABELS,
    LEVEL_FILES,
    accuracies,
    accuracy_where,
    arm_of,
    claims,
    contrast,
    difference,
    distance_of,
    gain,
    incoherent,
    label,
    load,
    looked,
    rank_correlation,
    seeds_with,
    steps_done_in,
    steps_per_shown,
    trained_with,
)
from docs.study_pictures import digest, drawn_numbers, save  # noqa: E402

LEVELS_AND_ALL = [*([file] for file in FRESH_FILES), FRESH_FILES]
PAGES = (HERE / "study.md", HERE.parent / "README.md")


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
        rows.append([f"{label(a)} − {label(b)}", *(compare(runs, a, b, files) for files in LEVELS_AND_ALL)])
    return table(["difference in points, 95% interval; bold: claimed", *(f.replace("fresh4_", "fresh ") for f in
                                                                         FRESH_FILES), "all three"], rows)


def distance_table(runs: dict, names: list[str]) -> str:
    rows = [[label(name), every_seed(distance_of(runs, name)),
             *(every_seed(accuracies(runs, name, "full", [file])) for file in (FRESH_FILES[0], FRESH_FILES[2]))]
            for name in names if name != "base"]
    return table(["mean (seeds)", "forward KL, nats per completion", "fresh L1, %", "fresh L3, %"], rows)


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


def signature_table(runs: dict, names: list[str]) -> str:
    rows = []
    for name in names:
        first, _, last = (accuracies(runs, name, "full", [file]) for file in FRESH_FILES)
        if not len(first):
            continue
        rows.append([label(name), *map(over_seeds, (
            first - last, gain(runs, name, FRESH_FILES), incoherent(runs, name), claims(runs, name, "step"),
            claims(runs, name, "count")))])
    return table(["mean over seeds", "drop from fresh L1 to L3, points", "gain from its own videos, points",
                  "right answers that the reasoning contradicts, %", "steps said that stand in their place, %",
                  "number of steps right, %"], rows)


def attention_table(runs: dict, names: list[str]) -> str:
    rows = []
    for name in names:
        if seeds_with(runs, name, "attention"):
            rows.append([label(name), over_seeds(gain(runs, name, FRESH_FILES[:1])), *(
                over_seeds(scale * looked(runs, name, *path), digits) for path, scale, digits in (
                    (("kinds", "reasoning", "vision"), 100, 1), (("kinds", "reasoning", "entropy"), 1, 2),
                    (("diagonal", "picked"), 100, 0), (("diagonal", "other_video"), 100, 0),
                    (("hiding", "own"), 1, 2), (("hiding", "others"), 1, 2)))])
    return table(["mean over seeds", "gain on fresh L1, points", "attention on vision, %", "its entropy, nats",
                  "diagonal of the best heads, %", "the same with another video, %",
                  "nats a word loses without its own frames", "without as many others"], rows)


def compare(runs: dict, a: str, b: str, files: list[str], parts: tuple[str, str] = ("full", "full")) -> str:
    """A difference with its interval, bold where it is claimed; nothing where it was not measured."""
    found = difference(runs, a, b, files, parts=parts)
    if not found:
        return ""
    mean, low, high, apart = found
    text = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
    return f"**{text}**" if apart and (low > 0 or high < 0) else text


def varied_table(runs: dict, axes: dict, more: dict | None = None) -> str:
    """A line for every value of every axis, compared with the base point, whose line is the first, or where an axis has
    not got that with the axis's first value. more: head -> what else is shown of a run, by name."""
    rows = []

    def add(what: str, run: Run, reference: Run) -> None:
        accuracy = [every_seed(accuracies(runs, run.name, "full", [file])) for file in FRESH_FILES]
        against = "" if run is reference else compare(runs, run.name, reference.name, FRESH_FILES)
        rows.append([what, *accuracy, against, *(show(run.name) for show in (more or {}).values())])

    add("base point", point, point)
    for axis, values in axes.items():
        reference = point if point in values.values() else next(iter(values.values()))
        for value, run in values.items():
            if run is not point:
                add(f"{axis}: {value}", run, reference)
    return table(["accuracy in %: mean (seeds)", *(file.replace("fresh4_", "fresh ") for file in FRESH_FILES),
                  "difference in points, all three (95% interval; bold: claimed)", *(more or {})], rows)


def write_contrast(runs: dict, signed: list[tuple[int, Run]]) -> str:
    """A sum of accuracies over the three levels, with its interval; nothing where one was not measured."""
    if not all(len(accuracies(runs, run.name, "full", FRESH_FILES)) for _, run in signed):
        return ""
    mean, low, high = contrast(runs, [(sign, run.name, "full") for sign, run in signed], FRESH_FILES)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def data_difference_table(runs: dict) -> str:
    """S5: SFT against GRPO at every number of questions, and how much more that is than with all of them."""
    rows, ours, theirs = [], S5["sft"], S5["grpo"]
    for n in DIVISORS:
        more = [(1, ours[n]), (-1, theirs[n]), (-1, ours[1]), (1, theirs[1])]
        rows.append([f"{704 // n}", *(compare(runs, ours[n].name, theirs[n].name, files) for files in LEVELS_AND_ALL),
                     write_contrast(runs, more) if n > 1 else ""])
    return table(["different questions: SFT − GRPO in points, 95% interval; bold: claimed", "fresh L1", "fresh L2",
                  "fresh L3", "all three", "all three, more than with 704"], rows)


def frames_table(runs: dict) -> str:
    """S6: trained with, in lines; answering with, in columns."""
    asked = {"16 frames": "full", "8": "frames_8", "4": "frames_4", "16, no image": "no_image"}
    kinds = {f"fresh {level}": lambda name, part, file=file: accuracies(runs, name, part, [file])
             for level, file in zip(("L1", "L2", "L3"), FRESH_FILES)}
    kinds |= {f"all three, where the habit of S10 is {word}": lambda name, part, by_habit=by_habit: accuracy_where(
        runs, name, by_habit, part) for word, by_habit in (("right", True), ("wrong", False))}
    rows = [[f"{kind}, {what}", *(every_seed(show(name, part)) for part in asked.values())]
            for kind, show in kinds.items() for what, name in trained_with().items()]
    return table(["accuracy in %: mean (seeds)", *(f"answered with {what}" for what in asked)], rows)


def grid_table(runs: dict) -> str:
    """S7: accuracy over the three levels by group size, in lines, and learning rate, in columns."""
    sizes, rates = (sorted({key[i] for key in grid if key[0] > 2}) for i in (0, 1))
    rows = [[f"G = {size}", *(every_seed(accuracies(runs, grid[size, rate].name, "full", FRESH_FILES))
                              for rate in rates)] for size in sizes]
    rows.append(["G = 16 − G = 4", *(compare(runs, grid[16, rate].name, grid[4, rate].name, FRESH_FILES)
                                     for rate in rates)])
    more = [(1, grid[16, 2e-4]), (-1, grid[4, 2e-4]), (-1, grid[16, 2e-5]), (1, grid[4, 2e-5])]
    rows.append(["the same, at 2e-4 more than at 2e-5", "", "", write_contrast(runs, more)])
    return table(["accuracy in %, mean of the fresh levels (seeds)", *map(write_rate, rates)], rows)


def frames_difference_table(runs: dict) -> str:
    """S6: what was expected of, as differences: what, (run, part) and (run, part)."""
    _, whole, half, quarter, without = trained_with().values()
    pairs = {"8 frames in training and test − 16 in both": (half, "frames_8", whole, "full"),
             "4 frames in both − 16 in both": (quarter, "frames_4", whole, "full"),
             "test with 8: trained with 8 − with 16": (half, "frames_8", whole, "frames_8"),
             "trained with 8: test with 16 − with 8": (half, "full", half, "frames_8"),
             "test with 16: trained with 8 − with 16": (half, "full", whole, "full"),
             "no image in training and test − image in both": (without, "no_image", whole, "full"),
             "trained with the image: test without − with": (whole, "no_image", whole, "full")}
    rows = [[what, *(compare(runs, a, b, files, (part, other)) for files in LEVELS_AND_ALL)]
            for what, (a, part, b, other) in pairs.items()]
    return table(["difference in points, 95% interval; bold: claimed", "fresh L1", "fresh L2", "fresh L3", "all three"],
                 rows)


def in_training(runs: dict, name: str, key: str, digits: int, scale: float = 1) -> str:
    """A number of training, over seeds."""
    found = [numbers[key] for numbers in seeds_with(runs, name, "train") if numbers.get(key) is not None]
    return over_seeds(scale * np.array(found), digits)


def reasoning_table(runs: dict) -> str:
    """S9: what the rewards do to the reasoning."""
    rows = []
    for value, run in S9["rewards"].items():
        name = run.name
        shares = (gain(runs, name, FRESH_FILES), incoherent(runs, name),
                  *(claims(runs, name, kind) for kind in ("step", "count")))
        rows.append([value, *(over_seeds(share) for share in shares), over_seeds(steps_per_shown(runs, name), 2),
                     *(in_training(runs, name, reward, 2) for reward in ("process", "agreement"))])
    return table(["mean (lowest to highest)", "gain from its own videos, points",
                  "right answers that the reasoning contradicts, %", "steps said that stand in their place, %",
                  "number of steps right, %", "steps said for each shown", "process reward in training",
                  "agreement reward in training"], rows)


def habit_table(runs: dict) -> str:
    """S10: accuracy and gain, and accuracy where the answer is the habit's and where it is not."""
    rows = []
    for what, values in {"base": {"": base}, **S10}.items():
        for percent, run in values.items():
            full = accuracies(runs, run.name, "full", FRESH_FILES)
            habit, others = (accuracy_where(runs, run.name, by_habit) for by_habit in (True, False))
            again = compare(runs, run.name, f"habit{percent}", FRESH_FILES) if what == "left out" else ""
            rows.append([f"{what}, {percent}%" if what in S10 else what, every_seed(full),
                         every_seed(gain(runs, run.name, FRESH_FILES)), over_seeds(habit), over_seeds(others), again])
    return table(["mean over the three fresh levels (seeds)", "accuracy, %", "gain from its own videos, points",
                  "accuracy where the habit is right, %", "where it is wrong, %",
                  "difference to all questions, points"], rows)


def leave_out_table(runs: dict) -> str:
    """S10: what is left out by one, two and three blind evaluations of the base."""
    rows = []
    for percent, parts in BLIND.items():
        answers = [seeds_with(runs, "base", part, f"habit{percent}") for part in parts]
        if not all(answers):
            continue
        right = np.array([[char == "1" for char in found[0]["right"]] for found in answers])
        by_habit = np.isin(steps_done_in(f"habit{percent}", right.shape[1]), HABIT)
        for number in range(1, len(parts) + 1):
            out = right[:number].all(axis=0)
            shares = [100 * out[kind].mean() for kind in (by_habit, ~by_habit)]
            rows.append([f"{percent}%", f"{number}", *(f"{share:.1f}" for share in shares),
                         f"{(~out).sum()} of {len(out)}", f"{100 * by_habit[~out].mean():.0f}"])
    return table(["questions with a video that the habit answers", "blind evaluations", "of these left out, %",
                  "of the others left out, %", "questions with a video that stay", "of which the habit answers, %"],
                 rows)


def tables(runs: dict) -> dict[str, str]:
    sft, own, grpo, lora = map(chosen, ("sft", "own", "grpo", "lora"))
    return {
        "README": readme_table(runs),
        "tuning": tuning_table(runs),
        "S1": accuracy_table(runs, STUDIES["S1"], FRESH_FILES + LEVEL_FILES),
        "S1 differences": difference_table(runs, [
            (sft, grpo), (name_at("sft", 1e-3), grpo), (own, "base"), (own, grpo), ("few_grpo", grpo),
            ("half_grpo", grpo), ("half_grpo", sft), (lora, grpo), ("blank", "base")]),
        "S2": accuracy_table(runs, [chosen(teacher) for teacher in TEACHERS], FRESH_FILES),
        "S2 differences": difference_table(runs, [(chosen(teacher), grpo) for teacher in ("sft", *TEACHERS)]),
        "S2 control": difference_table(runs, [
            (name_at("sft", 1e-3), sft), (chosen("hallucinates"), name_at("sft", 1e-3)), (name_at("sft", 3e-3), sft),
            (chosen("paraphrase"), name_at("sft", 3e-3))]),
        "S3": distance_table(runs, STUDIES["S3"]),
        "S3 correlations": correlation_table(runs, STUDIES["S3"]),
        "S4": signature_table(runs, STUDIES["S4"]),
        "S4 attention": attention_table(runs, STUDIES["S1"]),
        "S5": varied_table(runs, {method: {f"{704 // n} questions": run for n, run in of_method.items()}
                                  for method, of_method in (("SFT", S5["sft"]), ("GRPO", S5["grpo"]))}),
        "S5 differences": data_difference_table(runs),
        "S6": frames_table(runs),
        "S6 differences": frames_difference_table(runs),
        "S7": varied_table(runs, S7, {
            "forward KL, nats": lambda name: over_seeds(distance_of(runs, name)),
            "tokens clipped at the end, %": lambda name: in_training(runs, name, "clip_frac", 2, 100)}),
        "S7 grid": grid_table(runs),
        "S8": varied_table(runs, S8),
        "S9": varied_table(runs, S9),
        "S9 reasoning": reasoning_table(runs),
        "S10": habit_table(runs),
        "S10 left out": leave_out_table(runs)}


def stale(runs: dict) -> list[str]:
    """What stands on the pages and is not what these summaries give."""
    text, found = "".join(page.read_text() for page in PAGES), []
    for name, content in tables(runs).items():
        begin = f"<!-- table {name} -->\n"
        if begin in text and f"{begin}{content}\n<!-- end -->" not in text:
            found.append(f"table {name}")
    for name, numbers in drawn_numbers(runs).items():
        picture = HERE / f"{name}.png"
        if f"{name}.png" not in text:
            continue
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
    shown = "".join(page.read_text() for page in PAGES)
    for name, numbers in drawn_numbers(runs).items():
        if here and f"{name}.png" not in shown:
            continue  # a question that does not stand on the page yet
        save(name, numbers, HERE if here else folder.parent)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "study")
