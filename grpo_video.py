"""GRPO on video questions, from scratch: the policy answers each question G times, and learns from which were right.

    python grpo_video.py                                # the toy world on a laptop, minutes
    torchrun --nproc_per_node 2 grpo_video.py           # the same run on two processes: same prompts, same completions
    torchrun --nproc_per_node 8 grpo_video.py --model Qwen/Qwen2-VL-7B-Instruct --data_root DIR \
        --train_file annotations/training_6k.jsonl --output_dir out/grpo
    torchrun --nnodes 2 --node_rank R --master_addr HOST --nproc_per_node 8 grpo_video.py ...      # two nodes

The seven steps, which number the sections below, the loop of `main`, and that of sft_video.py:
    1 sample     G completions o_1 .. o_G for each of B prompts q from the current policy
    2 reward     r_i = 1 if the answer parsed from o_i is right, else 0
    3 advantage  A_i = (r_i - mean(r)) / (std(r) + 1e-4) within the group: the group is the baseline, no value network
    4 ratio      rho_it = pi_theta(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)
    5 objective  L_it = -min(rho_it A_i, clip(rho_it, 1 - eps_low, 1 + eps_high) A_i)
    6 KL         L_it += beta (pi_ref / pi_theta - log(pi_ref / pi_theta) - 1)
    7 update     AdamW on the mean of L_it over the tokens of a completion, then over completions

Symbols: pi_theta -> logps, pi_old -> old_logps, pi_ref -> ref_logps, rho -> ratio, A -> advantages, G -> group_size,
beta -> kl_coef, eps -> clip_low, clip_high. Letters: B prompts, G completions per prompt, N = B * G completions, C
their tokens. In each function they count what that function sees (this rank's, or a micro-batch's).

Elsewhere: how a video becomes tokens, `VideoDataset.__getitem__` in data.py, then `embed_prompts` in model.py; which
answer is right, `grade` in data.py; which tokens end a completion, `end_token_ids` in model.py; log-probs, `Policy` in
model.py; one token after another, and where another engine goes, `generate` in sampler.py; sharding, `shard` in
runtime.py; folder, log, checkpoints and signals, `Run` in run.py.

Where this departs from the published SEED-Bench-R1 run, and why:
    1. The ratio and its clip are there. The release has neither, and one update per rollout, where the ratio is 1 and
       nothing clips; with the default --num_updates 1 the gradient here is the same as theirs.
    2. The end token is trained, and nothing after it: masks come from lengths.
    3. One strict parser for reward and evaluation. The release compares first characters ("Apple" is A).
    4. Distractors, option order and sampling noise are functions of (seed, step or epoch, question): no global random
       state, so the number of ranks changes nothing, and a step number is enough to resume.
    5. The denominators of the loss are those of the whole step: ranks and micro-batches only split a sum.
    6. An unreadable video is left out and counted. The release trains its question on another video.
    7. KL is not computed, and no reference is loaded, when --kl_coef is 0.
    8. Vision tokens are banned from completions, in sampling and in log-probs alike: no pixels belong to them.
    9. Groups of equal rewards are not learned: they have no advantage. With KL on, their pull towards the reference is
       lost; --learn_flat_groups keeps it, as published.

References: GRPO: arXiv 2402.03300, eq. 3 (objective), eq. 4 (KL). SEED-Bench-R1: arXiv 2503.24376. DAPO (token mean,
clip higher): arXiv 2503.14476. Dr. GRPO (constant, no std): arXiv 2503.20783. k3: Schulman, Approximating KL.
"""
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
import runtime
from data import Example, grade, make_loader, step_batch
from model import collate_prompts, end_token_ids, mask_from_lengths, vision_token_ids
from run import Run
from runtime import TrainArgs, arg
from sampler import Completions, answer_texts, generate


@dataclass
class Args(TrainArgs):
    """The defaults are the published run (departures above): Qwen2-VL-7B, 6k questions, 8 prompts x 8 a step."""
    output_dir: str = arg("out/grpo", "metrics.jsonl, completions.txt, checkpoints/ and final/ go here")
    # 1 sample
    group_size: int = arg(8, "G: completions per prompt", least=2)
    temperature: float = arg(1.0, "of sampling, and so of every log-prob, > 0")
    max_completion_length: int = arg(256, "most tokens of a completion, end token included", least=1)
    rollout_prompts: int = arg(8, "prompts decoded together on one rank: memory against speed, results differ by "
                                  "rounding", least=1)
    cuda_graph: bool = arg(False, "replay each token's kernels as one CUDA graph: meant for GPUs, never run so far")
    # 2 reward
    format_weight: float = arg(0.0, "weight of the format reward beside accuracy's 1", least=0)
    agreement_weight: float = arg(0.0, "the same of agreement: what the reasoning concludes with is answered", least=0)
    process_weight: float = arg(0.0, "the same of process: the share of the steps done that it names", least=0)
    reward_noise: float = arg(0.0, "flip this share of the accuracy rewards; logged is the clean one", least=0, most=1)
    # 3 advantage
    advantage_std: bool = arg(True, "divide by the group's std (False: Dr. GRPO)")
    learn_flat_groups: bool = arg(False, "also learn groups of equal rewards, for their KL term; no use with kl_coef 0")
    # 4 ratio
    naive: bool = arg(False, "learn padded rows of prompt and completion, the prompt once per row: slower, same result")
    # 5 objective, 6 KL
    clip_low: float = arg(0.2, "eps_low: where A < 0, a ratio below 1 - clip_low gets no gradient", least=0, most=1)
    clip_high: float = arg(0.2, "eps_high: where A > 0, a ratio above 1 + clip_high gets none (DAPO: 0.28)", least=0)
    kl_coef: float = arg(0.1, "beta; 0 loads no reference model", least=0)
    # 7 update
    loss_agg: str = arg("sequence_mean", "sequence_mean (published), token_mean (DAPO) or constant (Dr. GRPO)")
    num_updates: int = arg(1, "optimizer updates on each rollout", least=1)
    learning_rate: float = arg(1e-6, "at the start; decays linearly to 0 over the run, without warm-up", least=0)
    print_every: int = arg(10, "print one prompt and completion with its reward every so many steps", least=1)

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature > 0:  # NaN is not, either
            raise ValueError(f"--temperature {self.temperature}: must be > 0; equal completions teach nothing")
        if self.loss_agg not in ("sequence_mean", "token_mean", "constant"):
            raise ValueError(f"--loss_agg {self.loss_agg!r}: must be sequence_mean, token_mean or constant")


# Defaults in place of those above for a small model (`is_small` in runtime.py); flags that are given win.
TOY = dict(image_size=56, max_completion_length=64, micro_batch_size=32, max_steps=240, learning_rate=2e-4, kl_coef=0.0,
           gradient_checkpointing=False, frame_cache="out/toy_frames", output_dir="out/toy_grpo")


# ----------------------------------------------------------------------------------------------------------------------
# 1 sample

@dataclass
class Rollout:
    """What one rank has sampled in a step: B groups of G completions; n continues prompt n // G. B may be 0."""
    examples: list[Example]
    group_size: int
    temperature: float
    banned_ids: Tensor
    completion_ids: Tensor  # (N, C) int64
    completion_mask: Tensor  # (N, C) bool, True up to and including the end token
    lengths: Tensor  # (N,) int64, end token included
    ended: Tensor  # (N,) bool; False: cut off at max_completion_length
    sampler_logps: Tensor  # (N, C), at least float32: the sampler's own, for the metric sampler_gap alone


def sample_groups(sampler, examples: list[Example], step: int, args: Args, end_ids: Tensor, banned_ids: Tensor,
                  caches: dict | None = None) -> Rollout:
    """Samples G completions for each example (there may be none), `rollout_prompts` prompts at a time.

    end_ids, banned_ids (k,) int64; caches as in `generate`. What a question's group draws follows from seed, step, id.
    """
    C, dtype = args.max_completion_length, torch.promote_types(sampler.dtype, torch.float32)
    # An empty part comes first, for a rank none of whose videos can be read.
    parts = [Completions(end_ids.new_zeros(0, C), end_ids.new_zeros(0), end_ids.new_zeros(0, dtype=torch.bool),
                         end_ids.new_zeros(0, C, dtype=dtype))]
    for i in range(0, len(examples), args.rollout_prompts):
        chunk = examples[i:i + args.rollout_prompts]
        # Seeded by the question, not by its place: the same completions on any rank and in any batch.
        seeds = [random.Random(f"{args.seed}/{step}/{example.question.id}").getrandbits(63) for example in chunk]
        parts.append(generate(sampler, collate_prompts(chunk, sampler.device), args.group_size, C, args.temperature,
                              seeds, end_ids, banned_ids, caches))
        of_rows = [example for example in chunk for _ in range(args.group_size)]
        runtime.require_finite("the sampler's log-probs", parts[-1].logps, of_rows)
    ids, lengths, ended, logps = (torch.cat(part) for part in zip(*parts))
    return Rollout(examples, args.group_size, args.temperature, banned_ids, ids, mask_from_lengths(lengths, C), lengths,
                   ended, logps)


# ----------------------------------------------------------------------------------------------------------------------
# 2 reward

def accuracy_reward(completion: str, example: Example) -> float:
    """1 if the answer is the right one, else 0; evaluate.py grades with the same function."""
    return float(grade(completion, example)[1])


def reward_table(args: Args) -> dict:
    """name -> (weight, function of completion and example). The reward is their weighted sum; each is logged too. None
    is for no reward, where an example gives nothing to judge by."""
    # ABLATE: rewards. A length penalty is one more line. One that needs log-probs (GRPO-CARE's consistency bonus) is
    # added to `rewards` in `main`, from `logps_without_grad` over micro-batches of all rows.
    return {"accuracy": (1.0, accuracy_reward),
            "format": (args.format_weight, data.format_reward),
            "agreement": (args.agreement_weight, data.agreement_reward),
            "process": (args.process_weight, data.process_reward)}


def flip(accuracy: Tensor, probability: float, keys: list[str]) -> Tensor:
    """The rewards (N,) of a judge that errs: 0 for 1 and 1 for 0 with a probability, drawn by each completion's key."""
    wrong = [random.Random(key).random() < probability for key in keys]
    return torch.where(torch.tensor(wrong, dtype=torch.bool, device=accuracy.device), 1 - accuracy, accuracy)


# ----------------------------------------------------------------------------------------------------------------------
# 3 advantage

def group_advantages(rewards: Tensor, use_std: bool = True) -> Tensor:
    """How much better each completion is than its group: (B, G) float rewards, G >= 2 -> (B, G) advantages.

    Source: arXiv 2402.03300, section 4.1.2. A group of equal rewards gets 0, up to rounding.
    """
    # A_i = (r_i - mean(r)) / (std(r) + 1e-4), std with G - 1 as in the release.
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    # ABLATE: RLOO takes the mean of the *other* completions: centred * G / (G - 1).
    # ABLATE: advantage without std (Dr. GRPO): dividing gives easy and hard questions (small std) more weight.
    return centred / (group_std(rewards)[:, None] + 1e-4) if use_std else centred


def group_std(rewards: Tensor) -> Tensor:
    """The standard deviation in each group, with G - 1: (B, G) -> (B,). By hand, because std warns when B is 0."""
    return ((rewards - rewards.mean(dim=1, keepdim=True)).square().sum(dim=1) / (rewards.shape[1] - 1)).sqrt()


# ----------------------------------------------------------------------------------------------------------------------
# 4 ratio: the log-probs that it is made of, a micro-batch at a time.

def completion_logps(model, rollout: Rollout, rows: Tensor) -> tuple[Tensor, Tensor]:
    """log pi(o_t | q, o_<t) and entropy, both (len(rows), C), of the completions `rows` (int64).

    Temperature and banned tokens are those of sampling: the policy that learns is the one that sampled. Collective: a
    rank with nothing to learn calls it with no rows.
    """
    # The prompts that these rows continue, each once.
    prompts, row_prompt = (rows // rollout.group_size).unique(return_inverse=True)
    batch = collate_prompts([rollout.examples[b] for b in prompts.tolist()], rows.device)
    return model(batch, row_prompt, rollout.completion_ids[rows], rollout.completion_mask[rows], rollout.temperature,
                 rollout.banned_ids)


@torch.no_grad()
def logps_without_grad(model, rollout: Rollout, batches: list[Tensor]) -> Tensor:
    """Log-probs (N, C) without gradient, of pi_old or pi_ref; 0 for rows in none of the batches. Collective."""
    logps = torch.zeros_like(rollout.sampler_logps)
    for rows in batches:
        logps[rows] = completion_logps(model, rollout, rows)[0]
    return logps


# ----------------------------------------------------------------------------------------------------------------------
# 5 objective, 6 KL

def grpo_token_loss(logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, advantages: Tensor,
                    clip_low: float, clip_high: float, kl_coef: float) -> tuple[Tensor, Tensor, Tensor]:
    """The clipped objective with its KL penalty, one value per completion token, not yet averaged.

    Args: logps, old_logps, ref_logps (N, C), of the current, the sampling and the reference policy (None: no KL);
        advantages (N,), the same for every token of a completion. Only `logps` carries gradient.
    Returns: loss (N, C); kl (N, C), detached; clipped (N, C) bool, True where the clip has cut the gradient.
    Source: arXiv 2402.03300, eq. 3 and 4.
    """
    advantages = advantages[:, None]  # (N, 1)
    # 4 ratio: rho = pi_theta / pi_old. At the first update of a rollout it is worth 1, but its gradient is that of
    # log pi_theta: there the loss is worth -A and its gradient is REINFORCE's.
    ratio = (logps - old_logps).exp()
    # ABLATE: GSPO: one ratio a sequence, the exponential of the mean of logps - old_logps over its tokens.
    # 5 objective: -min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A)
    # ABLATE: clip-higher (DAPO: clip_high 0.28) leaves room for unlikely tokens to grow.
    loss = -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    clipped = torch.where(advantages > 0, ratio > 1 + clip_high, ratio < 1 - clip_low) & (advantages != 0)
    if ref_logps is None:
        return loss, torch.zeros_like(loss), clipped
    # 6 KL: k3 = pi_ref / pi_theta - log(pi_ref / pi_theta) - 1: never negative, and its mean is KL(theta || ref).
    # ABLATE: KL estimator: k1 = logps - ref_logps has the right mean, and in a loss no gradient (its mean is 0);
    # k2 = k1^2 / 2 has the KL's gradient.
    log_ratio_ref = ref_logps - logps
    kl = log_ratio_ref.exp() - log_ratio_ref - 1
    return loss + kl_coef * kl, kl.detach(), clipped


# ----------------------------------------------------------------------------------------------------------------------
# 7 update

def token_weights(mask: Tensor, loss_agg: str, num_completions: float, num_tokens: float,
                  max_completion_length: int) -> Tensor:
    """The weight of every token in the step's mean: (N, C) bool mask -> (N, C) float32, 0 outside the mask.

    `num_completions` and `num_tokens` count the completions and their tokens of the whole step, over all ranks and
    micro-batches. The loss is then one plain sum of weight * token loss: however it is split, the gradient is the same.
    """
    mask = mask.float()
    # ABLATE: loss aggregation.
    if loss_agg == "sequence_mean":  # 1 / (N |o_i|): each completion counts the same, so tokens of long ones count less
        return mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / num_completions
    if loss_agg == "token_mean":  # 1 / sum_i |o_i|: each token counts the same (DAPO)
        return mask / num_tokens
    return mask / (num_completions * max_completion_length)  # constant: no dependence on length at all (Dr. GRPO)


# ----------------------------------------------------------------------------------------------------------------------
# The run.

def main(args: Args) -> Path:
    """Trains and returns the folder of the exported model. ValueError for flags and files that will not do."""
    rank, world_size, device = runtime.setup()
    args = runtime.resolve(args, device)
    if args.cuda_graph and device.type != "cuda":
        raise ValueError("--cuda_graph needs a GPU, and there is none here; leave it out")
    tokenizer = runtime.load_tokenizer(args.model)
    dataset, num_steps = runtime.load_training_set(args, tokenizer, for_sft=False)
    policy = runtime.load_policy(args, device, naive=args.naive)
    reference = runtime.load_reference(args, policy, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, betas=(0.9, 0.999),
                                  weight_decay=args.weight_decay, fused=True)
    run = Run(args, policy, optimizer, num_steps, device)
    sampler = runtime.make_sampler(policy, device)
    end_ids, banned_ids = end_token_ids(sampler, tokenizer, device), vision_token_ids(sampler, device)
    caches = {} if args.cuda_graph else None
    table = reward_table(args)
    loader = make_loader(dataset, [step_batch(step, args.prompts_per_step, len(dataset), args.seed, rank, world_size)
                                   for step in range(run.first_step, num_steps)], args.num_workers)

    for step, examples in run.steps(loader):
        # 1 sample
        run.phase("rollout")
        readable = run.keep_readable(examples)
        rollout = sample_groups(sampler, readable, step, args, end_ids, banned_ids, caches)

        # 2 reward
        run.phase("score")
        texts = answer_texts(tokenizer, readable, rollout.completion_ids, rollout.lengths, rollout.ended)
        answers = [(text, readable[n // args.group_size]) for n, text in enumerate(texts)]
        values = {name: [reward(*answer) for answer in answers] for name, (_, reward) in table.items()}  # N each
        terms = {name: torch.tensor([value or 0.0 for value in column], dtype=torch.float32, device=device)  # (N,) each
                 for name, column in values.items()}
        if args.reward_noise > 0:
            keys = [f"{args.seed}/{step}/{e.question.id}/{n % args.group_size}" for n, (_, e) in enumerate(answers)]
            terms["accuracy"] = flip(terms["accuracy"], args.reward_noise, keys)
        rewards = sum(weight * terms[name] for name, (weight, _) in table.items()).view(-1, args.group_size)  # (B, G)

        # 3 advantage
        advantages = group_advantages(rewards, args.advantage_std).flatten()  # (N,)
        # A group of equal rewards has advantages of 0. It counts in the denominators of the loss but is not learned: it
        # has no gradient but the KL term's, which --learn_flat_groups keeps.
        flat = (rewards == rewards[:, :1]).all(dim=1)  # (B,) bool
        learned = (~flat | args.learn_flat_groups).repeat_interleave(args.group_size)  # (N,) bool
        if rank == 0 and answers and step % args.print_every == 0:
            print_completion(answers, rewards.flatten(), advantages, step, args, run.output_dir / "completions.txt")

        # Sums of the whole step, over all ranks; the denominators of the loss are among them.
        totals = run.sum_over_ranks({
            "prompts": len(readable), "completions": len(answers), "tokens": rollout.lengths.sum(),
            "learned_tokens": rollout.lengths[learned].sum(), "flat_groups": flat.sum(),
            **rollout_sums(rollout, answers, rewards, values)})
        if totals["prompts"] == 0:
            continue  # nothing could be read on any rank
        token_weight = token_weights(rollout.completion_mask, args.loss_agg, totals["completions"], totals["tokens"],
                                     args.max_completion_length)

        # 4 ratio: pi_old is the policy that sampled. With one update that is the policy itself; with more it is kept by
        # a pass before the first. The sampler's log-probs will not do: they are rounded otherwise, and the ratio would
        # take that for a move of the policy.
        batches = runtime.micro_batches(learned.nonzero()[:, 0], args.micro_batch_size)
        ref_logps = logps_without_grad(reference, rollout, batches) if reference is not None else None
        old_logps = logps_without_grad(policy, rollout, batches) if args.num_updates > 1 else None

        run.phase("update")
        sums = dict.fromkeys(("loss", "kl", "kl_squares", "entropy", "clipped", "sampler_gap"), 0.0)
        for update in range(args.num_updates):
            for rows in batches:
                logps, entropy = completion_logps(policy, rollout, rows)
                old = logps.detach() if old_logps is None else old_logps[rows]  # one update: it has not moved
                ref = None if ref_logps is None else ref_logps[rows]
                # 5 objective, 6 KL
                token_loss, kl, clipped = grpo_token_loss(logps, old, ref, advantages[rows], args.clip_low,
                                                          args.clip_high, args.kl_coef)
                runtime.require_finite("log-probs or loss", token_loss, [answers[n][1] for n in rows.tolist()])
                loss = (token_loss * token_weight[rows]).sum()
                # FSDP averages gradients over ranks; token weights already hold the global denominator, so undo that.
                (loss * world_size).backward()
                mask = rollout.completion_mask[rows]
                sums["loss"] += loss.detach()
                for name, value in dict(kl=kl, kl_squares=kl**2, entropy=entropy, clipped=clipped).items():
                    sums[name] += value[mask].sum()
                if update == 0:  # later the two differ because the policy has moved
                    sums["sampler_gap"] += (logps.detach() - rollout.sampler_logps[rows])[mask].abs().sum()
            # 7 update
            # ABLATE: schedule. Linear to 0, as published. For a warm-up, lr *= min(1, (step + 1) / warmup_steps).
            lr = args.learning_rate * (1 - (step * args.num_updates + update) / (num_steps * args.num_updates))
            grad_norm = runtime.optimizer_step(policy, optimizer, lr, args.max_grad_norm)
        runtime.copy_weights(policy, sampler)
        metrics = step_metrics(totals, run.sum_over_ranks(sums), terms, grad_norm, lr, args)
        line, signs = progress_line(metrics)
        run.log(metrics, totals["tokens"], line, signs)

    return run.finish(tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# What is shown of it.

def print_completion(answers: list[tuple[str, Example]], rewards: Tensor, advantages: Tensor, step: int, args: Args,
                     file: Path) -> None:
    """One completion, another each time, on screen and in the file: reading them is the first debugging tool."""
    n = step // args.print_every % len(answers)
    text, example = answers[n]
    lines = (f"\n--- step {step}, question {example.question.id}, gold {example.gold}\n{example.prompt_text}\n"
             f">>> {text}\n=== reward {rewards[n].item():.2f}, advantage {advantages[n].item():+.2f}")
    tqdm.write(lines)
    with open(file, "a") as stream:
        stream.write(lines + "\n")


def rollout_sums(rollout: Rollout, answers: list[tuple[str, Example]], rewards: Tensor, values: dict) -> dict:
    """What is only logged of this rank's completions: rewards (B, G); values, name -> N numbers or None."""
    return {"parsed": sum(grade(*answer)[0] is not None for answer in answers), "truncated": (~rollout.ended).sum(),
            "concluded": sum(data.concluded_option(text, example.options) is not None for text, example in answers),
            "reward": rewards.sum(), "group_std": group_std(rewards).sum(),
            **{f"reward {name}": sum(value or 0.0 for value in column) for name, column in values.items()},
            **{f"judged {name}": sum(value is not None for value in column) for name, column in values.items()}}


def step_metrics(totals: dict, sums: dict, rewards: dict, grad_norm: float, lr: float, args: Args) -> dict:
    """What metrics.jsonl says of the algorithm; the README says what each key means.

    Args: totals and sums, over all ranks, of the rollout and of the update; rewards, their names; grad_norm before
        clipping.
    """
    completions, groups = totals["completions"], totals["prompts"]
    metrics = {
        "reward": totals["reward"] / completions, "group_std": totals["group_std"] / groups,
        **{name: totals[f"reward {name}"] / judged for name in rewards if (judged := totals[f"judged {name}"])},
        "concluded": totals["concluded"] / max(totals.get("judged agreement", completions), 1),
        "parse_rate": totals["parsed"] / completions, "flat_group_frac": totals["flat_groups"] / groups,
        "completion_length": totals["tokens"] / completions, "truncated_frac": totals["truncated"] / completions,
        "loss": sums["loss"] / args.num_updates, "grad_norm": grad_norm, "lr": lr}
    if totals["learned_tokens"]:  # means over the tokens that were learned: those of flat groups are not in them
        token_updates = totals["learned_tokens"] * args.num_updates
        metrics |= {"entropy": sums["entropy"] / token_updates, "clip_frac": sums["clipped"] / token_updates,
                    "sampler_gap": sums["sampler_gap"] / totals["learned_tokens"]}
        if args.kl_coef > 0:
            metrics["kl"] = sums["kl"] / token_updates
            metrics["kl_peak"] = sums["kl_squares"] ** 0.5 / max(sums["kl"], 1e-12)  # 1: all of it is one token's
    return metrics


def progress_line(m: dict) -> tuple[str, dict[str, bool]]:
    """(the numbers to watch, signs of trouble: phrase -> whether it holds), for `health` in run.py."""
    # Thresholds are rules of thumb from GRPO runs, not from the paper.
    signs = {"most answers do not parse": m["parse_rate"] < 0.5,
             "completions do not end": m["truncated_frac"] > 0.2,
             "little signal: groups all right or all wrong": m["flat_group_frac"] > 0.8,
             "entropy collapsed": m.get("entropy", 1) < 0.01,
             "sampler and learner disagree": m.get("sampler_gap", 0) > 0.1,
             "the KL is that of one token": m.get("kl", 0) > 0.01 and m["kl_peak"] > 0.7}
    return (f"reward {m['reward']:.2f}+-{m['group_std']:.2f} acc {m.get('accuracy', 0):.2f} "
            f"parse {m['parse_rate']:.2f} len {m['completion_length']:.0f}"), signs


if __name__ == "__main__":
    runtime.launch(main, Args, TOY)
