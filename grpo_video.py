"""GRPO on video questions, from scratch: the policy answers each question G times, and learns from which answers were right.

    python grpo_video.py                                # the toy world on a laptop, minutes
    torchrun --nproc_per_node 2 grpo_video.py           # the same run on two processes: same prompts, same completions
    torchrun --nproc_per_node 8 grpo_video.py --model Qwen/Qwen2-VL-7B-Instruct --data_root DIR \
        --train_file annotations/training_6k.jsonl --output_dir out/grpo
    torchrun --nnodes 2 --node_rank R --master_addr HOST --nproc_per_node 8 grpo_video.py ...      # two nodes

One step, in the order of `main`:
    1 sample     G completions o_1 .. o_G for each of B prompts q from the current policy
    2 reward     r_i = 1 if the answer parsed from o_i is right, else 0
    3 advantage  A_i = (r_i - mean(r)) / (std(r) + 1e-4) within the group: the group is the baseline, no value network
    4 ratio      rho_it = pi_theta(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)
    5 objective  L_it = -min(rho_it A_i, clip(rho_it, 1 - eps_low, 1 + eps_high) A_i)
    6 KL         L_it += beta (pi_ref / pi_theta - log(pi_ref / pi_theta) - 1)
    7 update     AdamW on the mean of L_it over the tokens of a completion, then over completions

Symbols: pi_theta -> logps, pi_old -> old_logps, pi_ref -> ref_logps, rho -> ratio, A -> advantages, G -> group_size,
beta -> kl_coef, eps -> clip_low, clip_high. Letters: B prompts, G completions per prompt, N = B * G rows, P prompt tokens,
C completion tokens, V vocabulary. In each function they count what that function sees (this rank's, or a micro-batch's).

Where this departs from the published SEED-Bench-R1 run, and why:
    1. The clipped ratio is real. The release has none and one update per rollout, where the ratio is 1 and nothing clips;
       with the default --num_updates 1 the gradient here is the same as theirs.
    2. The end token is trained, and nothing after it: masks come from lengths.
    3. One strict parser for reward and evaluation. The release compares first characters ("Apple" is A, "(A)" is wrong).
    4. Distractors, option order and sampling noise are functions of (seed, step or epoch, sample): no global random state,
       so the number of ranks changes nothing, and a step number is enough to resume.
    5. The denominators of the loss are those of the whole step: ranks and micro-batches only split a sum.
    6. An unreadable video gets weight 0 and is counted. The release trains its question on another video.
    7. KL is not computed, and no reference is loaded, when --kl_coef is 0.
    8. Vision tokens are banned from completions, in sampling and in log-probs alike: they stand for pixels that are not there.

References: GRPO: arXiv 2402.03300, eq. 3 (objective), eq. 4 (KL). SEED-Bench-R1: arXiv 2503.24376. DAPO (token mean, clip
higher): arXiv 2503.14476. Dr. GRPO (constant denominator, no std): arXiv 2503.20783. k3: Schulman, "Approximating KL".
"""
import math
import random
import re
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import DynamicCache

from data import Example, Frames, VideoDataset, load_samples, make_loader, parse_answer, step_batch
from model import (Prompts, append_jsonl, arg, blank_example, check_ranges, collate_prompts, completion_mask_from, copy_weights,
                   embed_prompts, end_token_ids, export, load_checkpoint, load_policy, load_tokenizer, make_actor, open_run,
                   parse_args, resolve_toy, save_checkpoint, setup, sum_over_ranks, vision_token_ids)


@dataclass
class Args:
    """The defaults are the published run: Qwen2-VL-7B, 6k questions, 8 prompts x 8 completions a step, 750 steps."""
    model: str = arg("toy", "local folder or hub id of a Qwen2-VL; 'toy' is the tiny one in this repository")
    data_root: str = arg("toy", "folder with annotations/, videos/ and images/; 'toy' builds the toy world on first use")
    train_file: str = arg("annotations/training_6k.jsonl", "under data_root: JSONL or a JSON list")
    output_dir: str = arg("out/grpo", "metrics.jsonl, samples.txt, checkpoints/ and final/ go here")
    max_samples: int = arg(0, "use the first so many samples of the file; 0: all")
    seed: int = arg(0, "of data order, distractors, option order and sampling")
    # pixels
    num_frames: int = arg(16, "most frames of a clip, even, >= 2")
    min_frames: int = arg(4, "fewest frames of a clip, even, >= 2")
    fps: float = arg(2.0, "frames a second to sample between those two bounds")
    image_size: int = arg(252, "frames and images are resized to this square; a multiple of 28")
    # group sampling
    group_size: int = arg(8, "G: completions per prompt, >= 2")
    temperature: float = arg(1.0, "of sampling, and so of every log-prob, > 0")
    max_completion_length: int = arg(256, "most tokens of a completion, end token included")
    rollout_prompts: int = arg(8, "prompts decoded together on one rank: memory against speed; results change by rounding only")
    # objective
    format_weight: float = arg(0.0, "weight of the format reward beside accuracy's 1, >= 0")
    advantage_std: bool = arg(True, "divide by the group's std (False: Dr. GRPO)")
    kl_coef: float = arg(0.1, "beta, >= 0; 0 loads no reference model")
    clip_low: float = arg(0.2, "eps below: ratios under 1 - clip_low get no gradient, 0 to 1")
    clip_high: float = arg(0.2, "eps above, >= 0 (DAPO: 0.28)")
    loss_agg: str = arg("sequence_mean", "sequence_mean (published), token_mean (DAPO) or constant (Dr. GRPO)")
    # optimisation; all quantities are global, whatever the number of ranks
    prompts_per_step: int = arg(8, "prompts per step over all ranks, a multiple of their number")
    num_updates: int = arg(1, "optimizer updates on each rollout")
    num_epochs: int = arg(1, "passes over the data when max_steps is 0")
    max_steps: int = arg(0, "steps (rollouts) to run; 0: num_epochs")
    learning_rate: float = arg(1e-6, "peak; decays linearly to 0 over the run, without warm-up")
    weight_decay: float = arg(0.0, "AdamW's")
    max_grad_norm: float = arg(1.0, "global gradient norm is clipped to this")
    micro_batch_size: int = arg(8, "completions per forward and backward on one rank: memory against speed; results change by rounding only")
    gradient_checkpointing: bool = arg(True, "recompute activations in the backward pass")
    dtype: str = arg("auto", "compute dtype: auto (bfloat16 on GPU, float32 on CPU), float32, bfloat16, float64")
    # logging
    num_workers: int = arg(2, "processes per rank that decode video ahead of training")
    sample_every: int = arg(10, "print one prompt and completion with its reward every so many steps")
    save_every: int = arg(100, "checkpoint every so many steps; 0: never")
    resume: bool = arg(False, "continue from the newest checkpoint in output_dir")

    def __post_init__(self):
        check_ranges(self, group_size=(2, None), max_completion_length=(1, None), rollout_prompts=(1, None),
                     format_weight=(0, None), kl_coef=(0, None), clip_low=(0, 1), clip_high=(0, None),
                     prompts_per_step=(1, None), num_updates=(1, None), num_epochs=(1, None), max_steps=(0, None),
                     learning_rate=(0, None), weight_decay=(0, None), micro_batch_size=(1, None), num_workers=(0, None),
                     sample_every=(1, None), save_every=(0, None), max_samples=(0, None), max_grad_norm=(0, None))
        if not self.temperature > 0:  # NaN is not, either
            raise ValueError(f"--temperature {self.temperature}: must be > 0; greedy groups are identical and teach nothing")
        if self.loss_agg not in ("sequence_mean", "token_mean", "constant"):
            raise ValueError(f"--loss_agg {self.loss_agg!r}: must be sequence_mean, token_mean or constant")


# What differs for the toy world (used when --data_root is not given; flags that are given win).
TOY = dict(image_size=56, num_frames=8, max_completion_length=64, prompts_per_step=8, micro_batch_size=32, max_steps=180,
           learning_rate=2e-4, kl_coef=0.0, gradient_checkpointing=False, output_dir="out/toy_grpo")


# ----------------------------------------------------------------------------------------------------------------------
# The maths of GRPO. Pure functions of tensors; each has a test against an explicit Python loop.

def group_advantages(rewards: Tensor, use_std: bool = True) -> Tensor:
    """How much better each completion is than its group: (B, G) float rewards -> (B, G) advantages.

    Source: arXiv 2402.03300, section 4.1.2. A group of equal rewards gets 0, up to rounding.
    """
    # A_i = (r_i - mean(r)) / (std(r) + 1e-4), std with G - 1 as in the release.
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    # ABLATE: advantage without std (Dr. GRPO): dividing gives easy and hard questions (small std) more weight.
    return centred / (rewards.std(dim=1, keepdim=True) + 1e-4) if use_std else centred


def grpo_token_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, advantages: Tensor,
                    clip_low: float, clip_high: float, kl_coef: float) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped objective with its KL penalty, one value per completion token, not yet averaged.

    Args: logps, old_logps, ref_logps (N, C), of the current, the sampling and the reference policy (None: no KL);
        advantages (N,), the same for every token of a completion. Only `logps` carries gradient.
    Returns: loss (N, C); kl (N, C), detached; clipped (N, C) bool, True where the clip has cut the gradient.
    Source: arXiv 2402.03300, eq. 3 and 4.
    """
    advantages = advantages[:, None]  # (N, 1)
    # rho = pi_theta / pi_old. Its value is 1 at the first update of a rollout, but its gradient is that of log pi_theta:
    # there the loss is worth -A and its gradient is REINFORCE's.
    ratio = (logps - old_logps).exp()
    # -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)
    # ABLATE: clip-higher (DAPO: clip_high 0.28) leaves room for unlikely tokens to grow.
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    clipped = torch.where(advantages > 0, ratio > 1 + clip_high, ratio < 1 - clip_low) & (advantages != 0)
    if ref_logps is None:
        return loss, torch.zeros_like(loss), clipped
    # k3 = pi_ref / pi_theta - log(pi_ref / pi_theta) - 1: never negative, and its mean over samples is KL(theta || ref).
    # ABLATE: KL estimator: k1 = logps - ref_logps is unbiased but noisy, k2 = k1^2 / 2 is biased with low variance.
    log_ratio_ref = ref_logps - logps
    kl = log_ratio_ref.exp() - log_ratio_ref - 1
    return loss + kl_coef * kl, kl.detach(), clipped


def token_weights(mask: Tensor, loss_agg: str, num_rows: float, num_tokens: float, max_completion_length: int) -> Tensor:
    """The weight of every token in the step's mean: (N, C) bool mask -> (N, C) float32, 0 outside the mask.

    `num_rows` and `num_tokens` count the completions and their tokens of the whole step, over all ranks and micro-batches.
    The loss is then one plain sum of weight * token loss: however it is split, the gradient is the same.
    """
    mask = mask.float()
    # ABLATE: loss aggregation.
    if loss_agg == "sequence_mean":  # 1 / (num_rows |o_i|): each completion counts the same, so tokens of long ones count less
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / num_rows
    if loss_agg == "token_mean":  # 1 / sum_i |o_i|: each token counts the same (DAPO)
        return mask / num_tokens
    return mask / (num_rows * max_completion_length)  # constant: no dependence on length at all (Dr. GRPO)


# ----------------------------------------------------------------------------------------------------------------------
# Group sampling: prompt and vision are encoded once per group, then G rows are decoded together.

@torch.no_grad()
def generate(actor, prompts: Prompts, group_size: int, max_new_tokens: int, temperature: float,
             generators: list[torch.Generator] | None, end_ids: list[int], banned_ids: Tensor
             ) -> tuple[Tensor, Tensor, Tensor]:
    """Samples G completions for each of B prompts.

    Args: actor, an unsharded Qwen2-VL; temperature, 0 takes the likeliest token; generators, one per prompt, so that what
        a prompt's group draws depends neither on its neighbours in the batch nor on the rank (None when greedy); end_ids,
        tokens that end a completion and are part of it; banned_ids, tokens that are never drawn.
    Returns: completion_ids (N, C) int64, row b * G + g is completion g of prompt b, the first end token repeated to the end
        of the row; lengths (N,) int64, the first end token included; logps (N, C) at least float32, of the drawn tokens under
        the temperature and the ban (temperature 0: under temperature 1), meaningless past a row's length.
    """
    text_model, device = actor.model.language_model, prompts.ids.device
    G, N = group_size, len(prompts.ids) * group_size
    ends = torch.tensor(end_ids, device=device)

    # Prefill B rows, not N: vision tower and prompt are the bulk of the work (729 of 900 tokens are vision).
    cache = DynamicCache(config=actor.config)
    hidden = text_model(inputs_embeds=embed_prompts(actor, prompts), attention_mask=prompts.mask,
                        position_ids=prompts.position_ids, past_key_values=cache, use_cache=True).last_hidden_state
    cache.batch_repeat_interleave(G)
    hidden = hidden[:, -1].repeat_interleave(G, dim=0)  # (N, D): prompts are padded on the left, so the last column is real
    attention_mask = torch.cat([prompts.mask.repeat_interleave(G, dim=0),
                                torch.ones(N, max_new_tokens, dtype=torch.bool, device=device)], dim=1)  # (N, P + C)
    next_position = prompts.next_position.repeat_interleave(G)  # (N,)

    tokens, logps = [], []
    done = torch.zeros(N, dtype=torch.bool, device=device)
    for k in range(max_new_tokens):
        logits = actor.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).index_fill(1, banned_ids, -torch.inf)  # (N, V)
        # ABLATE: top-k or top-p would sample from another policy than the one whose log-probs are trained.
        log_probs = (logits / (temperature or 1.0)).log_softmax(-1)
        scores = log_probs
        if temperature > 0:
            # argmax(p / e), e ~ Exp(1), is a draw from p, without torch.multinomial's CPU-GPU sync.
            noise = [torch.empty(G, logits.shape[1], device=device).exponential_(generator=g) for g in generators]
            scores = log_probs.exp() / torch.cat(noise)
        token = scores.argmax(-1)
        # A finished row stays in the batch and repeats its end token; its length leaves that out of everything.
        token = torch.where(done, tokens[-1] if tokens else token, token)
        tokens.append(token)
        logps.append(log_probs.gather(1, token[:, None])[:, 0])
        done = done | torch.isin(token, ends)
        # Asking whether all rows are done is a CPU-GPU sync: on a GPU, ask every 16 tokens.
        if k + 1 == max_new_tokens or ((device.type == "cpu" or k % 16 == 15) and done.all()):
            break
        hidden = text_model(inputs_embeds=actor.get_input_embeddings()(token[:, None]),
                            attention_mask=attention_mask[:, :prompts.ids.shape[1] + k + 1],
                            position_ids=(next_position + k)[None, :, None].expand(3, -1, -1),  # (3, N, 1)
                            past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
    completion_ids, logps = torch.stack(tokens, dim=1), torch.stack(logps, dim=1)  # (N, C)
    is_end = torch.isin(completion_ids, ends)
    first_end = is_end.int().argmax(dim=1)
    lengths = torch.where(is_end.any(dim=1), first_end + 1, completion_ids.shape[1])
    return completion_ids, lengths, logps


def completion_text(tokenizer, completion_ids: Tensor, length: int, end_ids: list[int]) -> str:
    """The text of one completion (C,) without its end token. Other special tokens stay visible: they are mistakes."""
    ids = completion_ids[:length].tolist()
    return tokenizer.decode(ids[:-1] if ids[-1] in end_ids else ids, skip_special_tokens=False)


@dataclass
class Rollout:
    """What one rank has sampled for one step: B groups of G rows; row n continues prompt n // G."""
    examples: list[Example]
    completion_ids: Tensor  # (N, C) int64
    lengths: Tensor  # (N,) int64, end token included
    completion_mask: Tensor  # (N, C) bool, True up to and including the end token
    logps: Tensor  # (N, C) float32, as the actor saw them


def sample_groups(actor, examples: list[Example], step: int, args: Args, pad_id: int, end_ids: list[int],
                  banned_ids: Tensor) -> Rollout:
    """Samples G completions for each example, `rollout_prompts` prompts at a time."""
    device = actor.device
    parts = []
    for chunk in (examples[i:i + args.rollout_prompts] for i in range(0, len(examples), args.rollout_prompts)):
        # Seeded by the sample, not by its place: the same completions on any rank and in any batch.
        seeds = [random.Random(f"{args.seed}/{step}/{example.sample.sample_id}").getrandbits(63) for example in chunk]
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        parts.append(generate(actor, collate_prompts(chunk, pad_id, device), args.group_size, args.max_completion_length,
                              args.temperature, generators, end_ids, banned_ids))
    C = max(ids.shape[1] for ids, _, _ in parts)
    completion_ids = torch.cat([F.pad(ids, (0, C - ids.shape[1]), value=pad_id) for ids, _, _ in parts])
    logps = torch.cat([F.pad(logps, (0, C - logps.shape[1])) for _, _, logps in parts])
    lengths = torch.cat([lengths for _, lengths, _ in parts])
    return Rollout(examples, completion_ids, lengths, completion_mask_from(lengths, C), logps)


# ----------------------------------------------------------------------------------------------------------------------
# Rewards: what counts as a good answer.

# ABLATE: rewards. A process or consistency reward goes here, as a function of the text and the example.
def accuracy_reward(completion: str, example: Example) -> float:
    """1 if the strict parser finds the right option, else 0; evaluate.py grades with the same parser."""
    return float(parse_answer(completion, example.options) == example.gold)


def format_reward(completion: str) -> float:
    """1 if the completion is one <think> block, then one <answer> block, and nothing else."""
    one_of_each = all(completion.count(tag) == 1 for tag in ("<think>", "</think>", "<answer>", "</answer>"))
    return float(one_of_each and bool(re.fullmatch(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", completion, re.DOTALL)))


# ----------------------------------------------------------------------------------------------------------------------
# Learning: log-probs of a rollout's rows, a micro-batch at a time.

def rows_logps(model, rollout: Rollout, rows: range, args: Args, pad_id: int, banned_ids: Tensor) -> tuple[Tensor, Tensor]:
    """log pi(o_t | q, o_<t) and entropy, both (len(rows), C), of consecutive rows of a rollout. Collective."""
    G, device = args.group_size, rollout.lengths.device
    first, last = rows.start // G, (rows.stop - 1) // G  # the prompts these rows continue: each is encoded once
    prompts = collate_prompts(rollout.examples[first:last + 1], pad_id, device)
    row_prompt = torch.arange(rows.start, rows.stop, device=device) // G - first
    part = slice(rows.start, rows.stop)
    return model(prompts, row_prompt, rollout.completion_ids[part], rollout.completion_mask[part], args.temperature, banned_ids)


@torch.no_grad()
def score(model, rollout: Rollout, batches: list[range], args: Args, pad_id: int, banned_ids: Tensor) -> Tensor:
    """Log-probs (N, C) of a whole rollout, without gradient: for pi_old and pi_ref. Collective."""
    return torch.cat([rows_logps(model, rollout, rows, args, pad_id, banned_ids)[0] for rows in batches])


# ----------------------------------------------------------------------------------------------------------------------
# The run.

def health(m: dict) -> str:
    """One phrase on whether training is healthy, for the progress line: the first thing that looks wrong, or "ok"."""
    # Thresholds are rules of thumb from GRPO runs, not from the paper.
    if m["parse_rate"] < 0.5:
        return "most answers do not parse"
    if m["truncated_frac"] > 0.2:
        return "completions do not end"
    if m["flat_group_frac"] > 0.8:
        return "little signal: groups all right or all wrong"
    if m["entropy"] < 0.01:
        return "entropy collapsed"
    if m["actor_gap"] > 0.1:
        return "sampler and learner disagree"
    return "ok"


def main(args: Args) -> Path:
    """Trains and returns the folder of the exported model."""
    # 1 setup
    rank, world_size, device = setup()
    args = resolve_toy(args)
    if args.prompts_per_step % world_size:
        raise ValueError(f"--prompts_per_step {args.prompts_per_step} must be a multiple of the {world_size} ranks")

    # 2 data
    samples = load_samples(args.train_file, args.data_root)[:args.max_samples or None]
    if any(sample.response for sample in samples):
        raise ValueError(f"{args.train_file}: these records are for SFT (they have a 'response' and no gold answer); "
                         "GRPO needs the training shape, such as training_6k.jsonl")
    num_steps = args.max_steps or max(1, args.num_epochs * len(samples) // args.prompts_per_step)
    tokenizer = load_tokenizer(args.model)
    dataset = VideoDataset(samples, tokenizer, Frames(args.fps, args.min_frames, args.num_frames, args.image_size), args.seed)

    # 3 model
    policy = load_policy(args, device)
    reference = load_policy(args, device, frozen=True) if args.kl_coef > 0 else None
    actor = make_actor(policy, device)
    pad_id, end_ids, banned_ids = tokenizer.pad_token_id, end_token_ids(actor, tokenizer), vision_token_ids(actor, device)

    # 4 optimizer
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, betas=(0.9, 0.999),
                                  weight_decay=args.weight_decay)

    # 5 output folder, resume
    output_dir = open_run(args, args.resume)
    first_step = 0
    if args.resume:
        first_step = load_checkpoint(output_dir, policy, optimizer)
        copy_weights(policy, actor)
    loader = make_loader(dataset, [step_batch(step, args.prompts_per_step, len(samples), args.seed, rank, world_size)
                                   for step in range(first_step, num_steps)], args.num_workers)

    # 6 loop
    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()  # or the time of a phase would be booked on the next one
        return time.perf_counter()

    progress = tqdm(total=num_steps, initial=first_step, desc="grpo", disable=rank != 0, dynamic_ncols=True)
    start = clock()
    for step, examples in enumerate(loader, first_step):
        seconds = {"data_s": clock() - start}

        # 6a completions: sampled by the policy, G per prompt
        usable = torch.tensor([not e.error for e in examples], device=device)  # (B,) bool
        for example in examples:
            if example.error:
                tqdm.write(f"step {step}: sample {example.sample.sample_id} left out: {example.error}")
        examples = [blank_example(e, tokenizer, policy.qwen.config) if e.error else e for e in examples]
        rollout = sample_groups(actor, examples, step, args, pad_id, end_ids, banned_ids)
        seconds["rollout_s"] = clock() - start - sum(seconds.values())

        # 6b rewards and advantages
        texts = [completion_text(tokenizer, ids, length, end_ids)
                 for ids, length in zip(rollout.completion_ids, rollout.lengths.tolist())]
        answers = [(text, examples[n // args.group_size]) for n, text in enumerate(texts)]  # N pairs
        accuracy = torch.tensor([accuracy_reward(text, e) for text, e in answers], device=device)  # (N,)
        formatted = torch.tensor([format_reward(text) for text, _ in answers], device=device)  # (N,)
        parsed = torch.tensor([parse_answer(text, e.options) is not None for text, e in answers], device=device)  # (N,) bool
        rewards = (accuracy + args.format_weight * formatted).view(-1, args.group_size)  # (B, G)
        advantages = group_advantages(rewards, args.advantage_std).flatten()  # (N,)
        if rank == 0 and step % args.sample_every == 0:  # reading completions is the first debugging tool
            n = step // args.sample_every % len(answers)  # another row each time
            text, example = answers[n]
            report = (f"\n--- step {step}, sample {example.sample.sample_id}, gold {example.gold}{', UNREADABLE' * bool(example.error)}\n"
                      f"{example.prompt_text}\n>>> {text}\n"
                      f"=== reward {rewards.flatten()[n].item():.2f}, advantage {advantages[n].item():+.2f}")
            tqdm.write(report)
            with open(output_dir / "samples.txt", "a") as file:
                file.write(report + "\n")

        # 6c counts of the whole step: the denominators, fixed before the first backward
        row_usable = usable.repeat_interleave(args.group_size)  # (N,)
        loss_mask = rollout.completion_mask & row_usable[:, None]  # (N, C) bool
        ended = torch.isin(rollout.completion_ids, torch.tensor(end_ids, device=device)) & rollout.completion_mask
        flat = (rewards == rewards[:, :1]).all(dim=1)  # (B,) bool
        counts = sum_over_ranks({
            "rows": row_usable.sum(), "groups": usable.sum(), "tokens": loss_mask.sum(), "bad_videos": (~usable).sum(),
            "reward": (rewards.flatten() * row_usable).sum(), "accuracy": (accuracy * row_usable).sum(),
            "format": (formatted * row_usable).sum(), "parsed": (parsed & row_usable).sum(),
            "truncated": (~ended.any(dim=1) & row_usable).sum(), "group_std": (rewards.std(dim=1) * usable).sum(),
            "flat_groups": (flat & usable).sum()}, device)
        if counts["rows"] == 0:
            raise ValueError(f"step {step}: no sample could be read, check --data_root {args.data_root}; {examples[0].error}")
        weights = token_weights(loss_mask, args.loss_agg, counts["rows"], counts["tokens"], args.max_completion_length)

        # 6d log-probs under the reference, and under the sampling policy if it will move before their last use
        N = len(answers)
        batches = [range(i, min(i + args.micro_batch_size, N)) for i in range(0, N, args.micro_batch_size)]
        ref_logps = score(reference, rollout, batches, args, pad_id, banned_ids) if reference is not None else None
        old_logps = score(policy, rollout, batches, args, pad_id, banned_ids) if args.num_updates > 1 else None
        seconds["score_s"] = clock() - start - sum(seconds.values())

        # 6e update
        sums = dict.fromkeys(("loss", "kl", "entropy", "clipped", "actor_gap"), 0.0)
        for update in range(args.num_updates):
            # ABLATE: schedule. Linear to 0 over all updates of the run, as published.
            lr = args.learning_rate * (1 - (step * args.num_updates + update) / (num_steps * args.num_updates))
            for group in optimizer.param_groups:
                group["lr"] = lr
            for batch in batches:
                part = slice(batch.start, batch.stop)
                logps, entropy = rows_logps(policy, rollout, batch, args, pad_id, banned_ids)
                # With one update the policy still is the one that sampled: its own value is pi_old.
                old = logps.detach() if old_logps is None else old_logps[part]
                token_loss, kl, clipped = grpo_token_loss(logps, old, None if ref_logps is None else ref_logps[part],
                                                          advantages[part], args.clip_low, args.clip_high, args.kl_coef)
                loss = (token_loss * weights[part]).sum()
                # FSDP averages gradients over ranks; the weights already hold the global denominator, so undo that.
                (loss * world_size).backward()
                sums["loss"] += loss.detach()
                for name, value in (("kl", kl), ("entropy", entropy), ("clipped", clipped)):
                    sums[name] += value[loss_mask[part]].sum()
                if update == 0:  # later the two differ because the policy has moved
                    sums["actor_gap"] += (logps.detach() - rollout.logps[part])[loss_mask[part]].abs().sum()
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).full_tensor().item()
            if not math.isfinite(grad_norm):
                raise FloatingPointError(f"step {step}: the gradient norm is {grad_norm}; look at the last completions in "
                                         f"{output_dir / 'samples.txt'}, and start again with a lower --learning_rate")
            optimizer.step()
            optimizer.zero_grad()
        copy_weights(policy, actor)
        seconds["update_s"] = clock() - start - sum(seconds.values())

        # 6f log
        sums = sum_over_ranks(sums, device)
        step_s = sum(seconds.values())
        token_updates = counts["tokens"] * args.num_updates
        metrics = {
            "step": step, "reward": counts["reward"] / counts["rows"], "group_std": counts["group_std"] / counts["groups"],
            "accuracy": counts["accuracy"] / counts["rows"], "parse_rate": counts["parsed"] / counts["rows"],
            "format_rate": counts["format"] / counts["rows"], "flat_group_frac": counts["flat_groups"] / counts["groups"],
            "completion_length": counts["tokens"] / counts["rows"], "truncated_frac": counts["truncated"] / counts["rows"],
            "loss": sums["loss"] / args.num_updates, "entropy": sums["entropy"] / token_updates,
            "clip_frac": sums["clipped"] / token_updates, "actor_gap": sums["actor_gap"] / counts["tokens"],
            "grad_norm": grad_norm, "lr": lr, "bad_videos": int(counts["bad_videos"]),
            "tokens_per_s": counts["tokens"] / step_s, "step_s": step_s, **seconds}
        if reference is not None:
            metrics["kl"] = sums["kl"] / token_updates
        if rank == 0:
            append_jsonl(output_dir / "metrics.jsonl", metrics)
            progress.set_postfix_str(f"reward {metrics['reward']:.2f}+-{metrics['group_std']:.2f} acc {metrics['accuracy']:.2f} "
                                     f"parse {metrics['parse_rate']:.2f} len {metrics['completion_length']:.0f} "
                                     f"| {health(metrics)}")
            progress.update()
        if args.save_every and (step + 1) % args.save_every == 0:
            save_checkpoint(output_dir, step + 1, policy, optimizer)
        start = clock()

    # 7 finish
    progress.close()
    export(policy, tokenizer, args.model, output_dir / "final")
    return output_dir / "final"


if __name__ == "__main__":
    main(parse_args(Args, TOY))
    torch.distributed.destroy_process_group()
