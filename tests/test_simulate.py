"""The memory that simulate.py says a step takes, against what the same step really takes on a CPU."""
import copy
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch.profiler import ProfilerActivity, profile

import simulate
from simulate import FAMILIES, RELEASES, grpo_video, runtime

TEXT = dict(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2)
WEIGHTS = dict(hidden_size=512, intermediate_size=2048, vocab_size=16384, **TEXT)
LARGE_VOCABULARY = dict(hidden_size=256, intermediate_size=256, vocab_size=65536, **TEXT)
ADAPTERS = dict(hidden_size=512, intermediate_size=2048, vocab_size=2048, **TEXT)
ACTIVATIONS = dict(hidden_size=256, intermediate_size=1024, vocab_size=1024, **TEXT)
SHORT = dict(num_frames=2, image_size=56, max_completion_length=16)
LONG = dict(num_frames=8, image_size=252, max_completion_length=48, gradient_checkpointing=False)
SHALLOW = dict(depth=2, embed_dim=256, num_heads=4)
DEEP = dict(depth=4, embed_dim=256, num_heads=4)
# Windows of 4 x 4 tokens, the third layer without: of 6 x 6 tokens none is a multiple.
WINDOWS = dict(depth=3, hidden_size=256, intermediate_size=512, num_heads=4, window_size=112, fullatt_block_indexes=[2])
DEEPSTACK = dict(depth=3, hidden_size=64, intermediate_size=640, num_heads=4, num_position_embeddings=64,
                 deepstack_visual_indexes=[0, 1, 2])
NARROW = dict(hidden_size=256, intermediate_size=512, vocab_size=1024, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, head_dim=48)
HYBRID = dict(NARROW, num_hidden_layers=4, head_dim=64, linear_num_key_heads=2, linear_num_value_heads=4,
              linear_key_head_dim=32, linear_value_head_dim=32)
TOWER = {name: value for name, value in DEEPSTACK.items() if name != "deepstack_visual_indexes"}
# shape -> model_type, text model, vision tower, flags
SHAPES = {
    # 37 million weights and short prompts: weights, gradients and moments are nearly all
    "weights": ("qwen2_vl", WEIGHTS, DEEP, SHORT),
    # 34 million of its 35 million weights in embedding and lm_head
    "vocabulary": ("qwen2_vl", LARGE_VOCABULARY, SHALLOW, SHORT),
    # a frozen model, whole on each rank, and little that learns
    "adapters": ("qwen2_vl", ADAPTERS, DEEP, dict(SHORT, lora_rank=8)),
    # 9 million weights and prompts of 576 tokens: what is kept from forward to backward is most
    "activations": ("qwen2_vl", ACTIVATIONS, DEEP, LONG),
    # gates and windows in the tower
    "windows": ("qwen2_5_vl", ACTIVATIONS, WINDOWS, dict(LONG, image_size=168, max_completion_length=16)),
    # what the tower adds behind text layers; with checkpointing the first of them keeps it until its backward pass.
    # Where `embed_prompts` drops it, in the simulation alone, the update's peak is 4.6% too low.
    "deepstack": ("qwen3_vl", NARROW, DEEPSTACK, dict(num_frames=8, image_size=192, max_completion_length=32)),
    # states in place of keys and values, and what the rule for many tokens keeps for its backward pass
    "hybrid": ("qwen3_5", HYBRID, TOWER, dict(num_frames=8, image_size=192, max_completion_length=32)),
}


def write_config(folder: Path, model_type: str, text: dict, vision: dict) -> None:
    tokens = dict(image_token_id=500, video_token_id=501, vision_start_token_id=502, vision_end_token_id=503)
    quarter = text.get("head_dim", text["hidden_size"] // text["num_attention_heads"]) // 4
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [quarter, quarter // 2, quarter // 2]}
    if model_type == "qwen3_5":
        rope |= {"mrope_section": [quarter // 4, quarter // 8, quarter // 8], "partial_rotary_factor": 0.25}
    text = {**text, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2}
    out = "hidden_size" if model_type == "qwen2_vl" else "out_hidden_size"
    vision = {**copy.deepcopy(vision), out: text["hidden_size"]}
    transformers.AutoConfig.for_model(model_type, text_config=text, vision_config=vision, **tokens,
                                      tie_word_embeddings=False).save_pretrained(folder)


def simulated(argv: list[str]) -> dict:
    """Phase -> bytes of all storages, as simulate.py counts them."""
    args, = transformers.HfArgumentParser(grpo_video.Args).parse_args_into_dataclasses(argv)
    return simulate.simulate(args, ranks=1)


def real(argv: list[str]) -> dict:
    """Phase -> bytes that the CPU's allocator has given, beyond those at its start: at its end, and at most."""
    def random_qwen(model, dtype):
        return transformers.AutoModelForImageTextToText.from_config(runtime.load_config(model), dtype=dtype)

    def mark(name):
        profilers[-1].__exit__(None, None, None)
        total = peak = 0
        for event in profilers[-1].profiler.kineto_results.events():
            if event.name() == "[memory]":
                total += event.nbytes()
                peak = max(peak, total)
        phases[names[-1]] = {"end": total, "peak": peak}
        names.append(name)
        profilers.append(profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__())

    runtime.read_qwen = random_qwen
    _, ranks, _ = runtime.setup()
    args, = transformers.HfArgumentParser(grpo_video.Args).parse_args_into_dataclasses(argv)
    phases, names = {}, ["load"]
    profilers = [profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()]
    simulate.run_step(args, runtime.load_config(args.model), ranks, mark)
    profilers[-1].__exit__(None, None, None)
    return phases


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> dict:
    """shape -> what is simulated, and what is real."""
    lines = []
    for shape, (model_type, text, vision, sizes) in SHAPES.items():
        folder = tmp_path_factory.mktemp(shape)
        write_config(folder, model_type, text, vision)
        flags = dict(model=folder, dtype="bfloat16", rollout_prompts=2, prompts_per_step=2, **sizes)
        lines.append([word for name, value in flags.items() for word in (f"--{name}", str(value))])
    # Not in this process: process groups differ, and here Hugging Face's layers are lifted to float64.
    both = [subprocess.Popen([sys.executable, __file__, way, json.dumps(lines)], stdout=-1, stderr=-1, text=True)
            for way in ("simulated", "real")]
    outputs = [process.communicate() for process in both]
    assert not any(process.returncode for process in both), outputs
    return dict(zip(SHAPES, zip(*(json.loads(out.splitlines()[-1]) for out, _ in outputs))))


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_simulated_peaks_are_those_of_a_real_step(shape, measured):
    simulated, real = measured[shape]
    assert simulated["load"]["end"] == pytest.approx(real["load"]["end"], rel=0.01)
    for phase in ("sampling", "update"):
        added = simulated[phase]["peak"] - simulated[phase]["start"]
        print(f"{shape}, {phase}: {added:,} bytes simulated, {real[phase]['peak']:,} real, {simulated[phase]['where']}")
        assert added == pytest.approx(real[phase]["peak"], rel=0.01)


@pytest.mark.parametrize("name", RELEASES)
def test_released_shapes_have_the_weights_that_the_hub_counts(name):
    qwen = runtime.empty_qwen(simulate.find_config(name), torch.bfloat16, torch.device("meta"))
    assert sum(weight.numel() for weight in qwen.parameters()) == RELEASES[name][-1]


@pytest.mark.parametrize("name, calls", [("7B", 32 * 9), ("Qwen2.5-VL-7B", 28 * 81 + 4 * 9), ("Qwen3-VL-8B", 27 * 9)])
def test_calls_of_attention_in_a_pass_of_the_tower(name, calls, device):
    # A time step or image is 9 x 9 tokens (Qwen3-VL: 8 x 8), in windows of 4 x 4 it is 9 calls.
    config, args = simulate.find_config(name), simulate.parse(name, [])
    length = sum(simulate.prompt_tokens(FAMILIES[config.model_type], args.num_frames, args.image_size))
    _, prompts = simulate.make_prompts(SimpleNamespace(config=config, device=device), 1, args.num_frames, length,
                                       args.image_size)
    tower = runtime.empty_qwen(config, torch.bfloat16, torch.device("meta")).model.visual
    attention = mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention)
    with simulate.Hollow(simulate.Ledger()), torch.no_grad(), attention as called:
        tower.to_empty(device=device)(prompts.pixel_values.to(torch.bfloat16), grid_thw=prompts.grid_thw)
    assert called.call_count == calls


def test_the_table_of_tokens_is_the_page_s():
    page = (Path(__file__).parent.parent / "README.md").read_text()
    for name in ("7B", "Qwen2.5-VL-7B", "Qwen3-VL-8B"):
        assert simulate.token_row(name, []) in page


if __name__ == "__main__":
    way, lines = {"simulated": simulated, "real": real}[sys.argv[1]], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    # A process for each, because a step leaves its group and its patches behind; forked, to import once.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        print(json.dumps(pool.map(way, lines, chunksize=1)))
