"""Greedy accuracy on video questions, by level, domain and duration, with intervals, and paired against another run.

    python evaluate.py                                          # the toy world's base model
    python evaluate.py --model out/toy_grpo/final --output_dir out/toy_eval_grpo --compare out/toy_eval
    python evaluate.py --model out/toy_grpo/final --output_dir out/toy_blind --compare out/toy_eval_grpo --video random
    torchrun --nproc_per_node 8 evaluate.py --model out/grpo/final --data_root DIR --output_dir out/eval_grpo \
        --eval_files annotations/validation_L1.jsonl annotations/validation_L2.jsonl annotations/validation_L3.jsonl

Every question of a file stays in the denominator: an answer that does not parse is wrong, and so is a question whose
video cannot be read (both are counted beside the accuracy). The judge is `grade` in data.py, which also gives the
reward in grpo_video.py. An accuracy alone does not show that a model looks at the video: evaluate it again with --video
random (or another control) and --compare the two.

Written to --output_dir:
    results.json     every setting, library versions and the table, as numbers
    samples.jsonl    one line per question: response, parsed letter, gold, ...: from it any number can be computed; as
                     they come in samples_rank0.jsonl and so on, where --resume goes on

References: SEED-Bench-R1, arXiv 2503.24376, tables 1 and 2. Wilson (1927) for the interval of a proportion. McNemar
(1947) for two models on the same questions, Agresti and Min (2005) for the interval of their difference. LongVideoBench
results are those reprinted by DeepVideo-R1 (arXiv 2506.07464).
"""
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

import data
import runtime
from data import Example, VideoDataset, file_names, first_letter, grade, load_questions, make_loader, parse_answer
from model import collate_prompts, end_token_ids, vision_token_ids
from run import open_folder, write_whole
from runtime import RunArgs, arg
from sampler import answer_texts, generate

PARSERS = {"strict": parse_answer, "first_letter": first_letter}


@dataclass
class Args(RunArgs):
    """The defaults are the published protocol: 16 frames, at most 256 new tokens, greedy."""
    eval_files: list[str] = arg([f"annotations/validation_{level}.jsonl" for level in ("L1", "L2", "L3")],
                                "under data_root: validation, LongVideoBench or training files, told by their fields")
    output_dir: str = arg("out/eval", "results.json and samples.jsonl go here")
    compare: str = arg("", "output_dir of another evaluation of the same files (other model or --video): paired tests")
    grader: str = arg("strict", "strict, or first_letter for parity with published numbers")
    max_completion_length: int = arg(256, "most tokens of a completion, end token included", least=1)
    batch_size: int = arg(16, "prompts decoded together on a rank: memory against speed; results differ by rounding",
                          least=1)

    def __post_init__(self):
        super().__post_init__()
        if len(set(self.eval_files)) < len(self.eval_files):
            raise ValueError(f"--eval_files {' '.join(self.eval_files)}: a file is named twice")
        if self.grader not in PARSERS:
            raise ValueError(f"--grader {self.grader!r}: must be one of {', '.join(PARSERS)}")


# Defaults in place of those above for a small model (`is_small` in runtime.py); flags that are given win.
TOY = dict(image_size=56, max_completion_length=64, batch_size=64, frame_cache="out/toy_frames",
           output_dir="out/toy_eval")

# The paper's accuracies in percent for Qwen2-VL-7B: vanilla, SFT, GRPO. A file is a published split if its name and its
# number of questions both are: nothing else is ever shown beside these numbers.
PUBLISHED = {
    ("validation_L1", 2432): {"": (34.79, 43.79, 46.01)},
    ("validation_L2", 923): {"": (34.02, 44.10, 50.16)},
    ("validation_L3", 1321): {
        "": (31.57, 38.15, 44.89), "daily life": (31.21, 38.27, 48.52), "hobbies": (32.30, 41.02, 45.08),
        "recreation": (33.33, 32.24, 43.72), "work": (30.69, 38.61, 41.34)},
    ("lvb_val", 1337): {"": (32.9, 40.0, 43.4)},
}


# ----------------------------------------------------------------------------------------------------------------------
# Answers of this rank's share of a file.

def answer_file(file: str, dataset: VideoDataset, sampler, args: Args, rank: int, world_size: int, before: list[dict],
                output: Path) -> list[dict]:
    """One record per question that this rank answers: every world_size-th of those that are not among the records
    `before`. A line is added to `output` as soon as it is there, for --resume."""
    answered = {r["sample_id"] for r in before if r["file"] == file}
    left = [(0, i) for i, question in enumerate(dataset.questions) if question.id not in answered]
    share = left[rank::world_size]
    batches = [share[i:i + args.batch_size] for i in range(0, len(share), args.batch_size)]
    progress = tqdm(total=len(share), desc=Path(file).stem, disable=rank != 0, dynamic_ncols=True)
    records = []
    for examples in make_loader(dataset, batches, args.num_workers):
        readable = [example for example in examples if not example.error]
        answers = iter(answer(readable, dataset.tokenizer, sampler, args))
        for example in examples:
            response, length, truncated = ("", 0, False) if example.error else next(answers)
            records.append({"file": file, **make_record(example, response, length, truncated, args)})
        with open(output, "a") as stream:
            stream.writelines(json.dumps(record) + "\n" for record in records[-len(examples):])
        progress.update(len(examples))
        progress.set_postfix_str(f"accuracy {sum(r['correct'] for r in records) / len(records):.3f}")
    progress.close()
    return records


def answered_before(output_dir: Path) -> list[dict]:
    """The records that a run to be resumed has left, in one file from now on."""
    files = [path for path in (output_dir / "samples.jsonl", *output_dir.glob("samples_rank*.jsonl")) if path.exists()]
    lines = [line for path in files for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    # Without a last line that a kill has torn, and once each: it may have come before the files below were removed.
    # Nor those of an earlier version, which have not been judged by all rewards.
    records = {(r["file"], r["sample_id"]): r for r in map(json.loads, lines) if "format" in r}.values()
    write_whole(output_dir / "samples_rank0.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    for path in {*files} - {output_dir / "samples_rank0.jsonl"}:
        path.unlink()
    return list(records)


def answer(examples: list[Example], tokenizer, sampler, args: Args) -> list[tuple[str, int, bool]]:
    """(response, its number of tokens, whether it was cut off) for each example, greedily."""
    if not examples:
        return []
    end_ids, banned_ids = end_token_ids(sampler, tokenizer, sampler.device), vision_token_ids(sampler, sampler.device)
    completions = generate(sampler, collate_prompts(examples, sampler.device), 1, args.max_completion_length,
                           temperature=0.0, seeds=None, end_ids=end_ids, banned_ids=banned_ids)
    runtime.require_finite("log-probs", completions.logps, examples)
    ids, lengths, ended, _ = completions
    return list(zip(answer_texts(tokenizer, examples, ids, lengths, ended), lengths.tolist(), (~ended).tolist()))


def make_record(example: Example, response: str, length: int, truncated: bool, args: Args) -> dict:
    """A line of samples.jsonl, but for the file's name."""
    question, (video, image) = example.question, file_names(example.question)
    parsed, correct = grade(response, example, PARSERS[args.grader])
    judges = {"format": data.format_reward, "agreement": data.agreement_reward, "process": data.process_reward}
    return {"sample_id": question.id, "part": question.part, "video": video, "image": image,
            "question": question.text, "options": list(example.options), "goal": question.goal,
            "progress": list(question.progress), "gold": example.gold, "parsed": parsed, "correct": correct,
            "concluded": data.concluded_option(response, example.options),
            **{name: judge(response, example) for name, judge in judges.items()},
            "length": length, "truncated": truncated, "error": example.error, "response": response}


# ----------------------------------------------------------------------------------------------------------------------
# Statistics.

def wilson_interval(correct: int, n: int) -> tuple[float, float]:
    """The 95% interval of a proportion, as two numbers in 0..1. Unlike p +- 1.96 s it holds near 0 and 1.

    Source: Wilson (1927). (0, 1) for n = 0.
    """
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959963984540054, correct / n
    # (p + z^2 / 2n  +-  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))


def mcnemar_p(only_ours: int, only_theirs: int) -> float:
    """Two-sided exact p-value that two models are equally good, from the questions that just one of them got right.

    Questions that both got right, or both wrong, say nothing about which is better; under equality each of the others
    is a fair coin. Source: McNemar (1947), in its binomial form.
    """
    n = only_ours + only_theirs
    tail = sum(math.comb(n, k) for k in range(min(only_ours, only_theirs) + 1))
    return min(1.0, 2 * tail / 2 ** n)


def paired_interval(only_a: int, only_b: int, n: int) -> tuple[float, float]:
    """The 95% interval of accuracy(a) - accuracy(b) on the same n questions, as two numbers in -1..1.

    From the questions that just one of the two got right. Half a question is added to each of the four counts, or the
    interval would have no width where the two never differ. Source: Agresti and Min (2005). (-1, 1) for n = 0.
    """
    if n == 0:
        return -1.0, 1.0
    # d = (b - c) / n  +-  z sqrt(b + c - (b - c)^2 / n) / n, with b + 1/2, c + 1/2, n + 2
    z, difference, n = 1.959963984540054, only_a - only_b, n + 2
    spread = z * math.sqrt(only_a + only_b + 1 - difference ** 2 / n) / n
    return max(-1.0, difference / n - spread), min(1.0, difference / n + spread)


def parts(records: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """(file, part) -> its records: whole (""), with and without a video where it has both, by domain or duration."""
    found = {}
    for file in dict.fromkeys(r["file"] for r in records):
        of_file = [r for r in records if r["file"] == file]
        found[file, ""] = of_file
        if len({bool(r["video"]) for r in of_file}) == 2:
            found[file, "with a video"] = [r for r in of_file if r["video"]]
            found[file, "image only"] = [r for r in of_file if not r["video"]]
        names = {r["part"] for r in of_file} - {""}
        for name in sorted(names, key=lambda name: (len(name), name) if name.isdigit() else (0, name)):
            found[file, name] = [r for r in of_file if r["part"] == name]
    return found


def chance(records: list[dict]) -> float:
    """The accuracy of a guess among the options; 0 where there are none."""
    return sum(1 / len(r["options"]) for r in records if r["options"]) / len(records)


def mean(records: list[dict], key: str) -> float | None:
    """Over the records that have a value; None if none has."""
    values = [r[key] for r in records if r.get(key) is not None]
    return sum(values) / len(values) if values else None


def summarise(records: list[dict], video: str = "full") -> list[dict]:
    """One line per file and part of it. Published numbers stand beside those of a run that saw its videos only."""
    table = []
    for (file, part), of_part in parts(records).items():
        n, correct = len(of_part), sum(r["correct"] for r in of_part)
        low, high = wilson_interval(correct, n)
        published = PUBLISHED.get((Path(file).stem, sum(r["file"] == file for r in records)), {})
        table.append({
            "file": file, "part": part, "n": n, "correct": correct, "accuracy": correct / n,
            "wilson_low": low, "wilson_high": high, "chance": chance(of_part),
            "parse_rate": sum(r["parsed"] is not None for r in of_part) / n,
            "concluded": mean([{"": float(r["concluded"] is not None)} for r in of_part
                               if r["options"] and "concluded" in r], ""),
            **{name: mean(of_part, name) for name in ("format", "agreement", "process")},
            "truncated_frac": sum(r["truncated"] for r in of_part) / n,
            "unreadable": sum(bool(r["error"]) for r in of_part),
            "published": published.get(part.lower()) if video == "full" else None})
    return table


def compare(records_a: list[dict], records_b: list[dict], place: str) -> list[dict]:
    """Paired statistics per file and part between two evaluations of the same questions, else ValueError.

    If a saw the videos and b did not, `difference` is the multi-modal gain (MMStar, arXiv 2403.20330); `flip_rate`, the
    share of answers that are not the same, says how much the video matters at all (arXiv 2505.14405); and
    `accuracy_on_missed`, a's on the questions that b got wrong, leaves out what can be answered without looking.
    """
    a, b = ({(r["file"], r["sample_id"]): r for r in records} for records in (records_a, records_b))
    different = [key for key in a.keys() | b.keys()
                 if key not in a or key not in b or any(a[key][k] != b[key][k] for k in ("gold", "options"))]
    if different:
        file, sample_id = min(different)
        raise ValueError(f"--compare {place}: {len(different)} questions are not the same on both sides, such as "
                         f"{sample_id!r} of {file}; evaluate both on the same files, --max_questions and --seed")
    table = []
    for (file, part), of_part in parts(records_a).items():
        pairs, n = [(r, b[file, r["sample_id"]]) for r in of_part], len(of_part)
        count = Counter((r["correct"], other["correct"]) for r, other in pairs)
        only_a, only_b = count[True, False], count[False, True]
        missed, flips = only_a + count[False, False], sum(r["parsed"] != other["parsed"] for r, other in pairs)
        table.append({
            "file": file, "part": part, "n": n, "chance": chance(of_part),
            "both": count[True, True], "only_a": only_a, "only_b": only_b, "neither": count[False, False],
            "difference": (only_a - only_b) / n, "difference_interval": paired_interval(only_a, only_b, n),
            "mcnemar_p": mcnemar_p(only_a, only_b), "flip_rate": flips / n, "flip_interval": wilson_interval(flips, n),
            "missed": missed, "accuracy_on_missed": only_a / missed if missed else None,
            "missed_interval": wilson_interval(only_a, missed)})
    return table


# ----------------------------------------------------------------------------------------------------------------------
# The run.

def main(args: Args) -> list[dict]:
    """Evaluates and returns the table (on rank 0; elsewhere an empty list)."""
    rank, world_size, device = runtime.setup()
    args = runtime.resolve(args, device)
    # First, because a typo should not cost an evaluation.
    other, other_settings = read_evaluation(args) if args.compare else ([], {})
    tokenizer, family = runtime.load_tokenizer(args.model), runtime.load_family(args.model)
    datasets = {}
    for file in args.eval_files:
        questions = load_questions(file, args.data_root)[:args.max_questions or None]
        runtime.check_for_sft(questions, file, for_sft=False)
        datasets[file] = VideoDataset(questions, tokenizer, family, args.pixel_settings(), args.seed, args.video)
        runtime.check_length(args, datasets[file], args.max_completion_length)
    if rank == 0:
        for file, dataset in datasets.items():
            print(f"{file}: {dataset.describe_prompt()}")

    sampler = runtime.load_sampler(args, device)  # a copy on every rank: no process waits for another while it decodes
    output_dir = open_folder(args)
    runtime.HERE.phase = "answering"
    found = [runtime.on_rank_0(answered_before, output_dir)]
    dist.broadcast_object_list(found)
    asked = {(file, question.id) for file, dataset in datasets.items() for question in dataset.questions}
    before = [r for r in found[0] if (r["file"], r["sample_id"]) in asked]  # all, but for a --change
    records = [record for file, dataset in datasets.items() for record in answer_file(
        file, dataset, sampler, args, rank, world_size, before, output_dir / f"samples_rank{rank}.jsonl")]
    gathered = [None] * world_size if rank == 0 else None
    dist.gather_object(records, gathered)
    if rank != 0:
        return []
    records = [record for share in (before, *gathered) for record in share]
    records.sort(key=lambda r: (args.eval_files.index(r["file"]), r["sample_id"]))
    # Before anything can go wrong with the numbers.
    write_whole(output_dir / "samples.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    for path in output_dir.glob("samples_rank*.jsonl"):
        path.unlink()

    table = summarise(records, args.video)
    compared = {}
    if args.compare:  # the run that saw its videos comes first
        sides = [(records, vars(args)), ([r for r in other if r["file"] in datasets], other_settings)]
        if args.video != "full" and other_settings["video"] == "full":
            sides.reverse()
        (records_a, settings_a), (records_b, settings_b) = sides
        a, b = ({key: side[key] for key in ("model", "video", "output_dir")} for side in (settings_a, settings_b))
        compared = {"a": a, "b": b, "table": compare(records_a, records_b, args.compare)}
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    results = {"settings": vars(args), "device": str(device), "world_size": world_size, "versions": versions,
               "table": table, "compared": compared}
    write_whole(output_dir / "results.json", json.dumps(results, indent=1) + "\n")
    print_table(table)
    if compared:
        print_comparison(**compared)
    if bad := [record for record in records if record["error"]]:
        message = f"{len(bad)} of {len(records)} questions could not be read and count as wrong; {bad[0]['error']}"
        if len(bad) == len(records):
            raise ValueError(message)
        print(f"\n!!! {message} !!!")
    return table


def read_evaluation(args: Args) -> tuple[list[dict], dict]:
    """The answers and the settings of --compare; ValueError if they cannot be compared with this run."""
    answers, settings = Path(args.compare) / "samples.jsonl", Path(args.compare) / "args.json"
    if not (answers.exists() and settings.exists()):
        raise ValueError(f"--compare {args.compare}: no samples.jsonl and args.json there; give an evaluation's folder")
    settings = json.loads(settings.read_text())
    records = [json.loads(line) for line in answers.read_text().splitlines()]
    if "video" not in settings or any("part" not in record for record in records):
        raise ValueError(f"--compare {args.compare}: made by an earlier version of evaluate.py; evaluate again")
    if settings["grader"] != args.grader:
        raise ValueError(f"--compare {args.compare}: its grader was {settings['grader']}; give --grader the same")
    return records, settings


# ----------------------------------------------------------------------------------------------------------------------
# What is shown of it.

def print_table(table: list[dict]) -> None:
    """Accuracy by file and part, on screen."""
    paper = "  paper, 7B: vanilla / SFT / GRPO" if any(line["published"] for line in table) else ""
    print(f"\n{'':28} {'n':>5} {'accuracy':>9} {'95% interval':>15} {'chance':>7} {'parsed':>7} "
          f"{'format':>7} {'concludes':>9} {'agrees':>7} {'process':>7} {'cut off':>8} {'bad':>4}{paper}")
    for line in table:
        name = f"  {line['part']}" if line["part"] else Path(line["file"]).stem
        form, concluded, agreement, process = ("-" if line[name] is None else f"{line[name]:.1%}"
                                               for name in ("format", "concluded", "agreement", "process"))
        interval = f"{line['wilson_low']:6.1%} to {line['wilson_high']:6.1%}"
        paper = "  " + " / ".join(f"{accuracy:.2f}" for accuracy in line["published"]) if line["published"] else ""
        print(f"{name:28} {line['n']:5} {line['accuracy']:9.1%} {interval} {line['chance']:7.0%}"
              f"{line['parse_rate']:8.1%} {form:>7} {concluded:>9} {agreement:>7} {process:>7} "
              f"{line['truncated_frac']:8.1%} {line['unreadable']:4}{paper}")


def print_comparison(a: dict, b: dict, table: list[dict]) -> None:
    """Two evaluations side by side; `a` and `b` say which: model, video, output_dir."""
    print()
    for letter, run in (("a", a), ("b", b)):
        print(f"{letter}: {run['model']}, --video {run['video']}")
    print(f"{'':24} {'n':>5} {'both':>5} {'only a':>6} {'only b':>6} {'neither':>7}  {'a - b, in points':22} "
          f"{'McNemar':>8}  {'flipped':22}  {'a, where b was wrong':22} {'chance':>6}")
    for line in table:
        name = f"  {line['part']}" if line["part"] else Path(line["file"]).stem
        low, high = line["difference_interval"]
        gain = f"{100 * line['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        flipped = f"{line['flip_rate']:.1%} ({line['flip_interval'][0]:.1%} to {line['flip_interval'][1]:.1%})"
        missed = "none was" if not line["missed"] else (
            f"{line['accuracy_on_missed']:.1%} ({line['missed_interval'][0]:.1%} to {line['missed_interval'][1]:.1%})")
        print(f"{name:24} {line['n']:5} {line['both']:5} {line['only_a']:6} {line['only_b']:6} "
              f"{line['neither']:7}  {gain:22} {line['mcnemar_p']:8.2g}  {flipped:22}  {missed:22} "
              f"{line['chance']:6.0%}")
    if Path(a["model"]).resolve() == Path(b["model"]).resolve() and a["video"] == "full" != b["video"]:
        print("One model: a - b is its multi-modal gain, flipped the share of answers that change with what it sees.")


if __name__ == "__main__":
    runtime.launch(main, Args, TOY)
