"""What the toy world's base model can do, and what it leaves to be learned: the figures in this folder's README.

    python assets/toy_base/check.py [FOLDER]       another folder than this one; a minute on two cores

Every video is drawn for this occasion: no file of the toy world is looked at.
"""
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

BASE = Path(__file__).resolve().parent
sys.path[:0] = [str(BASE), str(BASE.parent.parent)]

from data import Example, control_frames, parse_answer, user_text
from model import collate_prompts, end_token_ids, vision_token_ids
from pretrain import LIST_QUESTION, PRETRAINING_HAZE, frames_taken, random_steps, to_example
from runtime import load_sampler, load_tokenizer, setup
from sampler import answer_texts, generate
from toy import (
    ACTIONS,
    HAZE,
    NEW_GOALS,
    NEW_HAZE,
    RECIPES,
    SEED,
    TASKS,
    draw_beats,
    draw_image,
    draw_kitchen,
    draw_video,
    draw_view,
    question_for,
    say_seen,
    steps_said,
)


def listed_right(completion: str, steps: tuple[str, ...]) -> int:
    """How many of the steps shown are named in their place."""
    return sum(a == b for a, b in zip(steps_said(completion) or (), steps))


def list_examples(tokenizer, n: int, video: str, haze: tuple[float, float],
                  seed: int) -> list[tuple[Example, tuple[str, ...]]]:
    """n videos of random actions, each with the steps that are to be named."""
    rng, pixel_rng, drawn = random.Random(seed), np.random.default_rng(seed), []
    for _ in range(n):
        steps, kitchen, view = random_steps(rng, ACTIONS), draw_kitchen(pixel_rng), draw_view(pixel_rng, haze)
        frames = frames_taken(draw_video(kitchen, draw_beats(steps, pixel_rng), view, pixel_rng))
        frames = control_frames(frames, video, rng)
        drawn.append((to_example(tokenizer, LIST_QUESTION, frames, draw_image(kitchen, (), view, pixel_rng)), steps))
    return drawn


def share_right(sample: "Sampler", examples: list[tuple[Example, tuple[str, ...]]]) -> float:
    """The share of the steps that are named in their place."""
    texts = sample([example for example, _ in examples])
    right = sum(listed_right(text, wanted) for (text,), (_, wanted) in zip(texts, examples))
    return right / sum(len(wanted) for _, wanted in examples)


class Sampler:
    """The base as a function of examples: G texts each, greedy where the temperature is 0."""

    def __init__(self, folder: Path):
        _, _, device = setup()
        self.tokenizer = load_tokenizer(str(folder))
        self.qwen = load_sampler(SimpleNamespace(model=str(folder), dtype="float32"), device)
        self.end_ids = end_token_ids(self.qwen, self.tokenizer, device)
        self.banned_ids = vision_token_ids(self.qwen, device)

    def __call__(self, examples: list[Example], group_size: int = 1, temperature: float = 0.0) -> list[list[str]]:
        texts = []
        for i in range(0, len(examples), 32):
            part = examples[i : i + 32]
            ids, lengths, ended, _ = generate(self.qwen, collate_prompts(part, self.qwen.device), group_size, 64,
                                              temperature, list(range(i, i + len(part))), self.end_ids, self.banned_ids)
            rows = answer_texts(self.tokenizer, part, ids, lengths, ended)
            texts += [rows[j : j + group_size] for j in range(0, len(rows), group_size)]
        return texts


def task_examples(tokenizer, n: int, goals: list[str], haze: tuple[float, float],
                  seed: int) -> list[tuple[Example, str, list[str]]]:
    """n questions with a video as in the toy world, each with its next step and the step that each beat shows."""
    rng, pixel_rng, drawn = random.Random(seed), np.random.default_rng(seed), []
    for i in range(n):
        goal, done = goals[i % len(goals)], 1 + i % 5
        recipe, options = RECIPES[goal], sorted(set(RECIPES[goal]))
        rng.shuffle(options)
        kitchen, view = draw_kitchen(pixel_rng), draw_view(pixel_rng, haze)
        beats = draw_beats(recipe[:done], pixel_rng)
        video, image = draw_video(kitchen, beats, view, pixel_rng), draw_image(kitchen, beats, view, pixel_rng)
        example = to_example(tokenizer, user_text(question_for(goal), tuple(options)), frames_taken(video), image)
        example.options, example.gold = tuple(options), "ABCD"[options.index(recipe[done])]
        drawn.append((example, recipe[done], beats))
    return drawn


def begin_answer(example: Example, tokenizer, text: str) -> None:
    """Puts the first words of an answer behind the prompt, for the model to go on."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    places = example.position_ids.max() + 1 + torch.arange(len(ids))
    example.prompt_ids = torch.cat([example.prompt_ids, ids])
    example.position_ids = torch.cat([example.position_ids, places.expand(3, -1)], dim=1)


def check_seeing(sample: Sampler, n: int) -> dict[str, float]:
    """Which share of the steps it names of videos of random actions."""
    found = {}
    for name, video, haze in (("haze of the pre-training", "full", (0.0, PRETRAINING_HAZE)),
                              ("haze of known kitchens", "full", HAZE), ("haze of new kitchens", "full", NEW_HAZE),
                              ("grey videos", "blank", HAZE)):
        examples = list_examples(sample.tokenizer, n, video, haze, seed=SEED + 1)
        found[f"steps listed right, {name}"] = share_right(sample, examples)
    return found


def check_knowing(sample: Sampler, n: int) -> dict[str, float]:
    """Told what was done, does it say the step that comes next, and that step's letter?"""
    found = {}
    for name, goals in (("tasks of L1 and L2", list(TASKS)), ("tasks of L3", list(NEW_GOALS))):
        questions = task_examples(sample.tokenizer, n, goals, HAZE, seed=SEED + 2)
        for example, _, beats in questions:
            begin_answer(example, sample.tokenizer, f"<think>{say_seen(beats)} Next is")
        texts = sample([example for example, _, _ in questions])
        said = [re.match(r" ([^.(]*) \(([A-D])\)", text) for (text,) in texts]
        found[f"next step right after true progress, {name}"] = sum(
            bool(match) and match[1] == next_step for match, (_, next_step, _) in zip(said, questions)) / n
        found[f"letter that of the step said, {name}"] = sum(
            bool(match) and dict(zip("ABCD", example.options))[match[2]] == match[1]
            for match, (example, _, _) in zip(said, questions)) / n
    return found


def check_sampling(sample: Sampler, n: int) -> dict[str, float]:
    """What groups of 8 sampled answers leave GRPO to find."""
    questions = task_examples(sample.tokenizer, n, list(TASKS), HAZE, seed=SEED + 3)
    groups = sample([example for example, _, _ in questions], group_size=8, temperature=1.0)
    parsed = [[parse_answer(text, example.options) for text in texts]
              for texts, (example, _, _) in zip(groups, questions)]
    right = [sum(letter == example.gold for letter in letters) for letters, (example, _, _) in zip(parsed, questions)]
    texts = [text for group in groups for text in group]
    parse = sum(letter is not None for letters in parsed for letter in letters)
    say_more = sum("," in text.split(".")[0] for text in texts)
    return {"sampled answers that parse": parse / len(texts),
            "sampled answers right": sum(right) / len(texts),
            "groups of 8 with right and wrong answers": sum(0 < count < 8 for count in right) / n,
            "sampled texts that say more was done than one step": say_more / len(texts)}


def main(folder: Path, n: int = 320) -> None:
    sample = Sampler(folder)
    print("| | |\n|---|---|")
    for check in (check_seeing, check_knowing, check_sampling):
        for name, share in check(sample, n).items():
            print(f"| {name} | {share:.1%} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else BASE)
