"""SFT on video questions: cross-entropy on a teacher's reasoning and answer, the baseline that GRPO is compared with.

    python sft_video.py                                 # the toy world on a laptop, a minute or two
    torchrun --nproc_per_node 2 sft_video.py            # the same run on two processes
    torchrun --nproc_per_node 8 sft_video.py --model Qwen/Qwen2-VL-7B-Instruct --data_root DIR \
        --train_file annotations/training_with_cot_6k.jsonl --output_dir out/sft
    torchrun --nnodes 2 --node_rank R --master_addr HOST --nproc_per_node 8 sft_video.py ...       # two nodes

The loss is the mean of -log pi(o_t | q, o_<t) over all response tokens of the step, the end token included. The steps
have the numbers of grpo_video.py, of whose seven four are needed here: a diff of the two shows what GRPO adds.

Letters: N responses of a step on this rank (one for each prompt), C their tokens.

Where this departs from the published run, and why:
    1. No prompt token is trained; the published code's masks had them in.
    2. The mean is over the tokens of the whole step: ranks and micro-batches only split a sum.
    3. An unreadable video is left out and counted, never replaced.
    4. The warm-up starts one step above 0: a step at rate 0 would be wasted.

Reference: SEED-Bench-R1, arXiv 2503.24376.
"""
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import runtime
from data import make_loader, step_batch
from model import collate_prompts, mask_from_lengths
from run import Run
from runtime import TrainArgs, arg


@dataclass
class Args(TrainArgs):
    """The defaults are the published run: Qwen2-VL-7B, 6k records, global batch 128, 1 epoch of 46 steps."""
    train_file: str = arg("annotations/training_with_cot_6k.jsonl", "under data_root: JSONL or a JSON list")
    output_dir: str = arg("out/sft", "metrics.jsonl, checkpoints/ and final/ go here")
    # 7 update
    prompts_per_step: int = arg(128, "questions per step over all ranks, a multiple of their number", least=1)
    learning_rate: float = arg(2e-5, "peak", least=0)
    warmup_ratio: float = arg(0.1, "part of the run in which the rate rises; then a cosine to 0", least=0, most=1)
    micro_batch_size: int = arg(2, "responses per forward and backward on one rank: memory against speed, results "
                                   "differ by rounding", least=1)


# Defaults in place of those above for a small model (`is_small` in runtime.py); flags that are given win.
TOY = dict(image_size=56, prompts_per_step=32, micro_batch_size=32, num_epochs=3, learning_rate=1e-4,
           gradient_checkpointing=False, frame_cache="out/toy_frames", output_dir="out/toy_sft")


# ----------------------------------------------------------------------------------------------------------------------
# 1 sample: the teacher's responses.

def encode_response(tokenizer, response: str) -> Tensor:
    """The targets of one example: (C,) int64, with the end token: a model that never sees it never learns to stop."""
    ids = tokenizer(response, add_special_tokens=False)["input_ids"]
    return torch.tensor([*ids, tokenizer.convert_tokens_to_ids("<|im_end|>")])


def collate_responses(responses: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Responses of any lengths, or none -> ids (N, C) int64, padded on the right, and mask (N, C) bool."""
    lengths = torch.tensor([len(ids) for ids in responses], dtype=torch.int64, device=device)
    if not responses:
        return lengths.new_zeros(0, 1), lengths.new_zeros(0, 1, dtype=torch.bool)
    ids = pad_sequence(responses, batch_first=True).to(device)
    return ids, mask_from_lengths(lengths, ids.shape[1])


# ----------------------------------------------------------------------------------------------------------------------
# 7 update

def learning_rate_at(step: int, num_steps: int, peak: float, warmup_ratio: float) -> float:
    """Linear warm-up over the first part of the run, then a cosine down to 0; `step` counts from 0."""
    warmup_steps = math.ceil(warmup_ratio * num_steps)
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps  # step + 1: the first step must not be wasted on a rate of 0
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (num_steps - warmup_steps)))


# ----------------------------------------------------------------------------------------------------------------------
# The run.

def main(args: Args) -> Path:
    """Trains and returns the folder of the exported model."""
    rank, world_size, device = runtime.setup()
    args = runtime.resolve(args, device)
    tokenizer = runtime.load_tokenizer(args.model)
    dataset, num_steps = runtime.load_training_set(args, tokenizer, for_sft=True)
    policy = runtime.load_policy(args, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, betas=(0.9, 0.999),
                                  weight_decay=args.weight_decay, fused=True)
    run = Run(args, policy, optimizer, num_steps, device)
    loader = make_loader(dataset, [step_batch(step, args.prompts_per_step, len(dataset), args.seed, rank, world_size)
                                   for step in range(run.first_step, num_steps)], args.num_workers)

    for step, examples in run.steps(loader):
        # 1 sample
        run.phase("update")
        readable = run.keep_readable(examples)
        responses = [encode_response(tokenizer, example.question.response) for example in readable]

        # The sums of the whole step, the denominator of the loss among them, fixed before the first backward.
        totals = run.sum_over_ranks({"tokens": sum(len(ids) for ids in responses)})
        if totals["tokens"] == 0:
            continue  # nothing could be read on any rank

        # 4 the log-probs of the responses, and 5 minus their mean
        sums = {"loss": 0.0, "entropy": 0.0}
        for rows in runtime.micro_batches(torch.arange(len(readable), device=device), args.micro_batch_size):
            batch = collate_prompts([readable[n] for n in rows.tolist()], device)
            completion_ids, mask = collate_responses([responses[n] for n in rows.tolist()], device)
            logps, entropy = policy(batch, rows - rows[:1], completion_ids, mask)  # (len(rows), C)
            runtime.require_finite("log-probs", logps, [readable[n] for n in rows.tolist()])
            # L = -sum_t log pi(o_t | q, o_<t) / number of response tokens in the step
            token_weight = mask / totals["tokens"]
            loss = -(logps * token_weight).sum()
            # FSDP averages gradients over ranks; token weights already hold the global denominator, so undo that.
            (loss * world_size).backward()
            sums["loss"] += loss.detach()
            sums["entropy"] += (entropy * token_weight).sum()

        # 7 update
        lr = learning_rate_at(step, num_steps, args.learning_rate, args.warmup_ratio)
        grad_norm = runtime.optimizer_step(policy, optimizer, lr, args.max_grad_norm)
        metrics = {**run.sum_over_ranks(sums), "grad_norm": grad_norm, "lr": lr}
        run.log(metrics, totals["tokens"], f"loss {metrics['loss']:.3f} grad {grad_norm:.2f} lr {lr:.1e}", signs={})

    return run.finish(tokenizer)


if __name__ == "__main__":
    runtime.launch(main, Args, TOY)
