"""Training files of the toy world, of whose questions a share can be answered without the video.

    python docs/habit.py PERCENT OUTPUT       e.g. 90 out/study/data/habit90.jsonl, for --train_file

Whoever does not look does best to say what comes next most often, and the base does: most of its texts say that they
saw the recipe's first step, and go on to the second. That answer is right of the questions asked when one or four steps
are done: two in five of the world's own. Here it is right of PERCENT of the questions with a video; the rest is spread
evenly over the other points. There are as many questions as in the world's own file, as many of each task, and the same
ones that have no video; visits are new where the world has too few.
"""
import itertools
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from run import write_whole  # noqa: E402
from toy import ROOT, build, jsonl, make_records, write_pixels  # noqa: E402

HABIT, OTHERS = (1, 4), (2, 3, 5)  # steps done, where the recipe's second step comes next, and where it does not
# Of further visits, from 100 + PERCENT on: files that are three percent or more apart write none twice.
FIRST_SEED, NUM_SEEDS = 100, 3


def points(percent: int, number: int, first: int) -> list[int]:
    """How many steps are done in each of `number` questions with a video about one task. `first`: where to begin in
    HABIT and OTHERS, another place for each task, so that over all tasks their points come equally often."""
    by_habit = round(number * percent / 100)
    return [*itertools.islice(itertools.cycle(HABIT), first, first + by_habit),
            *itertools.islice(itertools.cycle(OTHERS), first, first + number - by_habit)]


def make_file(percent: int) -> list[dict]:
    """The records, in the shape of training_6k.jsonl, without pixels."""
    own = make_records("train")
    more = (make_records("train", FIRST_SEED + percent + i) for i in range(NUM_SEEDS))
    there = defaultdict(list)  # (goal, steps done) -> records; the world's own first
    for record in itertools.chain(own, *more):
        there[record["task_goal"], len(record["task_progress_metadata"])].append(record)
    records, asked = [], defaultdict(int)
    for record in own:
        goal, done = record["task_goal"], len(record["task_progress_metadata"])
        asked[goal] += done > 0
        if not done:
            records.append(record)
    for i, (goal, number) in enumerate(asked.items()):
        records += [there[goal, done].pop(0) for done in points(percent, number, i)]
    order = {record["video_id"]: i for i, record in enumerate(own)}
    records.sort(key=lambda record: (order.get(record["video_id"], len(own)), record["video_id"]))
    return [record | {"sample_id": i} for i, record in enumerate(records)]


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        sys.exit(__doc__)
    records, output = make_file(int(argv[0])), Path(argv[1])
    build()
    write_pixels(ROOT, [record for record in records if "fresh" in record["video_id"]])
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, jsonl(records))  # last: where it is, all its pixels are


if __name__ == "__main__":
    main(sys.argv[1:])
