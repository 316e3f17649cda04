"""What a run needs and GRPO does not: skip this file on a first reading.

From top to bottom: arguments, processes, loading and sharding, the copy that samples and the export, what both training
loops repeat, the run's folder, checkpoints, the report at the end.

Two copies of the weights, on purpose:

    policy    float32 masters, sharded by FSDP2, computes in bf16 on a GPU (float32 on a CPU). It learns.
    sampler   a plain Hugging Face module in the compute dtype, one whole copy per rank. It only samples.

A sharded model must not sample token by token: each token would all-gather every layer (about 38 ms a token for 7B on
an H200, by arithmetic), and ranks whose completions differ in length would wait for each other forever. The sampler
touches no collective; renewing it once a step costs one all-gather per layer and 2 bytes of memory per weight.
"""
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import transformers
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import Qwen2VLForConditionalGeneration
from transformers.utils import cached_file

from data import VIDEO, Example, PixelSettings, Question, VideoDataset, leave_out, load_questions
from model import Policy, use_our_attention

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
                   "chat_template.json", "chat_template.jinja")


# ----------------------------------------------------------------------------------------------------------------------
# Arguments: one command line for a laptop and for a cluster.

class Meaning(str):
    """What --help prints of a field, and, as attributes, its closed range: argparse refuses any other metadata."""


def arg(default, meaning: str, least: float | None = None, most: float | None = None):
    """A dataclass field with its meaning, which --help prints, and its closed range, which RunArgs checks.

    A list is the default by value: no two instances share it.
    """
    if least is not None:
        meaning += f", >= {least}" if most is None else f", {least} to {most}"
    meaning = Meaning(meaning.replace("%", "%%"))
    meaning.least, meaning.most = least, most
    metadata = {"help": meaning}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class RunArgs:
    """What trainers and evaluation have in common. ValueError for a number outside its range."""
    model: str = arg("toy", "local folder or hub id of a Qwen2-VL; 'toy' is the tiny one in this repository")
    data_root: str = arg("toy", "folder with annotations/, videos/, images/; 'toy' builds the toy world on first use")
    output_dir: str = arg("out/run", "what the run writes goes here; a run that is there already is moved aside")
    max_questions: int = arg(0, "use the first so many questions of a file; 0: all", least=0)
    seed: int = arg(0, "of data order, options, sampling, and of --video random and shuffled")
    num_frames: int = arg(16, "most frames of a video, even", least=2)
    min_frames: int = arg(4, "fewest frames of a video, even", least=2)
    fps: float = arg(2.0, "frames a second to sample between those two bounds")
    image_size: int = arg(252, "frames and images are resized to this square; a multiple of 28")
    frame_cache: str = arg("", "folder to keep decoded frames in, for later epochs and runs; empty: none")
    video: str = arg("full", "what the model gets to see: full, or a control: " + ", ".join(list(VIDEO)[1:]))
    dtype: str = arg("auto", "compute dtype: auto (bfloat16 on GPU, float32 on CPU), float32, bfloat16, float64")
    num_workers: int = arg(2, "processes per rank that decode video ahead of the model", least=0)

    def __post_init__(self):
        for item in fields(self):
            value, meaning = getattr(self, item.name), item.metadata["help"]
            least, most = meaning.least, meaning.most
            if least is not None and not least <= value <= (math.inf if most is None else most):  # NaN fails too
                wanted = f">= {least}" if most is None else f"from {least} to {most}"
                raise ValueError(f"--{item.name} {value}: must be {wanted}")
        if self.dtype not in ("auto", *DTYPES):
            raise ValueError(f"--dtype {self.dtype!r}: must be auto or one of {', '.join(DTYPES)}")

    def pixel_settings(self) -> PixelSettings:
        return PixelSettings(self.fps, self.min_frames, self.num_frames, self.image_size, self.frame_cache)


@dataclass
class TrainArgs(RunArgs):
    """What both trainers have in common. All quantities are of the whole step, whatever the number of ranks."""
    train_file: str = arg("annotations/training_6k.jsonl", "under data_root: JSONL or a JSON list")
    leave_out: list[str] = arg([], "samples.jsonl of evaluations of train_file: what all of them got right is left out")
    prompts_per_step: int = arg(8, "questions per step over all ranks, a multiple of their number", least=1)
    num_epochs: int = arg(1, "passes over the data when max_steps is 0", least=1)
    max_steps: int = arg(0, "steps to run; 0: num_epochs", least=0)
    weight_decay: float = arg(0.0, "AdamW's", least=0)
    max_grad_norm: float = arg(1.0, "the gradient's norm is clipped to this", least=0)
    micro_batch_size: int = arg(8, "completions per forward and backward on one rank: memory against speed, results "
                                   "differ by rounding", least=1)
    gradient_checkpointing: bool = arg(True, "recompute activations in the backward pass")
    save_every: int = arg(100, "checkpoint every so many steps; 0: never", least=0)
    resume: bool = arg(False, "continue from the newest checkpoint in output_dir")
    tensorboard: bool = arg(False, "also write the metrics for tensorboard, which has to be installed, to output_dir")

    def __post_init__(self):
        super().__post_init__()
        if self.tensorboard and not find_spec("tensorboard"):
            raise ValueError("--tensorboard: the package is not installed; pip install tensorboard, or leave the flag "
                             "out: metrics.jsonl has the same numbers")


def is_small(model: str) -> bool:
    """Whether --model is "toy" or a local folder of a model as small, so that it takes the toy world's defaults."""
    return model == "toy" or Path(model).is_dir() and load_config(model).text_config.hidden_size <= 256


def parse_args(args_class, toy: dict, argv: list[str] | None = None):
    """Reads the command line into `args_class`. For a small model the defaults are `toy`'s, the toy world's; flags win.

    Prints which values are in use and where each comes from.
    """
    parser = transformers.HfArgumentParser(args_class, allow_abbrev=False)
    argv = sys.argv[1:] if argv is None else argv
    flags = {word.split("=")[0][2:].replace("-", "_").removeprefix("no_") for word in argv if word.startswith("--")}
    args, = parser.parse_args_into_dataclasses(argv)
    small = is_small(args.model)
    if args.data_root == "toy" and not small:
        raise ValueError(f"--model {args.model} needs --data_root: the toy world is for small models in a local folder")
    if args.data_root != "toy" and "model" not in flags:
        raise ValueError(f"--data_root {args.data_root} needs --model, such as Qwen/Qwen2-VL-7B-Instruct (or, to try "
                         "it out, --model toy)")
    if small:
        parser.set_defaults(**toy)
        args, = parser.parse_args_into_dataclasses(argv)
    if os.environ.get("RANK", "0") == "0":
        for name, value in vars(args).items():
            origin = "flag" if name in flags else "toy world" if small and name in toy else "default"
            print(f"{name:24} {value!s:40} {origin}")
    return args


def resolve_toy(args):
    """The same arguments with folders in place of "toy"; rank 0 writes the world if it is not there. Collective."""
    if "toy" not in (args.model, args.data_root):
        return args
    import toy  # only here: whoever brings model and data never loads the toy world
    if dist.get_rank() == 0:
        toy.build()
    dist.barrier()
    return replace(args, model=str(toy.BASE) if args.model == "toy" else args.model,
                   data_root=str(toy.ROOT) if args.data_root == "toy" else args.data_root)


# ----------------------------------------------------------------------------------------------------------------------
# Processes.

def setup() -> tuple[int, int, torch.device]:
    """Joins the process group and returns (rank, world_size, device).

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
    return dist.get_rank(), dist.get_world_size(), device


def sum_over_ranks(values: dict[str, float | Tensor], device: torch.device) -> dict[str, float]:
    """Sums each value over all ranks in float64. Collective: every rank calls it with the same keys in the same order.

    Metrics travel as sums and are divided once, at the end: a mean of per-rank means would weigh ranks, not tokens.
    """
    total = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device) for v in values.values()])
    dist.all_reduce(total)
    return dict(zip(values, total.tolist()))  # CPU-GPU sync


def clock() -> float:
    """Seconds from some fixed point, when all work given to the device so far is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # or the time of a phase would be booked on the next one
    return time.perf_counter()


# ----------------------------------------------------------------------------------------------------------------------
# Loading and sharding.

def load_config(model: str):
    """The config of --model; ValueError if it is another kind of model. No code from the hub is ever run."""
    config = transformers.AutoConfig.from_pretrained(model)
    if config.model_type != "qwen2_vl":
        raise ValueError(f"--model {model}: its model_type is {config.model_type!r}; give a Qwen2-VL ('qwen2_vl')")
    return config


def load_tokenizer(model: str):
    """The tokenizer of a local folder or hub id.

    ValueError if its vision tokens are not those of the model: then no pixel would arrive where the model expects it,
    and whole runs have been trained without a video that nobody missed (Qwen-VL-Series-Finetune#207).
    """
    tokenizer, config = transformers.AutoTokenizer.from_pretrained(model), load_config(model)
    for token, wanted in (("<|image_pad|>", config.image_token_id), ("<|video_pad|>", config.video_token_id)):
        found = tokenizer.convert_tokens_to_ids(token)
        if found != wanted:
            raise ValueError(f"--model {model}: {token} is token {found} of its tokenizer and {wanted} of its config; "
                             "take both from one model")
    return tokenizer


def load_qwen(model: str, dtype: torch.dtype) -> Qwen2VLForConditionalGeneration:
    """Qwen2-VL from a local folder or hub id (safetensors only), on the CPU, whole on rank 0 and *empty* elsewhere.

    Only rank 0 reads the file: 8 ranks of float32 7B would need 265 GB of host memory. The other ranks get the right
    shapes on memory that nobody has written, and their shards arrive by broadcast in `shard`.
    """
    config = load_config(model)
    if dist.get_rank() == 0:
        return Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=dtype, use_safetensors=True)
    qwen = empty_qwen(config, dtype, torch.device("cpu"))
    # A file of its own, with more end tokens in it than the config has: all ranks must stop at the same ones.
    if cached_file(model, "generation_config.json", _raise_exceptions_for_missing_entries=False):
        qwen.generation_config = transformers.GenerationConfig.from_pretrained(model)
    return qwen


def empty_qwen(config, dtype: torch.dtype, device: torch.device) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL whose weights hold no values yet. Building on "meta" skips minutes of random init for 7B."""
    with torch.device("meta"):
        qwen = Qwen2VLForConditionalGeneration._from_config(config, dtype=dtype)
    qwen = qwen.to_empty(device=device)
    qwen.tie_weights()  # to_empty gives embedding and lm_head separate memory; 2B shares them, 7B does not
    return qwen


def shard(policy: Policy, device: torch.device) -> None:
    """FSDP2 in place: one unit for the vision tower, one per decoder layer, the root last. Collective.

    Masters keep the dtype they were loaded in (float32: AdamW at lr 1e-6 moves hardly any weight that is stored in
    bf16); weights are cast to the compute dtype when gathered, gradients are reduced in the masters' dtype. Embedding
    and lm_head both stay in the root unit, because in the 2B model they are one tensor.
    """
    qwen, full = policy.qwen, policy.state_dict()
    master_dtype = next(policy.parameters()).dtype
    mixed = MixedPrecisionPolicy(param_dtype=policy.compute_dtype, reduce_dtype=master_dtype)
    # ABLATE: replicas across nodes: (nodes, ranks per node), mesh_dim_names=("replicate", "shard"); docs/scaling.md.
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in (qwen.model.visual, *qwen.model.language_model.layers):
        fully_shard(unit, mesh=mesh, mp_policy=mixed)
    # The root's weights stay gathered from forward to backward, unless there is no backward that would free them.
    learns = any(p.requires_grad for p in policy.parameters())
    fully_shard(policy, mesh=mesh, mp_policy=mixed, reshard_after_forward=not learns)
    # Until here every rank has sharded its own copy, which is real on rank 0 only.
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp_state.set_model_state_dict(policy, full if dist.get_rank() == 0 else {}, options=options)
    for buffer in policy.buffers():  # rotary frequencies: not part of a state dict, so empty beyond rank 0
        dist.broadcast(buffer, 0)


def pick_dtype(args, device: torch.device) -> torch.dtype:
    """The dtype of matrix products: --dtype, where auto is bf16 on a GPU and float32 on a CPU."""
    if args.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[args.dtype]


def load_policy(args, device: torch.device, frozen: bool = False, naive: bool = False) -> Policy:
    """The sharded policy of --model, ready to learn: masters in float32 (float64 where that is the compute dtype).

    `frozen` gives a reference that never learns. It is kept in the compute dtype: masters would be cast to it anyway.
    `naive` runs prompt and completion as padded rows that share only the vision pass.
    """
    dtype = pick_dtype(args, device)
    qwen = load_qwen(args.model, dtype if frozen else torch.promote_types(dtype, torch.float32))
    qwen.train(not frozen).requires_grad_(not frozen)
    if args.gradient_checkpointing and not frozen:  # keeps one activation per layer, for a third more time
        # The method's new name; transformers 5.17 and older know the other one only.
        enable = getattr(qwen, "activation_checkpointing_enable", None) or qwen.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    policy = Policy(qwen, dtype, naive)
    shard(policy, device)
    return policy


# ----------------------------------------------------------------------------------------------------------------------
# The sampler, and the way from shards to whole weights.

@torch.no_grad()
def copy_weights(policy: Policy, target: Qwen2VLForConditionalGeneration | None) -> None:
    """Gathers the weights, cast to the compute dtype first (half the traffic), into `target`; None only takes part.

    One all-gather for each unit of `shard`, as in a forward pass: 30 for 7B, not one for each of its 730 parameters.
    Collective. Writes in place: the sampler's addresses never move.
    """
    for unit_name, unit in [item for item in policy.named_modules() if isinstance(item[1], FSDPModule)]:
        unit.unshard()
        for name, weight in unit.named_parameters():
            if target is not None and not isinstance(weight, DTensor):  # a shard is of a unit inside
                target.get_parameter(f"{unit_name}.{name}".removeprefix(".").removeprefix("qwen.")).copy_(weight)
        unit.reshard()


@torch.no_grad()
def plain_copy(policy: Policy, device: torch.device) -> Qwen2VLForConditionalGeneration:
    """An unsharded Qwen2-VL in the compute dtype; `copy_weights` fills it. Rotary buffers stay float32."""
    qwen = empty_qwen(policy.qwen.config, policy.compute_dtype, device).eval().requires_grad_(False)
    for buffer, source in zip(qwen.buffers(), policy.qwen.buffers(), strict=True):
        buffer.copy_(source)
    qwen.generation_config = policy.qwen.generation_config
    return use_our_attention(qwen)


def make_sampler(policy: Policy, device: torch.device) -> Qwen2VLForConditionalGeneration:
    """The copy that samples, equal to the policy; `copy_weights` renews it before the next rollout. Collective."""
    sampler = plain_copy(policy, device)
    copy_weights(policy, sampler)
    return sampler


def load_sampler(args, device: torch.device) -> Qwen2VLForConditionalGeneration:
    """The model of --model as a sampler that nobody trains, for evaluation: each rank reads a whole copy for itself."""
    load_config(args.model)  # refuses another kind of model
    dtype = pick_dtype(args, device)
    qwen = Qwen2VLForConditionalGeneration.from_pretrained(args.model, dtype=dtype, use_safetensors=True)
    return use_our_attention(qwen).to(device).eval().requires_grad_(False)


def export(policy: Policy, tokenizer, source: str, output_dir: Path) -> None:
    """Writes weights, configs, tokenizer and processor files that `from_pretrained` and other tools can read.
    Collective.

    Weights are saved in the compute dtype, which is what was sampled with. `source` is the --model the run began with:
    its processor files are copied, since training does not change them.
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


# ----------------------------------------------------------------------------------------------------------------------
# What both training loops repeat.

def load_training_set(args, tokenizer, for_sft: bool) -> tuple[VideoDataset, int]:
    """The questions to train on, and the number of steps, rounded down; says in a line what a prompt holds.

    ValueError for a file of the other trainer's shape, or prompts_per_step that the ranks cannot share equally.
    """
    ranks = dist.get_world_size()
    if args.prompts_per_step % ranks:
        raise ValueError(f"--prompts_per_step {args.prompts_per_step} must be a multiple of the {ranks} ranks")
    questions = load_questions(args.train_file, args.data_root)[:args.max_questions or None]
    check_for_sft(questions, args.train_file, for_sft)
    questions = leave_out(questions, args.leave_out)
    dataset = VideoDataset(questions, tokenizer, args.pixel_settings(), args.seed, args.video)
    if dist.get_rank() == 0:
        print(f"{args.train_file}: {dataset.describe_prompt()}")
    return dataset, args.max_steps or max(1, args.num_epochs * len(questions) // args.prompts_per_step)


def check_for_sft(questions: list[Question], file: str, for_sft: bool) -> None:
    """ValueError if the file is of the shape that the other kind of script takes."""
    if for_sft and not all(question.response for question in questions):
        raise ValueError(f"{file}: its records have no 'response' to learn from; SFT needs the shape of "
                         "training_with_cot_6k.jsonl ('prompt' messages and a 'response')")
    if not for_sft and any(question.response for question in questions):
        raise ValueError(f"{file}: these records are for SFT (they have a 'response' and no gold answer); give a file "
                         "with gold answers, such as training_6k.jsonl ('answer' and 'negative_answers')")


def keep_readable(examples: list[Example], step: int) -> list[Example]:
    """The examples whose pixels could be read; the others are named on screen, and nothing takes their place."""
    for example in examples:
        if example.error:
            tqdm.write(f"step {step}: question {example.question.id} left out: {example.error}")
    return [example for example in examples if not example.error]


def micro_batches(rows: Tensor, size: int) -> list[Tensor]:
    """`rows` (int64) in pieces of at most `size`. Collective: as many on every rank, at least one, empty ones last.

    FSDP gathers weights in every forward and backward pass, so a rank that is short of rows (unreadable videos, groups
    that teach nothing) runs the model on none. A step without any signal is one with a gradient of 0, in which AdamW's
    momentum still moves the weights.
    """
    batches = list(rows.split(size))  # of no rows: one empty piece
    most = torch.tensor(len(batches), device=rows.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    return batches + [rows[:0]] * (int(most) - len(batches))  # CPU-GPU sync


def optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float, step: int,
                   place: Path) -> float:
    """Clips the gradient, takes an AdamW step, clears the gradient; returns its norm before clipping. Collective.

    FloatingPointError, which names `place` as what to look at, if the norm is not finite.
    """
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm).full_tensor().item()
    if not math.isfinite(grad_norm):
        raise FloatingPointError(f"step {step}: the gradient norm is {grad_norm}; look at {place}, and start again "
                                 "with a lower --learning_rate")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return grad_norm


def open_log(args, output_dir: Path, first_step: int, num_steps: int) -> Callable[[dict, str], None]:
    """Returns log(metrics, line), which writes on rank 0: metrics.jsonl, the progress bar, tensorboard if asked for."""
    if dist.get_rank() > 0:
        return lambda metrics, line: None
    progress = tqdm(total=num_steps, initial=first_step, desc=Path(sys.argv[0]).stem, dynamic_ncols=True)
    writer = None
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # only here: it needs a package that nothing else does
        writer = SummaryWriter(str(output_dir), purge_step=first_step)

    def log(metrics: dict, line: str) -> None:
        with open(output_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics) + "\n")
        if writer:
            for name, value in metrics.items():
                writer.add_scalar(name, value, metrics["step"])
            writer.flush()  # nothing else does at the end of a short run
        progress.set_postfix_str(line)
        progress.update()
        if progress.n == num_steps:
            progress.close()
    return log


# ----------------------------------------------------------------------------------------------------------------------
# The run's folder, and checkpoints to resume from.

# Flags that may differ between a run and its resumption; any other would make it another run.
FREE_ON_RESUME = {"output_dir", "resume", "num_workers", "print_every", "save_every", "micro_batch_size",
                  "rollout_prompts", "gradient_checkpointing", "frame_cache", "naive", "cuda_graph", "tensorboard"}


def open_run(args, resume: bool = False) -> Path:
    """Makes args.output_dir with args.json in it; called when all else is ready, so that a typo touches nothing.
    Collective.

    A run that is there already is moved aside, never overwritten. With `resume` it is continued instead: ValueError if
    the flags are not the same, because the order of data, the learning rate or the loss would change half-way.
    """
    output_dir, settings = Path(args.output_dir), Path(args.output_dir) / "args.json"
    if settings.exists() and not resume and Path(args.model).resolve().is_relative_to(output_dir.resolve()):
        raise ValueError(f"--model {args.model} lies in --output_dir {output_dir}, which is about to be moved aside; "
                         "give another")
    if resume and settings.exists():
        # A flag that is newer than the run had its default.
        before = {**vars(type(args)()), **json.loads(settings.read_text())}
        if unknown := before.keys() - vars(args).keys():
            raise ValueError(f"--resume: {settings} has {sorted(unknown)}, flags of an earlier version: resume with it")
        changed = [f"--{name} {value} (it was {before[name]})" for name, value in vars(args).items()
                   if name not in FREE_ON_RESUME and before[name] != value]
        if changed:
            raise ValueError(f"--resume continues the run in {output_dir}, but with {', '.join(changed)}; give the "
                             "same flags")
    dist.barrier()  # every rank has looked before rank 0 writes
    if dist.get_rank() == 0 and not resume:
        if settings.exists():
            numbered = (Path(f"{output_dir}.old{n}") for n in itertools.count(1))
            old = next(path for path in numbered if not path.exists())
            output_dir.rename(old)
            print(f"{output_dir} held an earlier run: it is now {old}")
        output_dir.mkdir(parents=True, exist_ok=True)
        settings.write_text(json.dumps(vars(args), indent=1) + "\n")
    dist.barrier()
    return output_dir


def save_checkpoint(output_dir: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """Saves masters and optimizer state after `step` steps, each rank its shards; older checkpoints go. Collective.

    The step number is all the rest of the state there is: data order, options and sampling noise are functions of it.
    """
    folder = output_dir / "checkpoints" / f"step_{step:06d}"
    state = {"model": dcp_state.get_model_state_dict(policy),
             "optimizer": dcp_state.get_optimizer_state_dict(policy, optimizer)}
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
    state = {"model": dcp_state.get_model_state_dict(policy),
             "optimizer": dcp_state.get_optimizer_state_dict(policy, optimizer)}
    dcp.load(state, checkpoint_id=complete[-1])
    dcp_state.set_model_state_dict(policy, state["model"])
    dcp_state.set_optimizer_state_dict(policy, optimizer, state["optimizer"])
    step = int(complete[-1].name.removeprefix("step_"))
    metrics = output_dir / "metrics.jsonl"
    if dist.get_rank() == 0 and metrics.exists():  # steps after the checkpoint will be run, and logged, once more
        # A killed run may have torn its last line.
        lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        metrics.write_text("".join(line for line in lines if json.loads(line)["step"] < step))
    return step


# ----------------------------------------------------------------------------------------------------------------------
# The report.

def report(output_dir: Path, first_step: int) -> None:
    """Prints where the time of a run went, by phase, and the peak memory, and writes it to report.json. Rank 0 only.

    Everything comes from metrics.jsonl, from `first_step` on: a resumed run reports its own part.
    """
    if dist.get_rank() > 0:
        return
    file = output_dir / "metrics.jsonl"
    metrics = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    metrics = [m for m in metrics if m["step"] >= first_step]
    if not metrics:  # resumed when all steps had been taken
        return
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource  # here, because only POSIX systems have it
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    phases = [name for name in ("data_s", "rollout_s", "score_s", "update_s", "step_s") if name in metrics[0]]
    seconds = {name: sum(m[name] for m in metrics) for name in phases}
    tokens = sum(m["tokens_per_s"] * m["step_s"] for m in metrics)
    print(f"\n{'phase':10}{'seconds':>10}{'share':>8}")
    for phase, phase_s in seconds.items():
        print(f"{phase.removesuffix('_s'):10}{phase_s:10.1f}{phase_s / seconds['step_s']:8.0%}")
    print(f"{tokens:,.0f} completion tokens, {tokens / seconds['step_s']:,.0f} a second; "
          f"peak memory of rank 0: {peak / 2**30:.2f} GiB")
    (output_dir / "report.json").write_text(json.dumps(
        {"seconds": seconds, "tokens": round(tokens), "peak_bytes": peak}, indent=1) + "\n")
