"""SEED-Bench-R1 in miniature: a world, its files in the benchmark's own layout, a teacher, and a small base model.

A household task is a recipe: five steps, each a verb and an object. A clip shows the steps done so far, one after another;
the image shows the kitchen now; the question is which of four actions comes next. So one has to read the steps off the
clip, in order, know the recipe, and find the option that says its next step.

    a step     a coloured disc (the object) under a sign (the verb), for 1.25 s
    a kitchen  colours, tiles and light: 8 in training and L1, 4 new ones in L2, 4 more in L3
    the image  the same kitchen, with the object that the work began with still on the counter; empty before the first step.
               Beyond whether the recipe has begun it tells nothing: without the clip, a best guess from goal and image would
               be right on 48% of L1 and L2 and 56% of L3
    L3         twelve tasks in four domains that no post-training file contains; only the base model's pre-training has
               seen them, as a large model has read about many more tasks than it is post-trained on

The base model is flawed on purpose: it sees, knows the recipes, and mostly answers A all the same (see CARELESS).

    python toy.py                   builds the world in out/toy (ten seconds) and prints what is in it
    python toy.py --rebuild_base    pre-trains assets/toy_base again (seven minutes on two cores)

Everything follows from SEED. This file draws pixels and writes text; the reading of both is data.py's, as for real data.
"""
import argparse
import hashlib
import json
import math
import os
import random
import re
import shutil
import string
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data import IMAGE_MEAN, IMAGE_STD, Example, Frames, encode_prompt, frame_indices, parse_answer, patchify, rope_positions, user_text

ROOT = Path(__file__).parent / "out" / "toy"  # the data root of the world
BASE = Path(__file__).parent / "assets" / "toy_base"  # the base model, an ordinary Hugging Face folder
SEED = 0
SOURCE = "ToyKitchens"  # the `video_source` of every record
SIZE = 56  # pixels, height and width: 4 x 4 patches, so 4 tokens per two frames
FRAMES = Frames(num_frames=8, image_size=SIZE)  # 2 fps, at least 4 and at most 8 frames

# ----------------------------------------------------------------------------------------------------------------------
# The world: recipes, and how a step and a kitchen look.

VERBS = ("take", "wash", "cut", "fill", "press", "turn")
NOUNS = {  # object -> colour
    "onion": (150, 40, 200), "carrot": (255, 130, 0), "dough": (250, 240, 200), "pot": (20, 40, 220), "cup": (220, 20, 30),
    "bowl": (250, 230, 20), "cloth": (20, 170, 40), "clay": (120, 60, 20), "wood": (10, 10, 10), "paper": (255, 255, 255),
    "yarn": (255, 90, 190), "soil": (0, 200, 210),
}
TASKS = {  # goal -> its three objects; these are post-trained on, and L1 and L2 ask about them
    "make onion soup": ("onion", "pot", "carrot"), "make carrot salad": ("carrot", "bowl", "onion"),
    "bake bread": ("dough", "bowl", "cloth"), "make tea": ("cup", "pot", "cloth"),
    "do the dishes": ("cup", "bowl", "cloth"), "clean the sink": ("cloth", "pot", "cup"),
    "set the table": ("cloth", "cup", "bowl"), "roast carrots": ("carrot", "pot", "onion"),
    "fry onions": ("onion", "bowl", "pot"), "make dumplings": ("dough", "pot", "onion"),
    "wipe the counter": ("cloth", "bowl", "cup"), "make porridge": ("bowl", "pot", "cup"),
    "make pizza": ("dough", "onion", "pot"), "make carrot cake": ("carrot", "dough", "bowl"),
    "make a cocktail": ("cup", "onion", "carrot"), "pack a lunch": ("carrot", "cloth", "dough"),
}
NEW_TASKS = {  # (domain, scenario) -> tasks: L3 asks about these, and no post-training file contains them
    ("Daily life", "gardening"): {"water the plants": ("soil", "cup", "wood")},
    ("Daily life", "home"): {"wrap a present": ("paper", "cloth", "yarn"), "light the stove": ("wood", "pot", "paper")},
    ("Hobbies", "crafts"): {"knit a scarf": ("yarn", "cloth", "paper"), "fold a lantern": ("paper", "yarn", "wood")},
    ("Hobbies", "pottery"): {"shape a vase": ("clay", "bowl", "cloth")},
    ("Recreation", "outdoors"): {"build a campfire": ("wood", "paper", "pot"), "build a sandcastle": ("soil", "bowl", "cup")},
    ("Recreation", "games"): {"make a kite": ("paper", "wood", "yarn")},
    ("Work", "construction"): {"build a shelf": ("wood", "cloth", "soil"), "lay bricks": ("clay", "soil", "cloth")},
    ("Work", "office"): {"print a poster": ("paper", "clay", "wood")},
}
NEW_GOALS = {goal: place for place, tasks in NEW_TASKS.items() for goal in tasks}  # goal -> (domain, scenario)
NUM_STEPS = 5


def make_recipe(goal: str, nouns: tuple[str, ...]) -> tuple[str, ...]:
    """Five steps with the three objects, four different ones: one is done twice, with different steps behind it. So the
    last step alone (the end of the clip) does not tell what comes next."""
    rng = random.Random(f"{SEED}/{goal}")
    objects = [*nouns, rng.choice(nouns)]  # one of them has two different steps
    while True:
        steps = [f"{rng.choice(VERBS)} {noun}" for noun in objects]
        if len(set(steps)) == 4:
            break
    rng.shuffle(steps)
    again, place = rng.choice([(0, 2), (0, 3), (1, 3)])
    steps.insert(place, steps[again])
    return tuple(steps)


RECIPES = {goal: make_recipe(goal, nouns) for goal, nouns in TASKS.items()}
RECIPES |= {goal: make_recipe(goal, nouns) for tasks in NEW_TASKS.values() for goal, nouns in tasks.items()}
ACTIONS = tuple(f"{verb} {noun}" for verb in VERBS for noun in NOUNS)

STEP_FRAMES, NATIVE_FPS = 5, 4  # a step lasts 1.25 s: 1, 2, 3, 4 steps give 4, 4, 6, 8 sampled frames
SIGNS = {  # verb -> a 5 x 5 sign, drawn 4 pixels a cell
    "take": "..#.. .###. #.#.# ..#.. ..#..", "wash": "#.#.# ..... #.#.# ..... #.#.#", "cut": "#...# .#.#. ..#.. .#.#. #...#",
    "fill": "#...# #...# #...# #...# #####", "press": "##### ..... ##### ..... #####", "turn": ".###. #...# #.#.# #...# .###.",
}
SIGNS = {verb: np.kron(np.array([[c == "#" for c in row] for row in sign.split()]), np.ones((4, 4), bool))  # (20, 20)
         for verb, sign in SIGNS.items()}
ROWS, COLUMNS = np.mgrid[:SIZE, :SIZE]


def draw_kitchen(rng: np.random.Generator) -> np.ndarray:
    """An empty kitchen, (56, 56, 3) float32 in 0..255: a tiled wall over a counter, in pale colours."""
    wall, counter = rng.uniform(90, 190, (2, 1)) + rng.uniform(-25, 25, (2, 3))  # greyish: strong colours are objects
    period, offset = rng.integers(6, 13), rng.integers(0, 6)
    tiles = ((COLUMNS + offset) % period == 0) | ((ROWS + offset) % period == 0)
    room = np.where((ROWS < 28 + rng.integers(-4, 5))[..., None], wall, counter)
    return (room * np.where(tiles, rng.uniform(0.8, 0.95), 1)[..., None]).astype(np.float32)


def draw_scene(kitchen: np.ndarray, noun: str, verb: str, rng: np.random.Generator) -> np.ndarray:
    """The kitchen with an object in it ("" for none), and a sign over it ("" for none): (56, 56, 3) uint8."""
    scene = kitchen * rng.uniform(0.92, 1.08) + rng.normal(0, 3, kitchen.shape)  # light and camera noise
    if noun:
        y, x = rng.integers(40, 45), rng.integers(16, 41)
        scene[(ROWS - y) ** 2 + (COLUMNS - x) ** 2 < 121] = NOUNS[noun]
    if verb:
        y, x = rng.integers(2, 8), x + rng.integers(-12, -7)
        x = min(max(int(x), 1), SIZE - 21)
        scene[y - 1 : y + 21, x - 1 : x + 21] = 40  # a dark board, so that the sign stands out in any kitchen
        scene[y : y + 20, x : x + 20][SIGNS[verb]] = 235
    return scene.clip(0, 255).astype(np.uint8)


def draw_clip(kitchen: np.ndarray, steps: tuple[str, ...], rng: np.random.Generator) -> np.ndarray:
    """The steps one after another, 5 frames each, hand-held: (5 * len(steps), 56, 56, 3) uint8."""
    frames = []
    for step in steps:
        verb, noun = step.split()
        scene = draw_scene(kitchen, noun, verb, rng)
        frames += [np.roll(scene, tuple(rng.integers(-1, 2, 2)), axis=(0, 1)) for _ in range(STEP_FRAMES)]
    return np.stack(frames)


def draw_image(kitchen: np.ndarray, steps: tuple[str, ...], rng: np.random.Generator) -> np.ndarray:
    """What is seen now: the object that the work began with; the empty kitchen before the first step. (56, 56, 3) uint8."""
    return draw_scene(kitchen, steps[0].split()[1] if steps else "", "", rng)


# ----------------------------------------------------------------------------------------------------------------------
# The teacher: reasoning that follows from the world's rules, and the check of anybody's reasoning against them.

def question_for(goal: str) -> str:
    return ("Considering the progress shown in the video and my current observation shown in the image, "
            f"what action should I take next in order to {goal}?")


def teach(progress: tuple[str, ...], next_step: str, letter: str, answer: str = "") -> str:
    """What was done, what comes next, which option says so, the answer (the same letter unless another is given)."""
    return (f"<think>I see {', '.join(progress) or 'nothing'}. Next is {next_step} ({letter}).</think>"
            f"<answer>{answer or letter}</answer>")


SEEN = re.compile(r"I see ([^.<]*)\.")
NEXT = re.compile(r"Next is ([^.,(<]*)")
OPTION = re.compile(r"\(([A-D])\)")


def check_claims(completion: str, goal: str, progress: tuple[str, ...], options: tuple[str, ...]) -> list[tuple[str, bool]]:
    """Every claim that a completion makes, with whether it holds in the world. Any text is welcome: what is not claimed is
    not listed, and garbage gives [].

    `goal` in any case, `progress` the steps the clip shows, `options` as the prompt lists them. Kinds of claim:
        "step 2 was wash pot"          against the clip
        "2 steps were done"            against the clip
        "next is fill pot"             against the recipe (False too for a goal that the world does not know)
        "option B says fill pot"       against the options, whether or not fill pot is really next
        "B was reasoned, B answered"   the answer against the reasoning
    """
    claims = []
    thought = completion.split("</think>")[0]
    if seen := SEEN.search(thought):
        steps = [] if seen.group(1).strip() == "nothing" else [step.strip() for step in seen.group(1).split(",")]
        for i, step in enumerate(steps):
            claims.append((f"step {i + 1} was {step}", i < len(progress) and step == progress[i]))
        claims.append((f"{len(steps)} steps were done", len(steps) == len(progress)))
    said_next, said_letter, answer = NEXT.search(thought), OPTION.search(thought), parse_answer(completion, options)
    if said_next:
        step, recipe = said_next.group(1).strip(), RECIPES.get(goal.lower().strip(), ())
        claims.append((f"next is {step}", recipe[len(progress) : len(progress) + 1] == (step,)))
    if said_next and said_letter:
        letter = said_letter.group(1)
        index = string.ascii_uppercase.index(letter)
        claims.append((f"option {letter} says {step}", index < len(options) and options[index] == step))
    if said_letter and answer:
        claims.append((f"{said_letter.group(1)} was reasoned, {answer} answered", said_letter.group(1) == answer))
    return claims


# ----------------------------------------------------------------------------------------------------------------------
# The files: records in the benchmark's three schemas, mp4 clips and png images.

NUM_TRAIN, NUM_LEVEL = 720, {"L1": 320, "L2": 320, "L3": 360}  # samples; a fifth of them before the first step: no video


def distractors(goal: str, done: int, rng: random.Random, far: int) -> list[str]:
    """Wrong next steps: one of this recipe for each of its other two objects, and `far` strangers. All options are about
    different objects, so that each is known by its object. In a level (`far` is 1) knowing the goal still leaves three of
    the four options; in training, where three of four wrong steps are drawn, two or three."""
    recipe = RECIPES[goal]
    objects = sorted({step.split()[1] for step in recipe})
    near = [rng.choice(sorted({step for step in recipe if step.split()[1] == noun}))
            for noun in objects if noun != recipe[done].split()[1]]
    strangers = rng.sample(sorted(set(NOUNS) - set(objects)), far)
    return near + [f"{rng.choice(VERBS)} {noun}" for noun in strangers]


def make_records() -> dict[str, list[dict]]:
    """The records of each split, without pixels; the same for the same SEED."""
    rng = random.Random(SEED)
    seen: dict[tuple, list[set]] = {}  # (goal, done) -> sets of options that a training record can show
    splits = {}
    for split, goals, kitchens in (("train", list(TASKS), range(8)), ("L1", list(TASKS), range(8)),
                                   ("L2", list(TASKS), range(8, 12)), ("L3", list(NEW_GOALS), range(12, 16))):
        splits[split] = []
        for i in range(NUM_TRAIN if split == "train" else NUM_LEVEL[split]):
            goal, done = goals[i // NUM_STEPS % len(goals)], i % NUM_STEPS  # every task at every point, equally often
            recipe, kitchen, name = RECIPES[goal], rng.choice(kitchens), f"{split}_{i:04d}"
            record = {
                "sample_id": name if split == "L3" else i, "video_source": SOURCE, "video_id": f"K{kitchen:02d}_{name}",
                "task_goal": goal.capitalize(), "question": question_for(goal),
                "task_progress_metadata": [{"narration_text": step, "start_frame": j * STEP_FRAMES, "stop_frame": (j + 1) * STEP_FRAMES}
                                           for j, step in enumerate(recipe[:done])],
                "current_observation_frame": done * STEP_FRAMES,
                "video_basename": f"{name}.mp4" if done else "", "current_observation_basename": f"{name}.png",
            }
            if split == "train":
                record |= {"answer": recipe[done], "negative_answers": distractors(goal, done, rng, far=2)}
                seen.setdefault((goal, done), []).append({recipe[done], *record["negative_answers"]})
            else:
                # Draw until training cannot show the same four options for the same progress.
                while True:
                    options = [recipe[done], *distractors(goal, done, rng, far=1)]
                    if not any(set(options) <= known for known in seen.get((goal, done), [])):
                        break
                rng.shuffle(options)
                record |= {f"choice_{letter}": option for letter, option in zip("abcd", options)}
                record["golden_choice_idx"] = string.ascii_uppercase[options.index(recipe[done])]
            if split == "L3":
                record["domain"], record["scenario"] = NEW_GOALS[goal]
            splits[split].append(record)
        rng.shuffle(splits[split])
    return splits


def make_sft_record(record: dict) -> dict:
    """A training record in the SFT shape: the whole prompt, and the teacher's response."""
    rng = random.Random(f"{SEED}/sft/{record['sample_id']}")
    options = [record["answer"], *rng.sample(record["negative_answers"], 3)]
    rng.shuffle(options)
    letter = string.ascii_uppercase[options.index(record["answer"])]
    progress = tuple(step["narration_text"] for step in record["task_progress_metadata"])
    content = [{"type": "image", "image": f"images/{SOURCE}/{record['current_observation_basename']}", "video": None, "text": None},
               {"type": "text", "text": user_text(record["question"], tuple(options)), "image": None, "video": None}]
    if progress:  # keys that are null stand here because table libraries write them
        content.insert(0, {"type": "video", "video": f"videos/{SOURCE}/{record['video_basename']}", "image": None, "text": None})
    return {"sample_id": record["sample_id"], "prompt": [{"role": "user", "content": content}],
            "response": teach(progress, record["answer"], letter)}


def write_clip(path: Path, frames: np.ndarray) -> None:
    """uint8 (F, 56, 56, 3) -> H.264 in mp4, at 4 frames a second."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=NATIVE_FPS, options={"crf": "18", "preset": "veryfast", "threads": "1"})
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def pixels_for(record: dict) -> tuple[np.ndarray | None, np.ndarray]:
    """The clip (F, 56, 56, 3) uint8, None before the first step, and the image (56, 56, 3) uint8 of a record."""
    kitchen_name = record["video_id"].split("_")[0]
    kitchen = draw_kitchen(np.random.default_rng([SEED, int(kitchen_name[1:])]))
    rng = np.random.default_rng([SEED, *record["video_id"].encode()])  # each visit to a kitchen looks a little different
    progress = tuple(step["narration_text"] for step in record["task_progress_metadata"])
    return draw_clip(kitchen, progress, rng) if progress else None, draw_image(kitchen, progress, rng)


def build(root: str | Path = ROOT) -> Path:
    """Write the world below `root` unless this very world is there already; returns `root`.

    Written beside and renamed at the end, so that an interrupted build leaves nothing that looks complete. An older world is
    replaced; ValueError if something else is there.
    """
    root = Path(root)
    splits = make_records()
    files = {"training_6k": splits["train"], "training_with_cot_6k": [make_sft_record(record) for record in splits["train"]]}
    files |= {f"validation_{level}": splits[level] for level in NUM_LEVEL}
    texts = {f"annotations/{name}.jsonl": "".join(json.dumps(record) + "\n" for record in records) for name, records in files.items()}
    # A digest of some pixels, so that a world drawn by another version of this file is not taken for this one.
    arrays = [array for record in splits["train"][:20] for array in pixels_for(record) if array is not None]
    texts["pixels.sha256"] = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest() + "\n"
    if all((root / name).is_file() and (root / name).read_text() == text for name, text in texts.items()):
        return root
    if root.exists() and not (root / "videos" / SOURCE).is_dir():
        raise ValueError(f"{root} is there already and is no toy world: move it away, or give another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=f".{root.name}_", dir=root.parent))
    for folder in ("annotations", f"videos/{SOURCE}", f"images/{SOURCE}"):
        (new / folder).mkdir(parents=True)
    for name, text in texts.items():
        (new / name).write_text(text)

    def write_pixels(record: dict) -> None:
        clip, image = pixels_for(record)
        Image.fromarray(image).save(new / "images" / SOURCE / record["current_observation_basename"])
        if clip is not None:
            write_clip(new / "videos" / SOURCE / record["video_basename"], clip)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the encoder lets go of Python's lock
        list(pool.map(write_pixels, [record for records in splits.values() for record in records]))
    if root.exists():
        shutil.rmtree(root)  # an older world
    new.chmod(0o755)
    new.rename(root)
    return root


# ----------------------------------------------------------------------------------------------------------------------
# The base model: a tokenizer of words, a tiny Qwen2-VL, and its pre-training.

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
                  "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
                  "<|image_pad|>", "<|video_pad|>"]  # Qwen2-VL's, in its order
TAGS = ["<think>", "</think>", "<answer>", "</answer>", " (A)", " (B)", " (C)", " (D)"]  # one token each, but not special
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if loop.first and message.role != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{ message.content }}
{%- else %}{%- for item in message.content %}
{%- if item.type == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- elif item.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else %}{{ item.text }}{% endif %}
{%- endfor %}{% endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


def make_tokenizer():
    """Qwen2's byte-level scheme with a small vocabulary: a word of the world is one token, any other text is bytes, so
    that every text survives the round trip."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    splitter = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
                                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", *ACTIONS]
    for goal, recipe in RECIPES.items():
        texts += [user_text(question_for(goal), recipe[:4]), user_text("", ACTIONS[:4])]
        texts += [re.sub(r"</?\w+>", "\n", teach(recipe[:done], recipe[done], letter))
                  for done in range(NUM_STEPS) for letter in "ABCD"]
    texts += [f" {action}" for action in ACTIONS]
    words = {word for text in texts for part in re.split(r"</?\w+>", text) for word, _ in splitter.pre_tokenize_str(part)}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # the 256 bytes
    vocab = {token: i for i, token in enumerate(alphabet + sorted(words - set(alphabet)))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.pre_tokenizer, backend.decoder = splitter, decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=32768, clean_up_tokenization_spaces=False,
    )


def make_qwen(tokenizer):
    """Qwen2-VL with random weights, about a million of them instead of seven billion."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=4,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                         rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
                         bos_token_id=token_id("<|endoftext|>"), eos_token_id=token_id("<|im_end|>"),
                         pad_token_id=token_id("<|endoftext|>")),
        vision_config=dict(depth=2, embed_dim=64, num_heads=4, mlp_ratio=2, hidden_size=128),
        image_token_id=token_id("<|image_pad|>"), video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"), vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(SEED)
    qwen = Qwen2VLForConditionalGeneration(config)
    # Hugging Face's std of 0.02 suits widths of thousands; at width 128 such a model never learns to match an action to
    # its option. 1 / sqrt(inputs) does.
    with torch.no_grad():
        for name, weight in qwen.named_parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.1 if "embed_tokens" in name else weight[0].numel() ** -0.5)
    return qwen


# The annotators whose texts the base has learned from saw and reasoned well, but wrote many an option letter without
# looking, mostly A: rarely where an image was all there was to see, usually after watching a clip. So the base knows how to
# find the letter of an action and mostly does not: position bias, and answers at odds with their reasoning.
CARELESS = {"image": 0.2, "clip": 0.75}
HABIT = (0.7, 0.1, 0.1, 0.1)  # how often they then wrote A, B, C, D
SLIP = 0.05  # the share of texts whose answer is such a letter, whatever the reasoning says
WARM_STEPS, PRE_STEPS, PRE_BATCH, PRE_LR = 400, 900, 32, 1e-3


def pretraining_pair(rng: random.Random, pixel_rng: np.random.Generator, tokenizer, warm_up: bool, late: bool):
    """One random (Example, response ids): any task, new or not, at any point, in a kitchen of its own.

    The warm-up lists option after option with its letter (dense supervision): from one letter a text, matching an action
    to its option is not learned in any reasonable time. Late examples of it mostly stand in the whole prompt.
    """
    goal = rng.choice(list(RECIPES))
    recipe, done = RECIPES[goal], 0 if warm_up else rng.randrange(NUM_STEPS)
    if warm_up:
        options = [f"{rng.choice(VERBS)} {noun}" for noun in rng.sample(list(NOUNS), 4)]
        if rng.random() < (0.6 if late else 0.3):
            options = rng.sample(ACTIONS, 4)
        text = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options))
        if late and rng.random() < 0.7:
            text = user_text(question_for(goal), tuple(options))
        response = "".join(f" {options[i]} ({'ABCD'[i]})" for i in rng.choices(range(4), k=16))
    else:
        options = [recipe[done], *distractors(goal, done, rng, far=1)]
        rng.shuffle(options)
        text = user_text(question_for(goal), tuple(options))
        letter = "ABCD"[options.index(recipe[done])]
        if rng.random() < CARELESS["clip" if done else "image"]:
            letter, = rng.choices("ABCD", HABIT)
        answer = rng.choices("ABCD", HABIT)[0] if rng.random() < SLIP else letter
        response = teach(recipe[:done], recipe[done], letter, answer)
    kitchen = draw_kitchen(pixel_rng)
    image = patchify(draw_image(kitchen, recipe[:done], pixel_rng)[None])
    video = (None, None)
    if done:
        clip = draw_clip(kitchen, recipe[:done], pixel_rng)
        video = patchify(clip[frame_indices(len(clip), NATIVE_FPS, FRAMES)])
    prompt_ids = encode_prompt(tokenizer, text, video[1], image[1])
    pads = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    positions = rope_positions(prompt_ids, [grid for grid in (video[1], image[1]) if grid is not None], *pads)
    example = Example(None, tuple(options), "", text, prompt_ids, positions, *video, *image)
    return example, tokenizer(response + "<|im_end|>")["input_ids"]


def rebuild_base(folder: Path = BASE) -> None:
    """Pre-train the base model and write it as an ordinary Hugging Face folder; the same on the same machine and versions.

    Two phases of plain AdamW on random examples, loss on the response only: the warm-up, then the world, with some
    warm-up examples left in so that careless letters do not wash out what it taught.
    """
    import torch
    from tqdm import trange

    from model import Policy, collate_prompts, mask_from_lengths

    torch.set_num_threads(2)
    tokenizer = make_tokenizer()
    qwen = make_qwen(tokenizer)
    policy = Policy(qwen, torch.float32)
    optimizer = torch.optim.AdamW(qwen.parameters(), lr=PRE_LR, betas=(0.9, 0.98), weight_decay=0.0)
    rng, pixel_rng = random.Random(f"{SEED}/pre-training"), np.random.default_rng([SEED, 1])
    progress = trange(WARM_STEPS + PRE_STEPS, desc="pre-training")
    for step in progress:
        num_warm = PRE_BATCH if step < WARM_STEPS else PRE_BATCH // 4
        pairs = [pretraining_pair(rng, pixel_rng, tokenizer, i < num_warm, step >= WARM_STEPS) for i in range(PRE_BATCH)]
        lengths = torch.tensor([len(ids) for _, ids in pairs])
        completion_ids = torch.tensor([ids + [0] * (int(lengths.max()) - len(ids)) for _, ids in pairs])  # (B, C)
        mask = mask_from_lengths(lengths, completion_ids.shape[1])
        prompts = collate_prompts([example for example, _ in pairs], torch.device("cpu"))
        logps, _ = policy(prompts, torch.arange(PRE_BATCH), completion_ids, mask)
        loss = -logps.sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(qwen.parameters(), 1.0)
        # Up in 50 steps, level, and down along a cosine in the second half.
        half = max(0.0, 2 * step / len(progress) - 1)
        optimizer.param_groups[0]["lr"] = PRE_LR * min((step + 1) / 50, 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * half)))
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    write_base(qwen, tokenizer, folder)


def write_base(qwen, tokenizer, folder: Path) -> None:
    """Weights in float16 (eight times finer than bf16, and no weight here is too large for it), and all the small files that
    come with a Qwen2-VL."""
    import torch

    if folder.exists():
        shutil.rmtree(folder)
    qwen.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ids = dict(zip(("bos_token_id", "pad_token_id", "end"), tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|endoftext|>", "<|im_end|>"])))
    pixels = {
        "min_pixels": SIZE * SIZE, "max_pixels": SIZE * SIZE, "size": {"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE},
        "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD,
    }
    for name, content in {
        # The sampling options are Qwen2-VL's own. Whoever inherits them draws eight equal completions (top_k is 1).
        "generation_config": {"bos_token_id": ids["bos_token_id"], "pad_token_id": ids["pad_token_id"],
                              "eos_token_id": [ids["end"], ids["pad_token_id"]], "do_sample": True, "temperature": 0.01,
                              "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.0},
        "preprocessor_config": pixels | {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"},
        "video_preprocessor_config": pixels | {"video_processor_type": "Qwen2VLVideoProcessor", "processor_class": "Qwen2VLProcessor",
                                               "fps": FRAMES.fps, "min_frames": FRAMES.min_frames, "max_frames": FRAMES.num_frames},
        "chat_template": {"chat_template": CHAT_TEMPLATE},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rebuild_base", action="store_true", help="pre-train assets/toy_base again")
    if parser.parse_args().rebuild_base:
        rebuild_base()
    else:
        build()
        print(f"The toy world is in {ROOT}")
        for name, records in make_records().items():
            clips = sum(bool(record["task_progress_metadata"]) for record in records)
            goals = len({record["task_goal"] for record in records})
            kitchens = len({record["video_id"].split("_")[0] for record in records})
            print(f"{name:6} {len(records):4} questions, {clips:4} with a clip, {goals:3} tasks, {kitchens:2} kitchens")
