"""The runs of the study, as data: what is trained, for which question, and what is measured of it.

docs/study.py runs them, docs/study_report.py draws them, docs/study.md says what was asked and found.

Equal numbers of questions: all arms learn from the same number of them, the budget, counted with repetitions; one that
goes on with the model of another gets the share that this one has left.

Learning rates: of each arm in CANDIDATES three or more, about a factor of three apart, are tried with the first seed;
taken is the one with the most right answers on the questions of TUNING, which are about the tasks and kitchens of the
training file and are not in it, and of equals the smallest (`choose_rate` in study.py). The choices stand in RATES, and
a test holds them to the summaries. All other runs take the rate of their method, unless they vary it.

The final numbers are those of FRESH, by which no rate was chosen. S5 to S10 were designed when S1 to S4 had been seen.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from docs import teachers  # noqa: E402

SEEDS = (0, 1, 2)
LEVELS = tuple(f"annotations/validation_{level}.jsonl" for level in ("L1", "L2", "L3"))
FRESH = tuple(f"annotations/fresh4_{level}.jsonl" for level in ("L1", "L2", "L3"))
TUNING = ("annotations/fresh1_L1.jsonl",)
SFT, GRPO = "sft_video.py", "grpo_video.py"

TEACHERS = teachers.NAMES  # beside SFT's own, who is without fault
CANDIDATES = {  # arm -> learning rates to choose from
    "sft": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3), **dict.fromkeys(("own", "wrong"), (3e-5, 1e-4, 3e-4)),
    **dict.fromkeys(("paraphrase", "reversed", "skips", "hallucinates", "terse"), (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)),
    "grpo": (2e-5, 6e-5, 2e-4, 6e-4), "lora": (3e-4, 1e-3, 3e-3),
}
RATES = {  # what the rule chose
    "sft": 1e-4, "own": 1e-4, "grpo": 6e-5, "lora": 1e-3, "paraphrase": 3e-3, "reversed": 3e-5, "skips": 3e-4,
    "hallucinates": 1e-3, "terse": 1e-3, "wrong": 1e-4,
}


@dataclass(frozen=True)
class Run:
    """A training run and what is measured of it, for every seed. On real data the scripts' own learning rates hold."""
    name: str
    script: str  # "": the base model as it is
    flags: str = ""
    rate: float = 0.0  # of the toy world
    real_flags: str = ""  # on real data alone
    share: float = 1.0  # of the budget
    after: str = ""  # goes on with the model of this run
    train_file: str = ""  # in out/study/data, written by the command of that name in `file_command`
    leave_out: tuple[str, ...] = ()  # questions that the base has answered right in all of these parts of it
    toy_only: bool = False  # says nothing of real data, or cannot be asked there


def sft(name: str, flags: str = "", **more) -> Run:
    return Run(name, SFT, flags, RATES["sft"], **more)


def grpo(name: str, flags: str = "", rate: float = RATES["grpo"], **more) -> Run:
    return Run(name, GRPO, flags, rate, **{"toy_only": rate != RATES["grpo"], **more})


def name_at(arm: str, rate: float) -> str:
    return f"{arm}_{write_rate(rate)}"


def write_rate(rate: float) -> str:
    return f"{rate:.0e}".replace("e-0", "e-")


def chosen(arm: str) -> str:
    return name_at(arm, RATES[arm])


def find_runs(study) -> list[Run]:
    """All runs in lists and dicts, in their order."""
    if isinstance(study, Run):
        return [study]
    return [run for part in (study.values() if isinstance(study, dict) else study) for run in find_runs(part)]


# ----------------------------------------------------------------------------------------------------------------------
# S1 to S4: SFT, GRPO and their relatives; the teachers; learning rates.

base = Run("base", "")
how = {"sft": dict(script=SFT), "own": dict(script=SFT, train_file="own_seed{seed}"), "grpo": dict(script=GRPO),
       "lora": dict(script=GRPO, flags="--lora_rank 16", real_flags="--learning_rate 5e-6"),
       **{teacher: dict(script=SFT, train_file=teacher) for teacher in TEACHERS}}
at_rate = {arm: {rate: Run(name_at(arm, rate), rate=rate, toy_only=arm in TEACHERS or rate != RATES[arm], **how[arm])
                 for rate in rates} for arm, rates in CANDIDATES.items()}
best = {arm: runs[RATES[arm]] for arm, runs in at_rate.items()}

cold_start = [  # SFT on 64 records, three times each, or on all, with half of the budget; then GRPO
    sft("few", "--max_questions 64", share=1 / 11), grpo("few_grpo", after="few", share=10 / 11),
    sft("half", share=1 / 2), grpo("half_grpo", after="half", share=1 / 2)]
kl = {0.02: grpo("kl_0.02", "--kl_coef 0.02"), 0.1: grpo("kl_0.1", "--kl_coef 0.1", toy_only=True)}  # 0.1: the default

S1 = [base, *(best[arm] for arm in ("sft", "own", "grpo", "lora")), *cold_start[1::2], grpo("blank", "--video blank")]
S2 = [base, *(best[arm] for arm in ("sft", *TEACHERS, "grpo"))]
S3 = [*S1, *S2, kl, at_rate["sft"], at_rate["grpo"]]
S4 = S3

# ----------------------------------------------------------------------------------------------------------------------
# S5 to S10: what is varied -> value -> run, one factor at a time from one base point of GRPO, but for SFT in S5, the
# grid of S7, and S8's remedies.

point = best["grpo"]
DIVISORS = 1, 2, 4, 8, 16  # one question of so many
FRAMES = 16, 8, 4
HABITS = 0, 30, 60, 90  # percent of the questions that the base's habit answers; of the world's own file it is 40
BLIND = {percent: tuple(f"blind{percent}_{seed}" for seed in SEEDS) for percent in HABITS[1:]}  # answers of the base

S5 = {arm: {divisor: best[arm] if divisor == 1 else
            of_arm(f"{arm}_data{divisor}", train_file=f"{arm}{divisor}_seed{{seed}}") for divisor in DIVISORS}
      for arm, of_arm in (("sft", sft), ("grpo", grpo))}

S6 = {"frames": {n: point if n == 16 else grpo(f"frames_{n}", f"--num_frames {n}") for n in FRAMES},
      "image": {"with": point, "without": grpo("no_image", "--video no_image")}}

grid = {(size, rate): at_rate["grpo"][rate] if size == 8 else grpo(f"g{size}_{write_rate(rate)}",
                                                                   f"--group_size {size}", rate)
        for size in (2, 4, 8, 16) for rate in ((6e-5,) if size == 2 else (2e-5, 6e-5, 2e-4))}  # the two may interact
S7 = {
    "group size": {f"{size}": grid[size, 6e-5] for size in (2, 4, 8, 16)},
    "learning rate": {write_rate(rate): run for rate, run in at_rate["grpo"].items()},
    "KL weight": {"0": point, "0.02": kl[0.02], "0.1": kl[0.1]},
    "updates on a rollout": {
        "1": point, "4, clip 0.2": grpo("four", "--num_updates 4"),
        "4, 0.2 below, 0.28 above": grpo("four_higher", "--num_updates 4 --clip_high 0.28"),
        "4, no clip": grpo("four_unclipped", "--num_updates 4 --clip_low 1 --clip_high 1e9"),
        "4, clip 0.2, rate 1.5e-5": grpo("four_1.5e-5", "--num_updates 4", 1.5e-5)},  # as far in all, if not clipped
    "advantage": {"by std": point, "as it is": grpo("no_std", "--no_advantage_std")},
    "mean over": {"completions": point, "tokens": grpo("token_mean", "--loss_agg token_mean"),
                  "a constant": grpo("constant", "--loss_agg constant")},
    "temperature": {"0.7": grpo("t0.7", "--temperature 0.7"), "1": point, "1.3": grpo("t1.3", "--temperature 1.3")},
}

noise = "--reward_noise 0.3"
noisy = {p: grpo(f"noise_{p}", f"--reward_noise {p}") for p in (0.1, 0.2, 0.3, 0.4)}
S8 = {
    "rewards flipped": {"0": point, **{f"{p:.0%}": run for p, run in noisy.items()}},
    "at 30%": {
        "as it is": noisy[0.3], "group size 16": grpo("noise_g16", f"{noise} --group_size 16"),
        "KL weight 0.1": grpo("noise_kl", f"{noise} --kl_coef 0.1", toy_only=True),
        "learning rate 2e-5": grpo("noise_2e-5", noise, 2e-5),
        "4 updates, clip 0.2": grpo("noise_four", f"{noise} --num_updates 4"),
        "4 updates, no clip": grpo("noise_unclipped", f"{noise} --num_updates 4 --clip_low 1 --clip_high 1e9")},
}

S9 = {"rewards": {
    "accuracy": point, "+ 0.5 process": grpo("process", "--process_weight 0.5"),
    "+ 0.5 agreement": grpo("agreement", "--agreement_weight 0.5"),
    "+ both": grpo("process_agreement", "--process_weight 0.5 --agreement_weight 0.5")}}

S10 = {
    "all questions": {percent: point if percent == 40 else
                      grpo(f"habit{percent}", train_file=f"habit{percent}", toy_only=True)
                      for percent in sorted((*HABITS, 40))},
    "left out": {percent: grpo(f"habit{percent}_left", train_file=f"habit{percent}", leave_out=BLIND[percent][:2],
                               toy_only=True) for percent in HABITS[1:]}}

# ----------------------------------------------------------------------------------------------------------------------
# The questions, and what is measured of their runs beside training.

QUESTIONS = {"tuning": at_rate, "S1": S1, "S2": S2, "S3": S3, "S4": S4, "S5": [base, S5], "S6": [base, S6],
             "S7": [S7, grid], "S8": S8, "S9": S9, "S10": [base, S10]}
RUNS = {run.name: run for run in [*find_runs(QUESTIONS), *cold_start]}
STUDIES = {question: list(dict.fromkeys(run.name for run in find_runs(runs))) for question, runs in QUESTIONS.items()}
EVALUATIONS = {"full": "--video full", "random": "--video random", "frames_8": "--num_frames 8",
               "frames_4": "--num_frames 4", "no_image": "--video no_image"}
MEASURED = {
    "tuning": "tuning",
    "S1": "full random distance attention", "S2": "full random distance", "S3": "full random distance",
    "S4": "full random", "S5": "full", "S6": "full frames_8 frames_4 no_image", "S7": "full distance", "S8": "full",
    "S9": "full random", "S10": "full random"}
REPORTED = {name for question in STUDIES if question != "tuning" for name in STUDIES[question]}


def measured(name: str) -> list[str]:
    """The parts of a run beside training, of all questions that it belongs to."""
    found = {part for question, parts in MEASURED.items() if name in STUDIES[question] for part in parts.split()}
    own = [part for part in (*EVALUATIONS, "distance", "attention") if part in found]
    if name == "base":
        return [part for part in own if part != "distance"] + [part for parts in BLIND.values() for part in parts]
    return own


def seeds_of(name: str, seeds: tuple[int, ...]) -> tuple[int, ...]:
    """The base is not trained, and is one; what was only tried for its rate, and not taken, was tried with one."""
    if not RUNS[name].script:
        return SEEDS[:1]
    return seeds if name in REPORTED else seeds[:1]
