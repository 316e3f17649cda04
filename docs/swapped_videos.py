"""Does a trained toy policy recognise the steps of a video, or only count them? Two controls sharper than `random`.

    python docs/swapped_videos.py MODEL [FILE]      FILE: annotations/validation_L1.jsonl, below out/toy

Each question gets the video of another one of the file: of another task with as many steps done (counting would
still be right), or of the same task at another point (believing the video is wrong then). Half a minute on two cores.
"""
import dataclasses
import random
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import toy
from data import VideoDataset, grade, load_questions
from evaluate import TOY, Args, answer
from runtime import load_family, load_sampler, load_tokenizer, setup

SWAPS = {  # which video a question gets: is `other` one of those to choose from?
    "its own": lambda question, other: other is question,
    "another task, as many steps": lambda question, other: (
        other.goal != question.goal and len(other.progress) == len(question.progress)),
    "same task, another point": lambda question, other: (
        other.goal == question.goal and len(other.progress) != len(question.progress)),
}


def main(model: str, file: str = "annotations/validation_L1.jsonl") -> None:
    _, _, device = setup()
    tokenizer, args = load_tokenizer(model), Args(**TOY)
    sampler = load_sampler(SimpleNamespace(model=model, dtype="float32"), device)
    questions = [question for question in load_questions(file, toy.ROOT) if question.video]
    print("| video | right % | right for the video shown % | says exactly the steps shown % |\n|---|---|---|---|")
    for name, fits in SWAPS.items():
        rng = random.Random(0)
        shown = [rng.choice([other for other in questions if fits(question, other)]) for question in questions]
        swapped = [dataclasses.replace(a, video=b.video) for a, b in zip(questions, shown)]
        dataset = VideoDataset(swapped, tokenizer, load_family(model), args.pixel_settings(), seed=0)
        counts = [0, 0, 0]
        for i in range(0, len(questions), args.batch_size):
            examples = [dataset[0, j] for j in range(i, min(i + args.batch_size, len(questions)))]
            for example, other, (text, _, _) in zip(examples, shown[i:], answer(examples, tokenizer, sampler, args)):
                recipe, done = toy.RECIPES[example.question.goal.lower()], len(other.progress)
                letter, right = grade(text, example)
                follows = letter is not None and example.options["ABCD".index(letter)] == recipe[done]
                counts = [a + b for a, b in zip(counts, (
                    right, follows, toy.steps_said(text) == list(other.progress)))]
        print(f"| {name} | " + " | ".join(f"{100 * count / len(questions):.1f}" for count in counts) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
