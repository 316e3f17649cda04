"""The maths of GRPO against explicit Python loops, enumeration and closed forms. No model is needed here."""
import itertools
import math

import pytest
import torch

from data import format_reward
from grpo_video import Args, group_advantages, grpo_token_loss, progress_line, step_metrics, token_weights
from model import mask_from_lengths
from run import health


def random_batch(seed, N=6, C=5):
    """Log-probs of three policies that differ enough for the clip to bite on both sides, in float64."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    logps = -draw(N, C).abs() - 0.1
    old_logps, ref_logps = logps + 0.4 * draw(N, C), logps + 0.4 * draw(N, C)
    lengths = torch.randint(1, C + 1, (N,), generator=g)
    return logps, old_logps, ref_logps, draw(N), lengths


# ----------------------------------------------------------------------------------------------------------------------
# Advantages.

@pytest.mark.parametrize("use_std", [True, False])
def test_advantages_equal_a_loop(use_std):
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.5, 0.5, 0.0, 1.0]], dtype=torch.float64)
    got = group_advantages(rewards, use_std)
    for b, group in enumerate(rewards.tolist()):
        mean = sum(group) / len(group)
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / (len(group) - 1))
        for g, r in enumerate(group):
            expected = (r - mean) / (std + 1e-4) if use_std else r - mean
            assert got[b, g].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3])
def test_a_group_of_equal_rewards_has_no_advantage(reward):
    # Whatever rounding does to the mean, it must not be blown up by the division by 1e-4.
    assert group_advantages(torch.full((2, 8), reward)).abs().max() < 1e-2


# ----------------------------------------------------------------------------------------------------------------------
# The clipped objective.

@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_token_loss_equals_a_loop(seed, kl_coef):
    logps, old_logps, ref_logps, advantages, _ = random_batch(seed)
    loss, kl, clipped = grpo_token_loss(logps, old_logps, ref_logps, advantages, 0.2, 0.3, kl_coef)
    for i, t in itertools.product(range(logps.shape[0]), range(logps.shape[1])):
        A, p, p_old, p_ref = advantages[i].item(), *(math.exp(x[i, t].item()) for x in (logps, old_logps, ref_logps))
        ratio = p / p_old
        bounded = max(0.8, min(1.3, ratio))
        expected_kl = p_ref / p - math.log(p_ref / p) - 1
        expected = -min(ratio * A, bounded * A) + kl_coef * expected_kl
        assert loss[i, t].item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
        assert kl[i, t].item() == pytest.approx(expected_kl, rel=1e-9, abs=1e-12)
        assert clipped[i, t].item() == (bounded * A < ratio * A)
    assert clipped.any() and not clipped.all()


def test_without_reference_the_loss_has_no_kl():
    logps, old_logps, ref_logps, advantages, _ = random_batch(0)
    without, kl, _ = grpo_token_loss(logps, old_logps, None, advantages, 0.2, 0.2, kl_coef=5.0)
    with_zero, _, _ = grpo_token_loss(logps, old_logps, ref_logps, advantages, 0.2, 0.2, kl_coef=0.0)
    assert torch.equal(without, with_zero) and not kl.any()


@pytest.mark.parametrize("advantage, log_ratio, gradient_flows", [
    # A good token already made likelier is left alone; one made rarer is pulled up.
    (+1.0, +0.5, False), (+1.0, -0.5, True),
    # A bad token made likelier is pushed down; one already made rarer is left alone.
    (-1.0, +0.5, True), (-1.0, -0.5, False),
    # Inside the clip all flows.
    (+1.0, +0.1, True), (+1.0, -0.1, True), (-1.0, +0.1, True), (-1.0, -0.1, True)])
def test_the_clip_cuts_the_gradient_only_where_it_should(advantage, log_ratio, gradient_flows):
    logps = torch.tensor([[-1.0 + log_ratio]], requires_grad=True)
    loss, _, clipped = grpo_token_loss(logps, torch.tensor([[-1.0]]), None, torch.tensor([advantage]), 0.2, 0.2, 0.0)
    loss.sum().backward()
    # d(-rho A) / d log pi = -rho A
    assert logps.grad.item() == pytest.approx(-math.exp(log_ratio) * advantage if gradient_flows else 0.0)
    assert clipped.item() == (not gradient_flows)


def test_clip_low_and_clip_high_are_not_mixed_up():
    cases = [(1.0, 0.25, 0.1, 0.3, True), (1.0, 0.25, 0.3, 0.1, False),
             (-1.0, -0.2, 0.3, 0.1, True), (-1.0, -0.2, 0.1, 0.3, False)]
    for advantage, log_ratio, clip_low, clip_high, flows in cases:
        logps = torch.tensor([[log_ratio]], requires_grad=True)
        loss, *_ = grpo_token_loss(logps, torch.zeros(1, 1), None, torch.tensor([advantage]), clip_low, clip_high, 0.0)
        loss.sum().backward()
        assert bool(logps.grad) == flows


def test_at_ratio_one_the_gradient_is_reinforce():
    logps, _, _, advantages, lengths = random_batch(1)
    weights = token_weights(mask_from_lengths(lengths, logps.shape[1]), "sequence_mean", len(logps), lengths.sum(), 5)
    ours, reinforce = (logps.clone().requires_grad_() for _ in range(2))
    (grpo_token_loss(ours, ours.detach(), None, advantages, 0.2, 0.2, 0.0)[0] * weights).sum().backward()
    (-advantages[:, None] * reinforce * weights).sum().backward()
    torch.testing.assert_close(ours.grad, reinforce.grad, rtol=1e-12, atol=0)


# ----------------------------------------------------------------------------------------------------------------------
# k3 and the policy gradient, by enumeration of a tiny world: tokens 0 and 1, end token 2, at most 2 tokens.

SEQUENCES = [s for n in (1, 2) for s in itertools.product(range(3), repeat=n)
             if (s[-1] == 2 or n == 2) and 2 not in s[:-1]]  # 7 sequences, and no other can be sampled


def sequence_logps(theta):
    """(sequences, 2) log-probs of each token under a table of logits theta (1 + 3 states, 3 tokens), and the mask."""
    table = theta.log_softmax(-1)
    logps = torch.stack([torch.stack([table[0, s[0]], table[1 + s[0], s[1]] if len(s) == 2 else table[0, 0] * 0])
                         for s in SEQUENCES])
    return logps, mask_from_lengths(torch.tensor([len(s) for s in SEQUENCES]), 2)


def random_theta(seed):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_enumerated_sequences_are_all_there_are():
    logps, mask = sequence_logps(random_theta(0))
    assert len(SEQUENCES) == 7 and (logps * mask).sum(1).exp().sum().item() == pytest.approx(1.0)


def test_expected_gradient_of_the_estimator_is_the_policy_gradient():
    # Exactly, over all 7^2 groups of G = 2: E[gradient of the loss] = -(G - 1) / G * gradient of E[r]. The factor is
    # there because the group's mean contains the sample itself.
    G, rewards = 2, torch.tensor([0.0, 1.0, 0.5, 0.0, 2.0, 0.0, 1.0], dtype=torch.float64)
    theta = random_theta(1).requires_grad_()
    logps, mask = sequence_logps(theta)
    probs = (logps * mask).sum(1).exp()
    exact, = torch.autograd.grad((probs * rewards).sum(), theta)
    expected = torch.zeros_like(exact)
    for group in itertools.product(range(7), repeat=G):
        index = list(group)
        logps, mask = sequence_logps(theta)
        advantages = group_advantages(rewards[index][None], use_std=False)[0]
        loss, _, _ = grpo_token_loss(logps[index], logps[index].detach(), None, advantages, 0.2, 0.2, 0.0)
        weights = token_weights(mask[index], "constant", G, mask[index].sum(), max_completion_length=1)
        gradient, = torch.autograd.grad((loss * weights).sum(), theta)
        expected += probs[index].prod().detach() * gradient
    torch.testing.assert_close(expected, -(G - 1) / G * exact, rtol=1e-6, atol=1e-9)


def test_k3_is_never_negative_and_its_mean_is_the_kl():
    theta, theta_ref = random_theta(2), random_theta(3)
    logps, mask = sequence_logps(theta)
    ref_logps, _ = sequence_logps(theta_ref)
    _, k3, _ = grpo_token_loss(logps, logps, ref_logps, torch.zeros(7), 0.2, 0.2, 1.0)
    assert (k3 >= 0).all()
    probs = (logps * mask).sum(1).exp()
    # k3 per token is unbiased for the KL of each next-token distribution: weigh states by how often they are reached.
    table, table_ref = theta.log_softmax(-1), theta_ref.log_softmax(-1)
    kl_state = (table.exp() * (table - table_ref)).sum(-1)  # (4,)
    exact = kl_state[0] + sum(table[0, a].exp() * kl_state[1 + a] for a in (0, 1))
    assert (probs[:, None] * k3 * mask).sum().item() == pytest.approx(exact.item(), rel=1e-10)


def test_k3_gradient():
    # d k3 / d log pi = 1 - pi_ref / pi; against the closed form and against central differences.
    logps, _, ref_logps, _, _ = random_batch(4)
    value = lambda x: grpo_token_loss(x, x.detach(), ref_logps, torch.zeros(len(x)), 0.2, 0.2, 1.0)[0]
    x = logps.clone().requires_grad_()
    value(x).sum().backward()
    torch.testing.assert_close(x.grad, 1 - (ref_logps - logps).exp(), rtol=1e-10, atol=1e-12)
    h = 1e-6
    torch.testing.assert_close(x.grad, (value(logps + h) - value(logps - h)) / (2 * h), rtol=1e-6, atol=1e-8)


# ----------------------------------------------------------------------------------------------------------------------
# Aggregation: the mean over tokens, however the step is split.

@pytest.mark.parametrize("loss_agg", ["sequence_mean", "token_mean", "constant"])
def test_token_weights_equal_a_loop(loss_agg):
    logps, _, _, _, lengths = random_batch(5)
    mask = mask_from_lengths(lengths, 5)
    got = (token_weights(mask, loss_agg, len(lengths), lengths.sum().item(), 7) * logps).sum().item()
    rows = [[logps[i, t].item() for t in range(n)] for i, n in enumerate(lengths.tolist())]
    expected = {"sequence_mean": sum(sum(row) / len(row) for row in rows) / len(rows),
                "token_mean": sum(sum(row) for row in rows) / sum(len(row) for row in rows),
                "constant": sum(sum(row) for row in rows) / (len(rows) * 7)}[loss_agg]
    assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss_agg", ["sequence_mean", "token_mean", "constant"])
def test_weights_do_not_depend_on_the_split_or_on_padding(loss_agg):
    lengths = torch.tensor([1, 5, 3, 2])
    counts = (len(lengths), lengths.sum().item(), 9)
    whole = token_weights(mask_from_lengths(lengths, 5), loss_agg, *counts)
    parts = torch.cat([token_weights(mask_from_lengths(part, 5), loss_agg, *counts) for part in lengths.split([1, 3])])
    padded = token_weights(mask_from_lengths(lengths, 8), loss_agg, *counts)
    assert torch.equal(whole, parts) and torch.equal(whole, padded[:, :5]) and not padded[:, 5:].any()


def test_rows_left_out_weigh_nothing():
    mask = mask_from_lengths(torch.tensor([3, 2]), 4) & torch.tensor([[True], [False]])
    for loss_agg in ("sequence_mean", "token_mean", "constant"):
        weights = token_weights(mask, loss_agg, 1, 3, 4)
        assert weights.isfinite().all() and not weights[1].any() and weights[0, :3].all()


def test_mask_has_the_end_token_and_nothing_after_it():
    mask = mask_from_lengths(torch.tensor([1, 3]), 4)
    assert mask.tolist() == [[True, False, False, False], [True, True, True, False]]


# ----------------------------------------------------------------------------------------------------------------------
# Rewards and arguments.

@pytest.mark.parametrize("text, good", [
    ("<think>a</think><answer>B</answer>", True), (" <think>a\nb</think>\n<answer>B</answer>\n", True),
    ("<think></think><answer></answer>", True), ("<answer>B</answer><think>a</think>", False),
    ("<think>a</think><answer>B</answer> more", False), ("before <think>a</think><answer>B</answer>", False),
    ("<think>a<think>b</think><answer>B</answer>", False),
    ("<think>a</think><answer>B</answer><answer>C</answer>", False),
    ("<think>a</think><answer>B", False), ("B", False), ("", False)])
def test_format_reward(text, good):
    assert format_reward(text, None) == float(good)


@pytest.mark.parametrize("wrong", [dict(group_size=1), dict(temperature=0.0), dict(kl_coef=-0.1), dict(clip_low=1.5),
                                   dict(loss_agg="mean"), dict(prompts_per_step=0), dict(learning_rate=float("nan")),
                                   dict(micro_batch_size=0), dict(max_completion_length=0), dict(num_updates=0)])
def test_arguments_out_of_range_are_refused(wrong):
    (name, value), = wrong.items()
    with pytest.raises(ValueError, match=f"--{name}.*{value}"):
        Args(**wrong)


# ----------------------------------------------------------------------------------------------------------------------
# Health: the phrase behind the progress line.

HEALTHY = {"reward": 0.5, "group_std": 0.3, "parse_rate": 0.9, "flat_group_frac": 0.3, "completion_length": 25.0,
           "truncated_frac": 0.0, "loss": 0.0, "grad_norm": 0.3, "lr": 1e-6, "entropy": 0.2, "sampler_gap": 1e-7,
           "kl": 0.02, "kl_peak": 0.1, "unreadable_frac_worst_rank": 0.0}


@pytest.mark.parametrize("changes, phrase", [
    ({}, "ok"), ({"loss": math.nan}, "not finite: loss"),
    ({"kl": math.inf, "kl_peak": math.nan}, "not finite: kl, kl_peak"),
    ({"unreadable_frac_worst_rank": 0.06}, "many unreadable videos"), ({"unreadable_frac_worst_rank": 0.05}, "ok"),
    ({"parse_rate": 0.4}, "most answers do not parse"), ({"truncated_frac": 0.3}, "completions do not end"),
    ({"flat_group_frac": 1.0, "grad_norm": 0.0}, "little signal: groups all right or all wrong"),
    ({"entropy": 0.001}, "entropy collapsed"), ({"sampler_gap": 0.2}, "sampler and learner disagree"),
    ({"kl_peak": 0.9}, "the KL is that of one token"), ({"kl_peak": 0.9, "kl": 0.001}, "ok"),
    ({"lr": 0.0}, "nothing is learned: the rate is 0"), ({"grad_norm": 0.0}, "nothing is learned: the gradient is 0")])
def test_each_sign_of_trouble_has_its_phrase(changes, phrase):
    metrics = {**HEALTHY, **changes}
    assert health(metrics, progress_line(metrics)[1]) == phrase


@pytest.mark.parametrize("kl", [[[0.5, 0.5], [0.5, 0.5]], [[7.0, 0.0], [0.0, 0.0]], [[0.1, 0.4], [2.0, 0.3]]])
def test_the_peak_of_the_kl_equals_a_loop(kl):
    # From the sums of a step as `main` makes them: 1 where one token has it all, 1 / sqrt(n) where n have the same.
    tokens = [value for row in kl for value in row]
    totals = dict.fromkeys(("reward", "group_std", "parsed", "concluded", "flat_groups", "tokens", "truncated"), 1.0)
    totals |= {"completions": 2, "prompts": 1, "learned_tokens": len(tokens)}
    sums = dict.fromkeys(("loss", "entropy", "clipped", "sampler_gap"), 0.0)
    sums |= {"kl": sum(tokens), "kl_squares": sum(value**2 for value in tokens)}
    metrics = step_metrics(totals, sums, {}, 0.1, 1e-6, Args())
    assert metrics["kl_peak"] == pytest.approx(math.dist(tokens, [0] * len(tokens)) / sum(tokens))
    assert metrics["kl"] == pytest.approx(sum(tokens) / len(tokens))
