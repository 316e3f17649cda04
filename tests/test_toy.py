"""The toy world: its files are the benchmark's, its levels are disjoint from training, its clips are needed, its teacher
tells the truth, and its base model is an ordinary folder."""
import hashlib
import itertools
import json
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

import toy
from data import build_options, encode_prompt, load_samples, parse_answer, read_image, read_video, user_text

LEVELS = ("L1", "L2", "L3")
COMMON = {"sample_id", "video_source", "video_id", "task_goal", "question", "task_progress_metadata", "current_observation_frame",
          "video_basename", "current_observation_basename"}
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return toy.build(tmp_path_factory.mktemp("world") / "toy")


@pytest.fixture(scope="module")
def records(root):
    return {name: [json.loads(line) for line in (root / f"annotations/{name}.jsonl").read_text().splitlines()]
            for name in ("training_6k", "training_with_cot_6k", *(f"validation_{level}" for level in LEVELS))}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(toy.BASE)


def steps_of(record):
    return tuple(step["narration_text"] for step in record["task_progress_metadata"])


# ----------------------------------------------------------------------------------------------------------------------
# Files.

def test_schemas_are_the_benchmarks(records):
    for record in records["training_6k"]:
        assert set(record) == COMMON | {"answer", "negative_answers"} and type(record["sample_id"]) is int
        assert record["answer"] not in record["negative_answers"] and len(set(record["negative_answers"])) >= 3
    for level in LEVELS:
        extra = {*CHOICES, "golden_choice_idx"} | ({"domain", "scenario"} if level == "L3" else set())
        for record in records[f"validation_{level}"]:
            assert set(record) == COMMON | extra and type(record["sample_id"]) is (str if level == "L3" else int)
            assert len({record[choice] for choice in CHOICES}) == 4
    assert len({record["domain"] for record in records["validation_L3"]}) == 4
    for split in ("training_6k", "validation_L1", "validation_L2", "validation_L3"):
        for record in records[split]:
            assert record["video_source"] == "ToyKitchens" and record["question"].startswith("Considering the progress shown in the video")
            assert all(set(step) == {"narration_text", "start_frame", "stop_frame"} for step in record["task_progress_metadata"])


def test_every_file_loads_and_every_pixel_file_is_there(root, records):
    for name in records:
        samples = load_samples(f"annotations/{name}.jsonl", root)
        assert len(samples) == len(records[name])
        assert all(sample.image.is_file() and (sample.video is None or sample.video.is_file()) for sample in samples)
        assert 0.1 < sum(sample.video is None for sample in samples) / len(samples) < 0.3  # image only: before the first step
    assert len(list((root / "videos/ToyKitchens").iterdir())) == sum(
        bool(steps_of(record)) for name, split in records.items() if "cot" not in name for record in split)


def test_counts(records):
    assert sum(bool(steps_of(record)) for record in records["training_6k"]) >= 512
    assert len(records["training_with_cot_6k"]) == len(records["training_6k"])
    for level in LEVELS:
        assert len(records[f"validation_{level}"]) >= 256
        golds = Counter(record["golden_choice_idx"] for record in records[f"validation_{level}"])
        assert max(golds.values()) < 0.35 * golds.total()  # no letter is worth guessing


def test_clips_have_as_many_frames_as_their_length_asks_for(root):
    counts = defaultdict(set)
    for sample in load_samples("annotations/training_6k.jsonl", root)[:40]:
        if sample.video:
            pixels = read_video(sample.video, toy.FRAMES)
            assert pixels.shape[1:] == (56, 56, 3)
            counts[len(sample.progress)].add(len(pixels))
        assert read_image(sample.image, toy.FRAMES).shape == (1, 56, 56, 3)
    assert counts == {1: {4}, 2: {4}, 3: {6}, 4: {8}}


# ----------------------------------------------------------------------------------------------------------------------
# Splits.

def test_no_level_repeats_training(root, records):
    def hashes(names, kind):
        return [hashlib.sha256((root / kind / "ToyKitchens" / name).read_bytes()).hexdigest() for name in names if name]

    train = records["training_6k"]
    shown = defaultdict(list)  # (goal, progress) -> every text that a training question can offer
    for record in train:
        shown[record["task_goal"], steps_of(record)].append({record["answer"], *record["negative_answers"]})
    train_clips = set(hashes((record["video_basename"] for record in train), "videos"))
    train_images = set(hashes((record["current_observation_basename"] for record in train), "images"))
    for level in LEVELS:
        level_records = records[f"validation_{level}"]
        clips = hashes((record["video_basename"] for record in level_records), "videos")
        assert len(set(clips)) == len(clips) and not set(clips) & train_clips
        assert not set(hashes((record["current_observation_basename"] for record in level_records), "images")) & train_images
        for record in level_records:
            options = {record[choice] for choice in CHOICES}
            assert not any(options <= texts for texts in shown[record["task_goal"], steps_of(record)])


def test_l2_has_new_kitchens_and_l3_new_tasks_too(records):
    def values(split, read):
        return {read(record) for record in records[split]}

    kitchen, goal = (lambda r: r["video_id"].split("_")[0]), (lambda r: r["task_goal"])
    assert values("validation_L1", kitchen) == values("training_6k", kitchen)
    for level in ("L2", "L3"):
        assert not values(f"validation_{level}", kitchen) & values("training_6k", kitchen)
    assert values("validation_L1", goal) == values("validation_L2", goal) == values("training_6k", goal)
    assert not values("validation_L3", goal) & values("training_6k", goal)
    post_training = json.dumps(records["training_6k"]) + json.dumps(records["training_with_cot_6k"])
    assert not any(new_goal in post_training.lower() for new_goal in toy.NEW_GOALS)


@pytest.mark.parametrize("level", LEVELS)
def test_the_clip_is_needed(records, level):
    """A player who knows every recipe and sees goal, image and options, but not the clip, can only guess among the points
    of the recipe that look the same. With the clip there is nothing to guess."""
    wins = {"goal": 0.0, "goal and image": 0.0, "goal and last step": 0.0, "goal and clip": 0.0}
    level_records = records[f"validation_{level}"]
    for record in level_records:
        recipe, done = toy.RECIPES[record["task_goal"].lower()], len(steps_of(record))
        options = {record[choice] for choice in CHOICES}
        looks = {
            "goal": lambda d: None,
            "goal and image": lambda d: d > 0,  # an object or none: which object it is does not depend on the progress
            "goal and last step": lambda d: recipe[d - 1] if d else None,
            "goal and clip": lambda d: recipe[:d],
        }
        for known, look in looks.items():
            possible = [recipe[d] for d in range(5) if recipe[d] in options and look(d) == look(done)]
            wins[known] += Counter(possible).most_common(1)[0][1] / len(possible)  # the best guess, over what looks the same
    share = {known: count / len(level_records) for known, count in wins.items()}
    assert share["goal"] < 0.5 and share["goal and image"] < 0.6 and share["goal and last step"] < 0.9, share
    assert share["goal and clip"] == 1


def test_the_image_does_not_depend_on_the_progress():
    """Seen from the same place, the images after one step and after four are equal: the object that the task began with."""
    for goal, recipe in toy.RECIPES.items():
        kitchen = toy.draw_kitchen(np.random.default_rng(1))
        images = [toy.draw_image(kitchen, recipe[:done], np.random.default_rng(2)) for done in range(5)]
        assert all(np.array_equal(images[1], image) for image in images[2:]), goal
        assert not np.array_equal(images[0], images[1])


def test_recipes_repeat_a_step_with_another_step_behind_it():
    for goal, recipe in toy.RECIPES.items():
        assert len(recipe) == 5 and all(a != b for a, b in zip(recipe, recipe[1:]))
        assert any(recipe[i] == recipe[j] and recipe[i + 1] != recipe[j + 1] for i, j in itertools.combinations(range(4), 2)), goal


# ----------------------------------------------------------------------------------------------------------------------
# One seed, one world.

def test_the_world_is_a_function_of_its_seed():
    """The hash is of pixels before encoding: another encoder version may write other bytes."""
    assert toy.make_records() == toy.make_records()
    digest = hashlib.sha256()
    for record in toy.make_records()["train"][:20]:
        clip, image = toy.pixels_for(record)
        again = toy.pixels_for(record)
        assert np.array_equal(image, again[1]) and (clip is None or np.array_equal(clip, again[0]))
        digest.update(image.tobytes() + (b"" if clip is None else clip.tobytes()))
    assert digest.hexdigest()[:16] == FRAMES_HASH


FRAMES_HASH = "d50baf4d2f5c44aa"


def test_a_folder_that_is_no_toy_world_is_refused_and_left_alone(tmp_path):
    for name in ("annotations/training_with_cot_6k.jsonl", "videos/Ego4D/x.mp4"):  # as in the real data
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match="no toy world"):
        toy.build(tmp_path)
    assert (tmp_path / "videos/Ego4D/x.mp4").read_text() == "precious"


def test_building_again_changes_nothing(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert toy.build(root) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before
    assert not [path for path in root.parent.iterdir() if path != root]  # nothing half-built lies around


# ----------------------------------------------------------------------------------------------------------------------
# The teacher and the check of claims.

@pytest.fixture
def task():
    recipe = toy.RECIPES["make onion soup"]
    return "Make onion soup", recipe[:2], (recipe[0], recipe[2], "turn yarn", recipe[4])


def holds(claims):
    return [value for _, value in claims]


def test_the_teacher_is_right(root, records):
    for sample, record in zip(load_samples("annotations/training_with_cot_6k.jsonl", root), records["training_6k"]):
        lines = sample.question.split("\n")
        options = tuple(line[3:] for line in lines if line[:3] in ("A. ", "B. ", "C. ", "D. "))
        assert len(options) == 4 and sample.question == user_text(record["question"], options)
        claims = toy.check_claims(sample.response, record["task_goal"], steps_of(record), options)
        assert len(claims) == len(steps_of(record)) + 4 and all(holds(claims)), (sample.response, claims)
        assert options["ABCD".index(parse_answer(sample.response, options))] == record["answer"]


def test_each_kind_of_wrong_claim_is_found(task):
    goal, (first, second), options = task
    step = options[1]

    def check(text):
        return dict(toy.check_claims(text, goal, (first, second), options))

    right = toy.teach((first, second), step, "B")
    assert check(right) == {f"step 1 was {first}": True, f"step 2 was {second}": True, "2 steps were done": True,
                            f"next is {step}": True, f"option B says {step}": True, "B was reasoned, B answered": True}
    swapped = check(toy.teach((second, first), step, "B"))
    assert swapped[f"step 1 was {second}"] is False and swapped["2 steps were done"] is True
    short = check(toy.teach((first,), step, "B"))
    assert short[f"step 1 was {first}"] is True and short["1 steps were done"] is False
    long = check(toy.teach((first, second, first), step, "B"))
    assert long[f"step 3 was {first}"] is False and long["3 steps were done"] is False
    assert check(toy.teach((first, second), "turn yarn", "C"))["next is turn yarn"] is False
    assert check(toy.teach((first, second), "turn yarn", "C"))["option C says turn yarn"] is True  # wrong step, right letter
    assert check(toy.teach((first, second), step, "D"))[f"option D says {step}"] is False
    assert check(toy.teach((first, second), step, "B", answer="A"))["B was reasoned, A answered"] is False
    assert check(toy.teach((), step, "B"))["0 steps were done"] is False


def test_claims_about_an_unknown_goal_do_not_hold(task):
    _, progress, options = task
    claims = dict(toy.check_claims(toy.teach(progress, options[1], "B"), "fly to the moon", progress, options))
    assert claims[f"next is {options[1]}"] is False


@pytest.mark.parametrize("text", ["", "<think>", "</think></think><answer>", "I see", "I see .", "I see ,,,.", "Next is", "Next is (", "(Z)",
                                  "(D).", "<answer>E</answer>", "\x00\ud800 é日本", "I see wash pot. Next is (A).</think><answer>(B)</answer>",
                                  "<answer>B</answer><think>I see nothing.", "Next is a (D) (C)", "I see nothing" * 1000])
def test_garbage_is_checked_without_raising(task, text):
    for goal, progress, options in (task, ("", (), ()), ("make tea", (), ("a", "b"))):
        for claim, value in toy.check_claims(text, goal, progress, options):
            assert isinstance(claim, str) and type(value) is bool


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer and base model.

def test_text_survives_the_tokenizer(root, tokenizer):
    texts = ["", " ", "\n\n x", "Grab the étagère: 日本 <think >", "a (B) b(B)", "don't\r\n\t  stop  "]
    for name in ("training_6k", "training_with_cot_6k", "validation_L3"):
        for sample in load_samples(f"annotations/{name}.jsonl", root)[:100]:
            texts += [user_text(sample.question, build_options(sample, 0, 0)[0]), sample.response]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    response = toy.teach(("wash pot",), "cut onion", "B")
    assert len(tokenizer(response)["input_ids"]) == 16  # a word, a tag, a mark: one token each


def test_the_whole_world_is_in_the_vocabulary(root, tokenizer):
    """No word of any prompt or response falls apart into bytes."""
    for name in ("training_6k", "training_with_cot_6k", "validation_L1", "validation_L3"):
        for sample in load_samples(f"annotations/{name}.jsonl", root):
            text = user_text(sample.question, build_options(sample, 0, 0)[0]) + sample.response
            pieces = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
            assert not any(len(piece) == 1 and piece.isalpha() and piece not in "ABCDIĠĊ" for piece in pieces[:-1]), pieces


def test_special_tokens_agree_with_the_config(tokenizer):
    config = json.loads((toy.BASE / "config.json").read_text())
    generation = json.loads((toy.BASE / "generation_config.json").read_text())
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in toy.SPECIAL_TOKENS + toy.TAGS}
    assert len(set(ids.values())) == len(ids)
    assert all(tokenizer(token)["input_ids"] == [ids[token]] for token in ids)
    for name in ("image", "video", "vision_start", "vision_end"):
        token = f"<|{name}_pad|>" if name in ("image", "video") else f"<|{name}|>"
        assert config[f"{name}_token_id"] == ids[token]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert generation["eos_token_id"] == [ids["<|im_end|>"], ids["<|endoftext|>"]] and generation["pad_token_id"] == ids["<|endoftext|>"]
    assert generation["do_sample"] and generation["top_k"] == 1  # as Qwen2-VL ships it: nobody should inherit this
    assert config["text_config"]["vocab_size"] == len(tokenizer)
    assert tokenizer.decode(tokenizer("<think>a</think><|im_end|>")["input_ids"], skip_special_tokens=True) == "<think>a</think>"


def test_the_chat_template_is_the_prompt(tokenizer):
    message = [{"role": "user", "content": [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "What next?\n"}]}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    one = torch.tensor([[1, 2, 2]])  # a grid that takes one token
    assert tokenizer(text)["input_ids"] == encode_prompt(tokenizer, "What next?\n", one, one).tolist()
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert tokenizer.apply_chat_template(plain, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n")


def test_the_base_is_a_small_ordinary_folder():
    assert sum(path.stat().st_size for path in toy.BASE.iterdir()) <= 3 * 2**20
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json"} <= {p.name for p in toy.BASE.iterdir()}
    model = AutoModelForImageTextToText.from_pretrained(toy.BASE, dtype=torch.float32)
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())
    assert 0.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 2e6
