"""LoRA and a frozen tower, against peft and against explicit sums; and what a run with them keeps and leaves alone."""
import copy
import json
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Qwen2VLForConditionalGeneration

import grpo_video
import lora
import runtime
import sft_video
import toy
from conftest import ROOT
from model import Policy, collate_prompts, end_token_ids, vision_token_ids
from run import learned_state
from sampler import generate
from test_model import load_args
from test_train import grpo_args, metrics_of, relative_difference, sft_args, torchrun, update

# A scale of 20 / 12: with one or a power of two, a forgotten or doubled scale could hide.
LORA = dict(lora_rank=12, lora_alpha=20.0)
NAMES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def randomise(adapters, seed=0):
    """Values for A and B as after training: at first B is 0, and anything would agree."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapters:
        tensor.data.copy_(0.1 * torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator))


def completions(tokenizer, text="<think>wash pot</think><answer>A</answer><|im_end|>", rows=4):
    ids = torch.tensor(tokenizer(text)["input_ids"]).expand(rows, -1)
    return ids, torch.ones_like(ids, dtype=torch.bool)


def logps_of(policy, tokenizer, examples):
    ids, mask = completions(tokenizer)
    return policy(collate_prompts(examples, torch.device("cpu")), torch.arange(4), ids, mask)[0]


def base_model(dtype):
    return runtime.load_sampler(load_args(dtype=dtype), torch.device("cpu")).train()


# ----------------------------------------------------------------------------------------------------------------------
# The layer.

def test_forward_and_gradients_are_pefts(tokenizer, ragged):
    ours, theirs = base_model("float64"), base_model("float64")
    lora.add_adapters(ours, LORA["lora_rank"], LORA["lora_alpha"], torch.float64, seed=0)
    config = peft.LoraConfig(r=12, lora_alpha=20, target_modules=sorted(NAMES), lora_dropout=0.0)
    peft.get_peft_model(theirs, config)  # in place
    pairs = {}
    for name, layer in lora.adapted(ours).items():
        other = theirs.get_submodule(name)
        randomise((layer.lora_A, layer.lora_B), len(pairs))
        other.lora_A["default"].weight.data.copy_(layer.lora_A.data)
        other.lora_B["default"].weight.data.copy_(layer.lora_B.data)
        pairs[name] = [(layer.lora_A, other.lora_A["default"].weight), (layer.lora_B, other.lora_B["default"].weight)]
    logps = logps_of(Policy(ours, torch.float64), tokenizer, ragged)
    oracle = logps_of(Policy(theirs, torch.float64, naive=True), tokenizer, ragged)
    torch.testing.assert_close(logps, oracle, rtol=0, atol=1e-11)
    plain = logps_of(Policy(base_model("float64"), torch.float64), tokenizer, ragged)
    assert (plain - logps).abs().max() > 0.1, "the adapters change nothing: the comparison above shows nothing"
    logps.square().sum().backward()
    oracle.square().sum().backward()
    for name, both in pairs.items():
        for mine, other in both:
            assert mine.grad.abs().max() > 0, name
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-8, atol=1e-9)
    assert all(p.grad is None for n, p in ours.named_parameters() if "lora_" not in n)


def test_the_seven_maps_of_each_text_layer_have_an_adapter_and_nothing_else():
    qwen = base_model("float32")
    layers = len(qwen.model.language_model.layers)
    lora.add_adapters(qwen, 4, 8, torch.float32, seed=0)
    assert set(lora.adapted(qwen)) == {
        f"model.language_model.layers.{n}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}"
        for n in range(layers) for name in NAMES}
    assert {n.rpartition(".")[2] for n, p in qwen.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


def test_at_first_the_adapted_model_is_the_model(tokenizer, ragged):
    adapted = base_model("float32")
    lora.add_adapters(adapted, **{"rank": 4, "alpha": 8, "dtype": torch.float32, "seed": 0})
    a, b = (logps_of(Policy(qwen, torch.float32), tokenizer, ragged) for qwen in (adapted, base_model("float32")))
    assert torch.equal(a, b)
    for layer in lora.adapted(adapted).values():  # A as peft begins: uniform with a bound of 1 / sqrt(in)
        assert 0.9 < layer.lora_A.abs().max() * layer.in_features**0.5 <= 1 and not layer.lora_B.any()


def test_merging_is_the_explicit_sum():
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(6, 5)
    A, B = (torch.randn(shape, generator=generator) for shape in ((3, 6), (5, 3)))
    layer = lora.LoRALinear(linear, 20 / 3, nn.Parameter(A), nn.Parameter(B))
    merged = [[linear.weight[i, j].item() + 20 / 3 * sum(B[i, k].item() * A[k, j].item() for k in range(3))
               for j in range(6)] for i in range(5)]
    torch.testing.assert_close(layer.merged(), torch.tensor(merged))
    x = torch.randn(7, 6, generator=generator)
    torch.testing.assert_close(layer(x), x @ torch.tensor(merged).T + linear.bias, rtol=1e-4, atol=1e-4)
    # In bfloat16 the sum is rounded once, not the product before it.
    half = copy.deepcopy(layer).bfloat16()
    exact = half.weight.float() + half.scale * half.lora_B.float() @ half.lora_A.float()
    assert torch.equal(half.merged(), exact.bfloat16())


# ----------------------------------------------------------------------------------------------------------------------
# Three module trees on one model.

@pytest.fixture
def three(device):
    """(policy, sampler, reference) of a LoRA run in bfloat16, its adapters as after some training."""
    args = load_args(dtype="bfloat16", kl_coef=0.1, **LORA)
    policy = runtime.load_policy(args, device)
    randomise(p.to_local() for p in policy.parameters() if p.requires_grad)
    reference = runtime.load_reference(args, policy, device)
    sampler = runtime.make_sampler(policy, device)
    return policy, sampler, reference


def storages(*modules):
    """address -> bytes of every tensor of these modules, each memory once."""
    tensors = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_all_three_are_one_model_in_memory(three):
    policy, sampler, reference = three
    base = sum(storages(base_model("bfloat16")).values())
    adapters = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    # float32 masters and the sampler's bfloat16, beside one model.
    assert sum(storages(*three).values()) == base + 4 * adapters + 2 * adapters
    assert sum(storages(reference).values()) == base


def test_the_sampler_follows_the_adapters_and_the_reference_does_not(three, tokenizer, ragged):
    policy, sampler, reference = three
    plain = Policy(base_model("bfloat16"), torch.bfloat16)
    for seed in (1, 2):
        learned, sampled, before, base = (logps_of(model, tokenizer, ragged) for model in
                                          (policy, Policy(sampler, torch.bfloat16), reference, plain))
        learned.sum().backward()  # which gives the gathered adapters back
        assert torch.equal(learned, sampled) and torch.equal(before, base)
        assert (learned - base).abs().max() > 0.1
        randomise((p.to_local() for p in policy.parameters() if p.requires_grad), seed)
        addresses = [p.data_ptr() for p in sampler.parameters()]
        runtime.copy_weights(policy, sampler)
        assert addresses == [p.data_ptr() for p in sampler.parameters()]
        assert not torch.equal(logps_of(Policy(sampler, torch.bfloat16), tokenizer, ragged), sampled)


def test_merged_and_unmerged_models_write_the_same(tokenizer, ragged, device):
    args = load_args(kl_coef=0.0, **LORA)
    policy = runtime.load_policy(args, device)
    randomise(p.to_local() for p in policy.parameters() if p.requires_grad)
    merged = runtime.plain_copy(policy, device)
    runtime.copy_weights(policy, merged)
    assert not lora.adapted(merged)
    ids = [generate(qwen, collate_prompts(ragged, device), 1, 24, 0.0, None, end_token_ids(qwen, tokenizer, device),
                    vision_token_ids(qwen, device))[0] for qwen in (runtime.make_sampler(policy, device), merged)]
    assert torch.equal(*ids)


def test_merging_leaves_the_policys_own_weights_alone(three):
    policy, *_ = three
    before = {name: p.clone() for name, p in policy.qwen.named_parameters() if not p.requires_grad}
    runtime.copy_weights(policy, runtime.plain_copy(policy, torch.device("cpu")))
    assert all(torch.equal(before[name], p) for name, p in policy.qwen.named_parameters() if not p.requires_grad)


# ----------------------------------------------------------------------------------------------------------------------
# Runs.

RUN = dict(**LORA, prompts_per_step=4, max_steps=4, save_every=3, learning_rate=2e-3)


@pytest.fixture(scope="module")
def run(tmp_path_factory, world):
    folder = tmp_path_factory.mktemp("lora") / "run"
    grpo_video.main(grpo_args(folder, **RUN, kl_coef=0.1, num_updates=2))
    return folder


def test_the_kl_begins_at_nothing_and_grows(tmp_path, world):
    sums = grpo_args(tmp_path, **{**RUN, "max_steps": 3}, kl_coef=0.1, num_updates=1)
    grpo_video.main(sums)
    first, *later = [line["kl"] for line in metrics_of(tmp_path)]
    assert first == 0 and all(value > 0 for value in later)


def test_final_is_the_base_and_the_adapters_beside_it(run, tokenizer, ragged):
    final, base = load_file(run / "final/model.safetensors"), load_file(toy.BASE / "model.safetensors")
    changed = {name for name in base if not torch.equal(final[name], base[name])}
    adapters = load_file(run / "adapters/adapter_model.safetensors")
    layers = len({name.split(".layers.")[1].split(".")[0] for name in adapters})
    assert len(changed) == 7 * layers and len(adapters) == 14 * layers and {n.split(".")[-2] for n in changed} == NAMES
    files = [folder / name for folder, name in ((run / "final", "model.safetensors"),
                                                (run / "adapters", "adapter_model.safetensors"))]
    assert files[0].stat().st_mode == files[1].stat().st_mode
    peft_model = peft.PeftModel.from_pretrained(
        Qwen2VLForConditionalGeneration.from_pretrained(toy.BASE, dtype=torch.float32), run / "adapters")
    merged = peft_model.merge_and_unload().state_dict()
    theirs = Qwen2VLForConditionalGeneration.from_pretrained(run / "final", dtype=torch.float32).state_dict()
    assert merged.keys() == theirs.keys()
    for name in merged:
        torch.testing.assert_close(merged[name], theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("script, make_args, changes", [
    (grpo_video, grpo_args, LORA), (sft_video, sft_args, LORA), (grpo_video, grpo_args, dict(freeze_vision=True)),
    (sft_video, sft_args, dict(freeze_vision=True, dtype="bfloat16", gradient_checkpointing=True)),
    (grpo_video, grpo_args, dict(**LORA, dtype="bfloat16", gradient_checkpointing=True))])
def test_a_resumed_run_is_bit_identical(tmp_path, world, script, make_args, changes):
    settings = {**RUN, "lora_rank": 0, **changes}
    final = script.main(make_args(tmp_path, **settings))
    straight, lines = load_file(final / "model.safetensors"), metrics_of(tmp_path)
    shutil.rmtree(final)
    script.main(make_args(tmp_path, **settings, resume=True))  # from step 3: the last step is run again
    resumed, again = load_file(final / "model.safetensors"), metrics_of(tmp_path)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert [line["step"] for line in again] == [0, 1, 2, 3] and again[3]["loss"] == lines[3]["loss"]


@pytest.mark.slow
def test_two_ranks_make_the_update_of_one(tmp_path, world):
    settings = {**LORA, "dtype": "float64", "kl_coef": 0.1, "num_updates": 2, "prompts_per_step": 4, "max_steps": 2,
                "learning_rate": 2e-3}
    grpo_video.main(grpo_args(tmp_path / "one", **settings))
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    torchrun("grpo_video.py", 2, *flags, "--max_completion_length", "40", "--output_dir", str(tmp_path / "two"))
    assert relative_difference(update(tmp_path / "two/final"), update(tmp_path / "one/final")) < 1e-8
    for one, two in zip(*map(metrics_of, (tmp_path / "one", tmp_path / "two"))):
        assert one["grad_norm"] > 0
        for name in ("loss", "kl", "entropy", "grad_norm"):
            assert one[name] == pytest.approx(two[name], rel=1e-7), name


def test_checkpoints_hold_what_learns(run, tmp_path, world, device):
    files = [file for file in (run / "checkpoints/step_000003").iterdir()]
    adapters = sum(tensor.numel() for tensor in load_file(run / "adapters/adapter_model.safetensors").values())
    # A and B, and two moments of each, in float32; the rest are the names and shapes of so many tensors.
    assert 12 * adapters < sum(file.stat().st_size for file in files) < 12 * adapters + 1_000_000
    whole = sum(tensor.numel() for tensor in load_file(run / "final/model.safetensors").values())
    assert 12 * adapters + 1_000_000 < 4 * whole
    args = grpo_args(run, **{**RUN, "lora_rank": 0}, freeze_vision=True)
    policy = runtime.load_policy(runtime.resolve(args, device), device)
    names = learned_state(policy, torch.optim.AdamW(policy.parameters(), fused=True))["model"]
    assert names and not any("visual" in name for name in names)


@pytest.mark.slow
def test_a_checkpoint_becomes_a_merged_model(run, tmp_path):
    folder = tmp_path / "step_3"
    subprocess.run([sys.executable, "run.py", str(run / "checkpoints/step_000003"), str(folder)], cwd=ROOT, check=True,
                   capture_output=True, timeout=240)
    early, late, base = (load_file(path / "model.safetensors") for path in (folder, run / "final", toy.BASE))
    assert early.keys() == late.keys()
    moved = [(early[name] - base[name]).norm() / (late[name] - base[name]).norm() for name in base
             if not torch.equal(late[name], base[name])]
    assert 0.5 < min(moved) and max(moved) < 1.5


def test_a_frozen_tower_stays_as_it_is(tmp_path, world):
    for frozen in (True, False):
        final = sft_video.main(sft_args(tmp_path / str(frozen), prompts_per_step=4, freeze_vision=frozen))
        after, before = load_file(final / "model.safetensors"), load_file(toy.BASE / "model.safetensors")
        same = {name.startswith("model.visual") or name.startswith("visual"): torch.equal(after[name], before[name])
                for name in after}
        assert same == {True: frozen, False: False}
    frozen, free = (update(tmp_path / f"{frozen}/final") for frozen in (True, False))
    # To the text model's first AdamW step it is the same whether the tower learns: only the clipping differs.
    text = torch.cat([(torch.ones if "visual" not in name else torch.zeros)(before[name].numel()) for name in
                      sorted(before)]).bool()
    assert relative_difference(frozen[text], free[text]) < 1e-2


def test_a_run_from_before_these_flags_can_be_resumed(tmp_path, world):
    settings = dict(prompts_per_step=1, max_completion_length=1, max_steps=2, save_every=1)
    grpo_video.main(grpo_args(tmp_path, **settings))
    old = json.loads((tmp_path / "args.json").read_text())
    for name in ("lora_rank", "lora_alpha", "freeze_vision"):
        del old[name]
    (tmp_path / "args.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match="lora_rank cannot change"):
        grpo_video.main(grpo_args(tmp_path, **settings, resume=True, change=["lora_rank"], lora_rank=4))
    grpo_video.main(grpo_args(tmp_path, **settings, resume=True))
