"""data.py against Hugging Face (patches, positions, prompt), explicit loops, another decoder, and broken files."""
import ctypes
import faulthandler
import io
import itertools
import json
import os
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import replace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

import data
from data import PixelSettings, Question

QWEN2_VL = data.FAMILIES["qwen2_vl"]
SMALL, PAPERS = PixelSettings(num_frames=8, image_size=56), PixelSettings()
STEPS = [{"narration_text": "open drawer", "start_frame": 0, "stop_frame": 9}]
EGOPLAN = {"sample_id": 7, "video_source": "Ego4D", "video_id": "v", "task_goal": "cut the onion",
           "question": "What next?", "task_progress_metadata": STEPS, "current_observation_frame": 3,
           "video_basename": "clip.mp4", "current_observation_basename": "now.png"}
NEGATIVES = ("open drawer", "grab knife", "wash hands", "close door")
TRAINING = {**EGOPLAN, "answer": "grab onion", "negative_answers": list(NEGATIVES)}
VALIDATION = {**EGOPLAN, "choice_a": "grab onion", "choice_b": "grab knife", "choice_c": "wash", "choice_d": "close",
              "golden_choice_idx": "C", "answer": "wash"}
LONG_VIDEO = {"id": "x_0", "question": "Who is it?", "candidates": ["a man", "a dog", "a cat"], "correct_choice": 1,
              "video_path": "long.mp4", "duration_group": 600, "subtitle_path": "s.json"}
SFT = {"prompt": [{"role": "user", "content": [
    {"type": "video", "video": "videos/Ego4D/clip.mp4", "image": None, "text": None},
    {"type": "image", "image": "images/Ego4D/now.png", "video": None, "text": None},
    {"type": "text", "text": "What next?\nA. x\nB. y", "image": None, "video": None}]}],
    "response": "<think>It is y.</think><answer>B</answer>"}
FREE_FORM = {"id": 4, "question": "How many?", "reference": "three", "video_path": "long.mp4"}
SHAPES = {"training": TRAINING, "validation": VALIDATION, "LongVideoBench": LONG_VIDEO, "SFT": SFT,
          "free-form": FREE_FORM}


def write_video(path, num_frames, fps=8, size=(64, 48), **container_options):
    """H.264 video of flat frames, each brighter by 6 than the one before (mod 240)."""
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), i * 6 % 240, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A data root with a video of 4 s, a png and nothing else."""
    root = tmp_path_factory.mktemp("root")
    for folder in ("annotations", "videos/Ego4D", "images/Ego4D"):
        (root / folder).mkdir(parents=True)
    write_video(root / "videos/Ego4D/clip.mp4", 32)
    write_video(root / "videos/long.mp4", 32)
    Image.fromarray(random_pixels(48, 64, 3)).save(root / "images/Ego4D/now.png")
    return root


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes are tokens, and so is "\\n\\n": a prompt put together from pieces must be cut where Qwen2-VL cuts it."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, "ĊĊ"]  # "Ċ" is how byte-level tokenizers spell a newline
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[("Ċ", "Ċ")]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (  # the part of Qwen2-VL's that concerns us
        "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
        "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
        "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
        "{% for content in message['content'] %}"
        "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% elif content['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
        "{% else %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    return tokenizer


def load(root, *records, text=None):
    path = root / "annotations" / "x.jsonl"
    path.write_bytes(text if text is not None else "\n".join(map(json.dumps, records)).encode())
    return data.load_questions(path, root)


# ----------------------------------------------------------------------------------------------------------------------
# Records.

def test_training_shape(root):
    (question,) = load(root, TRAINING)
    assert question == Question(
        "7", "What next?", (root / "videos/Ego4D/clip.mp4").resolve(), (root / "images/Ego4D/now.png").resolve(),
        answer="grab onion", negatives=NEGATIVES, goal="cut the onion", progress=("open drawer",))


def test_validation_shape_is_told_by_its_fields_though_it_has_an_answer_too(root):
    first, second = load(root, VALIDATION, {**VALIDATION, "sample_id": "b", "domain": "Hobbies"})
    assert first.options == ("grab onion", "grab knife", "wash", "close") and first.gold == "C" and first.part == ""
    assert first.answer == "" and first.negatives == () and second.part == "Hobbies"


def test_long_video_bench_shape(root):
    (question,) = load(root, LONG_VIDEO)
    assert question == Question("x_0", "Who is it?", (root / "videos/long.mp4").resolve(), None,
                            options=("a man", "a dog", "a cat"), gold="B", part="600")


def test_free_form_shape(root, tokenizer):
    (question,) = load(root, FREE_FORM)
    assert question == Question("4", "How many?", (root / "videos/long.mp4").resolve(), None, gold="three")
    example = data.VideoDataset([question], tokenizer, QWEN2_VL, SMALL, seed=0)[0, 0]
    assert example.options == () and example.gold == "three"
    assert example.prompt_text == "How many?\n" + data.FREE_FORM_INSTRUCTION


@pytest.mark.parametrize("extra", [{}, TRAINING])  # also where the SFT file repeats the fields of the training file
def test_sft_shape(root, extra):
    (question,) = load(root, {**extra, **SFT})
    assert question == Question("7" if extra else "1", "What next?\nA. x\nB. y",
                                (root / "videos/Ego4D/clip.mp4").resolve(), (root / "images/Ego4D/now.png").resolve(),
                                response=SFT["response"], has_id=bool(extra))


def test_sft_prompt_variants(root):
    def user(*content):
        return [{"role": "user", "content": content[0] if len(content) == 1 else list(content)}]

    text = {"type": "text", "text": " hi\n"}
    image = {"type": "image", "image": "images/i.png"}
    system = [{"role": "system", "content": data.SYSTEM}]
    system_list = [{"role": "system", "content": [{"type": "text", "text": data.SYSTEM, "image": None}], "name": None}]
    video = {"type": "video", "video": "videos/v.mp4"}
    prompts = [user(image, text), user(video, text), user(video, image, text), system + user(image, text),
               system_list + user(image, text)]
    questions = load(root, *({"prompt": prompt, "response": "r", "sample_id": i} for i, prompt in enumerate(prompts)))
    assert [question.text for question in questions] == [" hi\n"] * 5  # verbatim
    assert [question.image is not None for question in questions] == [True, False, True, True, True]
    assert [question.video is not None for question in questions] == [False, True, True, False, False]
    assert [question.id for question in questions] == list("01234")

    for prompt in (
        [], user([]), user(None), user(7), user([7]), user([image]), user(text, image), user(text, text),
        user(image, image, text), user(text, {"type": "audio", "audio": "a.wav"}), user({"type": "text"}),
        user([{"type": "text", "text": ""}]), user(" hi\n"), user([text]), user(image, {"type": "text", "text": ""}),
        user(image, text) * 2, [{"role": "assistant", "content": "x"}], [{"content": "x"}],
        [{"role": "system", "content": "Be rude."}] + user(image, text), system + system + user(image, text),
    ):
        with pytest.raises(ValueError, match="line 1: field 'prompt'"):
            load(root, {"prompt": prompt, "response": "r"})


def test_no_progress_means_no_video(root):
    for name in ("clip.mp4", "", None):
        (question,) = load(root, {**TRAINING, "task_progress_metadata": [], "video_basename": name})
        assert question.video is None and question.progress == () and question.image is not None


def test_list_lines_blank_lines_bom_and_unusual_separators(root):
    a, b = TRAINING, {**TRAINING, "sample_id": 8, "question": "one\u2028two"}
    want = load(root, a, b)
    assert len(want) == 2 and want[1].text == "one\u2028two"
    assert load(root, text=json.dumps([a, b]).encode()) == want
    assert load(root, text=json.dumps([a, b], indent=1).encode()) == want
    jsonl = json.dumps(a) + "\r\n\r\n  \n" + json.dumps(b, ensure_ascii=False) + "\n\n"
    assert load(root, text=b"\xef\xbb\xbf" + jsonl.encode()) == want


def test_relative_path_is_below_the_data_root(root):
    load(root, TRAINING)
    questions = data.load_questions("annotations/x.jsonl", root)
    assert questions == data.load_questions(root / "annotations/x.jsonl", str(root))
    with pytest.raises(ValueError, match="nowhere.jsonl"):
        data.load_questions("annotations/nowhere.jsonl", root)


def test_options_take_one_line(root):
    (question,) = load(root, {**TRAINING, "answer": " grab\n onion ", "negative_answers": ["x\nB. y"]})
    assert question.answer == "grab onion" and question.negatives == ("x B. y",)
    (question,) = load(root, {**VALIDATION, "choice_a": "x\nB. y"})
    assert question.options[0] == "x B. y"
    (question,) = load(root, {**LONG_VIDEO, "candidates": ["x\nB. y", "z "]})
    assert question.options == ("x B. y", "z")


@pytest.mark.parametrize("record", [
    {**VALIDATION, "choice_a": " grab  knife"}, {**LONG_VIDEO, "candidates": ["a", "b", "a "]}])
def test_equal_options_are_refused(root, record):
    with pytest.raises(ValueError, match="line 1: the options .* are not all different"):
        load(root, record)


REMOVED = object()
UNUSED = ("video_id", "current_observation_frame", "subtitle_path", "duration_group")
BAD_FIELDS = [  # shape, field, what is put there, what the message must say besides file, line and field
    *((shape, field, REMOVED, "missing") for shape, record in SHAPES.items() for field in record
      if field not in UNUSED and (shape, field) not in (("validation", "answer"), ("free-form", "reference"))),
    ("free-form", "reference", "", "''"), ("free-form", "reference", 3, "3"),
    ("free-form", "reference", " . ", "' . '"),
    ("training", "sample_id", True, "True"), ("training", "sample_id", 1.5, "1.5"), ("training", "sample_id", "", "''"),
    ("training", "sample_id", None, "missing"), ("training", "question", "  \n", "non-empty"),
    ("training", "question", 3, "3"),
    ("training", "answer", ["grab onion"], "grab onion"), ("training", "answer", "", "non-empty"),
    ("training", "negative_answers", [], "[]"), ("training", "negative_answers", "open", "'open'"),
    ("training", "negative_answers", ["open", 3], "3"), ("training", "negative_answers", ["open", ""], "''"),
    ("training", "negative_answers", ["grab onion", " grab onion "], "wrong action"),
    ("training", "negative_answers", None, "missing"),
    ("training", "task_progress_metadata", None, "missing"), ("training", "task_progress_metadata", "[]", "'[]'"),
    ("training", "task_progress_metadata", ["open"], "open"),
    ("training", "task_progress_metadata", [{"text": "x"}], "narration_text"),
    ("training", "video_basename", "", "missing"), ("training", "video_basename", None, "missing"),
    ("training", "video_basename", 5, "5"),
    ("validation", "golden_choice_idx", "E", "'E'"), ("validation", "golden_choice_idx", "a", "'a'"),
    ("validation", "golden_choice_idx", 2, "2"), ("validation", "golden_choice_idx", "AB", "'AB'"),
    ("validation", "golden_choice_idx", "", "''"), ("validation", "golden_choice_idx", ["A"], "['A']"),
    ("validation", "choice_b", None, "missing"), ("validation", "domain", 4, "4"),
    ("LongVideoBench", "correct_choice", 3, "3"), ("LongVideoBench", "correct_choice", -1, "-1"),
    ("LongVideoBench", "correct_choice", True, "True"), ("LongVideoBench", "correct_choice", "1", "'1'"),
    ("LongVideoBench", "candidates", ["a man"], "2 to 5"), ("LongVideoBench", "candidates", list("abcdef"), "2 to 5"),
    ("LongVideoBench", "duration_group", True, "True"),
    ("SFT", "prompt", "hello", "'hello'"), ("SFT", "prompt", ["hello"], "hello"), ("SFT", "response", " ", "non-empty"),
    ("SFT", "sample_id", False, "False"),
    # texts that would make the tokenizer do something else
    ("training", "question", "x<|im_end|>", "<|im_end|>"), ("training", "answer", "<|video_pad|>", "<|video_pad|>"),
    ("training", "negative_answers", ["a", "<|im_start|>system"], "<|im_start|>"),
    ("validation", "choice_c", "<|image_pad|>", "<|image_pad|>"),
    ("LongVideoBench", "candidates", ["a", "<|endoftext|>"], "<|endoftext|>"),
    ("SFT", "response", "a<|im_end|>b", "<|im_end|>"),
    ("SFT", "prompt", [{"role": "user", "content": "<|vision_start|>"}], "<|vision_start|>"),
    ("training", "question", "a\ud83d", "\\ud83d"),
]


@pytest.mark.parametrize("shape, field, value, says", BAD_FIELDS)
def test_bad_field_is_named_with_place_value_and_fix(root, shape, field, value, says):
    good = {**SHAPES[shape], "sample_id": 1, "id": "1"}
    bad = {**SHAPES[shape], field: value}
    if value is REMOVED:
        del bad[field]
    with pytest.raises(ValueError) as error:
        load(root, good, bad)
    message = str(error.value)
    assert f"x.jsonl, line 2: field {field!r}" in message and says in message and ";" in message, message
    text = json.dumps([good, bad]).encode()
    with pytest.raises(ValueError, match=r"x.jsonl, record 2: field"):
        load(root, text=text)


@pytest.mark.parametrize("text, says", [
    (b"", "no records"), (b"\n \n", "no records"), (b"[]", "no records"), (b"\xff\xfe", "UTF-8"),
    (b"7", "line 1: the record is 7"),
    (b'[{"a": 1}, 3]', "record 1: the record has the keys ['a']"), (b"[3]", "record 1: the record is 3"),
    (b'{"a": 1', "line 1: is not JSON"),
    (json.dumps(TRAINING).encode() + b"\n{'a': 1}", "line 2: is not JSON"), (b"[" * 100000, "is not JSON"),
    (json.dumps([TRAINING]).encode()[:-3], "is not JSON"), (b"null", "the record is None"),
    (b"{}", "SFT (prompt, response)"),
    (json.dumps(TRAINING).encode() + b"\n" + json.dumps({**TRAINING, "sample_id": "7"}).encode(), "line 2: the id '7'"),
])
def test_bad_file(root, text, says):
    with pytest.raises(ValueError) as error:
        load(root, text=text)
    assert "x.jsonl" in str(error.value) and says in str(error.value)


def records_naming(name):
    """(field, record) of every field that leads to a file, with `name` in it."""
    user = {"role": "user", "content": [{"type": "image", "image": name}, {"type": "text", "text": "q"}]}
    return [("video_basename", {**TRAINING, "video_basename": name}),
            ("video_basename", {**VALIDATION, "video_source": name}),
            ("current_observation_basename", {**TRAINING, "current_observation_basename": name}),
            ("video_path", {**LONG_VIDEO, "video_path": name}), ("prompt", {"prompt": [user], "response": "r"})]


@pytest.mark.parametrize("name", [
    "/etc/passwd", "/", "../../../../../../etc/passwd", "..", "a/../../b.mp4", "a/..", "http://host/x.mp4",
    "file:///etc/passwd", "s3://bucket/x.mp4", "x\0.mp4", "ROOT/videos/long.mp4"])
def test_paths_stay_inside_the_data_root(root, name):
    for field, record in records_naming(name.replace("ROOT", str(root))):
        with pytest.raises(ValueError, match=f"line 1: field '{field}' leads to .*; name a file below"):
            load(root, record)


def test_links_do_not_lead_out_of_the_data_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "root_of_another"  # one name begins with the other
    for folder in (root / "annotations", root / "videos", root / "images", outside):
        folder.mkdir(parents=True)
    for folder in (root, root / "videos", root / "images", root / "videos/Ego4D", root / "images/Ego4D"):
        folder.mkdir(exist_ok=True)
        (folder / "file").symlink_to(outside / "secret.mp4")  # which need not exist
        (folder / "folder").symlink_to("../" * len(folder.relative_to(tmp_path).parts) + outside.name)
    for name in ("file", "folder/x.mp4"):
        for field, record in records_naming(name):
            with pytest.raises(ValueError, match=f"field '{field}' leads to .*root_of_another"):
                load(root, record)


def test_names_that_cannot_be_resolved_are_no_crash(root):
    circle = root / "videos/circle.mp4"
    circle.symlink_to(circle)
    for name in ("circle.mp4", "x" * 5000):
        try:  # Python versions differ in whether these resolve
            (question,) = load(root, {**LONG_VIDEO, "video_path": name})
        except ValueError as error:
            assert "line 1: field 'video_path'" in str(error)
        else:
            assert question.video.is_relative_to(root.resolve())


def test_links_inside_the_data_root_are_followed(root):
    link = root / "videos/Ego4D/link.mp4"
    link.unlink(missing_ok=True)
    link.symlink_to(root / "videos/Ego4D/clip.mp4")
    (question,) = load(root, {**TRAINING, "video_basename": "link.mp4"})
    assert question.video == (root / "videos/Ego4D/clip.mp4").resolve()


# ----------------------------------------------------------------------------------------------------------------------
# Options.

def training_question(sample_id="7", answer="grab onion", negatives=NEGATIVES):
    return Question(sample_id, "q", None, None, answer=answer, negatives=tuple(negatives))


def test_options_are_the_same_in_every_process():
    """Written down once: `hash` or the order of a set would change from process to process."""
    assert [data.build_options(training_question(str(i)), seed=3, epoch=1) for i in range(3)] == [
        (("open drawer", "close door", "wash hands", "grab onion"), "D"),
        (("close door", "grab onion", "open drawer", "wash hands"), "B"),
        (("grab knife", "open drawer", "wash hands", "grab onion"), "D"),
    ]


def test_options_depend_on_seed_epoch_and_id_alone():
    keys = list(itertools.product(range(3), range(3), "abc"))
    forward = {key: data.build_options(training_question(key[2]), key[0], key[1]) for key in keys}
    backward = {key: data.build_options(training_question(key[2]), key[0], key[1]) for key in reversed(keys)}
    assert forward == backward
    for axis in range(3):  # each of the three matters: with the other two fixed, the options vary
        assert len({forward[key] for key in keys if all(key[i] == keys[0][i] for i in range(3) if i != axis)}) > 1


def test_options_are_distributed_evenly():
    negatives = [f"n{i}" for i in range(6)]
    gold, drawn = Counter(), Counter()
    for i in range(2000):
        options, letter = data.build_options(training_question(str(i), "yes", negatives), seed=0, epoch=0)
        assert len(options) == len(set(options)) == 4 and options["ABCD".index(letter)] == "yes"
        gold[letter] += 1
        drawn.update((position, option) for position, option in enumerate(options) if option != "yes")
    assert all(abs(count - 500) < 5 * (2000 * 0.25 * 0.75) ** 0.5 for count in gold.values()) and len(gold) == 4
    assert all(abs(count - 250) < 5 * 250**0.5 for count in drawn.values()) and len(drawn) == 24


@pytest.mark.parametrize("negatives, want", [
    (["a", "a", "b", "yes", "a"], {"yes", "a", "b"}), (["a"], {"yes", "a"}), (["a", "b", "c"], {"yes", "a", "b", "c"}),
    (["yes", "a", "b", "c"], {"yes", "a", "b", "c"})])
def test_few_or_repeated_negatives(negatives, want):
    for epoch in range(20):
        options, letter = data.build_options(training_question(negatives=negatives, answer="yes"), 0, epoch)
        assert set(options) == want and len(options) == len(want) and options["ABCD".index(letter)] == "yes"


def test_fixed_options_are_never_shuffled_and_sft_has_none():
    fixed = Question("1", "q", None, None, options=("d", "c", "b", "a"), gold="C")
    drawn = {data.build_options(fixed, seed, epoch) for seed in range(5) for epoch in range(5)}
    assert drawn == {(("d", "c", "b", "a"), "C")}
    assert data.build_options(Question("1", "q", None, None, response="r"), 0, 0) == ((), "")


def test_user_text():
    text = data.user_text("What next?", ("grab", "cut", "wash"))
    assert text == "What next?\nA. grab\nB. cut\nC. wash\n" + data.INSTRUCTION
    assert all(tag in data.INSTRUCTION for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    assert len(data.INSTRUCTION.split()) <= 25 and data.user_text(" as is \n", ()) == " as is \n"


# ----------------------------------------------------------------------------------------------------------------------
# Pixels.

@pytest.mark.parametrize("num_total, fps, frames, want_count", [
    (1, 30, PAPERS, 4), (2, 30, PAPERS, 4), (3, 30, PAPERS, 4), (30, 30, PAPERS, 4), (60, 30, PAPERS, 4),
    (89, 30, PAPERS, 4), (90, 30, PAPERS, 6), (237, 30, PAPERS, 14), (239, 30, PAPERS, 14), (240, 30, PAPERS, 16),
    (30000, 29.97, PAPERS, 16), (64, 8, SMALL, 8), (16, 8, SMALL, 4), (24, 8, SMALL, 6),
    (500, 25, PixelSettings(num_frames=32), 32),
    (100, 25, PixelSettings(fps=1.0), 4), (100, 25, PixelSettings(min_frames=2, num_frames=2), 2)])
def test_sample_frames(num_total, fps, frames, want_count):
    indices = data.sample_frames(num_total, fps, frames)[0]
    assert indices.dtype == np.int64 and len(indices) == want_count and want_count % 2 == 0
    assert indices[0] == 0 and indices[-1] == num_total - 1
    want = [i * (num_total - 1) / (want_count - 1) for i in range(want_count)]
    assert all(abs(got - exact) <= 0.5 for got, exact in zip(indices, want))


@pytest.mark.parametrize("num_total, fps", [(0, 30), (10, 0), (10, -1), (10, float("nan")), (10, float("inf"))])
def test_sample_frames_refuses(num_total, fps):
    with pytest.raises(ValueError, match="above 0"):
        data.sample_frames(num_total, fps, PixelSettings())


@pytest.mark.parametrize("field, value", [
    ("fps", 0), ("fps", float("nan")), ("min_frames", 3), ("min_frames", 0), ("num_frames", 2), ("num_frames", 15),
    ("image_size", 250), ("image_size", 0), ("timeout_s", 0), ("timeout_s", float("inf"))])
def test_frames_refuses(field, value):
    with pytest.raises(ValueError, match=f"{field} is"):
        PixelSettings(**{field: value})


@pytest.mark.parametrize("num_frames, fps, size, want_count", [
    (1, 8, (64, 48), 4), (2, 8, (64, 48), 4), (5, 8, (64, 48), 4), (20, 8, (40, 64), 4), (30, 8, (64, 48), 6),
    (39, 30, (64, 48), 4),
    (300, 25, (64, 48), 8)])
def test_video_frames_equal_another_decoder(tmp_path, num_frames, fps, size, want_count):
    """One frame, short videos, a long one (with B frames, and seeks between frames that are taken), against PyAV."""
    path = tmp_path / "clip.mp4"
    write_video(path, num_frames, fps, size)
    pixels, _ = data.read_video(path, SMALL)
    assert pixels.shape == (want_count, 56, 56, 3) and pixels.dtype == np.uint8
    with av.open(str(path)) as container:
        levels = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    assert len(levels) == num_frames
    want = [levels[i] for i in data.sample_frames(num_frames, fps, SMALL)[0]]
    assert np.abs(pixels.mean(axis=(1, 2, 3)) - want).max() < 2  # neighbours differ by 6
    assert pixels.std(axis=(1, 2)).max() < 2


def test_resize_is_bicubic_and_keeps_no_aspect(root):
    with Image.open(root / "images/Ego4D/now.png") as image:
        want = np.asarray(image.resize((56, 56), Image.Resampling.BICUBIC))
    assert np.array_equal(data.read_image(root / "images/Ego4D/now.png", SMALL)[0], want)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P", "CMYK"])
def test_images_of_every_mode_become_rgb(tmp_path, mode):
    Image.new("RGB", (30, 40), (200, 10, 30)).convert(mode).save(tmp_path / ("x.jpg" if mode == "CMYK" else "x.png"))
    pixels = data.read_image(next(tmp_path.iterdir()), SMALL)
    assert pixels.shape == (1, 56, 56, 3) and pixels.dtype == np.uint8


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    write_video(folder / "good.mp4", 64, size=(256, 256))
    write_video(folder / "fast.mp4", 64, size=(256, 256), movflags="faststart")
    content, index_first = (folder / "good.mp4").read_bytes(), (folder / "fast.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(content[: len(content) // 2])
    (folder / "truncated_behind_its_index.mp4").write_bytes(index_first[: len(index_first) * 6 // 10])
    (folder / "noise.mp4").write_bytes(content[:32] + np.random.default_rng(0).bytes(5000))
    (folder / "empty.mp4").touch()
    (folder / "folder.mp4").mkdir()
    Image.fromarray(random_pixels(64, 64, 3)).save(folder / "good.png")
    png = (folder / "good.png").read_bytes()
    (folder / "truncated.png").write_bytes(png[: len(png) // 2])
    (folder / "flipped.png").write_bytes(png[:40] + bytes([png[40] ^ 255]) + png[41:])
    (folder / "noise.png").write_bytes(b"no image")
    (folder / "empty.png").touch()
    os.mkfifo(folder / "fifo.png")
    os.mkfifo(folder / "fifo.mp4")
    return folder


@pytest.mark.parametrize("name", [
    "truncated.mp4", "truncated_behind_its_index.mp4", "noise.mp4", "empty.mp4", "folder.mp4", "missing.mp4"])
def test_unreadable_video_is_a_value_error(broken, name):
    with pytest.raises(ValueError) as error:
        data.read_video(broken / name, SMALL)
    assert str(broken / name) in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) > len(str(broken / name)) + 10  # and a reason
    assert ("No such file" in str(error.value)) == (name == "missing.mp4")


@pytest.mark.parametrize("name", ["truncated.png", "flipped.png", "noise.png", "empty.png", "fifo.png", "missing.png"])
def test_unreadable_image_is_a_value_error(broken, name):
    with pytest.raises(ValueError, match=name):
        data.read_image(broken / name, SMALL)


def test_image_that_would_fill_the_memory(broken, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64)
    with pytest.raises(ValueError, match="good.png: DecompressionBombError"):
        data.read_image(broken / "good.png", SMALL)


@pytest.fixture
def children(monkeypatch):
    """The ids of the processes that data.py forks; none may be left behind, not even as a zombie."""
    pids, fork = [], os.fork
    monkeypatch.setattr(os, "fork", lambda: (pid := fork()) and pids.append(pid) or pid)
    yield pids
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_hanging_decoder_is_stopped(broken, children, monkeypatch):
    """Opening a pipe that nobody writes to blocks inside C code; a handler for the alarm must not matter."""
    monkeypatch.setattr(data.decord, "VideoReader", lambda *_, **__: os.open(broken / "fifo.mp4", os.O_RDONLY))
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    start = time.monotonic()
    try:
        with pytest.raises(ValueError, match=r"good.mp4: .*longer than 0.3 s"):
            data.read_video(broken / "good.mp4", replace(SMALL, timeout_s=0.3))
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert time.monotonic() - start < 5 and len(children) == 1


@pytest.mark.parametrize("crash, says", [
    (lambda: os.kill(os.getpid(), signal.SIGKILL), "Killed"), (lambda: ctypes.string_at(0), "Segmentation"),
    (lambda: os._exit(3), "status 3"), (lambda: os._exit(0), "status 0"), (lambda: os.abort(), "Abort"),
    (lambda: sys.exit(1), "status 1"),
    (lambda: (_ for _ in ()).throw(MemoryError("9 GB\ntrace")), "MemoryError: 9 GB$")])
def test_crashing_decoder_is_reported(broken, children, monkeypatch, crash, says):
    monkeypatch.setattr(data.decord, "VideoReader", lambda *_, **__: (faulthandler.disable(), crash()))
    with pytest.raises(ValueError, match=rf"good.mp4: .*{says}"):
        data.read_video(broken / "good.mp4", SMALL)
    assert len(children) == 1


def test_decoding_leaves_nothing_behind(broken, children):
    count = lambda: len(os.listdir("/dev/fd"))
    before = count()
    for name in ("good.mp4", "noise.mp4", "good.mp4"):
        try:
            data.read_video(broken / name, SMALL)
        except ValueError:
            pass
    assert count() == before and len(children) == 3


def test_frames_are_cached_by_file_and_settings(broken, tmp_path, monkeypatch):
    path, cache = tmp_path / "clip.mp4", tmp_path / "cache"
    shutil.copy(broken / "good.mp4", path)
    frames = PixelSettings(image_size=28, num_frames=4, cache=str(cache))
    decoded, read = [], data.read_video
    monkeypatch.setattr(data, "read_video", lambda path, frames: decoded.append(path) or read(path, frames))
    (first, seconds), (again, same) = (data.cached_video(path, frames) for _ in range(2))
    assert len(decoded) == 1 and first.dtype == again.dtype == np.uint8
    assert np.array_equal(first, again) and np.array_equal(first, data.read_video(path, frames)[0])
    assert np.array_equal(seconds, same) and np.array_equal(seconds, data.read_video(path, frames)[1])
    assert [file.suffix for file in cache.iterdir()] == [".npy"]  # whole files only
    del decoded[:]
    for change in (dict(image_size=56), dict(num_frames=6), dict(min_frames=2), dict(fps=1.0)):
        data.cached_video(path, replace(frames, **change))
    assert len(decoded) == 4
    for timestamp, content in ((0, path.read_bytes()), (0, path.read_bytes() + b"more")):  # the file was changed
        path.write_bytes(content)
        os.utime(path, (timestamp, timestamp))
        data.cached_video(path, frames)
    assert len(decoded) == 6


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY"])
def test_damaged_cache_files_are_made_again(broken, tmp_path, damage):
    frames = PixelSettings(image_size=28, num_frames=4, cache=str(tmp_path))
    first, _ = data.cached_video(broken / "good.mp4", frames)
    cached, = tmp_path.iterdir()
    cached.write_bytes(damage)
    assert np.array_equal(data.cached_video(broken / "good.mp4", frames)[0], first)
    assert np.array_equal(np.load(cached), first)


def test_half_a_cache_file_is_never_seen(broken, tmp_path, monkeypatch):
    frames = PixelSettings(image_size=28, num_frames=4, cache=str(tmp_path))

    def full_disk(file, array):
        if isinstance(file, io.BytesIO):  # on its way from the child
            return save(file, array)
        file.write(b"half")
        raise OSError("64 requested and 32 written")  # as NumPy says it

    save = np.save
    monkeypatch.setattr(np, "save", full_disk)
    with pytest.warns(UserWarning, match="frame cache .* no room"):
        pixels, _ = data.cached_video(broken / "good.mp4", frames)
    assert np.array_equal(pixels, data.read_video(broken / "good.mp4", frames)[0])
    assert not list(tmp_path.iterdir())


def test_unreadable_videos_are_not_cached(broken, tmp_path):
    frames = PixelSettings(cache=str(tmp_path / "cache"))
    for path in (broken / "truncated.mp4", tmp_path / "missing.mp4"):
        for _ in range(2):
            with pytest.raises(ValueError, match=path.name):
                data.cached_video(path, frames)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("height, width", [(28, 28), (56, 56), (84, 28), (28, 140), (252, 252)])
def test_image_patches_equal_hugging_face(height, width):
    pixels = random_pixels(1, height, width, 3)
    patches, grid = data.patchify(pixels, QWEN2_VL)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 1280})
    want = processor(images=[Image.fromarray(pixels[0])], return_tensors="pt")
    assert grid.dtype == torch.int64 and torch.equal(grid, want["image_grid_thw"])
    assert patches.dtype == torch.uint8 and patches.shape == want["pixel_values"].shape
    assert torch.allclose(data.normalise(patches, QWEN2_VL), want["pixel_values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("F, height, width", [(2, 28, 28), (4, 56, 84), (6, 84, 56), (1, 28, 56)])
def test_video_patches_equal_a_loop(F, height, width):
    pixels = random_pixels(F, height, width, 3)
    patches, grid = data.patchify(pixels, QWEN2_VL)
    want = []
    for t in range(0, F, 2):
        for token_row in range(0, height, 28):  # tokens row by row, the four patches of a token row by row inside it
            for token_column in range(0, width, 28):
                for row, column in itertools.product((0, 14), (0, 14)):
                    patch = []
                    for channel in range(3):
                        for frame in (t, min(t + 1, F - 1)):
                            for y in range(token_row + row, token_row + row + 14):
                                for x in range(token_column + column, token_column + column + 14):
                                    value = pixels[frame, y, x, channel] / 255
                                    patch.append((value - QWEN2_VL.mean[channel]) / QWEN2_VL.std[channel])
                    want.append(patch)
    assert grid.tolist() == [[(F + 1) // 2, height // 14, width // 14]] and patches.dtype == torch.uint8
    values = data.normalise(patches, QWEN2_VL)
    assert values.dtype == torch.float32
    assert torch.allclose(values.double(), torch.tensor(want, dtype=torch.float64), rtol=0, atol=1e-6)


def test_patches_are_normalised_as_pixels_would_be():
    # To the last bit: patchify only moves numbers, so frames that were normalised before it must give the same patches.
    pixels = np.arange(256, dtype=np.uint8)[:, None, None, None].repeat(28, 1).repeat(28, 2).repeat(3, 3)
    values = torch.tensor(pixels).float().div(255).sub(torch.tensor(QWEN2_VL.mean)).div(torch.tensor(QWEN2_VL.std))
    patches, _ = data.patchify(pixels, QWEN2_VL)
    before = patches.clone()
    assert torch.equal(data.normalise(patches, QWEN2_VL), data.patchify(values.numpy(), QWEN2_VL)[0])
    assert torch.equal(patches, before)


def test_patches_of_a_still_video_are_those_of_the_image():
    image = random_pixels(1, 56, 56, 3)
    one, _ = data.patchify(image, QWEN2_VL)
    four, grid = data.patchify(image.repeat(4, axis=0), QWEN2_VL)
    assert grid.tolist() == [[2, 4, 4]] and torch.equal(four, torch.cat([one, one]))


@pytest.mark.parametrize("shape", [
    (2, 30, 28, 3), (2, 28, 14, 3), (3, 28, 28, 3), (0, 28, 28, 3), (2, 28, 28, 4), (2, 0, 28, 3), (5, 28, 28, 3)])
def test_patchify_refuses(shape):
    with pytest.raises(ValueError, match="pixels"):
        data.patchify(np.zeros(shape, np.uint8), QWEN2_VL)


def test_patchify_does_not_write_into_its_input():
    pixels = np.full((2, 28, 28, 3), 9, np.uint8)
    data.patchify(pixels, QWEN2_VL)
    assert (pixels == 9).all()


# ----------------------------------------------------------------------------------------------------------------------
# Tokens and positions.

GRIDS = [  # video, image
    (None, None), ((2, 4, 4), None), (None, (1, 4, 4)), ((2, 4, 6), (1, 6, 2)), ((8, 18, 18), (1, 18, 18)),
    ((1, 2, 2), (1, 2, 2))]


def as_grid(grid):
    return None if grid is None else torch.tensor([grid])


@pytest.mark.parametrize("video, image", GRIDS)
@pytest.mark.parametrize("text", [
    "What next?\nA. x\n\nB. y", "\n\nnewlines around\n\n", "  spaces  ", "\u00e9\u4e2d\U0001f600", "<think></think>"])
def test_prompt_equals_the_chat_template(tokenizer, video, image, text):
    content = [*({"type": kind} for kind, grid in (("video", video),
    ("image", image)) if grid), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    want = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    for kind, grid in (("video", video), ("image", image)):
        if grid:
            want = want.replace(f"<|{kind}_pad|>", f"<|{kind}_pad|>" * (grid[0] * grid[1] * grid[2] // 4))
    got = data.encode_prompt(tokenizer, QWEN2_VL, text, as_grid(video), as_grid(image))
    assert got.dtype == torch.int64 and got.ndim == 1
    assert got.tolist() == tokenizer(want, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(got) == want


@pytest.mark.parametrize("token", ["<|im_end|>", "<|video_pad|>", "<|image_pad|>", "<|endoftext|>", "<|im_start|>"])
def test_prompt_refuses_special_tokens_in_its_text(tokenizer, token):
    with pytest.raises(ValueError, match="video_pad|image_pad|im_|endof"):
        data.encode_prompt(tokenizer, QWEN2_VL, f"a {token}b")


@pytest.fixture(scope="module")
def qwen():
    config = Qwen2VLConfig(
        text_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, vocab_size=300,
                         rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}),
        vision_config=dict(depth=1, embed_dim=16, num_heads=2, hidden_size=16, mlp_ratio=1))
    return Qwen2VLModel(config)


def positions_of(tokenizer, ids, *grids):
    image_id, video_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    return data.rope_positions(ids, [as_grid(grid) for grid in grids if grid], 1, image_id, video_id)


@pytest.mark.parametrize("video, image", GRIDS)
def test_positions_equal_hugging_face(tokenizer, qwen, video, image):
    ids = data.encode_prompt(tokenizer, QWEN2_VL, "What next?", as_grid(video), as_grid(image))
    image_id, video_id = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    types = (ids == image_id).int() + 2 * (ids == video_id).int()
    want, _ = qwen.get_rope_index(ids[None], types[None], image_grid_thw=as_grid(image), video_grid_thw=as_grid(video))
    got = positions_of(tokenizer, ids, video, image)
    assert got.dtype == torch.int64 and torch.equal(got, want[:, 0])


@pytest.mark.parametrize("video, image", [*GRIDS[1:], ((16, 4, 4), (1, 4, 4)), ((16, 18, 18), (1, 18, 18)),
((5, 2, 8), None)])
def test_positions_equal_a_loop(tokenizer, video, image):
    """Also where a video has more time steps than rows and columns: text goes on from the largest position + 1."""
    want, position = [], 0
    before = f"<|im_start|>system\n{data.SYSTEM}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    between = "<|vision_end|><|vision_start|>" if image else "<|vision_end|>"
    for piece in (before, video, between if video else "", image, "<|vision_end|>" if image else "",
                  "q<|im_end|>\n<|im_start|>assistant\n"):
        if isinstance(piece, str):
            for _ in tokenizer(piece)["input_ids"]:
                want.append((position,) * 3)
                position += 1
        elif piece:
            time_steps, rows, columns = piece[0], piece[1] // 2, piece[2] // 2
            for t in range(time_steps):
                for row in range(rows):
                    for column in range(columns):
                        want.append((position + t, position + row, position + column))
            position += max(time_steps, rows, columns)
    ids = data.encode_prompt(tokenizer, QWEN2_VL, "q", as_grid(video), as_grid(image))
    assert positions_of(tokenizer, ids, video, image).T.tolist() == [list(triple) for triple in want]


@pytest.mark.parametrize("grids", [
    [], [(2, 4, 4)], [(1, 4, 4), (2, 4, 4)], [(2, 4, 4), (1, 4, 4), (1, 4, 4)], [(2, 4, 6), (1, 4, 4)], [(2, 4, 4),
    (1, 2, 2)]])
def test_positions_refuse_grids_that_do_not_fit(tokenizer, grids):
    ids = data.encode_prompt(tokenizer, QWEN2_VL, "q", as_grid((2, 4, 4)), as_grid((1, 4, 4)))
    assert positions_of(tokenizer, ids, (2, 4, 4), (1, 4, 4)).shape == (3, len(ids))
    with pytest.raises(ValueError, match="grids"):
        positions_of(tokenizer, ids, *grids)


# ----------------------------------------------------------------------------------------------------------------------
# Answers.

OPTIONS = ("grab onion", "grab knife", "A knife", "wash hands")
CONTENT = {  # a letter, and what counts as it between the tags
    "A": ["A", "grab onion", "(A) grab onion", "Grab onion", "GRAB ONION.", "grab onion.", "**Grab onion**"],
    "B": ["B", " B ", "\nB\n", "(B)", "[B]", "B)", "B.", "B:", "(B).", "(B):", "[B].", "B).", " grab knife\n",
          "**B**", "**B.**", "** (B) **", "**B. Grab knife.**", "B. Grab knife", "B. grab knife.", "(B) GRAB KNIFE",
          "B. grab knife", "B: grab knife", "(B) grab knife", "B) grab knife", "B.grab knife", "B.\ngrab knife"],
    "C": ["A knife", "C. A knife", "a knife", "A KNIFE."],
    "D": ["D", "[D]: wash hands"],
    None: [
        "E", "(E)", "Z.", "E. grab knife",  # the letter of no option, or not as a letter
        "Apple", "AB", "A or B", "A, B", "A/B", "A B", "A.B", "BBBB", "Answer: B", "B is right", "option B",
        "The answer is B.", "A\nB", "B grab knife", "2", "1", "b", "(b)", "\u0412", "\uff22",
        "**B", "B**", "****", "**", "*B*", "**b**", "**A or B**", "**B** or **C**",  # decoration that does not fit
        "\\boxed{B}", "'B'", "<B>", "(B", "(B]", "[B)", "B]", "((B))", "{B}",
        "B..", "B,", "B;", "B!", ".B", "( B )", "B .",
        "", "   ", ".", "()", "None",  # nothing
        "grab  onion", "grab", "grab onion grab knife", "grab onion..", "b. grab knife",  # not the text, or another's
        "A. grab knife", "B. grab onion", "B. knife", "B. B. grab knife", "A. knife", "B grab knife."],
}
COMPLETIONS = [
    ("<think>x</think><answer>B</answer>", "B"), ("<answer>B</answer>", "B"),
    ("<answer>A</answer> no: <answer>B</answer>", "B"),
    ("<answer>B</answer><answer>A", "B"), ("<answer>B</answer> and </answer>", "B"),
    ("<answer>B</answer><answer>", "B"),
    ("<answer>A</answer><answer>neither</answer>", None), ("<answer>A</answer><answer></answer>", None),
    ("<answer>A<answer>B</answer>", "B"), ("<answer>A <answer>B</answer></answer>", "B"),
    ("<answer>A</answer>B</answer>", "A"),
    ("</answer>B<answer>", None), ("<answer>B", None), ("B</answer>", None), ("B", None), ("", None),
    ("The answer is B.", None),
    ("<Answer>B</Answer>", None), ("<ANSWER>B</ANSWER>", None), ("<answer >B</answer>", None),
    ("< answer>B</ answer>", None),
    ("<answer>B<answer>", None), ("<answer>B<\\answer>", None), ("<answers>B</answers>", None),
    ("<think><answer>B</answer></think>", "B"),
    ("<answer>B</answer>" * 3 + "<answer>C</answer>", "C"), ("<answer>\n\n(C)\n</answer>\n", "C"),
    ("&lt;answer&gt;B&lt;/answer&gt;", None),
    ("<answer><b>B</b></answer>", None), ("<answer><think>B</think></answer>", None),
]


@pytest.mark.parametrize("completion, want", COMPLETIONS + [
    (f"<think>A or C?</think><answer>{text}</answer>", want) for want, texts in CONTENT.items() for text in texts])
def test_parse_answer(completion, want):
    assert data.parse_answer(completion, OPTIONS) == want


def test_parse_answer_with_options_that_clash():
    assert data.parse_answer("<answer>same</answer>", ("same", "same", "other")) is None
    assert data.parse_answer("<answer>B. same</answer>", ("same", "same", "other")) == "B"
    assert data.parse_answer("<answer>A. x</answer>", ("x", "A. x")) is None  # B, or the letter and text of A
    assert data.parse_answer("<answer>B</answer>", ("B", "A")) == "B"  # the prompt asks for the letter
    assert data.parse_answer("<answer>C</answer>", ("yes", "no")) is None
    assert data.parse_answer("<answer>E</answer>", tuple("vwxyz")) == "E"
    assert data.parse_answer("<answer>**kwargs**</answer>", ("args", "**kwargs**")) == "B"
    # Word for word wins; texts that a person could not tell apart give nothing.
    assert data.parse_answer("<answer>Yes</answer>", ("yes", "Yes")) == "B"
    assert data.parse_answer("<answer>YES.</answer>", ("yes", "Yes")) is None
    assert data.parse_answer("<answer></answer>", (".", "no")) is None
    assert data.parse_answer("<answer></answer>", ()) is None and data.parse_answer("<answer>A</answer>", ()) is None


@pytest.mark.parametrize("parse", [data.parse_answer, data.first_letter])
def test_parsers_take_linear_time(parse):
    for text in ("<answer>" * 50000, "<answer>B</answer>" * 50000, "<answer>" + "x" * 400000, "</answer>" * 50000,
                 "<answer>" + "*" * 200000 + "</answer>"):
        start = time.monotonic()
        parse(text, OPTIONS)
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("completion, want", [
    ("<answer>B</answer>", "B"), ("<answer> B. grab</answer>", "B"), ("<answer>Apple</answer>", "A"),
    ("<answer>(A)</answer>", None),
    ("<answer>A</answer><answer>B</answer>", "A"), ("<answer>E</answer>", None), ("<answer></answer>", None),
    ("B", None),
    ("<answer>b</answer>", None), ("<answer>\nC\n</answer>", "C"), ("<answer>A<answer>B</answer>", "A")])
def test_first_letter_is_the_published_grading(completion, want):
    assert data.first_letter(completion, OPTIONS) == want


def graded(completion, options, gold):
    no_ids = torch.empty(0, dtype=torch.int64)
    return data.grade(completion, data.Example(None, options, gold, "q", no_ids, no_ids))


@pytest.mark.parametrize("text, want", [
    ("<answer>B</answer>", ("B", True)), ("<answer>grab knife</answer>", ("B", True)),
    ("<answer>A</answer>", ("A", False)), ("B", (None, False))])
def test_a_choice_is_graded_by_its_letter(text, want):
    assert graded(text, OPTIONS, "B") == want


@pytest.mark.parametrize("text, want", [
    ("<answer> Three. </answer>", ("Three.", True)), ("<answer>three</answer>", ("three", True)),
    ("<answer>3</answer>", ("3", False)), ("<answer></answer>", (None, False)), ("three", (None, False)),
    ("<answer>two</answer> no: <answer>three</answer>", ("three", True))])
def test_a_free_form_answer_is_graded_by_its_text(text, want):
    assert graded(text, (), "three") == want


# ----------------------------------------------------------------------------------------------------------------------
# Order.

def test_every_epoch_sees_every_sample_once():
    stream = [pair for step in range(21)
              for pair in data.step_batch(step, prompts_per_step=4, num_questions=12, seed=5)]
    assert len(stream) == 84
    for epoch in range(7):
        part = stream[12 * epoch : 12 * epoch + 12]
        assert {pair[0] for pair in part} == {epoch} and sorted(pair[1] for pair in part) == list(range(12))
    assert len({tuple(pair[1] for pair in stream[i : i + 12]) for i in range(0, 84, 12)}) == 7  # each in its own order


def test_epochs_run_into_each_other_and_nothing_is_dropped():
    stream = [pair for step in range(14) for pair in data.step_batch(step, prompts_per_step=5, num_questions=7, seed=0)]
    assert Counter(stream) == Counter(itertools.product(range(10), range(7)))
    assert any(len({epoch for epoch, _ in data.step_batch(step, 5, 7, 0)}) == 2 for step in range(14))
    assert len(data.step_batch(0, prompts_per_step=20, num_questions=7, seed=0)) == 20  # more prompts than questions


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8, 11])
def test_ranks_share_out_the_batch_of_one_rank(world_size):
    for step in range(5):
        whole = data.step_batch(step, 8, 30, seed=1)
        parts = [data.step_batch(step, 8, 30, seed=1, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert [parts[j % world_size][j // world_size] for j in range(8)] == whole and sum(map(len, parts)) == 8


def test_the_step_number_alone_resumes():
    run = [data.step_batch(step, 3, 10, seed=2) for step in range(12)]
    data.epoch_order.cache_clear()
    assert [data.step_batch(step, 3, 10, seed=2) for step in reversed(range(12))] == run[::-1]
    assert run != [data.step_batch(step, 3, 10, seed=3) for step in range(12)]
    assert data.step_batch(0, 4, 10, seed=0) == [(0, 4), (0, 6), (0, 2), (0, 7)]  # on any machine
    assert all(type(number) is int for pair in run[0] for number in pair)


# ----------------------------------------------------------------------------------------------------------------------
# Dataset and loader.

def test_examples_of_all_shapes(root, tokenizer):
    questions = [load(root, record)[0] for record in SHAPES.values()]
    dataset = data.VideoDataset(questions, tokenizer, QWEN2_VL, SMALL, seed=0)
    assert len(dataset) == 5
    training, validation, long_video, sft = (dataset[0, i] for i in range(4))
    video, video_grid = data.patchify(data.read_video(root / "videos/Ego4D/clip.mp4", SMALL)[0], QWEN2_VL)
    image, image_grid = data.patchify(data.read_image(root / "images/Ego4D/now.png", SMALL), QWEN2_VL)
    assert video.shape == (64, 1176) and video_grid.tolist() == [[4, 4, 4]] and image_grid.tolist() == [[1, 4, 4]]
    for example in (training, validation, sft):
        assert example.error == ""
        assert torch.equal(example.pixel_values_videos, video) and torch.equal(example.video_grid_thw, video_grid)
        assert example.pixel_values_videos.dtype == example.pixel_values.dtype == torch.uint8  # bytes until a batch
        assert torch.equal(example.pixel_values, image) and torch.equal(example.image_grid_thw, image_grid)
        ids = data.encode_prompt(tokenizer, QWEN2_VL, example.prompt_text, video_grid, image_grid)
        assert torch.equal(example.prompt_ids, ids)
        assert torch.equal(example.position_ids, positions_of(tokenizer, ids, (4, 4, 4), (1, 4, 4)))
    assert long_video.pixel_values is None and long_video.image_grid_thw is None
    assert torch.equal(long_video.pixel_values_videos, video)
    assert (training.options, training.gold) == data.build_options(questions[0], 0, 0)
    assert training.prompt_text == data.user_text("What next?", training.options)
    assert (validation.gold, long_video.gold, sft.gold) == ("C", "B", "")
    assert sft.options == () and sft.prompt_text == questions[3].text
    epochs = [dataset[epoch, 0].options for epoch in range(6)]
    assert epochs == [data.build_options(questions[0], 0, epoch)[0] for epoch in range(6)] and len(set(epochs)) > 1


def test_image_only_examples(root, tokenizer):
    (question,) = load(root, {**TRAINING, "task_progress_metadata": []})
    image = data.VideoDataset([question], tokenizer, QWEN2_VL, SMALL, seed=0)[0, 0]
    assert image.pixel_values_videos is None and image.video_grid_thw is None and image.pixel_values.shape == (16, 1176)
    assert image.position_ids.shape == (3, len(image.prompt_ids)) and not image.error


@pytest.mark.parametrize("field", ["video_basename", "current_observation_basename"])
def test_unreadable_pixels_become_an_error_and_nothing_else(root, tokenizer, field):
    (question,) = load(root, {**TRAINING, field: "gone.mp4"})
    example = data.VideoDataset([question], tokenizer, QWEN2_VL, SMALL, seed=0)[0, 0]
    assert "gone.mp4" in example.error and example.question is question
    assert (example.options, example.gold) == data.build_options(question, 0, 0)
    assert example.prompt_ids.shape == (0,) and example.prompt_ids.dtype == torch.int64
    assert example.position_ids.shape == (3, 0) and example.pixel_values_videos is None and example.pixel_values is None
    assert example.video_grid_thw is None and example.image_grid_thw is None


@pytest.fixture
def dataset(root, tokenizer):
    names = ["clip.mp4", "clip.mp4", "gone.mp4", "clip.mp4", "clip.mp4"]
    questions = load(root, *({**TRAINING, "sample_id": i, "video_basename": name} for i, name in enumerate(names)))
    return data.VideoDataset(questions, tokenizer, QWEN2_VL, SMALL, seed=0)


def test_loader_keeps_the_order_with_and_without_workers(dataset):
    batches = [data.step_batch(step, 2, 5, seed=0) for step in range(6)] + [[]]
    inline = list(data.make_loader(dataset, batches, num_workers=0))
    ahead = list(data.make_loader(dataset, (batch for batch in batches), num_workers=2))
    assert [len(batch) for batch in inline] == [len(batch) for batch in ahead] == [2] * 6 + [0]
    for pairs, one, two in zip(batches, inline, ahead):
        for (epoch, index), a, b in zip(pairs, one, two):
            assert a.question == b.question == dataset.questions[index] and a.error == b.error
            assert a.options == b.options == data.build_options(a.question, 0, epoch)[0]
            assert torch.equal(a.prompt_ids, b.prompt_ids) and torch.equal(a.position_ids, b.position_ids)
            if index == 2:
                assert "gone.mp4" in a.error and a.pixel_values_videos is b.pixel_values_videos is None
            else:
                assert torch.equal(a.pixel_values_videos, b.pixel_values_videos)
                assert torch.equal(a.pixel_values, b.pixel_values)


class Slow(torch.utils.data.Dataset):
    """The first batch takes longest; every item tells when and how it was made."""

    def __getitem__(self, key):
        time.sleep(0.5 if key[1] == 0 else 0.01)
        return key, time.monotonic(), torch.get_num_threads(), os.getpid()


def test_workers_run_ahead_each_with_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        made = [batch[0] for batch in data.make_loader(Slow(), [[(0, i)] for i in range(4)], num_workers=2)]
    finally:
        torch.set_num_threads(threads)
    assert [key for key, *_ in made] == [(0, i) for i in range(4)]
    assert made[1][1] < made[0][1]  # the second batch was ready before the first, and still came second
    assert {threads for _, _, threads, _ in made} == {1} and len({pid for *_, pid in made}) == 2


def test_tensors_from_workers_hold_no_file_descriptors(dataset):
    count = lambda: len(os.listdir("/dev/fd"))
    loader = iter(data.make_loader(dataset, [[(0, 0), (0, 1), (0, 3)]] * 10, num_workers=1))
    kept = [next(loader)]
    before = count()
    kept += list(loader)
    assert sum(len(batch) for batch in kept) == 30 and count() < before + 20  # of 30 x 6 tensors


def test_a_hung_video_does_not_stop_the_loader(root, tokenizer, broken, monkeypatch):
    good, hung = load(root, TRAINING, {**TRAINING, "sample_id": 8})
    questions = [good, replace(hung, video=broken / "good.mp4")]
    decode = data.decode_video
    monkeypatch.setattr(data, "decode_video", lambda path, settings: decode(path, settings)
                        if path == good.video else time.sleep(60))
    dataset = data.VideoDataset(questions, tokenizer, QWEN2_VL, replace(SMALL, timeout_s=0.5), seed=0)
    (batch,) = data.make_loader(dataset, [[(0, 1), (0, 0)]], num_workers=1)
    assert "longer than 0.5 s" in batch[0].error and batch[1].error == ""
