"""The check of one's weights, on tiny models of each family: it passes, and finds what was broken on purpose."""
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, Qwen2VLImageProcessorPil
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

import check_model
import data
import deltanet
import model
import sampler
import tiny
from data import CLIP_MEAN, FAMILIES
from runtime import load_tokenizer
from tiny import LIKE_QWEN3

pytestmark = pytest.mark.slow  # what `make test` has no time for

CHECKS = ["patches", "prompts", "positions", "log-probs, shared prompts", "log-probs, --naive", "log-probs, sampler",
          "greedy"]


class Parts:
    """What a processor does, by those parts of Hugging Face's that run without torchvision."""

    def __init__(self, model_type: str, tokenizer):
        self.tokenizer, self.apply_chat_template = tokenizer, tokenizer.apply_chat_template
        self.timestamps = model_type in LIKE_QWEN3
        like = Qwen3VLVideoProcessor if self.timestamps else Qwen2VLImageProcessorPil
        self.pixels = Qwen2VLImageProcessorPil(patch_size=like.patch_size, image_mean=like.image_mean,
                                               image_std=like.image_std, do_resize=False)

    def __call__(self, text, images=(), videos=(), video_metadata=(), return_tensors="pt", **flags):
        assert not any(flags.values())  # do_resize, do_sample_frames
        text, made = text[0], {}
        for image in images:
            made |= self.pixels(images=[image], return_tensors=return_tensors)
            text = text.replace("<|image_pad|>", "<|image_pad|>" * int(made["image_grid_thw"].prod() // 4))
        for frames, metadata in zip(videos, video_metadata):
            metadata = SimpleNamespace(**metadata)
            first, second = (self.pixels(images=[Image.fromarray(frame) for frame in frames[start::2]],
                                         return_tensors=return_tensors) for start in (0, 1))
            halves = (x["pixel_values"].unflatten(1, (3, 2, -1))[:, :, 0] for x in (first, second))
            made["pixel_values_videos"] = torch.stack([*halves], dim=2).flatten(1)
            grid = made["video_grid_thw"] = first["image_grid_thw"][:1] * torch.tensor([len(frames) // 2, 1, 1])
            made["second_per_grid_ts"] = torch.tensor(
                [2 * metadata.total_num_frames / metadata.fps / len(metadata.frames_indices)])
            processor = SimpleNamespace(
                video_processor=Qwen3VLVideoProcessor, vision_start_token="<|vision_start|>",
                vision_end_token="<|vision_end|>", video_token="<|video_pad|>",
                _calculate_timestamps=lambda *args: Qwen3VLProcessor._calculate_timestamps(None, *args))
            inputs = {"video_grid_thw": grid, "video_metadata": [metadata]}
            clip = "<|video_pad|>" * int(grid.prod() // 4)
            text = text.replace("<|video_pad|>", Qwen3VLProcessor.replace_video_token(processor, inputs, 0)
                                if self.timestamps else clip)
        return made | {"input_ids": self.tokenizer([text], return_tensors=return_tensors)["input_ids"]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The folder of each family's tiny model, with a generation config as releases have them."""
    root = tmp_path_factory.mktemp("models")
    for model_type in FAMILIES:
        tiny.write(root / model_type, model_type)
        GenerationConfig(do_sample=True, top_k=1, temperature=0.01, repetition_penalty=1.5, num_beams=2,
                         eos_token_id=[375, 377]).save_pretrained(root / model_type)
    return root


def table(capsys, folder, *flags: str) -> tuple[int, dict[str, str]]:
    """The exit status, and the table's lines by their check."""
    status = check_model.main(["--model", str(folder), "--device", "cpu", *flags])
    *lines, verdict = capsys.readouterr().out.splitlines()
    found = {line[:26].strip(): line for line in lines}
    assert ("DIFFERS" in verdict) == (status == 1) == any("DIFFERS" in line for line in found.values())
    return status, found


@pytest.fixture
def with_parts(monkeypatch):
    monkeypatch.setattr(check_model, "load_processor", lambda folder: Parts(
        folder.rsplit("/", 1)[1], load_tokenizer(folder)))


@pytest.mark.parametrize("model_type, dtype", [*((name, "float32") for name in FAMILIES), ("qwen2_5_vl", "bfloat16")])
def test_it_passes(folders, capsys, with_parts, model_type, dtype):
    status, found = table(capsys, folders / model_type, "--dtype", dtype)
    assert status == 0 and list(found) == CHECKS
    notes = {check for check, line in found.items() if "on purpose" in line}
    assert notes == {"qwen2_vl": set(), "qwen2_5_vl": {"positions"}, "qwen3_vl": {"prompts"},
                     "qwen3_5": {"prompts"}}[model_type]


def test_what_cannot_be_compared_is_said(folders, capsys):
    status, found = table(capsys, folders / "qwen2_vl")
    assert status == 0 and list(found) == [*CHECKS[2:], "not compared: patches and"]
    assert "preprocessor_config.json" in found["not compared: patches and"]


@pytest.mark.parametrize("flags, said", [(["--model", "no/such/model"], "--model no/such/model"),
                                         (["--model", "toy", "--device", "cuda"], "take --device cpu")])
def test_what_cannot_begin_is_said_in_a_line(capsys, flags, said):
    assert check_model.main(flags) == 2
    out, error = capsys.readouterr()
    assert not out and said in error.splitlines()[-1]


# ----------------------------------------------------------------------------------------------------------------------
# Faults, and the lines of the table that have to show them.

def other_mean(patch):
    patch.setitem(FAMILIES, "qwen3_vl", dataclasses.replace(FAMILIES["qwen3_vl"], mean=CLIP_MEAN))


def reversed_frames(patch):
    patchify = data.patchify
    patch.setattr(data, "patchify", lambda pixels, family: patchify(pixels[::-1].copy(), family))


def late_seconds(patch):
    cached_video = data.cached_video

    def late(path, settings):
        frames, seconds = cached_video(path, settings)
        return frames, seconds + 0.3
    patch.setattr(data, "cached_video", late)


def time_step_of_1(patch):
    patch.setattr(data, "time_step", lambda family, seconds: 1.0)


def text_as_transformers_5(patch):
    rope_positions = data.rope_positions

    def earlier(ids, grids, time_step, *pads):
        positions, video = rope_positions(ids, grids, time_step, *pads), (ids == pads[1]).nonzero()
        if len(video):  # of 4 time steps, 5 rows and 5 columns: its last position is 7, and not 4
            positions[:, int(video.max()) + 1:] -= 3
        return positions
    patch.setattr(data, "rope_positions", earlier)


def no_deepstack_in(module):
    def break_it(patch):
        embed_prompts = module.embed_prompts
        patch.setattr(module, "embed_prompts", lambda *args: torch.cat(
            [embed_prompts(*args)[:, :1], torch.zeros_like(embed_prompts(*args)[:, 1:])], dim=1))
    return break_it


def completions_see_what_comes(patch):
    init = model.SharedPrompts.__init__

    def without_mask(self, *args):
        init(self, *args)
        self.mask[:] = True
    patch.setattr(model.SharedPrompts, "__init__", without_mask)


def completions_forget(patch):
    run_rows = deltanet.run_rows
    patch.setattr(deltanet, "run_rows", lambda *args: run_rows(*args[:5]))


def later_completions(patch):
    plain_states = model.Policy.plain_states
    patch.setattr(model.Policy, "plain_states", lambda self, prompts, *args: plain_states(
        self, dataclasses.replace(prompts, next_position=prompts.next_position + 3), *args))


@pytest.mark.parametrize("model_type, dtype, fault, want", [
    ("qwen3_vl", "float32", other_mean, {"patches"}),
    ("qwen2_vl", "float32", reversed_frames, {"patches"}),
    ("qwen3_vl", "float32", late_seconds, {"prompts"}),
    ("qwen2_5_vl", "float32", time_step_of_1, {"positions"}),
    ("qwen2_5_vl", "float32", text_as_transformers_5, {"positions"}),
    ("qwen3_vl", "float32", no_deepstack_in(model), {"log-probs, shared prompts", "log-probs, --naive"}),
    ("qwen3_vl", "bfloat16", no_deepstack_in(model), {"log-probs, shared prompts", "log-probs, --naive"}),
    ("qwen2_vl", "float32", completions_see_what_comes, {"log-probs, shared prompts"}),
    ("qwen2_5_vl", "float32", later_completions, {"log-probs, --naive"}),
    ("qwen3_vl", "float32", no_deepstack_in(sampler), {"log-probs, sampler", "greedy"}),
    ("qwen3_5", "float32", completions_forget, {"log-probs, shared prompts"}),
])
def test_it_finds(folders, capsys, with_parts, monkeypatch, model_type, dtype, fault, want):
    monkeypatch.setattr(check_model, "NUM_TOKENS", 8)
    fault(monkeypatch)
    status, found = table(capsys, folders / model_type, "--dtype", dtype)
    assert status == 1 and {check for check, line in found.items() if "DIFFERS" in line} == want
