"""SEED-Bench-R1 in miniature: a world, its files in the benchmark's own layout, and a teacher.

A household task is a recipe of six steps, each a verb and an object, four of them different: a b a c b d. A video shows
the steps done so far, one after another; the image shows the kitchen now; the question is which of the four comes next.
So one has to see what was done, in order, know the recipe, and find the option that says its next step.

    a step     a coloured disc (the object) under a sign (the verb)
    a video    8 beats of 1 or 1.5 s, of each of which two frames are sampled. Each different action takes a random
               share of them, cut at random among the times that it is done: neither the number of frames nor how many
               of them show an action tells how far the work is
    a kitchen  colours, tiles and light: 8 in training and L1, 4 new ones in L2, 4 more in L3
    a visit    through a haze, from a thin one to one that hides almost all, stronger in the new kitchens; sometimes in
               the dark
    the image  the same kitchen, with the object that the work began with still on the counter; empty before the first
               step. Beyond whether the work has begun it tells nothing
    L3         twelve tasks in four domains that no post-training file contains; only the base model's pre-training has
               seen them, as a large model has read about many more tasks than it is post-trained on

Whoever knows every recipe and may not look at the video is right on 40% of the questions that have one, with or without
the image. The last frame alone allows 60%, any other one at most 65%, and all frames without their order 60%. These
bounds are enumerated in tests/test_toy.py.

    python toy.py              builds the world in out/toy and prints what is in it
    python toy.py --fresh 1    adds questions, kitchens and option orders that nobody has seen:
                               annotations/fresh1_L1.jsonl, ..

Everything follows from SEED. This file draws pixels and writes text; the reading of both is data.py's, as for real
data. The base model is made by assets/toy_base/pretrain.py.
"""
import argparse
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import string
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data import PixelSettings, parse_answer, user_text

ROOT = Path(__file__).parent / "out" / "toy"  # the data root of the world
BASE = Path(__file__).parent / "assets" / "toy_base"  # the base model, an ordinary Hugging Face folder
SEED = 0
SOURCE = "ToyKitchens"  # the `video_source` of every record
SIZE = 56  # pixels, height and width: 4 x 4 patches, so 4 tokens per two frames
PIXELS = PixelSettings(image_size=SIZE)  # of every video 16 frames, two a beat

# ----------------------------------------------------------------------------------------------------------------------
# The world: recipes, and how a step and a kitchen look.

VERBS = ("take", "wash", "cut", "fill", "press", "turn")
NOUNS = {  # object -> colour
    "onion": (150, 40, 200), "carrot": (255, 130, 0), "dough": (250, 240, 200), "pot": (20, 40, 220),
    "cup": (220, 20, 30), "bowl": (250, 230, 20), "cloth": (20, 170, 40), "clay": (120, 60, 20),
    "wood": (10, 10, 10), "paper": (255, 255, 255), "yarn": (255, 90, 190), "soil": (0, 200, 210),
}
TASKS = {  # goal -> its four objects; these are post-trained on, and L1 and L2 ask about them
    "make onion soup": ("onion", "pot", "carrot", "bowl"), "make carrot salad": ("carrot", "bowl", "onion", "cup"),
    "bake bread": ("dough", "bowl", "cloth", "pot"), "make tea": ("cup", "pot", "cloth", "bowl"),
    "do the dishes": ("cup", "bowl", "cloth", "pot"), "clean the sink": ("cloth", "pot", "cup", "carrot"),
    "set the table": ("cloth", "cup", "bowl", "dough"), "roast carrots": ("carrot", "pot", "onion", "cloth"),
    "fry onions": ("onion", "bowl", "pot", "dough"), "make dumplings": ("dough", "pot", "onion", "cloth"),
    "wipe the counter": ("cloth", "bowl", "cup", "onion"), "make porridge": ("bowl", "pot", "cup", "dough"),
    "make pizza": ("dough", "onion", "pot", "carrot"), "make carrot cake": ("carrot", "dough", "bowl", "cup"),
    "make a cocktail": ("cup", "onion", "carrot", "bowl"), "pack a lunch": ("carrot", "cloth", "dough", "cup"),
}
NEW_TASKS = {  # (domain, scenario) -> tasks: L3 asks about these, and no post-training file contains them
    ("Daily life", "gardening"): {"water the plants": ("soil", "cup", "wood", "pot")},
    ("Daily life", "home"): {"wrap a present": ("paper", "cloth", "yarn", "cup"),
                             "light the stove": ("wood", "pot", "paper", "clay")},
    ("Hobbies", "crafts"): {"knit a scarf": ("yarn", "cloth", "paper", "bowl"),
                            "fold a lantern": ("paper", "yarn", "wood", "cup")},
    ("Hobbies", "pottery"): {"shape a vase": ("clay", "bowl", "cloth", "wood")},
    ("Recreation", "outdoors"): {"build a campfire": ("wood", "paper", "pot", "soil"),
                                 "build a sandcastle": ("soil", "bowl", "cup", "paper")},
    ("Recreation", "games"): {"make a kite": ("paper", "wood", "yarn", "clay")},
    ("Work", "construction"): {"build a shelf": ("wood", "cloth", "soil", "yarn"),
                               "lay bricks": ("clay", "soil", "cloth", "pot")},
    ("Work", "office"): {"print a poster": ("paper", "clay", "wood", "soil")},
}
NEW_GOALS = {goal: place for place, tasks in NEW_TASKS.items() for goal in tasks}  # goal -> (domain, scenario)
NUM_STEPS = 6


def make_recipe(goal: str, nouns: tuple[str, ...]) -> tuple[str, ...]:
    """Six steps, a b a c b d, about four objects. Behind a comes b or c, behind b comes a or d: neither the last step
    nor which steps were done tells what comes next."""
    rng = random.Random(f"{SEED}/{goal}")
    a, b, c, d = (f"{rng.choice(VERBS)} {noun}" for noun in rng.sample(nouns, 4))
    return a, b, a, c, b, d


RECIPES = {goal: make_recipe(goal, nouns) for goal, nouns in TASKS.items()}
RECIPES |= {goal: make_recipe(goal, nouns) for tasks in NEW_TASKS.values() for goal, nouns in tasks.items()}
ACTIONS = tuple(f"{verb} {noun}" for verb in VERBS for noun in NOUNS)

NUM_BEATS, NATIVE_FPS, BEAT_FRAMES = 8, 4, (4, 6)  # a beat lasts 4 or 6 frames, the same in all of a video: 8 or 12 s
NUM_KNOWN = 8  # kitchens 0 to 7 are those of training and L1
# How thick the haze of a visit may be, in known and in new kitchens; at 1.6 signs vanish.
HAZE, NEW_HAZE = (0.4, 1.7), (1.0, 1.7)
DARK_SHARE, DARK = 1 / 16, 0.35  # the share of visits in the dark, and what is left of the light there
SIGNS = {  # verb -> a 5 x 5 sign, drawn 4 pixels a cell
    # Any two differ in 11 cells or more, so that haze hides and does not confuse.
    "take": "..#.. .###. ##### ..#.. ..#..", "wash": "#.#.# #.#.# #.#.# #.#.# #.#.#",
    "cut": "#...# .#.#. ..#.. .#.#. #...#", "fill": "..... ..... ##### ##### #####",
    "press": "##### ##### ##... ##... ##...", "turn": ".###. #...# #...# #...# .###.",
}
SIGNS = {verb: np.kron(np.array([[c == "#" for c in row] for row in sign.split()]), np.ones((4, 4), bool))  # (20, 20)
         for verb, sign in SIGNS.items()}
ROWS, COLUMNS = np.mgrid[:SIZE, :SIZE]


@functools.cache
def timelines(steps: tuple) -> dict[tuple[int, ...], float]:
    """How many beats each step of a video may last -> how probable that is. `steps` are only compared with each other.

    First each different action gets its share of the 8 beats, at least 2 (1 if there are five actions), all ways
    equally likely; then a share is cut anywhere among the times that its action is done. So the number of frames that
    show an action has the same distribution whether it was done once or twice.
    """
    actions = list(dict.fromkeys(steps))
    least = 2 if 2 * len(actions) <= NUM_BEATS else 1
    all_shares = [shares for shares in itertools.product(range(least, NUM_BEATS + 1), repeat=len(actions))
                  if sum(shares) == NUM_BEATS
                  and all(share >= steps.count(action) for share, action in zip(shares, actions))]
    found = {}
    for shares in all_shares:
        ways = list(itertools.product(*(
            [np.diff([0, *cuts, share]).tolist()
             for cuts in itertools.combinations(range(1, share), steps.count(action) - 1)]
            for action, share in zip(actions, shares))))
        for way in ways:
            parts = {action: iter(lasts) for action, lasts in zip(actions, way)}
            found[tuple(next(parts[step]) for step in steps)] = 1 / len(all_shares) / len(ways)
    return found


def draw_kitchen(rng: np.random.Generator) -> np.ndarray:
    """An empty kitchen, (56, 56, 3) float32 in 0..255: a tiled wall over a counter, in pale colours."""
    wall, counter = rng.uniform(90, 190, (2, 1)) + rng.uniform(-25, 25, (2, 3))  # greyish: strong colours are objects
    period, offset = rng.integers(6, 13), rng.integers(0, 6)
    tiles = ((COLUMNS + offset) % period == 0) | ((ROWS + offset) % period == 0)
    room = np.where((ROWS < 28 + rng.integers(-4, 5))[..., None], wall, counter)
    return (room * np.where(tiles, rng.uniform(0.8, 0.95), 1)[..., None]).astype(np.float32)


def draw_view(rng: np.random.Generator, haze: tuple[float, float] = HAZE) -> tuple[float, float]:
    """How a visit is seen, from the first frame to the image: (haze, light)."""
    return rng.uniform(*haze), DARK if rng.random() < DARK_SHARE else 1.0


def draw_scene(kitchen: np.ndarray, noun: str, verb: str, view: tuple[float, float],
               rng: np.random.Generator) -> np.ndarray:
    """The kitchen with an object in it ("" for none), and a sign over it ("" for none): (56, 56, 3) uint8."""
    haze, light = view
    scene = kitchen * rng.uniform(0.92, 1.08) + rng.normal(0, 3 + 22 * haze, kitchen.shape)  # lamps and camera noise
    if noun:
        y, x = rng.integers(40, 45), rng.integers(16, 41)
        disc = (ROWS - y) ** 2 + (COLUMNS - x) ** 2 < 121
        scene[disc] = (1 - haze / 2) * np.array(NOUNS[noun]) + haze / 2 * scene[disc]
    if verb:
        y, x = rng.integers(2, 8), x + rng.integers(-12, -7)
        x = min(max(int(x), 1), SIZE - 21)
        scene[y - 1 : y + 21, x - 1 : x + 21] = 40  # a dark board, so that the sign stands out in any kitchen
        scene[y : y + 20, x : x + 20][SIGNS[verb]] = 235 - 120 * haze
    return (light * scene).clip(0, 255).astype(np.uint8)


def draw_beats(steps: tuple[str, ...], rng: np.random.Generator) -> list[str]:
    """Which step is shown in each of the 8 beats of a video."""
    ways = timelines(tuple(steps.index(step) for step in steps))
    lasts = list(ways)[rng.choice(len(ways), p=list(ways.values()))]
    return [step for step, num_beats in zip(steps, lasts) for _ in range(num_beats)]


def draw_video(kitchen: np.ndarray, beats: list[str], view: tuple[float, float],
               rng: np.random.Generator) -> np.ndarray:
    """The beats one after another, hand-held: (F, 56, 56, 3) uint8, F is 32 or 48.

    An action looks the same whenever it is done in a video: else counting different scenes would count the steps.
    """
    scenes = {step: draw_scene(kitchen, step.split()[1], step.split()[0], view, rng) for step in dict.fromkeys(beats)}
    beat_frames = rng.choice(BEAT_FRAMES)
    return np.stack([np.roll(scenes[step], tuple(rng.integers(-1, 2, 2)), axis=(0, 1))
                     for step in beats for _ in range(beat_frames)])


def draw_image(kitchen: np.ndarray, steps: Sequence[str], view: tuple[float, float],
               rng: np.random.Generator) -> np.ndarray:
    """What is seen now: the object that the work began with; before the first step none. (56, 56, 3) uint8."""
    return draw_scene(kitchen, steps[0].split()[1] if steps else "", "", view, rng)


# ----------------------------------------------------------------------------------------------------------------------
# The teacher: reasoning that follows from the world's rules, and the check of anybody's reasoning against them.

def question_for(goal: str) -> str:
    return ("Considering the progress shown in the video and my current observation shown in the image, "
            f"what action should I take next in order to {goal}?")


def say_seen(beats: Sequence[str]) -> str:
    """The steps in order, with a "still" for each further beat of one: `I see take cup still, wash pot.`

    Beat by beat, because a small model that lists steps alone has to find in one go where the next one begins.
    """
    steps = [step + " still" * (len(list(run)) - 1) for step, run in itertools.groupby(beats)]
    return f"I see {', '.join(steps) or 'nothing'}."


def teach(beats: Sequence[str], next_step: str, letter: str, answer: str = "") -> str:
    """What was done, what comes next, which option says so, the answer (the same letter unless another is given)."""
    return f"<think>{say_seen(beats)} Next is {next_step} ({letter}).</think><answer>{answer or letter}</answer>"


def steps_said(completion: str) -> list[str] | None:
    """The steps that a text says it saw, in its order; [] for "nothing", None where it says nothing of the kind."""
    seen = SEEN.search(completion)
    if not seen:
        return None
    steps = [re.sub("( still)+$", "", step.strip()) for step in seen.group(1).split(",")]
    return [] if steps == ["nothing"] else steps


CLAIMS = ("step", "count", "next", "option", "answer")  # kinds of claim, see `check_claims`
SEEN = re.compile(r"I see ([^.<]*)\.")
NEXT = re.compile(r"Next is ([^.,(<]*)")
OPTION = re.compile(r"\(([A-D])\)")


def check_claims(completion: str, goal: str, progress: tuple[str, ...],
                 options: tuple[str, ...]) -> list[tuple[str, str, bool]]:
    """Every claim that a completion makes, as (kind, claim, whether it holds in the world). Any text is welcome: what
    is not claimed is not listed, and garbage gives [].

    `goal` in any case, `progress` the steps the video shows, `options` as the prompt lists them. Kinds of claim:
        step     "step 2 was wash pot"          against the video
        count    "2 steps were done"            against the video
        next     "next is fill pot"             against the recipe (False too for a goal that the world does not know)
        option   "option B says fill pot"       against the options, whether or not fill pot is really next
        answer   "B was reasoned, B answered"   the answer against the reasoning
    """
    claims = []
    thought = completion.split("</think>")[0]
    if (steps := steps_said(thought)) is not None:
        for i, step in enumerate(steps):
            claims.append(("step", f"step {i + 1} was {step}", i < len(progress) and step == progress[i]))
        claims.append(("count", f"{len(steps)} steps were done", len(steps) == len(progress)))
    said_next, said_letter, answer = NEXT.search(thought), OPTION.search(thought), parse_answer(completion, options)
    if said_next:
        step, recipe = said_next.group(1).strip(), RECIPES.get(goal.lower().strip(), ())
        claims.append(("next", f"next is {step}", recipe[len(progress) : len(progress) + 1] == (step,)))
    if said_next and said_letter:
        letter = said_letter.group(1)
        index = string.ascii_uppercase.index(letter)
        claims.append(("option", f"option {letter} says {step}", index < len(options) and options[index] == step))
    if said_letter and answer:
        letter = said_letter.group(1)
        claims.append(("answer", f"{letter} was reasoned, {answer} answered", letter == answer))
    return claims


# ----------------------------------------------------------------------------------------------------------------------
# The files: records in the benchmark's three schemas, mp4 videos and png images.

LEVELS = ("L1", "L2", "L3")
POINTS = (0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5)  # steps done when the question is asked; before the first there is no video
ROUNDS = {"train": 4, "L1": 2, "L2": 2, "L3": 3}  # how often each task is asked about at each of these points


def make_records(split: str, seed: int = SEED) -> list[dict]:
    """The records of "train", "L1", "L2" or "L3", without pixels; the same for the same seed.

    Another seed draws other visits and option orders, and for L2 and L3 other kitchens too.
    """
    rng = random.Random(f"{seed}/{split}")
    goals, kitchens = {
        "train": (TASKS, range(NUM_KNOWN)), "L1": (TASKS, range(NUM_KNOWN)),
        "L2": (TASKS, range(8 * seed + 8, 8 * seed + 12)), "L3": (NEW_GOALS, range(8 * seed + 12, 8 * seed + 16)),
    }[split]
    name = split if seed == SEED else f"fresh{seed}_{split}"
    records = []
    for i, (_, goal, done) in enumerate(itertools.product(range(ROUNDS[split]), goals, POINTS)):
        recipe, visit = RECIPES[goal], f"{name}_{i:04d}"
        record = {
            "sample_id": visit if split == "L3" else i, "video_source": SOURCE,
            "video_id": f"K{rng.choice(kitchens):02d}_{visit}",
            "task_goal": goal.capitalize(), "question": question_for(goal),
            # The frame numbers are, as in the benchmark, those of the long recording it was cut from: of no use here.
            "task_progress_metadata": [{"narration_text": step, "start_frame": 5 * j, "stop_frame": 5 * j + 5}
                                       for j, step in enumerate(recipe[:done])],
            "current_observation_frame": 5 * done,
            "video_basename": f"{visit}.mp4" if done else "", "current_observation_basename": f"{visit}.png",
        }
        wrong = sorted(set(recipe) - {recipe[done]})  # the recipe's other three: all about other objects
        if split == "train":
            record |= {"answer": recipe[done], "negative_answers": wrong}
        else:
            options = [recipe[done], *wrong]
            rng.shuffle(options)
            record |= {f"choice_{letter}": option for letter, option in zip("abcd", options)}
            record["golden_choice_idx"] = string.ascii_uppercase[options.index(recipe[done])]
        if split == "L3":
            record["domain"], record["scenario"] = NEW_GOALS[goal]
        records.append(record)
    rng.shuffle(records)
    return records


def draw_visit(record: dict) -> tuple[np.random.Generator, tuple[float, float], list[str]]:
    """A record's visit to its kitchen: its random numbers, how it is seen, and the step that each beat of its video
    shows (none before the first)."""
    rng = np.random.default_rng([SEED, *record["video_id"].encode()])  # each visit to a kitchen looks a bit different
    view = draw_view(rng, HAZE if kitchen_of(record) < NUM_KNOWN else NEW_HAZE)
    progress = tuple(step["narration_text"] for step in record["task_progress_metadata"])
    return rng, view, draw_beats(progress, rng) if progress else []


def kitchen_of(record: dict) -> int:
    return int(record["video_id"].split("_")[0][1:])


def make_sft_record(record: dict) -> dict:
    """A training record in the SFT shape: the whole prompt, and the teacher's response."""
    rng = random.Random(f"{SEED}/sft/{record['sample_id']}")
    options = [record["answer"], *rng.sample(record["negative_answers"], 3)]
    rng.shuffle(options)
    letter = string.ascii_uppercase[options.index(record["answer"])]
    _, _, beats = draw_visit(record)
    image = f"images/{SOURCE}/{record['current_observation_basename']}"
    video = f"videos/{SOURCE}/{record['video_basename']}"
    # Keys that are null stand here because table libraries write them.
    content = [{"type": "image", "image": image, "video": None, "text": None},
               {"type": "text", "text": user_text(record["question"], tuple(options)), "image": None, "video": None}]
    if beats:
        content.insert(0, {"type": "video", "video": video, "image": None, "text": None})
    return {"sample_id": record["sample_id"], "prompt": [{"role": "user", "content": content}],
            "response": teach(beats, record["answer"], letter)}


def pixels_for(record: dict) -> tuple[np.ndarray | None, np.ndarray]:
    """The video (F, 56, 56, 3) uint8, None before the first step, and the image (56, 56, 3) uint8 of a record."""
    kitchen = draw_kitchen(np.random.default_rng([SEED, kitchen_of(record)]))
    rng, view, beats = draw_visit(record)
    video = draw_video(kitchen, beats, view, rng) if beats else None
    return video, draw_image(kitchen, beats, view, rng)


def write_video(path: Path, frames: np.ndarray) -> None:
    """uint8 (F, 56, 56, 3) -> H.264 in mp4, at 4 frames a second."""
    options = {"crf": "18", "preset": "veryfast", "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=NATIVE_FPS, options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_pixels(root: Path, records: list[dict]) -> None:
    """The videos and images of records, below a data root."""
    for kind in ("videos", "images"):
        (root / kind / SOURCE).mkdir(parents=True, exist_ok=True)

    def write(record: dict) -> None:
        video, image = pixels_for(record)
        Image.fromarray(image).save(root / "images" / SOURCE / record["current_observation_basename"])
        if video is not None:
            write_video(root / "videos" / SOURCE / record["video_basename"], video)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the encoder lets go of Python's lock
        list(pool.map(write, records))


def jsonl(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def build(root: str | Path = ROOT) -> Path:
    """Write the world below `root` unless this very world is there already; returns `root`.

    Written beside and renamed at the end, so that an interrupted build leaves nothing that looks complete. An older
    world is replaced; ValueError if something else is there.
    """
    root = Path(root)
    train, levels = make_records("train"), {level: make_records(level) for level in LEVELS}
    files = {"training_6k": train, "training_with_cot_6k": [make_sft_record(record) for record in train]}
    files |= {f"validation_{level}": records for level, records in levels.items()}
    texts = {f"annotations/{name}.jsonl": jsonl(records) for name, records in files.items()}
    # A digest of some pixels, so that a world drawn by another version of this file is not taken for this one.
    some = [pixels_for(record) for records in (train, *levels.values()) for record in records[:8]]
    digest = hashlib.sha256(b"".join(array.tobytes() for pair in some for array in pair if array is not None))
    texts["pixels.sha256"] = digest.hexdigest() + "\n"
    if all((root / name).is_file() and (root / name).read_text() == text for name, text in texts.items()):
        return root
    if root.exists() and not (root / "videos" / SOURCE).is_dir():
        raise ValueError(f"{root} is there already and is no toy world: move it away, or give another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{root.name}_", dir=root.parent))
    (new / "annotations").mkdir()
    for name, text in texts.items():
        (new / name).write_text(text)
    write_pixels(new, [*train, *itertools.chain(*levels.values())])
    if root.exists():
        shutil.rmtree(root)  # an older world
    new.chmod(0o755)
    new.rename(root)
    return root


def build_fresh(seed: int, root: str | Path = ROOT) -> list[str]:
    """Add the levels of another seed (>= 1) to the world; returns their files, for evaluate.py's --eval_files.

    For final numbers: whoever has tuned anything with an eye on L1 to L3 has fitted it to them.
    """
    if seed < 1:
        raise ValueError(f"--fresh {seed}: give a seed from 1 on; the world's own levels are those of seed {SEED}")
    root = build(root)
    levels = {f"annotations/fresh{seed}_{level}.jsonl": make_records(level, seed) for level in LEVELS}
    for name, records in levels.items():
        if not (root / name).is_file() or (root / name).read_text() != jsonl(records):
            write_pixels(root, records)
            (root / name).write_text(jsonl(records))  # last: where it is, all its pixels are
    return list(levels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--fresh", type=int, metavar="SEED",
                        help="add the levels of another seed, >= 1, for final numbers")
    seed = parser.parse_args().fresh
    if seed is None:
        build()
        names = ["training_6k", *(f"validation_{level}" for level in LEVELS)]
    else:
        names = [Path(name).stem for name in build_fresh(seed)]
    print(f"The toy world is in {ROOT}")
    for name in names:
        records = [json.loads(line) for line in (ROOT / f"annotations/{name}.jsonl").read_text().splitlines()]
        videos = sum(bool(record["task_progress_metadata"]) for record in records)
        goals = len({record["task_goal"] for record in records})
        kitchens = len({record["video_id"].split("_")[0] for record in records})
        print(f"{name:14} {len(records):4} questions, {videos:4} with a video, {goals:3} tasks, {kitchens:2} kitchens")
