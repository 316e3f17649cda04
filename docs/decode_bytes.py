"""What one decode step moves from logits to token, in attention, and in states; collectives.

    python docs/decode_bytes.py              # of the code as it is
    python docs/decode_bytes.py 68e53be      # and at that commit (it needs the repository's history)

7B's shape on tensors without memory: 8 prompts x 8 rows, P = 900, 128 tokens of each completion there. An operator
moves its inputs and its outputs once; views move nothing, lookups only what they look up, products with weights are
left out. Kernels may read twice, or hit a cache: no GPU was asked.
"""
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor.debug import CommDebugMode  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

import deltanet  # noqa: E402
import runtime  # noqa: E402
import sampler  # noqa: E402
from model import Policy  # noqa: E402
from scaling import SHAPES, C, G, P, bench, cache_bytes, decoded  # noqa: E402
from simulate import RELEASES, find_config  # noqa: E402

META, BF16 = torch.device("meta"), torch.bfloat16
LOOKUPS = "gather index index_select embedding searchsorted index_fill_ index_copy_ index_put_".split()


class Count(TorchDispatchMode):
    """Operators, and the bytes of those that are no products with weights."""

    def __init__(self):
        super().__init__()
        self.bytes = self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name in ("_unsafe_view", "empty"):
            return out
        self.operators += 1
        if name not in ("mm", "addmm"):
            table = args[0] if name in LOOKUPS else None
            self.bytes += sum(touched(x) for x in tree_leaves((args, kwargs, out))
                              if isinstance(x, torch.Tensor) and x is not table)
        return out


def touched(x: torch.Tensor) -> int:
    """Bytes behind a tensor: along an expanded dimension the same ones again."""
    return x.element_size() * torch.Size([n for n, stride in zip(x.shape, x.stride()) if stride]).numel()


def empty(*shape, dtype=BF16):
    return torch.empty(*shape, dtype=dtype, device=META)


def step_bytes(module, s, B: int = 8, width: int = C // 2) -> tuple[int, int]:
    """Bytes from logits to token, and in attention in all layers, of a step of `module`, a sampler.py."""
    N, d, prompts = B * G, s.D // s.H, SimpleNamespace(lengths=torch.full((B,), P), ids=empty(B * P))
    text = SimpleNamespace(num_hidden_layers=s.layers, num_attention_heads=s.H, num_key_value_heads=s.H_kv,
                           hidden_size=s.D)
    qwen = SimpleNamespace(config=SimpleNamespace(text_config=text), dtype=BF16, lm_head=lambda hidden: empty(N, s.V),
                           get_input_embeddings=lambda: lambda token: token)
    no_cache = SimpleNamespace(prefill=lambda prompts: empty(N, s.D), feed=lambda token: empty(N, s.D))

    def to_token(tokens):
        with mock.patch.object(module, "open_cache", lambda *args: no_cache), Count() as count:
            module.generate(qwen, prompts, G, tokens, 1.0, list(range(B)), empty(2, dtype=torch.int64),
                            empty(4, dtype=torch.int64))
        return count.bytes

    def all_layers(qwen, embeds, positions, attend, *_):
        for layer in range(s.layers):
            attend(layer, empty(s.H, N, d), empty(s.H_kv, N, d), empty(s.H_kv, N, d))
        return empty(1, N, s.D)

    cache = module.GroupCache(qwen, B, P, G, C, META)
    cache.width = width - 1
    with mock.patch.object(module, "text_states", all_layers), Count() as count:
        cache.feed(empty(N, dtype=torch.int64))
    return to_token(3) - to_token(2), count.bytes


def states_row(model: str, R: int = 8 * G) -> str:
    """What the layers without attention of a Qwen3.5 remember, and move at a token, R rows together."""
    qwen = runtime.empty_qwen(find_config(model), BF16, META).requires_grad_(False)
    deltanet.add_seam(qwen)
    layers, config = qwen.model.language_model.layers, qwen.config.text_config
    num_layers, layer = deltanet.layer_kinds(config).count("linear_attention"), layers[0].linear_attn
    cache = deltanet.RowStates(config, 8, P, R, C, BF16, META)
    H, channels = config.linear_num_value_heads, cache.inputs.shape[2]
    with Count() as count:
        cache.feed(layer, empty(R, channels), empty(R, H, dtype=torch.float32), empty(R, H))
    held = num_layers * (cache.inputs.nbytes + cache.S.nbytes)
    weights = sum(weight.nbytes for module in (layers, qwen.lm_head) for weight in module.parameters())
    return (f"| {model} | {held / R / 1e6:.0f} | {held / 1e9:.1f} | {2 * held / 1e9:.1f} | "
            f"{num_layers * count.bytes / 1e9:.1f} | {weights / 1e9:.1f} |")


def operators() -> int:
    """Operators of a token's pass through all layers, those of Hugging Face included."""
    cache = sampler.GroupCache(bench.load_qwen("7B", META), 8, P, G, C, META)
    with Count() as count:
        cache.feed(empty(8 * G, dtype=torch.int64))
    return count.operators


def gathers(copy_weights) -> int:
    """All-gathers in one call, on the first of 8 ranks, the others imagined; sharded as `shard` in runtime.py does."""
    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    mesh = init_device_mesh("cpu", (8,))
    with FakeTensorMode(allow_non_fake_inputs=True), CommDebugMode() as seen:
        qwen, target = (bench.load_qwen("7B", torch.device("cpu")) for _ in range(2))
        policy = Policy(qwen, BF16)
        for unit in (*qwen.model.visual.blocks, qwen.model.visual, *qwen.model.language_model.layers,
                     qwen.get_input_embeddings(), policy):
            fully_shard(unit, mesh=mesh)
        copy_weights(policy, target)
    return seen.get_total_counts()


def row(name: str, sampler_module, runtime_module) -> str:
    logits, attention = step_bytes(sampler_module, SHAPES["7B"])
    return f"| {name} | {logits / 1e6:.0f} | {attention / 1e6:.0f} | {gathers(runtime_module.copy_weights)} |"


def at_commit(commit: str, file: str) -> ModuleType:
    module = sys.modules[f"old_{file}"] = ModuleType(f"old_{file}")
    exec(subprocess.check_output(["git", "show", f"{commit}:{file}.py"], text=True), vars(module))
    return module


if __name__ == "__main__":
    print("| | logits to token, MB | attention, MB | all-gathers of copy_weights |\n| --- | --- | --- | --- |")
    for commit in sys.argv[1:]:
        print(row(commit, at_commit(commit, "sampler"), at_commit(commit, "runtime")))
    print(row("now", sampler, runtime))
    print(f"\nBeside {2 * decoded(SHAPES['7B']) / 1e6:.0f} MB of weights; the caches hold "
          f"{cache_bytes(SHAPES['7B'], 8, C // 2) / 1e6:.0f} MB. {operators()} operators in a pass.")
    print("\n| | state of a row, MB | of 64 rows, GB | read and written once, GB | by the plain rule, GB | "
          "weights, GB |\n| --- | --- | --- | --- | --- | --- |")
    for model in (name for name, (model_type, *_) in RELEASES.items() if model_type == "qwen3_5"):
        print(states_row(model))
