"""docs/scaling.md: its tables are what the scripts print, and the counts behind them are those of the real model."""
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2VLForConditionalGeneration

import sampler
import scaling
import toy
from conftest import ROOT
from model import Policy, vision_token_ids
from runtime import load_config
from scaling import SHAPES, G, P, Shape, bench

PAGE = (ROOT / "docs/scaling.md").read_text()


def run(*command: str) -> str:
    return subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


@pytest.mark.slow
def test_the_tables_of_the_page_are_what_the_script_prints():
    printed = scaling.tables()
    for name, lines in printed.items():
        assert lines in PAGE, f"{name} has changed: put the output of docs/scaling.py into docs/scaling.md"
    on_page = re.findall(r"(?:^\|.*\n)+", PAGE, re.MULTILINE)
    assert len(on_page) == len(printed) + 2, "a table of another origin"  # decode_bytes.py's are the two more
    # On its own, because it makes a process group of 8 imagined ranks.
    now, *states = (line for line in run("docs/decode_bytes.py").splitlines() if line.startswith(("| now", "| Qwen")))
    for line in (now, *states):
        assert line in PAGE, f"{line}: put the output of docs/decode_bytes.py into docs/scaling.md"
    # A gather for each unit: the tower's layers and the rest of it, the text model's layers, the embedding, the root.
    assert now.endswith(f" {SHAPES['7B'].depth + 1 + SHAPES['7B'].layers + 2} |")


@pytest.mark.parametrize("name", SHAPES)
def test_weights_are_those_of_the_model(name):
    qwen = bench.load_qwen(name, torch.device("meta"))
    total, vision, root = scaling.weights(SHAPES[name])
    assert total == sum(p.numel() for p in qwen.parameters())
    assert vision == sum(p.numel() for p in qwen.model.visual.parameters())
    layers = sum(p.numel() for p in qwen.model.language_model.layers.parameters())
    assert root == total - vision - layers and scaling.decoded(SHAPES[name]) == layers + qwen.lm_head.weight.numel()


def test_flops_are_those_that_torch_counts(device):
    config = load_config(str(toy.BASE))
    text, vision = config.text_config, config.vision_config
    vision.mlp_ratio = 4  # as in 2B and 7B
    qwen = Qwen2VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    shape = Shape(text.hidden_size, text.intermediate_size, text.num_attention_heads, text.num_key_value_heads,
                  text.vocab_size, True, text.num_hidden_layers, vision.depth, vision.embed_dim)
    _, prompts = bench.make_prompts(qwen)
    ids, mask = bench.random_rows(qwen, G, 16)
    policy, row_prompt = Policy(qwen, torch.float32), torch.zeros(G, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # which computes whole squares
        logps, _ = policy(prompts, row_prompt, ids, mask, 1.0, vision_token_ids(qwen, device))
        forward = counter.get_total_flops()
        logps.sum().backward()
    assert forward == scaling.flop(shape, G, 16, causal=1)
    # Twice as much backward, and lm_head once more (its chunks are computed again; without checkpointing no layer is).
    # No gradient goes to the pixels.
    embed = 2 * scaling.IMAGES * scaling.PATCHES * scaling.matrices(shape)[2]
    lm_head = 2 * G * 16 * shape.D * shape.V
    assert counter.get_total_flops() == 3 * forward - embed + lm_head


def test_cache_bytes_are_those_of_the_cache():
    config = bench.load_qwen("7B", torch.device("meta")).config
    groups, own = 3, 5
    cache = sampler.GroupCache(SimpleNamespace(config=config, dtype=torch.bfloat16), groups, P, G, own,
                               torch.device("meta"))
    found = sum(tensor.nbytes for layer in cache.layers for tensor in vars(layer).values())
    assert found == scaling.cache_bytes(SHAPES["7B"], groups, own)


def test_traffic_is_a_gather_for_each_use_and_one_reduction():
    total, _, root = scaling.weights(SHAPES["7B"])
    for nodes in (1, 2, 4):
        W = 8 * nodes
        moved = scaling.traffic(SHAPES["7B"], nodes, W, replicas=False)
        gpu, node = (sum(part[i] for part in moved.values()) for i in (0, 1))
        assert gpu * W == pytest.approx((W - 1) * (2 * (4 * total - root) + 4 * total))
        assert node == (gpu if nodes > 1 else 0)
        inside = scaling.traffic(SHAPES["7B"], nodes, W, replicas=True)
        assert inside["copy"] == (pytest.approx(7 / 8 * 2 * total), 0)
        assert inside["learn"][1] == pytest.approx(8 * total * (nodes - 1) / nodes)
