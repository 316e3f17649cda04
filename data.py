"""From a dataset file to tensors: what SEED-Bench-R1 and LongVideoBench give, and what Qwen2-VL reads, or a successor.

From the place where a video becomes tokens, `VideoDataset.__getitem__`, to the checks of the files, which come last:
    dataset   (epoch, index) -> `Example`: the tensors of one question
    pixels    an mp4 and a png -> uint8 frames -> what --video leaves of them -> patches
    tokens    the chat prompt with its special tokens, and the (time, height, width) position of each token
    options   the right action and three wrong ones, shuffled by (seed, epoch, id) -> the text of the user turn
    answers   a completion -> the letter that it answers with, or None, and whether it is right
    reasoning a completion -> the option that it concludes with, and the steps that it says were done
    order     which questions belong to a step follows from its number; worker processes prepare them ahead of training
    decoding  one video, in a child process, since decord can hang or crash
    files     JSONL, or a JSON list, in one of five shapes -> `Question`
    check     python data.py FILE --data_root DIR: whether every video and image of a file can be read

Letters: P prompt tokens, F frames, S vision patches.
References: SEED-Bench-R1 (arXiv 2503.24376), LongVideoBench (arXiv 2407.15754), Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL
(arXiv 2502.13923), Qwen3-VL (arXiv 2511.21631); Qwen3.5 has no paper, and reads as Qwen3-VL does.
"""
import argparse
import atexit
import bisect
import contextlib
import errno
import functools
import hashlib
import io
import itertools
import json
import math
import multiprocessing.reduction
import os
import random
import re
import signal
import string
import sys
import uuid
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import decord  # here and not where it is used, so that the children that decode do not pay for the import
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

# ----------------------------------------------------------------------------------------------------------------------
# The dataset: where a video becomes tokens.

@dataclass(frozen=True)
class Question:
    """One question, whatever file shape it came from; the fields that its shape does not have stay empty."""
    id: str  # unique within its file; ints become str
    text: str  # for the SFT shape the whole user text, used verbatim
    video: Path | None  # resolved, inside the data root; whether the file is there shows when it is read
    image: Path | None
    answer: str = ""  # training: the text of the right action
    negatives: tuple[str, ...] = ()  # training: the texts of wrong actions
    options: tuple[str, ...] = ()  # validation, LongVideoBench: fixed options, in order
    gold: str = ""  # validation, LongVideoBench: the letter of the right one; free-form: the right answer
    response: str = ""  # SFT: the whole assistant text, reasoning and answer
    part: str = ""  # of the file: `domain` (L3), `duration_group` (LongVideoBench)
    goal: str = ""  # `task_goal`
    progress: tuple[str, ...] = ()  # `narration_text` of the steps done so far
    has_id: bool = True  # False: its record has no id, and `id` is the record's number


# A time step is 2 frames: a patch has pixels of both. A token is 2 x 2 patches.
TEMPORAL_PATCH_SIZE, MERGE_SIZE = 2, 2
SYSTEM = "You are a helpful assistant."


@dataclass(frozen=True)
class Family:
    """All in which families of models differ, but for what their classes in transformers do by themselves."""
    patch_size: int  # pixels, a patch's height and width
    mean: tuple[float, float, float]  # of the pixels of red, green, blue in [0, 1]
    std: tuple[float, float, float]
    system: str  # the system line of every prompt, as in the chat template; "": none
    timestamps: bool  # True: "<1.3 seconds>" in words before the tokens of each time step
    tokens_per_second: float  # positions to a second of video, as config.json has it; 0: a time step is one position
    opening: str = ""  # what the chat template writes behind the header of the assistant turn
    begun: str = ""  # what of it belongs to the answer: not a block that is closed in it

    @property
    def token_size(self) -> int:
        return self.patch_size * MERGE_SIZE


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = 0.5, 0.5, 0.5
FAMILIES = {  # model_type of config.json: what it reads
    "qwen2_vl": Family(14, CLIP_MEAN, CLIP_STD, SYSTEM, timestamps=False, tokens_per_second=0),
    "qwen2_5_vl": Family(14, CLIP_MEAN, CLIP_STD, SYSTEM, timestamps=False, tokens_per_second=2),
    "qwen3_vl": Family(16, HALF, HALF, "", timestamps=True, tokens_per_second=0),
    "qwen3_5": Family(16, HALF, HALF, "", timestamps=True, tokens_per_second=0, opening="<think>\n"),
}


@dataclass(frozen=True)
class PixelSettings:
    """How pixels are read. The defaults are the paper's: 16 frames become 648 tokens, an image 81."""
    fps: float = 2.0  # frames taken per second of video, > 0
    min_frames: int = 4  # at least this many; even, >= 2
    num_frames: int = 16  # at most this many; even, >= min_frames
    image_size: int = 252  # every frame and image becomes a square of this many pixels: whole tokens of the family
    cache: str = ""  # a folder that keeps the frames of each video, F H W 3 bytes (3 MB at 16 frames of 252); "": none
    timeout_s: float = 60.0  # a video that takes longer to decode counts as unreadable

    def __post_init__(self) -> None:
        sizes = sorted({family.token_size for family in FAMILIES.values()})  # 28, 32
        for field, holds, fix in (
            ("fps", 0 < self.fps < math.inf, "be above 0"),
            ("min_frames", self.min_frames >= 2 and self.min_frames % 2 == 0, "be even, >= 2"),
            ("num_frames", self.num_frames >= self.min_frames and self.num_frames % 2 == 0, "be even, >= min_frames"),
            ("image_size", self.image_size > 0 and not all(self.image_size % size for size in sizes),
             f"be a multiple of {' or '.join(map(str, sizes))}"),
            ("timeout_s", 0 < self.timeout_s < math.inf, "be above 0"),
        ):
            if not holds:
                raise ValueError(f"{field} is {getattr(self, field)}; it must {fix}")


# What the model gets to see (--video): the video, or a control that could show that it does not need it. All but
# text_only and no_image change the video alone. Names: TVBench (arXiv 2410.07752), 2604.03179, Video-R1.
VIDEO = {
    "full": "the video",
    "text_only": "neither video nor image",
    "no_image": "the video, without the image",
    "blank": "mid-grey frames, as many",
    "random": "the video of another question, with another number of steps done where the file tells it",
    "shuffled": "the video's frames in another order, drawn at random",
    "reversed": "the video's frames from the last to the first",
    "single_frame": "the video's last frame, as often as it has frames",
}


@dataclass
class Example:
    """A Question ready for the model; all tensors on the CPU."""
    question: Question
    options: tuple[str, ...]
    gold: str  # the letter of the right option; for a free-form question the right answer; "" for SFT
    prompt_text: str  # the text of the user turn
    prompt_ids: Tensor  # (P,) int64
    position_ids: Tensor  # (3, P) int64
    pixel_values_videos: Tensor | None = None  # (S, 1176) uint8 (Qwen3-VL: 1536), for `normalise`
    video_grid_thw: Tensor | None = None  # (1, 3) int64
    pixel_values: Tensor | None = None  # the same of the image
    image_grid_thw: Tensor | None = None  # (1, 3) int64
    begun: str = ""  # what of the answer the prompt has already: "<think>\n" of Qwen3.5 from 4B on
    error: str = ""  # why the pixels could not be read; then P is 0 and there are none


class VideoDataset(torch.utils.data.Dataset):
    """`dataset[epoch, index]` is the Example of `questions[index]`; the epoch matters for its options.

    A file that cannot be read gives an Example with an `error`, for the caller to count. It is never replaced by
    another one, and does not stop the run. `video` is a key of VIDEO: the videos as they are, or a control; ValueError
    if it is none, or if "random" has no other video to show, or if the family cannot cut images of this size into
    tokens. Without tokenizer and family the files are read, and no more.
    """

    def __init__(self, questions: list[Question], tokenizer, family: Family | None, settings: PixelSettings, seed: int,
                 video: str = "full"):
        if video not in VIDEO:
            raise ValueError(f"--video {video!r}: must be one of {', '.join(VIDEO)}")
        if family and settings.image_size % family.token_size:
            nearest = max(round(settings.image_size / family.token_size), 1) * family.token_size
            raise ValueError(f"image_size is {settings.image_size}; for this model it must be a multiple of "
                             f"{family.token_size}, such as {nearest}")
        self.questions, self.tokenizer, self.family, self.settings = questions, tokenizer, family, settings
        self.seed, self.video = seed, video
        if video == "random":
            by_steps = {len(question.progress): question for question in questions if question.video}
            for question in by_steps.values():  # one each: all with as many steps have the same videos to draw from
                if not self.other_videos(question):
                    raise ValueError(f"--video random: there is no other video for question {question.id}, of "
                                     f"{len(question.progress)} steps, in the file; use more of it (--max_questions), "
                                     "or --video blank")

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def shows_image(self) -> bool:
        return self.video not in ("text_only", "no_image")

    def __getitem__(self, key: tuple[int, int]) -> Example:
        """(epoch, index) -> Example, the video as patches, which `embed_prompts` (model.py) puts into the prompt."""
        epoch, index = key
        question = self.questions[index]
        options, gold = build_options(question, self.seed, epoch)
        free_form = gold and not options
        text = f"{question.text}\n{FREE_FORM_INSTRUCTION}" if free_form else user_text(question.text, options)
        no_ids = torch.empty(0, dtype=torch.int64)
        example = Example(question, options, gold, text, prompt_ids=no_ids, position_ids=no_ids.expand(3, 0))
        seconds = None
        if self.video != "text_only":
            rng = random.Random(f"{self.seed}/{epoch}/{question.id}/{self.video}")
            from_another = question.video and self.video == "random"
            video = rng.choice(self.other_videos(question)) if from_another else question.video
            try:  # around the reading alone: a mistake of ours is no unreadable file
                frames, seconds = cached_video(video, self.settings) if video else (None, None)
                image = read_image(question.image, self.settings) if question.image and self.shows_image else None
            except ValueError as error:
                example.error = str(error)
            if example.error or self.tokenizer is None:
                return example
            if frames is not None:
                frames = control_frames(frames, self.video, rng)
                example.pixel_values_videos, example.video_grid_thw = patchify(frames, self.family)
            if image is not None:
                example.pixel_values, example.image_grid_thw = patchify(image, self.family)
        grids = example.video_grid_thw, example.image_grid_thw
        example.prompt_ids = encode_prompt(self.tokenizer, self.family, text, *grids, seconds)
        example.begun = self.family.begun
        pad_ids = self.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
        example.position_ids = rope_positions(example.prompt_ids, vision_runs(self.family, *grids),
                                              time_step(self.family, seconds), *pad_ids)
        return example

    def other_videos(self, question: Question) -> list[Path]:
        """The videos of other questions: those with another number of steps done, where this one tells its own."""
        return [other.video for other in self.questions if other.video and other.video != question.video
                and (not question.progress or len(other.progress) != len(question.progress))]

    def describe_prompt(self) -> str:
        """What the prompts of a run hold, in a line: of the first readable one among those that have most."""
        has = [bool(question.video) + bool(question.image) for question in self.questions]
        fullest = sorted(range(len(self)), key=has.__getitem__, reverse=True)[:8]
        example = next((example for i in fullest if not (example := self[0, i]).error), None)
        videos = sum(bool(question.video) for question in self.questions)
        line = f"{len(self)} questions, {videos} with a video; --video {self.video}: {VIDEO[self.video]}; "
        if example is None:
            return line + f"none of {len(fullest)} could be read, the last: {self[0, fullest[-1]].error}"
        held = []
        for name, grid in (("video", example.video_grid_thw), ("image", example.image_grid_thw)):
            if grid is None:
                held.append(f"no {name}")
                continue
            time, height, width = grid[0].tolist()
            frames = f"{time * TEMPORAL_PATCH_SIZE} frames of " if name == "video" else ""
            size = f"{width * self.family.patch_size} x {height * self.family.patch_size} pixels"
            held.append(f"{name} of {frames}{size} ({num_tokens(grid)} vision tokens)")
        return line + (f"prompt of question {example.question.id}: {', '.join(held)}, {len(example.prompt_ids)} tokens "
                       "in all")

    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that there can be, give or take a few: most frames, an image, the longest text.

        No file is opened for it. A video that is shorter than `num_frames` at `fps` makes a shorter one.
        """
        def grid(time: int, present: bool) -> Tensor | None:
            side = self.settings.image_size // self.family.patch_size
            return torch.tensor([[time, side, side]]) if present else None

        num_frames, has_video = self.settings.num_frames, any(question.video for question in self.questions)
        video = grid(num_frames // TEMPORAL_PATCH_SIZE, has_video and self.video != "text_only")
        image = grid(1, self.shows_image and any(q.image for q in self.questions))
        texts = [user_text(question.text, build_options(question, self.seed, 0)[0]) for question in self.questions]
        seconds = np.full(num_frames + 1, 9999.0)  # the longest timestamps
        return len(encode_prompt(self.tokenizer, self.family, max(texts, key=len), video, image, seconds))


# ----------------------------------------------------------------------------------------------------------------------
# Pixels: which frames are taken, what a control leaves of them, and the patches that the vision tower reads.

def sample_frames(num_total: int, native_fps: float, settings: PixelSettings,
                  times: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Which frames of a video to take, (F,) int64, evenly spread, the first and the last one included; and when, in
    seconds from its beginning, each of them is shown and the video ends, (F + 1,) float64.

    F is `fps` times the video's seconds, rounded down to even, and at least `min_frames`, at most `num_frames`. Where a
    video has fewer frames than that, some are taken twice. Raises ValueError for a video without frames or frame rate.
    `times`, where known: the seconds at which each frame begins and ends, (num_total, 2). If one begins more than half
    a frame from where `native_fps` puts it, the rate varies: then take what is on the screen at times evenly spread.
    """
    if num_total < 1 or not 0 < native_fps < math.inf:
        raise ValueError(f"the video has {num_total} frames at {native_fps} fps; both must be above 0")
    begins = np.arange(num_total) / native_fps if times is None else times[:, 0] - times[0, 0]
    varies = np.abs(begins * native_fps - np.arange(num_total)).max() > 0.5
    seconds = times[-1, 1] - times[0, 0] if varies else num_total / native_fps
    num_wanted = min(max(int(seconds * settings.fps) // 2 * 2, settings.min_frames), settings.num_frames)
    if varies:
        indices = np.searchsorted(begins, np.linspace(0, begins[-1], num_wanted), side="right") - 1
        return indices, np.append(begins[indices], seconds)
    indices = np.linspace(0, num_total - 1, num_wanted).round().astype(np.int64)
    return indices, np.append(indices, num_total) / native_fps  # files round their times, to milliseconds or worse


def control_frames(pixels: np.ndarray, video: str, rng: random.Random) -> np.ndarray:
    """The frames (F, H, W, 3) uint8 of a video as the setting `video` shows them; the shape stays."""
    if video == "blank":
        return np.full_like(pixels, 128)
    if video == "shuffled":
        order = list(range(len(pixels)))
        while order == sorted(order) and len(order) > 1:  # of four frames, one order in 24 would leave all as it is
            rng.shuffle(order)
        return pixels[order]
    if video == "reversed":
        return pixels[::-1].copy()  # torch takes no negative strides
    if video == "single_frame":
        return pixels[-1:].repeat(len(pixels), axis=0)
    return pixels


def patchify(pixels: np.ndarray, family: Family) -> tuple[Tensor, Tensor]:
    """uint8 RGB (F, H, W, 3) -> patches (S, 1176) uint8, and their numbers in (time, height, width), (1, 3) int64.

    F is even, or 1: the frame of an image is repeated to fill the temporal patch. H and W are multiples of 28. Else
    ValueError. The four patches that the vision tower merges into one token are neighbours in S. (Qwen3-VL: 1536, 32.)
    """
    size, token_size = family.patch_size, family.token_size
    num_frames, height, width, channels = pixels.shape
    if channels != 3 or not height or height % token_size or not width or width % token_size:
        raise ValueError(f"pixels are {pixels.shape}; give 3 channels, and sides that are multiples of {token_size}")
    if num_frames == 1:
        pixels = pixels.repeat(TEMPORAL_PATCH_SIZE, axis=0)
    elif num_frames < 1 or num_frames % TEMPORAL_PATCH_SIZE:
        raise ValueError(f"pixels have {num_frames} frames; give an even number, or one for an image")
    grid_t, grid_h, grid_w = len(pixels) // TEMPORAL_PATCH_SIZE, height // size, width // size
    x = torch.tensor(pixels).view(
        grid_t, TEMPORAL_PATCH_SIZE,  # 0 time, 1 frame in the patch
        grid_h // MERGE_SIZE, MERGE_SIZE, size,  # 2 row of tokens, 3 row of patches in it, 4 row of pixels
        grid_w // MERGE_SIZE, MERGE_SIZE, size,  # 5, 6, 7 the same for columns
        channels,  # 8
    )
    x = x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7)  # which patch: 0 2 5 3 6; inside it: channel, frame, row, column
    return x.reshape(grid_t * grid_h * grid_w, -1), torch.tensor([[grid_t, grid_h, grid_w]])


def normalise(patches: Tensor, family: Family) -> Tensor:
    """(x / 255 - mean) / std, channel by channel: (S, 1176) uint8 -> float32, on the device of the patches."""
    scale, mean, std = (torch.tensor(x, device=patches.device).view(-1, 1) for x in (255.0, family.mean, family.std))
    x = patches.float().unflatten(1, (3, -1))
    return x.div_(scale).sub_(mean).div_(std).flatten(1)  # CUDA's div_(255) rounds twice


# ----------------------------------------------------------------------------------------------------------------------
# Tokens, and their positions.

def num_tokens(grid_thw: Tensor) -> int:
    """How many vision tokens a grid of patches becomes."""
    return int(grid_thw.prod()) // MERGE_SIZE**2


def vision_runs(family: Family, *grids: Tensor | None) -> list[Tensor]:
    """The grid_thw (1, 3) of each run of vision tokens: a video or image, or where timestamps stand between them, a
    time step."""
    runs = []
    for grid in [grid for grid in grids if grid is not None]:
        time, height, width = grid[0].tolist()
        runs += [torch.tensor([[1, height, width]])] * time if family.timestamps else [grid]
    return runs


# The tokenizer obeys special tokens wherever they stand: a question with <|im_end|> in it would end the user's turn,
# <|video_pad|> would ask for pixels that are not there. Half a surrogate pair is no text, and would crash it.
FORBIDDEN = re.compile(r"<\|\w+\|>|[\ud800-\udfff]")


def encode_prompt(tokenizer, family: Family, text: str, video_grid_thw: Tensor | None = None,
                  image_grid_thw: Tensor | None = None, seconds: np.ndarray | None = None) -> Tensor:
    """The chat prompt, (P,) int64: system line, user turn of [video][image]text, header of the assistant turn.

    Each vision token is a pad token, in whose place the model puts an output of the vision tower. `seconds`, those of
    `read_video`, go with a video. Raises ValueError if `text` has a special token in it.
    """
    if found := FORBIDDEN.search(text):
        raise ValueError(f"the text {text!r:.200} has {found.group()!r} in it; take it out or spell it differently")
    video = image = ""
    if video_grid_thw is not None:
        stamps = [""]
        if family.timestamps:  # the mean of a time step's frames
            means = seconds[:-1].reshape(-1, TEMPORAL_PATCH_SIZE).mean(axis=1)
            stamps = [f"<{second:.1f} seconds>" for second in means]
        for stamp, run in zip(stamps, vision_runs(family, video_grid_thw), strict=True):
            video += stamp + "<|vision_start|>" + "<|video_pad|>" * num_tokens(run) + "<|vision_end|>"
    if image_grid_thw is not None:
        image = "<|vision_start|>" + "<|image_pad|>" * num_tokens(image_grid_thw) + "<|vision_end|>"
    system = f"<|im_start|>system\n{family.system}<|im_end|>\n" if family.system else ""
    prompt = f"{system}<|im_start|>user\n{video}{image}{text}<|im_end|>\n<|im_start|>assistant\n{family.opening}"
    return torch.tensor(tokenizer(prompt, add_special_tokens=False)["input_ids"])


def time_step(family: Family, seconds: np.ndarray | None) -> float:
    """How far apart on the time axis of positions the time steps of a video are: 1, or with Qwen2.5-VL by its seconds.

    Source: Qwen2.5-VL, section 2.1.2. `seconds` are those of `read_video`, None without a video.
    """
    if seconds is None or not family.tokens_per_second:
        return 1.0
    return family.tokens_per_second * TEMPORAL_PATCH_SIZE * seconds[-1] / (len(seconds) - 1)


def rope_positions(prompt_ids: Tensor, grids: list[Tensor], time_step: float, image_token_id: int,
                   video_token_id: int) -> Tensor:
    """M-RoPE: the (time, height, width) position of each prompt token, (3, P) int64 (Qwen2-VL, section 2.1).

    `grids`: the grid_thw (1, 3) of each run of vision tokens, in order of appearance; ValueError if they do not fit.

    Text counts 0, 1, 2 on all axes alike. Where a video or image begins at position p, its token (t, h, w) sits at
    (p + t * time_step, p + h, p + w), rounded down, and the text behind it goes on from the largest of these + 1: so
    the paper, and its release. transformers 5 goes on from p + max(height, width), where the text behind a video of
    more time steps than rows and columns of tokens overlaps it: 32 frames of 252 pixels are 16 x 9 x 9, and with
    Qwen2.5-VL, to which a second is 2 positions, most videos are so.
    """
    is_vision = (prompt_ids == image_token_id) | (prompt_ids == video_token_id)  # (P,) True: an image or video token
    pieces, position, unused = [], 0, list(grids)
    for vision, run in itertools.groupby(is_vision.tolist()):
        length = len(list(run))
        if not vision:
            piece = torch.arange(length).expand(3, -1)
        elif unused and num_tokens(unused[0]) == length:
            time, height, width = unused.pop(0).flatten().tolist()
            steps = (torch.arange(time) * time_step).long()
            axes = steps, torch.arange(height // MERGE_SIZE), torch.arange(width // MERGE_SIZE)
            piece = torch.cartesian_prod(*axes).T  # width runs fastest, as in `patchify`
        else:
            raise ValueError(f"{length} vision tokens do not fit the grids {[grid.tolist() for grid in grids]}")
        pieces.append(position + piece)  # (3, length)
        position = int(pieces[-1].max()) + 1
    if unused:
        raise ValueError(f"the prompt has fewer runs of vision tokens than grids: {[grid.tolist() for grid in grids]}")
    return torch.cat(pieces, dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# Options, and the text of the user turn.

NUM_NEGATIVES = 3  # four options as in the validation files, so that chance is 25%
INSTRUCTION = "Output the reasoning in <think></think> and the letter of the final answer in <answer></answer>."
FREE_FORM_INSTRUCTION = "Output the reasoning in <think></think> and the final answer in <answer></answer>."


def build_options(question: Question, seed: int, epoch: int) -> tuple[tuple[str, ...], str]:
    """The options of a question and the letter of the right one.

    Training: the answer and three distinct negatives (all, where there are fewer), shuffled. Validation: as they are in
    the file, never shuffled. SFT: ((), ""), its options are part of its text.

    The draw follows from (seed, epoch, id) and from nothing else: the same on every rank, in every worker, after a
    resume. (`hash` would not do, Python salts it anew in each process; `Random` takes a string's SHA-512.)
    """
    if not question.answer:
        return question.options, question.gold
    rng = random.Random(f"{seed}/{epoch}/{question.id}")
    # dict.fromkeys drops duplicates and keeps the order; the order of a set of strings would be salted too.
    negatives = [text for text in dict.fromkeys(question.negatives) if text != question.answer]
    options = [question.answer, *rng.sample(negatives, min(NUM_NEGATIVES, len(negatives)))]
    rng.shuffle(options)
    return tuple(options), string.ascii_uppercase[options.index(question.answer)]


def user_text(question: str, options: tuple[str, ...]) -> str:
    """The question, a line "A. ..." for each option, the instruction. Without options (SFT): the question, verbatim."""
    if not options:
        return question
    lines = [f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options)]
    return "\n".join([question, *lines, INSTRUCTION])


# ----------------------------------------------------------------------------------------------------------------------
# Answers: one strict parser, for the reward and for evaluation.

ANSWER_BLOCK = re.compile(r"<answer>((?:(?!</?answer>).)*)</answer>", re.DOTALL)  # no answer tag inside
LETTER_FORM = re.compile(r"(?:\(([A-Z])\)|\[([A-Z])\]|([A-Z])\)?)[.:]?")  # (B)  [B]  B  B)  and a dot or colon behind


def last_answer(completion: str) -> str | None:
    """What stands in the last well-formed <answer>...</answer> (exact tags, no answer tag inside), or None."""
    blocks = ANSWER_BLOCK.findall(completion)
    return blocks[-1].strip() if blocks else None


def loose(text: str) -> str:
    """A text as a person compares it with another: in any case, with a full stop at its end or without."""
    return text.strip().removesuffix(".").strip().casefold()


def parse_answer(completion: str, options: tuple[str, ...]) -> str | None:
    """The letter that a completion answers with, or None.

    The last answer decides. It must be, also between ** and **,
        the letter of an option, a capital, with a bracket, dot or colon or without    B   (B)   [B]   B)   B.   (B):
        or the text of one option, and of no other                                     grab onion   Grab onion.
        or one of these forms of the letter (not the bare one), then its text          B. grab onion
    All else is None: a word that begins with a letter, two letters, a small letter, the letter of no option.
    """
    answer = last_answer(completion) or ""
    bold = re.fullmatch(r"\*\*(.+)\*\*", answer, re.DOTALL)
    if bold and answer not in options:
        answer = bold[1].strip()
    by_letter = dict(zip(string.ascii_uppercase, options))
    match = LETTER_FORM.match(answer)
    letter, rest = (match[1] or match[2] or match[3], answer[match.end():].strip()) if match else ("", "")
    if match and not rest:
        return letter if letter in by_letter else None
    if not loose(answer):
        return None
    for form in (str, loose):  # word for word, then as a person would
        readings = {key for key, option in by_letter.items() if form(option) == form(answer)}
        # Not a bare letter: "A knife" does not begin with the letter of an option.
        if match and match.group() != letter and letter in by_letter and form(by_letter[letter]) == form(rest):
            readings.add(letter)
        if readings:
            return readings.pop() if len(readings) == 1 else None
    return None


def first_letter(completion: str, options: tuple[str, ...]) -> str | None:
    """The published grading, kept for parity with published numbers only: the first character of the first <answer>
    block, so that "Apple" is A and "(A)" is nothing."""
    answer, closed, _ = completion.partition("<answer>")[2].partition("</answer>")
    letter = answer.strip()[:1] if closed else ""
    return letter if letter in list(string.ascii_uppercase[:len(options)]) else None


def grade(completion: str, example: Example, parse=parse_answer) -> tuple[str | None, bool]:
    """(the answer that was parsed, whether it is the right one): the one judge of both reward and evaluation."""
    if example.options:
        parsed = parse(completion, example.options)
        return parsed, parsed == example.gold
    # ABLATE: free-form answers. Right is what equals the reference, but for case and a full stop; for numbers, units or
    # several right answers, a comparison of your own goes here.
    parsed = last_answer(completion) or None
    return parsed, parsed is not None and loose(parsed) == loose(example.gold)


# ----------------------------------------------------------------------------------------------------------------------
# Reasoning: which option it concludes with, and which steps it says were done. By rules, as a reader skims a text;
# tests/test_reasoning.py shows on written completions what they can tell, and what not.

STOP_WORDS = frozenset("a an the this that these those of to in on onto into from with at by for and or its his her "
                       "their he she they person has have had up down out c can now then again also".split())
ALIKE = dict(pair.split("/") for pair in (  # the last four are stems
    "took/take taken/take held/hold brought/bring broke/break broken/break made/make got/get threw/throw thrown/throw "
    "swept/sweep dug/dig hung/hang knives/knife grab/tak pick/tak plac/put them/it").split())
WORD = re.compile(r"(?<!\w)(?<!\w')(?:((?:is|are|was|were|be|been|being)\b(?:\s+be(?:en|ing)\b)?)|[a-z]+)|[,.;:!?]")
# A full stop behind a lone capital is that of an option, "B. grab onion".
CLAUSE_END = re.compile(r"(?<![^\w][A-Z])[.;!?](?=\s|$)|\n+|,?\s(?=(?:so(?! that)|therefore|thus|hence|but|because|"
                        r"since|while|without|before|and now)\b)", re.IGNORECASE)
REASON = re.compile(r"\s*(?:because|since|while|without|before)\b[^,]*$")  # which concludes nothing
CONCLUDES = re.compile(r"\b(?:answers?|conclu\w+|so|therefore|thus|hence|choose(?! between)|pick(?! up)|select|go with|"
                       r"next(?!,)|(?:is|be|needs?|has|have) to|correct|right(?! hand)|best|only|most|more|likely|must|"
                       r"should|says|fits|matches|aligns)\b", re.IGNORECASE)
ARTICLE = re.compile(r"(?:^|:)[^\w:]{0,9}(?=A\s+(?!(?:is|was|seems|fits|matches|says|must|would|makes|and|or)\b)[a-z])")
ITEM = re.compile(r"\W*(?:[Oo]ption\s+)?\(?[A-Z]\W*[.):(-]\W*\w")  # of a list of options
# An option that is named to be turned down: "not C", "rather than C"; "C is wrong", "C was already done".
TURNED_DOWN = re.compile(r"(?:n't|\b(?:not|cannot|than|instead of|out|eliminat\w+|exclud\w+|n?either|nor|other))"
                         r"\s+(?:(?:the|be|it|is|to|like|such as|options?|answers?|choices?)\b\W+)*\W*$", re.IGNORECASE)
IS_DOWN = re.compile(r"[^\w,]*(?:(?:is|are|was|were|has|have|does|do|would|can|could|seems?|comes?|been|be)\s+)*"
                     r"(?:not|\w+n't|wrong|incorrect|unlikely|already|impossible|later|irrelevant|premature|done|"
                     r"ruled out|makes no|too early)\b", re.IGNORECASE)
JOINED = re.compile(r"[^\w.]{0,9}(?:[,/]|\b(?:and|n?or)\b)[^\w.]{0,9}(?:option )?\W?", re.IGNORECASE)  # A or option B
# Clauses that tell of options, or of what is still to come.
NOT_DONE = re.compile(r"\b(?:next(?!,)|needs?|should|would|will|(?<!the )(?<!a )can(?! see| be seen)|could|may|might|"
                      r"must|likely|not|without|yet|later|options?|answers?|choices?|goal|task|going|about to|"
                      r"remains?)\b|\([A-Z]\)|^\W*[A-Z][.):]", re.IGNORECASE)


def reasoning_clauses(completion: str) -> list[str]:
    """The clauses of what stands before </think>, or where there is none, before <answer>."""
    text = re.split("</think>|<answer>", completion)[0].replace("<think>", "")
    return [clause for clause in CLAUSE_END.split(text) if clause.strip()]


@functools.lru_cache(1 << 14)
def stem(word: str) -> str:
    """A word without its endings: wash for "washing", cut for "cuts", and one stem, tak, for take, took and grabs."""
    word = re.sub(r"(?<=[aeiouy])([^aeiouy]*)(?:ing|(?<!e)ed|(?<!s)s)$", r"\1", ALIKE.get(word, word))
    word = re.sub(r"([^aeiou])\1$", r"\1", re.sub(r"(?<=\w\w)e$", "", word))  # cutting, cutt, cut
    word = re.sub("y$", "i", word)
    return ALIKE.get(word, word)


def content_words(text: str) -> list[tuple[str, int, int]]:
    """(stem, begin, end) of each word that carries meaning, of "be", which makes the passive, and of marks as ","."""
    return [("be" if match[1] else stem(match[0]), match.start(), match.end())
            for match in WORD.finditer(text.lower()) if match[0] not in STOP_WORDS]


def places(text: str, words: list[tuple[str, int, int]], loosely: bool = False) -> Iterable[tuple[int, int]]:
    """(first, last) wherever words name an option or a step: by all of its content words, close together in a phrase.

    Its first word, the verb, stands before the others, or behind them in the passive. Loosely: a third of the words may
    be missing, and "it" is whatever was named before.
    """
    stems = dict.fromkeys(word for word, *_ in content_words(text) if word.isalpha() and word not in ("be", "it"))
    verb, enough = next(iter(stems), ""), len(stems) - loosely * (len(stems) // 3)
    for first in (i for i, (word, *_) in enumerate(words) if word in stems):
        seen = []
        for last, (word, *_) in enumerate(words[first:first + len(stems) + (len(stems) + 1) // 2], first):
            if not word.isalpha() or word in seen[:1]:  # the phrase ends, or a later place is closer
                break
            seen.append(word)
            meant = words[max(0, first - 9):first] if loosely and "it" in seen else ()
            named = stems.keys() & [*seen, *(word for word, *_ in meant)]
            if len(named) >= enough and (seen[0] == verb or "be" in seen and verb in seen):
                yield first, last
                break


def named_by_text(clause: str, options: tuple[str, ...]) -> list[tuple[int, int, str]]:
    """(begin, end, letter) wherever a clause names an option by its text, and not by that of a longer option."""
    words, taken, found = content_words(clause), set(), []
    letters = map(chr, itertools.count(ord("A")))  # there may be more steps than letters
    for letter, option in sorted(zip(letters, options), key=lambda pair: -len(pair[1])):
        for first, last in places(option, words):
            if taken.isdisjoint(range(first, last + 1)):
                taken.update(range(first, last + 1))
                found.append((words[first][1], words[last][2], letter))
    return found


def favoured(clause: str, options: tuple[str, ...]) -> list[tuple[int, int, str]]:
    """(begin, end, letter) of each option that a clause names and does not turn down, in their order."""
    letters, articles = string.ascii_uppercase[:len(options)], {match.end() for match in ARTICLE.finditer(clause)}
    form = rf"(?<![\w#])(?<!\w')(?:\(([{letters}])\)|([{letters.replace('I', '')}])(?!\w|'\w))"  # I is whoever writes
    by_letter = [(*m.span(), m[1] or m[2]) for m in re.finditer(form, clause) if m.start() not in articles]
    mentions, named, down = [], [], None  # down: where the last option ended that was; in "not A or B" B is, too
    for begin, end, letter in sorted(by_letter + named_by_text(clause, options)):
        if mentions and mentions[-1][2] == letter and not re.search(r"\w", clause[mentions[-1][1]:begin]):
            begin = mentions.pop()[0]  # "B. cut onion" is one
        mentions.append((begin, end, letter))
    for begin, end, letter in mentions:
        as_well = down is not None and JOINED.fullmatch(clause, down, begin)
        if as_well or TURNED_DOWN.search(clause[max(0, begin - 40):begin]) or IS_DOWN.match(clause, end):
            down = end
        else:
            named.append((begin, end, letter))
    return named


def concluded_option(completion: str, options: tuple[str, ...]) -> str | None:
    """The letter of the option that the reasoning concludes with, or None where it concludes with none, or with two.

    That is what the last clause with a word such as "answer", "so", "next" or "best" names behind this word, or else
    before it. Where no clause has one, it is the one option that the last clause names, but not as an item of a list.
    """
    clauses = [clause for clause in reasoning_clauses(completion) if options and not REASON.match(clause)]
    for clause in reversed(clauses):
        named, words = favoured(clause, options), [match.end() for match in CONCLUDES.finditer(clause)]
        if named and words:
            word = max((end for end in words if end <= named[-1][0]), default=None)
            (_, end, letter), *others = named[-1:] if word is None else [item for item in named if item[0] >= word]
            undecided = others and others[0][2] != letter and JOINED.fullmatch(clause, end, others[0][0])
            return None if undecided else letter
    last = {letter for _, _, letter in favoured(clauses[-1], options)} if clauses else set()
    return last.pop() if len(last) == 1 and not ITEM.match(clauses[-1][:40]) else None


def steps_told(text: str, steps: tuple[str, ...]) -> int:
    """How many of the steps a text names in their order: the longest chain of such, each ending behind the last."""
    words, ends = content_words(text), []  # ends[n]: the first word with which a chain of n + 1 steps can end
    for step in steps:
        for last in sorted((last for _, last in places(step, words, loosely=True)), reverse=True):
            n = bisect.bisect_left(ends, last)
            ends[n:n + 1] = [last]
    return len(ends)


def format_reward(completion: str, example: Example) -> float:
    """1 if the completion is one <think> block, then one <answer> block, and nothing else."""
    one_of_each = all(completion.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    well_formed = re.fullmatch(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", completion, re.DOTALL)
    return float(one_of_each and bool(well_formed))


def agreement_reward(completion: str, example: Example) -> float | None:
    """1 if the option that the reasoning concludes with is the one answered, else 0; None without options."""
    if not example.options:
        return None
    concluded = concluded_option(completion, example.options)
    return float(concluded is not None and concluded == parse_answer(completion, example.options))


def process_reward(completion: str, example: Example) -> float | None:
    """The share of the steps done (`task_progress_metadata`) that the reasoning names as done, in their order, 0 to 1.

    Each option that it names as done, and that was not, counts like a step left out: a list of all that may ever happen
    scores less than an honest one. Clauses that tell of options or of what is to come name nothing as done. None if the
    record tells no steps.
    """
    options, steps = example.options, tuple(step for step in example.question.progress if content_words(step))
    if not steps:  # or none that has a word
        return None
    told = ", ".join(clause for clause in reasoning_clauses(completion) if not NOT_DONE.search(clause))
    done = ", ".join(steps)  # "wash pot" is no invention where "washes the pot with water" was done
    invented = tuple(option for option in options if not any(places(option, content_words(done))))
    return steps_told(told, steps) / (len(steps) + len({letter for *_, letter in named_by_text(told, invented)}))


# ----------------------------------------------------------------------------------------------------------------------
# Order: worker processes prepare examples ahead of training, in an order that follows from the step number.

@functools.lru_cache(maxsize=2)
def epoch_order(num_questions: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the questions in an epoch: a permutation of range(num_questions)."""
    return np.random.default_rng([seed, epoch]).permutation(num_questions)


def step_batch(step: int, prompts_per_step: int, num_questions: int, seed: int, rank: int = 0,
               world_size: int = 1) -> list[tuple[int, int]]:
    """The (epoch, index) pairs that a rank takes at a step (from 0).

    Steps cut an endless stream of epochs into pieces of `prompts_per_step`, over all ranks together; a rank takes every
    world_size-th of a piece. Epochs run into each other, nothing is dropped, and to resume takes the step number alone.
    """
    pairs = []
    for position in range(step * prompts_per_step + rank, (step + 1) * prompts_per_step, world_size):
        epoch, place = divmod(position, num_questions)
        pairs.append((epoch, int(epoch_order(num_questions, seed, epoch)[place])))
    return pairs


def make_loader(dataset: VideoDataset, batches: Iterable[list[tuple[int, int]]],
                num_workers: int) -> torch.utils.data.DataLoader:
    """A list[Example] for each list of (epoch, index), in their order.

    Each worker has one torch thread (DataLoader sees to that) and is two batches ahead. With no workers, batches are
    read here, when they are asked for.
    """
    atexit.register(end_workers)
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=num_workers, collate_fn=list,
                                       worker_init_fn=start_worker)


def end_workers() -> None:
    """They ignore SIGTERM, so they are killed; DataLoader's handler would take that for a fault and raise."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


def start_worker(worker_id: int) -> None:
    """Tensors go to the trainer by value: torch would put them into shared memory, to stay there when both are killed.
    The trainer decides when its workers end. Ctrl-C and SLURM signal the whole group: a worker that died of it would
    take the batch of the last step along. Without a trainer they end within a second, whatever they wait for."""
    multiprocessing.reduction.register(Tensor, lambda x: (torch.from_numpy, (x.numpy(),)))
    signal.set_wakeup_fd(-1)  # the trainer's (`watch` in runtime.py)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    trainer = os.getppid()
    signal.signal(signal.SIGALRM, lambda *_: os.getppid() == trainer or os._exit(1))
    signal.setitimer(signal.ITIMER_REAL, 1, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Decoding: files become uint8 frames.

def resize(image: Image.Image, settings: PixelSettings) -> np.ndarray:
    """(H, W, 3) uint8, a square whatever the aspect was: every question costs the same number of tokens."""
    return np.array(image.convert("RGB").resize((settings.image_size, settings.image_size), Image.Resampling.BICUBIC))


def first_bytes(path: Path) -> bytes:
    """What a file begins with. ValueError if it is no regular file (a fifo may never open) or cannot be opened."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            return file.read(256)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # the fault of this machine, not of the file
            raise
        raise ValueError(f"{path}: {error.strerror}") from error


def read_image(path: Path, settings: PixelSettings) -> np.ndarray:
    """A png or jpeg file -> (1, H, W, 3) uint8 RGB, upright. Raises ValueError if it cannot be read."""
    first_bytes(path)
    try:
        with Image.open(path) as image:
            return resize(ImageOps.exif_transpose(image), settings)[None]
    except Exception as error:  # Pillow raises whatever its plugins raise, SyntaxError among others
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error


# How files begin that hold their frames themselves: mp4 and mov; mkv, avi, flv, ogg, wmv; mxf and the streams of MPEG.
# Playlists (HLS, DASH, ffconcat, SDP) would make ffmpeg open other files, anywhere on this machine.
CONTAINER = re.compile(
    rb"....(ftyp|moov|mdat|wide|free|skip|pnot)|\x1aE\xdf\xa3|RIFF....AVI |FLV\x01|OggS\x00|0&\xb2u\x8ef\xcf\x11|"
    rb"\x06\x0e\+4|\x00\x00\x01\xba|(....)?G.{187}(....)?G", re.DOTALL)
warn_once = functools.cache(warnings.warn)


def decode_video(path: Path, settings: PixelSettings) -> tuple[np.ndarray, np.ndarray]:
    """`read_video` in this process. Raises whatever decord raises, if it lives to do so."""
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
    except decord.DECORDError as error:
        if "cannot find video stream" in str(error):  # or none that it has the codec for: PyAV may know which
            with contextlib.suppress(Exception):
                import av
                codec = av.open(str(path)).streams.video[0].codec_context
                error = ValueError(f"codec {codec.codec.canonical_name} ({codec.profile}) is none that decord decodes")
        raise error
    times = reader.get_frame_timestamp(range(len(reader))).astype(float)  # (n, 2) seconds
    known = (np.abs(times) < 1e6).all()  # where a file tells none, decord gives some 1e14, of either sign
    # A clip cut without encoding it anew begins at a key frame before the cut. No player shows what lies before time 0:
    # decord counts these frames, but its decoder drops them. Up to the next key frame it can only be read in order.
    hidden = int((times[:, 0] < -1e-3).sum()) if known else 0
    in_order = min((key for key in reader.get_key_indices() if key >= hidden), default=len(reader)) - hidden
    indices, seconds = sample_frames(len(reader) - hidden, reader.get_avg_fps(), settings,
                                     times[hidden:] if known else None)
    indices, pixels = indices.tolist(), {}
    for i in sorted({*range(in_order), *indices}):
        frame = reader.next() if i < in_order else reader[hidden + i]
        if i in indices:
            h, w, c = frame.shape  # c is above 3 for narrow videos: decord takes the padding of a row for channels
            pixels[i] = resize(Image.frombuffer("RGB", (w, h), frame.asnumpy(), "raw", "RGB", w * c, 1), settings)
    return np.stack([pixels[i] for i in indices]), seconds


def cached_video(path: Path, settings: PixelSettings) -> tuple[np.ndarray, np.ndarray]:
    """`read_video`, once per file and settings where there is a cache: later epochs and runs read its uint8 frames.

    A file that cannot be read is not remembered; one that was changed is read again. Old entries stay, and their names
    do not know this code: empty it after changing how frames are picked or resized. Warns if it cannot be written.
    """
    if not settings.cache:
        return read_video(path, settings)
    first_bytes(path)  # ValueError, where `stat` would raise OSError
    status = path.stat()
    how = (settings.fps, settings.min_frames, settings.num_frames, settings.image_size)
    key = repr((str(path.resolve()), status.st_size, status.st_mtime_ns, how))
    cached = Path(settings.cache) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):  # not there, or damaged, as when a machine loses power
        with open(cached, "rb") as file:
            return np.load(file), np.load(file)
    video = read_video(path, settings)
    # Renamed when whole: no other worker, on this machine or another, and no later run, ever sees half a file.
    part = cached.with_suffix(f".{uuid.uuid4().hex}")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            for array in video:
                np.save(file, array)
        part.replace(cached)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        warn_once(f"the frame cache {settings.cache} cannot be written: {error.strerror or 'no room'}; go on without")
    return video


def read_video(path: Path, settings: PixelSettings) -> tuple[np.ndarray, np.ndarray]:
    """An mp4 file -> (F, H, W, 3) uint8 RGB, and (F + 1,) float64, the seconds of `sample_frames`. Raises ValueError if
    it cannot be read, for whatever reason."""
    if not CONTAINER.match(start := first_bytes(path)):
        raise ValueError(f"{path}: begins with {start[:16]!r}, as no video file does; make it an mp4, mkv or the like")
    status, content = decode_in_child(path, settings)
    if status == 0 and content:
        file = io.BytesIO(content)
        return np.load(file), np.load(file)
    if status == -signal.SIGALRM:
        reason = f"decoding took longer than {settings.timeout_s} s and was stopped"
    elif status == 1 and content:
        reason = content.decode(errors="replace")
    else:
        reason = "decoding crashed, " + (signal.strsignal(-status) or "" if status < 0 else f"exit status {status}")
    raise ValueError(f"{path}: {reason}")


def decode_in_child(path: Path, settings: PixelSettings) -> tuple[int, bytes]:
    """(exit status, what the child wrote): 0 and two arrays; 1 and what went wrong; minus a signal for a crash.

    On a corrupt file decord may wait forever, eat memory or end the process, so each video is decoded in a child of its
    own; a fork costs some milliseconds. (By hand, POSIX: DataLoader workers may not use `multiprocessing`.) The alarm
    clock that ends it is the child's own, so that it goes off even when nobody waits for the child any more.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(read_end)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the default ends a process even inside C code
            signal.setitimer(signal.ITIMER_REAL, settings.timeout_s)
            with open(write_end, "wb") as pipe:
                try:
                    file = io.BytesIO()
                    for array in decode_video(path, settings):
                        np.save(file, array)
                    pipe.write(file.getbuffer())
                    status = 0
                except Exception as error:  # one line of it, to fit into a log
                    pipe.write(f"{type(error).__name__}: {error}".split("\n")[0].encode())
        finally:
            os._exit(status)  # nothing that belongs to the parent is flushed or closed
    os.close(write_end)
    with open(read_end, "rb") as pipe:
        content = pipe.read()  # until the child has ended, in whatever way
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), content


# ----------------------------------------------------------------------------------------------------------------------
# Files: a record becomes a question, and whatever is wrong with it is said with its place and its fix.

def load_questions(path: str | Path, data_root: str | Path) -> list[Question]:
    """Read a dataset file (JSONL, or one JSON list) of any of the five shapes.

    `data_root` holds videos/ and images/; a relative `path` is looked up there too (annotations/training_6k.jsonl).
    Raises ValueError with file, line (or record) number, field, value and fix for anything malformed. A video that is
    missing or broken is no such error: it is counted when it is read.
    """
    root = Path(data_root).resolve()
    path = root / path
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); give a JSONL file or a JSON list, in UTF-8") from None
    if content.lstrip().startswith("["):
        unit, records = "record", list(enumerate(parse_json(content, path), start=1))
    else:  # split at "\n" alone: splitlines would also cut at U+2028, which may stand inside a string
        lines = [(number, line) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]
        unit, records = "line", [(number, parse_json(line, f"{path}, line {number}")) for number, line in lines]
    if not records:
        raise ValueError(f"{path}: has no records; write one JSON object per line")
    questions: dict[str, Question] = {}
    for number, record in records:
        try:
            question = read_record(record, number, root)
            if len(set(question.options)) < len(question.options):
                raise ValueError(f"the options {question.options} are not all different; give each its own text")
            if question.id in questions:
                raise ValueError(f"the id {question.id!r} has been used before; give every record its own")
        except ValueError as error:
            raise ValueError(f"{path}, {unit} {number}: {error}") from None
        questions[question.id] = question
    return list(questions.values())


def parse_json(text: str, place: str | Path) -> object:
    """The value of a JSON text, without keys that are null; ValueError with `place` if it is none."""
    try:  # Table libraries give every object every key of the table, and null to most: a null key counts as absent.
        return json.loads(text, object_hook=lambda item: {k: v for k, v in item.items() if v is not None})
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: is not JSON ({error}): {text[:80]!r}; write one JSON object per line") from None


def leave_out(questions: list[Question], evaluations: list[str]) -> list[Question]:
    """The questions that not every one of these evaluations of their file answered right, in their order.

    A question that is answered without looking teaches a policy not to look. `evaluations` are paths of evaluate.py's
    samples.jsonl, matched by id and by the names of video and image (ids are often plain numbers).
    Raises ValueError if records have no ids, an evaluation is of other questions or named twice, or nothing is left.
    """
    if not evaluations:
        return questions
    if unnamed := sum(not question.has_id for question in questions):
        raise ValueError(f"--leave_out needs a 'sample_id' in every training record; {unnamed} have none")
    if len(set(evaluations)) < len(evaluations):
        raise ValueError(f"--leave_out {' '.join(evaluations)}: a file is named twice")
    by_id = {question.id: question for question in questions}
    answered = set(by_id)
    for path in evaluations:
        try:
            records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
            right = {(record["sample_id"], record["video"], record["image"]): record["correct"] for record in records}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"--leave_out {path}: not the samples.jsonl of an evaluation ({error!r:.200})") from None
        of_ours = {key[0]: correct for key, correct in right.items()
                   if key[0] in by_id and key[1:] == file_names(by_id[key[0]])}
        if not of_ours:
            raise ValueError(f"--leave_out {path}: none of its questions is in the training file; evaluate that file "
                             "(evaluate.py --eval_files takes training files too)")
        answered &= {name for name, correct in of_ours.items() if correct}
    if len(answered) == len(questions):
        raise ValueError("--leave_out would leave no question to learn from")
    return [question for question in questions if question.id not in answered]


def file_names(question: Question) -> tuple[str, str]:
    """(video, image) of a question, "" where it has none."""
    return tuple(path.name if path else "" for path in (question.video, question.image))


def read_record(record: object, number: int, root: Path) -> Question:
    """One JSON record -> Question. Raises ValueError with field, value and fix, to which the caller adds the place."""
    if not isinstance(record, dict):
        raise ValueError(f"the record is {record!r:.80}; it must be a JSON object")
    # Either of two keys tells the shape, so that an error can name the other one if it is missing.
    if "prompt" in record or "response" in record:
        return sft_question(record, number, root)
    if "candidates" in record or "correct_choice" in record:
        return long_video_question(record, root)
    if "golden_choice_idx" in record or "choice_a" in record:
        return validation_question(record, root)
    if "answer" in record or "negative_answers" in record:
        return training_question(record, root)
    if "reference" in record:
        return free_form_question(record, root)
    raise ValueError(f"the record has the keys {sorted(record)!r:.200}; it must have those of one of the shapes "
                     "SFT (prompt, response), LongVideoBench (candidates, correct_choice, video_path), "
                     "validation (choice_a .. choice_d, golden_choice_idx), training (answer, negative_answers) or "
                     "free-form (reference, video_path)")


def training_question(record: dict, root: Path) -> Question:
    """SEED-Bench-R1's training_6k.jsonl."""
    answer = one_line(field(record, "answer", *TEXT))
    negatives = tuple(map(one_line, field(record, "negative_answers", *TEXTS)))
    if set(negatives) == {answer}:
        raise ValueError(f"field 'negative_answers' has nothing but the answer {answer!r}; give a wrong action")
    return seed_bench_question(record, root, answer=answer, negatives=negatives)


def validation_question(record: dict, root: Path) -> Question:
    """SEED-Bench-R1's validation_L1.jsonl, L2, L3."""
    options = tuple(one_line(field(record, f"choice_{letter}", *TEXT)) for letter in "abcd")
    gold = field(record, "golden_choice_idx", lambda v: v in ("A", "B", "C", "D"), "'A', 'B', 'C' or 'D'")
    domain = field(record, "domain", *TEXT, optional=True)
    return seed_bench_question(record, root, options=options, gold=gold, part=domain)


def seed_bench_question(record: dict, root: Path, **choice) -> Question:
    """What the training and the validation files of SEED-Bench-R1 share."""
    source, image = field(record, "video_source", *TEXT), field(record, "current_observation_basename", *TEXT)
    # The videos are already cut, so the frame numbers of the steps are not used.
    steps = field(record, "task_progress_metadata",
                  lambda v: is_objects(v) and all(is_text(step.get("narration_text")) for step in v),
                  "a list of objects with a 'narration_text', empty if there is no video")
    video = field(record, "video_basename", *TEXT, optional=True)
    if steps and not video:
        raise ValueError("field 'video_basename' is missing, but 'task_progress_metadata' has steps; name their video")
    return Question(
        id=str(field(record, "sample_id", *ID)), text=field(record, "question", *TEXT),
        goal=field(record, "task_goal", *TEXT),
        progress=tuple(step["narration_text"] for step in steps),
        video=inside(root, "video_basename", "videos", source, video) if steps else None,
        image=inside(root, "current_observation_basename", "images", source, image), **choice)


def long_video_question(record: dict, root: Path) -> Question:
    """LongVideoBench's lvb_val.json, and the shape for multiple choice of one's own without an image."""
    options = tuple(map(one_line, field(record, "candidates", *CHOICES)))
    gold = field(record, "correct_choice", lambda v: type(v) is int and v >= 0, "an integer from 0")
    if gold >= len(options):
        raise ValueError(f"field 'correct_choice' is {gold}; it must be below the number of candidates")
    return Question(
        id=str(field(record, "id", *ID)), text=field(record, "question", *TEXT),
        options=options, gold=string.ascii_uppercase[gold],
        part=str(field(record, "duration_group", *ID, optional=True)),
        video=inside(root, "video_path", "videos", field(record, "video_path", *TEXT)), image=None)


def free_form_question(record: dict, root: Path) -> Question:
    """A question of one's own whose answer is no option: `reference` is the right answer, which `grade` compares."""
    reference = field(record, "reference", lambda v: is_text(v) and loose(v), "a text that is not only a full stop")
    return Question(
        id=str(field(record, "id", *ID)), text=field(record, "question", *TEXT), gold=reference,
        video=inside(root, "video_path", "videos", field(record, "video_path", *TEXT)), image=None)


def sft_question(record: dict, number: int, root: Path) -> Question:
    """SEED-Bench-R1's training_with_cot_6k.jsonl: chat messages and the teacher's response."""
    text, video, image = read_messages(field(record, "prompt", is_objects, "a list of chat messages"))
    name = str(field(record, "sample_id", *ID, optional=True))
    return Question(
        id=name or str(number), has_id=name != "", text=text, response=field(record, "response", *TEXT),
        video=inside(root, "prompt", video) if video else None,
        image=inside(root, "prompt", image) if image else None)


def read_messages(messages: list[dict]) -> tuple[str, str | None, str | None]:
    """The prompt of an SFT record -> (user text, video path or None, image path or None).

    One user message: a video (if any), an image (if any) and one text, in this order. Before it may stand the default
    system message: the prompt has the one that its family was trained with; any other would be lost, so it is refused.
    """
    default = {"role": "system", "content": SYSTEM}, {"role": "system", "content": [{"type": "text", "text": SYSTEM}]}
    if messages and messages[0] in default:
        messages = messages[1:]
    if [message.get("role") for message in messages] != ["user"]:
        raise ValueError(f"field 'prompt' is {messages!r:.200}; it must be one message of role 'user', and before "
                         f"it nothing but the default system message, {SYSTEM!r}")
    content = messages[0].get("content")
    found: dict[str, str] = {}
    for item in content if isinstance(content, list) else [{"type": "text", "text": content}]:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind not in ("video", "image", "text") or kind in found or not is_text(item.get(kind)):
            raise ValueError(f"field 'prompt' has the item {item!r:.200}; it must be the only one of its type, and "
                             "look like {'type': 'text', 'text': ...}, or the same with 'image' or 'video' and a path")
        found[kind] = item[kind]
    if list(found) != [kind for kind in ("video", "image", "text") if kind in found or kind == "text"]:
        raise ValueError(f"field 'prompt' has the items {list(found)}; write video (if any), image (if any), text")
    if "video" not in found and "image" not in found:
        raise ValueError("field 'prompt' has neither a video nor an image item; give one, or there is nothing to see")
    return found["text"], found.get("video"), found.get("image")


def is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def is_texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


def is_objects(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


# What a field may hold, and how that is said.
TEXT, TEXTS = (is_text, "a non-empty string"), (is_texts, "a list of one or more non-empty strings")
CHOICES = lambda value: is_texts(value) and 2 <= len(value) <= 5, "a list of 2 to 5 non-empty strings"
ID = lambda value: type(value) is int or is_text(value), "an integer or a non-empty string"


def field(record: dict, name: str, holds, wanted: str, optional: bool = False):
    """record[name], for which `holds` is true and which has no special token in it; "" if optional and not there."""
    if optional and record.get(name, "") == "":
        return ""
    if name not in record:
        raise ValueError(f"field {name!r} is missing; a record with {sorted(record)!r:.200} must have it, as {wanted}")
    if not holds(record[name]):
        raise ValueError(f"field {name!r} is {record[name]!r:.200}; it must be {wanted}")
    if found := FORBIDDEN.search(json.dumps(record[name], ensure_ascii=False)):
        raise ValueError(f"field {name!r} has {found.group()!r} in its text; take it out or spell it differently")
    return record[name]


def one_line(text: str) -> str:
    """An option takes one line of the prompt; with a newline in it, it could pass for two."""
    return " ".join(text.split())


def inside(root: Path, field: str, *parts: str) -> Path:
    """The path of `parts` below the (resolved) data root, resolved, and still below it; else ValueError.

    Dataset files come from strangers: an absolute path, `..` or a link out of the root would let them choose any file.
    """
    fix = f"name a file below the data root {root}: no absolute path, no '..', no link out of it, no URL"
    if any("\0" in part or "://" in part or Path(part).is_absolute() or ".." in Path(part).parts for part in parts):
        raise ValueError(f"field {field!r} leads to {'/'.join(parts)!r}; {fix}")
    try:
        path = root.joinpath(*parts).resolve()
    except (OSError, RuntimeError) as error:  # links in a circle, a name too long
        raise ValueError(f"field {field!r} leads to {'/'.join(parts)!r} ({error}); {fix}") from None
    if not path.is_relative_to(root):
        raise ValueError(f"field {field!r} leads to {'/'.join(parts)!r}, which is {path}; {fix}")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Check: before days of training, whether all files can be read. With --frame_cache, later runs need not decode them.

def check_files() -> None:
    parser = argparse.ArgumentParser(description="Reads the video and the image of every question of a dataset file.")
    parser.add_argument("file")
    flags = dict(data_root=".", fps=2.0, min_frames=4, num_frames=16, image_size=252, frame_cache="", num_workers=2)
    for name, default in flags.items():  # they mean what they mean to the trainers (runtime.py)
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    try:
        settings = PixelSettings(args.fps, args.min_frames, args.num_frames, args.image_size, args.frame_cache)
        dataset = VideoDataset(load_questions(args.file, args.data_root), None, None, settings, seed=0)
    except ValueError as error:
        sys.exit(str(error))
    loader = make_loader(dataset, [[(0, i)] for i in range(len(dataset))], args.num_workers)
    errors = [f"{e.question.id}: {e.error}" for [e] in tqdm(loader, total=len(dataset), dynamic_ncols=True) if e.error]
    videos, images = (sum(map(bool, paths)) for paths in zip(*((q.video, q.image) for q in dataset.questions)))
    print(f"{len(dataset)} questions, {videos} with video, {images} with image; {len(errors)} unreadable", *errors,
          sep="\n")
    sys.exit(bool(errors))


if __name__ == "__main__":
    check_files()
