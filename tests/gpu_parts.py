"""The nine parts of gpu.py, one section each: a function of a `Part` p, which it gives its rows.

Of p they use `sizes` (shapes and durations: all that a dry run on a CPU does differently), `device`, `folder` (for
files that may go) and `limit_s`; `row` adds a row, `fits` asks for memory, `attempt` goes on where something raises.
Letters: B prompts of P tokens, G completions of each of C tokens, V vocabulary, L tokens of one completion.
"""
import copy
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import types
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
MISSING = [name for name in ("decord", "av") if not find_spec(name)]
for name in MISSING:  # they read and write videos, which only part e does: data.py and toy.py import them all the same
    sys.modules[name] = types.ModuleType(name)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.profiler import ProfilerActivity, profile, schedule  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

import bench  # noqa: E402
import evaluate  # noqa: E402
import float64  # noqa: E402
import grpo_video  # noqa: E402
import lora  # noqa: E402
import run  # noqa: E402
import runtime  # noqa: E402
import tiny  # noqa: E402
import toy  # noqa: E402
from data import FAMILIES, Question  # noqa: E402
from model import Policy, collate_prompts, end_token_ids, mask_from_lengths, vision_token_ids  # noqa: E402
from sampler import CapturedCache, GroupCache, generate  # noqa: E402

for name in MISSING:  # a module without a spec would confuse whoever looks for it later
    del sys.modules[name]

FACTOR = 3  # two sums of the same terms in other orders round alike, but the largest of a few hundred errors scatters
ORACLE_BYTES = {"2B": 20e9}  # activations of the wide plain rows, which nothing recomputes: 2,700 tokens of 6 MB
bench.SHAPES["tiny"] = dict(hidden_size=256, intermediate_size=256, num_attention_heads=2, num_key_value_heads=1,
                            vocab_size=1024, tie_word_embeddings=True, num_hidden_layers=2,
                            vision=dict(depth=1, embed_dim=64, num_heads=2))


class Skip(Exception):
    """A part, or what is left of it, cannot run here; the message says what is missing."""


# ----------------------------------------------------------------------------------------------------------------------
# Models and prompts.

def load(shape: str, dtype: torch.dtype, device: torch.device):
    """A Qwen2-VL of random weights (2B, 7B, tiny), the toy base, or what is in a folder; weights alone are cast: rotary
    buffers stay.

    Its vision tokens are the toy tokenizer's, so that the same prompts and the same loop serve all shapes.
    """
    if is_folder(shape):
        return runtime.load_sampler(SimpleNamespace(model=shape, dtype=str(dtype)[6:]), device)
    torch.manual_seed(0)  # the same random weights in every part that loads them
    qwen, known = bench.load_qwen(shape, device), runtime.load_config(str(toy.BASE))
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(qwen.config, name, getattr(known, name))
    return cast(qwen, dtype)


def is_folder(shape: str) -> bool:
    return shape != "toy" and shape not in bench.SHAPES


def cast(qwen, dtype: torch.dtype):
    for weight in qwen.parameters():
        weight.data = weight.data.to(dtype)
    return qwen


def num_weights(shape: str) -> int:
    return sum(p.numel() for p in bench.load_qwen(shape, torch.device("meta")).parameters())


def ragged_examples(qwen, size: dict) -> list:
    """Two questions of different lengths, with videos of different lengths."""
    short = {**size, "frames": size["frames"] // 2, "length": size["length"] - 7}
    examples = bench.make_prompts(qwen, 1, **size)[0] + bench.make_prompts(qwen, 1, **short)[0]
    return [dataclasses.replace(e, question=Question(f"q{i}", "", None, None)) for i, e in enumerate(examples)]


# ----------------------------------------------------------------------------------------------------------------------
# a. Oracles: Hugging Face's forward pass on plain rows, in a wider dtype, is the truth.

def hf_logps(qwen, example, ids: torch.Tensor) -> torch.Tensor:
    """log softmax over the vocabulary before each of the L tokens `ids`, vision tokens banned: (L, V), with grad."""
    device, positions = qwen.device, example.position_ids
    example = bench.normalised(example, qwen.config.model_type)
    after = positions.max() + 1 + torch.arange(len(ids))
    names = ("pixel_values_videos", "video_grid_thw", "pixel_values", "image_grid_thw")
    logits = qwen(input_ids=torch.cat([example.prompt_ids.to(device), ids])[None],
                  position_ids=torch.cat([positions, after.expand(3, -1)], 1)[:, None].to(device),
                  **{name: getattr(example, name).to(device) for name in names}).logits[0, -len(ids) - 1:-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.index_fill(1, vision_token_ids(qwen, device), -torch.inf).log_softmax(-1)


def at(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """table (L, V), ids (L,) -> (L,)"""
    return table.gather(1, ids[:, None])[:, 0]


def oracles(p) -> None:
    """Rows for the toy base in float32 and bf16 and for the step's shape in bf16."""
    float64.lift()
    torch.backends.cudnn.allow_tf32 = False  # of the patch embedding, a convolution: on by default
    for shape, dtype in (("toy", torch.float32), ("toy", torch.bfloat16), (p.sizes.step_shape, torch.bfloat16)):
        # Weights of the model, of the wide one and of a third's gradients, and activations of the wide rows.
        if p.fits(f"oracles at {shape}", num_weights(shape) * 24 + ORACLE_BYTES.get(shape, 0)):
            p.attempt(f"{shape} {str(dtype)[6:]}", token_oracles, shape, dtype)
    for dtype in ("float32", "bfloat16"):
        p.attempt(f"step {dtype}", step_oracle, dtype)


def token_oracles(p, shape: str, dtype: torch.dtype) -> None:
    """Greedy and sampled decoding, and log-probs and gradients of both learners, against a wide Hugging Face."""
    qwen, title = load(shape, dtype, p.device), f"{Path(shape).name} {str(dtype)[6:]}"
    G, C = p.sizes.oracle_G, p.sizes.oracle_C
    wide = cast(copy.deepcopy(qwen), torch.float32 if dtype == torch.bfloat16 else torch.float64)
    examples = ragged_examples(qwen, p.sizes.oracle)
    prompts, banned = collate_prompts(examples, p.device), vision_token_ids(qwen, p.device)
    ends = end_token_ids(qwen, runtime.load_tokenizer(str(toy.BASE)), p.device)
    tiny = torch.finfo(torch.float32).eps  # a yardstick of 0, by luck, is none

    # Greedy: our token is the truth's likeliest, or less likely by no more than rounding of the two log-probs.
    ours = generate(qwen, prompts, 1, C, 0.0, None, ends, banned)
    regret, yard, equal = 0.0, 0.0, 0
    for example, ids, length in zip(examples, ours.ids, ours.lengths.tolist()):
        ids = ids[:length]
        with torch.no_grad():
            truth, low = hf_logps(wide, example, ids), hf_logps(qwen, example, ids)
        best = truth.argmax(-1)
        regret = max(regret, (at(truth, best) - at(truth, ids)).max().item())
        yard = max(yard, *((at(low, x) - at(truth, x)).abs().max().item() for x in (best, ids)))
        equal += (best == ids).sum().item()
    p.row(f"{title}: greedy, nats to the likeliest token", 2 * FACTOR * (yard + tiny), regret, equal_tokens=equal,
          tokens=ours.lengths.sum().item())
    p.row(f"{title}: greedy, tokens as in Hugging Face's generate, up to the first near tie",
          equal_tokens=equal_to_generate(qwen, examples, ours, ends, banned), tokens=ours.lengths.sum().item())

    # Sampled: the random number of each draw lies in the drawn token's interval of the truth's cumulated probability.
    seeds = [5, 6]
    ours = generate(qwen, prompts, G, C, 1.0, seeds, ends, banned)
    uniforms = 1 - torch.cat([torch.rand(G, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                              for seed in seeds]).to(p.device)
    mask, row_prompt = mask_from_lengths(ours.lengths, ours.ids.shape[1]), torch.arange(2 * G, device=p.device) // G
    outside, cdf_yard, truths, lows = 0.0, 0.0, [], []
    for n, length in enumerate(ours.lengths.tolist()):
        ids, u = ours.ids[n, :length], uniforms[n, :length]
        with torch.no_grad():
            truth, low = (hf_logps(model, examples[n // G], ids) for model in (wide, qwen))
        cdf, low_cdf = (table.double().exp().cumsum(-1) for table in (truth, low))
        high = at(cdf, ids)
        outside = max(outside, torch.maximum(high - at(truth, ids).double().exp() - u, u - high).max().item())
        cdf_yard = max(cdf_yard, (cdf - low_cdf).abs().max().item())
        truths.append(at(truth, ids))
        lows.append(at(low, ids))
    p.row(f"{title}: sampled, distance of a draw from its token's interval", FACTOR * (cdf_yard + tiny),
          max(outside, 0.0), tokens=ours.lengths.sum().item())

    # Log-probs and gradients of learning: shared prompts and plain rows.
    truths, lows = torch.cat(truths).double(), torch.cat(lows).double()
    yard = (lows - truths).abs().max().item() + tiny
    weights = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)).to(p.device)
    gradients = {}
    for name, model, naive in (("truth", wide, True), ("plain rows", qwen, True), ("shared prompts", qwen, False)):
        model.requires_grad_(True)
        logps, _ = Policy(model, model.dtype, naive)(prompts, row_prompt, ours.ids, mask, 1.0, banned)
        (logps * weights).sum().backward()
        gradients[name] = [weight.grad for weight in model.parameters()]
        model.zero_grad()
        off = (logps.detach()[mask].double() - truths).abs()
        if name != "truth":
            p.row(f"{title}: log-probs of {name}, largest error in nats", FACTOR * yard, off.max(), mean=off.mean())
    gap = (ours.logps - logps.detach()).abs()[mask]
    p.row(f"{title}: sampler against learner, largest gap in nats", 2 * FACTOR * yard, gap.max(), mean=gap.mean(),
          tokens=len(gap))
    rows, shared = (distance(gradients[name], gradients["truth"]) for name in ("plain rows", "shared prompts"))
    p.row(f"{title}: gradient of shared prompts, relative error", FACTOR * (rows + tiny), shared, plain_rows=rows)


def distance(ours: list, truth: list) -> float:
    """The norm of the difference of two lists of tensors over the norm of the second."""
    off, size = (math.sqrt(sum(x.double().square().sum().item() for x in xs))
                 for xs in ((a.double() - b.double() for a, b in zip(ours, truth, strict=True)), truth))
    return off / size


def equal_to_generate(qwen, examples, ours, ends, banned) -> int:
    """How many greedy tokens of all rows are those of Hugging Face's generate, up to the first that differs.

    It is given our positions: its own behind a video are others (`rope_positions` in data.py).
    """
    config, equal = qwen.config, 0
    plain = GenerationConfig(do_sample=False, max_new_tokens=ours.ids.shape[1], pad_token_id=0,
                             eos_token_id=ends.tolist(), suppress_tokens=banned.tolist())
    for example, ids, length in zip(examples, ours.ids.tolist(), ours.lengths.tolist()):
        example = bench.normalised(example, config.model_type)
        prompt = example.prompt_ids.to(qwen.device)[None]
        kinds = (prompt == config.image_token_id).int() + 2 * (prompt == config.video_token_id).int()
        pixels = {name: getattr(example, name).to(qwen.device)
                  for name in ("pixel_values_videos", "video_grid_thw", "pixel_values", "image_grid_thw")}
        qwen.model.rope_deltas = None  # those of the prompt before
        theirs = qwen.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), mm_token_type_ids=kinds,
                               position_ids=example.position_ids[:, None].to(qwen.device), generation_config=plain,
                               **pixels)[0, prompt.shape[1]:].tolist()
        equal += next((t for t in range(length) if theirs[t:t + 1] != ids[t:t + 1]), length)
    return equal


def step_oracle(p, dtype: str) -> None:
    """A step of the toy base (FSDP, its collectives, fused AdamW) against the formulas written out, token by token."""
    G, lr = p.sizes.oracle_G, 1e-4
    policy = runtime.load_policy(grpo_video.Args(model=str(toy.BASE), dtype=dtype, gradient_checkpointing=True),
                                 p.device)
    sampler = runtime.make_sampler(policy, p.device)
    low = load("toy", runtime.DTYPES[dtype], p.device)
    wide = cast(copy.deepcopy(low), torch.float32 if dtype == "bfloat16" else torch.float64)
    examples = ragged_examples(sampler, p.sizes.oracle)
    args = grpo_video.Args(group_size=G, max_completion_length=p.sizes.oracle_C, kl_coef=0.1)
    banned = vision_token_ids(sampler, p.device)
    ends = end_token_ids(sampler, runtime.load_tokenizer(str(toy.BASE)), p.device)
    rollout = grpo_video.sample_groups(sampler, examples, 0, args, ends, banned)
    lengths, rewards = rollout.lengths.tolist(), [float(n % 3 == 0) for n in range(2 * G)]
    # Old and reference log-probs stand off the truth by so much that rounding cannot carry a ratio over the clip.
    old, ref = torch.zeros_like(rollout.sampler_logps), torch.zeros_like(rollout.sampler_logps)
    for n, length in enumerate(lengths):
        with torch.no_grad():
            truth = at(hf_logps(wide, examples[n // G], rollout.completion_ids[n, :length]),
                       rollout.completion_ids[n, :length]).to(old.dtype)
        moves = torch.tensor([-0.4, -0.05, 0.05, 0.4], device=p.device)[(torch.arange(length) + n) % 4]
        old[n, :length], ref[n, :length] = truth + moves, truth - moves / 2

    rows = torch.arange(2 * G, device=p.device)
    logps, _ = grpo_video.completion_logps(policy, rollout, rows)
    advantages = grpo_video.group_advantages(torch.tensor(rewards, device=p.device).view(2, G)).flatten()
    token_loss, _, clipped = grpo_video.grpo_token_loss(logps, old, ref, advantages, 0.2, 0.2, 0.1)
    weights = grpo_video.token_weights(rollout.completion_mask, "sequence_mean", 2 * G, sum(lengths), 0)
    (token_loss * weights).sum().backward()
    ours = [weight.grad.full_tensor().clone() for weight in policy.parameters()]

    def explicit(qwen) -> list:
        """Gradients of the loss by plain loops."""
        qwen.requires_grad_(True)
        for n, length in enumerate(lengths):
            group = rewards[n // G * G:n // G * G + G]
            A = (rewards[n] - statistics.mean(group)) / (statistics.stdev(group) + 1e-4)
            ids, loss = rollout.completion_ids[n, :length], 0.0
            for t, logp in enumerate(at(hf_logps(qwen, examples[n // G], ids), ids)):
                ratio, to_ref = (logp - old[n, t].item()).exp(), ref[n, t].item() - logp
                bounded = 0.8 if ratio < 0.8 else 1.2 if ratio > 1.2 else ratio
                objective = ratio * A if (ratio * A).item() <= float(bounded) * A else bounded * A
                loss = loss - objective + 0.1 * (to_ref.exp() - to_ref - 1)
            (loss / length / (2 * G)).backward()
        return [weight.grad for weight in qwen.parameters()]

    truth = explicit(wide)
    yard = distance(explicit(low), truth)
    p.row(f"step {dtype}: gradient against explicit code, relative error",
          FACTOR * (yard + torch.finfo(torch.float32).eps), distance(ours, truth), plain_rows=yard,
          clipped=clipped.sum().item(), backend=dist.get_backend())

    # AdamW's first step written out, on the same gradient: m / sqrt(v) is g / |g|. A float32 weight below 4 is rounded
    # by at most 2.4e-7, 0.0024 of a step of 1e-4.
    before = [weight.full_tensor().detach().double().clone() for weight in policy.parameters()]
    norm = math.sqrt(sum(g.double().square().sum().item() for g in ours))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    found = runtime.optimizer_step(policy, optimizer, lr, 1.0)
    worst = 0.0
    for weight, old_weight, g in zip(policy.parameters(), before, ours):
        g = g.double() * min(1.0, 1.0 / (norm + 1e-6))
        expected = old_weight - lr * g / (g.abs() + 1e-8)
        worst = max(worst, (weight.full_tensor().detach().double() - expected).abs().max().item() / lr)
    p.row(f"step {dtype}: weights after AdamW against explicit code, largest error in steps of lr", 0.01, worst)
    p.row(f"step {dtype}: norm of the gradient against explicit code, relative error", 1e-4, abs(found / norm - 1))
    runtime.copy_weights(policy, sampler)
    stale = max((a.full_tensor().to(b.dtype) - b).abs().max().item()
                for a, b in zip(policy.parameters(), sampler.parameters(), strict=True))
    p.row(f"step {dtype}: sampler against policy after copying the weights", 0.0, stale)


# ----------------------------------------------------------------------------------------------------------------------
# b. Decoding with and without the CUDA graph.

def uncaptured(self: CapturedCache) -> None:
    """In place of `capture` where there is no GPU: the state machine stays, a replay runs the operators."""
    self.token, self.width = torch.zeros_like(self.first_position), len(self.columns)
    self.hidden = GroupCache.feed(self, self.token)  # the warm-up, which leaves something behind

    def replay():
        self.hidden = GroupCache.feed(self, self.token)
    self.graph = SimpleNamespace(replay=replay)


def decoding(p) -> None:
    """Rows: equal tokens in float32, then seconds a token in bf16 beside the time to read what has to be read."""
    with ExitStack() as patches:
        if p.device.type != "cuda":
            patches.enter_context(mock.patch.object(CapturedCache, "capture", uncaptured))
            p.row("no GPU: the graph's operators are run one by one, nothing is captured")
        speed, source = bandwidth(p.device)
        for shape in p.sizes.shapes:  # without the graph first, because it is the graph that has never been run
            if p.fits(f"decoding at {shape}", 2 * num_weights(shape) + 3e9):
                p.attempt(f"{shape}, kernel by kernel", seconds_a_token, shape, False, speed, source)
        p.attempt("toy float32", same_tokens, "toy")
        if p.fits(f"{p.sizes.step_shape} in float32", 4 * num_weights(p.sizes.step_shape) + 3e9):
            p.attempt(f"{p.sizes.step_shape} float32", same_tokens, p.sizes.step_shape)
        for shape in p.sizes.shapes:
            if p.fits(f"decoding at {shape} by graph", 2 * num_weights(shape) + 6e9):
                p.attempt(f"{shape}, by graph", seconds_a_token, shape, True, speed, source)


def same_tokens(p, shape: str) -> None:
    """Two batches through one graph, each against a cache of its own: the second finds what the first has left."""
    torch.backends.cudnn.allow_tf32 = False
    qwen = load(shape, torch.float32, p.device)
    ends = end_token_ids(qwen, runtime.load_tokenizer(str(toy.BASE)), p.device)
    banned, examples = vision_token_ids(qwen, p.device), ragged_examples(qwen, p.sizes.oracle)
    # Sampling from the random weights of a large shape, all of whose 152,000 tokens are about as likely, would tell
    # rounding from a mistake no more: there the likeliest token alone is compared.
    name, sharp = Path(shape).name, shape not in bench.SHAPES
    for temperature in (0.0, 1.0) if sharp else (0.0,):
        caches, apart, equal, total = {}, 0.0, 0, 0
        for batch in (examples, examples[::-1]):
            kept, fresh = (generate(qwen, collate_prompts(batch, p.device), p.sizes.oracle_G, p.sizes.oracle_C,
                                    temperature, [3, 4] if temperature else None, ends, banned, some)
                           for some in (caches, None))
            for n, length in enumerate(fresh.lengths.tolist()):
                differ = (kept.ids[n, :length] != fresh.ids[n, :length]).nonzero().flatten().tolist()
                t = differ[0] if differ else length
                # Up to the first token that differs. If it is the likeliest, with it: a near tie has equal log-probs
                # there, a fault not. (Of two draws on either side of a border the log-probs may be nats apart.)
                gap = (kept.logps[n] - fresh.logps[n]).abs()[:min(t + (temperature == 0), length)]
                apart = max(apart, *gap.tolist(), 0.0)
                equal, total = equal + t, total + length
        assert len(caches) == 1, "the second batch made a cache of its own"
        kind = "sampled" if temperature else "greedy"
        # 1e-4: float32 log-probs of a few nats are off by some 1e-5 behind 28 layers.
        p.row(f"{name} float32 {kind}: log-probs by graph against kernel by kernel", 1e-4, apart, tokens=total,
              equal_tokens=equal)
        if sharp:  # a draw or a tie within 1e-5 of the next token comes once in some hundred runs
            p.row(f"{name} float32 {kind}: tokens by graph that differ", 0, float(total - equal))


def seconds_a_token(p, shape: str, graph: bool, speed: float, source: str) -> None:
    qwen, T = load(shape, torch.bfloat16, p.device), p.sizes.decode_tokens
    config = qwen.config.text_config
    weights = sum(x.nbytes for x in (*qwen.model.language_model.layers.parameters(), qwen.lm_head.weight))
    token_bytes = 4 * config.num_hidden_layers * config.num_key_value_heads * config.hidden_size
    token_bytes //= config.num_attention_heads  # bf16 keys and values
    for num_prompts in p.sizes.decode_prompts:
        _, prompts = bench.make_prompts(qwen, num_prompts, **p.sizes.prompt)
        caches = {} if graph else None
        sides = {C: bench.rollout_of(qwen, prompts, C, caches=caches) for C in (1, 1 + T)}
        seconds = bench.take_turns(sides, p.sizes.rounds, "b")
        steps = [(b - a) / T for a, b in zip(seconds[1], seconds[1 + T])]
        caches_bytes = token_bytes * (len(prompts.ids) + num_prompts * bench.G * T // 2)
        floor = (weights + caches_bytes) / speed
        p.row(f"{shape} bf16, {num_prompts * bench.G} rows, {'by graph' if graph else 'kernel by kernel'}",
              seconds_a_token=statistics.median(steps), least=min(steps), most=max(steps), floor_s=floor,
              over_floor=statistics.median(steps) / floor, weight_bytes=weights, cache_bytes=caches_bytes,
              bandwidth=source)


def bandwidth(device: torch.device) -> tuple[float, str]:
    """Bytes a second of the device's memory, and where the number is from."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    if name in bench.BANDWIDTH:
        return bench.BANDWIDTH[name], "data sheet"
    a = torch.ones(2 ** (30 if device.type == "cuda" else 26), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    seconds = bench.take_turns({"copy": lambda: b.copy_(a)}, 5, "bandwidth")["copy"]
    return 2 * a.nbytes / min(seconds), "measured by a copy, no data sheet at hand"


# ----------------------------------------------------------------------------------------------------------------------
# c. Against the usual way.

def usual_way(p) -> None:
    """Rows of Hugging Face's generate and of learning plain rows, each beside ours, in turns (tests/bench.py)."""
    with ExitStack() as patches:
        if p.device.type != "cuda":
            patches.enter_context(mock.patch.object(CapturedCache, "capture", uncaptured))
        # bf16 weights and gradients; activations of 9,248 tokens, the layers' inputs kept and one layer at work.
        shapes = [shape for shape in p.sizes.shapes
                  if p.fits(f"sampling and learning at {shape}", 4 * num_weights(shape) + 15e9 * (shape != "tiny"))]
        for shape in shapes:
            p.attempt(f"sampling at {shape}", sampling_rows, shape, False)
            p.attempt(f"learning at {shape}", learning_rows, shape)
        for shape in shapes:  # last, because a capture that fails may take the process with it
            p.attempt(f"sampling by graph at {shape}", sampling_rows, shape, True)


def sampling_rows(p, shape: str, by_graph: bool) -> None:
    """Hugging Face's generate against ours, or ours kernel by kernel against ours by graph."""
    qwen, C = load(shape, torch.bfloat16, p.device), p.sizes.decode_tokens
    for num_prompts in p.sizes.decode_prompts:
        examples, prompts = bench.make_prompts(qwen, num_prompts, **p.sizes.prompt)
        ours = bench.rollout_of(qwen, prompts, C)
        if by_graph:
            what, sides = "ours against ours by graph", (ours, bench.rollout_of(qwen, prompts, C, caches={}))
        else:
            what, examples = "generate against ours", [bench.normalised(example) for example in examples]
            sides = (lambda examples=examples: [bench.hf_generate(qwen, example, C) for example in examples], ours)
        seconds = bench.take_turns(dict(zip(("usual", "ours"), sides)), p.sizes.rounds, "c")
        add_ratio(p, f"{shape}: {what}, {num_prompts * bench.G} rows x {C}", seconds["usual"], seconds["ours"])


def learning_rows(p, shape: str) -> None:
    qwen, C = load(shape, torch.bfloat16, p.device), p.sizes.learn_C
    qwen.train().requires_grad_(True)
    enable = getattr(qwen, "activation_checkpointing_enable", None) or qwen.gradient_checkpointing_enable
    enable({"use_reentrant": False})  # as load_policy does
    _, prompts = bench.make_prompts(qwen, 1, **p.sizes.prompt)
    sides = {name: bench.learner(qwen, name == "usual", prompts, bench.G, C) for name in ("usual", "ours")}
    peaks = {f"{name}_peak_bytes": bench.peak_bytes(run, p.device) for name, run in sides.items()}
    add_ratio(p, f"{shape}: plain rows against ours, {bench.G} rows x {C}, forward and backward",
              *bench.take_turns(sides, p.sizes.rounds, "c").values(), **peaks)


def add_ratio(p, what: str, usual: list, ours: list, **more) -> None:
    """A row of the seconds of two sides in each round, and of their ratio within a round."""
    ratios = [a / b for a, b in zip(usual, ours)]
    p.row(what, usual_s=statistics.median(usual), ours_s=statistics.median(ours), ratio=statistics.median(ratios),
          least=min(ratios), most=max(ratios), **more)


# ----------------------------------------------------------------------------------------------------------------------
# d. Whole steps: the loop of grpo_video.py on random weights and prompts that nobody has to decode.

def train(p, name: str, steps: int, caches: dict | None, after_step=lambda: None, shape: str | None = None,
          export=lambda *args: None, **changes) -> list[dict]:
    """Runs grpo_video.main, at the step's shape if at no other, and returns its metrics, a dict for each step.

    In place of files: random weights, the same random prompts in each step (no key `data_s` that means anything), and
    rewards of 0 and 1 in turn, so that every group is learned. `caches` as in `generate`; nothing is exported, but by
    an `export` that takes the arguments of `runtime.export`.
    """
    settings = {"kl_coef": 0.0, **p.sizes.step, **changes}
    shape, coin = shape or p.sizes.step_shape, itertools.cycle((0.0, 1.0))
    model = shape if is_folder(shape) else str(toy.BASE)  # of a shape, what its tokenizer is
    qwen = load(model, torch.float32, torch.device("cpu"))
    examples, _ = bench.make_prompts(qwen, settings["prompts_per_step"], **p.sizes.prompt)
    examples = [dataclasses.replace(e, question=Question(f"q{i}", "", None, None)) for i, e in enumerate(examples)]
    log, sample_groups = run.Run.log, grpo_video.sample_groups

    def watched_log(*args):
        log(*args)
        after_step()

    replaced = {
        (runtime, "load_qwen"): lambda model, dtype: load(shape, dtype, p.device),
        (runtime, "load_training_set"): lambda *args, **kwargs: (examples, steps),
        (run.Run, "log"): watched_log, (runtime, "export"): export,
        (grpo_video, "make_loader"): lambda dataset, batches, workers: [examples] * steps,
        (grpo_video, "reward_table"): lambda args: {"accuracy": (1.0, lambda *answer: next(coin))},
        (grpo_video, "sample_groups"): lambda *args: sample_groups(*args[:-1], caches)}
    output_dir = p.folder / name
    with ExitStack() as patches:
        for (module, function), ours in replaced.items():
            patches.enter_context(mock.patch.object(module, function, ours))
        if p.device.type != "cuda":
            patches.enter_context(mock.patch.object(CapturedCache, "capture", uncaptured))
        grpo_video.main(grpo_video.Args(model=model, train_file=str(Path(__file__).resolve()),
                                        output_dir=str(output_dir), save_every=0, **settings))
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def computed_bytes(p, settings: dict, micro_batch: int = 8) -> tuple[int, str]:
    """What the README's arithmetic says of the peak of a step without a reference, and in which phase it is."""
    qwen = bench.load_qwen(p.sizes.step_shape, torch.device("meta"))
    config, weights = qwen.config.text_config, num_weights(p.sizes.step_shape)
    layers, width, V = config.num_hidden_layers, config.hidden_size, config.vocab_size
    x = 2 if p.device.type == "cuda" else 4  # bytes of a number in the compute dtype
    B, C = settings["prompts_per_step"], settings["max_completion_length"]
    P, rows = p.sizes.prompt["length"], B * settings["group_size"]
    fixed = (16 + x) * weights  # masters, gradients and AdamW's moments in float32; the sampler
    head = qwen.lm_head.weight.numel() * (1 if qwen.config.tie_word_embeddings else 2)
    tokens = P + micro_batch * C
    update = (2 * x + 4) * head + x * tokens * (layers * width + 6 * config.intermediate_size) + 3 * 512 * V * 4
    key_value = 2 * x * layers * config.num_key_value_heads * width // config.num_attention_heads
    rollout = key_value * (B * P + rows * C) + 3 * rows * V * 4 - 4 * weights  # no gradients yet
    return (fixed + update, "update") if update > rollout else (fixed + rollout, "rollout")


def whole_steps(p) -> None:
    """Rows: seconds by phase and peak memory with and without graphs, the largest group and the longest completion."""
    shape = p.sizes.step_shape
    need, phase = computed_bytes(p, p.sizes.step)
    if not p.fits(f"a step at {shape}", need):
        raise Skip(f"a step at {shape} needs {need / 1e9:.0f} GB")

    computed = {"computed_bytes": need, "computed_peak_is_in": phase}
    p.attempt("steps kernel by kernel", step_rows, shape, "kernel by kernel", None, computed)
    p.attempt("the largest group", largest, "group")
    p.attempt("the longest completion", largest, "length")
    p.attempt("steps by graph", step_rows, shape, "by graph", {}, computed)


def step_rows(p, shape: str, name: str, caches: dict | None, beside: dict, **changes) -> None:
    """A row of a few steps: the median of all but the first, and the peak of all; `beside` goes into it as well."""
    metrics, peak = [], None
    peak = bench.peak_bytes(lambda: metrics.extend(train(p, f"{Path(shape).name}, {name}", p.sizes.steps, caches,
                                                         shape=shape, **changes)), p.device)
    phases = {key: statistics.median(m[key] for m in metrics[1:]) for key in
              ("rollout_s", "score_s", "update_s", "step_s", "tokens_per_s", "sampler_gap", "grad_norm")}
    # A graph's own memory stays reserved and counts as in no use.
    kept = {"reserved_bytes": torch.cuda.max_memory_reserved()} if p.device.type == "cuda" else {}
    p.row(f"{Path(shape).name}, {p.sizes.step['prompts_per_step']} x {p.sizes.step['group_size']} x "
          f"{p.sizes.step['max_completion_length']}, {name}", **phases, peak_bytes=peak, **beside, **kept)


def largest(p, what: str) -> None:
    """Doubles the group, or the completions of a group, until a step of one group, learned in one piece, is too much.

    Of sampling there is the cache at full size, a prompt's pass and the last token: what takes memory, and little time.
    """
    shape, sizes, fitted, peak = p.sizes.step_shape, p.sizes, 0, 0
    with mock.patch.object(runtime, "load_qwen", lambda model, dtype: load(shape, dtype, p.device)):
        dtype = "bfloat16" if p.device.type == "cuda" else "float32"
        policy = runtime.load_policy(grpo_video.Args(model=str(toy.BASE), dtype=dtype, gradient_checkpointing=True),
                                     p.device)
    sampler = runtime.make_sampler(policy, p.device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6, fused=True)
    _, prompts = bench.make_prompts(sampler, 1, **sizes.prompt)
    G, C, start = sizes.step["group_size"], sizes.step["max_completion_length"], time.perf_counter()
    one_group(policy, sampler, optimizer, prompts, 1, 2)  # makes AdamW's moments, which count as state
    ended, fault = f"no end up to {sizes.most}", None
    while max(G, C) <= sizes.most:
        if time.perf_counter() - start > p.limit_s / 5:
            ended = f"stopped for time before G {G}, C {C}"
            break
        try:
            peak = bench.peak_bytes(lambda G=G, C=C: one_group(policy, sampler, optimizer, prompts, G, C), p.device)
        except RuntimeError as error:  # torch.OutOfMemoryError is one; libraries have their own words for it
            full = isinstance(error, torch.OutOfMemoryError) or re.search("out of memory|ALLOC_FAILED", str(error))
            ended, fault = f"{'out of memory' if full else 'an error'} at G {G}, C {C}", None if full else str(error)
            break
        fitted = G if what == "group" else C
        G, C = (2 * G, C) if what == "group" else (G, 2 * C)
    p.row(f"{shape}: largest {what} of one micro-batch that fits, {ended}", largest=fitted,
          peak_bytes_beyond_the_state=peak)
    if fault or not fitted:
        p.failures.append(f"largest {what}: {fault or 'not even the first fits'}")


def one_group(policy, sampler, optimizer, prompts, G: int, C: int) -> None:
    device = prompts.ids.device
    with torch.no_grad():
        cache = GroupCache(sampler, 1, int(prompts.lengths.max()), G, C, device)
        cache.prefill(prompts)
        cache.width = C - 1
        cache.column.fill_(C - 1)
        sampler.lm_head(cache.feed(torch.zeros(G, dtype=torch.int64, device=device))).float().softmax(-1)
    del cache
    ids, mask = bench.random_rows(sampler, G, C)
    logps, _ = policy(prompts, torch.zeros(G, dtype=torch.int64, device=device), ids, mask, 1.0,
                      vision_token_ids(sampler, device))
    logps.mean().backward()
    optimizer.step()
    optimizer.zero_grad()


# ----------------------------------------------------------------------------------------------------------------------
# e. The toy's demo, killed on its way and resumed.

def demo(p) -> None:
    """Rows: a collective, the run's metrics before the kill and after the resumption, accuracy before and after."""
    x = torch.arange(5.0, device=p.device)
    y = x.clone()
    dist.all_reduce(y)
    p.row(f"{dist.get_backend()} with one rank: a sum over ranks is the number itself", 0.0, (x - y).abs().max())
    if MISSING:
        raise Skip(f"the demo reads videos: {' and '.join(MISSING)} not installed")
    flags = [word for name, value in p.sizes.demo.items() for word in (f"--{name}", str(value))]
    run, every = p.folder / "run", p.sizes.demo["save_every"]
    flags += ["--output_dir", str(run)]
    metrics = run / "metrics.jsonl"

    # SIGKILL when two steps behind the checkpoint have been logged: they will be run, and logged, once more. The first
    # shows the weights, the second the optimizer's moments.
    start = time.perf_counter()
    with open(p.folder / "killed.log", "w") as log:
        process = subprocess.Popen([sys.executable, "grpo_video.py", *flags], cwd=ROOT, stdout=log, stderr=log)
        while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < every + 2):
            time.sleep(0.02)
        process.kill()
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError("the run ended before it was killed: " + (p.folder / "killed.log").read_text()[-2000:])
    before = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
    # Not under torchrun, whose workers outlive a part that is killed for taking too long.
    command(p, "grpo_video", *flags, "--resume", "True")
    seconds = time.perf_counter() - start
    after = [json.loads(line) for line in metrics.read_text().splitlines()]
    if [m["step"] for m in after] != list(range(p.sizes.demo["max_steps"])):
        raise RuntimeError(f"steps logged after the resumption: {[m['step'] for m in after]}")
    again = [(a, b) for a, b in zip(before, after) if a["step"] >= every]
    off = {name: max(abs(a.get(name, 0.0) - b.get(name, 0.0)) / max(abs(a.get(name, 0.0)), 1e-12) for a, b in again)
           for name in again[0][0] if not name.endswith("_s")}
    worst = max(off, key=off.get)
    p.row("kill and resume, " + ("bit-identical metrics" if not off[worst] else f"largest difference in {worst}"),
          repeated_steps=len(again), relative_difference=float(off[worst]))
    # The first repeated step starts from the saved weights: forward passes have one order of summation, so its samples
    # and their rewards are the same. Atomics in backward passes may move what comes after by rounding.
    first = max(abs(again[0][0][name] - again[0][1][name]) for name in ("reward", "completion_length", "parse_rate"))
    p.row("kill and resume: reward, length and parse rate of the first step after the checkpoint", 1e-9, first)
    p.row(f"demo, {len(after)} steps on one GPU" if p.device.type == "cuda" else f"demo, {len(after)} steps",
          seconds_with_the_kill=seconds, step_s=statistics.median(m["step_s"] for m in after),
          sampler_gap=max(m.get("sampler_gap", 0.0) for m in after))
    accuracy = []
    for name, model in (("before", "toy"), ("after", str(run / "final"))):
        settings = {**evaluate.TOY, "output_dir": str(p.folder / name), "max_questions": p.sizes.questions}
        evaluate.main(evaluate.Args(model=model, eval_files=["annotations/validation_L1.jsonl"], **settings))
        records = [json.loads(line) for line in (p.folder / name / "samples.jsonl").read_text().splitlines()]
        accuracy.append(statistics.mean(float(record["correct"]) for record in records))
    # On CPUs the demo goes from 0.36 to 0.95; two steps may not lose what there was.
    p.row("demo: accuracy lost on L1", -p.sizes.least_gain, accuracy[0] - accuracy[1], before=accuracy[0],
          after=accuracy[1], questions=len(records))


def command(p, module: str, *flags: str) -> str:
    """The output of python -m module in the repository; RuntimeError with the end of it all if it fails."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run = subprocess.run([sys.executable, "-m", module, *flags], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, "PYTHONPATH": paths})
    print(run.stdout[-3000:], run.stderr[-3000:], flush=True)
    if run.returncode:
        raise RuntimeError(f"{module} {' '.join(flags)} ended with {run.returncode}: {run.stderr[-1500:]}")
    return run.stdout


# ----------------------------------------------------------------------------------------------------------------------
# f. TRL.

def against_trl(p) -> None:
    """Rows: a step of TRL's trainer and one of ours (tests/bench_trl.py), at the step's shape, one after the other."""
    if missing := MISSING + [name for name in ("trl", "datasets", "torchvision") if not find_spec(name)]:
        raise Skip(f"{', '.join(missing)} not installed")
    found = {}
    for side in ("TRL", "ours"):  # two models with their optimizers do not fit one GPU: a process for each
        found[side] = json.loads(command(p, "bench_trl", str(p.sizes.rounds), p.sizes.step_shape, side)
                                 .splitlines()[-1])
    seconds = {side: statistics.median(numbers["seconds"]) for side, numbers in found.items()}
    p.row(f"{p.sizes.step_shape}: a step of TRL {importlib.metadata.version('trl')} and of ours, 2 x 8 rows x 64",
          trl_s=seconds["TRL"], ours_s=seconds["ours"], ratio=seconds["TRL"] / seconds["ours"],
          trl_peak_bytes=found["TRL"]["peak_bytes"], ours_peak_bytes=found["ours"]["peak_bytes"])


# ----------------------------------------------------------------------------------------------------------------------
# g. A trace of one step.

def trace(p) -> None:
    """Rows: a step's ten longest kernels and five longest gaps between kernels, and the share of time without any."""
    file = ROOT / "out/gpu_trace.json" if p.device.type == "cuda" else p.folder / "trace.json"
    file.parent.mkdir(exist_ok=True)
    need, _ = computed_bytes(p, p.sizes.step)
    if not p.fits("a step to trace", need):
        raise Skip(f"a step needs {need / 1e9:.0f} GB")
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (p.device.type == "cuda")
    with profile(activities=activities, schedule=schedule(wait=0, warmup=1, active=1, repeat=1),
                 on_trace_ready=lambda profiled: profiled.export_chrome_trace(str(file))) as profiled:
        train(p, "traced", 2, None, after_step=profiled.step, max_completion_length=p.sizes.traced_C)
    # On a GPU what its queue did; on a CPU operators, among them those that others have called.
    kinds = ("kernel", "gpu_memcpy", "gpu_memset") if p.device.type == "cuda" else ("cpu_op",)
    events = sorted((e["ts"], e["ts"] + e["dur"], e["name"]) for e in json.loads(file.read_text())["traceEvents"]
                    if e.get("cat") in kinds)
    if not events:
        raise Skip("the profiler saw no kernels: it needs permission for CUPTI, which containers often lack")
    by_name, gaps, end, last = {}, [], events[0][0], "the start"
    for begin, finish, name in events:
        if begin > end:
            gaps.append((begin - end, last, name, end))
        if finish > end:
            end, last = finish, name
        total, calls = by_name.get(name, (0.0, 0))
        by_name[name] = (total + finish - begin, calls + 1)
    length, idle = end - events[0][0], sum(gap for gap, *_ in gaps)
    p.row(f"one step, {p.sizes.traced_C} tokens a completion: trace in {file.name}", step_s=length / 1e6,
          kernels=len(events), share_without_a_kernel=idle / length)
    for name, (total, calls) in sorted(by_name.items(), key=lambda item: -item[1][0])[:10]:
        p.row(f"longest kernels: {shorten(name)}", milliseconds=total / 1e3, calls=calls, share=total / length)
    for gap, before, after, when in sorted(gaps, reverse=True)[:5]:
        p.row(f"longest gaps: {gap / 1e3:.2f} ms, {(when - events[0][0]) / length:.0%} into the step, between "
              f"{shorten(before)} and {shorten(after)}", milliseconds=gap / 1e3, share=gap / length)


def shorten(kernel: str) -> str:
    """A kernel's name without its template's arguments, 80 characters at most."""
    return re.sub(r"<.*", "<..>", kernel.removeprefix("void "))[:80]


# ----------------------------------------------------------------------------------------------------------------------
# h. LoRA.

# The larger of the README's two peaks of --lora_rank 16 on one GPU, which tests/simulate.py has counted.
SIMULATED = {"2B": 6.5e9, "7B": 19.7e9}


def adapters(p) -> None:
    """Rows: what learns and what is exported, for the toy base in float32; then steps at the large shapes in bf16."""
    p.attempt("toy", merged_export, str(toy.BASE))
    for shape in p.sizes.shapes:
        if p.fits(f"steps by LoRA at {shape}", SIMULATED.get(shape, 0.5e9) + 3e9):
            p.attempt(f"steps by LoRA at {shape}", step_rows, shape, "by LoRA", None,
                      {"simulated_bytes": SIMULATED.get(shape)}, lora_rank=16)


def merged_export(p, folder: str) -> None:
    """Steps of LoRA in float32: what has moved, and the merged export against the policy, which has adapters."""
    torch.backends.cudnn.allow_tf32 = False
    kept, export, title, lora_args = {}, runtime.export, f"{Path(folder).name} float32, LoRA", (4, 32.0)

    def keep(policy, tokenizer, args, final):
        kept.update(policy=policy, final=str(final))
        export(policy, tokenizer, args, final)

    metrics = train(p, f"{Path(folder).name}, exported", p.sizes.steps, None, shape=folder, export=keep,
                    dtype="float32", lora_rank=lora_args[0], lora_alpha=lora_args[1], learning_rate=2e-3, kl_coef=0.1)
    policy, base, merged = kept["policy"], *(load(x, torch.float32, p.device) for x in (folder, kept["final"]))
    begun = copy.deepcopy(base)
    lora.add_adapters(begun, *lora_args, torch.float32, seed=0)
    begun, moved, frozen = dict(begun.named_parameters()), [], []
    for name, weight in policy.qwen.named_parameters():
        now = weight.full_tensor() if weight.requires_grad else weight
        (moved if weight.requires_grad else frozen).append(not torch.equal(now.to(p.device), begun[name].to(p.device)))
    p.row(f"{title}: adapters that have not moved", 0, moved.count(False), of=len(moved))
    p.row(f"{title}: frozen weights that have", 0, frozen.count(True), of=len(frozen))

    examples, C = ragged_examples(base, p.sizes.oracle), p.sizes.oracle_C
    ids, mask = bench.random_rows(base, len(examples), C)
    wide = cast(copy.deepcopy(merged), torch.float64)
    with torch.no_grad():
        before, low, truth = (torch.cat([at(hf_logps(model, example, row), row) for example, row in zip(examples, ids)])
                              for model in (base, merged, wide))
        rows = torch.arange(len(examples), device=p.device)
        ours, _ = policy(collate_prompts(examples, p.device), rows, ids, mask, 1.0, vision_token_ids(base, p.device))
    yard = (low.double() - truth).abs().max().item() + torch.finfo(torch.float32).eps
    p.row(f"{title}: log-probs of the policy against its merged export, largest error in nats", FACTOR * yard,
          (ours.flatten().double() - truth).abs().max(), moved_by_learning=(low - before).abs().max())
    p.row(f"{title}: sampler against learner, mean gap in nats", 2 * FACTOR * yard,
          max(m["sampler_gap"] for m in metrics), kl=metrics[-1]["kl"], grad_norm=metrics[-1]["grad_norm"])


# ----------------------------------------------------------------------------------------------------------------------
# i. The families, as tiny random models.

def families(p) -> None:
    """For each family: the rows of part a in float32 and bf16, of LoRA in float32, of steps in bf16, and by graph."""
    float64.lift()
    torch.backends.cudnn.allow_tf32 = False
    folders = [str(tiny.write(p.folder / family, family)) for family in FAMILIES]
    for folder in folders:
        name = Path(folder).name
        for dtype in (torch.float32, torch.bfloat16):
            p.attempt(f"{name} {str(dtype)[6:]}", token_oracles, folder, dtype)
        p.attempt(f"{name}, LoRA", merged_export, folder)
        for what, changes in (("all weights", {}), ("by LoRA", {"lora_rank": 16})):
            p.attempt(f"{name}, {what}", step_rows, folder, f"bf16, {what}", None, {}, dtype="bfloat16", **changes)
    with ExitStack() as patches:
        if p.device.type != "cuda":
            patches.enter_context(mock.patch.object(CapturedCache, "capture", uncaptured))
        for folder in folders:  # last, because a capture that fails may take the process with it
            p.attempt(f"{Path(folder).name} by graph", same_tokens, folder)
