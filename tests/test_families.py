"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5 as tiny random models, against Hugging Face's own classes and processors.

Each was seen to fail with the difference between the families taken out; where that is a number, it stands there.
"""
import copy
import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

import data
import tiny
from conftest import same_gradients
from data import FAMILIES, PixelSettings, VideoDataset, load_questions, normalise
from model import Policy, collate_prompts, mask_from_lengths, vision_token_ids
from runtime import load_family, load_sampler, load_tokenizer
from sampler import generate
from test_model import load_args
from tiny import LIKE_QWEN3

ENDS = list(range(0, 397, 16))  # tokens that end a completion: so many, that lengths are ragged
# 5 x 5 tokens for the first two, 4 x 4 for Qwen3-VL: more than a window, and no multiple of one.
PIXELS = {family: PixelSettings(fps=0.5, image_size=128 if family in LIKE_QWEN3 else 140) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="module")
def qwen(folder, device):
    return load_sampler(load_args(model=str(folder), dtype="float64"), device)


@pytest.fixture(scope="module")
def family(folder):
    return load_family(str(folder))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(str(folder))


@pytest.fixture(scope="module")
def examples(qwen, tokenizer, family, world):
    """An image, a video, both, and a longer video and an image, of prompts of four lengths."""
    settings = PIXELS[qwen.config.model_type]
    dataset = VideoDataset(load_questions("annotations/training_6k.jsonl", world), tokenizer, family, settings, seed=0)
    drawn = [dataset[0, i] for i in range(40)]
    image = next(e for e in drawn if e.video_grid_thw is None)
    short, long = (next(e for e in drawn if e.video_grid_thw is not None
                        and e.video_grid_thw[0, 0] == steps) for steps in (2, 3))
    alone = VideoDataset([dataclasses.replace(short.question, image=None)], tokenizer, family, settings, seed=0)[0, 0]
    assert alone.pixel_values is None and alone.pixel_values_videos is not None
    return [image, alone, short, long]


def hf_inputs(qwen, example, ids=None):
    """What Hugging Face's class takes, but for positions."""
    family = FAMILIES[qwen.config.model_type]
    ids = example.prompt_ids if ids is None else torch.cat([example.prompt_ids, ids])
    kinds = (ids == qwen.config.image_token_id).int() + 2 * (ids == qwen.config.video_token_id).int()
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "mm_token_type_ids": kinds[None]}
    for name in ("pixel_values_videos", "pixel_values"):
        if getattr(example, name) is not None:
            inputs[name] = normalise(getattr(example, name), family)
    for name in ("video_grid_thw", "image_grid_thw"):
        if getattr(example, name) is not None:
            inputs[name] = getattr(example, name)
    return inputs


def own_positions(example, L: int):
    """(3, 1, P + L): those of the prompt, and of L tokens behind it."""
    after = example.position_ids.max() + 1 + torch.arange(L)
    return torch.cat([example.position_ids, after.expand(3, -1)], 1)[:, None]


def completions_of(qwen, tokenizer, examples, temperature=1.0, G=2, C=20):
    prompts = collate_prompts(examples, qwen.device)
    ends, banned = torch.tensor(ENDS), vision_token_ids(qwen, qwen.device)
    seeds = list(range(len(examples))) if temperature else None
    return prompts, generate(qwen, prompts, G, C, temperature, seeds, ends, banned)


# ----------------------------------------------------------------------------------------------------------------------
# Which family it is.

def change_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_the_family_is_that_of_the_folder(folder, family, tmp_path):
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    size = family.patch_size
    assert family == dataclasses.replace(FAMILIES[model_type], begun=FAMILIES[model_type].opening)
    other = shutil.copytree(folder, tmp_path / "other")
    change_json(other / "config.json", lambda config: config["vision_config"].update(tokens_per_second=25))
    assert load_family(str(other)).tokens_per_second == (25 if model_type == "qwen2_5_vl" else 0)
    change_json(other / "config.json", lambda config: config["vision_config"].update(spatial_merge_size=3))
    with pytest.raises(ValueError, match=f"2 frames, 3 to a side of a token; a {model_type} must have {size}, 2 and 2"):
        load_family(str(other))
    change = {"spatial_merge_size": 2, "patch_size": 12}
    change_json(other / "config.json", lambda config: config["vision_config"].update(change))
    with pytest.raises(ValueError, match="patches of 12 pixels"):
        load_family(str(other))


def test_a_model_with_another_chat_template_is_refused(folder, tokenizer, tmp_path):
    """As the -Thinking models, whose turns begin with <think>."""
    other = shutil.copytree(folder, tmp_path / "other")
    template = tokenizer.chat_template.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n<think>\\n")
    assert template != tokenizer.chat_template
    (other / "chat_template.jinja").write_text(template)
    own_opening = json.loads((folder / "config.json").read_text())["model_type"] == "qwen3_5"
    message = (r"begins an answer with '<think>\\n<think>\\n'; this code knows '<think>\\n' and '<think>\\n\\n</think>"
               if own_opening else r"<think>\\n', and this code .*assistant\\n'; take an -Instruct model")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(str(other))
    (other / "chat_template.jinja").unlink()
    if own_opening:
        with pytest.raises(ValueError, match="no chat template, which says how an answer begins"):
            load_tokenizer(str(other))
    else:
        assert load_tokenizer(str(other)).chat_template is None  # nothing to compare with


def test_sizes_that_are_no_whole_tokens_are_refused(tokenizer, family, world):
    questions = load_questions("annotations/training_6k.jsonl", world)
    wrong, fix = (256, 252) if family.token_size == 28 else (252, 256)
    with pytest.raises(ValueError, match=f"size is {wrong}; .* a multiple of {family.token_size}, such as {fix}"):
        VideoDataset(questions, tokenizer, family, PixelSettings(image_size=wrong), seed=0)


# ----------------------------------------------------------------------------------------------------------------------
# What the model reads: patches, prompts, positions.

def test_patches_are_hugging_faces(family, qwen):
    side = PIXELS[qwen.config.model_type].image_size
    pixels = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)
    # Qwen3-VL has no image processor of its own, and its video processor needs torchvision to run.
    like = Qwen3VLVideoProcessor if qwen.config.model_type in LIKE_QWEN3 else Qwen2VLImageProcessorPil
    processor = Qwen2VLImageProcessorPil(patch_size=like.patch_size, image_mean=like.image_mean,
                                         image_std=like.image_std, do_resize=False)
    want = processor(images=[Image.fromarray(pixels[0])], return_tensors="pt")
    patches, grid = data.patchify(pixels, family)
    assert torch.equal(grid, want["image_grid_thw"])
    # With Qwen2-VL's mean and deviation Qwen3-VL's are 1.1 off.
    torch.testing.assert_close(normalise(patches, family), want["pixel_values"], rtol=0, atol=1e-6)
    # A temporal patch has its second frame behind the first, channel by channel.
    two = data.patchify(np.concatenate([pixels, pixels // 2]), family)[0].unflatten(1, (3, 2, -1))
    assert torch.equal(two[:, :, 0].flatten(1), patches.unflatten(1, (3, 2, -1))[:, :, 0].flatten(1))
    assert torch.equal(two[:, :, 1], two[:, :, 0] // 2)


@pytest.mark.parametrize("fps, num_frames, num_total", [(30.0, 8, 120), (29.97, 6, 71), (7.0, 4, 4), (0.5, 8, 300)])
def test_prompts_are_hugging_faces(tokenizer, family, qwen, fps, num_frames, num_total):
    settings = PixelSettings(fps=1000, num_frames=num_frames)
    indices, seconds = data.sample_frames(num_total, fps, settings)
    video, image = torch.tensor([[num_frames // 2, 4, 6]]), torch.tensor([[1, 2, 4]])
    content = [{"type": "video"}, {"type": "image"}, {"type": "text", "text": "What next?"}]
    want = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                         add_generation_prompt=True)
    clip = "<|vision_start|><|video_pad|><|vision_end|>"
    if qwen.config.model_type in LIKE_QWEN3:
        # The first release of its processor puts the text with timestamps in place of the clip's vision_start and
        # vision_end, transformers 5 between the two. The model was trained with the first.
        processor = SimpleNamespace(
            video_processor=Qwen3VLVideoProcessor, vision_start_token="<|vision_start|>",
            vision_end_token="<|vision_end|>", video_token="<|video_pad|>",
            _calculate_timestamps=lambda *args: Qwen3VLProcessor._calculate_timestamps(None, *args))
        metadata = SimpleNamespace(fps=fps, frames_indices=indices.tolist())
        inputs = {"video_grid_thw": video, "video_metadata": [metadata]}
        want = want.replace(clip, Qwen3VLProcessor.replace_video_token(processor, inputs, 0))
        assert want.count(" seconds>") == num_frames // 2
    else:
        want = want.replace("<|video_pad|>", "<|video_pad|>" * int(video.prod() // 4))
    want = want.replace("<|image_pad|>", "<|image_pad|>" * 2)
    got = data.encode_prompt(tokenizer, family, "What next?", video, image, seconds)
    assert tokenizer.decode(got) == want and got.tolist() == tokenizer(want, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("duration", [0.4, 3.2, 7.3, 61.7])
def test_positions_are_hugging_faces(tokenizer, family, qwen, duration):
    video, image = torch.tensor([[4, 10, 6]]), torch.tensor([[1, 4, 8]])
    seconds = np.append(np.linspace(0, duration - 0.1, 8), duration)
    ids = data.encode_prompt(tokenizer, family, "What next?", video, image, seconds)
    pads = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    ours = data.rope_positions(ids, data.vision_runs(family, video, image), data.time_step(family, seconds), *pads)
    kinds = (ids == pads[0]).int() + 2 * (ids == pads[1]).int()
    of_time = {"second_per_grid_ts": torch.tensor([2 * duration / 8])} if family.tokens_per_second else {}
    theirs, _ = qwen.model.get_rope_index(ids[None], kinds[None], video_grid_thw=video, image_grid_thw=image, **of_time)
    theirs = theirs[:, 0]
    # transformers 5 goes on behind a video from its rows and columns, the release from the largest position.
    end = int((ids == pads[1]).nonzero().max()) + 1
    assert torch.equal(ours[:, :end], theirs[:, :end])
    late = max(int(ours[0, :end].max()) + 1 - int(theirs[0, end]), 0)
    assert torch.equal(ours[:, end:], theirs[:, end:] + late)
    # Without the seconds, 3 is where 61.7 s end and not 92.
    assert late == {"qwen2_5_vl": {0.4: 0, 3.2: 0, 7.3: 6, 61.7: 88}[duration]}.get(qwen.config.model_type, 0)


def test_the_seconds_of_a_video_arrive(tokenizer, family, qwen, examples):
    _, video, _, longer = examples
    times = [e.position_ids[0][e.prompt_ids == qwen.config.video_token_id].unique().diff().tolist()
             for e in (video, longer)]
    text = tokenizer.decode(longer.prompt_ids)
    # Videos of 8 and 12 s, of which 4 and 6 frames are taken: a time step is 4 s, or with Qwen2.5-VL 8 positions.
    if qwen.config.model_type == "qwen2_5_vl":
        assert times == [[8], [8, 8]]
    elif qwen.config.model_type == "qwen2_vl":
        assert times == [[1], [1, 1]]
    assert text.count("seconds>") == 3 * (qwen.config.model_type in LIKE_QWEN3)


# ----------------------------------------------------------------------------------------------------------------------
# What the model makes of it.

@pytest.mark.parametrize("naive", [False, True])
def test_logps_are_hugging_faces(qwen, tokenizer, examples, naive):
    # Without deepstack Qwen3-VL's are 0.19 nats off, with its features behind each other's layers 0.44.
    prompts, drawn = completions_of(qwen, tokenizer, examples)
    mask = mask_from_lengths(drawn.lengths, drawn.ids.shape[1])
    assert len(set(drawn.lengths.tolist())) > 1
    banned = vision_token_ids(qwen, qwen.device)
    with torch.no_grad():
        policy, row_prompt = Policy(qwen, torch.float64, naive), torch.arange(len(mask)) // 2
        ours, _ = policy(prompts, row_prompt, drawn.ids, mask, 1.0, banned)
        for n, (ids, L) in enumerate(zip(drawn.ids, drawn.lengths.tolist())):
            example = examples[n // 2]
            logits = qwen(**hf_inputs(qwen, example, ids[:L]), position_ids=own_positions(example, L)).logits[0]
            logits[:, banned] = -torch.inf
            want = logits.log_softmax(-1)[-L - 1:-1].gather(1, ids[:L, None])[:, 0]
            torch.testing.assert_close(ours[n, :L], want, rtol=0, atol=1e-12)
    torch.testing.assert_close(drawn.logps[mask], ours[mask], rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", range(4))
def test_gradients_are_hugging_faces(qwen, tokenizer, examples, which):
    example = examples[which]
    target = torch.tensor(tokenizer("<think>I see wash pot.</think><answer>A</answer><|im_end|>")["input_ids"])
    ours, theirs = copy.deepcopy(qwen).requires_grad_(), copy.deepcopy(qwen).requires_grad_()
    mask = torch.ones(1, len(target), dtype=torch.bool)
    prompts, row_prompt = collate_prompts([example], qwen.device), torch.tensor([0])
    logps, _ = Policy(ours, torch.float64)(prompts, row_prompt, target[None], mask)
    (-logps.mean()).backward()
    logits = theirs(**hf_inputs(theirs, example, target), position_ids=own_positions(example, len(target))).logits[0]
    torch.nn.functional.cross_entropy(logits[-len(target) - 1:-1], target).backward()
    assert all(weight.grad is not None for weight in ours.parameters())
    same_gradients(ours, theirs, rtol=1e-9)


def test_greedy_tokens_are_hugging_faces(qwen, tokenizer, examples):
    """By Hugging Face's own generate, which is given positions: its own are others behind a long video."""
    _, drawn = completions_of(qwen, tokenizer, examples, temperature=0, G=1)
    plain = GenerationConfig(max_new_tokens=20, do_sample=False, repetition_penalty=1.0, pad_token_id=0,
                             eos_token_id=ENDS, suppress_tokens=vision_token_ids(qwen, qwen.device).tolist())
    for example, ids, L in zip(examples, drawn.ids.tolist(), drawn.lengths.tolist()):
        inputs = hf_inputs(qwen, example)
        theirs = copy.copy(qwen)
        theirs.model.rope_deltas = None
        found = theirs.generate(**inputs, position_ids=own_positions(example, 0), generation_config=plain)
        assert found[0, len(example.prompt_ids):].tolist() == ids[:L]
