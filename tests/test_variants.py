"""Every block of docs/variants.md, taken from the page and run, against loops over completions and tokens."""
import ast
import inspect
import itertools
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import grpo_video
import model
import runtime
import sampler
from grpo_video import grpo_token_loss, token_weights
from model import mask_from_lengths

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "variants.md").read_text()
# <!-- run: id (inputs) -> results -->, then the fence: id -> (inputs, results, code)
BLOCKS = {name: (inputs.split(", "), results.split(", "), code) for name, inputs, results, code in re.findall(
    r"<!-- run: (\w+) \(([\w, ]+)\) -> ([\w, ]+) -->\n```python\n(.*?)```", PAGE, re.DOTALL)}
# The same id -> the paragraph above the block, which says what it replaces.
PLACES = dict(reversed(pair) for pair in re.findall(r"\n\n([^\n](?:(?!\n\n).)*)\n\n<!-- run: (\w+) ", PAGE, re.DOTALL))


def run(name, **inputs):
    """What a block gives, in the namespace of grpo_video.py and of `inputs`: those that its comment names."""
    wanted, results, code = BLOCKS[name]
    assert set(inputs) == set(wanted)
    names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    assert set(results) <= {node.id for node in names if isinstance(node.ctx, ast.Store)}, "a result is never set"
    assert set(wanted) <= {node.id for node in names if isinstance(node.ctx, ast.Load)} | set(results), "unused input"
    namespace = {**vars(grpo_video), **inputs}
    exec(code, namespace)
    found = [namespace[result] for result in results]
    return found[0] if len(found) == 1 else found


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(seed, N=6, C=5):
    """Log-probs of four policies that differ enough for every bound to bite; behind the mask they are any numbers."""
    logps = -draw(seed, N, C).abs() - 0.1
    old_logps, ref_logps, sampler_logps = (logps + scale * draw(seed + k, N, C) for k, scale in
                                           ((100, 0.8), (200, 0.4), (300, 0.6)))
    lengths = torch.randint(1, C + 1, (N,), generator=torch.Generator().manual_seed(seed))
    return SimpleNamespace(logps=logps.requires_grad_(), old_logps=old_logps, ref_logps=ref_logps,
                           sampler_logps=sampler_logps, advantages=draw(seed + 400, N, 1), lengths=lengths,
                           mask=mask_from_lengths(lengths, C), weights=draw(seed + 500, N, C))


def same(result, logps, mask, weights, expected, gradient=None, rel=1e-9):
    """A result (N, C), or (N, 1) or so, against `expected(x, i, t)`, where x are the log-probs as lists.

    Its gradient, under random weights, against central differences of the loop, or against `gradient(x, i, t)`, that of
    the token's own loss, where the formula stops the gradient of a part.
    """
    x, w, h = logps.tolist(), (weights * mask).tolist(), 1e-6
    tokens = [(i, t) for i, t in itertools.product(range(mask.shape[0]), range(mask.shape[1])) if mask[i, t]]
    for i, t in tokens:
        assert result[i, t].item() == pytest.approx(expected(x, i, t), rel=rel, abs=1e-12)
    got, = torch.autograd.grad((result * weights)[mask].sum(), logps)

    def total(i, t, step):
        moved = [list(row) for row in x]
        moved[i][t] += step
        return sum(w[j][s] * expected(moved, j, s) for j, s in tokens if j == i)

    for i, t in tokens:
        slope = (total(i, t, h) - total(i, t, -h)) / (2 * h) if gradient is None else w[i][t] * gradient(x, i, t)
        assert got[i, t].item() == pytest.approx(slope, rel=1e-6, abs=1e-7)
    assert not got[~mask].any()


# ----------------------------------------------------------------------------------------------------------------------
# The page itself.

def test_every_block_of_the_page_is_run_by_a_test():
    tested = set(re.findall(r'run\("(\w+)"', Path(__file__).read_text()))
    assert tested == set(BLOCKS)
    assert PAGE.count("```python") == PAGE.count("<!-- run:") == len(BLOCKS), "a block without an id, or one id twice"


@pytest.mark.parametrize("name", BLOCKS)
def test_the_lines_that_a_block_replaces_are_in_the_code(name):
    text = " ".join(PLACES[name].split())
    # "Replaces `line` and `line` in `function`"; After, Before likewise.
    (lines, function), = re.findall(r"(?:Replaces|After|Before) (`[^`]+`(?: and `[^`]+`)*) in `(\w+)`", text)
    place = next(getattr(module, function) for module in (grpo_video, model, sampler) if hasattr(module, function))
    for line in re.findall(r"`([^`]+)`", lines):
        assert any(found.strip().startswith(line) for found in inspect.getsource(place).split("\n")), line


def test_every_link_and_every_flag_of_the_page_leads_somewhere():
    headings = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"\n#+ (.*)", PAGE)}
    links = re.findall(r"\]\(([^)]+)\)", PAGE)
    assert {link[1:] for link in links if link.startswith("#")} <= headings
    files = [link for link in links if not link.startswith("#")]
    assert files and all((Path(__file__).parent.parent / "docs" / link).is_file() for link in files)
    flags = set(re.findall(r"--([a-z]\w+)", PAGE))
    assert {flag.removeprefix("no_") for flag in flags} <= set(vars(grpo_video.Args())), flags


def test_every_ablation_that_the_page_names_is_marked_in_the_code():
    code = "".join(inspect.getsource(module) for module in (grpo_video, model, sampler))
    marks = re.findall(r"`(# ABLATE: [^`]+)`", PAGE)
    assert len(marks) > 5 and all(mark in code for mark in marks), marks


def test_the_lines_of_the_page_are_short():
    assert max(len(line) for line in PAGE.split("\n") if not line.startswith("|")) <= 150


# ----------------------------------------------------------------------------------------------------------------------
# 1 sample

@pytest.mark.parametrize("wanted, learned_groups", [(2, [1, 3]), (0, []), (9, [1, 3, 4])])
def test_dynamic_sampling_learns_the_first_groups_with_a_signal(wanted, learned_groups):
    flat = torch.tensor([True, False, True, False, False])
    learned = run("dynamic_sampling", flat=flat, wanted=wanted, args=SimpleNamespace(group_size=2))
    assert learned.tolist() == [n // 2 in learned_groups for n in range(10)]


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_top_p_keeps_the_likeliest_tokens_and_the_learner_finds_their_log_probs_again(top_p):
    logits = draw(1, 4, 6).requires_grad_()
    nucleus_probs, kept = run("top_p", probs=logits.detach().softmax(-1), top_p=top_p)
    learner = run("keep_sampling_mask", logits=logits, kept=kept)
    for r, row in enumerate(logits.tolist()):
        probs = [math.exp(z) / sum(math.exp(y) for y in row) for z in row]
        nucleus, total = [], 0.0
        for v in sorted(range(6), key=lambda v: -probs[v]):
            if total < top_p:
                nucleus.append(v)
            total += probs[v]
        assert kept[r].tolist() == [v in nucleus for v in range(6)]
        rest = sum(math.exp(row[v]) for v in nucleus)
        for v in range(6):
            expected = row[v] - math.log(rest) if v in nucleus else -math.inf
            assert nucleus_probs[r, v].item() == pytest.approx(math.exp(expected), rel=1e-9, abs=1e-12)
            assert learner[r, v].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)
        # d log p_a / d z_v = [a = v] - p_v in the nucleus, 0 outside of it
        a = nucleus[-1]
        got, = torch.autograd.grad(learner[r, a], logits, retain_graph=True)
        for v in range(6):
            slope = (v == a) - math.exp(row[v]) / rest if v in nucleus else 0.0
            assert got[r, v].item() == pytest.approx(slope, rel=1e-9, abs=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# 2 reward

def test_soft_overlong_punishment_equals_a_loop():
    rewards, lengths = draw(2, 3, 2), [1, 6, 7, 8, 9, 10]
    got = run("overlong_punishment", rewards=rewards, rollout=SimpleNamespace(lengths=torch.tensor(lengths)),
              args=SimpleNamespace(max_completion_length=10, group_size=2), soft_tokens=4)
    punishments = [0, 0, 0.25, 0.5, 0.75, 1]  # from token 7 on, a quarter for each
    for n, punishment in enumerate(punishments):
        assert got[n // 2, n % 2].item() == pytest.approx(rewards[n // 2, n % 2].item() - punishment)


def test_kl_in_the_reward_equals_a_loop():
    b, rewards = batch(3), draw(3, 3, 2)
    got = run("kl_in_reward", rewards=rewards, old_logps=b.old_logps, ref_logps=b.ref_logps,
              rollout=SimpleNamespace(completion_mask=b.mask), args=SimpleNamespace(kl_coef=0.3, group_size=2))
    for n, length in enumerate(b.lengths.tolist()):
        log_ratio = sum(b.old_logps[n, t].item() - b.ref_logps[n, t].item() for t in range(length))
        assert got[n // 2, n % 2].item() == pytest.approx(rewards[n // 2, n % 2].item() - 0.3 * log_ratio, rel=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# 3 advantage

def std(values, ddof):
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - ddof))


def test_rloo_is_the_reward_minus_the_mean_of_the_others():
    rewards = draw(4, 3, 4)
    got = run("rloo", rewards=rewards, centred=rewards - rewards.mean(dim=1, keepdim=True))
    for b, group in enumerate(rewards.tolist()):
        for g, reward in enumerate(group):
            others = group[:g] + group[g + 1:]
            assert got[b, g].item() == pytest.approx(reward - sum(others) / len(others), rel=1e-9)


@pytest.fixture(scope="module")
def device():
    """Joins a process group of one, where none is there yet: `sum_over_ranks` is a collective."""
    return runtime.setup()[2]


def test_the_std_of_the_batch_is_one_for_all_groups(device):
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    got = run("batch_std", rewards=rewards, device=device)
    centred = [r - sum(group) / 4 for group in rewards.tolist() for r in group]
    for n, value in enumerate(centred):
        assert got[n].item() == pytest.approx(value / (std(centred, 0) + 1e-4), rel=1e-9, abs=1e-12)


def test_gdpo_normalises_each_reward_in_its_group_and_then_adds():
    # In the second group only a reward of weight 0 differs, in the third both rewards do but not their sum, in the last
    # one of the two does.
    terms = {"accuracy": torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 0, 0], dtype=torch.float64),
             "format": torch.tensor([1.0, 1, 1, 0, 1, 1, 1, 1, 2, 0, 2, 0, 1, 1, 1, 1], dtype=torch.float64),
             "unused": draw(5, 16)}
    table = {"accuracy": (1.0, None), "format": (0.5, None), "unused": (0.0, None)}
    advantages, flat = run("gdpo", terms=terms, table=table, args=SimpleNamespace(group_size=4))
    for n in range(16):
        expected = 0
        for name, (weight, _) in table.items():
            group = terms[name].tolist()[n // 4 * 4:n // 4 * 4 + 4]
            expected += weight * (group[n % 4] - sum(group) / 4) / (std(group, 1) + 1e-4)
        assert advantages[n].item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert flat.tolist() == [False, True, False, False]


@pytest.mark.parametrize("loss_agg, expected", [
    ("sequence_mean", [[1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0]]), ("token_mean", [[1 / 4, 1 / 4, 1 / 4], [1 / 4, 0, 0]]),
    ("constant", [[1 / 10, 1 / 10, 1 / 10], [1 / 10, 0, 0]])])
def test_flat_groups_out_of_the_denominators_leave_the_mean_of_what_is_learned(loss_agg, expected):
    # Two completions of 3 tokens and 1 are learned; a flat group has two more, which no longer count.
    mask = mask_from_lengths(torch.tensor([3, 1, 2, 3]), 3)
    weights = run("filtered_denominators", rollout=SimpleNamespace(completion_mask=mask),
                  args=SimpleNamespace(loss_agg=loss_agg, max_completion_length=5),
                  totals={"completions": 4.0, "tokens": 9.0, "learned": 2.0, "learned_tokens": 4.0})
    torch.testing.assert_close(weights[:2], torch.tensor(expected))


@pytest.mark.parametrize("learn_flat_groups", [False, True])
def test_overlong_filtering_leaves_out_what_was_cut_off(learn_flat_groups):
    flat, ended = [False, True, False], [True, False, True, False, True, True]
    got = run("overlong_filtering", flat=torch.tensor(flat), rollout=SimpleNamespace(ended=torch.tensor(ended)),
              args=SimpleNamespace(group_size=2, learn_flat_groups=learn_flat_groups))
    assert got.tolist() == [ended[n] and (learn_flat_groups or not flat[n // 2]) for n in range(6)]


# ----------------------------------------------------------------------------------------------------------------------
# 4 ratio, 5 objective

def clipped_objective(ratio, A, clip_low=0.2, clip_high=0.3):
    return -min(ratio * A, max(1 - clip_low, min(1 + clip_high, ratio)) * A)


@pytest.mark.parametrize("seed", range(3))
def test_dual_clip_equals_a_loop(seed):
    b = batch(seed)
    b.old_logps = b.old_logps - 0.7 * (draw(seed + 600, 6, 1) > 0)  # some ratios above 3
    loss = grpo_token_loss(b.logps, b.old_logps, None, b.advantages[:, 0], 0.2, 0.3, 0.0)[0]
    got = run("dual_clip", loss=loss, advantages=b.advantages)

    def expected(x, i, t):
        A, ratio = b.advantages[i].item(), math.exp(x[i][t] - b.old_logps[i, t].item())
        return min(clipped_objective(ratio, A), -3 * A) if A < 0 else clipped_objective(ratio, A)

    same(got, b.logps, b.mask, b.weights, expected)


def test_dual_clip_cuts_the_gradient_of_a_bad_token_above_three_and_no_other():
    # ratio, A, whether the gradient flows
    cases = [(2.9, -1, True), (3.1, -1, False), (0.5, -1, False), (0.9, 1, True), (3.1, 1, False)]
    logps = torch.tensor([[math.log(ratio)] for ratio, _, _ in cases], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([[A] for _, A, _ in cases], dtype=torch.float64)
    loss = grpo_token_loss(logps, torch.zeros_like(logps), None, advantages[:, 0], 0.2, 0.2, 0.0)[0]
    run("dual_clip", loss=loss, advantages=advantages).sum().backward()
    assert [bool(g) for g in logps.grad[:, 0]] == [flows for _, _, flows in cases]


@pytest.mark.parametrize("seed", range(3))
def test_gspo_equals_a_loop(seed):
    b = batch(seed)
    got = run("gspo", logps=b.logps, old_logps=b.old_logps, mask=b.mask, advantages=b.advantages, clip_low=0.1,
              clip_high=0.2)

    def expected(x, i, t):
        length = b.lengths[i].item()
        product = math.prod(math.exp(x[i][s]) / math.exp(b.old_logps[i, s].item()) for s in range(length))
        return clipped_objective(product ** (1 / length), b.advantages[i].item(), 0.1, 0.2)

    same(got, b.logps, b.mask, b.weights, expected)


def test_gspo_with_one_update_has_the_gradient_of_sequence_mean():
    b = batch(1)
    gradients = {}
    for loss_agg in ("sequence_mean", "token_mean"):
        weights = token_weights(b.mask, loss_agg, 6, b.lengths.sum().item(), 5).double()
        gspo = run("gspo", logps=b.logps, old_logps=b.logps.detach(), mask=b.mask, advantages=b.advantages,
                   clip_low=3e-4, clip_high=4e-4)
        ours = grpo_token_loss(b.logps, b.logps.detach(), None, b.advantages[:, 0], 0.2, 0.2, 0.0)[0]
        gradients[loss_agg] = [torch.autograd.grad((loss * weights).sum(), b.logps)[0] for loss in (gspo, ours)]
        torch.testing.assert_close(*gradients[loss_agg], rtol=1e-6, atol=1e-9)  # the weights are float32
    # So GSPO with a token mean is the token mean, and not GSPO.
    assert not torch.allclose(gradients["sequence_mean"][0], gradients["token_mean"][0], rtol=0.1)


def test_gspo_with_a_token_mean_weighs_long_answers_more():
    b = batch(2)
    loss = run("gspo", logps=b.logps, old_logps=b.old_logps, mask=b.mask, advantages=torch.ones(6, 1), clip_low=0.99,
               clip_high=99.0)
    for loss_agg, share in (("sequence_mean", [1 / 6] * 6), ("token_mean", (b.lengths / b.lengths.sum()).tolist())):
        weights = token_weights(b.mask, loss_agg, 6, b.lengths.sum().item(), 5)
        for i in range(6):
            assert (loss * weights)[i].sum().item() == pytest.approx(share[i] * loss[i, 0].item(), rel=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_cispo_equals_a_loop(seed):
    b = batch(seed)
    got = run("cispo", logps=b.logps, ratio=(b.logps - b.old_logps).exp(), advantages=b.advantages, clip_high=0.3)
    weight = lambda x, i, t: min(math.exp(x[i][t]) / math.exp(b.old_logps[i, t].item()), 1.3)  # no lower bound
    same(got, b.logps, b.mask, b.weights, lambda x, i, t: -weight(x, i, t) * b.advantages[i].item() * x[i][t],
         gradient=lambda x, i, t: -weight(x, i, t) * b.advantages[i].item())


@pytest.mark.parametrize("seed", range(3))
def test_sapo_equals_a_loop(seed):
    b = batch(seed)
    got = run("sapo", ratio=(b.logps - b.old_logps).exp(), advantages=b.advantages)

    def expected(x, i, t):
        A, ratio = b.advantages[i].item(), math.exp(x[i][t]) / math.exp(b.old_logps[i, t].item())
        tau = 1.0 if A > 0 else 1.05
        return -4 / tau / (1 + math.exp(-tau * (ratio - 1))) * A

    same(got, b.logps, b.mask, b.weights, expected, rel=1e-6)  # tau is a float32


@pytest.mark.parametrize("seed", range(3))
def test_reinforce_equals_a_loop_and_the_first_update(seed):
    b = batch(seed)
    got = lambda: run("reinforce", logps=b.logps, advantages=b.advantages)
    same(got(), b.logps, b.mask, b.weights, lambda x, i, t: -b.advantages[i].item() * x[i][t])
    first = grpo_token_loss(b.logps, b.logps.detach(), None, b.advantages[:, 0], 0.2, 0.2, 0.0)[0]
    ratio = (b.logps - b.logps.detach()).exp()
    sapo = run("sapo", ratio=ratio, advantages=b.advantages)
    cispo = run("cispo", logps=b.logps, ratio=ratio, advantages=b.advantages, clip_high=0.2)
    reinforce, *others = (torch.autograd.grad((x * b.weights).sum(), b.logps)[0] for x in (got(), first, sapo, cispo))
    for other in others:
        torch.testing.assert_close(reinforce, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_truncated_importance_sampling_equals_a_loop(seed):
    b = batch(seed)
    loss = grpo_token_loss(b.logps, b.old_logps, None, b.advantages[:, 0], 0.2, 0.3, 0.0)[0]
    got = run("tis", loss=loss, old_logps=b.old_logps, sampler_logps=b.sampler_logps)

    def expected(x, i, t):
        ratio = math.exp(x[i][t] - b.old_logps[i, t].item())
        mismatch = math.exp(b.old_logps[i, t].item()) / math.exp(b.sampler_logps[i, t].item())
        return min(mismatch, 2) * clipped_objective(ratio, b.advantages[i].item())

    same(got, b.logps, b.mask, b.weights, expected)


def behind_the_end(x, mask):
    """The same numbers with what a sampler may leave behind the end of a completion."""
    return torch.where(mask, x, -math.inf)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_the_sequence_mask_equals_a_loop(seed):
    b = batch(seed)
    loss = grpo_token_loss(b.logps, b.old_logps, None, b.advantages[:, 0], 0.2, 0.3, 0.0)[0]
    got = run("sequence_mask", loss=loss, old_logps=b.old_logps, sampler_logps=behind_the_end(b.sampler_logps, b.mask),
              mask=b.mask)
    dropped = []

    def expected(x, i, t):
        ratio = math.exp(x[i][t] - b.old_logps[i, t].item())
        weight = math.prod(math.exp(b.old_logps[i, s].item() - b.sampler_logps[i, s].item())
                           for s in range(b.lengths[i].item()))
        dropped.append(weight > 3)
        return (0 if weight > 3 else weight) * clipped_objective(ratio, b.advantages[i].item())

    same(got, b.logps, b.mask, b.weights, expected)
    assert any(dropped) and not all(dropped)


@pytest.mark.parametrize("seed", range(3))
def test_the_off_policy_sequence_mask_equals_a_loop(seed):
    b = batch(seed, N=24)
    loss = grpo_token_loss(b.logps, b.old_logps, None, b.advantages[:, 0], 0.2, 0.3, 0.0)[0]
    sampler_logps = b.sampler_logps - 0.1  # only some have drifted by more than delta
    got = run("off_policy_mask", loss=loss, logps=b.logps, sampler_logps=behind_the_end(sampler_logps, b.mask),
              mask=b.mask, advantages=b.advantages, delta=0.1)
    dropped = []

    def expected(x, i, t):
        ratio, A, length = math.exp(x[i][t] - b.old_logps[i, t].item()), b.advantages[i].item(), b.lengths[i].item()
        drift = sum(sampler_logps[i, s].item() - x[i][s] for s in range(length)) / length
        dropped.append((A < 0, drift > 0.1))
        return 0 if A < 0 and drift > 0.1 else clipped_objective(ratio, A)

    same(got, b.logps, b.mask, b.weights, expected)
    assert set(dropped) == {(True, True), (True, False), (False, True), (False, False)}


# ----------------------------------------------------------------------------------------------------------------------
# 6 KL

def kl_of(name, logps, ref_logps, old_logps=None):
    """One of the estimators, k3 being the one that is built in."""
    log_ratio_ref = ref_logps - logps
    if name == "k3":
        return grpo_token_loss(logps, logps.detach(), ref_logps, torch.zeros(len(logps)), 0.2, 0.2, 1.0)[0]
    return {"k1": lambda: run("k1", log_ratio_ref=log_ratio_ref), "k2": lambda: run("k2", log_ratio_ref=log_ratio_ref),
            "k3+": lambda: run("k3_with_k2_gradient", log_ratio_ref=log_ratio_ref),
            "reweighted": lambda: run("kl_reweighted", log_ratio_ref=log_ratio_ref, ratio=(
                logps - (logps.detach() if old_logps is None else old_logps)).exp())}[name]()


@pytest.mark.parametrize("seed", range(3))
def test_kl_estimators_equal_a_loop(seed):
    b = batch(seed)
    log_ratio = lambda x, i, t: x[i][t] - b.ref_logps[i, t].item()
    k3 = lambda x, i, t: math.exp(-log_ratio(x, i, t)) + log_ratio(x, i, t) - 1
    same(kl_of("k1", b.logps, b.ref_logps), b.logps, b.mask, b.weights, log_ratio)
    same(kl_of("k2", b.logps, b.ref_logps), b.logps, b.mask, b.weights, lambda x, i, t: log_ratio(x, i, t) ** 2 / 2)
    same(kl_of("k3+", b.logps, b.ref_logps), b.logps, b.mask, b.weights, k3, gradient=log_ratio)
    same(kl_of("reweighted", b.logps, b.ref_logps, b.old_logps), b.logps, b.mask, b.weights,
         lambda x, i, t: math.exp(x[i][t]) / math.exp(b.old_logps[i, t].item()) * k3(x, i, t))


V = 5  # a vocabulary small enough to take each expectation over all of it


def expected_kl(name, theta, theta_ref, theta_old=None):
    """E[kl] and E[gradient of kl] for theta (V,), over all tokens drawn from pi_old, or from pi_theta."""
    theta = theta.clone().requires_grad_()
    logps, ref_logps = theta.log_softmax(-1)[:, None], theta_ref.log_softmax(-1)[:, None]  # N = V, C = 1
    old_logps = logps.detach() if theta_old is None else theta_old.log_softmax(-1)[:, None]
    mean = (old_logps.exp() * kl_of(name, logps, ref_logps, old_logps)).sum()
    return mean.item(), torch.autograd.grad(mean, theta)[0]


def true_kl(p_logits, q_logits, of):
    """KL(p || q) and its gradient for the logits `of`, both by loops and central differences."""
    def value(p_logits, q_logits):
        p, q = ([math.exp(z) / sum(math.exp(y) for y in logits) for z in logits] for logits in (p_logits, q_logits))
        return sum(a * math.log(a / b) for a, b in zip(p, q))

    def moved(v, step):
        both = {"p": p_logits.tolist(), "q": q_logits.tolist()}
        both[of][v] += step
        return value(both["p"], both["q"])

    slopes = [(moved(v, 1e-6) - moved(v, -1e-6)) / 2e-6 for v in range(V)]
    return value(p_logits.tolist(), q_logits.tolist()), torch.tensor(slopes, dtype=torch.float64)


@pytest.mark.parametrize("name, unbiased, gradient", [
    ("k1", True, "none"), ("k2", False, "kl"), ("k3", True, "other direction"), ("k3+", True, "kl"),
    ("reweighted", True, "kl")])
def test_in_expectation_k2_has_the_gradient_of_the_kl_and_k3_that_of_the_other_direction(name, unbiased, gradient):
    theta, theta_ref = draw(7, V), draw(8, V)
    (kl, kl_gradient), (_, other) = true_kl(theta, theta_ref, "p"), true_kl(theta_ref, theta, "q")
    mean, got = expected_kl(name, theta, theta_ref)
    assert (abs(mean - kl) < 1e-9) == unbiased
    close = lambda a, b: torch.allclose(a, b, rtol=1e-6, atol=1e-8)
    assert close(got, kl_gradient) == (gradient == "kl")
    assert close(got, other) == (gradient == "other direction")
    assert close(got, torch.zeros(V, dtype=torch.float64)) == (gradient == "none")
    assert not close(kl_gradient, other)


@pytest.mark.parametrize("name", ["k1", "k2", "k3", "k3+", "reweighted"])
def test_at_the_reference_no_kl_estimator_pulls(name):
    assert expected_kl(name, draw(7, V), draw(7, V))[1].abs().max() < 1e-12


@pytest.mark.parametrize("name, exact", [("reweighted", True), ("k2", False), ("k3", False), ("k3+", False)])
def test_on_old_samples_only_the_reweighted_kl_is_the_kl(name, exact):
    theta, theta_ref, theta_old = draw(7, V), draw(8, V), draw(9, V)
    (kl, kl_gradient), (mean, got) = true_kl(theta, theta_ref, "p"), expected_kl(name, theta, theta_ref, theta_old)
    assert (abs(mean - kl) < 1e-9) == exact
    assert torch.allclose(got, kl_gradient, rtol=1e-6, atol=1e-8) == exact


# ----------------------------------------------------------------------------------------------------------------------
# 7 update

def pasted_token_logps():
    """`token_logps` of model.py with the page's lines in the place of its own."""
    source = inspect.getsource(model.token_logps)
    _, _, code = BLOCKS["entropy"]
    first, second = re.findall(r"^ +(?:probs|entropy) = .*\n", source, re.MULTILINE)
    indent = first[:len(first) - len(first.lstrip())]
    lines = "".join(indent + line + "\n" for line in code.splitlines())
    namespace = dict(vars(model))
    exec(source.replace(first, "").replace(second, lines), namespace)
    return namespace["token_logps"]


@pytest.mark.parametrize("banned", [[], [1, 3]])
def test_the_entropy_of_the_page_teaches_and_the_one_that_is_logged_does_not(banned):
    hidden, weight, targets, temperature = draw(10, 3, 4).requires_grad_(), draw(11, 6, 4), torch.tensor([0, 2, 5]), 0.7
    args = (hidden, weight, targets, temperature, torch.tensor(banned) if banned else None)
    logps, logged = model.token_logps(*args)
    same_logps, entropy = pasted_token_logps()(*args)
    assert logps.requires_grad and not logged.requires_grad and entropy.requires_grad
    torch.testing.assert_close((logps, logged), (same_logps, entropy.detach()), rtol=1e-12, atol=1e-12)
    got, = torch.autograd.grad(entropy.sum(), hidden)
    for i, row in enumerate(hidden.tolist()):
        logits = [sum(a * b for a, b in zip(row, w)) / temperature for w in weight.tolist()]
        total = sum(math.exp(z) for v, z in enumerate(logits) if v not in banned)
        probs = [0.0 if v in banned else math.exp(z) / total for v, z in enumerate(logits)]
        H = -sum(p * math.log(p) for p in probs if p > 0)
        assert entropy[i].item() == pytest.approx(H, rel=1e-9)
        # dH / dz_v = -p_v (log p_v + H)
        slopes = [-p * (math.log(p) + H) if p > 0 else 0.0 for p in probs]
        for d in range(4):
            slope = sum(s * w[d] for s, w in zip(slopes, weight.tolist())) / temperature
            assert got[i, d].item() == pytest.approx(slope, rel=1e-8, abs=1e-10)


def test_the_entropy_block_equals_a_loop():
    logits = draw(12, 4, V).requires_grad_()
    log_probs = logits.index_fill(1, torch.tensor([2]), -math.inf).log_softmax(-1)  # a banned token
    entropy = run("entropy", logits=log_probs)
    got, = torch.autograd.grad(entropy.sum(), logits)
    for r in range(4):
        p = [math.exp(x) for x in log_probs[r].tolist()]
        H = -sum(x * math.log(x) for x in p if x > 0)
        assert entropy[r].item() == pytest.approx(H, rel=1e-9)
        for v in range(V):
            assert got[r, v].item() == pytest.approx(-p[v] * (math.log(p[v]) + H) if p[v] else 0.0, rel=1e-9, abs=1e-12)


def test_an_entropy_bonus_moves_the_policy_only_if_the_entropy_carries_a_gradient():
    logits = draw(13, 6, V).requires_grad_()
    log_probs = logits.log_softmax(-1)
    token_loss = -log_probs[:, :1] * draw(14, 6, 1)  # any loss of the first token's log-prob
    entropy = run("entropy", logits=log_probs)[:, None]
    gradients = []
    for bonus in (entropy, entropy.detach(), 0 * entropy):
        loss = run("entropy_bonus", token_loss=token_loss, entropy=bonus, entropy_coef=0.1)
        for i in range(6):
            assert loss[i].item() == pytest.approx(token_loss[i].item() - 0.1 * bonus[i].item(), rel=1e-9)
        gradients.append(torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0])
    torch.testing.assert_close(gradients[0] - gradients[2], -0.1 * torch.autograd.grad(entropy.sum(), logits)[0])
    assert gradients[0].sub(gradients[2]).abs().max() > 1e-3 and torch.equal(gradients[1], gradients[2])


def test_warm_up_rises_to_the_schedule_and_never_wastes_a_step():
    num_steps, warmup_steps = 10, 4
    for step in range(num_steps):
        schedule = 2e-4 * (1 - step / num_steps)
        expected = schedule * (step + 1) / 4 if step < 4 else schedule
        got = run("warm_up", lr=schedule, step=step, warmup_steps=warmup_steps)
        assert got == pytest.approx(expected) and got > 0
