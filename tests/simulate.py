"""The memory of a step on GPUs that are not there: this repository's own code, on tensors without numbers.

    python tests/simulate.py                              # all models on 1 to 16 ranks, by LoRA on one: half an hour
    python tests/simulate.py --model 7B --ranks 8         # one row of it, and the operations that reach its peaks
    python tests/simulate.py --ranks 1 --lora_rank 16     # any flag of grpo_video.py goes along, here for all models
    python tests/simulate.py --tokens                     # the tokens and positions of a prompt, by family

A process plays rank 0 of so many. It loads, shards, makes the sampler, samples (`sample_groups`, all C tokens), learns
(`completion_logps`, `grpo_token_loss`, backward, `optimizer_step`) and renews the sampler with the functions that a run
calls, AdamW's moments in place as from the second step on. Each storage is in a ledger from its making to its end; what
FSDP frees by resizing it, too. Three things are not those of a run:
    1. Floats are not computed (`Hollow`). Their memory is allocated and never touched, which takes addresses and no
       memory; a comparison of floats is True, an index found in them 0, float.item() 1. Integers and bools are real.
    2. The config is one of those below or of bench.py, and no file of weights is read (`runtime.load_config`,
       `runtime.read_qwen`).
    3. The process group is torch's "fake" one: its collectives do nothing.

Update: a rank's share of --prompts_per_step (one prompt at least), its first two micro-batches: more add nothing.
Sampling: --rollout_prompts prompts together, whatever its share; none ends early. The reference of --kl_coef is
computed, not run: its shards are there all the time, the layer it gathers is gone before the update begins.

tests/test_simulate.py: the peaks of real steps on a CPU are these to 0.06%, with adapters to 0.7%, in each family.
What the table does not know:
    - the CUDA context and NCCL's buffers, some GB together, and what the allocator cannot use between its blocks or
      across streams (FSDP uses several): `nvidia-smi` shows more than torch's `max_memory_allocated`;
    - what kernels take inside (cuBLAS: 32 MB and more), --cuda_graph;
    - which attention a GPU takes. Booked is the CPU's fused kernel, which like flash attention keeps an output and a
      number for each query. Where only the plain one runs, sampling takes 1.3 GB more with the defaults on 7B, and the
      update's peak, which is elsewhere, nothing. A mask, (N, 1, C, P + C), is booked as bf16: 5 MB.

Windows of the tower (Qwen2.5-VL) cost calls, not memory: with full attention everywhere the peaks are the same.
"""
import argparse
import json
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch._C import DispatchKey, _current_graph_task_id, _get_dispatch_mode, _TorchDispatchModeKey
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed._tools import fake_collectives  # noqa: F401  (teaches the collectives of meta tensors)
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo_video  # noqa: E402
import runtime  # noqa: E402
from bench import SHAPES, STAMP_TOKENS, make_prompts, shape_config  # noqa: E402
from data import FAMILIES, Family, num_tokens  # noqa: E402
from model import vision_token_ids  # noqa: E402
from sampler import GroupCache  # noqa: E402

NUM_RANKS = (1, 2, 4, 8, 16)
# Of a prompt of Qwen2-VL, vision tokens left out: with 16 frames and an image of 252 pixels P is 900. 4 are starts and
# ends of vision, 11 the system line: <|im_start|> system \n You are a helpful assistant . <|im_end|> \n
TEXT_TOKENS, SYSTEM_TOKENS = 171, 11
# Of the policy's own weights (masters, and what is frozen), gradients (whole and shards), AdamW's moments, weights that
# FSDP has gathered, the sampler's copy, its keys and values, and all the rest.
PARTS = ("policy", "gradients", "moments", "gathered", "sampler", "cache", "activations")
aten = torch.ops.aten


# ----------------------------------------------------------------------------------------------------------------------
# The released models beside the two of bench.py, and their prompts.

def text_model(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict:
    return dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
                num_key_value_heads=kv_heads, vocab_size=vocab)


def hybrid_model(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, linear_heads: int) -> dict:
    return text_model(hidden, intermediate, layers, heads, kv_heads, 248320) | dict(
        head_dim=256, linear_num_key_heads=16, linear_num_value_heads=linear_heads)


VISION_2_5 = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, window_size=112,
                  fullatt_block_indexes=[7, 15, 23, 31], tokens_per_second=2)
TOWER = dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, num_position_embeddings=2304)
VISION_3 = TOWER | dict(deepstack_visual_indexes=[5, 11, 17])
# Qwen/NAME-Instruct: model_type, text model, vision tower, whether embedding and lm_head are one, from config.json; and
# the number of weights in its safetensors, as the hub counts them, which tests/test_simulate.py finds again. (Qwen3.5
# is not called -Instruct; those of `mtp`, which nobody here loads, are not counted.)
RELEASES = {
    "Qwen2.5-VL-3B": ("qwen2_5_vl", text_model(2048, 11008, 36, 16, 2, 151936), VISION_2_5, True, 3_754_622_976),
    "Qwen2.5-VL-7B": ("qwen2_5_vl", text_model(3584, 18944, 28, 28, 4, 152064), VISION_2_5, False, 8_292_166_656),
    "Qwen3-VL-2B": ("qwen3_vl", text_model(2048, 6144, 28, 16, 8, 151936), VISION_3, True, 2_127_532_032),
    "Qwen3-VL-4B": ("qwen3_vl", text_model(2560, 9728, 36, 32, 8, 151936), VISION_3, True, 4_437_815_808),
    "Qwen3-VL-8B": ("qwen3_vl", text_model(4096, 12288, 36, 32, 8, 151936),
                    VISION_3 | dict(depth=27, hidden_size=1152, intermediate_size=4304,
                                    deepstack_visual_indexes=[8, 16, 24]), False, 8_767_123_696),
    "Qwen3.5-0.8B": ("qwen3_5", hybrid_model(1024, 3584, 24, 8, 2, 16),
                     TOWER | dict(depth=12, hidden_size=768, intermediate_size=3072, num_heads=12), True, 852_985_920),
    "Qwen3.5-2B": ("qwen3_5", hybrid_model(2048, 6144, 24, 8, 2, 16), TOWER, True, 2_213_241_664),
    "Qwen3.5-4B": ("qwen3_5", hybrid_model(2560, 9216, 32, 16, 4, 32), TOWER, True, 4_539_265_536),
    "Qwen3.5-9B": ("qwen3_5", hybrid_model(4096, 12288, 32, 16, 4, 32),
                   TOWER | dict(depth=27, hidden_size=1152, intermediate_size=4304), False, 9_409_813_744),
}
ROPE = {"qwen2_5_vl": dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
        "qwen3_vl": dict(rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True),
        "qwen3_5": dict(rope_type="default", rope_theta=1e7, mrope_section=[11, 11, 10], mrope_interleaved=True,
                        partial_rotary_factor=0.25)}


def find_config(model: str):
    """That of one of bench.py's or of these, or of a folder."""
    if model in SHAPES:
        return shape_config(model)
    if model not in RELEASES:
        return runtime.load_config(model)
    model_type, text, vision, tied, _ = RELEASES[model]
    text = text | dict(rope_parameters=ROPE[model_type])
    text |= dict(head_dim=128) if model_type == "qwen3_vl" else {}
    vision = vision | dict(out_hidden_size=text["hidden_size"])
    return transformers.AutoConfig.for_model(model_type, text_config=text, vision_config=vision,
                                             tie_word_embeddings=tied)


def prompt_tokens(family: Family, num_frames: int, image_size: int) -> tuple[int, int, int, int]:
    """Tokens of a prompt of a video and an image: vision tokens of both; starts, ends and timestamps; other text."""
    steps, side = num_frames // 2, image_size // family.patch_size
    video, image = (num_tokens(torch.tensor([time, side, side])) for time in (steps, 1))
    runs = steps + 1 if family.timestamps else 2
    stamps = steps * STAMP_TOKENS if family.timestamps else 0
    text = TEXT_TOKENS - 4 - (0 if family.system else SYSTEM_TOKENS) + (2 if family.opening else 0)  # <think> and \n
    return video, image, 2 * runs + stamps, text


# ----------------------------------------------------------------------------------------------------------------------
# The ledger: bytes of all storages that live, by part.

class Ledger:
    """The sum of all live storages, and its peak."""

    def __init__(self):
        self.live = {}  # address -> [bytes, part, weak reference to the storage]
        self.part = "activations"  # of what is made now, unless `booked` says otherwise
        self.learned = set()  # shapes of the weights that learn
        self.sums = dict.fromkeys(PARTS, 0)
        self.total = 0
        self.start_phase()

    def start_phase(self) -> None:
        self.start = self.peak = self.total
        self.at_peak, self.where = dict(self.sums), ""

    def add(self, tensor: Tensor, op) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live or tensor.device.type == "meta":
            return
        backward = _current_graph_task_id() != -1
        # Autograd makes a weight's gradient like any other tensor, and may add several before it is the weight's.
        part = "gradients" if backward and tuple(tensor.shape) in self.learned else self.part
        self.live[key] = [0, part, weakref.ref(storage, lambda _: self.forget(key))]
        self.resize(key, storage.nbytes(), f"{'backward' if backward else 'forward'}, {op} {tuple(tensor.shape)}")

    def resize(self, key: int, size: int, where: str = "") -> None:
        if key not in self.live:
            return
        size_before, part, _ = self.live[key]
        self.live[key][0] = size
        self.sums[part] += size - size_before
        self.total += size - size_before
        if self.total > self.peak:
            self.peak, self.at_peak, self.where = self.total, dict(self.sums), where or f"a resized storage of {part}"

    def forget(self, key: int) -> None:
        self.resize(key, 0)
        del self.live[key]

    def booked(self, owner, name: str, part: str) -> None:
        """From now on, what the function `owner.name` makes is of this part."""
        function = getattr(owner, name)

        def wrapper(*args, **kwargs):
            before, self.part = self.part, part
            try:
                return function(*args, **kwargs)
            finally:
                self.part = before
        setattr(owner, name, wrapper)

    def watch_resizing(self) -> None:
        """FSDP frees gathered weights by making their storage small, which is no operation of torch's."""
        resize_ = torch.UntypedStorage.resize_

        def wrapper(storage, size):
            resize_(storage, size)
            self.resize(storage._cdata, size)
        torch.UntypedStorage.resize_ = wrapper


# ----------------------------------------------------------------------------------------------------------------------
# Tensors without numbers.

class Hollow(TorchDispatchMode):
    """Operations on floats only make their outputs; all others are done. What is made goes to the ledger.

    It works below autograd, on plain tensors of the CPU: FSDP, checkpointing, views and frees are the real ones. (From
    torch's own FakeTensorMode some of this code would have to be hidden: `to_empty`, `tolist`, boolean masks.)
    """
    # Views that are not marked as such, and what changes a storage itself.
    REALLY = {aten._unsafe_view.default, aten.lift_fresh.default, aten.resize_.default,
              aten.set_.source_Storage, aten.set_.source_Tensor, aten.set_.source_Storage_storage_offset}

    def __init__(self, ledger: Ledger):
        super().__init__()
        self.ledger, self.known = ledger, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # DTensor asks again, for its shards
        if FakeTensor in types or _get_dispatch_mode(_TorchDispatchModeKey.FAKE):
            return func(*args, **kwargs)  # DTensor works out shapes
        if func.namespace == "fsdp":  # written in Python, of operations that are to be seen one by one
            with self:
                return func._op_dk(DispatchKey.CPU, *args, **kwargs)
        out = self.outputs(func, args, kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.ledger.add(tensor, func)
        return out

    def outputs(self, func, args, kwargs):
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        floats = any(x.is_floating_point() for x in tensors)
        on_meta = any(x.device.type == "meta" for x in tensors) or str(kwargs.get("device")) == "meta"
        if func.is_view or func in self.REALLY or on_meta or (tensors and not floats):
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return 1.0
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]
        if func.namespace == "c10d":  # done on meta tensors, for the handle that it returns
            return func(*tree_map_only(Tensor, on_meta_device, args), **kwargs)
        if (func is aten.add.Tensor and _current_graph_task_id() != -1 and not torch.is_grad_enabled()
                and len(tensors) == 2 and {tuple(x.shape) for x in tensors} <= self.ledger.learned):
            return args[0]  # the second gradient of a weight: added to the first in place, but where a mode looks on
        if func is aten.index.Tensor:  # a mask becomes the places that it keeps, as inside the kernel
            with self:
                places = [[x] if x is None or x.dtype != torch.bool else x.nonzero().unbind(1) for x in args[1]]
            args = args[0], [x for group in places for x in group]
            leaves, spec = tree_flatten((args, kwargs))
        arguments = func._schema.arguments
        if func._schema.is_mutable:  # in place: nothing is made, and what would be written is returned
            named = dict(zip((a.name for a in arguments), args)) | kwargs
            written = [named[a.name] for a in arguments if a.is_write and a.name in named]
            return None if not func._schema.returns else written[0] if len(written) == 1 else tuple(written)
        key = func, spec, *((tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else (type(x), x)
                            for x in leaves)
        if key not in self.known:
            where = {"device": "meta"} if any(a.name == "device" for a in arguments) else {}
            meta_args, meta_kwargs = tree_map_only(Tensor, on_meta_device, (args, kwargs))
            self.known[key] = func(*meta_args, **(meta_kwargs | where))
        meta = self.known[key]
        if not tensors and not any(x.is_floating_point() for x in tree_leaves(meta) if isinstance(x, Tensor)):
            return func(*args, **kwargs)  # torch.arange and the like
        return tree_map_only(Tensor, hollow, meta)


def on_meta_device(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def hollow(meta: Tensor) -> Tensor:
    """Memory for it; what is said of floats is True (they are finite), and the index found in them 0."""
    out = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype)
    return out if out.is_floating_point() else out.fill_(out.dtype == torch.bool)


# ----------------------------------------------------------------------------------------------------------------------
# A step.

def run_step(args, config, ranks: int, mark) -> None:
    """What `main` of grpo_video.py does up to the second step's end. `mark(name)` is called where a phase begins."""
    device = torch.device("cpu")
    policy = runtime.load_policy(args, device, naive=args.naive)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, fused=True)
    make_moments(policy, optimizer)
    sampler = runtime.make_sampler(policy, device)
    examples = make_examples(args, config, device)
    banned_ids, never = vision_token_ids(sampler, device), torch.tensor([-1])  # no token ends a completion

    mark("sampling")
    rollout = grpo_video.sample_groups(sampler, examples, 0, args, never, banned_ids)
    mark("update")
    learned = torch.arange(len(rollout.lengths))[:max(1, args.prompts_per_step // ranks) * args.group_size]
    for rows in runtime.micro_batches(learned, args.micro_batch_size)[:2]:
        logps, entropy = grpo_video.completion_logps(policy, rollout, rows)
        old = logps.detach()
        loss, kl, clipped = grpo_video.grpo_token_loss(logps, old, old if args.kl_coef else None, torch.ones(len(rows)),
                                                       args.clip_low, args.clip_high, args.kl_coef)
        loss.sum().backward()
    runtime.optimizer_step(policy, optimizer, args.learning_rate, args.max_grad_norm)
    runtime.copy_weights(policy, sampler)
    mark("")


def make_moments(policy, optimizer) -> None:
    """AdamW makes them in its first step."""
    for weight in policy.parameters():
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()


def make_examples(args, config, device) -> list:
    """As many prompts as are decoded together, each of a video, an image and a text."""
    length = sum(prompt_tokens(FAMILIES[config.model_type], args.num_frames, args.image_size))
    like = SimpleNamespace(config=config, device=device)
    examples, _ = make_prompts(like, args.rollout_prompts, args.num_frames, length, args.image_size)
    for n, example in enumerate(examples):
        example.question = SimpleNamespace(id=str(n))
    return examples


def simulate(args, ranks: int) -> dict:
    """Bytes of one rank: phase -> what there was before, its peak, the parts of the peak, and where it was."""
    config = find_config(args.model)
    runtime.load_config = lambda model: config
    runtime.read_qwen = lambda model, dtype: runtime.empty_qwen(config, dtype, torch.device("cpu"))
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    ledger, phases, names = Ledger(), {}, ["load"]
    for name in ("unshard", "wait_for_unshard"):
        ledger.booked(FSDPParamGroup, name, "gathered")
    ledger.booked(FSDPParamGroup, "post_backward", "gradients")  # a unit's, whole in float32, and what stays, its shard
    ledger.booked(runtime, "load_policy", "policy")
    ledger.booked(runtime, "make_sampler", "sampler")
    ledger.booked(GroupCache, "__init__", "cache")
    ledger.booked(sys.modules[__name__], "make_moments", "moments")
    ledger.watch_resizing()
    weights = runtime.empty_qwen(config, torch.bfloat16, torch.device("meta"))
    ledger.learned = {tuple(weight.shape) for weight in weights.parameters()}

    def mark(name: str) -> None:
        phases[names[-1]] = {"start": ledger.start, "peak": ledger.peak, "end": ledger.total, "where": ledger.where,
                             "parts": ledger.at_peak}
        names.append(name)
        ledger.start_phase()

    with Hollow(ledger):
        run_step(args, config, ranks, mark)
    reference = args.kl_coef > 0 and not args.lora_rank  # with adapters it is the policy without them
    phases["reference"] = sum(weight.numel() for weight in weights.parameters()) * 2 // ranks if reference else 0
    return phases


# ----------------------------------------------------------------------------------------------------------------------
# The table.

TOKENS_HEADER = ["model_type", "pixels", "video", "image", "starts, ends, timestamps", "text", "tokens", "positions"]
HEADER = ["model", "ranks", "update", "sampling", *PARTS, "reference"]


def table_row(model: str, ranks: int, phases: dict) -> str:
    parts = max(phases["sampling"], phases["update"], key=lambda phase: phase["peak"])["parts"]
    numbers = [phases["update"]["peak"], phases["sampling"]["peak"], *parts.values(), phases["reference"]]
    return f"| {model} | {ranks} | " + " | ".join(f"{number / 1e9:.1f}" for number in numbers) + " |"


def in_a_process(model: str, ranks: int, flags: list[str]) -> dict:
    command = [sys.executable, __file__, "--json", "--model", model, "--ranks", str(ranks), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def token_row(model: str, flags: list[str]) -> str:
    """A prompt of the model's family, of a video of half a second a frame: tokens by kind, and positions used."""
    args, config = parse(model, flags), find_config(model)
    family = FAMILIES[config.model_type]
    tokens = prompt_tokens(family, args.num_frames, args.image_size)
    like = SimpleNamespace(config=config, device=torch.device("cpu"))
    _, prompt = make_prompts(like, 1, args.num_frames, sum(tokens), args.image_size)
    positions = int(prompt.next_position)
    return "| " + " | ".join(map(str, (config.model_type, args.image_size, *tokens, sum(tokens), positions))) + " |"


def parse(model: str, flags: list[str]):
    parser = transformers.HfArgumentParser(grpo_video.Args)
    token_size = FAMILIES[find_config(model).model_type].token_size
    pixels = round(parser.get_default("image_size") / token_size) * token_size  # 252, for Qwen3-VL 256
    parser.set_defaults(image_size=pixels)
    args, = parser.parse_args_into_dataclasses(["--model", model, *flags])
    args.dtype = "bfloat16" if args.dtype == "auto" else args.dtype
    return args


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[*SHAPES, *RELEASES],
                        help=f"{', '.join(SHAPES)} (Qwen2-VL's), {', '.join(RELEASES)}, or a folder with a config.json")
    parser.add_argument("--ranks", nargs="+", type=int, default=NUM_RANKS, help="number of GPUs")
    parser.add_argument("--json", action="store_true", help="print one row's bytes as JSON")
    parser.add_argument("--tokens", action="store_true", help="print the tokens of a prompt, by family")
    own, flags = parser.parse_known_args()
    if own.tokens:
        one_each = {find_config(model).model_type: model for model in own.model}
        print("| " + " | ".join(TOKENS_HEADER) + " |\n" + "|---" * len(TOKENS_HEADER) + "|")
        return print("\n".join(token_row(model, flags) for model in one_each.values()))
    rows = [(model, ranks, flags) for model in own.model for ranks in own.ranks]
    if len(sys.argv) == 1:
        rows += [(model, 1, ["--lora_rank", "16"]) for model in own.model]
    if len(rows) == 1:
        (model, ranks, _), = rows
        results = [simulate(parse(model, flags), ranks)]
        if own.json:
            return print(json.dumps(results[0]))
        for phase in ("sampling", "update"):
            print(f"{phase}: the peak is in the {results[0][phase]['where']}")
    else:
        with ThreadPoolExecutor(2) as pool:
            results = list(tqdm(pool.map(lambda row: in_a_process(*row), rows), total=len(rows), unit="row"))
    print("GB (1e9 bytes) of one rank; the parts are those of the larger peak; the reference comes on top")
    print("| " + " | ".join(HEADER) + " |\n" + "|---" * len(HEADER) + "|")
    for (model, ranks, flags), phases in zip(rows, results):
        print(table_row(" ".join([model, *flags]), ranks, phases))


if __name__ == "__main__":
    main()
