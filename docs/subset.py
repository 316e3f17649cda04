"""A part of a training file: one of every so many records, drawn by a seed.

    python docs/subset.py FILE DIVISOR SEED OUTPUT        e.g. DIR/annotations/training_6k.jsonl 16 0 out/data16.jsonl

Which records follows from their ids alone, so that a file for GRPO and one for SFT with the same ids are cut alike.
They keep their order.
"""
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import load_questions  # noqa: E402
from run import write_whole  # noqa: E402
from toy import jsonl  # noqa: E402


def subset(records: list[dict], divisor: int, seed: int) -> list[dict]:
    """One of every `divisor` records, rounded down; their ids are all different."""
    ids = [record["sample_id"] for record in records]
    drawn = sorted(set(ids), key=lambda name: random.Random(f"{seed}/{name}").random())[:len(ids) // divisor]
    return [record for record in records if record["sample_id"] in drawn]


def main(argv: list[str]) -> None:
    if len(argv) != 4:
        sys.exit(__doc__)
    source, divisor, seed, output = Path(argv[0]), int(argv[1]), int(argv[2]), Path(argv[3])
    load_questions(source.resolve(), source.parent)  # says what is wrong with a file, and where
    text = source.read_text(encoding="utf-8-sig").strip()
    lines = [line for line in text.split("\n") if line.strip()]
    records = json.loads(text) if text.startswith("[") else [json.loads(line) for line in lines]
    if not all("sample_id" in record for record in records):
        sys.exit(f"{source}: not every record has a 'sample_id', by which both files are cut alike; give each one")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, jsonl(subset(records, divisor, seed)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except ValueError as error:
        sys.exit(str(error))
