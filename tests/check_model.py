"""Does this code make of your weights what Hugging Face's does? For each of the four families, in about a minute.

    python tests/check_model.py --model Qwen/Qwen2.5-VL-7B-Instruct [--dtype float32|bfloat16] [--device cpu|cuda]

The minute is an estimate for a GPU, after loading: so far it has run on tiny models on CPUs. It draws a clip and an
image, which `VideoDataset` reads as it does those of a dataset: a prompt with the clip, one with the image, one with
both. Then it prints a line for each of these, and exits with 1 if one differs, 2 if it could not begin:

    patches     normalised, against those of AutoProcessor, which gets our frames, sampled and resized
    prompts     token by token, against AutoProcessor's
    positions   against get_rope_index of the model's class
    log-probs   of greedy completions, against the logits of the class: those of `Policy` with shared prompts, with
                --naive, and those that the sampler drew by
    greedy      the completions, token by token, against those of the class's own `generate`

Bounds. Patches: 1e-5. Prompts, positions: none may differ. In float32, log-probs: 1e-3 nats; greedy: where our token is
not theirs, it is by their logits within 1e-3 of theirs. In bfloat16 rounding is not small, so it is measured: the mean
difference of log-probs may be three times the one between the class with its attention "eager" and with "sdpa", which
are the same sums in another order; greedy: within a 32nd of the largest logit, four times what bfloat16 resolves.

Two differences are on purpose, where transformers 5 is not as the release that the models were trained with: text goes
on behind a clip from its largest position + 1 (`rope_positions` in data.py), and there is no <|vision_start|> before,
and no <|vision_end|> behind, all time steps of a clip of Qwen3-VL. They are said and not counted; log-probs and tokens
are at our positions on both sides. The processor needs torchvision: without it, or without the processor's files,
patches and prompts are not compared. Nor is the vision tower: here as there it is that of the class.
"""
import argparse
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import cached_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import FAMILIES, Example, PixelSettings, Question, VideoDataset, normalise, read_image, read_video  # noqa: E402
from model import Policy, collate_prompts, end_token_ids, mask_from_lengths, vision_token_ids  # noqa: E402
from runtime import DTYPES, load_family, load_sampler, load_tokenizer  # noqa: E402
from sampler import Completions, generate  # noqa: E402

# The clip: 4.9 s, of which 8 frames are taken. A time step of it is 2.45 positions of Qwen2.5-VL, so the four are at
# 0, 2, 4 and 7, which is more than its rows of tokens.
NATIVE_FPS, NUM_DRAWN, SIDE = 10, 49, 5
NUM_TOKENS = 32  # of a completion, at most
TEXT = "What is to be seen here, and what changes? Describe it in three sentences."
VISION = ("pixel_values_videos", "video_grid_thw"), ("pixel_values", "image_grid_thw")


class Row(NamedTuple):
    """A line of the table."""
    what: str
    found: str
    bound: str
    holds: bool
    note: str = ""


# ----------------------------------------------------------------------------------------------------------------------
# What is looked at, as we read it and as Hugging Face does.

def draw(folder: Path) -> tuple[Path, Path]:
    """An mp4 of a red square on its way to the right, and its last frame as png. A corner's grey is 20 + 4 * frame."""
    y, x = np.mgrid[:240, :320]
    background = np.stack([x // 2, y, 255 - x // 2], axis=-1).astype(np.uint8)
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=NATIVE_FPS, options={"crf": "10", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for i in range(NUM_DRAWN):
            frame = background.copy()
            frame[100:160, 20 + 4 * i:80 + 4 * i] = 220, 30, 30
            frame[:48, :64] = 20 + 4 * i
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    Image.fromarray(frame).save(folder / "image.png")
    return folder / "clip.mp4", folder / "image.png"


def load_processor(model: str):
    """The processor of --model, or the reason why there is none."""
    names = "processor_config.json", "preprocessor_config.json"
    if not any(cached_file(model, name, _raise_exceptions_for_missing_entries=False) for name in names):
        return f"{model} has neither {' nor '.join(names)}"
    if not find_spec("torchvision"):
        return "transformers' video processor needs torchvision: pip install torchvision"
    from transformers import AutoProcessor  # only here: without torchvision it warns
    return AutoProcessor.from_pretrained(model)


def process(processor, question: Question, settings: PixelSettings) -> dict[str, Tensor]:
    """What the processor makes of a question, given our frames, and told which they are."""
    given = {"images": [Image.fromarray(read_image(question.image, settings)[0])]} if question.image else {}
    if question.video:
        frames, _ = read_video(question.video, settings)  # (F, H, W, 3)
        corner = frames[:, :settings.image_size // 8, :settings.image_size // 8]
        # Read off the frames: by the seconds that we have of them, we would only be compared with ourselves.
        indices = ((corner.mean(axis=(1, 2, 3)) - 20) / 4).round().astype(int).tolist()
        metadata = {"fps": NATIVE_FPS, "total_num_frames": NUM_DRAWN, "frames_indices": indices}
        given |= {"videos": [frames], "video_metadata": [metadata], "do_sample_frames": False}
    content = [{"type": kind} for kind in ("video", "image") if getattr(question, kind)]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return processor(text=[text], **given, do_resize=False, return_tensors="pt")


def token_types(config, ids: Tensor) -> Tensor:
    """0 for text, 1 for images, 2 for videos."""
    return (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()


def hf_inputs(qwen, example: Example, ids: Tensor) -> dict[str, Tensor]:
    """What the class takes for a prompt and the completion `ids` (L,) behind it, at our positions."""
    after = example.position_ids.max() + 1 + torch.arange(len(ids))
    ids = torch.cat([example.prompt_ids, ids.cpu()])
    inputs = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None],
              "mm_token_type_ids": token_types(qwen.config, ids)[None],
              "position_ids": torch.cat([example.position_ids, after.expand(3, -1)], dim=1)[:, None]}
    for patches, grid in VISION:
        if getattr(example, grid) is not None:
            inputs[patches] = normalise(getattr(example, patches), FAMILIES[qwen.config.model_type])
            inputs[grid] = getattr(example, grid)
    return {name: tensor.to(qwen.device) for name, tensor in inputs.items()}


def hf_logps(qwen, examples: list[Example], drawn: Completions, banned: Tensor, attention: str) -> Tensor:
    """log-probs (M,) of all completions by the class, with an attention of its own, "sdpa" or "eager"."""
    for config in (qwen.model.language_model.config, qwen.model.visual.config):
        config._attn_implementation = attention
    logps = []
    for example, ids, L in zip(examples, drawn.ids, drawn.lengths.tolist()):
        logits = qwen(**hf_inputs(qwen, example, ids[:L])).logits[0, -L - 1:-1].float()  # (L, V)
        logps.append(logits.index_fill_(1, banned, -torch.inf).log_softmax(-1).gather(1, ids[:L, None])[:, 0])
    return torch.cat(logps)


# ----------------------------------------------------------------------------------------------------------------------
# The checks.

def check_patches(qwen, examples: list[Example], processed: list[dict]) -> Row:
    gaps = []
    for example, theirs in zip(examples, processed):
        for patches, grid in VISION:
            if getattr(example, grid) is not None:
                ours = normalise(getattr(example, patches), FAMILIES[qwen.config.model_type])
                same = torch.equal(getattr(example, grid), theirs[grid]) and ours.shape == theirs[patches].shape
                gaps.append((ours - theirs[patches]).abs().max() if same else torch.tensor(torch.inf))
    most = torch.stack(gaps).max().item()  # NaN if one is
    return Row("patches", f"max {most:.1e}", "max 1e-05", most <= 1e-5)


def check_prompts(qwen, tokenizer, examples: list[Example], processed: list[dict]) -> Row:
    agree, total, note = 0, 0, ""
    for example, theirs in zip(examples, processed):
        ours, theirs = example.prompt_ids.tolist(), theirs["input_ids"][0]
        is_vision = token_types(qwen.config, theirs) > 0
        outer = ((theirs == qwen.config.vision_start_token_id) & ~is_vision.roll(-1)
                 | (theirs == qwen.config.vision_end_token_id) & ~is_vision.roll(1))
        theirs = theirs[~outer].tolist()
        i, length = parting(ours, theirs), max(len(ours), len(theirs))
        if i < length:
            texts = (repr(tokenizer.decode(ids[max(i - 4, 0):i + 4])) for ids in (ours, theirs))
            note = f"{example.question.id}, token {i}: {' and theirs '.join(texts)}"
        elif outer.any():
            note = note or "on purpose without transformers 5's <|vision_start|> and <|vision_end|> around a clip"
        agree, total = agree + i, total + length
    return Row("prompts", f"{agree} of {total}", "all", agree == total, note)


def check_positions(qwen, examples: list[Example], processed: list[dict] | None) -> Row:
    agree, total, note = 0, 0, ""
    for i, example in enumerate(examples):
        ids, ours = example.prompt_ids, example.position_ids
        types, seconds = token_types(qwen.config, ids), {}
        if getattr(qwen.config.vision_config, "tokens_per_second", 0) and example.question.video:
            per_step = torch.tensor([NUM_DRAWN / NATIVE_FPS / int(example.video_grid_thw[0, 0])])
            seconds = {"second_per_grid_ts": processed[i]["second_per_grid_ts"] if processed else per_step}
        theirs, _ = qwen.model.get_rope_index(ids[None], types[None], image_grid_thw=example.image_grid_thw,
                                              video_grid_thw=example.video_grid_thw, **seconds)
        theirs = theirs[:, 0].clone()
        if example.question.video:
            end = int((types == 2).nonzero().max()) + 1
            late = int(ours[:, :end].max()) + 1 - int(theirs[0, end])
            if late > 0:
                theirs[:, end:] += late
                note = note or f"on purpose {late} later than transformers 5's behind the clip"
        same = (ours == theirs).all(0)
        if not same.all():
            at = int(same.int().argmin())
            note = f"{example.question.id}, token {at}: {ours[:, at].tolist()} and theirs {theirs[:, at].tolist()}"
        agree, total = agree + int(same.sum()), total + len(ids)
    return Row("positions", f"{agree} of {total}", "all", agree == total, note)


def check_logps(what: str, ours: Tensor, theirs: Tensor, noise: float | None) -> Row:
    """`ours` and `theirs` (M,); `noise`: the mean difference of the class with itself, None in float32."""
    gaps = (ours - theirs).abs()
    most, mean = gaps.max().item(), gaps.mean().item()
    found = f"max {most:.1e} mean {mean:.1e}"
    if noise is None:
        return Row(f"log-probs, {what}", found, "max 1e-03", most <= 1e-3)
    return Row(f"log-probs, {what}", found, f"mean {3 * noise:.1e}", mean <= 3 * noise)


def check_greedy(qwen, examples: list[Example], drawn: Completions, banned: Tensor, ends: Tensor, dtype: str) -> Row:
    # In place of the model's own, of which generate would take all that is not said here: Qwen2.5-VL's, for one, has a
    # repetition penalty.
    qwen.generation_config = GenerationConfig(
        max_new_tokens=NUM_TOKENS, do_sample=False, num_beams=1, repetition_penalty=1.0, pad_token_id=0,
        eos_token_id=ends.tolist(), suppress_tokens=banned.tolist(), return_dict_in_generate=True, output_scores=True)
    agree, total, holds, note = 0, 0, True, ""
    for example, ids, L in zip(examples, drawn.ids.tolist(), drawn.lengths.tolist()):
        found = qwen.generate(**hf_inputs(qwen, example, torch.tensor([], dtype=torch.int64)))
        theirs = found.sequences[0, len(example.prompt_ids):].tolist()
        i, length = parting(ids[:L], theirs), max(L, len(theirs))
        if i < length:  # what follows on another token is another text
            most, gap = 0.0, np.inf  # of an end where the other one goes on
            if i < min(L, len(theirs)):
                most = found.scores[i].max().item()
                gap = most - found.scores[i][0, ids[i]].item()
            holds &= gap <= (1e-3 if dtype == "float32" else abs(most) / 32)
            note += f"; {example.question.id}: token {i} is another, its logit {gap:.1e} below theirs"
        agree, total = agree + i, total + length
    return Row("greedy", f"{agree} of {total}", "gap 1e-03" if dtype == "float32" else "gap 1/32", holds, note[2:])


def parting(a: list[int], b: list[int]) -> int:
    """How many tokens two lists have in common before they part."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@torch.no_grad()
def checks(qwen, tokenizer, examples: list[Example], processed: list[dict] | None, dtype: str) -> Iterator[Row]:
    """The table's lines, each as soon as it is known."""
    if processed:
        yield check_patches(qwen, examples, processed)
        yield check_prompts(qwen, tokenizer, examples, processed)
    yield check_positions(qwen, examples, processed)
    say("our completions and log-probs")
    prompts, rows = collate_prompts(examples, qwen.device), torch.arange(len(examples), device=qwen.device)
    ends, banned = end_token_ids(qwen, tokenizer, qwen.device), vision_token_ids(qwen, qwen.device)
    drawn = generate(qwen, prompts, 1, NUM_TOKENS, 0.0, None, ends, banned)
    mask = mask_from_lengths(drawn.lengths, drawn.ids.shape[1])
    ours = {name: Policy(qwen, DTYPES[dtype], naive)(prompts, rows, drawn.ids, mask, 1.0, banned)[0]
            for name, naive in (("shared prompts", False), ("--naive", True))}
    say("Hugging Face's log-probs")  # from here on the layers have its attention, which its generate finds at "sdpa"
    eager = hf_logps(qwen, examples, drawn, banned, "eager") if dtype == "bfloat16" else None
    theirs = hf_logps(qwen, examples, drawn, banned, "sdpa")
    noise = None if eager is None else (eager - theirs).abs().mean().item()
    for name, logps in (*ours.items(), ("sampler", drawn.logps)):
        yield check_logps(name, logps[mask], theirs, noise)
    say("Hugging Face's completions")
    yield check_greedy(qwen, examples, drawn, banned, ends, dtype)


def say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="local folder or hub id")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    args = parser.parse_args(argv)
    dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    torch.backends.cudnn.allow_tf32 = False  # or the patches' convolution would not be float32's
    say(f"reading {args.model}, in {dtype}, onto the {'GPU' if args.device == 'cuda' else 'CPU'}")
    try:
        if args.device == "cuda" and not cuda:
            raise ValueError("--device cuda: torch finds no GPU here; take --device cpu")
        tokenizer, family, processor = load_tokenizer(args.model), load_family(args.model), load_processor(args.model)
        qwen = load_sampler(SimpleNamespace(model=args.model, dtype=dtype), torch.device(args.device))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    settings = PixelSettings(image_size=SIDE * family.token_size)
    with tempfile.TemporaryDirectory() as folder:
        video, image = draw(Path(folder))
        questions = [Question(name, TEXT, *files) for name, *files in (
            ("clip", video, None), ("image", None, image), ("clip and image", video, image))]
        dataset = VideoDataset(questions, tokenizer, family, settings, seed=0)
        examples = [dataset[0, i] for i in range(len(dataset))]
        assert not any(example.error for example in examples), examples
        without = processor if isinstance(processor, str) else ""
        processed = None if without else [process(processor, question, settings) for question in questions]
    rows = []
    for row in checks(qwen, tokenizer, examples, processed, dtype):
        rows.append(row)
        verdict = f"{'ok' if row.holds else 'DIFFERS'}   {row.note}".rstrip()
        print(f"{row.what:26} {row.found:26} {row.bound:14} {verdict}", flush=True)
    if without:
        print(f"not compared: patches and prompts ({without})")
    differ = [row.what for row in rows if not row.holds]
    print(f"{args.model}: " + (f"DIFFERS from Hugging Face's in {', '.join(differ)}" if differ else
                               f"as Hugging Face's in all {len(rows)} checks"))
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
