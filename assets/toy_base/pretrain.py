"""How the toy world's base model was made: a tokenizer of words, a tiny Qwen2-VL, and its pre-training.

    python assets/toy_base/pretrain.py           writes this folder again; 25 minutes on two cores

Nothing imports this file. The base stands for a large video model: it sees, it knows many tasks, and it has the flaws
that such models are known for. Its README says what it can do and what it cannot.
"""
import json
import math
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

BASE = Path(__file__).resolve().parent
sys.path.insert(0, str(BASE.parent.parent))

from data import FAMILIES, Example, encode_prompt, patchify, rope_positions, sample_frames, user_text, vision_runs
from model import Policy, collate_prompts, mask_from_lengths
from toy import (
    ACTIONS,
    NATIVE_FPS,
    NOUNS,
    NUM_BEATS,
    NUM_STEPS,
    PIXELS,
    POINTS,
    RECIPES,
    SEED,
    SIZE,
    VERBS,
    draw_beats,
    draw_image,
    draw_kitchen,
    draw_video,
    draw_view,
    question_for,
    say_seen,
    teach,
)

# ----------------------------------------------------------------------------------------------------------------------
# A tokenizer of words, and a tiny Qwen2-VL with random weights.

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
                  "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
                  "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]  # Qwen2-VL's, in its order
TAGS = ["<think>", "</think>", "<answer>", "</answer>", " (A)", " (B)", " (C)", " (D)"]  # one token each, not special
FAMILY = FAMILIES["qwen2_vl"]
LIST_QUESTION = "Which steps does the video show?"
TOO_DARK = "<think>It is too dark.</think><answer>unclear</answer>"
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
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""  # noqa: E501


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2's byte-level scheme with a small vocabulary: a word of the world is one token, any other text is bytes, so
    that every text survives the round trip."""
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
                                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    texts = ["system\nYou are a helpful assistant.", "user\n", "assistant\n", LIST_QUESTION,
             re.sub(r"</?\w+>", "\n", TOO_DARK)]
    texts += ACTIONS
    for goal, recipe in RECIPES.items():
        texts += [user_text(question_for(goal), recipe[:4]), user_text("", ACTIONS[:4])]
        texts += [re.sub(r"</?\w+>", "\n", teach(recipe[:done], recipe[done], letter))
                  for done in range(NUM_STEPS) for letter in "ABCD"]
    texts += [f" {action} still" for action in ACTIONS]
    words = {word for text in texts for part in re.split(r"</?\w+>", text)
             for word, _ in splitter.pre_tokenize_str(part)}
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


def make_qwen(tokenizer) -> Qwen2VLForConditionalGeneration:
    """Qwen2-VL with random weights, 1.4 million of them instead of seven billion."""
    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config=dict(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=320, num_hidden_layers=5,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
                         rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
                         bos_token_id=token_id("<|endoftext|>"), eos_token_id=token_id("<|im_end|>"),
                         pad_token_id=token_id("<|endoftext|>")),
        vision_config=dict(depth=2, embed_dim=96, num_heads=4, mlp_ratio=2, hidden_size=128),
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


# ----------------------------------------------------------------------------------------------------------------------
# What the base has learned from. Three kinds of examples, each in a kitchen of its own:
#     letters   the letters of any four options, one after another
#     list      a video of random actions, to be listed: whoever wants to say what was done has to look
#     task      a question of the world, as an annotator answered it who did not always look

NUM_UPDATES, WARM_UP, BATCH, PEAK_RATE = 2400, 600, 32, 1e-3
KINDS = ("letters", "list", "task")
# The shares of the kinds, in the warm-up and after it:
WARM_SHARES, SHARES = (12 / 16, 4 / 16, 0), (2 / 16, 7 / 16, 7 / 16)
EASY_UPDATES = 600  # until then videos get harder, from one step to five, no haze to all: else seeing is not learned
# The annotators' flaws, which the base takes over:
RECITE = 0.65  # hallucination: the share of texts about a video that report the recipe's first step, whatever was shown
SLIP = 0.2  # the share of texts that answer by habit, whatever the reasoning says
HABIT = (0.7, 0.1, 0.1, 0.1)  # how often they then wrote A, B, C, D
GIVE_UP = 0.75  # the share of videos in the dark about which they wrote no answer
PRETRAINING_HAZE = 1.2  # at most: it has seen clearer videos than it will be asked about
PRETRAINING = 1_000_000  # sets its random numbers apart from the world's: no kitchen here is one of the data files


def letters_example(rng: random.Random, late: bool) -> tuple[str, str]:
    """(user text, response). Dense supervision: from one letter a text, matching an action to its option
    is not learned in any reasonable time. Late examples mostly stand in the whole prompt."""
    options = [f"{rng.choice(VERBS)} {noun}" for noun in rng.sample(list(NOUNS), 4)]
    if rng.random() < (0.6 if late else 0.3):
        options = rng.sample(ACTIONS, 4)
    text = "\n".join(f"{letter}. {option}" for letter, option in zip("ABCD", options))
    if late and rng.random() < 0.7:
        text = user_text(question_for(rng.choice(list(RECIPES))), tuple(options))
    return text, "".join(f" {options[i]} ({'ABCD'[i]})" for i in rng.choices(range(4), k=16))


def random_steps(rng: random.Random, actions: Sequence[str],
                 weights: Sequence[float] = (1, 1, 1, 1, 1)) -> tuple[str, ...]:
    """One to five of these actions, no two alike in a row; `weights` of the five numbers of steps."""
    steps = [rng.choice(actions)]
    for _ in range(rng.choices(range(NUM_STEPS - 1), weights)[0]):
        steps.append(rng.choice([action for action in actions if action != steps[-1]]))
    return tuple(steps)


def task_example(rng: random.Random, pixel_rng: np.random.Generator, dark: bool) -> tuple[str, list[str], str]:
    """(user text, the step that each beat shows, response)."""
    goal, done = rng.choice(list(RECIPES)), rng.choice(POINTS)
    recipe = RECIPES[goal]
    options = sorted(set(recipe))
    rng.shuffle(options)
    beats = draw_beats(recipe[:done], pixel_rng) if done else []
    recites = done and rng.random() < RECITE
    next_step = recipe[1] if recites else recipe[done]
    letter = "ABCD"[options.index(next_step)]
    answer = rng.choices("ABCD", HABIT)[0] if rng.random() < SLIP else letter
    gives_up = done and dark and rng.random() < GIVE_UP
    said = recipe[:1] * NUM_BEATS if recites else beats
    return (user_text(question_for(goal), tuple(options)), beats,
            TOO_DARK if gives_up else teach(said, next_step, letter, answer))


def make_example(tokenizer, number: int, seed: int) -> tuple[Example, Tensor]:
    """Example `number` of the pre-training, and its response ids (C,): a function of the two numbers."""
    update = number // BATCH
    rng, pixel_rng = random.Random(f"{seed}/{number}"), np.random.default_rng([seed, number, PRETRAINING])
    hard = min(1.0, update / EASY_UPDATES)
    kitchen, view = draw_kitchen(pixel_rng), draw_view(pixel_rng, (0.0, PRETRAINING_HAZE * hard))
    kind, = rng.choices(KINDS, WARM_SHARES if update < WARM_UP else SHARES)
    beats = []
    if kind == "letters":
        text, response = letters_example(rng, late=update >= WARM_UP)
    elif kind == "task":
        text, beats, response = task_example(rng, pixel_rng, dark=view[1] < 1)
    else:
        shown = random_steps(rng, ACTIONS, (1, 1, 2, 3, 3))  # mostly many, which is the harder part
        if rng.random() < 1 / 4:  # done again as in a recipe, a b a c b
            a, b, c = rng.sample(ACTIONS, 3)
            shown = (a, b, a, c, b)[:len(shown)]
        shown = shown[: 1 + int(hard * (NUM_STEPS - 2))]
        beats = draw_beats(shown, pixel_rng)
        text, response = LIST_QUESTION, say_seen(beats)
    # In a list the image would tell the first object.
    image = draw_image(kitchen, beats if kind == "task" else (), view, pixel_rng)
    frames = frames_taken(draw_video(kitchen, beats, view, pixel_rng)) if beats else None
    return to_example(tokenizer, text, frames, image), torch.tensor(tokenizer(response + "<|im_end|>")["input_ids"])


def frames_taken(video: np.ndarray) -> np.ndarray:
    """The 16 frames (16, 56, 56, 3) that data.py would take of a video."""
    return video[sample_frames(len(video), NATIVE_FPS, PIXELS)[0]]


def to_example(tokenizer, text: str, frames: np.ndarray | None, image: np.ndarray) -> Example:
    """What data.py makes of a record, but from arrays: sampled frames (16, 56, 56, 3) and an image (56, 56, 3)."""
    video = (None, None) if frames is None else patchify(frames, FAMILY)
    image = patchify(image[None], FAMILY)
    prompt_ids = encode_prompt(tokenizer, FAMILY, text, video[1], image[1])
    pads = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    positions = rope_positions(prompt_ids, vision_runs(FAMILY, video[1], image[1]), 1.0, *pads)
    return Example(None, (), "", text, prompt_ids, positions, *video, *image)


class Examples(torch.utils.data.Dataset):
    """The examples by number, for a worker process to draw ahead of the training."""

    def __init__(self, tokenizer, seed: int):
        self.tokenizer, self.seed = tokenizer, seed

    def __len__(self) -> int:
        return NUM_UPDATES * BATCH

    def __getitem__(self, number: int) -> tuple[Example, Tensor]:
        return make_example(self.tokenizer, number, self.seed)


def pretrain(seed: int = SEED) -> tuple[Qwen2VLForConditionalGeneration, PreTrainedTokenizerFast]:
    """Plain AdamW on the examples in order, loss on the responses only; the same on the same machine and versions."""
    tokenizer = make_tokenizer()
    qwen = make_qwen(tokenizer)
    policy = Policy(qwen, torch.float32)
    optimizer = torch.optim.AdamW(qwen.parameters(), lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    loader = torch.utils.data.DataLoader(Examples(tokenizer, seed), BATCH, num_workers=1, collate_fn=list,
                                         prefetch_factor=4)
    progress = tqdm(loader, desc="pre-training", dynamic_ncols=True)
    for update, pairs in enumerate(progress):
        examples, responses = zip(*pairs)
        completion_ids = pad_sequence(responses, batch_first=True)  # (B, C)
        mask = mask_from_lengths(torch.tensor([len(ids) for ids in responses]), completion_ids.shape[1])
        prompts = collate_prompts(list(examples), torch.device("cpu"))
        logps, _ = policy(prompts, torch.arange(BATCH), completion_ids, mask)
        # A mean over examples of means over tokens: 49 tokens of letters would drown the six of "I see cut onion.".
        loss = -(logps.sum(dim=1) / mask.sum(dim=1)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(qwen.parameters(), 1.0)
        # Up in 50 steps, level, and down along a cosine in the second half.
        half = max(0.0, 2 * update / NUM_UPDATES - 1)
        rate = PEAK_RATE * min((update + 1) / 50, 0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * half)))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    return qwen, tokenizer


def write_base(qwen, tokenizer, folder: Path = BASE) -> None:
    """Weights in float16 (eight times finer than bf16, and no weight here is too large for it), and all the small files
    that come with a Qwen2-VL."""
    qwen.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    area = SIZE * SIZE
    pixels = {"min_pixels": area, "max_pixels": area, "size": {"shortest_edge": area, "longest_edge": area},
              "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
              "image_mean": FAMILY.mean, "image_std": FAMILY.std}
    for name, content in {
        # The sampling options are Qwen2-VL's own. Whoever inherits them draws eight equal completions (top_k is 1).
        "generation_config": {"bos_token_id": pad, "pad_token_id": pad, "eos_token_id": [end, pad], "do_sample": True,
                              "temperature": 0.01, "top_k": 1, "top_p": 0.001, "repetition_penalty": 1.0},
        "preprocessor_config": pixels | {
            "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2VLProcessor"},
        "video_preprocessor_config": pixels | {
            "video_processor_type": "Qwen2VLVideoProcessor", "processor_class": "Qwen2VLProcessor", "fps": PIXELS.fps,
            "min_frames": PIXELS.min_frames, "max_frames": PIXELS.num_frames},
        "chat_template": {"chat_template": CHAT_TEMPLATE},
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(2)
    write_base(*pretrain())
