"""Seconds, bytes and exact counts of the two phases of a GRPO step, each beside the usual way of doing the same.

    python tests/bench.py                          # on a CPU all but B2 and B5, ten minutes: a table, docs/bench.json
    python tests/bench.py --only B1 B3 --rounds 9  # the other rows in the file stay as they are
    python tests/bench.py --trl ENV/bin/python     # B5 as well; ENV has trl, torchvision and this project's packages
    python tests/bench.py --shape 7B               # on a GPU: random bf16 weights, shapes of Qwen2-VL-7B (never run)

On a CPU the model is the toy world's base, 1.4 million weights, but prompts are as long as the paper's: P = 900 tokens,
729 of them vision (16 frames and an image of 252 pixels), G = 8 completions. A model this small spends its time
differently from a large one on a GPU, so no ratio from here says anything about a GPU; the counts do. Both sides of a
ratio have the same weights and the same token counts (the end token is off), and take turns: first one, then the other,
in every round. Ratios are medians over rounds of the ratio within a round, with the smallest and the largest.

What is compared: B1 sampling, B2 decoding against the memory's bandwidth (GPU), B3 learning, B4 memory of log-probs, B5
a whole step of TRL's, B6 collectives while sampling, B7 growth with frames, group size and completion length.
"""
import argparse
import ctypes
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.profiler import profile
from tqdm import tqdm
from transformers import GenerationConfig, Qwen2VLConfig, Qwen2VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model  # noqa: E402
import toy  # noqa: E402
from data import (  # noqa: E402
    FAMILIES,
    Example,
    normalise,
    num_tokens,
    patchify,
    rope_positions,
    time_step,
    vision_runs,
)
from model import Policy, collate_prompts, token_logps, use_our_attention, vision_token_ids  # noqa: E402
from runtime import clock, copy_weights, load_policy, load_sampler, make_sampler, setup  # noqa: E402
from sampler import generate  # noqa: E402

P, G = 900, 8
# Of "<12.3 seconds>", which Qwen3-VL reads before each time step: an estimate, Qwen's tokenizer is not here. It is said
# to have a token for each digit, one for " seconds", and one each for < . and >, so that below 10 s there are 6.
STAMP_TOKENS = 7
# Bytes a second, from data sheets, by the name that torch gives the GPU.
BANDWIDTH = {"NVIDIA H200": 4.8e12, "NVIDIA H100 80GB HBM3": 3.35e12, "NVIDIA A100-SXM4-80GB": 2.04e12}
# From config.json of Qwen/Qwen2-VL-2B-Instruct and -7B-Instruct.
SHAPES = {"2B": dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12, num_key_value_heads=2,
                     vocab_size=151936, tie_word_embeddings=True),
          "7B": dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4,
                     vocab_size=152064, tie_word_embeddings=False)}


# ----------------------------------------------------------------------------------------------------------------------
# Models and prompts.

def shape_config(shape: str) -> Qwen2VLConfig:
    text = {"num_hidden_layers": 28, **SHAPES[shape]}
    vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, **text.pop("vision", {})}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope, "use_sliding_window": False},
        vision_config={**vision, "hidden_size": text["hidden_size"]},
        tie_word_embeddings=text["tie_word_embeddings"])


def load_qwen(shape: str, device: torch.device):
    if shape == "toy":
        return load_sampler(SimpleNamespace(model=str(toy.BASE), dtype="float32"), device)
    config = shape_config(shape)
    with device:
        qwen = Qwen2VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    return use_our_attention(qwen).eval().requires_grad_(False)


def make_prompts(qwen, num_prompts: int = 1, frames: int = 16, length: int = P, image_size: int = 252):
    """Prompts of random pixels and words, `length` tokens each: a video of `frames` frames (0: none), image, text.

    `image_size` is rounded to whole tokens of the family. Two frames are a second; where the family has timestamps,
    random words stand for them.
    """
    config, examples, family = qwen.config, [], FAMILIES[qwen.config.model_type]
    image_size = max(round(image_size / family.token_size), 1) * family.token_size
    seconds = np.arange(frames + 1) / 2
    start, end = torch.tensor([[config.vision_start_token_id], [config.vision_end_token_id]])
    for seed in range(num_prompts):
        g = torch.Generator().manual_seed(seed)
        pieces, pixels, runs = [], {}, []
        for name, count, token in (("videos", frames, config.video_token_id), ("image", 1, config.image_token_id)):
            if count:
                frame_bytes = torch.randint(0, 256, (count, image_size, image_size, 3), generator=g, dtype=torch.uint8)
                pixels[name] = patchify(frame_bytes.numpy(), family)
                num_words = STAMP_TOKENS if family.timestamps and name == "videos" else 0
                for run in vision_runs(family, pixels[name][1]):
                    words = torch.randint(0, 300, (num_words,), generator=g)
                    pieces += [words, start, torch.full((num_tokens(run),), token), end]
        pieces.append(torch.randint(0, 300, (length - sum(map(len, pieces)),), generator=g))
        ids = torch.cat(pieces)
        runs = vision_runs(family, *(grid for _, grid in pixels.values()))
        positions = rope_positions(ids, runs, time_step(family, seconds if frames else None), config.image_token_id,
                                   config.video_token_id)
        video = pixels.get("videos", (None, None))
        examples.append(Example(None, (), "", "", ids, positions, *video, *pixels["image"]))
    return examples, collate_prompts(examples, qwen.device)


def normalised(example: Example, model_type: str = "qwen2_vl") -> Example:
    """The example as Hugging Face's models take it: its patches float32, not bytes."""
    pixels = {name: normalise(patches, FAMILIES[model_type]) for name in ("pixel_values_videos", "pixel_values")
              if (patches := getattr(example, name)) is not None}
    return dataclasses.replace(example, **pixels)


def random_rows(qwen, num_completions: int, C: int):
    """Completions of C tokens each."""
    ids = torch.randint(0, 300, (num_completions, C), generator=torch.Generator().manual_seed(0)).to(qwen.device)
    return ids, torch.ones_like(ids, dtype=torch.bool)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring.

def count(run, *qwens) -> dict[str, int]:
    """What one call of `run` puts through the models, seen from outside: the code that is measured counts nothing."""
    seen = {"vision patches": 0, "text tokens": 0, "logits": 0}

    def see_patches(module, args, kwargs):
        seen["vision patches"] += len(args[0] if args else kwargs["hidden_states"])

    def see_tokens(module, args, kwargs):  # padding is among them: it costs as much
        seen["text tokens"] += kwargs["inputs_embeds"].shape[:2].numel()

    def see_logits(module, args, logits):
        seen["logits"] += logits.numel()

    # The learner takes its logits chunk by chunk from lm_head's weight, without calling the module. Whole calls are
    # counted, so that a chunk which is computed again in the backward pass counts once.
    def seen_logps(hidden, weight, *args, **kwargs):
        seen["logits"] += len(hidden) * len(weight)
        return token_logps(hidden, weight, *args, **kwargs)

    with ExitStack() as watching:  # all hooks go at its end
        watching.enter_context(mock.patch.object(model, "token_logps", seen_logps))
        for qwen in qwens:
            for hook in (qwen.model.visual.register_forward_pre_hook(see_patches, with_kwargs=True),
                         qwen.model.language_model.register_forward_pre_hook(see_tokens, with_kwargs=True),
                         qwen.lm_head.register_forward_hook(see_logits)):
                watching.enter_context(hook)
        run()
    return seen


def peak_bytes(run, device: torch.device) -> int | None:
    """The most memory that `run` holds beyond what was held before. On a CPU: resident memory, Linux only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/clear_refs").exists():
        return None
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # give back what earlier runs have left in the allocator
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew

    def status(name):
        line, = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024

    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def take_turns(sides: dict, rounds: int, title: str) -> dict[str, list[float]]:
    """Seconds of each side, `rounds` times each after one warm-up, in turn."""
    seconds = {name: [] for name in sides}
    for i in tqdm(range(rounds + 1), desc=title, leave=False):
        for name, run in sides.items():
            start = clock()
            run()
            if i > 0:
                seconds[name].append(clock() - start)
    return seconds


def table_row(id: str, what: str, sides: dict[str, list[float]], unit: str = "s", ratios=None, aim=None,
              counts=None) -> dict:
    """One row of the table: what each side took in every round; of the ratios, if any, the median, least and most."""
    spread = [statistics.median(ratios), min(ratios), max(ratios)] if ratios else None
    return {"id": id, "what": what, "unit": unit, "sides": sides, "ratio": spread, "aim": aim, "counts": counts or {}}


def compare(id: str, what: str, sides: dict, rounds: int, aim: float | None, counts: dict) -> dict:
    """The row of two sides that take turns: the first over the second."""
    seconds = take_turns(sides, rounds, f"{id} {what}")
    ratios = [a / b for a, b in zip(*seconds.values())]
    return table_row(id, what, seconds, ratios=ratios, aim=aim, counts=counts)


def show(row: dict) -> None:
    parts = [f"{name} {statistics.median(values):.3g} {row['unit']}" for name, values in row["sides"].items()]
    if row["ratio"]:
        median, low, high = row["ratio"]
        parts.append(f"{median:.2f}x ({low:.2f} to {high:.2f})" + (f", aim {row['aim']}x" if row["aim"] else ""))
    print(f"{row['id']}  {row['what']:44} " + " | ".join(parts))
    for side, counts in row["counts"].items():
        print(f"      {side}: " + ", ".join(f"{value:,} {name}" for name, value in counts.items() if value is not None))


# ----------------------------------------------------------------------------------------------------------------------
# The comparisons. Each yields rows.

def hf_generate(qwen, example, C: int):
    """Hugging Face's sampling of one group: the vision tower runs once, but the prompt is prefilled G times.

    The example is a `normalised` one, made before the clock runs, as `prompts` are for ours."""
    ids = example.prompt_ids.to(qwen.device)[None]
    config = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=C,
                              num_return_sequences=G, eos_token_id=None, pad_token_id=0,
                              suppress_tokens=vision_token_ids(qwen, "cpu").tolist())
    types = (ids == qwen.config.image_token_id).int() + 2 * (ids == qwen.config.video_token_id).int()
    names = ("pixel_values_videos", "video_grid_thw", "pixel_values", "image_grid_thw")
    pixels = {name: getattr(example, name).to(qwen.device) for name in names}
    out = qwen.generate(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=types,
                        generation_config=config, **pixels)
    assert out.shape == (G, ids.shape[1] + C)


def rollout_of(qwen, prompts, C: int, G: int = G, caches: dict | None = None):
    """A call that samples G completions of C tokens for each prompt."""
    banned, no_end = vision_token_ids(qwen, qwen.device), torch.tensor([], dtype=torch.int64, device=qwen.device)
    seeds = list(range(len(prompts.lengths)))

    def run():
        completions = generate(qwen, prompts, G, C, 1.0, seeds, no_end, banned, caches)
        assert (completions.lengths == C).all()
    return run


def b1(qwen, args):
    """Sampling by Hugging Face's generate, a group at a time, over ours."""
    caches = {} if args.cuda_graph else None
    gpu = qwen.device.type == "cuda"
    for num_prompts, C, aim in ((1, 64, 6 if gpu else 2.5), (1, 256, 6 if gpu else 1.8), (8, 64, 15 if gpu else None)):
        examples, prompts = make_prompts(qwen, num_prompts)
        examples = [normalised(example) for example in examples]
        sides = {"generate": lambda C=C, examples=examples: [hf_generate(qwen, example, C) for example in examples],
                 "ours": rollout_of(qwen, prompts, C, caches=caches)}
        # Counted without CUDA graphs: a replay calls no module.
        counts = {"generate": count(sides["generate"], qwen), "ours": count(rollout_of(qwen, prompts, C), qwen)}
        yield compare("B1", f"sampling, {num_prompts * G} rows x {C} tokens", sides, args.rounds, aim, counts)


def b2(qwen, args):
    """A decode step over the time in which a GPU can read the weights once."""
    if qwen.device.type != "cuda":
        return
    caches = {} if args.cuda_graph else None
    weights = sum(p.nbytes for p in (*qwen.model.language_model.layers.parameters(), qwen.lm_head.weight))
    floor = weights / BANDWIDTH[torch.cuda.get_device_name()]
    for num_prompts in (1, 8):
        _, prompts = make_prompts(qwen, num_prompts)
        sides = {C: rollout_of(qwen, prompts, C, caches=caches) for C in (1, 65)}
        seconds = take_turns(sides, args.rounds, "B2")
        steps = [(b - a) / 64 for a, b in zip(seconds[1], seconds[65])]
        yield table_row("B2", f"one decode step over its floor, {num_prompts * G} rows",
                        {"step": steps, "floor": [floor]}, ratios=[step / floor for step in steps], aim=1.5,
                        counts={"read": {"bytes of weights": weights}})


def learner(qwen, naive: bool, prompts, num_completions: int, C: int):
    """A call that computes log-probs of C tokens in each row and their gradients."""
    policy = Policy(qwen, qwen.dtype, naive)
    ids, mask = random_rows(qwen, num_completions, C)
    row_prompt = torch.arange(num_completions, device=qwen.device) // (num_completions // len(prompts.lengths))

    def run():
        logps, _ = policy(prompts, row_prompt, ids, mask, 1.0, vision_token_ids(qwen, qwen.device))
        logps.mean().backward()
        policy.zero_grad()
    return run


def b3(qwen, args):
    """Learning a group as padded rows over learning it as one sequence, vision included."""
    _, prompts = make_prompts(qwen)
    qwen.requires_grad_(True)
    for C, aim in ((256, 2.2 if qwen.device.type == "cuda" else 2.3), (64, None)):
        sides = {"naive": learner(qwen, True, prompts, G, C), "ours": learner(qwen, False, prompts, G, C)}
        counts = {name: {**count(run, qwen), "bytes at most": peak_bytes(run, qwen.device)}
                  for name, run in sides.items()}
        yield compare("B3", f"learning, forward and backward, {G} rows x {C}", sides, args.rounds, aim, counts)
    qwen.requires_grad_(False)


def b4(qwen, args):
    """Peak memory of log-probs from all logits at once over that from chunks, forward and backward."""
    V, C, D = 152064, 8 * 512, 128
    hidden = torch.randn(C, D, device=qwen.device, dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(V, D, device=qwen.device, dtype=torch.bfloat16).requires_grad_()
    targets = torch.randint(0, V, (C,), device=qwen.device)

    def full():
        logits = F.linear(hidden, weight).float()
        logps = logits.log_softmax(-1)
        entropy = torch.special.entr(logps.detach().exp()).sum(-1)
        (logps.gather(1, targets[:, None]).sum() + entropy.sum()).backward()

    def ours():
        logps, entropy = token_logps(hidden, weight, targets)
        (logps.sum() + entropy.sum()).backward()

    peaks = {}
    for name, run in (("full", full), ("ours", ours)):
        for _ in range(2):  # the first one pays for buffers that stay
            hidden.grad = weight.grad = None
            peaks[name] = peak_bytes(run, qwen.device)
    if None not in peaks.values():
        yield table_row("B4", "log-probs and entropy, V 152,064, 8 x 512",
                        {name: [peak] for name, peak in peaks.items()}, "bytes",
                        [peaks["full"] / peaks["ours"]], aim=8)


def b5(qwen, args):
    """A whole step of TRL's GRPOTrainer over one of ours."""
    if args.trl:
        command = [args.trl, str(Path(__file__).with_name("bench_trl.py")), str(args.rounds)]
        yield json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def b6(qwen, args):
    """Collectives of a rollout on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__,
               "--collectives"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    yield json.loads(out.splitlines()[-1])


def collectives() -> None:
    """On two ranks: how many collectives a rollout takes, whatever its length, and a forward pass of the policy."""
    rank, _, device = setup()
    policy = load_policy(SimpleNamespace(model=str(toy.BASE), dtype="float32", gradient_checkpointing=False,
                                         freeze_vision=False, lora_rank=0), device)
    sampler = make_sampler(policy, device)
    _, prompts = make_prompts(sampler, frames=2, length=200)

    def rollout(C):
        copy_weights(policy, sampler)
        rollout_of(sampler, prompts, C)()

    def collectives_in(run):
        with profile() as profiled:
            run()
        return sum(event.count for event in profiled.key_averages() if event.key.startswith(("gloo:", "nccl:")))

    ids, mask = random_rows(sampler, G, 4)
    row_prompt = torch.zeros(G, dtype=torch.int64, device=device)
    counts = {"in a rollout of 32 tokens": collectives_in(lambda: rollout(32)),
              "in a rollout of 64 tokens": collectives_in(lambda: rollout(64)),
              "of these in sampling": collectives_in(rollout_of(sampler, prompts, 32)),
              "in a sharded forward pass": collectives_in(lambda: policy(prompts, row_prompt, ids, mask))}
    if rank == 0:
        print(json.dumps(table_row("B6", "collectives on 2 ranks", {}, "", counts={"ours": counts})))
    torch.distributed.destroy_process_group()


def b7(qwen, args):
    """How seconds and bytes grow with frames, group size and completion length, beside the arithmetic."""
    base = dict(frames=16, rows=8, C=128)
    first = {}  # seconds and GFLOP of the row that the others are compared with
    for change in ({}, dict(frames=8), dict(frames=32), dict(rows=4), dict(rows=16), dict(C=512)):
        frames, rows, C = {**base, **change}.values()
        _, prompts = make_prompts(qwen, frames=frames, length=P + (frames - 16) // 2 * 81)  # two frames are 81 tokens
        qwen.requires_grad_(True)
        sides = {"sampling": rollout_of(qwen, prompts, C, rows), "learning": learner(qwen, False, prompts, rows, C)}
        counts = {}
        seconds = take_turns(sides, args.rounds, "B7")
        for name, run in sides.items():
            now = statistics.median(seconds[name]), gflop(qwen, name, prompts, rows, C)
            growth, predicted = (a / b for a, b in zip(now, first.setdefault(name, now)))
            counts[name] = {**count(run, qwen), "GFLOP by arithmetic": round(now[1], 1),
                            "bytes at most": peak_bytes(run, qwen.device),
                            "times the first row's seconds": round(growth, 2), "times its GFLOP": round(predicted, 2)}
        qwen.requires_grad_(False)
        yield table_row("B7", f"{frames} frames, G {rows}, C {C}", seconds, counts=counts)


def gflop(qwen, phase: str, prompts, rows: int, C: int) -> float:
    """Matrix products of a phase: 2 per weight and token, 4 H d per pair of tokens in attention; learning: 3 times."""
    text, vision = qwen.config.text_config, qwen.config.vision_config
    tokens, S = len(prompts.ids), len(prompts.pixel_values)
    weights = sum(p.numel() for p in qwen.model.language_model.layers.parameters())
    pairs = tokens * tokens / 2 + rows * C * (tokens + C / 2)
    flop = 2 * weights * (tokens + rows * C) + 4 * text.hidden_size * text.num_hidden_layers * pairs
    flop += 2 * rows * C * text.hidden_size * text.vocab_size
    flop += 2 * S * sum(p.numel() for p in qwen.model.visual.parameters())
    flop += 4 * vision.embed_dim * vision.depth * sum(t * (h * w) ** 2 for t, h, w in prompts.grid_thw.tolist())
    return flop * (3 if phase == "learning" else 1) / 1e9


# ----------------------------------------------------------------------------------------------------------------------
# The command.

def machine() -> dict:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "cores": os.cpu_count(), "torch threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def main() -> None:
    benches = {"B1": b1, "B2": b2, "B3": b3, "B4": b4, "B5": b5, "B6": b6, "B7": b7}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=benches, default=list(benches))
    parser.add_argument("--rounds", type=int, default=5, help="times that each side runs, 5 or more to quote numbers")
    parser.add_argument("--shape", choices=("toy", *SHAPES), default="toy", help="2B and 7B: on a GPU")
    parser.add_argument("--cuda_graph", action="store_true", help="decode by CUDA graph; never run so far")
    parser.add_argument("--trl", help="the python of an environment with trl and torchvision, for B5")
    parser.add_argument("--output", default="docs/bench.json")
    parser.add_argument("--collectives", action="store_true", help=argparse.SUPPRESS)  # one rank of B6
    args = parser.parse_args()
    if args.collectives:
        return collectives()
    _, _, device = setup()
    qwen = load_qwen(args.shape, device)
    rows = []
    print(" ".join(f"{name} {value}," for name, value in machine().items()))
    for name in args.only:
        for row in benches[name](qwen, args):
            rows.append(row)
            show(row)
    found, file = {"machine": machine(), "shape": args.shape}, Path(args.output)
    if file.exists():
        before = json.loads(file.read_text())
        if all(before.get(name) == value for name, value in found.items()):  # the same machine, versions and model
            rows += [row for row in before["rows"] if row["id"] not in args.only]
            rows.sort(key=lambda row: row["id"])
    file.write_text(json.dumps({**found, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
