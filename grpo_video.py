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
    6. An unreadable video is left out and counted. The release trains its question on another video.
    7. KL is not computed, and no reference is loaded, when --kl_coef is 0.
    8. Vision tokens are banned from completions, in sampling and in log-probs alike: they stand for pixels that are not there.
    9. Groups of equal rewards are not learned: they have no advantage. With KL on, their pull towards the reference is lost;
       --learn_flat_groups keeps it, as published.

What makes a step cheap, in counts for one group: P = 900 tokens of which 729 are vision, G = 8, C = 256, shapes of 7B:
    a. Prefill once per group and not once per row: 900 tokens through the text model, not 7,200 (`Decoder.start`).
    b. The prompt's keys and values once per group: 52 MB to keep and to read for each token, not 413 MB (`Decoder.attend`).
    c. The groups of a rank decoded together: if there are 8, the 14 GB of weights are read once for 64 tokens, not for 8.
    d. Caches of full size from the start, random numbers drawn before the first token, no CPU-GPU sync inside a token: its
       kernels can be queued ahead, or replayed as one CUDA graph; without graphs, finished rows leave (`drop_finished_rows`).
    e. Learning on one sequence per group, prompt once and no padding: 2,948 tokens, not 9,248 (`SharedPrompts` in model.py).
    f. Logits for completion tokens only and 512 at a time: 0.3 GB, not 5.6 GB for every token of every row (`token_logps`).
    g. No old log-probs with one update, no reference at beta 0, no learning of groups of equal rewards (`main` 6b, 6d).
    h. Clips decoded and cut into patches ahead, by worker processes; with --frame_cache, decoded once and kept as uint8 (data.py).
tests/bench.py measures a to f against the usual way; the README has its table.

References: GRPO: arXiv 2402.03300, eq. 3 (objective), eq. 4 (KL). SEED-Bench-R1: arXiv 2503.24376. DAPO (token mean, clip
higher): arXiv 2503.14476. Dr. GRPO (constant denominator, no std): arXiv 2503.20783. k3: Schulman, "Approximating KL".
"""
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import VIDEO, Example, Frames, VideoDataset, leave_out, load_samples, make_loader, parse_answer, step_batch
from model import (COUNTS, Prompts, Ragged, append_jsonl, arg, attend_causally, blank_batch, check_ranges, clock,
                   collate_prompts, copy_weights, embed_prompts, end_token_ids, export, load_checkpoint, load_policy,
                   load_tokenizer, make_actor, mask_from_lengths, max_over_ranks, open_run, parse_args, report, resolve_toy,
                   save_checkpoint, setup, sum_over_ranks, text_states, vision_token_ids)


@dataclass
class Args:
    """The defaults are the published run (departures above): Qwen2-VL-7B, 6k questions, 8 prompts x 8 completions a step."""
    model: str = arg("toy", "local folder or hub id of a Qwen2-VL; 'toy' is the tiny one in this repository")
    data_root: str = arg("toy", "folder with annotations/, videos/ and images/; 'toy' builds the toy world on first use")
    train_file: str = arg("annotations/training_6k.jsonl", "under data_root: JSONL or a JSON list")
    output_dir: str = arg("out/grpo", "metrics.jsonl, samples.txt, checkpoints/ and final/ go here")
    max_samples: int = arg(0, "use the first so many samples of the file; 0: all")
    leave_out: list[str] = arg([], "samples.jsonl of evaluations of train_file: what all of them answered right is left out")
    seed: int = arg(0, "of data order, distractors, option order and sampling")
    # pixels
    num_frames: int = arg(16, "most frames of a clip, even, >= 2")
    min_frames: int = arg(4, "fewest frames of a clip, even, >= 2")
    fps: float = arg(2.0, "frames a second to sample between those two bounds")
    image_size: int = arg(252, "frames and images are resized to this square; a multiple of 28")
    frame_cache: str = arg("", "folder to keep decoded frames in, for later epochs and runs; empty: none")
    video: str = arg("full", "what the policy gets to see: full, or a control: " + ", ".join(list(VIDEO)[1:]))
    # group sampling
    group_size: int = arg(8, "G: completions per prompt, >= 2")
    temperature: float = arg(1.0, "of sampling, and so of every log-prob, > 0")
    max_completion_length: int = arg(256, "most tokens of a completion, end token included")
    rollout_prompts: int = arg(8, "prompts decoded together on one rank: memory against speed, results differ by rounding")
    cuda_graph: bool = arg(False, "replay each token's kernels as one CUDA graph: meant for GPUs, never run so far")
    # objective
    format_weight: float = arg(0.0, "weight of the format reward beside accuracy's 1, >= 0")
    advantage_std: bool = arg(True, "divide by the group's std (False: Dr. GRPO)")
    kl_coef: float = arg(0.1, "beta, >= 0; 0 loads no reference model")
    clip_low: float = arg(0.2, "eps_low, 0 to 1: where A < 0, a ratio below 1 - clip_low gets no gradient")
    clip_high: float = arg(0.2, "eps_high, >= 0: where A > 0, a ratio above 1 + clip_high gets no gradient (DAPO: 0.28)")
    loss_agg: str = arg("sequence_mean", "sequence_mean (published), token_mean (DAPO) or constant (Dr. GRPO)")
    learn_flat_groups: bool = arg(False, "also learn groups of equal rewards, for their KL term; with kl_coef 0 it is no use")
    # optimisation; all quantities are global, whatever the number of ranks
    prompts_per_step: int = arg(8, "prompts per step over all ranks, a multiple of their number")
    num_updates: int = arg(1, "optimizer updates on each rollout")
    num_epochs: int = arg(1, "passes over the data when max_steps is 0")
    max_steps: int = arg(0, "steps (rollouts) to run; 0: num_epochs")
    learning_rate: float = arg(1e-6, "peak; decays linearly to 0 over the run, without warm-up")
    weight_decay: float = arg(0.0, "AdamW's")
    max_grad_norm: float = arg(1.0, "global gradient norm is clipped to this")
    micro_batch_size: int = arg(8, "completions per forward and backward on one rank, best whole groups: memory against speed, "
                                   "results differ by rounding")
    gradient_checkpointing: bool = arg(True, "recompute activations in the backward pass")
    naive: bool = arg(False, "learn padded rows of prompt and completion, the prompt once per row: slower, same result")
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
TOY = dict(image_size=56, max_completion_length=64, prompts_per_step=8, micro_batch_size=32, max_steps=240,
           learning_rate=2e-4, kl_coef=0.0, gradient_checkpointing=False, frame_cache="out/toy_frames", output_dir="out/toy_grpo")


# ----------------------------------------------------------------------------------------------------------------------
# The maths of GRPO. Pure functions of tensors; each has a test against an explicit Python loop.

def group_advantages(rewards: Tensor, use_std: bool = True) -> Tensor:
    """How much better each completion is than its group: (B, G) float rewards -> (B, G) advantages.

    Source: arXiv 2402.03300, section 4.1.2. A group of equal rewards gets 0, up to rounding.
    """
    # A_i = (r_i - mean(r)) / (std(r) + 1e-4), std with G - 1 as in the release.
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    # ABLATE: advantage without std (Dr. GRPO): dividing gives easy and hard questions (small std) more weight.
    return centred / (group_std(rewards)[:, None] + 1e-4) if use_std else centred


def group_std(rewards: Tensor) -> Tensor:
    """The standard deviation in each group, with G - 1: (B, G) -> (B,). By hand, because std warns when B is 0."""
    return ((rewards - rewards.mean(dim=1, keepdim=True)).square().sum(dim=1) / (rewards.shape[1] - 1)).sqrt()


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
# Group sampling: prompt and vision are encoded once per group, then the rows of several groups are decoded together.

@torch.no_grad()
def generate(actor, prompts: Prompts, group_size: int, max_completion_length: int, temperature: float, seeds: list[int] | None,
             end_ids: Tensor, banned_ids: Tensor, graphs: dict | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Samples G completions for each of B prompts. No collective: ranks may decode different lengths.

    Args: actor, an unsharded Qwen2-VL; temperature, 0 takes the likeliest token; seeds, one per prompt, so that what a
        prompt's group draws depends neither on its neighbours in the batch nor on the rank (None when greedy); end_ids,
        tokens that end a completion and are part of it; banned_ids, tokens that are never drawn; graphs, a dict in which
        CUDA graphs are kept from call to call, empty at first (None: no graphs); they hold this actor and temperature.
    Returns: completion_ids (N, C) int64, row b * G + g is completion g of prompt b, 0 behind its end; lengths (N,) int64, the
        first end token included; logps (N, C) at least float32, of the drawn tokens under the temperature and the ban
        (temperature 0: under temperature 1), meaningless behind the end.
    """
    B, P, device = len(prompts.lengths), int(prompts.lengths.max()), prompts.ids.device
    settings = dict(G=group_size, C=max_completion_length, temperature=temperature, end_ids=end_ids, banned_ids=banned_ids)
    if graphs is None:
        decoder = Decoder(actor, B, P, **settings)
    else:
        P = math.ceil(P / 64) * 64  # a graph has one shape: a few of them serve all prompts, each with caches of its own
        shape = (B, P, group_size, max_completion_length)
        if shape not in graphs:
            graphs[shape] = Decoder(actor, B, P, **settings).capture()
        decoder = graphs[shape]
    if temperature > 0:
        # All randomness of the rollout, drawn at once and on the CPU: the same numbers on every device.
        uniforms = [torch.rand(group_size, max_completion_length, dtype=torch.float64,
                               generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        decoder.uniforms.copy_(torch.cat(uniforms))  # (N, C)
    decoder.start(prompts)
    for k in range(1, max_completion_length):
        # Looking at `done` is a CPU-GPU sync: on a GPU, look every 16 tokens.
        if device.type == "cpu" or k % 16 == 0:
            finished_frac = int(decoder.done.sum()) / len(decoder.rows)
            if finished_frac == 1:
                break
            # Fewer are not worth the copying; and a graph replays what it has recorded, all rows at their old addresses.
            if finished_frac >= 0.25 and graphs is None:
                decoder.drop_finished_rows()
        decoder.step()
        COUNTS["decoded_tokens"] += len(decoder.rows)
    C = int(decoder.k) + 1
    completion_ids, logps = decoder.ids[:, :C], decoder.logps[:, :C].clone()  # a kept decoder writes over them
    is_end = torch.isin(completion_ids, end_ids)
    lengths = torch.where(is_end.any(dim=1), is_end.int().argmax(dim=1) + 1, C)
    return completion_ids.masked_fill(~mask_from_lengths(lengths, C), 0), lengths, logps


class Decoder:
    """Decodes N = B * G rows together, one token a `step`.

    A prompt's keys and values are kept once and read once for its G rows; those of completions are kept row by row, in
    tensors of full size from the start (a cache that grows is copied at each token). `step` changes tensors in place and
    waits for no value: on a GPU, one captured graph of it serves all tokens, rollouts and updates.
    """

    def __init__(self, actor, B: int, P: int, G: int, C: int, temperature: float, end_ids: Tensor, banned_ids: Tensor):
        self.actor, self.temperature, self.end_ids, self.banned_ids = actor, temperature, end_ids, banned_ids
        config, device, N = actor.config.text_config, end_ids.device, B * G
        layers, heads, d = config.num_hidden_layers, config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        zeros = partial(torch.zeros, device=device)
        # Of all N rows, to the end:
        self.k = zeros(1, dtype=torch.int64)  # the newest token's column
        self.columns = torch.arange(C, device=device)
        self.ids = zeros(N, C, dtype=torch.int64)
        self.logps = zeros(N, C, dtype=torch.promote_types(actor.dtype, torch.float32))
        self.uniforms = zeros(N, C, dtype=torch.float64)
        # Of the R rows that are still decoded, at first all, G for each of B prompts (R, G and B shrink together):
        self.B, self.G = B, G
        self.rows = torch.arange(N, device=device)  # (R,): which of the N they are
        self.token = zeros(N, dtype=torch.int64)  # (R,): the newest
        self.done = zeros(N, dtype=torch.bool)
        self.first_position = zeros(N, dtype=torch.int64)
        # Zeros, not empty: a column that nobody has written has weight 0, and 0 * NaN is NaN.
        self.own_keys, self.own_values = ([zeros(N, heads, C, d, dtype=actor.dtype) for _ in range(layers)] for _ in range(2))
        # Of their B prompts:
        self.prompt_mask = zeros(B, P, dtype=torch.bool)
        self.prompt_keys, self.prompt_values = (
            [zeros(B, heads, P, d, dtype=actor.dtype) for _ in range(layers)] for _ in range(2))

    def start(self, prompts: Prompts) -> None:
        """Encodes the prompts, B rows and not N (729 of 900 tokens are vision), and draws each row's first token."""
        COUNTS["prefill_tokens"] += len(prompts.ids)
        self.prompt_mask.copy_(mask_from_lengths(prompts.lengths, self.prompt_mask.shape[1]))
        self.first_position.copy_(prompts.next_position.repeat_interleave(self.G))
        self.k.zero_()
        self.done.zero_()
        packing = Ragged(prompts.lengths)

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out, key, value = attend_causally(packing, query, key, value)
            self.prompt_keys[layer][:, :, :key.shape[2]] = key
            self.prompt_values[layer][:, :, :key.shape[2]] = value
            return out

        hidden = text_states(self.actor, embed_prompts(self.actor, prompts), prompts.position_ids, attend)
        self.draw(hidden[packing.last].repeat_interleave(self.G, dim=0))

    def step(self) -> None:
        """Feeds each row's newest token and draws the next one."""
        seen = torch.cat([self.prompt_mask, (self.columns <= self.k).expand(self.B, -1)], dim=1)  # (B, P + C) bool
        bias = torch.where(seen, 0.0, -torch.inf)[:, None, None]  # (B, 1, 1, P + C) float32
        hidden = text_states(self.actor, self.actor.get_input_embeddings()(self.token),
                             (self.first_position + self.k).expand(3, -1), partial(self.attend, bias=bias))
        self.k += 1
        self.draw(hidden)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """Each row's new token sees its prompt and its own completion: (H, R, d), (H_kv, R, d) twice -> (R, H, d)."""
        (heads, R, d), P = key.shape, self.prompt_mask.shape[1]
        self.own_keys[layer].index_copy_(2, self.k, key.transpose(0, 1)[:, :, None])  # (R, H_kv, C, d)
        self.own_values[layer].index_copy_(2, self.k, value.transpose(0, 1)[:, :, None])

        def by_prompt(x: Tensor) -> Tensor:  # (R, H_kv, H / H_kv, ...) -> (B, H_kv, G * H / H_kv, ...)
            return x.unflatten(0, (self.B, self.G)).transpose(1, 2).flatten(2, 3)

        def by_row(x: Tensor) -> Tensor:  # and back
            return x.unflatten(2, (self.G, -1)).transpose(1, 2).flatten(0, 1)

        query = query.view(heads, -1, R, d).permute(2, 0, 1, 3) / math.sqrt(d)  # (R, H_kv, H / H_kv, d)
        # To its prompt's keys the G rows of a group are so many queries of one matrix product: the keys are read once, not G
        # times. (In bf16 the scores are rounded, which fused kernels avoid; actor_gap shows what that comes to.)
        scores = torch.cat([by_prompt(query) @ self.prompt_keys[layer].mT, by_prompt(query @ self.own_keys[layer].mT)], dim=-1)
        weights = (scores + bias).softmax(-1).to(query.dtype)  # (B, H_kv, G * H / H_kv, P + C)
        out = by_row(weights[..., :P] @ self.prompt_values[layer]) + by_row(weights[..., P:]) @ self.own_values[layer]
        return out.flatten(1, 2)

    def draw(self, hidden: Tensor) -> None:
        """Draws token k of every row from its last state, (R, D)."""
        logits = self.actor.lm_head(hidden).to(self.logps.dtype).index_fill(1, self.banned_ids, -torch.inf)  # (R, V)
        # ABLATE: top-k or top-p would sample from another policy than the one whose log-probs are trained.
        log_probs = (logits / (self.temperature or 1.0)).log_softmax(-1)
        if self.temperature > 0:
            # The first token at which the cumulated probability reaches u, uniform in (0, 1]: never one of probability 0,
            # and without torch.multinomial's CPU-GPU sync. float64, or tokens below 1e-7 would be drawn too seldom.
            cdf = log_probs.exp().cumsum(-1, dtype=torch.float64)
            u = 1 - self.uniforms.index_select(1, self.k)[self.rows]  # (R, 1)
            token = torch.searchsorted(cdf, u * cdf[:, -1:])[:, 0]
        else:
            token = log_probs.argmax(-1)
        self.ids.index_put_((self.rows, self.k), token)
        self.logps.index_put_((self.rows, self.k), log_probs.gather(1, token[:, None])[:, 0])
        self.token.copy_(token)
        self.done |= torch.isin(token, self.end_ids)

    def drop_finished_rows(self) -> None:
        """Copies the state into smaller tensors, without finished groups and finished rows. CPU-GPU sync.

        All groups keep as many rows as the one with the most unfinished; the others are filled up with finished rows, whose
        further tokens nobody reads.
        """
        unfinished = ~self.done.view(self.B, self.G)
        live, G = unfinished.any(dim=1).nonzero()[:, 0], int(unfinished.sum(dim=1).max())  # live (B,): prompts that stay
        if len(live) * G == len(self.rows):
            return
        order = unfinished[live].int().argsort(dim=1, descending=True)[:, :G]  # (B, G)
        keep = (live[:, None] * self.G + order).flatten()  # (R,)
        self.rows, self.token, self.done, self.first_position = (
            x[keep] for x in (self.rows, self.token, self.done, self.first_position))
        for index, caches in ((keep, (self.own_keys, self.own_values)), (live, (self.prompt_keys, self.prompt_values))):
            for cache in caches:
                for layer, x in enumerate(cache):  # one at a time, so that old and new are never there together
                    cache[layer] = x[index]
        self.prompt_mask, self.B, self.G = self.prompt_mask[live], len(live), G

    def capture(self) -> "Decoder":
        """Replaces `step` by the replay of a CUDA graph of it: one launch a token, not hundreds. NEVER RUN: no GPU at hand."""
        if len(self.columns) == 1:  # a completion of one token takes no step
            return self
        # As the documentation of torch.cuda.graph asks: warm up on another stream first.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        self.step = graph.replay  # it works on the tensors that were there when it was recorded: they may never be replaced
        return self


def completion_text(tokenizer, completion_ids: Tensor, length: int, end_ids: Tensor) -> str:
    """The text of one completion (C,) without its end token. Other special tokens stay visible: they are mistakes."""
    ids = completion_ids[:length].tolist()
    return tokenizer.decode(ids[:-1] if ids[-1] in end_ids.tolist() else ids, skip_special_tokens=False)


@dataclass
class Rollout:
    """What one rank has sampled for one step: B groups of G rows; row n continues prompt n // G. B may be 0."""
    examples: list[Example]
    completion_ids: Tensor  # (N, C) int64
    lengths: Tensor  # (N,) int64, end token included
    completion_mask: Tensor  # (N, C) bool, True up to and including the end token
    logps: Tensor  # (N, C) float32, as the actor saw them


def sample_groups(actor, examples: list[Example], step: int, args: Args, end_ids: Tensor, banned_ids: Tensor,
                  graphs: dict | None) -> Rollout:
    """Samples G completions for each example, `rollout_prompts` prompts at a time."""
    # An empty part comes first, for a rank none of whose videos can be read.
    completion_ids, lengths, logps = [end_ids.new_zeros(0, 1)], [end_ids.new_zeros(0)], [torch.zeros(0, 1, device=actor.device)]
    for chunk in (examples[i:i + args.rollout_prompts] for i in range(0, len(examples), args.rollout_prompts)):
        # Seeded by the sample, not by its place: the same completions on any rank and in any batch.
        seeds = [random.Random(f"{args.seed}/{step}/{example.sample.sample_id}").getrandbits(63) for example in chunk]
        ids, row_lengths, row_logps = generate(actor, collate_prompts(chunk, actor.device), args.group_size,
                                               args.max_completion_length, args.temperature, seeds, end_ids, banned_ids, graphs)
        completion_ids.append(ids)
        lengths.append(row_lengths)
        logps.append(row_logps)
    C = max(ids.shape[1] for ids in completion_ids)
    completion_ids, logps = (torch.cat([F.pad(x, (0, C - x.shape[1])) for x in parts]) for parts in (completion_ids, logps))
    lengths = torch.cat(lengths)
    return Rollout(examples, completion_ids, lengths, mask_from_lengths(lengths, C), logps)


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

def rows_logps(model, rollout: Rollout, rows: Tensor, args: Args, banned_ids: Tensor) -> tuple[Tensor, Tensor]:
    """log pi(o_t | q, o_<t) and entropy, both (len(rows), C), of some rows (int64 indices) of a rollout. Collective."""
    groups, row_prompt = (rows // args.group_size).unique(return_inverse=True)  # the prompts these rows continue, each once
    prompts = collate_prompts([rollout.examples[b] for b in groups.tolist()], rows.device)
    return model(prompts, row_prompt, rollout.completion_ids[rows], rollout.completion_mask[rows], args.temperature, banned_ids)


@torch.no_grad()
def score(model, rollout: Rollout, batches: list[Tensor], num_blanks: int, blank: tuple, args: Args,
          banned_ids: Tensor) -> Tensor:
    """Log-probs (N, C) of the rows in `batches`, without gradient: for pi_old and pi_ref; 0 elsewhere. Collective."""
    logps = torch.zeros_like(rollout.logps)
    for rows in batches:
        logps[rows] = rows_logps(model, rollout, rows, args, banned_ids)[0]
    for _ in range(num_blanks):
        model(*blank)
    return logps


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
    if m.get("entropy", 1) < 0.01:
        return "entropy collapsed"
    if m.get("actor_gap", 0) > 0.1:
        return "sampler and learner disagree"
    return "ok"


def main(args: Args) -> Path:
    """Trains and returns the folder of the exported model."""
    # 1 setup
    rank, world_size, device = setup()
    args = resolve_toy(args)
    if args.prompts_per_step % world_size:
        raise ValueError(f"--prompts_per_step {args.prompts_per_step} must be a multiple of the {world_size} ranks")
    if args.cuda_graph and device.type != "cuda":
        raise ValueError("--cuda_graph needs a GPU, and there is none here; leave it out")

    # 2 data
    samples = load_samples(args.train_file, args.data_root)[:args.max_samples or None]
    if any(sample.response for sample in samples):
        raise ValueError(f"{args.train_file}: these records are for SFT (they have a 'response' and no gold answer); "
                         "GRPO needs the training shape, such as training_6k.jsonl")
    samples = leave_out(samples, args.leave_out)
    num_steps = args.max_steps or max(1, args.num_epochs * len(samples) // args.prompts_per_step)
    tokenizer = load_tokenizer(args.model)
    frames = Frames(args.fps, args.min_frames, args.num_frames, args.image_size, args.frame_cache)
    dataset = VideoDataset(samples, tokenizer, frames, args.seed, args.video)
    if rank == 0:
        print(f"{args.train_file}: {dataset.describe_prompt()}")

    # 3 model
    policy = load_policy(args, device, naive=args.naive)
    reference = load_policy(args, device, frozen=True, naive=args.naive) if args.kl_coef > 0 else None
    actor = make_actor(policy, device)
    end_ids, banned_ids = end_token_ids(actor, tokenizer, device), vision_token_ids(actor, device)
    blank = blank_batch(tokenizer, actor.config, device)
    graphs = {} if args.cuda_graph else None

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
    progress = tqdm(total=num_steps, initial=first_step, desc="grpo", disable=rank != 0, dynamic_ncols=True)
    total_s, total_tokens = Counter(), Counter()  # by phase
    start = first_start = clock()
    for step, examples in enumerate(loader, first_step):
        seconds = {"data_s": clock() - start}

        # 6a completions: sampled by the policy, G per prompt
        for example in examples:
            if example.error:
                tqdm.write(f"step {step}: sample {example.sample.sample_id} left out: {example.error}")
        readable = [example for example in examples if not example.error]
        rollout = sample_groups(actor, readable, step, args, end_ids, banned_ids, graphs)
        seconds["rollout_s"] = clock() - start - sum(seconds.values())

        # 6b rewards and advantages
        answers = [(completion_text(tokenizer, ids, length, end_ids), readable[n // args.group_size])  # N (text, example) pairs
                   for n, (ids, length) in enumerate(zip(rollout.completion_ids, rollout.lengths.tolist()))]
        accuracy = torch.tensor([accuracy_reward(text, e) for text, e in answers], device=device)  # (N,)
        formatted = torch.tensor([format_reward(text) for text, _ in answers], device=device)  # (N,)
        parsed = torch.tensor([parse_answer(text, e.options) is not None for text, e in answers], device=device)  # (N,) bool
        rewards = (accuracy + args.format_weight * formatted).view(-1, args.group_size)  # (B, G)
        advantages = group_advantages(rewards, args.advantage_std).flatten()  # (N,)
        # Equal rewards mean advantages of 0. Such a flat group counts in the statistics and in the denominators of the loss,
        # but it is not learned: its gradient would be 0, but for the KL term. So with kl_coef > 0 what is dropped here is the
        # pull of these completions towards the reference; --learn_flat_groups keeps it.
        flat = (rewards == rewards[:, :1]).all(dim=1)  # (B,) bool
        learned = (~flat | args.learn_flat_groups).repeat_interleave(args.group_size)  # (N,) bool
        if rank == 0 and answers and step % args.sample_every == 0:  # reading completions is the first debugging tool
            n = step // args.sample_every % len(answers)  # another row each time
            text, example = answers[n]
            shown = (f"\n--- step {step}, sample {example.sample.sample_id}, gold {example.gold}\n"
                     f"{example.prompt_text}\n>>> {text}\n"
                     f"=== reward {rewards.flatten()[n].item():.2f}, advantage {advantages[n].item():+.2f}")
            tqdm.write(shown)
            with open(output_dir / "samples.txt", "a") as file:
                file.write(shown + "\n")

        # 6c counts of the whole step: the denominators, fixed before the first backward
        ended = (torch.isin(rollout.completion_ids, end_ids) & rollout.completion_mask).any(dim=1)  # (N,) bool
        counts = sum_over_ranks({
            "rows": len(answers), "groups": len(readable), "bad_videos": len(examples) - len(readable),
            "tokens": rollout.lengths.sum(), "learned_tokens": rollout.lengths[learned].sum(), "reward": rewards.sum(),
            "accuracy": accuracy.sum(), "format": formatted.sum(), "parsed": parsed.sum(), "truncated": (~ended).sum(),
            "group_std": group_std(rewards).sum(), "flat_groups": flat.sum()}, device)
        if counts["rows"] == 0:
            raise ValueError(f"step {step}: no sample could be read, check --data_root {args.data_root}; {examples[0].error}")
        weights = token_weights(rollout.completion_mask, args.loss_agg, counts["rows"], counts["tokens"],
                                args.max_completion_length)

        # 6d log-probs under the reference, and under the sampling policy if it will move before their last use
        rows = learned.nonzero()[:, 0]
        batches = [rows[i:i + args.micro_batch_size] for i in range(0, len(rows), args.micro_batch_size)]
        # As many passes as the rank with the most, and at least one: a step without any signal is one with a gradient of 0,
        # in which AdamW's momentum still moves the weights.
        num_blanks = max(1, max_over_ranks(len(batches), device)) - len(batches)
        passes = (rollout, batches, num_blanks, blank, args, banned_ids)
        ref_logps = score(reference, *passes) if reference is not None else None
        old_logps = score(policy, *passes) if args.num_updates > 1 else None
        seconds["score_s"] = clock() - start - sum(seconds.values())

        # 6e update
        sums = dict.fromkeys(("loss", "kl", "entropy", "clipped", "actor_gap"), 0.0)
        for update in range(args.num_updates):
            # ABLATE: schedule. Linear to 0 over all updates of the run, as published.
            lr = args.learning_rate * (1 - (step * args.num_updates + update) / (num_steps * args.num_updates))
            for group in optimizer.param_groups:
                group["lr"] = lr
            for rows in batches:
                mask = rollout.completion_mask[rows]
                logps, entropy = rows_logps(policy, rollout, rows, args, banned_ids)
                # With one update the policy still is the one that sampled: its own value is pi_old.
                old = logps.detach() if old_logps is None else old_logps[rows]
                token_loss, kl, clipped = grpo_token_loss(logps, old, None if ref_logps is None else ref_logps[rows],
                                                          advantages[rows], args.clip_low, args.clip_high, args.kl_coef)
                loss = (token_loss * weights[rows]).sum()
                # FSDP averages gradients over ranks; the weights already hold the global denominator, so undo that.
                (loss * world_size).backward()
                sums["loss"] += loss.detach()
                for name, value in (("kl", kl), ("entropy", entropy), ("clipped", clipped)):
                    sums[name] += value[mask].sum()
                if update == 0:  # later the two differ because the policy has moved
                    sums["actor_gap"] += (logps.detach() - rollout.logps[rows])[mask].abs().sum()
            for _ in range(num_blanks):  # collective: every rank runs as many passes as the others
                (0 * policy(*blank)[0].sum()).backward()
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
        metrics = {
            "step": step, "reward": counts["reward"] / counts["rows"], "group_std": counts["group_std"] / counts["groups"],
            "accuracy": counts["accuracy"] / counts["rows"], "parse_rate": counts["parsed"] / counts["rows"],
            "format_rate": counts["format"] / counts["rows"], "flat_group_frac": counts["flat_groups"] / counts["groups"],
            "completion_length": counts["tokens"] / counts["rows"], "truncated_frac": counts["truncated"] / counts["rows"],
            "loss": sums["loss"] / args.num_updates, "grad_norm": grad_norm, "lr": lr, "bad_videos": int(counts["bad_videos"]),
            "tokens_per_s": counts["tokens"] / step_s, "step_s": step_s, **seconds}
        if counts["learned_tokens"]:  # means over the tokens that were learned: those of flat groups are not in them
            token_updates = counts["learned_tokens"] * args.num_updates
            metrics |= {"entropy": sums["entropy"] / token_updates, "clip_frac": sums["clipped"] / token_updates,
                        "actor_gap": sums["actor_gap"] / counts["learned_tokens"]}
            if reference is not None:
                metrics["kl"] = sums["kl"] / token_updates
        if rank == 0:
            append_jsonl(output_dir / "metrics.jsonl", metrics)
            progress.set_postfix_str(f"reward {metrics['reward']:.2f}+-{metrics['group_std']:.2f} acc {metrics['accuracy']:.2f} "
                                     f"parse {metrics['parse_rate']:.2f} len {metrics['completion_length']:.0f} "
                                     f"| {health(metrics)}")
            progress.update()
        total_s.update(seconds)  # a Counter adds
        total_tokens.update(rollout_s=counts["tokens"], update_s=counts["learned_tokens"] * args.num_updates)
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
