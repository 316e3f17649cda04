"""Other teachers for SFT on the toy world: the same questions and, but for one, the same answers, reasoned otherwise.

    python docs/teachers.py NAME OUTPUT       e.g. skips out/study/data/skips.jsonl, for --train_file
    python docs/teachers.py --show            a response of each, beside that of the world's own teacher

The world's own teacher (`teach` in toy.py) says what was shown, then what comes next, as the base does at its best.
    paraphrase    the same in the same order, in other words, which the base knows from its prompts alone
    reversed      the conclusion first, then what was seen
    skips         does not say what was seen: "I see nothing", then the conclusion
    hallucinates  names each different step, with a probability of 0.4, as a random one; the conclusion is right
    terse         an empty <think></think>, and the letter
    wrong         in 35% of the records concludes and answers another step; what was seen is right
"""
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from run import write_whole  # noqa: E402
from toy import ACTIONS, SEED, draw_visit, jsonl, make_records, make_sft_record, say_seen, teach  # noqa: E402

NAMES = ("paraphrase", "reversed", "skips", "hallucinates", "terse", "wrong")
HALLUCINATED, WRONG = 0.4, 0.35


def think(*sentences: str, letter: str) -> str:
    return f"<think>{' '.join(sentences)}</think><answer>{letter}</answer>"


def retell(teacher: str, beats: list[str], next_step: str, options: dict[str, str], rng: random.Random) -> str:
    """The response of a teacher to a question: the step of each beat, the right next step, letter -> option."""
    letter = next(letter for letter, option in options.items() if option == next_step)
    conclusion = f"Next is {next_step} ({letter})."
    if teacher == "paraphrase":
        shown = say_seen(beats).removeprefix("I see ").removesuffix(".")
        return think(f"Which steps are shown: {shown}; the next action is {next_step}, letter {letter}.", letter=letter)
    if teacher == "reversed":
        return think(conclusion, say_seen(beats), letter=letter)
    if teacher == "skips":
        return think(say_seen([]), conclusion, letter=letter)
    if teacher == "terse":
        return think(letter=letter)
    if teacher == "hallucinates":
        said = {step: rng.choice(ACTIONS) if rng.random() < HALLUCINATED else step for step in dict.fromkeys(beats)}
        return teach([said[step] for step in beats], next_step, letter)
    if teacher == "wrong":
        if rng.random() < WRONG:
            letter = rng.choice([other for other in options if other != letter])
        return teach(beats, options[letter], letter)
    raise ValueError(f"{teacher!r}: must be one of {', '.join(NAMES)}")


def write_records(teacher: str) -> list[dict]:
    """The records of the SFT file, with this teacher's responses."""
    records = []
    for source in make_records("train"):
        record, (_, _, beats) = make_sft_record(source), draw_visit(source)
        text = record["prompt"][0]["content"][-1]["text"]
        options = dict(re.findall(r"^([A-D])\. (.*)$", text, re.MULTILINE))
        rng = random.Random(f"{SEED}/{teacher}/{source['sample_id']}")
        records.append(record | {"response": retell(teacher, beats, source["answer"], options, rng)})
    return records


def main(argv: list[str]) -> None:
    if argv == ["--show"]:
        record = next(record for record in make_records("train") if len(record["task_progress_metadata"]) == 4)
        number = make_records("train").index(record)
        print(f"{'(own)':14}{make_sft_record(record)['response']}")
        for teacher in NAMES:
            print(f"{teacher:14}{write_records(teacher)[number]['response']}")
    elif len(argv) == 2:
        Path(argv[1]).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(argv[1]), jsonl(write_records(argv[0])))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
