"""SFT on video questions: cross-entropy on a teacher's reasoning and answer, the baseline that GRPO is compared with.

    python sft_video.py                                 # the toy world on a laptop, a minute or two
    torchrun --nproc_per_node 2 sft_video.py            # the same run on two processes
    torchrun --nproc_per_node 8 sft_video.py --model Qwen/Qwen2-VL-7B-Instruct --data_root DIR \
        --train_file annotations/training_with_cot_6k.jsonl --output_dir out/sft
    torchrun --nnodes 2 --node_rank R --master_addr HOST --nproc_per_node 8 sft_video.py ...       # two nodes

The loss is the mean of -log pi(o_t | q, o_<t) over all response tokens of the step, the end token included. The file has
the same numbered steps as grpo_video.py: a diff of the two shows what is different about GRPO, and it is not much.

Letters: B prompts of a step on this rank, P prompt tokens, C response tokens.

Where this departs from the published run, and why:
    1. No prompt token is trained; the published code's masks had them in.
    2. The mean is over the tokens of the whole step: ranks and micro-batches only split a sum.
    3. An unreadable video is left out and counted, never replaced.
    4. The warm-up starts one step above 0: a step at rate 0 would be wasted.

Reference: SEED-Bench-R1, arXiv 2503.24376.
"""
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import VIDEO, Frames, VideoDataset, leave_out, load_samples, make_loader, step_batch
from model import (append_jsonl, arg, blank_batch, check_ranges, clock, collate_prompts, export, load_checkpoint, load_policy,
                   load_tokenizer, mask_from_lengths, max_over_ranks, open_run, parse_args, report, resolve_toy,
                   save_checkpoint, setup, sum_over_ranks)


@dataclass
class Args:
    """The defaults are the published run: Qwen2-VL-7B, 6k records, global batch 128, 1 epoch of 46 steps."""
    model: str = arg("toy", "local folder or hub id of a Qwen2-VL; 'toy' is the tiny one in this repository")
    data_root: str = arg("toy", "folder with annotations/, videos/ and images/; 'toy' builds the toy world on first use")
    train_file: str = arg("annotations/training_with_cot_6k.jsonl", "under data_root: JSONL or a JSON list")
    output_dir: str = arg("out/sft", "metrics.jsonl, checkpoints/ and final/ go here")
    max_samples: int = arg(0, "use the first so many samples of the file; 0: all")
    leave_out: list[str] = arg([], "samples.jsonl of evaluations of train_file: what all of them answered right is left out")
    seed: int = arg(0, "of data order")
    # pixels
    num_frames: int = arg(16, "most frames of a clip, even, >= 2")
    min_frames: int = arg(4, "fewest frames of a clip, even, >= 2")
    fps: float = arg(2.0, "frames a second to sample between those two bounds")
    image_size: int = arg(252, "frames and images are resized to this square; a multiple of 28")
    frame_cache: str = arg("", "folder to keep decoded frames in, for later epochs and runs; empty: none")
    video: str = arg("full", "what the policy gets to see: full, or a control: " + ", ".join(list(VIDEO)[1:]))
    # optimisation; all quantities are global, whatever the number of ranks
    prompts_per_step: int = arg(128, "records per step over all ranks, a multiple of their number")
    num_epochs: int = arg(1, "passes over the data when max_steps is 0")
    max_steps: int = arg(0, "optimizer steps to run; 0: num_epochs")
    learning_rate: float = arg(2e-5, "peak")
    warmup_ratio: float = arg(0.1, "part of the run in which the rate rises linearly to its peak; then a cosine to 0")
    weight_decay: float = arg(0.0, "AdamW's")
    max_grad_norm: float = arg(1.0, "global gradient norm is clipped to this")
    micro_batch_size: int = arg(2, "records per forward and backward on one rank: memory against speed, results differ by rounding")
    gradient_checkpointing: bool = arg(True, "recompute activations in the backward pass")
    dtype: str = arg("auto", "compute dtype: auto (bfloat16 on GPU, float32 on CPU), float32, bfloat16, float64")
    # logging
    num_workers: int = arg(2, "processes per rank that decode video ahead of training")
    save_every: int = arg(100, "checkpoint every so many steps; 0: never")
    resume: bool = arg(False, "continue from the newest checkpoint in output_dir")

    def __post_init__(self):
        check_ranges(self, prompts_per_step=(1, None), num_epochs=(1, None), max_steps=(0, None), learning_rate=(0, None),
                     warmup_ratio=(0, 1), weight_decay=(0, None), max_grad_norm=(0, None), micro_batch_size=(1, None), num_workers=(0, None),
                     save_every=(0, None), max_samples=(0, None))


# What differs for the toy world (used when --data_root is not given; flags that are given win).
TOY = dict(image_size=56, prompts_per_step=32, micro_batch_size=32, num_epochs=3, learning_rate=1e-4,
           gradient_checkpointing=False, frame_cache="out/toy_frames", output_dir="out/toy_sft")


def learning_rate_at(step: int, num_steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up over the first part of the run, then a cosine down to 0; `step` counts from 0."""
    warmup_steps = math.ceil(warmup_ratio * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps  # step + 1: the first step must not be wasted on a rate of 0
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (num_steps - warmup_steps)))


def encode_response(tokenizer, response: str) -> Tensor:
    """The targets of one example: (C,) int64. The end token is one of them: a model that never sees it never learns to stop."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return torch.tensor([*ids, tokenizer.convert_tokens_to_ids("<|im_end|>")])


def main(args: Args) -> Path:
    """Trains and returns the folder of the exported model."""
    # 1 setup
    rank, world_size, device = setup()
    args = resolve_toy(args)
    if args.prompts_per_step % world_size:
        raise ValueError(f"--prompts_per_step {args.prompts_per_step} must be a multiple of the {world_size} ranks")

    # 2 data
    samples = load_samples(args.train_file, args.data_root)[:args.max_samples or None]
    if not all(sample.response for sample in samples):
        raise ValueError(f"{args.train_file}: its records have no 'response' to learn from; SFT needs the shape of "
                         "training_with_cot_6k.jsonl ('prompt' messages and a 'response')")
    samples = leave_out(samples, args.leave_out)
    num_steps = args.max_steps or max(1, args.num_epochs * len(samples) // args.prompts_per_step)
    tokenizer = load_tokenizer(args.model)
    frames = Frames(args.fps, args.min_frames, args.num_frames, args.image_size, args.frame_cache)
    dataset = VideoDataset(samples, tokenizer, frames, args.seed, args.video)
    if rank == 0:
        print(f"{args.train_file}: {dataset.describe_prompt()}")

    # 3 model
    policy = load_policy(args, device)
    blank = blank_batch(tokenizer, policy.qwen.config, device)

    # 4 optimizer
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, betas=(0.9, 0.999),
                                  weight_decay=args.weight_decay)

    # 5 output folder, resume
    output_dir = open_run(args, args.resume)
    first_step = load_checkpoint(output_dir, policy, optimizer) if args.resume else 0
    loader = make_loader(dataset, [step_batch(step, args.prompts_per_step, len(samples), args.seed, rank, world_size)
                                   for step in range(first_step, num_steps)], args.num_workers)

    # 6 loop; the letters are those of grpo_video.py, where b is the rewards and d the other policies' log-probs
    progress = tqdm(total=num_steps, initial=first_step, desc="sft", disable=rank != 0, dynamic_ncols=True)
    total_s, total_tokens = Counter(), Counter()  # by phase
    start = first_start = clock()
    for step, examples in enumerate(loader, first_step):
        seconds = {"data_s": clock() - start}

        # 6a completions: the teacher's
        for example in examples:
            if example.error:
                tqdm.write(f"step {step}: sample {example.sample.sample_id} left out: {example.error}")
        readable = [example for example in examples if not example.error]
        responses = [encode_response(tokenizer, example.sample.response) for example in readable]

        # 6c counts of the whole step: the denominators, fixed before the first backward
        counts = sum_over_ranks({"tokens": sum(map(len, responses)), "bad_videos": len(examples) - len(readable)}, device)
        if counts["tokens"] == 0:
            raise ValueError(f"step {step}: no sample could be read, check --data_root {args.data_root}; {examples[0].error}")

        # 6e update
        lr = learning_rate_at(step, num_steps, args.learning_rate, args.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = {"loss": 0.0, "entropy": 0.0}
        batches = [slice(i, i + args.micro_batch_size) for i in range(0, len(readable), args.micro_batch_size)]
        # Before the first pass, and here alone: ranks that waited for each other in different places would wait forever.
        num_blanks = max_over_ranks(len(batches), device) - len(batches)
        for rows in batches:
            prompts = collate_prompts(readable[rows], device)
            completion_ids = pad_sequence(responses[rows], batch_first=True).to(device)  # (rows, C)
            lengths = torch.tensor([len(response) for response in responses[rows]], device=device)
            mask = mask_from_lengths(lengths, completion_ids.shape[1])  # (rows, C) bool
            row_prompt = torch.arange(len(lengths), device=device)
            logps, entropy = policy(prompts, row_prompt, completion_ids, mask)  # (rows, C)
            # L = -sum_t log pi(o_t | q, o_<t) / number of response tokens in the step
            weights = mask / counts["tokens"]
            loss = -(logps * weights).sum()
            # FSDP averages gradients over ranks; the weights already hold the global denominator, so undo that.
            (loss * world_size).backward()
            sums["loss"] += loss.detach()
            sums["entropy"] += (entropy * weights).sum()
        for _ in range(num_blanks):  # collective: every rank runs as many passes as the others
            (0 * policy(*blank)[0].sum()).backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).full_tensor().item()
        if not math.isfinite(grad_norm):
            raise FloatingPointError(f"step {step}: the gradient norm is {grad_norm}; start again with a lower --learning_rate")
        optimizer.step()
        optimizer.zero_grad()
        seconds["update_s"] = clock() - start - sum(seconds.values())

        # 6f log
        sums = sum_over_ranks(sums, device)
        step_s = sum(seconds.values())
        if rank == 0:
            append_jsonl(output_dir / "metrics.jsonl", {
                "step": step, **sums, "grad_norm": grad_norm, "lr": lr, "bad_videos": int(counts["bad_videos"]),
                "tokens_per_s": counts["tokens"] / step_s, "step_s": step_s, **seconds})
            progress.set_postfix_str(f"loss {sums['loss']:.3f} grad {grad_norm:.2f} lr {lr:.1e}")
            progress.update()
        total_s.update(seconds)  # a Counter adds
        total_tokens.update(update_s=counts["tokens"])
        if args.save_every and (step + 1) % args.save_every == 0:
            save_checkpoint(output_dir, step + 1, policy, optimizer)
        start = clock()

    # 7 finish
    progress.close()
    report(output_dir, total_s, total_tokens, clock() - first_start, device)
    export(policy, tokenizer, args.model, output_dir / "final")
    return output_dir / "final"


if __name__ == "__main__":
    main(parse_args(Args, TOY))
    torch.distributed.destroy_process_group()
