"""Qwen2-VL under our hands against Hugging Face's forward, generate and save: log-probs, sampling, weights, files."""
import copy
import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageTextToText, AutoTokenizer, GenerationConfig, Qwen2VLForConditionalGeneration

import model as model_module
import toy
from bench import normalised
from conftest import same_gradients
from gpu_parts import uncaptured
from grpo_video import TOY, Args, sample_groups
from model import (
    Policy,
    SharedPrompts,
    collate_prompts,
    end_token_ids,
    mask_from_lengths,
    token_logps,
    vision_token_ids,
)
from runtime import copy_weights, export, load_policy, load_sampler, make_sampler
from sampler import CapturedCache, GroupCache, answer_texts, draw, generate


def load_args(**changes):
    return SimpleNamespace(**{"model": str(toy.BASE), "dtype": "float32", "gradient_checkpointing": False, "seed": 0,
                              "freeze_vision": False, "lora_rank": 0, "lora_alpha": 32.0, **changes})


@pytest.fixture(scope="module")
def qwen(device):
    return load_sampler(load_args(), device)


@pytest.fixture(scope="module")
def qwen64(device):
    return load_sampler(load_args(dtype="float64"), device)


def sample(qwen, tokenizer, examples, G=4, C=24, temperature=1.0, seeds=None):
    prompts = collate_prompts(examples, qwen.device)
    seeds = (seeds or range(len(examples))) if temperature else None
    ends, banned = end_token_ids(qwen, tokenizer, qwen.device), vision_token_ids(qwen, qwen.device)
    completions = generate(qwen, prompts, G, C, temperature, seeds, ends, banned)
    return prompts, completions.ids, completions.lengths, completions.logps


def teacher_forced(qwen, prompts, ids, lengths, G, temperature=1.0):
    policy = Policy(qwen, next(qwen.parameters()).dtype)
    return policy(prompts, torch.arange(len(ids)) // G, ids, mask_from_lengths(lengths, ids.shape[1]), temperature,
                  vision_token_ids(qwen, qwen.device))


def hf_inputs(example, ids=None):
    """What Hugging Face wants for one example: no position ids, it computes its own."""
    ids = example.prompt_ids if ids is None else torch.cat([example.prompt_ids, ids])
    names = ("pixel_values_videos", "video_grid_thw", "pixel_values", "image_grid_thw")
    example = normalised(example)
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None],
            **{name: getattr(example, name) for name in names if getattr(example, name) is not None}}


def with_token_types(qwen, inputs):
    ids = inputs["input_ids"]
    types = (ids == qwen.config.image_token_id).int() + 2 * (ids == qwen.config.video_token_id).int()
    return {**inputs, "mm_token_type_ids": types}


# ----------------------------------------------------------------------------------------------------------------------
# Log-probs.

@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logps_equal_teacher_forced_ones(qwen, tokenizer, ragged, temperature):
    # Batched, ragged prompts, video + image and image only, ended and cut-off completions.
    prompts, ids, lengths, logps = sample(qwen, tokenizer, ragged, C=24, temperature=temperature)
    assert len(set(lengths.tolist())) > 1, "completions of equal length would not test the mask"
    forced, _ = teacher_forced(qwen, prompts, ids, lengths, G=4, temperature=temperature)
    mask = mask_from_lengths(lengths, ids.shape[1])
    torch.testing.assert_close(logps[mask], forced[mask].detach(), rtol=0, atol=2e-5)
    assert not forced[~mask].any()


def test_logps_equal_hugging_face_full_logits(qwen64, tokenizer, ragged):
    prompts, ids, lengths, _ = sample(qwen64, tokenizer, ragged, G=2)
    ours, entropy = teacher_forced(qwen64, prompts, ids, lengths, G=2)
    for n in range(len(ids)):
        example, P, L = ragged[n // 2], len(ragged[n // 2].prompt_ids), lengths[n].item()
        after = prompts.next_position[n // 2] + torch.arange(L)
        position_ids = torch.cat([example.position_ids, after.expand(3, -1)], 1)
        logits = qwen64(**hf_inputs(example, ids[n, :L]), position_ids=position_ids[:, None]).logits[0]  # (P + L, V)
        logits[:, vision_token_ids(qwen64, qwen64.device)] = -torch.inf
        expected = logits.log_softmax(-1)[P - 1:-1]
        torch.testing.assert_close(ours[n, :L].detach(), expected.gather(1, ids[n, :L, None])[:, 0], rtol=0, atol=1e-6)
        expected_entropy = torch.distributions.Categorical(logits=logits[P - 1:-1].clamp(min=-1e9)).entropy()
        torch.testing.assert_close(entropy[n, :L], expected_entropy, rtol=0, atol=1e-6)


def test_positions_are_hugging_faces_where_the_video_is_short(qwen64, tokenizer, ragged):
    # Up to as many time steps as rows of tokens, Hugging Face's positions give the same log-probs (see rope_positions).
    example = ragged[1]
    assert example.video_grid_thw[0, 0] <= example.video_grid_thw[0, 1] // 2
    prompts, ids, lengths, _ = sample(qwen64, tokenizer, [example], G=1)
    ids = ids[:, :lengths[0]]
    ours, _ = teacher_forced(qwen64, prompts, ids, lengths, G=1)
    with torch.no_grad():
        logits = qwen64(**with_token_types(qwen64, hf_inputs(example, ids[0]))).logits[0]
    logits[:, vision_token_ids(qwen64, qwen64.device)] = -torch.inf
    expected = logits.log_softmax(-1)[len(example.prompt_ids) - 1:-1].gather(1, ids[0, :, None])[:, 0]
    torch.testing.assert_close(ours[0].detach(), expected, rtol=0, atol=1e-6)


def test_gradients_equal_hugging_faces_and_prompt_tokens_are_not_trained(qwen64, tokenizer, ragged):
    # The oracle is a full forward whose labels are -100 on the prompt: any gradient from a prompt token would show.
    example = ragged[1]
    target = torch.tensor(tokenizer("<think>I see wash pot.</think><answer>A</answer><|im_end|>")["input_ids"])
    ours, theirs = copy.deepcopy(qwen64).requires_grad_(), copy.deepcopy(qwen64).requires_grad_()
    prompts = collate_prompts([example], torch.device("cpu"))
    mask = torch.ones(1, len(target), dtype=torch.bool)
    logps, _ = Policy(ours, torch.float64)(prompts, torch.tensor([0]), target[None], mask)
    (-logps.mean()).backward()
    labels = torch.cat([torch.full_like(example.prompt_ids, -100), target])[None]
    loss = theirs(**with_token_types(theirs, hf_inputs(example, target)), labels=labels).loss
    loss.backward()
    torch.testing.assert_close(-logps.mean().float(), loss, rtol=1e-6, atol=0)  # Hugging Face computes it in float32
    same_gradients(ours, theirs, rtol=1e-5)


def test_micro_batches_and_padding_change_neither_logps_nor_gradients(qwen64, tokenizer, ragged):
    prompts, ids, lengths, _ = sample(qwen64, tokenizer, ragged, G=2)
    mask = mask_from_lengths(lengths, ids.shape[1])
    weights = torch.randn(ids.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * mask
    whole, split = (Policy(copy.deepcopy(qwen64).requires_grad_(), torch.float64) for _ in range(2))
    logps, _ = whole(prompts, torch.arange(8) // 2, ids, mask)
    (logps * weights).sum().backward()
    for n in range(8):  # each row alone: its prompt unpadded, its completion cut to its length
        alone, L = collate_prompts([ragged[n // 2]], torch.device("cpu")), lengths[n].item()
        row, _ = split(alone, torch.tensor([0]), ids[n:n + 1, :L], mask[n:n + 1, :L])
        (row * weights[n:n + 1, :L]).sum().backward()
        torch.testing.assert_close(row[0].detach(), logps[n, :L].detach(), rtol=0, atol=1e-6)
    same_gradients(whole, split, rtol=1e-5)


def test_what_stands_behind_the_end_token_does_not_matter(qwen, tokenizer, ragged):
    prompts, ids, lengths, _ = sample(qwen, tokenizer, ragged, G=2)
    lengths = lengths.clamp(max=5)
    mask = mask_from_lengths(lengths, ids.shape[1])
    garbage = torch.where(mask, ids, torch.randint(0, 300, ids.shape, generator=torch.Generator().manual_seed(0)))
    assert not torch.equal(garbage, ids)
    clean, spoilt = (teacher_forced(qwen, prompts, x, lengths, G=2)[0] for x in (ids, garbage))
    torch.testing.assert_close(clean, spoilt, rtol=0, atol=0)


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_token_logps_equal_the_full_softmax(monkeypatch, chunk):
    monkeypatch.setattr(model_module, "LOGITS_CHUNK", chunk)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 6, generator=g, dtype=torch.float64)
    weight = torch.randn(11, 6, generator=g, dtype=torch.float64)
    targets, banned = torch.randint(2, 11, (20,), generator=g), torch.tensor([0, 1])
    leaves = [[hidden.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(2)]
    logps, entropy = token_logps(*leaves[0], targets, temperature=0.8, banned_ids=banned)
    logits = (leaves[1][0] @ leaves[1][1].T / 0.8)[:, 2:]
    expected = logits.log_softmax(-1).gather(1, targets[:, None] - 2)[:, 0]
    torch.testing.assert_close(logps, expected)
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=logits).entropy().detach())
    logps.sin().sum().backward()
    expected.sin().sum().backward()
    for ours, theirs in zip(*leaves):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_softmax_of_bf16_logits_runs_in_float32():
    hidden, weight = torch.randn(3, 8).bfloat16(), torch.randn(50, 8).bfloat16()
    logps, entropy = token_logps(hidden, weight, torch.tensor([1, 2, 3]))
    assert logps.dtype == entropy.dtype == torch.float32
    expected = (hidden @ weight.T).float().log_softmax(-1)[torch.arange(3), torch.tensor([1, 2, 3])]
    torch.testing.assert_close(logps, expected)


def test_logits_of_more_than_a_chunk_never_exist(monkeypatch):
    # Every tensor that an operator makes, forward and backward, is looked at.
    monkeypatch.setattr(model_module, "LOGITS_CHUNK", 8)
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    targets, sizes = torch.zeros(64, dtype=torch.int64), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))
            return out

    kept = []  # what is saved for the backward pass: hidden states and targets, but no logits
    with Sizes():
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            logps, entropy = token_logps(hidden, weight, targets, banned_ids=torch.tensor([5]))
        logps.sum().backward()
    assert max(sizes) == 8 * 1000 and sum(kept) < 8 * 1000
    assert not entropy.requires_grad


# ----------------------------------------------------------------------------------------------------------------------
# Shared prompts: each one once in a sequence without padding, against rows [prompt | completion] that share nothing.

@pytest.fixture
def mixed(qwen64, tokenizer, ragged):
    """Rows of an image-only prompt and of three with videos, unevenly many: one is but its end token, one goes on."""
    prompts = collate_prompts(ragged, torch.device("cpu"))
    lengths = torch.tensor([1, 12, 5, 3, 12, 7, 1, 9, 12])
    row_prompt = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3, 3])
    ids = torch.randint(0, 300, (9, 12), generator=torch.Generator().manual_seed(0))
    ids[torch.arange(9), lengths - 1] = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids[8, -1] = 7
    return prompts, row_prompt, ids, mask_from_lengths(lengths, 12)


def test_shared_prompts_equal_naive_rows(qwen64, mixed):
    shared, naive = (Policy(copy.deepcopy(qwen64).requires_grad_(), torch.float64, naive) for naive in (False, True))
    weights = torch.randn(9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = []
    for policy in (shared, naive):
        logps, entropy = policy(*mixed, 0.9, vision_token_ids(qwen64, qwen64.device))
        loss = (logps.exp() * weights).sum()
        loss.backward()
        outputs.append((logps.detach(), entropy, loss.detach()))
    for ours, theirs in zip(*outputs):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    same_gradients(shared, naive, rtol=1e-9)
    assert all(p.grad.any() for p in shared.parameters()), "a weight that nothing has reached shows nothing"


class Work:
    """What goes through a Qwen2-VL, counted from outside."""

    def __init__(self, qwen, monkeypatch):
        self.patches = self.tokens = self.logits = 0
        qwen.model.visual.register_forward_pre_hook(self.see_patches, with_kwargs=True)
        qwen.model.language_model.register_forward_pre_hook(self.see_tokens, with_kwargs=True)
        token_logps = model_module.token_logps

        def counted(hidden, weight, *args):
            self.logits += len(hidden) * len(weight)
            return token_logps(hidden, weight, *args)
        monkeypatch.setattr(model_module, "token_logps", counted)

    def see_patches(self, module, args, kwargs):
        self.patches += len(args[0])

    def see_tokens(self, module, args, kwargs):
        self.tokens += kwargs["inputs_embeds"].shape[:2].numel()


def test_shared_sequence_has_no_padding_and_each_prompt_once(qwen64, mixed, monkeypatch):
    prompts, row_prompt, ids, mask = mixed
    qwen = copy.deepcopy(qwen64)
    work = Work(qwen, monkeypatch)
    Policy(qwen, torch.float64)(*mixed)
    assert work.tokens == len(prompts.ids) + mask.sum()
    assert work.patches == len(prompts.pixel_values)
    assert work.logits == mask.sum() * qwen64.config.text_config.vocab_size
    Policy(qwen, torch.float64, naive=True)(*mixed)
    longest = int((prompts.lengths[row_prompt] + mask.sum(1)).max())  # plain rows are padded to it
    assert work.tokens == len(prompts.ids) + mask.sum() + 9 * longest


def test_split_attention_equals_a_loop_over_tokens():
    prompt_lengths, lengths, row_prompt = torch.tensor([3, 5]), torch.tensor([2, 1, 4]), torch.tensor([1, 0, 1])
    g = torch.Generator().manual_seed(0)
    heads, kv_heads, d, T = 4, 2, 8, 15
    query = torch.randn(heads, T, d, generator=g, dtype=torch.float64)
    key, value = (torch.randn(kv_heads, T, d, generator=g, dtype=torch.float64) for _ in range(2))
    layout = SharedPrompts(prompt_lengths, lengths, row_prompt)
    out = layout.attend(0, query, key, value)
    # The packed order: q_0 (3), q_1 (5), o_0 (2), o_1 (1), o_2 (4). What each token sees, written out by hand.
    q_0, q_1 = [0, 1, 2], [3, 4, 5, 6, 7]
    seen = [q_0[:1], q_0[:2], q_0, q_1[:1], q_1[:2], q_1[:3], q_1[:4], q_1,
            q_1 + [8], q_1 + [8, 9], q_0 + [10], q_1 + [11], q_1 + [11, 12], q_1 + [11, 12, 13], q_1 + [11, 12, 13, 14]]
    for t in range(T):
        for h in range(heads):
            scores = torch.stack([query[h, t] @ key[h // 2, s] for s in seen[t]]) / d ** 0.5
            expected = sum(p * value[h // 2, s] for p, s in zip(scores.softmax(0), seen[t]))
            torch.testing.assert_close(out[t, h], expected)
    assert layout.predictors.tolist() == [7, 8, 2, 7, 11, 12, 13]  # the state before each completion token


# ----------------------------------------------------------------------------------------------------------------------
# Sampling.

def test_greedy_equals_hugging_face_generate(qwen, tokenizer, ragged):
    short = [e for e in ragged if e.video_grid_thw is None or e.video_grid_thw[0, 0] <= 2]
    assert {e.video_grid_thw is None for e in short} == {True, False}
    _, ids, lengths, _ = sample(qwen, tokenizer, short, G=1, C=32, temperature=0.0)
    plain = GenerationConfig(do_sample=False, max_new_tokens=32, pad_token_id=tokenizer.pad_token_id,
                             eos_token_id=end_token_ids(qwen, tokenizer, qwen.device).tolist())
    for n, example in enumerate(short):
        expected = qwen.generate(**with_token_types(qwen, hf_inputs(example)), generation_config=plain)
        assert ids[n, :lengths[n]].tolist() == expected[0, len(example.prompt_ids):].tolist()


def test_a_prompts_draws_do_not_depend_on_its_neighbours(qwen, tokenizer, ragged):
    _, together, lengths, _ = sample(qwen, tokenizer, ragged, seeds=[5, 6, 7, 8])
    for b in range(4):
        _, alone, alone_lengths, _ = sample(qwen, tokenizer, ragged[b:b + 1], seeds=[5 + b])
        assert alone_lengths.tolist() == lengths[4 * b:4 * b + 4].tolist()
        for g in range(4):
            n = alone_lengths[g]
            assert torch.equal(alone[g, :n], together[4 * b + g, :n])


def test_rows_of_a_group_differ_whatever_the_generation_config_says(qwen, tokenizer, ragged):
    stubborn = copy.deepcopy(qwen)
    stubborn.generation_config.update(do_sample=True, top_k=1, temperature=0.01)  # what Qwen2-VL ships
    _, ids, _, _ = sample(stubborn, tokenizer, ragged[:1], G=8, temperature=1.5)
    assert len({tuple(row) for row in ids.tolist()}) > 1


def test_draws_follow_the_softmax_and_banned_tokens_never_come(qwen, tokenizer, ragged):
    loud = copy.deepcopy(qwen)
    banned = vision_token_ids(loud, loud.device)
    # Make the vision tokens the likeliest of all, so that only the ban keeps them out.
    loud.lm_head = torch.nn.Linear(128, len(tokenizer), bias=True)
    with torch.no_grad():
        loud.lm_head.weight.copy_(qwen.lm_head.weight)
        loud.lm_head.bias.zero_()
        loud.lm_head.bias[banned] = 50.0
    G, temperature = 20000, 2.0
    prompts, ids, _, logps = sample(loud, tokenizer, ragged[1:2], G=G, C=1, temperature=temperature)
    assert not set(ids.flatten().tolist()) & set(banned.tolist())
    # Hugging Face's logits of the next token, without the ban, are the oracle.
    with torch.no_grad():
        logits = qwen(**hf_inputs(ragged[1]), position_ids=ragged[1].position_ids[:, None]).logits[0, -1] / temperature
    logits[banned] = -torch.inf
    p = logits.softmax(-1)
    torch.testing.assert_close(logps[:, 0], p.log()[ids[:, 0]], rtol=0, atol=1e-4)
    frequency = torch.bincount(ids[:, 0], minlength=len(p)) / G
    z = (frequency - p) / (p * (1 - p) / G).sqrt().clamp(min=1e-12)
    assert z[p > 1e-3].abs().max() < 4.5  # of a few hundred tokens; 4.5 sigma each


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2 ** -53])
def test_the_ends_of_the_uniform_range_draw_no_impossible_token(qwen, tokenizer, ragged, u, monkeypatch):
    # The first and the last tokens of the vocabulary are banned, where a cumulated probability is 0 or already 1.
    V = len(tokenizer)
    banned = torch.tensor([*range(10), *range(V - 10, V), *vision_token_ids(qwen, qwen.device).tolist()])
    prompts, no_end = collate_prompts(ragged, qwen.device), torch.tensor([], dtype=torch.int64)
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, generator: torch.full(shape, u, dtype=dtype))
    ids, _, ended, logps = generate(qwen, prompts, 2, 4, 1.0, [0] * 4, no_end, banned)
    assert not torch.isin(ids, banned).any() and logps.isfinite().all() and not ended.any()


def test_tokens_too_rare_for_float32_are_drawn_where_they_should_be(qwen, tokenizer, ragged, monkeypatch):
    # One token has nearly all probability, 300 behind it 1e-8 each: next to 1, float32 cannot tell their sums apart.
    loud = copy.deepcopy(qwen)
    loud.lm_head = torch.nn.Linear(128, len(tokenizer), bias=True)
    with torch.no_grad():
        loud.lm_head.weight.zero_()
        loud.lm_head.bias.fill_(-torch.inf)
        loud.lm_head.bias[0], loud.lm_head.bias[1:301] = 0.0, math.log(1e-8)
    no_end, banned = torch.tensor([], dtype=torch.int64), torch.tensor([350])
    probs = loud.lm_head.bias.detach().log_softmax(-1).exp()
    cdf = np.cumsum(probs.double().numpy())
    for u in np.linspace(1 - 2.9e-6, 1 - 1e-7, 7):
        monkeypatch.setattr(torch, "rand", lambda *shape, dtype, generator, u=u: torch.full(shape, 1 - u, dtype=dtype))
        ids, *_ = generate(loud, collate_prompts(ragged[:1], qwen.device), 2, 1, 1.0, [0], no_end, banned)
        expected = np.searchsorted(cdf, u * cdf[-1])
        assert 0 < expected < 300 and ids.flatten().tolist() == [expected] * 2


@pytest.mark.parametrize("V", [1, 127, 128, 129, 400, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drawing_by_blocks_is_drawing_by_the_cumulated_probability(V, dtype):
    random = torch.Generator().manual_seed(V)
    logits = 4 * torch.randn(50, V, dtype=dtype, generator=random)
    if V > 2:
        logits[:, torch.randperm(V, generator=random)[:V // 2]] = -torch.inf  # whole blocks of nothing, at V = 1000
        logits[:, 128:384] = -torch.inf
    probs = logits.softmax(-1)
    uniforms = 1 - torch.rand(50, 200, dtype=torch.float64, generator=random)
    for n in range(50):
        p = probs[n].double().numpy()
        cdf = np.cumsum(p)
        drawn = draw(probs[n].expand(200, -1), uniforms[n]).numpy()
        assert (p[drawn] > 0).all()
        # A float32 sum of a block is off by 1e-7 of it: a draw that close to the border of two tokens may differ.
        low, high = cdf[drawn] - p[drawn], cdf[drawn]
        wanted = uniforms[n].numpy() * cdf[-1]
        slack = 1e-6 if dtype == torch.float32 else 1e-14
        assert (wanted > low - slack).all() and (wanted <= high + slack).all()


def test_draws_are_those_of_the_softmax_by_chi_squared():
    probs = torch.randn(300, generator=torch.Generator().manual_seed(1)).softmax(-1)
    n = 200_000
    u = 1 - torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    counts = torch.bincount(draw(probs.expand(n, -1), u), minlength=300)
    expected = n * probs.double()
    chi2 = ((counts - expected) ** 2 / expected).sum().item()
    assert expected.min() > 5 and abs(chi2 - 299) < 4 * (2 * 299) ** 0.5, chi2  # 299 degrees of freedom


def test_each_step_and_each_sample_has_draws_of_its_own(qwen, tokenizer, ragged):
    args = Args(**{**TOY, "temperature": 1.5})
    ends, banned = end_token_ids(qwen, tokenizer, qwen.device), vision_token_ids(qwen, qwen.device)
    example = ragged[1]
    other = dataclasses.replace(example, question=dataclasses.replace(example.question, id="another"))
    first, again, later, twin = (sample_groups(qwen, [e], step, args, ends, banned)
                                 for e, step in ((example, 0), (example, 0), (example, 1), (other, 0)))
    assert torch.equal(first.completion_ids, again.completion_ids)
    for different in (later, twin):
        assert different.completion_ids.tolist() != first.completion_ids.tolist()
    assert first.lengths.max() <= args.max_completion_length


def test_a_completion_has_at_most_as_many_tokens_as_allowed(qwen, tokenizer, ragged, monkeypatch):
    prompts, no_end = collate_prompts(ragged, qwen.device), torch.tensor([], dtype=torch.int64)
    fed, feed = [], GroupCache.feed
    monkeypatch.setattr(GroupCache, "feed", lambda self, token: fed.append(1) or feed(self, token))
    for C in (1, 2, 5):
        _, lengths, ended, _ = generate(qwen, prompts, 2, C, 1.0, list(range(4)), no_end,
                                        vision_token_ids(qwen, qwen.device))
        assert len(fed) == C - 1 and lengths.tolist() == [C] * 8 and not ended.any()
        fed.clear()


def test_dropping_finished_rows_changes_nothing_but_the_work(qwen, tokenizer, ragged, monkeypatch):
    def run():
        fed, feed = [], GroupCache.feed
        with monkeypatch.context() as patch:
            patch.setattr(GroupCache, "feed", lambda self, token: fed.append(len(token)) or feed(self, token))
            return *sample(qwen, tokenizer, ragged, G=8, C=40, temperature=1.5)[1:], sum(fed)

    ids, lengths, logps, work = run()
    monkeypatch.setattr(GroupCache, "drop", lambda self, ended: slice(None))
    all_ids, all_lengths, all_logps, all_work = run()
    assert torch.equal(ids, all_ids) and torch.equal(lengths, all_lengths)
    mask = mask_from_lengths(lengths, ids.shape[1])
    torch.testing.assert_close(logps[mask], all_logps[mask], rtol=0, atol=2e-5)
    assert lengths.sum() - 32 <= work < 0.8 * all_work


def test_a_cache_that_is_kept_starts_anew_for_each_batch(qwen, tokenizer, ragged, monkeypatch):
    # What a CUDA graph needs, without the graph: fixed shapes, prompts padded to 64 columns, nothing of the last batch.
    monkeypatch.setattr(CapturedCache, "capture", uncaptured)
    ends, banned, caches = end_token_ids(qwen, tokenizer, qwen.device), vision_token_ids(qwen, qwen.device), {}
    for examples, C in ((ragged[2:], 24), (ragged[:2], 24), (ragged[1:3], 24), (ragged[2:], 12), (ragged[2:], 1)):
        prompts = collate_prompts(examples, qwen.device)
        kept, fresh = (generate(qwen, prompts, 4, C, 1.0, [3, 4], ends, banned, some) for some in (caches, None))
        mask = mask_from_lengths(fresh.lengths, fresh.ids.shape[1])
        assert torch.equal(kept.lengths, fresh.lengths) and torch.equal(kept.ids, fresh.ids)
        torch.testing.assert_close(kept.logps[mask], fresh.logps[mask], rtol=0, atol=2e-5)
    assert len(caches) < 5, "no cache was used twice"


def test_lengths_count_the_first_end_token_and_stop_there(qwen, tokenizer, ragged):
    ends = end_token_ids(qwen, tokenizer, qwen.device).tolist()
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends
    _, ids, lengths, _ = sample(qwen, tokenizer, ragged, G=8, C=24)
    for row, length in zip(ids.tolist(), lengths.tolist()):
        first = next((k for k, token in enumerate(row) if token in ends), None)
        assert length == (len(row) if first is None else first + 1)
        assert not any(row[length:])
    # A completion may be nothing but the end token: force it by making every token an end token.
    prompts = collate_prompts(ragged, qwen.device)
    completions = generate(qwen, prompts, 2, 24, 1.0, range(4), torch.arange(len(tokenizer)),
                           vision_token_ids(qwen, qwen.device))
    assert completions.lengths.tolist() == [1] * 8 and completions.ended.all()


def test_answer_texts_have_what_was_begun_and_no_end_token(tokenizer):
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = torch.tensor(tokenizer("<answer>B</answer><|im_start|>")["input_ids"] + [end, end])
    examples = [SimpleNamespace(begun=begun) for begun in ("", "<think>\n")]
    lengths = torch.tensor([len(ids) - 1, 1, len(ids) - 1, 1])
    texts = answer_texts(tokenizer, examples, ids.expand(4, -1), lengths, torch.tensor([True, False, True, False]))
    whole = "<answer>B</answer><|im_start|>"
    assert texts == [whole, "<answer>", f"<think>\n{whole}", "<think>\n<answer>"]
    assert answer_texts(tokenizer, [], ids[None][:0], lengths[:0], lengths[:0]) == []


# ----------------------------------------------------------------------------------------------------------------------
# Weights: sharded policy, sampler, files.

def take_a_step(policy, tokenizer, ragged):
    prompts = collate_prompts(ragged, torch.device("cpu"))
    ids = torch.tensor(tokenizer("<answer>A</answer><|im_end|>")["input_ids"]).expand(4, -1)
    logps, _ = policy(prompts, torch.arange(4), ids, torch.ones_like(ids, dtype=torch.bool))
    (-logps.mean()).backward()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    optimizer.step()
    return logps.detach()


def test_sharded_policy_equals_the_plain_model_and_the_sampler_follows_it(qwen, tokenizer, ragged, device):
    policy = load_policy(load_args(), device)
    sampler = make_sampler(policy, device)
    for (name, ours), theirs in zip(sampler.state_dict().items(), qwen.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    for ours, theirs in zip(sampler.buffers(), qwen.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    addresses = [p.data_ptr() for p in sampler.parameters()]
    before = take_a_step(policy, tokenizer, ragged)
    copy_weights(policy, sampler)
    prompts = collate_prompts(ragged, device)
    ids = torch.tensor(tokenizer("<answer>A</answer><|im_end|>")["input_ids"]).expand(4, -1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    pair = (policy, Policy(sampler, torch.float32))
    learned, sampled = (m(prompts, torch.arange(4), ids, mask)[0].detach() for m in pair)
    torch.testing.assert_close(learned, sampled, rtol=0, atol=1e-5)
    assert (learned - before).abs().max() > 1e-2, "the step did not move the policy: the comparison above shows nothing"
    assert addresses == [p.data_ptr() for p in sampler.parameters()]


def test_learner_and_sampler_agree_in_bfloat16(tokenizer, ragged, device):
    # Each FSDP unit may cast what goes into it, such as the rotary angles of the vision tower.
    policy = load_policy(load_args(dtype="bfloat16"), device)
    pair = (policy, Policy(make_sampler(policy, device), torch.bfloat16))
    ids = torch.tensor(tokenizer("<answer>A</answer><|im_end|>")["input_ids"]).expand(4, -1)
    mask = torch.ones_like(ids, dtype=torch.bool)
    learned, sampled = (m(collate_prompts(ragged, device), torch.arange(4), ids, mask)[0].detach() for m in pair)
    torch.testing.assert_close(learned, sampled, rtol=0, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient(tokenizer, ragged, device):
    plain, recomputing = (load_policy(load_args(gradient_checkpointing=on), device) for on in (False, True))
    losses = [take_a_step(policy, tokenizer, ragged) for policy in (plain, recomputing)]
    torch.testing.assert_close(*losses)
    for a, b in zip(plain.parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(a.grad.full_tensor(), b.grad.full_tensor(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_export_reloads_with_equal_logits(tmp_path, tokenizer, ragged, device, tied):
    source = tmp_path / "source"
    base = Qwen2VLForConditionalGeneration.from_pretrained(toy.BASE, dtype=torch.float32)
    if not tied:
        config = copy.deepcopy(base.config)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        untied = Qwen2VLForConditionalGeneration(config)
        untied.load_state_dict({**base.state_dict(), "lm_head.weight": 2 * base.lm_head.weight})
        untied.generation_config = base.generation_config
        base = untied
    base.save_pretrained(source)
    tokenizer.save_pretrained(source)
    (source / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor", "mark": 1}')
    policy = load_policy(load_args(model=str(source)), device)
    take_a_step(policy, tokenizer, ragged)
    export(policy, tokenizer, load_args(model=str(source)), tmp_path / "final")
    sampler = make_sampler(policy, device)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "final", dtype=torch.float32)
    inputs = with_token_types(again, hf_inputs(ragged[1]))
    with torch.no_grad():
        ours, theirs, before = (m.eval()(**inputs).logits for m in (sampler, again, base))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert (ours - before).abs().max() > 1e-2
    assert again.generation_config.eos_token_id == base.generation_config.eos_token_id
    name = "preprocessor_config.json"
    assert (tmp_path / "final" / name).read_bytes() == (source / name).read_bytes()
    text = "<think>I see wash pot.</think>"
    assert AutoTokenizer.from_pretrained(tmp_path / "final")(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_another_kind_of_model_is_refused(tmp_path, device):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    with pytest.raises(ValueError, match="qwen2'.*give one of qwen2_vl"):
        load_policy(load_args(model=str(tmp_path)), device)
    with pytest.raises(ValueError, match="int8"):
        Args(dtype="int8")


@pytest.mark.parametrize("naive", [False, True])
def test_a_pass_without_rows_reaches_every_weight_with_a_gradient_of_zero(qwen, naive):
    policy = Policy(copy.deepcopy(qwen).requires_grad_(), torch.float32, naive)
    none = torch.zeros(0, dtype=torch.int64)
    ids = torch.zeros(0, 7, dtype=torch.int64)
    logps, entropy = policy(collate_prompts([], torch.device("cpu")), none, ids, ids == 0, 0.7, torch.tensor([5]))
    assert logps.shape == entropy.shape == (0, 7)
    (logps * torch.ones(0, 7)).sum().backward()
    # Every weight takes part: one without a gradient would be reduced on some ranks and not on others.
    assert all(p.grad is not None and not p.grad.any() and p.grad.isfinite().all() for p in policy.parameters())


def test_attention_that_would_give_nothing_or_garbage_is_an_error(qwen, tokenizer, ragged):
    stubborn = copy.deepcopy(qwen)
    with pytest.raises(RuntimeError, match="output_attentions"):
        stubborn(**with_token_types(stubborn, hf_inputs(ragged[0])), output_attentions=True)
    stubborn.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="set to 'eager'"):
        sample(stubborn, tokenizer, ragged[:1], G=2, C=2)
