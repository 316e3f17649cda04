"""The toy world: its files are the benchmark's, its levels are disjoint from training, its videos are needed, its
teacher tells the truth, and its base model is an ordinary folder."""
import dataclasses
import hashlib
import itertools
import json
import re
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

import check
import pretrain
import toy
from conftest import QWEN2_VL
from data import (
    VideoDataset,
    build_options,
    encode_prompt,
    load_questions,
    parse_answer,
    read_image,
    sample_frames,
    user_text,
)

LEVELS = ("L1", "L2", "L3")
LEAST_LISTED = 0.85  # of the steps that the base is asked to list; its README has the figure
COMMON = {"sample_id", "video_source", "video_id", "task_goal", "question", "task_progress_metadata",
          "current_observation_frame", "video_basename", "current_observation_basename"}
CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


@pytest.fixture(scope="module")
def root(tmp_path_factory, world):
    """The world in a folder of its own, to which a test may add."""
    return shutil.copytree(world, tmp_path_factory.mktemp("world") / "toy")


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
            assert record["video_source"] == "ToyKitchens"
            assert record["question"].startswith("Considering the progress shown in the video")
            steps = record["task_progress_metadata"]
            assert all(set(step) == {"narration_text", "start_frame", "stop_frame"} for step in steps)


def test_every_file_loads_and_every_pixel_file_is_there(root, records):
    for name in records:
        questions = load_questions(f"annotations/{name}.jsonl", root)
        assert len(questions) == len(records[name])
        assert all(question.image.is_file() for question in questions)
        assert all(question.video.is_file() for question in questions if question.video is not None)
        image_only = sum(question.video is None for question in questions)  # nothing done yet
        assert image_only / len(questions) == pytest.approx(1 / 11)
    own = [path for path in (root / "videos/ToyKitchens").iterdir() if not path.name.startswith("fresh")]
    assert len(own) == sum(
        bool(steps_of(record)) for name, split in records.items() if "cot" not in name for record in split)


def test_counts(records):
    assert sum(bool(steps_of(record)) for record in records["training_6k"]) >= 512
    assert len(records["training_with_cot_6k"]) == len(records["training_6k"])
    for level in LEVELS:
        assert len(records[f"validation_{level}"]) >= 256
        golds = Counter(record["golden_choice_idx"] for record in records[f"validation_{level}"])
        assert max(golds.values()) < 0.35 * golds.total()  # no letter is worth guessing


def test_videos_differ_in_length_and_prompts_do_not(root, tokenizer):
    """How many frames a video has, how many are sampled and how long the prompt gets tells nothing of the progress."""
    seconds, sampled, tokens = defaultdict(set), set(), defaultdict(set)
    for record in toy.make_records("train")[:120]:
        video, _ = toy.pixels_for(record)
        if video is not None:
            seconds[len(steps_of(record))].add(len(video) / toy.NATIVE_FPS)
    assert all(seconds[done] == {8, 12} for done in range(1, 6))
    dataset = VideoDataset(load_questions("annotations/training_6k.jsonl", root), tokenizer, QWEN2_VL, toy.PIXELS, 0)
    for i, question in enumerate(dataset.questions[:160]):
        example = dataset[0, i]
        assert read_image(question.image, toy.PIXELS).shape == (1, 56, 56, 3)
        if question.video:
            sampled.add(tuple(example.video_grid_thw[0].tolist()))
            tokens[question.goal].add(len(example.prompt_ids))
    assert sampled == {(8, 4, 4)} and all(len(lengths) == 1 for lengths in tokens.values()) and len(tokens) == 16


# ----------------------------------------------------------------------------------------------------------------------
# Splits.

def test_no_level_repeats_training(root, records):
    """Neither a video nor an image. (The four options of a task are always its four steps, so the same everywhere.)"""
    def hashes(names, kind):
        return [hashlib.sha256((root / kind / "ToyKitchens" / name).read_bytes()).hexdigest() for name in names if name]

    train = records["training_6k"]
    train_videos = set(hashes((record["video_basename"] for record in train), "videos"))
    train_images = set(hashes((record["current_observation_basename"] for record in train), "images"))
    for level in LEVELS:
        level_records = records[f"validation_{level}"]
        videos = hashes((record["video_basename"] for record in level_records), "videos")
        assert len(set(videos)) == len(videos) and not set(videos) & train_videos
        images = hashes((record["current_observation_basename"] for record in level_records), "images")
        assert not set(images) & train_images


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


def sampled_steps(steps, beats, beat_frames, num_frames=16):
    """The step that each sampled frame of a video shows."""
    frames = [step for step, lasts in zip(steps, beats) for _ in range(lasts * beat_frames)]
    settings = dataclasses.replace(toy.PIXELS, num_frames=num_frames)
    return tuple(frames[i] for i in sample_frames(len(frames), toy.NATIVE_FPS, settings)[0])


def best_guess(goals, observe, num_frames=16):
    """How often the best player is right on questions with a video who knows the world and each question's goal and
    options, and of the video `observe(steps on the sampled frames)`: an enumeration of all the generator can draw."""
    answers = defaultdict(Counter)  # what the player knows -> answer -> probability
    for goal in goals:
        recipe = toy.RECIPES[goal]
        for done in filter(None, toy.POINTS):
            for beats, probability in toy.timelines(recipe[:done]).items():
                for beat_frames in toy.BEAT_FRAMES:
                    seen = observe(sampled_steps(recipe[:done], beats, beat_frames, num_frames))
                    answers[goal, seen][recipe[done]] += probability
    return sum(max(counts.values()) for counts in answers.values()) / sum(counts.total() for counts in answers.values())


@pytest.mark.parametrize("goals", [toy.TASKS, toy.NEW_GOALS], ids=["L1 and L2", "L3"])
def test_the_video_is_needed_and_no_moment_of_it_is_enough(goals):
    share = {name: best_guess(goals, observe) for name, observe in {
        "no pixels": lambda steps: None,  # the options are always the same four, in an order that depends on nothing
        "image": lambda steps: steps[0].split()[1],  # its object is the first step's, see the test of images below
        "last frame": lambda steps: steps[-1],
        "frames without order": frozenset,
        "how many frames show what": lambda steps: frozenset(Counter(steps).items()),
        "video": lambda steps: steps}.items()}
    one_frame = [best_guess(goals, lambda steps, i=i: steps[i]) for i in range(16)]
    assert share["no pixels"] <= 0.4 + 1e-9 and share["image"] <= 0.4 + 1e-9, share
    for name in ("last frame", "frames without order", "how many frames show what"):
        assert share[name] <= 0.6 + 1e-9, share
    assert max(one_frame) <= 0.65  # whoever may choose which one
    assert share["video"] == pytest.approx(1)
    fewer = [best_guess(goals, lambda steps: steps, num_frames) for num_frames in (8, 4)]
    assert fewer == pytest.approx([1, 0.98], abs=0.002)  # one frame of each beat, or of every other one


def test_two_frames_are_sampled_of_each_beat_whatever_the_video_s_length():
    for beat_frames in toy.BEAT_FRAMES:
        steps = tuple(f"step {i}" for i in range(toy.NUM_BEATS))
        twice = tuple(step for step in steps for _ in range(2))
        assert sampled_steps(steps, (1,) * toy.NUM_BEATS, beat_frames) == twice


@pytest.mark.parametrize("pattern", ["a", "ab", "aba", "abac", "abacb", "abcde", "ababa", "abaca"])
def test_timelines_fill_the_video_and_are_probabilities(pattern):
    ways = toy.timelines(tuple(pattern))
    assert sum(ways.values()) == pytest.approx(1) and all(p > 0 for p in ways.values())
    assert all(len(beats) == len(pattern) and sum(beats) == toy.NUM_BEATS and min(beats) >= 1 for beats in ways)


def test_videos_are_drawn_from_the_enumerated_timelines():
    """By looking at the frames: a red disc means that the cup is in hand."""
    rng, steps = np.random.default_rng(0), ("take cup", "wash pot", "take cup")
    counts = Counter()
    for _ in range(1000):
        video = toy.draw_video(np.full((56, 56, 3), 128, np.float32), toy.draw_beats(steps, rng), (0.0, 1.0), rng)
        beat = len(video) // toy.NUM_BEATS
        colour = video[::beat, 38:48, 10:46].reshape(toy.NUM_BEATS, -1, 3).astype(int)
        red = (np.abs(colour - toy.NOUNS["cup"]).max(-1) < 30).any(-1)  # a frame a beat
        runs = [len(list(run)) for _, run in itertools.groupby(red.tolist())]
        counts[tuple(runs)] += 1
    expected = toy.timelines((0, 1, 0))
    assert set(counts) <= set(expected)
    chi2 = sum((counts[beats] - 1000 * p) ** 2 / (1000 * p) for beats, p in expected.items())
    assert chi2 < len(expected) - 1 + 5 * (2 * (len(expected) - 1)) ** 0.5  # five standard deviations


def test_a_video_has_as_many_scenes_as_it_has_different_actions():
    """A step done again looks as it did before: the number of different pictures does not tell the number of steps
    either. (By colour histograms, which shaking leaves almost alone.)"""
    kitchen, recipe = toy.draw_kitchen(np.random.default_rng(3)), toy.RECIPES["make tea"]
    for done, scenes in ((1, 1), (2, 2), (3, 2), (4, 3), (5, 3)):
        rng = np.random.default_rng(done)
        video = toy.draw_video(kitchen, toy.draw_beats(recipe[:done], rng), (0.3, 1.0), rng)
        sums = {frame[:, :, 0].sum() for frame in video.astype(int)}  # np.roll moves pixels and loses none
        assert len(sums) == scenes


def test_no_kitchen_of_the_pre_training_is_one_of_the_worlds():
    """Else L2's kitchens would be new to the post-training alone."""
    world = [toy.draw_kitchen(np.random.default_rng([toy.SEED, number])) for number in range(64)]
    for number in range(64):
        kitchen = toy.draw_kitchen(np.random.default_rng([toy.SEED, number, pretrain.PRETRAINING]))
        assert not any(np.array_equal(kitchen, other) for other in world)


def test_option_order_is_independent_of_the_progress(records):
    for name in (f"validation_{level}" for level in LEVELS):
        place = defaultdict(Counter)
        for record in records[name]:
            place[len(steps_of(record))][record["golden_choice_idx"]] += 1
        for counts in (counts for done, counts in place.items() if done):
            assert max(counts.values()) < 0.45 * counts.total()  # 64 or 72 each: 3.7 standard deviations above 1/4


def test_the_image_does_not_depend_on_the_progress():
    """Seen from the same place, the images after one step and after five are equal: the object the task began with."""
    for goal, recipe in toy.RECIPES.items():
        kitchen = toy.draw_kitchen(np.random.default_rng(1))
        images = [toy.draw_image(kitchen, recipe[:done], (0.5, 1.0), np.random.default_rng(2)) for done in range(6)]
        assert all(np.array_equal(images[1], image) for image in images[2:]), goal
        assert not np.array_equal(images[0], images[1])


def test_recipes_repeat_two_steps_with_other_steps_behind_them():
    for goal, (a, b, again, c, b_again, d) in toy.RECIPES.items():
        assert (a, b) == (again, b_again) and len({a, b, c, d}) == 4, goal
        assert len({step.split()[1] for step in (a, b, c, d)}) == 4, goal
    assert len(set(toy.RECIPES.values())) == len(toy.RECIPES)


# ----------------------------------------------------------------------------------------------------------------------
# One seed, one world.

def test_the_world_is_a_function_of_its_seed():
    """The hash is of pixels before encoding: another encoder version may write other bytes."""
    digest = hashlib.sha256()
    for split in ("train", *LEVELS):
        assert toy.make_records(split) == toy.make_records(split)
        for record in toy.make_records(split)[:8]:
            video, image = toy.pixels_for(record)
            again = toy.pixels_for(record)
            assert np.array_equal(image, again[1]) and (video is None or np.array_equal(video, again[0]))
            digest.update(image.tobytes() + (b"" if video is None else video.tobytes()))
    assert digest.hexdigest()[:16] == FRAMES_HASH


FRAMES_HASH = "5b268c94175c77aa"


def test_fresh_levels_are_other_questions_of_the_same_kind(root, records):
    files = toy.build_fresh(7, root)
    assert files == [f"annotations/fresh7_{level}.jsonl" for level in LEVELS]
    for level, file in zip(LEVELS, files):
        fresh = [json.loads(line) for line in (root / file).read_text().splitlines()]
        old = records[f"validation_{level}"]
        kind = [sorted((r["task_goal"], len(steps_of(r))) for r in part) for part in (fresh, old)]
        assert kind[0] == kind[1]  # each task at each point, equally often
        assert not {r["video_id"] for r in fresh} & {r["video_id"] for r in old}
        assert [r["golden_choice_idx"] for r in fresh] != [r["golden_choice_idx"] for r in old]
        new, known, trained = ({r["video_id"][:3] for r in part} for part in (fresh, old, records["training_6k"]))
        assert new == known == trained if level == "L1" else not new & (known | trained)
        questions = load_questions(file, root)
        assert all(question.image.is_file() for question in questions)
        assert all(question.video.is_file() for question in questions if question.video is not None)
    with pytest.raises(ValueError, match="--fresh 0"):
        toy.build_fresh(0, root)


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
    return "Make onion soup", recipe[:2], (recipe[1], recipe[2], "turn yarn", recipe[5])


def holds(claims):
    return [value for _, _, value in claims]


def test_the_teacher_is_right(root, records):
    for question, record in zip(load_questions("annotations/training_with_cot_6k.jsonl", root), records["training_6k"]):
        lines = question.text.split("\n")
        options = tuple(line[3:] for line in lines if line[:3] in ("A. ", "B. ", "C. ", "D. "))
        assert len(options) == 4 and question.text == user_text(record["question"], options)
        claims = toy.check_claims(question.response, record["task_goal"], steps_of(record), options)
        assert len(claims) == len(steps_of(record)) + 4 and all(holds(claims)), (question.response, claims)
        assert options["ABCD".index(parse_answer(question.response, options))] == record["answer"]


def test_each_kind_of_wrong_claim_is_found(task):
    goal, (first, second), options = task
    step = options[1]

    def check(text):
        return {claim: value for _, claim, value in toy.check_claims(text, goal, (first, second), options)}

    right = toy.teach((first, second), step, "B")
    assert check(right) == {f"step 1 was {first}": True, f"step 2 was {second}": True, "2 steps were done": True,
                            f"next is {step}": True, f"option B says {step}": True, "B was reasoned, B answered": True}
    swapped = check(toy.teach((second, first), step, "B"))
    assert swapped[f"step 1 was {second}"] is False and swapped["2 steps were done"] is True
    short = check(toy.teach((first,), step, "B"))
    assert short[f"step 1 was {first}"] is True and short["1 steps were done"] is False
    long = check(toy.teach((first, second, first), step, "B"))
    assert long[f"step 3 was {first}"] is False and long["3 steps were done"] is False
    wrong = check(toy.teach((first, second), "turn yarn", "C"))  # wrong step, right letter
    assert wrong["next is turn yarn"] is False and wrong["option C says turn yarn"] is True
    assert check(toy.teach((first, second), step, "D"))[f"option D says {step}"] is False
    assert check(toy.teach((first, second), step, "B", answer="A"))["B was reasoned, A answered"] is False
    assert check(toy.teach((), step, "B"))["0 steps were done"] is False


def test_claims_about_an_unknown_goal_do_not_hold(task):
    _, progress, options = task
    claims = toy.check_claims(toy.teach(progress, options[1], "B"), "fly to the moon", progress, options)
    assert ("next", f"next is {options[1]}", False) in claims


@pytest.mark.parametrize("text", [
    "", "<think>", "</think></think><answer>", "I see", "I see .", "I see ,,,.", "Next is", "Next is (", "(Z)", "(D).",
    "<answer>E</answer>", "\x00\ud800 é日本", "I see wash pot. Next is (A).</think><answer>(B)</answer>",
    "<answer>B</answer><think>I see nothing.", "Next is a (D) (C)", "I see nothing" * 1000])
def test_garbage_is_checked_without_raising(task, text):
    for goal, progress, options in (task, ("", (), ()), ("make tea", (), ("a", "b"))):
        for kind, claim, value in toy.check_claims(text, goal, progress, options):
            assert kind in toy.CLAIMS and isinstance(claim, str) and type(value) is bool


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizer and base model.

def test_text_survives_the_tokenizer(root, tokenizer):
    texts = ["", " ", "\n\n x", "Grab the étagère: 日本 <think >", "a (B) b(B)", "don't\r\n\t  stop  "]
    for name in ("training_6k", "training_with_cot_6k", "validation_L3"):
        for question in load_questions(f"annotations/{name}.jsonl", root)[:100]:
            texts += [user_text(question.text, build_options(question, 0, 0)[0]), question.response]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    response = toy.teach(("wash pot",), "cut onion", "B")
    assert len(tokenizer(response)["input_ids"]) == 16  # a word, a tag, a mark: one token each


def test_the_whole_world_is_in_the_vocabulary(root, tokenizer):
    """No word of any prompt or response falls apart into bytes."""
    for name in ("training_6k", "training_with_cot_6k", "validation_L1", "validation_L3"):
        for question in load_questions(f"annotations/{name}.jsonl", root):
            text = user_text(question.text, build_options(question, 0, 0)[0]) + question.response
            pieces = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
            letters = {piece for piece in pieces[:-1] if len(piece) == 1 and piece.isalpha()}
            assert letters <= set("ABCDIĠĊ"), pieces


def test_special_tokens_agree_with_the_config(tokenizer):
    config = json.loads((toy.BASE / "config.json").read_text())
    generation = json.loads((toy.BASE / "generation_config.json").read_text())
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in pretrain.SPECIAL_TOKENS + pretrain.TAGS}
    assert len(set(ids.values())) == len(ids)
    assert all(tokenizer(token)["input_ids"] == [ids[token]] for token in ids)
    for name in ("image", "video", "vision_start", "vision_end"):
        token = f"<|{name}_pad|>" if name in ("image", "video") else f"<|{name}|>"
        assert config[f"{name}_token_id"] == ids[token]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.pad_token == "<|endoftext|>"
    assert generation["eos_token_id"] == [ids["<|im_end|>"], ids["<|endoftext|>"]]
    assert generation["pad_token_id"] == ids["<|endoftext|>"]
    assert generation["do_sample"] and generation["top_k"] == 1  # as Qwen2-VL ships it: nobody should inherit this
    assert config["text_config"]["vocab_size"] == len(tokenizer)
    answer = tokenizer("<think>a</think><|im_end|>")["input_ids"]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "<think>a</think>"


def test_the_chat_template_is_the_prompt(tokenizer):
    content = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "What next?\n"}]
    message = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    one = torch.tensor([[1, 2, 2]])  # a grid that takes one token
    assert tokenizer(text)["input_ids"] == encode_prompt(tokenizer, QWEN2_VL, "What next?\n", one, one).tolist()
    plain = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
             {"role": "assistant", "content": "Ho"}]
    assert tokenizer.apply_chat_template(plain, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHo<|im_end|>\n")


def test_the_base_is_a_small_ordinary_folder():
    assert sum(path.stat().st_size for path in toy.BASE.iterdir()) <= 3 * 2**20
    names = {path.name for path in toy.BASE.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "chat_template.jinja", "preprocessor_config.json", "video_preprocessor_config.json"} <= names
    model = AutoModelForImageTextToText.from_pretrained(toy.BASE, dtype=torch.float32)
    assert type(model).__name__ == "Qwen2VLForConditionalGeneration"
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())
    assert 0.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 2e6


# ----------------------------------------------------------------------------------------------------------------------
# What the base can do. The whole of it, with the figures of its README, is assets/toy_base/check.py.

def test_the_base_sees_and_is_blind_without_its_video(tokenizer):
    """Asked for the random actions of a video, it names them; where every frame is grey, it cannot."""
    sample, right = check.Sampler(toy.BASE), {}
    for video in ("full", "blank"):
        examples = check.list_examples(tokenizer, 96, video, (0.0, pretrain.PRETRAINING_HAZE), seed=11)
        right[video] = check.share_right(sample, examples)
    assert right["full"] > LEAST_LISTED and right["blank"] < 0.06, right  # one action in 72 is right by chance


def test_the_bases_readme_has_the_figures_that_the_check_prints():
    sample = check.Sampler(toy.BASE)
    table = re.findall(r"^\| (.+) \| [\d.]+% \|$", (toy.BASE / "README.md").read_text(), re.MULTILINE)
    assert table == [name for part in (check.check_seeing, check.check_knowing, check.check_sampling)
                     for name in part(sample, 4)]


def test_steps_are_counted_right_in_their_place_only():
    steps = ("take cup", "cut onion")
    cases = (("I see take cup, cut onion.", 2), ("I see take cup.", 1), ("I see cut onion, take cup.", 0), ("", 0),
             ("I see take cup, cut pot, cut onion.", 1), ("I see nothing.", 0), ("take cup, cut onion", 0),
             ("I see take cup still still, cut onion still.", 2), ("I see take still cup, cut onion.", 1))
    for text, right in cases:
        assert check.listed_right(text, steps) == right
