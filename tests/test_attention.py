"""attention.py against Hugging Face's eager attention, brute force, and controls whose diagonal is known."""
import dataclasses
import itertools
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText

import attention
import attention_report
import data
import tiny
import toy
from attention import (
    Args,
    Recorder,
    diagonal,
    forced_pass,
    interval,
    key_groups,
    look,
    measure,
    pick_heads,
    token_kinds,
)
from conftest import ROOT
from data import FAMILIES, VideoDataset, load_questions
from model import collate_prompts, embed_prompts
from runtime import load_family, load_sampler, load_tokenizer
from test_families import hf_inputs, own_positions
from tiny import LIKE_QWEN3

LIST = "Which steps does the video show?"  # the base answers it by looking (assets/toy_base/README.md)
SAID = "<think>I see wash pot still, cut onion. Next is wash pot (B).</think><answer>B</answer><|im_end|>"
STEPS = ("wash pot", "cut onion")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return str(tiny.write(tmp_path_factory.mktemp(request.param) / "model", request.param))


def load(model, device, dtype="float64"):
    return load_sampler(SimpleNamespace(model=str(model), dtype=dtype), device)


def read_example(model, world, image_size, number=0):
    """Of the world's questions with a video and an image, one with its 16 frames."""
    questions = [q for q in load_questions("annotations/validation_L1.jsonl", world) if len(set(q.progress)) > 1]
    settings = dataclasses.replace(toy.PIXELS, image_size=image_size)
    return VideoDataset(questions, load_tokenizer(model), load_family(model), settings, seed=0)[0, number]


@pytest.fixture(scope="module")
def case(folder, device, world):
    """(qwen, tokenizer, example, ids) of each family, in float64; of each time step 2 x 2 tokens."""
    qwen, tokenizer = load(folder, device), load_tokenizer(folder)
    example = read_example(folder, world, 64 if qwen.config.model_type in LIKE_QWEN3 else 56)
    return qwen, tokenizer, example, torch.tensor(tokenizer(SAID)["input_ids"])


def num_layers(qwen) -> int:
    """Those with attention."""
    return 1 if qwen.config.model_type == "qwen3_5" else 4


@pytest.fixture(scope="module")
def qwen2_folder(tmp_path_factory):
    return str(tiny.write(tmp_path_factory.mktemp("qwen2") / "model", "qwen2_vl"))


# ----------------------------------------------------------------------------------------------------------------------
# The recorder.

def test_weights_are_hugging_faces(case, folder):
    # Broken: scale of hidden_size / heads (Qwen3-VL's heads are wider), a query too early, the causal mask left out.
    qwen, _, example, ids = case
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    with torch.no_grad():
        out = theirs.eval()(**hf_inputs(qwen, example, ids), position_ids=own_positions(example, len(ids)),
                     output_attentions=True)
    num_keys, first = len(example.prompt_ids) + len(ids) - 1, len(example.prompt_ids) - 1
    logps, recorder = forced_pass(qwen, example, ids, columns=torch.eye(num_keys, dtype=torch.bool))
    ours, entropy = recorder.result()
    want = torch.stack(out.attentions)[:, 0, :, first:-1, :-1].numpy()  # (L, H, C, T)
    assert ours.shape == want.shape == (num_layers(qwen), 4, len(ids), num_keys)
    np.testing.assert_allclose(ours, want, rtol=0, atol=1e-6)  # theirs is a softmax in float32
    np.testing.assert_allclose(entropy, -(want * np.log(want, where=want > 0, out=0 * want)).sum(-1), atol=1e-5)
    logits = out.logits[0, first:-1].index_fill(1, attention.vision_token_ids(qwen, ids.device), -torch.inf)
    torch.testing.assert_close(logps, logits.log_softmax(-1).gather(1, ids[:, None])[:, 0], rtol=0, atol=1e-5)


def test_the_size_of_chunks_changes_nothing(case, monkeypatch):
    # Broken: `places` cut from 0 on and not from the first recorded query.
    qwen, _, example, ids = case
    columns, _ = key_groups(qwen.config, example, len(example.prompt_ids) + len(ids) - 1)
    hidden, found = columns[:, 3], []
    for size in (64, 1, 7):
        monkeypatch.setattr(attention, "CHUNK", size)
        logps, recorder = forced_pass(qwen, example, ids, columns=columns, hidden=hidden)
        found.append((logps.numpy(), *recorder.result()))
    for other in found[1:]:
        for ours, theirs in zip(found[0], other):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)
    assert (found[0][1][..., 3] == 0).all() and (found[0][1][..., 2] > 0).all()


def test_summing_over_heads_at_once_is_summing_afterwards(case):
    qwen, _, example, ids = case
    columns, _ = key_groups(qwen.config, example, len(example.prompt_ids) + len(ids) - 1)
    heads = torch.rand(num_layers(qwen), 4, dtype=torch.float64)
    _, whole = forced_pass(qwen, example, ids, columns=columns)
    _, at_once = forced_pass(qwen, example, ids, columns=columns, heads=heads)
    want = (whole.result()[0] * heads.numpy()[:, :, None, None]).sum((0, 1))
    np.testing.assert_allclose(at_once.result()[0].sum((0, 1)), want, atol=1e-12)


def test_what_is_hidden_has_no_influence():
    # Broken: hiding in the first chunk alone; hiding from the prompt too.
    torch.manual_seed(0)
    first, hidden = 6, torch.zeros(80, dtype=torch.bool)
    hidden[2:4] = True
    query, key, value = (torch.randn(heads, 80, 5, dtype=torch.float64) for heads in (4, 2, 2))
    before = Recorder(first, hidden=hidden).attend(0, query, key, value)
    seeing = Recorder(first).attend(0, query, key, value)
    for x in (key, value):
        x[:, hidden] += 3
    after = Recorder(first, hidden=hidden).attend(0, query, key, value)
    assert torch.equal(before[first:], after[first:]) and not torch.equal(before[4:first], after[4:first])
    assert (seeing[first:] - before[first:]).abs().amin(dim=(1, 2)).min() >= 0
    assert not torch.equal(seeing[first:], before[first:]) and torch.equal(seeing[:first], before[:first])


def test_a_model_of_one_layer_does_not_see_what_is_hidden(qwen2_folder, device, world):
    """In more layers the prompt's own tokens pass on what they have read."""
    qwen, example = load(qwen2_folder, device), read_example(qwen2_folder, world, 56)
    qwen.model.language_model.layers = qwen.model.language_model.layers[:1]
    ids = torch.tensor(load_tokenizer(qwen2_folder)(SAID)["input_ids"])
    columns, _ = key_groups(qwen.config, example, len(example.prompt_ids) + len(ids) - 1)
    hidden = columns[:, 4:8].any(dim=1)
    embeds = embed_prompts(qwen, collate_prompts([example], device))
    changed = embeds.clone()
    changed[hidden[:len(embeds)]] += 1
    (a, _), (b, _), (c, _) = (forced_pass(qwen, example, ids, e, hidden=hidden) if hide else
                              forced_pass(qwen, example, ids, e)
                              for e, hide in ((embeds, True), (changed, True), (changed, False)))
    assert torch.equal(a, b) and not torch.allclose(b, c, atol=1e-3)


def test_no_more_than_a_chunk_of_a_layer_exists(qwen2_folder, device, world):
    """At the real shape, 16 frames of 252 pixels: 648 vision tokens and an image's 81."""
    # Broken: CHUNK of 10,000, (H, 100, T); the prompt in three dimensions, for which torch writes down (H, P, P).
    qwen, example = load(qwen2_folder, device, "float32"), read_example(qwen2_folder, world, 252)
    ids = torch.randint(0, 250, (100,))
    num_keys = len(example.prompt_ids) + len(ids) - 1
    columns, grid = key_groups(qwen.config, example, num_keys)
    assert grid == (8, 9, 9) and columns.sum() == 648 + 81 and columns[:, :2].sum(0).tolist() == [45, 36]
    embeds, sizes = embed_prompts(qwen, collate_prompts([example], device)), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, (tuple, list)) else [out])
                         if isinstance(x, torch.Tensor) and x.is_floating_point())
            return out

    with Watch():
        forced_pass(qwen, example, ids, embeds, columns=columns)
    assert max(sizes) == 4 * attention.CHUNK * num_keys < 4 * num_keys**2 / 10


# ----------------------------------------------------------------------------------------------------------------------
# Tokens.

def test_keys_belong_to_their_time_step_and_half(case):
    """By the positions of M-RoPE, and of Qwen3-VL and Qwen3.5 by the vision_start tokens before."""
    qwen, _, example, _ = case
    columns, grid = key_groups(qwen.config, example, len(example.prompt_ids) + 5)
    assert grid == (8, 2, 2) and columns.shape[1] == 17
    times = sorted(set(example.position_ids[0][example.prompt_ids == qwen.config.video_token_id].tolist()))
    for i, token in enumerate(example.prompt_ids.tolist()):
        want = []
        if token == qwen.config.image_token_id:
            want = [16]
        elif token == qwen.config.video_token_id:
            time, height = example.position_ids[:2, i].tolist()
            step = times.index(time)
            if qwen.config.model_type in LIKE_QWEN3:
                step = (example.prompt_ids[:i] == qwen.config.vision_start_token_id).sum().item() - 1
            same = example.prompt_ids == qwen.config.video_token_id
            if qwen.config.model_type in LIKE_QWEN3:
                same &= (example.position_ids[0] == time)
            want = [2 * step + (height > example.position_ids[1][same].min().item())]
        assert columns[i].nonzero()[:, 0].tolist() == want
    assert not columns[len(example.prompt_ids):].any()


@pytest.mark.parametrize("text, reasoning, answer, named", [
    (SAID, "I see wash pot still, cut onion. Next is wash pot (B).", "B", [
        "wash 0 0", "pot 0 1", "cut 1 0", "onion 1 1"]),
    ("I see cut onion.<|im_end|>", "I see cut onion.", "", ["cut 1 0", "onion 1 1"]),
    ("<think>I cut the onion. (B) is wash pot.</think><answer>(B)</answer>", "I cut the onion. (B) is wash pot.", "(B)",
     ["cut 1 0", "the 1 1", "onion 1 1"]),
    ("<think>First wash pot, then", "First wash pot, then", "", ["wash 0 0", "pot 0 1"]),
    ("<answer>A</answer><answer>wash pot</answer>", "", "wash pot", []),
    ("", "", "", []),
])
def test_kinds_of_tokens(tokenizer, text, reasoning, answer, named):
    # Broken: "Next is wash pot" taken for a step that was done; the first of two answers.
    tokens = attention.token_texts(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(tokens) == text
    kinds, found = token_kinds(tokens, STEPS)
    said = {kind: "".join(tokens[i] for i in rows) for kind, rows in kinds.items()}
    assert (said["reasoning"], said["answer"]) == (reasoning, answer)
    assert [f"{tokens[i].strip()} {step} {word}" for i, step, word in found] == named
    assert kinds["step"] == sorted({i for i, *_ in found})


def test_tokens_that_are_parts_of_words_and_of_characters():
    pieces = ["<", "think", ">I ", "wa", "sh the p", "ot", ".", "</", "think>"]
    kinds, named = token_kinds(pieces, STEPS)
    assert kinds["reasoning"] == [2, 3, 4, 5, 6] and named == [(3, 0, 0), (4, 0, 1), (5, 0, 1)]


def test_the_time_steps_are_the_beats(world):
    args = Args(data_root=str(world), image_size=56)
    shown = attention.shown_steps(args)
    questions = {q.id: q for q in load_questions(args.eval_file, world)}
    assert shown.keys() == {q.id for q in questions.values() if q.video}
    for key, beats in shown.items():
        assert len(beats) == 8 and [step for step, _ in itertools.groupby(beats)] == list(questions[key].progress)
    for num_total in (32, 48):
        indices, _ = data.sample_frames(num_total, toy.NATIVE_FPS, toy.PIXELS)
        assert (indices * 8 // num_total).tolist() == [beat for beat in range(8) for _ in (0, 1)]
    own = dataclasses.replace(args, eval_file=str(ROOT / "docs/own_multiple_choice.jsonl"))
    assert attention.shown_steps(own) == {}


# ----------------------------------------------------------------------------------------------------------------------
# Measures with known values.

def test_uniform_attention_has_the_uniform_share(case):
    # Broken: the uniform share of the token after, and of all T keys.
    qwen, tokenizer, example, ids = case
    question = dataclasses.replace(example.question, progress=STEPS)
    shown, example = ["wash pot"] * 3 + ["cut onion"] * 5, dataclasses.replace(example, question=question)
    layers = [layer for layer in qwen.model.language_model.layers if hasattr(layer, "self_attn")]
    kept = [layer.self_attn.q_proj.weight.clone() for layer in layers]
    biases = [layer.self_attn.q_proj.bias for layer in layers]
    try:
        for layer in layers:
            layer.self_attn.q_proj.weight.zero_()
            layer.self_attn.q_proj.bias = None
        one = measure(qwen, tokenizer, example, ids, shown, None)
    finally:
        for layer, weight, bias in zip(layers, kept, biases):
            layer.self_attn.q_proj.weight.copy_(weight)
            layer.self_attn.q_proj.bias = bias
    assert set(one["kinds"]) == {"reasoning", "answer", "step"}
    for found in one["kinds"].values():
        np.testing.assert_allclose(found["vision"], found["uniform_vision"], rtol=1e-9)
        np.testing.assert_allclose(found["frames"], np.tile(found["uniform_frames"], (num_layers(qwen), 1)), rtol=1e-9)
        np.testing.assert_allclose(found["entropy"], np.log(36), rtol=1e-9)
        assert found["uniform_frames"].sum() == pytest.approx(found["uniform_vision"] * 32 / 36)
    np.testing.assert_allclose(one["place"], 0.5)
    np.testing.assert_allclose(one["diagonal"], (3 / 8 + 5 / 8) / 2)


def test_a_diagonal_is_found_and_a_habit_is_at_chance():
    """Heads made by hand: one looks where the step is, two somewhere by habit, one does both."""
    # Broken: a mean over tokens in place of steps puts the last frame at 0.5, over 1/3.
    rng, rows, columns = np.random.default_rng(0), [[0], [1, 4], [2, 3, 5]], [[0], [1, 2, 4], [6, 7]]
    weights = np.zeros((1, 5, 6, 8))
    for n, (tokens, times) in enumerate(zip(rows, columns)):
        for token in tokens:
            weights[0, 0, token, times] = 0.1 / len(times)
            weights[0, 3, token, times] = 0.06 / len(times)
            weights[0, 3, token, columns[(n + 1) % 3]] += 0.02 / len(columns[(n + 1) % 3])
            weights[0, 4, token, 3] = 0.5  # a time step of none of them
    weights[0, 1, :, 7] = 0.3
    weights[0, 2] = rng.random(8)
    found = diagonal(weights, rows, columns)
    np.testing.assert_allclose(found[0], [1, 1 / 3, 1 / 3, 0.75, 1 / 3], rtol=1e-6)
    pooled = weights[0, 1, rows[2], 7].sum() / weights[0, 1, :, 7].sum()
    assert pooled == pytest.approx(0.5)


def test_a_diagonal_is_that_of_loops():
    rng, rows, columns = np.random.default_rng(1), [[3], [0, 2]], [[1, 5], [0, 2, 3]]
    weights = rng.random((2, 3, 4, 6))
    for layer, head in itertools.product(range(2), range(3)):
        shares = []
        for n in range(2):
            given = [sum(weights[layer, head, token, t] for token in rows[n] for t in times) for times in columns]
            shares.append(given[n] / sum(given))
        assert diagonal(weights, rows, columns)[layer, head] == pytest.approx(sum(shares) / 2)


@pytest.mark.parametrize("values", [[0.2, 0.9, 0.4, 0.5, -0.3], [0, 0, 0, 0, 1]])
def test_bootstrap_is_that_of_all_resamples(values):
    means = [sum(drawn) / 5 for drawn in itertools.product(values, repeat=5)]  # all 3,125, equally likely
    found = interval(values)
    assert (found["n"], found["mean"]) == (5, pytest.approx(np.mean(values)))
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.02)
    assert interval([0.3]) == {"n": 1, "mean": 0.3, "low": pytest.approx(0.3), "high": pytest.approx(0.3)}
    assert interval([]) is None


def test_heads_are_picked_by_the_other_half():
    # Broken: `half::2`, with which noise scores 0.25 in the half that it was picked by.
    scores = np.random.default_rng(0).normal(size=(60, 6, 8))
    heads = pick_heads(scores)
    assert heads.shape == (2, 6, 8) and (heads.sum((1, 2)) == 1).all() and ((heads > 0).sum((1, 2)) == 4).all()
    crossed = np.mean([(score * heads[n % 2]).sum() for n, score in enumerate(scores)])
    leaking = np.mean([(score * heads[1 - n % 2]).sum() for n, score in enumerate(scores)])
    assert abs(crossed) < 2.5 / np.sqrt(4 * 60) and leaking > 0.2
    scores[::2] += 100 * np.random.default_rng(1).normal(size=(30, 6, 8))  # even questions choose for odd ones alone
    assert np.array_equal(pick_heads(scores)[0], heads[0]) and not np.array_equal(pick_heads(scores)[1], heads[1])
    scores[:, 2, 5] += 1000
    assert (pick_heads(scores)[:, 2, 5] == 0.25).all()


# ----------------------------------------------------------------------------------------------------------------------
# Controls: models that look, and such that do not.

@pytest.fixture(scope="module")
def flags(world, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("frames"))
    return partial(Args, data_root=str(world), image_size=56, max_completion_length=64, num_workers=0, batch_size=16,
                   dtype="float32", frame_cache=cache)


@pytest.fixture(scope="module")
def looked(flags, device, tmp_path_factory):
    """The whole run on two models that are asked to list: one that has learned it, and one of random weights."""
    folder = tmp_path_factory.mktemp("run")
    random = str(tiny.write(folder / "model", "qwen2_vl"))
    args = flags(model=["toy", random], num_questions=16, question=LIST, words="true",
                 output_dir=str(folder / "out"))
    return attention.main(args), folder / "out"


def test_a_run_on_qwen3_5_where_the_teacher_does_not_say_again_what_the_prompt_has_begun(flags, device, tmp_path):
    folder = str(tiny.write(tmp_path / "model", "qwen3_5"))
    table, = attention.main(flags(model=[folder], num_questions=6, words="true", image_size=64,
                                  output_dir=str(tmp_path / "out")))
    texts = ["".join(sample["tokens"]) for sample in table["samples"]]
    assert texts and all(text.startswith("I see") and text.count("</think>") == 1 for text in texts)
    assert all(sample["token_kinds"]["step"] for sample in table["samples"])


def test_who_lists_the_steps_looks_at_them(looked):
    # Broken: time steps shifted by one; others hidden; its own video shown for another one.
    (seeing, _), _ = looked
    assert seeing["questions"] == 16 and seeing["time_steps"] == 8
    assert seeing["diagonal"]["picked"]["mean"] > 0.8 and seeing["diagonal"]["chance"] < 0.45
    assert seeing["diagonal"]["picked_above_chance"]["low"] > 0.3
    assert seeing["place"]["picked"]["low"] > 0.8
    assert seeing["hiding"]["difference"]["low"] > 3 and abs(seeing["hiding"]["others"]["mean"]) < 0.1
    assert seeing["hiding"]["other_video"]["low"] > 3
    # It counts: it looks at the same time steps whatever they show.
    assert abs(seeing["diagonal"]["other_video"]["mean"] - seeing["diagonal"]["picked"]["mean"]) < 0.05


def test_random_weights_look_nowhere(looked):
    (_, blind), _ = looked
    for key in ("diagonal", "place"):
        assert blind[key]["picked"]["mean"] == pytest.approx(blind[key]["chance"], abs=0.03)
    assert blind["hiding"]["difference"]["low"] < 0 < blind["hiding"]["difference"]["high"] < 0.1


def test_where_vision_is_shuffled_nothing_is_lost(flags, world, device, monkeypatch):
    """The base sees each time step at the place of another."""
    def shuffled(qwen, prompts):
        embeds, video = embed_prompts(qwen, prompts).clone(), prompts.ids == qwen.config.video_token_id
        if video.any():
            embeds[video] = embeds[video].unflatten(0, (8, 4))[[3, 7, 5, 0, 6, 2, 1, 4]].flatten(0, 1)
        return embeds

    monkeypatch.setattr(attention, "embed_prompts", shuffled)
    args = flags(model=str(toy.BASE), question=LIST, words="true", num_questions=16)
    questions = [dataclasses.replace(q, text=LIST, options=(), gold="")
                 for q in load_questions(args.eval_file, world)[:16]]
    table = look(args, questions, attention.shown_steps(args), device)
    assert table["hiding"]["difference"]["high"] < 0.5
    assert table["diagonal"]["picked"]["mean"] > 0.8  # a map that looks right, and explains nothing


# ----------------------------------------------------------------------------------------------------------------------
# What is written.

def test_the_file_has_what_its_docstring_says(looked, capsys):
    tables, folder = looked
    results = json.loads((folder / "attention.json").read_text())
    assert results["settings"]["model"] == [str(toy.BASE), tables[1]["model"]] and len(results["models"]) == 2
    for table in results["models"]:
        assert {"model", "questions", "image_only", "unreadable", "time_steps", "max_entropy", "kinds", "diagonal",
                "place", "hiding", "samples_heads", "samples"} <= table.keys()
        layers, heads = np.shape(table["diagonal"]["heads"])
        assert table["kinds"].keys() == {"reasoning", "step"}  # a list has no answer
        for of_kind in table["kinds"].values():
            assert np.shape(of_kind["vision"]) == np.shape(of_kind["entropy"]) == (layers,)
            assert np.shape(of_kind["frames"]) == (layers, 8) and np.shape(of_kind["uniform_frames"]) == (8,)
        assert len(table["diagonal"]["picked_heads"]) == 2 and table["hiding"]["steps"] > 20
        assert len(table["samples"]) == table["questions"] - table["image_only"] > 10
        for one in table["samples"]:
            frames, places = attention_report.unpack(one["frames"]), attention_report.unpack(one["places"])
            assert frames.shape == (len(one["tokens"]), 8) and places.shape == (len(one["placed"]), 8, 2, 2)
            np.testing.assert_allclose(places.sum((2, 3)), frames[one["placed"]], atol=4 * one["frames"]["scale"])
            assert 0 <= frames.min() and frames.sum(1).max() < 1.02
            assert [one["steps"][step] for step in one["shown"]] and all(0 <= i < len(frames) for i, *_ in one["named"])
    for name in ("attention", "attention_tokens", "attention_frames"):
        assert (folder / f"{name}.png").stat().st_size > 20_000
    attention_report.print_layers(results["models"][0])
    attention_report.print_models(results["models"])
    printed = capsys.readouterr().out
    assert "is on vision tokens (uniform: " in printed and "(95% bootstrap" in printed
    seeing, blind = printed.splitlines()[-2:]
    assert "toy_base: " in seeing
    assert "its words look, whatever is shown there, at the time steps of the step that they name (8" in seeing
    assert "; they need these time steps: " in seeing and "; they do not need these time steps: " in blind


def test_numbers_are_packed_in_bytes():
    values = np.random.default_rng(0).random((3, 4, 2))
    packed = attention.pack(values)
    np.testing.assert_allclose(attention_report.unpack(packed), values, atol=values.max() / 510 + 1e-12)
    assert (attention_report.unpack(attention.pack(np.zeros((2, 2)))) == 0).all()


def test_images_alone_and_unreadable_videos_are_counted(flags, world, device, tmp_path, qwen2_folder):
    args = flags(model=qwen2_folder, num_questions=9)
    questions = load_questions(args.eval_file, world)
    alone, seen = [q for q in questions if not q.video][:2], [q for q in questions if q.video][:3]
    broken = dataclasses.replace(seen[0], id="broken", video=tmp_path / "nothing.mp4")
    table = look(args, [*alone, broken, *seen], attention.shown_steps(args), device)
    assert (table["questions"], table["image_only"], table["unreadable"]) == (5, 2, 1)
    assert len(table["samples"]) == 3 and table["time_steps_questions"] == 3
    with pytest.raises(ValueError, match="of 1 questions none could be read"):
        look(args, [broken], {}, device)


def test_flags_that_cannot_work_are_refused(flags, tmp_path):
    with pytest.raises(ValueError, match="--words 'mine': must be own or true"):
        Args(words="mine")
    (tmp_path / "annotations").mkdir()
    record = {"id": 1, "question": "What?", "candidates": ["a", "b"], "correct_choice": 0, "video_path": "x.mp4"}
    (tmp_path / "annotations/own.jsonl").write_text(json.dumps(record))
    args = flags(data_root=str(tmp_path), model=[str(toy.BASE)], eval_file="annotations/own.jsonl", words="true",
                 output_dir=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="only the toy world has a teacher"):
        attention.main(args)
    assert not (tmp_path / "out").exists()
