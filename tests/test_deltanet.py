"""Qwen3.5's layers without attention, as tiny random models: against Hugging Face's rows, and what would go wrong.

What all families share is in test_families.py and test_families_runs.py. Each test was seen to fail; where what it
guards against can be switched on, the test does so itself and says how far off that is.
"""
import copy
import functools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_5 import modeling_qwen3_5

import deltanet
import grpo_video
import runtime
import sft_video
import tiny
from conftest import same_gradients
from data import VideoDataset, format_reward, load_questions
from gpu_parts import uncaptured
from model import Policy, Prompts, SharedPrompts, append_text, embed_prompts, text_states, vision_token_ids
from runtime import load_family, load_sampler, load_tokenizer
from sampler import CapturedCache, GroupCache, answer_texts, generate
from test_families import PIXELS
from test_model import load_args

LENGTHS = [1, 2, 3, 64, 65, 128]  # of prompts; the rule runs in chunks of 64, the convolution over 4 tokens
OWN = [1, 128, 2, 63, 3, 64, 65, 4, 127, 1, 2, 66]  # of completions, two of each prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write(tmp_path_factory.mktemp("qwen3_5") / "model", "qwen3_5")


@pytest.fixture(scope="module")
def qwen(folder, device):
    return load_sampler(load_args(model=str(folder), dtype="float64"), device)


def text_prompts(lengths: list[int]) -> Prompts:
    """Prompts of random words, without pixels."""
    ids = torch.randint(0, 300, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return Prompts(ids, torch.tensor(lengths), positions.expand(3, -1), torch.tensor(lengths),
                   torch.zeros(0, 1536, dtype=torch.uint8), torch.zeros(0, 3, dtype=torch.int64))


@pytest.fixture(scope="module")
def batch():
    """The arguments of `Policy`."""
    ids = torch.randint(0, 300, (len(OWN), max(OWN)), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(max(OWN)) < torch.tensor(OWN)[:, None]
    return text_prompts(LENGTHS), torch.arange(len(OWN)) // 2, ids, mask


def rows_of_hugging_face(qwen, prompts, row_prompt, ids, mask) -> torch.Tensor:
    """The log-probs (M,) of all completions' tokens, one unpadded row at a time, of the library's whole model."""
    found = []
    for n, own in enumerate(row[seen] for row, seen in zip(ids, mask)):
        prompt = prompts.ids.split(prompts.lengths.tolist())[row_prompt[n]]
        row = torch.cat([prompt, own])[None]
        logits = qwen(input_ids=row, position_ids=torch.arange(row.shape[1]).expand(3, 1, -1)).logits[0]
        found.append(logits.log_softmax(-1)[-len(own) - 1:-1].gather(1, own[:, None])[:, 0])
    return torch.cat(found)


@pytest.fixture(scope="module")
def wanted(qwen, batch):
    with torch.no_grad():
        return rows_of_hugging_face(qwen, *batch)


def logps(qwen, batch) -> torch.Tensor:
    with torch.no_grad():
        return Policy(qwen, qwen.dtype)(*batch)[0][batch[3]]


# ----------------------------------------------------------------------------------------------------------------------
# Learning.

def test_completions_go_on_from_their_prompts_as_rows_do_whatever_the_lengths(qwen, batch, wanted):
    torch.testing.assert_close(logps(qwen, batch), wanted, rtol=0, atol=1e-12)


def test_gradients_are_those_of_rows(qwen, batch):
    weights = torch.randn(int(batch[3].sum()), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, theirs = copy.deepcopy(qwen).requires_grad_(), copy.deepcopy(qwen).requires_grad_()
    (Policy(ours, torch.float64)(*batch)[0][batch[3]] * weights).sum().backward()
    (rows_of_hugging_face(theirs, *batch) * weights).sum().backward()
    same_gradients(ours.model.language_model, theirs.model.language_model, rtol=1e-12)


def without(name: str):
    """run_rows, in which completions begin without one part of what their prompt has left."""
    run_rows, place = deltanet.run_rows, {"inputs": 4, "S": 5}[name]

    def run(layer, rows, *inputs):
        inputs = list(inputs)
        if len(inputs) > 3:
            inputs[place - 1] = torch.zeros_like(inputs[place - 1])
        return run_rows(layer, rows, *inputs)
    return run


@pytest.mark.parametrize("name", ["S", "inputs"])
def test_without_a_part_of_the_state_they_would_not(qwen, batch, wanted, monkeypatch, name):
    monkeypatch.setattr(deltanet, "run_rows", without(name))
    assert (logps(qwen, batch) - wanted).abs().max() > 2


def test_packed_rows_would_leak_and_so_a_pass_without_delta_is_refused(qwen, batch, wanted, monkeypatch):
    prompts, row_prompt, ids, mask = batch
    shared = SharedPrompts(prompts.lengths, mask.sum(1), row_prompt)
    embeds = append_text(embed_prompts(qwen, prompts), qwen.get_input_embeddings()(ids[mask]))[None]
    positions = torch.zeros(3, 1, embeds.shape[1], dtype=torch.int64)
    with pytest.raises(RuntimeError, match="`attend` without `delta`"), torch.no_grad():
        text_states(qwen, embeds, positions, shared.attend)

    def as_one_row(shared, layer, qkv, g, beta):
        one_row = SharedPrompts(torch.tensor([len(qkv)]), torch.tensor([1]), torch.tensor([0])).prompts
        return deltanet.run_rows(layer, one_row, qkv, g, beta)[0]
    monkeypatch.setattr(deltanet, "continue_prompts", as_one_row)
    assert (logps(qwen, batch) - wanted).abs().max() > 2


# ----------------------------------------------------------------------------------------------------------------------
# Sampling.

def test_what_is_sampled_has_the_log_probs_of_rows_also_when_some_have_left(qwen):
    prompts, G, C = text_prompts(LENGTHS), 4, 70
    ends, dropped, drop = torch.arange(0, 300, 37), [], deltanet.RowStates.keep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deltanet.RowStates, "keep", lambda *args: (dropped.append(len(args[1])), drop(*args)))
        drawn = generate(qwen, prompts, G, C, 1.0, list(range(len(LENGTHS))), ends, vision_token_ids(qwen, ends.device))
    assert len(set(dropped)) > 3, "no rows have left"
    mask = torch.arange(C) < drawn.lengths[:, None]
    with torch.no_grad():
        policy = Policy(qwen, torch.float64)
        rows = torch.arange(len(mask)) // G
        want, _ = policy(prompts, rows, drawn.ids, mask, 1.0, vision_token_ids(qwen, ends.device))
    torch.testing.assert_close(drawn.logps[mask], want[mask], rtol=0, atol=1e-12)


def test_states_are_float32_in_a_sampler_of_bfloat16_which_is_then_as_exact_as_its_policy(folder, qwen, device, batch,
                                                                                          monkeypatch):
    half = load_sampler(load_args(model=str(folder), dtype="bfloat16"), device)
    caches = [GroupCache(model, 2, 8, 3, 4, device).layers for model in (half, qwen)]
    for layers, dtypes in zip(caches, ((torch.float32, torch.bfloat16), (torch.float64, torch.float64))):
        assert [type(layer) for layer in layers].count(deltanet.RowStates) == 3
        for layer in layers[:3]:
            assert (layer.S.dtype, layer.inputs.dtype) == dtypes
            assert len(layer.S) == len(layer.inputs) == 6

    prompts, banned = text_prompts([128]), vision_token_ids(half, device)

    def gap() -> float:
        """Between the log-probs of the sampler and those of the policy, both in bf16: the mean over tokens, nats."""
        drawn = generate(half, prompts, 8, 128, 1.0, [0], torch.tensor([299]), banned)
        mask = torch.arange(128) < drawn.lengths[:, None]
        with torch.no_grad():
            want, _ = Policy(half, torch.bfloat16)(prompts, torch.zeros(8, dtype=torch.int64), drawn.ids, mask, 1.0,
                                                   banned)
        return float((drawn.logps - want)[mask].abs().mean())

    as_it_is, write = gap(), deltanet.RowStates.write
    monkeypatch.setattr(deltanet.RowStates, "write", lambda self, inputs, S: write(self, inputs, S.bfloat16()))
    assert gap() > 2 * as_it_is


def test_a_kept_cache_remembers_nothing_of_the_last_batch_nor_of_the_warm_up(qwen, monkeypatch):
    """What a CUDA graph needs, without the graph."""
    monkeypatch.setattr(CapturedCache, "capture", uncaptured)
    ends, caches = torch.arange(0, 300, 37), {}
    for lengths in ([3, 64], [60, 2], [3, 64]):
        prompts = text_prompts(lengths)
        kept, fresh = (generate(qwen, prompts, 3, 20, 1.0, [5, 6], ends, vision_token_ids(qwen, ends.device), some)
                       for some in (caches, None))
        mask = torch.arange(20) < fresh.lengths[:, None]
        assert torch.equal(kept.ids, fresh.ids)
        torch.testing.assert_close(kept.logps[mask], fresh.logps[mask], rtol=0, atol=1e-12)
    assert len(caches) == 1


# ----------------------------------------------------------------------------------------------------------------------
# Precision of weights.

def test_weights_that_releases_have_in_float32_are_never_rounded(folder, device, tmp_path):
    """A file as on the hub, bf16 but for these: read, sharded, copied for the sampler, exported, and with LoRA."""
    mixed = {name: weight if name.endswith(("A_log", "dt_bias", "linear_attn.norm.weight")) else weight.bfloat16()
             for name, weight in load_file(folder / "model.safetensors").items()}
    kept = {name: weight for name, weight in mixed.items() if weight.dtype == torch.float32}
    assert len(kept) == 9 and all((weight != weight.bfloat16()).any() for weight in kept.values())
    release = tmp_path / "release"
    tiny.write(release, "qwen3_5")
    save_file(mixed, release / "model.safetensors", metadata={"format": "pt"})
    tokenizer = load_tokenizer(str(release))

    def check(weights: dict) -> None:
        for name, weight in kept.items():
            found = weights[name.removeprefix("qwen.")]
            assert found.dtype == torch.float32 and torch.equal(found.cpu(), weight), name

    check(dict(load_sampler(load_args(model=str(release), dtype="bfloat16"), device).named_parameters()))
    for changes in ({}, {"lora_rank": 2}, {"frozen": True}):
        frozen = changes.pop("frozen", False)
        args = load_args(model=str(release), dtype="bfloat16", **changes)
        policy, seen = runtime.load_policy(args, device, frozen), {}
        for name, layer in policy.qwen.named_modules():
            if isinstance(layer, deltanet.GatedDeltaNet):  # what the layer computes with
                layer.register_forward_pre_hook(lambda layer, _, name=name, seen=seen: seen.update(
                    {f"{name}.{key}": weight.detach().clone() for key, weight in layer.named_parameters()}))
        with torch.no_grad():
            policy(text_prompts([3]), torch.tensor([0]), torch.ones(1, 2, dtype=torch.int64),
                   torch.ones(1, 2, dtype=torch.bool))
        check(seen)
        assert seen["model.language_model.layers.0.linear_attn.in_proj_qkv.weight"].dtype == torch.bfloat16
        check(dict(runtime.make_sampler(policy, device).named_parameters()))
        runtime.export(policy, tokenizer, args, tmp_path / "export/final")
        check(load_file(tmp_path / "export/final/model.safetensors"))


def test_they_learn_in_float32_and_what_a_bfloat16_would_lose_arrives(folder, device, tmp_path):
    args, before = load_args(model=str(folder), dtype="bfloat16"), load_file(folder / "model.safetensors")
    policy = runtime.load_policy(args, device)
    ids = torch.arange(100, 104)[None]
    policy(text_prompts([3]), torch.tensor([0]), ids, ids > 0)[0].sum().backward()
    torch.optim.AdamW(policy.parameters(), lr=1e-5, weight_decay=0.0).step()
    sampler = dict(runtime.make_sampler(policy, device).named_parameters())
    runtime.export(policy, load_tokenizer(str(folder)), args, tmp_path / "final")
    exported, learned = load_file(tmp_path / "final/model.safetensors"), 0
    for name, weight in policy.qwen.named_parameters():
        if name.endswith(("A_log", "dt_bias", "linear_attn.norm.weight")):
            after = weight.full_tensor().detach()
            assert weight.grad.dtype == torch.float32 and 0 < (after - before[name]).abs().max() < 2e-5
            assert torch.equal(sampler[name], after) and torch.equal(exported[name], after)
            learned += 1
    assert learned == 9


def test_rounded_they_would_move_log_probs(qwen, batch, wanted):
    for name, least in (("A_log", 5e-3), ("dt_bias", 2e-3), ("norm.weight", 0.05)):
        rounded = copy.deepcopy(qwen)
        for key, weight in rounded.named_parameters():
            if key.endswith(f"linear_attn.{name}"):
                weight.data = weight.data.bfloat16().double()
        assert (logps(rounded, batch) - wanted).abs().max() > least


# ----------------------------------------------------------------------------------------------------------------------
# Kernels.

def test_kernels_that_refuse_float32_are_not_asked(folder, device, batch, monkeypatch):
    """As with flash-linear-attention installed, behind the names of the rules. On a CPU it is never asked."""
    before = logps(load_sampler(load_args(model=str(folder), dtype="float32"), device), batch)
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        rule = getattr(modeling_qwen3_5, name)

        @functools.wraps(rule)
        def kernel(*_, **__):
            raise AssertionError("does not support float32")
        monkeypatch.setattr(modeling_qwen3_5, name, kernel)
    qwen = load_sampler(load_args(model=str(folder), dtype="float32"), device)
    assert torch.equal(logps(qwen, batch), before)
    generate(qwen, text_prompts([5]), 2, 4, 1.0, [0], torch.tensor([299]), vision_token_ids(qwen, device))
    # And with the package `kernels`, by which the names are modules, from which no rule can be unwrapped.
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", torch.nn.Identity())
    with pytest.raises(RuntimeError, match="export USE_HUB_KERNELS=NO"):
        logps(qwen, batch)


# ----------------------------------------------------------------------------------------------------------------------
# How an answer begins.

RESPONSE = "<think>I see wash pot.</think><answer>A</answer>"


@pytest.mark.parametrize("opening, begun", [("<think>\n", "<think>\n"), ("<think>\n\n</think>\n\n", "")])
def test_what_the_prompt_has_opened_belongs_to_the_answer(tmp_path, world, opening, begun):
    folder = str(tiny.write(tmp_path / "model", "qwen3_5", opening=opening.replace("\n", r"\n")))
    family, tokenizer = load_family(folder), load_tokenizer(folder)
    assert (family.opening, family.begun) == (opening, begun)
    questions = load_questions("annotations/training_6k.jsonl", world)
    example = VideoDataset(questions, tokenizer, family, PIXELS["qwen3_5"], seed=0)[0, 0]
    assert tokenizer.decode(example.prompt_ids).endswith(f"<|im_start|>assistant\n{opening}")
    # A completion that goes on from there.
    ids = sft_video.encode_response(tokenizer, RESPONSE.removeprefix(begun.strip()))
    text, = answer_texts(tokenizer, [example], ids[None], torch.tensor([len(ids)]), torch.tensor([True]))
    assert text == begun + RESPONSE.removeprefix(begun.strip())
    assert format_reward(text, example) == 1
    assert grpo_video.accuracy_reward(text, example) == (example.gold == "A")


def sft_args(folder, world, file, out):
    return sft_video.Args(**dict(sft_video.TOY) | dict(
        model=folder, data_root=str(world), num_workers=0, train_file=str(file), max_steps=1, prompts_per_step=2,
        image_size=64, output_dir=str(out)))


def test_sft_learns_what_is_left_of_a_response(folder, tmp_path, world, monkeypatch, device):
    questions = [json.loads(line) for line in (world / "annotations/training_with_cot_6k.jsonl").open()][:4]
    for question in questions:  # as docs/own_answers.py writes what such a model has answered
        question["response"] = question["response"].replace("<think>", "<think>\n")
    file, learned = tmp_path / "train.jsonl", []
    encode = sft_video.encode_response
    monkeypatch.setattr(sft_video, "encode_response", lambda tokenizer, text: learned.append(text) or encode(
        tokenizer, text))
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    sft_video.main(sft_args(str(folder), world, file, tmp_path / "sft"))
    assert 2 <= len(set(learned)) and set(learned) <= {question["response"][7:].lstrip() for question in questions}
    questions[2]["response"] = "The answer is A."
    file.write_text("".join(json.dumps(question) + "\n" for question in questions))
    with pytest.raises(ValueError, match=r"end in '<think>\\n', so a response must begin with '<think>'; this one "
                                         r"begins with 'The answer is A.'"):
        sft_video.main(sft_args(str(folder), world, file, tmp_path / "sft2"))
