"""Qwen2-VL under plain torch: everything that the training and evaluation scripts share.

From top to bottom: processes, loading and sharding, a batch of prompts on the device, attention in which rows share their
prompt, the policy (prompt + completion -> log-probs), the actor (the plain copy that samples), and what is written to disk.
No algorithm lives here: group sampling, rewards, advantages and losses are in grpo_video.py, cross-entropy is in sft_video.py.

Two copies of the weights, on purpose:

    policy   float32 masters, sharded by FSDP2, computes in bf16 on a GPU (float32 on a CPU). It learns.
    actor    a plain Hugging Face module in the compute dtype, one whole copy per rank. It only samples.

A sharded model must not sample token by token: each token would all-gather every layer (about 38 ms a token for 7B on an
H200, by arithmetic), and ranks whose completions differ in length would wait for each other forever. The actor touches no
collective; refreshing it once a step costs one all-gather per parameter and 2 bytes of memory per weight. To sample with
another engine, replace the actor.

Letters: B prompts, N rows (completions), P prompt tokens, C completion tokens, V vocabulary, S vision patches, D hidden size,
H heads of size d (keys and values: H_kv). Packed, that is without padding: M tokens of all completions, T tokens in all.
"""
import dataclasses
import itertools
import json
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, HfArgumentParser, Qwen2VLForConditionalGeneration
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import cached_file

from data import Example, encode_prompt, patchify, rope_positions

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
LOGITS_CHUNK = 512  # completion tokens whose (chunk, V) logits exist at one time: 512 x 152,064 float32 is 0.3 GB
# Work that this process has done since its run began, for the report at the end: exact, and the same on every machine.
COUNTS = {"vision_patches": 0,  # patches through the vision tower
          "prefill_tokens": 0,  # prompt tokens through the sampler's text model
          "decoded_tokens": 0,  # completion tokens through it, those of finished rows that stayed in the batch included
          "learner_tokens": 0,  # prompt and completion tokens through policy and reference, padding included if there is any
          "logits": 0,  # elements of the logits of policy and reference
          "collectives": 0}  # all-gathers of weights, reductions of gradients and sums, barriers; of one process alone the last two
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
                   "chat_template.json", "chat_template.jinja")


# ----------------------------------------------------------------------------------------------------------------------
# Arguments and processes: one command line for a laptop and for a cluster.

def arg(default, meaning: str):
    """A dataclass field with its meaning, which --help prints. A list is the default by value: no two instances share it."""
    metadata = {"help": meaning.replace("%", "%%")}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def check_ranges(args, **ranges: tuple[float, float | None]) -> None:
    """Raises ValueError for a field outside its closed range; None is no upper bound."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if not low <= value <= (math.inf if high is None else high):  # NaN fails too
            raise ValueError(f"--{name} {value}: must be {f'>= {low}' if high is None else f'from {low} to {high}'}")


def parse_args(args_class, toy: dict, argv: list[str] | None = None):
    """Reads the command line into `args_class`. On the toy world (no --data_root) the defaults are `toy`'s; flags win.

    Prints which values are in use and where each comes from.
    """
    parser = HfArgumentParser(args_class)
    argv = sys.argv[1:] if argv is None else argv
    args, = parser.parse_args_into_dataclasses(argv)
    if args.data_root == "toy":
        if args.model != "toy" and not Path(args.model).is_dir():
            raise ValueError(f"--model {args.model} needs --data_root; without it the toy world's data and hyper-parameters apply, "
                             "which only suit a local folder of a model made for it")
        parser.set_defaults(**toy)
        args, = parser.parse_args_into_dataclasses(argv)
    elif args.model == "toy":
        raise ValueError(f"--data_root {args.data_root} needs --model, such as Qwen/Qwen2-VL-7B-Instruct: the toy model reads the "
                         "toy world only")
    if os.environ.get("RANK", "0") == "0":
        flags = {word.split("=")[0][2:].replace("-", "_").removeprefix("no_") for word in argv if word.startswith("--")}
        for name, value in vars(args).items():
            origin = "flag" if name in flags else "toy world" if args.data_root == "toy" and name in toy else "default"
            print(f"{name:24} {value!s:40} {origin}")
    return args


def setup() -> tuple[int, int, torch.device]:
    """Joins the process group, begins COUNTS anew, and returns (rank, world_size, device).

    Under torchrun the address comes from its environment variables; without it a group of one process is made, so that
    the same code path (FSDP, collectives, checkpoints) runs everywhere. NCCL on GPUs, gloo on CPUs.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        # An hour, not the usual 10 minutes: the others wait while rank 0 downloads and reads the model.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1), **alone)
    COUNTS.update(dict.fromkeys(COUNTS, 0), collectives=-num_collectives())
    return dist.get_rank(), dist.get_world_size(), device


def num_collectives() -> int:
    """How many collectives this process has taken part in. torch numbers them, to tell which one hangs."""
    return dist.group.WORLD._get_sequence_number_for_group()


def resolve_toy(args):
    """The same arguments with folders in place of the name "toy". Rank 0 writes the toy world if it is not there yet."""
    if "toy" not in (args.model, args.data_root):
        return args
    import toy  # only here: whoever brings model and data never loads the toy world
    if dist.get_rank() == 0:
        toy.build()
    dist.barrier()
    return dataclasses.replace(args, model=str(toy.BASE) if args.model == "toy" else args.model,
                               data_root=str(toy.ROOT) if args.data_root == "toy" else args.data_root)


def sum_over_ranks(values: dict[str, float | Tensor], device: torch.device) -> dict[str, float]:
    """Sums each value over all ranks in float64. Collective: every rank calls it with the same keys in the same order.

    Metrics travel as sums and counts and are divided once, at the end: a mean of per-rank means would weigh a rank with
    few tokens as much as one with many.
    """
    total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values.values()])
    dist.all_reduce(total)
    return dict(zip(values, total.tolist()))  # CPU-GPU sync


def max_over_ranks(value: int, device: torch.device) -> int:
    """The largest `value` of all ranks. Collective."""
    most = torch.tensor(value, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return int(most)  # CPU-GPU sync


# ----------------------------------------------------------------------------------------------------------------------
# Loading and sharding.

def load_tokenizer(model: str):
    """The tokenizer of a local folder or hub id. No code from the hub is ever run.

    ValueError if its vision tokens are not those of the model: then no pixel would arrive where the model expects it, and
    whole runs have been trained without a video that nobody missed (Qwen-VL-Series-Finetune#207).
    """
    tokenizer, config = AutoTokenizer.from_pretrained(model), check_qwen2_vl(model)
    for token, wanted in (("<|image_pad|>", config.image_token_id), ("<|video_pad|>", config.video_token_id)):
        found = tokenizer.convert_tokens_to_ids(token)
        if found != wanted:
            raise ValueError(f"--model {model}: {token} is token {found} of its tokenizer and {wanted} of its config; take both "
                             "from one model")
    return tokenizer


def check_qwen2_vl(model: str):
    """The config of --model; ValueError if it is another kind of model."""
    config = AutoConfig.from_pretrained(model)
    if config.model_type != "qwen2_vl":
        raise ValueError(f"--model {model}: its model_type is {config.model_type!r}; give a Qwen2-VL ('qwen2_vl')")
    return config


def load_qwen(model: str, dtype: torch.dtype) -> Qwen2VLForConditionalGeneration:
    """Qwen2-VL from a local folder or hub id (safetensors only), on the CPU, whole on rank 0 and *empty* elsewhere.

    Only rank 0 reads the file: 8 ranks of float32 7B would need 265 GB of host memory. The other ranks get the right
    shapes on memory that nobody has written, and their shards arrive by broadcast in `shard`.
    """
    config = check_qwen2_vl(model)
    if dist.get_rank() == 0:
        return Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=dtype, use_safetensors=True)
    qwen = empty_qwen(config, dtype, torch.device("cpu"))
    # A file of its own, with more end tokens in it than the config has: all ranks must stop at the same ones.
    if cached_file(model, "generation_config.json", _raise_exceptions_for_missing_entries=False):
        qwen.generation_config = GenerationConfig.from_pretrained(model)
    return qwen


def empty_qwen(config, dtype: torch.dtype, device: torch.device) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL whose weights and buffers hold no values yet. Building on "meta" skips minutes of random init for 7B."""
    with torch.device("meta"):
        qwen = Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype)
    qwen = qwen.to_empty(device=device)
    qwen.tie_weights()  # to_empty gives embedding and lm_head separate memory; 2B shares them, 7B does not
    return qwen


def shard(policy: "Policy", device: torch.device) -> None:
    """FSDP2 in place: one unit for the vision tower, one per decoder layer, the root last. Collective.

    Masters keep the dtype they were loaded in (float32: AdamW at lr 1e-6 moves hardly any weight that is stored in bf16);
    weights are cast to the compute dtype when gathered, gradients are reduced in the masters' dtype. Embedding and lm_head
    both stay in the root unit, because in the 2B model they are one tensor.
    """
    qwen, full = policy.qwen, policy.state_dict()
    master_dtype = next(policy.parameters()).dtype
    mixed = MixedPrecisionPolicy(param_dtype=policy.compute_dtype, reduce_dtype=master_dtype)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in (qwen.model.visual, *qwen.model.language_model.layers):
        fully_shard(unit, mesh=mesh, mp_policy=mixed)
    # The root's weights stay gathered from forward to backward, unless there is no backward that would free them.
    learns = any(p.requires_grad for p in policy.parameters())
    fully_shard(policy, mesh=mesh, mp_policy=mixed, reshard_after_forward=not learns)
    # Until here every rank has sharded its own copy, which is real on rank 0 only.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(policy, full if dist.get_rank() == 0 else {}, options=options)
    for buffer in policy.buffers():  # rotary frequencies: not part of a state dict, so empty beyond rank 0
        dist.broadcast(buffer, 0)


def pick_dtype(args, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: --dtype, where auto is bf16 on a GPU and float32 on a CPU."""
    if args.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if args.dtype not in DTYPES:
        raise ValueError(f"--dtype {args.dtype!r}: must be auto or one of {', '.join(DTYPES)}")
    return DTYPES[args.dtype]


def load_policy(args, device: torch.device, frozen: bool = False, naive: bool = False) -> "Policy":
    """The sharded policy of --model, ready to learn: masters in float32 (float64 where that is the compute dtype).

    `frozen` gives a reference that never learns. It is kept in the compute dtype: masters would be cast to it anyway.
    `naive` runs prompt and completion as padded rows that share only the vision pass.
    """
    dtype = pick_dtype(args, device)
    qwen = load_qwen(args.model, dtype if frozen else torch.promote_types(dtype, torch.float32))
    qwen.train(not frozen).requires_grad_(not frozen)
    if args.gradient_checkpointing and not frozen:  # keeps one activation per layer and recomputes the rest: a third more time
        # The method's new name; transformers 5.17 and older know the other one only.
        enable = getattr(qwen, "activation_checkpointing_enable", None) or qwen.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    policy = Policy(qwen, dtype, naive)
    shard(policy, device)
    return policy


# ----------------------------------------------------------------------------------------------------------------------
# A batch of prompts on the device.

@dataclass
class Prompts:
    """B prompts, one after the other, without padding."""
    ids: Tensor  # (tokens of all prompts,) int64
    lengths: Tensor  # (B,) int64
    position_ids: Tensor  # (3, tokens) int64: time, height, width of M-RoPE
    next_position: Tensor  # (B,) int64: the position of the first completion token, on all three axes
    pixel_values: Tensor  # (S, 1176) float32: the patches of all prompts, in the order of their tokens
    grid_thw: Tensor  # (videos and images, 3) int64: patches in time, height and width


def collate_prompts(examples: list[Example], device: torch.device) -> Prompts:
    """Concatenates prompts and their patches (a prompt's video before its image, as in its text)."""
    pixels = [(values, grid) for e in examples
              for values, grid in ((e.pixel_values_videos, e.video_grid_thw), (e.pixel_values, e.image_grid_thw))
              if values is not None]
    if not pixels:  # --video text_only. The vision tower must run on all ranks alike: on a token that no prompt has a place for
        pixels = [patchify(np.zeros((1, 28, 28, 3), np.uint8))]
    batch = Prompts(
        ids=torch.cat([e.prompt_ids for e in examples]),
        lengths=torch.tensor([len(e.prompt_ids) for e in examples]),
        position_ids=torch.cat([e.position_ids for e in examples], dim=1),
        # Not the length: a video of 648 tokens advances the positions by 9 only (its largest grid side after the 2x2 merge).
        next_position=torch.stack([e.position_ids.max() + 1 for e in examples]),
        pixel_values=torch.cat([values for values, _ in pixels]),
        grid_thw=torch.cat([grid for _, grid in pixels]))
    return Prompts(**{name: tensor.to(device) for name, tensor in vars(batch).items()})


def blank_batch(tokenizer, config, device: torch.device) -> tuple[Prompts, Tensor, Tensor, Tensor]:
    """What `Policy.forward` takes, as small as it gets: for a rank that has less to learn in a step than the others.

    Every rank must run as many forward and backward passes as the others, because FSDP gathers weights in each. A rank
    that is short of micro-batches (unreadable videos, groups that teach nothing) runs this one, with weight 0.
    """
    pixels, grid = patchify(np.zeros((1, 28, 28, 3), np.uint8))
    ids = encode_prompt(tokenizer, "-", image_grid_thw=grid)
    example = Example(None, (), "", "-", prompt_ids=ids, pixel_values=pixels, image_grid_thw=grid,
                      position_ids=rope_positions(ids, [grid], config.image_token_id, config.video_token_id))
    end = torch.tensor([[tokenizer.convert_tokens_to_ids("<|im_end|>")]], device=device)
    prompts = collate_prompts([example], device)
    return prompts, torch.zeros(1, dtype=torch.int64, device=device), end, torch.ones_like(end, dtype=torch.bool)


def embed_prompts(qwen: Qwen2VLForConditionalGeneration, prompts: Prompts) -> Tensor:
    """Token embeddings with the vision tower's outputs in the places of the vision tokens: (tokens of all prompts, D)."""
    COUNTS["vision_patches"] += len(prompts.pixel_values)
    # One pass for videos and images alike: to the tower an image is a video of one temporal patch.
    vision = qwen.model.visual(prompts.pixel_values, grid_thw=prompts.grid_thw).pooler_output  # (S / 4, D)
    is_vision = (prompts.ids == qwen.config.image_token_id) | (prompts.ids == qwen.config.video_token_id)
    embeds = qwen.get_input_embeddings()(prompts.ids)
    return embeds.masked_scatter(is_vision[:, None], vision.to(embeds.dtype))


def end_token_ids(qwen: Qwen2VLForConditionalGeneration, tokenizer, device: torch.device) -> Tensor:
    """Tokens that end a completion: the turn's end, <|im_end|>, and whatever else the generation config names.

    This list is all that is ever taken from the generation config. Qwen2-VL ships top_k=1 in it: code that inherits its
    sampling options draws G identical completions and every advantage is 0.
    """
    ends = qwen.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    return torch.tensor(sorted({tokenizer.convert_tokens_to_ids("<|im_end|>"), *ends}), device=device)


def vision_token_ids(qwen: Qwen2VLForConditionalGeneration, device: torch.device) -> Tensor:
    """Tokens that stand for pixels. A completion with one of them has no pixels for it and crashes the next forward."""
    config = qwen.config
    return torch.tensor([config.image_token_id, config.video_token_id, config.vision_start_token_id,
                         config.vision_end_token_id], device=device)


# ----------------------------------------------------------------------------------------------------------------------
# Attention in which the rows of a group share their prompt. Hugging Face's layers do all that is done token by token
# (projections, rotations, MLPs); which token sees which is decided here.

def use_our_attention(qwen: Qwen2VLForConditionalGeneration) -> Qwen2VLForConditionalGeneration:
    """Makes the text model's layers call `attention`; the vision tower keeps its own."""
    ALL_ATTENTION_FUNCTIONS.register("shared_prompts", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("shared_prompts", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    qwen.model.language_model.config._attn_implementation = "shared_prompts"
    return qwen


def attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, attend=None, **kwargs):
    """What the text model's layers call: `attend`, if the text model was called with one, else Hugging Face's attention.

    Args: query (1, H, T, d); key, value (1, H_kv, T, d), all rotated to their positions. `attend(layer, query, key, value)`
        gets them without the leading 1 and returns (T, H, d). (Without `attend`, the leading dimension is any N.)
    """
    if attend is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    return attend(module.layer_idx, query[0], key[0], value[0])[None], None


def text_states(qwen: Qwen2VLForConditionalGeneration, embeds: Tensor, position_ids: Tensor, attend) -> Tensor:
    """The text model's last states (T, D) of T tokens, embeds (T, D) at position_ids (3, T), that see what `attend` lets them."""
    # A dict means that masks are ready made: there is none, because `attend` does the masking.
    return qwen.model.language_model(inputs_embeds=embeds[None], position_ids=position_ids[:, None], use_cache=False,
                                     attention_mask={"full_attention": None}, attend=attend).last_hidden_state[0]


def mask_from_lengths(lengths: Tensor, num_columns: int) -> Tensor:
    """(rows,) lengths -> (rows, columns) bool. A completion's length includes its end token.

    Masks come from lengths, never from `ids != pad`: pad may be an end token.
    """
    return torch.arange(num_columns, device=lengths.device) < lengths[:, None]


class Ragged:
    """Rows of different lengths: packed, one after the other, for all layers; padded on the right, for attention alone."""

    def __init__(self, lengths: Tensor):
        """lengths (rows,) int64, each >= 1."""
        self.mask = mask_from_lengths(lengths, int(lengths.max()))  # (rows, columns) bool; CPU-GPU sync
        self.slots = self.mask.flatten().nonzero()[:, 0]  # (tokens,): where in the padded form each packed token is
        self.last = lengths.cumsum(0) - 1  # (rows,): where in the packed form each row's last token is

    def pad(self, packed: Tensor) -> Tensor:  # (heads, tokens, d) -> (rows, heads, columns, d)
        heads, _, d = packed.shape
        padded = packed.new_zeros(heads, self.mask.numel(), d).index_copy(1, self.slots, packed)
        return padded.view(heads, *self.mask.shape, d).transpose(0, 1)

    def pack(self, padded: Tensor) -> Tensor:  # (rows, heads, columns, d) -> (tokens, heads, d)
        return padded.transpose(1, 2).flatten(0, 1).index_select(0, self.slots)


def attend_causally(rows: Ragged, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each token sees its own row up to itself. Packed (heads, tokens, d) -> packed (tokens, H, d), and padded key, value."""
    query, key, value = rows.pad(query), rows.pad(key), rows.pad(value)
    # Padding stands on the right, where no token looks, so the kernel needs no mask.
    out = F.scaled_dot_product_attention(query, *repeat_heads(query, key, value), is_causal=True)
    return rows.pack(out), key, value


def repeat_heads(query: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Grouped-query attention: gives keys or values (rows, H_kv, columns, d) as many heads as the query has."""
    # Not enable_gqa: with a mask it leaves the fast kernels (14 times slower on a CPU).
    return [x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in tensors]


class SharedPrompts:
    """B prompts and the N completions that continue them as one sequence, [q_1 | .. | q_B | o_1 | .. | o_N], unpadded.

    Everything in the model but attention treats tokens one by one. So it runs on sum |q_b| + sum |o_n| tokens, not on
    N (P + C): 3.1 times fewer at P = 900, G = 8 and C = 256. Attention is split in two: prompts see themselves, completions
    see their prompt and themselves. A completion starts at the position after its prompt, exactly as in a row of its own, so
    values and gradients are those of N separate rows (the prompt's gradient is their sum).
    """

    def __init__(self, prompt_lengths: Tensor, completion_lengths: Tensor, row_prompt: Tensor):
        self.prompts, self.completions, self.row_prompt = Ragged(prompt_lengths), Ragged(completion_lengths), row_prompt
        self.sizes = [len(self.prompts.slots), len(self.completions.slots)]
        (N, C), device = self.completions.mask.shape, row_prompt.device
        own = torch.ones(C, C, dtype=torch.bool, device=device).tril()
        seen = self.prompts.mask[row_prompt]  # (N, P)
        self.mask = torch.cat([seen[:, None].expand(-1, C, -1), own.expand(N, -1, -1)], dim=2)[:, None]  # (N, 1, C, P + C)
        # The state that predicts a token is the one before it: for a completion's first token, its prompt's last.
        before = torch.arange(self.sizes[1], device=device) + self.sizes[0] - 1
        first = self.completions.last + 1 - completion_lengths
        self.predictors = before.index_copy(0, first, self.prompts.last[row_prompt])  # (M,) packed indices

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Split attention over the packed sequence: (H, T, d) and (H_kv, T, d) twice -> (T, H, d)."""
        prompt, own = zip(*(x.split(self.sizes, dim=1) for x in (query, key, value)))
        prompt_out, prompt_key, prompt_value = attend_causally(self.prompts, *prompt)
        own_query, own_key, own_value = (self.completions.pad(x) for x in own)
        key = torch.cat([prompt_key.index_select(0, self.row_prompt), own_key], dim=2)  # (N, H_kv, P + C, d)
        value = torch.cat([prompt_value.index_select(0, self.row_prompt), own_value], dim=2)
        own_out = F.scaled_dot_product_attention(own_query, *repeat_heads(own_query, key, value), attn_mask=self.mask)
        return torch.cat([prompt_out, self.completions.pack(own_out)])


# ----------------------------------------------------------------------------------------------------------------------
# The policy: log-probs of completions, and nothing else.

def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
                banned_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log softmax(weight @ hidden / temperature)[target] and the entropy of that distribution, chunk by chunk.

    The (M, V) logits never exist at once, neither forward nor backward (each chunk is recomputed there): V is 152,064, and
    one group of 8 x 512 tokens would take 2.5 GB in float32, several times over. Softmax runs in float32 at least: in bf16
    the log-prob of a likely token is off by more than one update moves it.

    Args: hidden (M, D), the states that predict; weight (V, D) of lm_head; targets (M,) int64; `temperature` > 0 and
        `banned_ids` exactly as in sampling, or the trained policy is not the one that sampled.
    Returns: logps (M,) and entropy (M,), nats, float32 (float64 for float64 input); the entropy carries no gradient.
    """
    COUNTS["logits"] += len(targets) * len(weight)

    def one_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight)  # (chunk, V)
        # In place and under one name, because each tensor of this size takes 0.3 GB.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)
        if banned_ids is not None:
            logits = logits.index_fill_(1, banned_ids, -torch.inf)
        logits = logits.log_softmax(-1)
        probs = logits.detach().exp()
        entropy = torch.special.entr(probs, out=probs).sum(-1)  # entr(p) = -p log p, and 0 at p = 0
        return logits.gather(-1, targets[:, None])[:, 0], entropy

    chunks = [checkpoint(one_chunk, h, t, use_reentrant=False, preserve_rng_state=False)
              for h, t in zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK))]
    logps, entropy = zip(*chunks)
    return torch.cat(logps), torch.cat(entropy)


class Policy(nn.Module):
    """pi_theta: the FSDP root around Qwen2-VL. All that must run on gathered weights happens inside its one forward."""

    def __init__(self, qwen: Qwen2VLForConditionalGeneration, compute_dtype: torch.dtype, naive: bool = False):
        super().__init__()
        self.qwen, self.compute_dtype, self.naive = use_our_attention(qwen), compute_dtype, naive

    def forward(self, prompts: Prompts, row_prompt: Tensor, completion_ids: Tensor, completion_mask: Tensor,
                temperature: float = 1.0, banned_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log pi(o_t | q, o_<t) for every completion token, teacher-forced.

        Args: row_prompt (N,) int64, which prompt each row continues; completion_ids (N, C) int64, padded on the right;
            completion_mask (N, C) bool, True up to and including the end token; temperature and banned_ids as in
            `token_logps`.
        Returns: logps (N, C) and entropy (N, C), float32 (float64 for float64 weights), 0 where the mask is False.
        Collective under FSDP: every rank calls it equally often.
        """
        states = self.naive_states if self.naive else self.shared_states
        hidden = states(prompts, row_prompt, completion_ids, completion_mask)  # (M, D)
        logps, entropy = token_logps(hidden, self.qwen.lm_head.weight, completion_ids[completion_mask], temperature, banned_ids)
        zeros = torch.zeros(completion_mask.shape, dtype=logps.dtype, device=logps.device)
        return zeros.masked_scatter(completion_mask, logps), zeros.masked_scatter(completion_mask, entropy)

    def shared_states(self, prompts: Prompts, row_prompt: Tensor, completion_ids: Tensor, completion_mask: Tensor) -> Tensor:
        """The states (M, D) that predict the completions' tokens, from one sequence with each prompt in it once.

        Arguments as in `forward`; rows in their order, tokens in theirs.
        """
        layout = SharedPrompts(prompts.lengths, completion_mask.sum(1), row_prompt)
        # Token t of a completion is at its prompt's next_position + t on all three axes.
        steps = torch.arange(completion_ids.shape[1], device=completion_ids.device)
        own_positions = (prompts.next_position[row_prompt, None] + steps)[completion_mask].expand(3, -1)  # (3, M)
        own_embeds = self.qwen.get_input_embeddings()(completion_ids[completion_mask])  # (M, D)
        embeds = torch.cat([embed_prompts(self.qwen, prompts), own_embeds])  # (T, D)
        position_ids = torch.cat([prompts.position_ids, own_positions], dim=1)  # (3, T)
        COUNTS["learner_tokens"] += len(embeds)
        return text_states(self.qwen, embeds, position_ids, layout.attend).index_select(0, layout.predictors)

    def naive_states(self, prompts: Prompts, row_prompt: Tensor, completion_ids: Tensor, completion_mask: Tensor) -> Tensor:
        """The same states from N sequences [q | o_n], padded on the right; only the vision pass is shared. The oracle."""
        prompt_embeds = embed_prompts(self.qwen, prompts).split(prompts.lengths.tolist())
        prompt_positions = prompts.position_ids.split(prompts.lengths.tolist(), dim=1)
        embeds, position_ids = [], []
        for n, b in enumerate(row_prompt.tolist()):
            ids = completion_ids[n, completion_mask[n]]
            own_positions = prompts.next_position[b] + torch.arange(len(ids), device=ids.device)
            embeds.append(torch.cat([prompt_embeds[b], self.qwen.get_input_embeddings()(ids)]))
            position_ids.append(torch.cat([prompt_positions[b], own_positions.expand(3, -1)], dim=1).T)
        embeds = pad_sequence(embeds, batch_first=True)  # (N, P + C, D)
        position_ids = pad_sequence(position_ids, batch_first=True).permute(2, 0, 1)  # (3, N, P + C)
        COUNTS["learner_tokens"] += embeds.shape[:2].numel()
        # No mask: the model is causal, and there is nothing but padding behind a row's last token.
        hidden = self.qwen.model.language_model(inputs_embeds=embeds, position_ids=position_ids,
                                                use_cache=False).last_hidden_state  # (N, P + C, D)
        # The state at a column predicts the next token: prompt tokens get no logits and no gradient of their own.
        before = prompts.lengths[row_prompt] - 1
        return torch.cat([row[i:i + m] for row, i, m in zip(hidden, before.tolist(), completion_mask.sum(1).tolist())])


# ----------------------------------------------------------------------------------------------------------------------
# The actor, and the way from shards to whole weights.

@torch.no_grad()
def copy_weights(policy: Policy, target: Qwen2VLForConditionalGeneration | None) -> None:
    """Gathers every parameter, cast to the compute dtype first (half the traffic), into `target`; None only takes part.

    Collective. Writes in place: the actor's addresses never move.
    """
    targets = target.parameters() if target is not None else [None] * len(list(policy.qwen.parameters()))
    for source, destination in zip(policy.qwen.parameters(), targets, strict=True):
        whole = source.to(policy.compute_dtype).full_tensor()
        if destination is not None:
            destination.copy_(whole)


@torch.no_grad()
def plain_copy(policy: Policy, device: torch.device) -> Qwen2VLForConditionalGeneration:
    """An unsharded Qwen2-VL in the compute dtype; `copy_weights` fills it. Rotary buffers stay float32."""
    qwen = empty_qwen(policy.qwen.config, policy.compute_dtype, device).eval().requires_grad_(False)
    for buffer, source in zip(qwen.buffers(), policy.qwen.buffers(), strict=True):
        buffer.copy_(source)
    qwen.generation_config = policy.qwen.generation_config
    return use_our_attention(qwen)


def make_actor(policy: Policy, device: torch.device) -> Qwen2VLForConditionalGeneration:
    """The copy that samples, equal to the policy. Call `copy_weights(policy, actor)` after each optimizer step."""
    actor = plain_copy(policy, device)
    copy_weights(policy, actor)
    return actor


def load_actor(args, device: torch.device) -> Qwen2VLForConditionalGeneration:
    """The model of --model as an actor that nobody trains, for evaluation: each rank reads a whole copy for itself."""
    check_qwen2_vl(args.model)
    actor = Qwen2VLForConditionalGeneration.from_pretrained(args.model, dtype=pick_dtype(args, device), use_safetensors=True)
    return use_our_attention(actor).to(device).eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------------------------------------
# What is written: an ordinary Hugging Face folder at the end, and checkpoints to resume from on the way.

# Flags that may differ between a run and its resumption; any other would make it another run.
FREE_ON_RESUME = {"output_dir", "resume", "num_workers", "sample_every", "save_every", "micro_batch_size", "rollout_prompts",
                  "gradient_checkpointing", "frame_cache", "naive", "cuda_graph"}


def open_run(args, resume: bool = False) -> Path:
    """Makes args.output_dir with args.json in it; called when all else is ready, so that a typo touches nothing. Collective.

    A run that is there already is moved aside, never overwritten. With `resume` it is continued instead: ValueError if the
    flags are not the same, because the order of data, the learning rate or the loss would change half-way.
    """
    output_dir, settings = Path(args.output_dir), Path(args.output_dir) / "args.json"
    if settings.exists() and not resume and Path(args.model).resolve().is_relative_to(output_dir.resolve()):
        raise ValueError(f"--model {args.model} lies in --output_dir {output_dir}, which is about to be moved aside; give another")
    if resume and settings.exists():
        before = {**vars(type(args)()), **json.loads(settings.read_text())}  # a flag that is newer than the run had its default
        changed = [f"--{name} {value} (it was {before[name]})" for name, value in vars(args).items()
                   if name not in FREE_ON_RESUME and before[name] != value]
        if changed:
            raise ValueError(f"--resume continues the run in {output_dir}, but with {', '.join(changed)}; give the same flags")
    dist.barrier()  # every rank has looked before rank 0 writes
    if dist.get_rank() == 0 and not resume:
        if settings.exists():
            old = next(path for n in itertools.count(1) if not (path := Path(f"{output_dir}.old{n}")).exists())
            output_dir.rename(old)
            print(f"{output_dir} held an earlier run: it is now {old}")
        output_dir.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(vars(args), indent=1) + "\n")
    dist.barrier()
    return output_dir


def append_jsonl(path: Path, record: dict) -> None:
    """Adds one line to a JSONL file."""
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def clock() -> float:
    """Seconds from some fixed point, when all work given to the device so far is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # or the time of a phase would be booked on the next one
    return time.perf_counter()


def report(output_dir: Path, seconds: dict[str, float], tokens: dict[str, float], wall_s: float, device: torch.device) -> None:
    """Prints where the time of a run went, with peak memory and COUNTS, and writes it to report.json. Collective.

    Args: seconds by phase (data_s, ...), of this rank, summed over the run; tokens, for some of these phases, how many
        completion tokens of all ranks went through it; wall_s, from before the first step to after the last. A resumed run
        reports its own part.
    """
    done = {**COUNTS, "collectives": COUNTS["collectives"] + num_collectives()}
    counts = {name: int(count) for name, count in sum_over_ranks(done, device).items()}
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource  # here, because only POSIX systems have it
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if dist.get_rank() > 0:
        return
    seconds = {**seconds, "other_s": wall_s - sum(seconds.values())}  # logging, checkpoints
    rates = {phase: tokens[phase] / seconds[phase] for phase in tokens}
    print(f"\n{'phase':10}{'seconds':>10}{'share':>8}{'tokens/s':>12}")
    for phase, phase_s in seconds.items():
        rate = f"{rates[phase]:12,.0f}" if phase in rates else ""
        print(f"{phase.removesuffix('_s'):10}{phase_s:10.1f}{phase_s / wall_s:8.0%}{rate}")
    print(f"peak memory of rank 0: {peak / 2**30:.2f} GiB; all ranks: "
          + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items() if count))
    (output_dir / "report.json").write_text(json.dumps(
        {"seconds": seconds, "tokens_per_s": rates, "peak_bytes": peak, "counts": counts}, indent=1) + "\n")


def export(policy: Policy, tokenizer, source: str, output_dir: Path) -> None:
    """Writes weights, configs, tokenizer and processor files that `from_pretrained` and other tools can read. Collective.

    Weights are saved in the compute dtype, which is what the actor sampled with. `source` is the --model the run began
    with: its processor files are copied, since training does not change them.
    """
    whole = plain_copy(policy, torch.device("cpu")) if dist.get_rank() == 0 else None
    copy_weights(policy, whole)
    if whole is not None:
        whole.save_pretrained(output_dir)
        tokenizer.save_pretrained(output_dir)
        for name in PROCESSOR_FILES:
            path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
            if path is not None:
                shutil.copyfile(path, output_dir / name)
    dist.barrier()


def save_checkpoint(output_dir: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Saves masters and optimizer state after `step` steps, each rank its shards; older checkpoints go. Collective.

    The step number is all the rest of the state there is: data order, options and sampling noise are functions of it.
    """
    folder = output_dir / "checkpoints" / f"step_{step:06d}"
    state = {"model": get_model_state_dict(policy), "optimizer": get_optimizer_state_dict(policy, optimizer)}
    dcp.save(state, checkpoint_id=folder)
    if dist.get_rank() == 0:
        for old in folder.parent.glob("step_*"):
            if old != folder:
                shutil.rmtree(old)
    dist.barrier()


def load_checkpoint(output_dir: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
    """Restores the newest complete checkpoint in place and returns its step. Collective.

    Any number of ranks may resume what any other number has saved, as long as all see the folder (with several nodes: a
    shared file system). Load only checkpoints that you trust: the format holds pickles, so a checkpoint folder is code.
    """
    # `.metadata` is written last: a folder without it is from a run that died while saving.
    complete = sorted(path.parent for path in (output_dir / "checkpoints").glob("step_*/.metadata"))
    if not complete:
        raise ValueError(f"--resume: no complete checkpoint in {output_dir / 'checkpoints'}; start without --resume")
    state = {"model": get_model_state_dict(policy), "optimizer": get_optimizer_state_dict(policy, optimizer)}
    dcp.load(state, checkpoint_id=complete[-1])
    set_model_state_dict(policy, state["model"])
    set_optimizer_state_dict(policy, optimizer, state["optimizer"])
    step = int(complete[-1].name.removeprefix("step_"))
    metrics = output_dir / "metrics.jsonl"
    if dist.get_rank() == 0 and metrics.exists():  # steps after the checkpoint will be run, and logged, once more
        lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]  # a killed run tears one
        metrics.write_text("".join(line for line in lines if json.loads(line)["step"] < step))
    return step
