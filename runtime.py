"""What a run needs and GRPO does not: skip this file on a first reading.

From top to bottom: arguments, processes, what goes wrong, loading and sharding, the copy that samples and the export,
what both training loops repeat, the run's folder, the run, checkpoints. What it promises is in docs/reliability.md.

    python runtime.py out/grpo/checkpoints/step_000100 out/grpo_100     # a checkpoint -> a model that evaluate.py reads

Two copies of the weights, on purpose:

    policy    float32 masters, sharded by FSDP2, computes in bf16 on a GPU (float32 on a CPU). It learns.
    sampler   a plain Hugging Face module in the compute dtype, one whole copy per rank. It only samples.

A sharded model must not sample token by token: each token would all-gather every layer (about 38 ms a token for 7B on
an H200, by arithmetic), and ranks whose completions differ in length would wait for each other forever. The sampler
touches no collective; renewing it once a step costs one all-gather per layer and 2 bytes of memory per weight.
"""
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

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
SOURCE_FILES = ("generation_config.json", "preprocessor_config.json", "video_preprocessor_config.json",
                "processor_config.json", "chat_template.json", "chat_template.jinja")


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
    resume: bool = arg(False, "continue what is in output_dir; where there is nothing, begin")
    change: list[str] = arg([], "with --resume: flags that are meant to differ from the run's, such as learning_rate")
    max_questions: int = arg(0, "use the first so many questions of a file; 0: all", least=0)
    seed: int = arg(0, "of data order, options, sampling, and of --video random and shuffled", least=0)
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
            if least is not None and not least <= value <= (sys.float_info.max if most is None else most):  # nor NaN
                wanted = f">= {least}, and finite" if most is None else f"from {least} to {most}"
                raise ValueError(f"--{item.name} {value}: must be {wanted}")
        if not self.output_dir.strip():
            raise ValueError(f"--output_dir {self.output_dir!r}: name a folder")
        if (unknown := set(self.change) - vars(self).keys()) or self.change and not self.resume:
            raise ValueError(f"--change {' '.join(self.change)}: " + (f"{sorted(unknown)} are no flags" if unknown else
                                                                     "says what --resume may change; add that flag"))
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
    max_grad_norm: float = arg(1.0, "the gradient's norm is clipped to this; 0: no clipping", least=0)
    micro_batch_size: int = arg(8, "completions per forward and backward on one rank: memory against speed, results "
                                   "differ by rounding", least=1)
    gradient_checkpointing: bool = arg(True, "recompute activations in the backward pass")
    save_every: int = arg(100, "checkpoint every so many steps; 0: only when stopped by a signal", least=0)
    keep_checkpoints: int = arg(2, "the newest so many stay", least=1)
    max_bad_frac: float = arg(0.05, "end the run when more of 200 or more questions are unreadable", least=0, most=1)
    timeout_minutes: float = arg(15.0, "end the run when a rank waits longer than this for another", least=0.01)
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


def resolve(args, device: torch.device):
    """The same arguments with folders in place of "toy" and a dtype in place of "auto". Collective.

    Rank 0 writes the toy world if it is not there.
    """
    if args.dtype == "auto":
        args = replace(args, dtype="bfloat16" if device.type == "cuda" else "float32")
    if "toy" not in (args.model, args.data_root):
        return args
    import toy  # only here: whoever brings model and data never loads the toy world
    on_rank_0(toy.build)
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
        # An hour, not the usual 10 minutes: the others wait while rank 0 downloads and reads the model. Then see `Run`.
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(hours=1), **alone)
        pipe, signals = os.pipe()
        os.set_blocking(signals, False)
        signal.set_wakeup_fd(signals, warn_on_full_buffer=False)  # for `watch`: written even while no Python code runs
        threading.Thread(target=watch, args=(pipe,), daemon=True).start()
    return dist.get_rank(), dist.get_world_size(), device


def on_rank_0(function, *args):
    """Its result on rank 0, None elsewhere; its error is raised on every rank, so that none waits for another.
    Collective."""
    result, error = None, [None]
    if dist.get_rank() == 0:
        try:
            result = function(*args)
        except Exception as raised:
            error = [raised]
    dist.broadcast_object_list(error)
    if error[0] is not None:
        raise error[0]
    return result


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
# What goes wrong: errors that are found, signals, processes that hang.

STOPPED = 75  # exit status of a run that a signal has stopped: "temporary failure, try again" (sysexits.h)
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CURE = "resume from the last checkpoint with a lower rate: --resume --change learning_rate --learning_rate ..."
# What this process is at, for whoever looks for a fault: `Run` writes it.
HERE = SimpleNamespace(step=None, phase="loading", since=time.perf_counter(), timeout_s=math.inf, signalled=None)


def where() -> str:
    return f"rank {os.environ.get('RANK', 0)}, {'' if HERE.step is None else f'step {HERE.step}, '}{HERE.phase}"


def launch(main, args_class, toy: dict) -> None:
    """The end of each script: `main` with the arguments of the command line. What goes wrong is said in one line, which
    torchrun's summary repeats; a trace is shown of what we have not foreseen.
    """
    try:
        main(parse_args(args_class, toy))
    except KeyboardInterrupt:
        leave(f"interrupted ({where()})", 130)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = Path(place.filename).parent == Path(__file__).parent
        if not (ours and isinstance(error, (ValueError, ArithmeticError, OSError))):
            traceback.print_exc()
        leave(f"{type(error).__name__} ({where()}, {Path(place.filename).name}:{place.lineno}): {error}", 1)
    dist.destroy_process_group()


def leave(message: str, status: int) -> None:
    """Ends this process with a line, on screen and in torchrun's summary, which begins with whoever left first."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def require_finite(what: str, values: Tensor, examples: list[Example]) -> None:
    """FloatingPointError if `values` (rows, columns) are not finite, with the questions of these rows.

    NaN would become a token that does not exist (on a GPU an assert that kills the process), or a weight.
    """
    bad = (~values.isfinite()).any(dim=1).nonzero()[:, 0].tolist()  # CPU-GPU sync
    if bad:
        ids = sorted({examples[n].question.id for n in bad})
        raise FloatingPointError(f"{what} of question {', '.join(ids)} are not finite; {CURE}")


def watch(pipe: int) -> None:
    """A thread for what the main one does not see while it computes or waits for another rank.

    A second signal ends the process at once. So does the death of its torchrun: it would go on beside the run that
    takes its place. A phase that is about to time out is named, by every rank but the one that hangs.
    """
    parent, named = os.getppid(), None
    while True:
        if select.select([pipe], [], [], 0.5)[0] and set(SIGNALS) & set(os.read(pipe, 64)):
            if HERE.signalled and time.perf_counter() - HERE.signalled > 1:  # sooner it is the first one, sent twice
                os._exit(STOPPED)
            HERE.signalled = HERE.signalled or time.perf_counter()
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        waited = time.perf_counter() - HERE.since
        if waited > 0.9 * HERE.timeout_s and named != HERE.since:
            named = HERE.since
            print(f"{where()}: for {waited:.0f} s now; does another rank hang?", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# Loading and sharding.

def load_config(model: str):
    """The config of --model; ValueError if it is another kind of model. No code from the hub is ever run."""
    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {model}: no folder of a model, and none on the hub: {str(error):.200}") from None
    if config.model_type != "qwen2_vl":
        raise ValueError(f"--model {model}: its model_type is {config.model_type!r}; give a Qwen2-VL ('qwen2_vl')")
    return config


def load_tokenizer(model: str):
    """The tokenizer of a local folder or hub id.

    ValueError if its vision tokens are not those of the model: then no pixel would arrive where the model expects it,
    and whole runs have been trained without a video that nobody missed (Qwen-VL-Series-Finetune#207).
    """
    config, tokenizer = load_config(model), transformers.AutoTokenizer.from_pretrained(model)
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
    qwen = on_rank_0(read_qwen, model, dtype)
    if qwen is not None:
        return qwen
    qwen = empty_qwen(load_config(model), dtype, torch.device("cpu"))
    # A file of its own, with more end tokens in it than the config has: all ranks must stop at the same ones.
    if cached_file(model, "generation_config.json", _raise_exceptions_for_missing_entries=False):
        qwen.generation_config = transformers.GenerationConfig.from_pretrained(model)
    return qwen


def read_qwen(model: str, dtype: torch.dtype) -> Qwen2VLForConditionalGeneration:
    """Qwen2-VL from a local folder or hub id; ValueError if its tensors are not just those of its config.

    The library fills what is missing with random numbers, and says so in a table among other lines.
    """
    load_config(model)  # refuses another kind of model
    qwen, loaded = Qwen2VLForConditionalGeneration.from_pretrained(model, dtype=dtype, use_safetensors=True,
                                                                   output_loading_info=True)
    if wrong := {key: sorted(map(str, names))[:3] for key, names in loaded.items() if names}:
        raise ValueError(f"--model {model}: its files do not fit its config: {wrong}; get it whole")
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


def load_policy(args, device: torch.device, frozen: bool = False, naive: bool = False) -> Policy:
    """The sharded policy of --model, ready to learn: masters in float32 (float64 where that is the compute dtype).

    `frozen` gives a reference that never learns. It is kept in the compute dtype: masters would be cast to it anyway.
    `naive` runs prompt and completion as padded rows that share only the vision pass.
    """
    dtype = DTYPES[args.dtype]
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
    return use_our_attention(read_qwen(args.model, DTYPES[args.dtype])).to(device).eval().requires_grad_(False)


def export(policy: Policy, tokenizer, source: str, folder: Path) -> None:
    """Writes weights, configs, tokenizer and processor files that `from_pretrained` and other tools can read.
    Collective.

    Weights are saved in the compute dtype, which is what was sampled with. `source` is the --model the run began with:
    its processor files are copied, since training does not change them.
    """
    whole = plain_copy(policy, torch.device("cpu")) if dist.get_rank() == 0 else None
    copy_weights(policy, whole)
    on_rank_0(write_model, whole, tokenizer, source, folder)


def write_model(qwen: Qwen2VLForConditionalGeneration, tokenizer, source: str, folder: Path) -> None:
    """Under another name until it is whole: half a model would look like one."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    qwen.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for name in SOURCE_FILES:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            shutil.copyfile(path, part / name)
    os.umask(umask := os.umask(0))
    for file in part.iterdir():
        file.chmod(0o666 & ~umask)  # safetensors are written for their owner alone
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def export_checkpoint(checkpoint: Path, folder: Path) -> None:
    """A checkpoint of a run, while it goes on or after, as a Hugging Face folder, by one process on a CPU."""
    settings = read_settings(checkpoint.parent.parent / "args.json")
    if problem := "; ".join(filter(None, map(damage_of, checkpoint_files(checkpoint)))):
        raise ValueError(f"{checkpoint}: {problem}")
    dtype = DTYPES[settings["dtype"]]
    qwen = empty_qwen(load_config(settings["model"]), torch.promote_types(dtype, torch.float32), torch.device("cpu"))
    state = {"model": {f"qwen.{name}": weight for name, weight in qwen.state_dict().items()}}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    write_model(qwen.to(dtype), load_tokenizer(settings["model"]), settings["model"], folder)


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
    if dist.get_rank() == 0 and any(question.options and (question.goal or question.part) for question in questions):
        print(f"!!! {args.train_file} is an evaluation file: it cannot evaluate what was trained on it !!!")
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


def optimizer_step(policy: Policy, optimizer: torch.optim.Optimizer, lr: float, max_grad_norm: float) -> float:
    """Clips the gradient, takes an AdamW step, clears the gradient; returns its norm before clipping. Collective.

    FloatingPointError if the norm is not finite: the weights stay as they were.
    """
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm or math.inf).full_tensor().item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}; {CURE}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm


# ----------------------------------------------------------------------------------------------------------------------
# The run's folder: one writer, and settings that say what is in it.

# Flags that may differ between a run and its resumption; any other would make it another run.
FREE_ON_RESUME = {"output_dir", "resume", "change", "num_workers", "print_every", "save_every", "keep_checkpoints",
                  "micro_batch_size", "rollout_prompts", "batch_size", "gradient_checkpointing", "frame_cache", "naive",
                  "cuda_graph", "tensorboard", "max_bad_frac", "timeout_minutes"}
# What a run writes. A folder with anything else in it is never moved, but for evaluations inside that of their model.
OWN = re.compile(r"(lock|args\.json|metrics\.jsonl|completions\.txt|report\.json|checkpoints|final|results\.json|"
                 r"samples(_rank\d+)?\.jsonl|events\.out\.tfevents.*)(\.part)?")
LOCKS = []  # open files: what closes them gives the folder free


def open_folder(args) -> Path:
    """Makes args.output_dir with args.json in it; called when all else is ready, so that a typo touches nothing.
    Collective.

    A run that is there already is moved aside, never overwritten. With --resume it is continued instead. ValueError if
    another process writes there, if files there are not a run's, or if the resumed run would be another one.
    """
    on_rank_0(claim_folder, args)
    return Path(args.output_dir)


def claim_folder(args) -> None:
    """`open_folder` on rank 0."""
    folder, settings = Path(args.output_dir), Path(args.output_dir) / "args.json"
    files = [args.train_file, *args.leave_out] if isinstance(args, TrainArgs) else args.eval_files
    now = {**vars(args), "sha256": {file: sha256(Path(args.data_root) / file) for file in files}}
    found = sorted(folder.iterdir()) if folder.exists() else []
    before = read_settings(settings) if args.resume and any(path.name != "lock" for path in found) else None
    foreign = [path for path in found if not OWN.fullmatch(path.name) and not (path / "args.json").exists()]
    if foreign and before is None:
        raise ValueError(f"--output_dir {folder}: {foreign[0].name} in it was not written by a run; give another")
    if found:
        take_lock(folder)
    if before is not None:
        check_resumed(before, now, settings)
    elif settings.exists():
        if Path(args.model).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"--model {args.model} lies in --output_dir {folder}, which is about to be moved aside; "
                             "give another")
        old = next(path for n in itertools.count(1) if not (path := Path(f"{folder}.old{n}")).exists())
        folder.rename(old)
        print(f"{folder} held an earlier run: it is now {old}")
    folder.mkdir(parents=True, exist_ok=True)
    take_lock(folder)
    write_whole(settings, json.dumps(now, indent=1) + "\n")


def take_lock(folder: Path) -> None:
    """Makes this process the only writer of `folder` until it ends, in whatever way; ValueError if another one is.

    A POSIX lock, since children do not inherit it. Some shared file systems have none (Lustre without flock), or keep
    it to their own node.
    """
    file = open(folder / "lock", "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        host, _, pid = file.read().strip().partition(" ")
        raise ValueError(f"--output_dir {folder}: process {pid} on {host} writes there; wait for it, stop it (kill "
                         f"{pid}), or give another folder") from None
    except OSError as error:
        print(f"{folder}: no locks on this file system ({error}); see to it that no other run writes there")
    file.truncate(0)
    file.write(f"{socket.gethostname()} {os.getpid()}\n")
    file.flush()
    LOCKS.append(file)


def read_settings(file: Path) -> dict:
    """The args.json of a run; ValueError if it does not say any more what the run was."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error!r:.100}), and nothing else says which run this is; restore "
                         "it, or begin in another folder") from None


def check_resumed(before: dict, now: dict, settings: Path) -> None:
    """ValueError if the order of data, the rate or the loss would change half-way without being asked to."""
    if before.keys() != now.keys():
        raise ValueError(f"--resume: {settings} is of another version, which differs in the flags "
                         f"{sorted(before.keys() ^ now.keys())}: resume with that version")
    if files := [file for file, digest in now["sha256"].items() if before["sha256"].get(file, digest) != digest]:
        raise ValueError(f"--resume: {', '.join(files)} was another file when the run began; restore it")
    changed = sorted(name for name in now if before[name] != now[name])
    if wrong := [name for name in changed if name not in {*FREE_ON_RESUME, *now["change"], "sha256"}]:
        flags = ", ".join(f"--{name} {now[name]} (it was {before[name]})" for name in wrong)
        raise ValueError(f"--resume continues the run in {settings.parent}, but with {flags}; give the same flags, or "
                         f"say that it is meant: --change {' '.join(wrong)}")


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_whole(file: Path, text: str) -> None:
    """Under another name first: a full disk or a kill leaves the old file, never half of the new one."""
    part = file.with_name(file.name + ".part")
    part.write_text(text)
    part.replace(file)


# ----------------------------------------------------------------------------------------------------------------------
# A training run.

class Run:
    """What a trainer has beside its algorithm: folder, steps, log, checkpoints, and a way to stop."""

    def __init__(self, args, policy: Policy, optimizer: torch.optim.Optimizer, num_steps: int, device: torch.device):
        """Claims the folder and, with --resume, restores policy and optimizer: when all else is ready. Collective."""
        self.args, self.policy, self.optimizer, self.device = args, policy, optimizer, device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.output_dir = open_folder(args)
        require_space(self.output_dir, policy)
        self.first_step = load_checkpoint(self.output_dir, policy, optimizer) if args.resume else 0
        self.seen = self.skipped = 0  # questions of all ranks; steps without any that could be read
        self.unreadable, self.bad = [], [0]  # questions of this rank with their errors; how many on each rank
        self.progress = tqdm(total=num_steps, initial=self.first_step, desc=Path(sys.argv[0]).stem, dynamic_ncols=True,
                             disable=self.rank > 0)
        self.tensorboard = None
        if args.tensorboard and self.rank == 0:
            from torch.utils.tensorboard import SummaryWriter  # only here: it needs a package that nothing else does
            self.tensorboard = SummaryWriter(str(self.output_dir), purge_step=self.first_step)
        # Handlers that do nothing: `watch` hears the signals, and the run stops at the end of a step.
        self.handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        HERE.signalled, HERE.timeout_s = None, 60 * args.timeout_minutes if self.ranks > 1 else math.inf
        dist.barrier()  # still with the hour that loading may take
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=args.timeout_minutes))

    def steps(self, loader: Iterable) -> Iterator[tuple[int, list[Example]]]:
        """(step, its examples on this rank). Between two steps come checkpoints, and the end if a signal asks for it.
        Collective."""
        HERE.phase, HERE.since, self.seconds = "data", clock(), {}
        for step, examples in enumerate(loader, self.first_step):
            HERE.step, self.seen, self.bad_before = step, self.seen + len(examples) * self.ranks, sum(self.bad)
            self.logged = False
            yield step, examples
            if not self.logged:
                self.skipped += 1
                self.progress.update()
            too_many_bad = self.seen >= 200 and sum(self.bad) > self.args.max_bad_frac * self.seen
            if self.stop or too_many_bad or self.args.save_every and (step + 1) % self.args.save_every == 0:
                self.phase("checkpoint")
                save_checkpoint(self.output_dir, step + 1, self.policy, self.optimizer, self.args.keep_checkpoints)
            if too_many_bad:
                self.give_up()
            if self.stop:
                leave(f"stopped by a signal after {step + 1} steps; to go on: {resume_command()}", STOPPED)
            HERE.phase, HERE.since, self.seconds = "data", clock(), {}

    def phase(self, name: str) -> None:
        """What follows is `name`: its seconds are logged as such, and an error or a timeout says so."""
        now = clock()
        self.seconds[HERE.phase] = now - HERE.since
        HERE.phase, HERE.since = name, now

    def keep_readable(self, examples: list[Example]) -> list[Example]:
        """The examples whose pixels could be read; the others are named on screen, and nothing takes their place."""
        for example in examples:
            if example.error:
                self.unreadable.append(f"question {example.question.id}: {example.error}")
                tqdm.write(f"step {HERE.step}: left out {self.unreadable[-1]}")
        return [example for example in examples if not example.error]

    def sum(self, values: dict) -> dict[str, float]:
        """`sum_over_ranks`; what all ranks must agree on travels along: how much is unreadable, and whether to stop."""
        bad = {f"unreadable {rank}": len(self.unreadable) * (rank == self.rank) for rank in range(self.ranks)}
        total = sum_over_ranks({**values, **bad, "stop": HERE.signalled is not None}, self.device)
        self.bad, self.stop = [int(total.pop(name)) for name in bad], total.pop("stop") > 0
        return total

    def give_up(self) -> None:
        """ValueError with all that could not be read. Collective."""
        lists = [None] * self.ranks
        dist.all_gather_object(lists, sorted(set(self.unreadable)))
        message = (f"{sum(self.bad)} of {self.seen} questions could not be read, and --max_bad_frac is "
                   f"{self.args.max_bad_frac}; python data.py checks a whole file")
        raise ValueError("\n".join([message, *sum(lists, [])]))

    def log(self, metrics: dict, tokens: float, line: str, signs: dict[str, bool]) -> None:
        """Ends a step: a line of metrics.jsonl (and for tensorboard), `line` on the progress bar, the step's health.

        `tokens` of completions on all ranks; `signs` as in `health`. FloatingPointError if a metric is not finite.
        """
        self.phase("log")
        step_s = sum(self.seconds.values())
        metrics = {"step": HERE.step, **metrics, "unreadable": sum(self.bad) - self.bad_before,
                   "unreadable_frac": sum(self.bad) / self.seen, "skipped_steps": self.skipped,
                   "unreadable_frac_worst_rank": max(self.bad) * self.ranks / self.seen,
                   "tokens_per_s": tokens / step_s, "step_s": step_s,
                   **{f"{name}_s": seconds for name, seconds in self.seconds.items()}}
        verdict = health(metrics, signs)
        if verdict.startswith("not finite"):
            raise FloatingPointError(f"{verdict}; {CURE}")
        if self.rank == 0:
            with open(self.output_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps(metrics, allow_nan=False) + "\n")
        if self.tensorboard:
            for name, value in metrics.items():
                self.tensorboard.add_scalar(name, value, HERE.step)
            self.tensorboard.flush()  # nothing else does at the end of a short run
        self.logged = True
        self.progress.set_postfix_str(f"{line} | {verdict}")
        self.progress.update()

    def finish(self, tokenizer) -> Path:
        """Prints the report, exports the policy, gives the folder free; returns the model's folder. Collective."""
        self.progress.close()
        if self.seen and sum(self.bad) == self.seen:
            self.give_up()
        HERE.phase, HERE.since = "export", clock()
        on_rank_0(report, self.output_dir)
        export(self.policy, tokenizer, self.args.model, self.output_dir / "final")
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        HERE.step, HERE.phase, HERE.timeout_s = None, "finished", math.inf
        LOCKS.clear()
        return self.output_dir / "final"


def health(metrics: dict, signs: dict[str, bool]) -> str:
    """The first thing that looks wrong about a step, or "ok"; `signs`, of the trainer: phrase -> whether it is so."""
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    signs = {f"not finite: {', '.join(broken)}": bool(broken),
             "many unreadable videos": metrics["unreadable_frac_worst_rank"] > 0.05,
             **signs,
             "nothing is learned: the rate is 0": metrics["lr"] == 0,
             "nothing is learned: the gradient is 0": metrics["grad_norm"] == 0}
    return next((phrase for phrase, holds in signs.items() if holds), "ok")


def resume_command() -> str:
    """The command that continues this run."""
    words = shlex.join([*sys.argv, *([] if "--resume" in sys.argv else ["--resume"])])
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return f"python {words}"
    nodes = int(os.environ["GROUP_WORLD_SIZE"])
    on_nodes = f"--nnodes {nodes} --node_rank R --master_addr HOST " if nodes > 1 else ""
    return f"torchrun {on_nodes}--nproc_per_node {os.environ['LOCAL_WORLD_SIZE']} {words}"


def report(output_dir: Path) -> None:
    """Prints where the time of a run went, by phase, and the peak memory, and writes it to report.json.

    The seconds are those of all steps in metrics.jsonl; the memory is that of this process, rank 0.
    """
    file = output_dir / "metrics.jsonl"
    metrics = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not metrics:
        return
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    seconds = {name: sum(m[name] for m in metrics) for name in metrics[0] if re.fullmatch("[a-z]+_s", name)}
    tokens = sum(m["tokens_per_s"] * m["step_s"] for m in metrics)
    print(f"\n{'phase':10}{'seconds':>10}{'share':>8}")
    for phase, phase_s in seconds.items():
        print(f"{phase.removesuffix('_s'):10}{phase_s:10.1f}{phase_s / seconds['step_s']:8.0%}")
    print(f"{tokens:,.0f} completion tokens, {tokens / seconds['step_s']:,.0f} a second; "
          f"peak memory of rank 0: {peak / 2**30:.2f} GiB")
    write_whole(output_dir / "report.json", json.dumps(
        {"seconds": seconds, "tokens": round(tokens), "peak_bytes": peak}, indent=1) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints.

def require_space(output_dir: Path, policy: Policy) -> None:
    """OSError if a checkpoint (masters and AdamW's two moments) would not fit on the disk."""
    need = 3 * sum(weight.numel() * weight.element_size() for weight in policy.parameters())
    free = shutil.disk_usage(output_dir).free
    if free < need:
        raise OSError(f"{output_dir}: a checkpoint needs {need / 1e9:.2f} GB of disk space and {free / 1e9:.2f} GB are "
                      "free; make room, or lower --keep_checkpoints, and resume")


def save_checkpoint(output_dir: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """Saves masters and optimizer state after `step` steps, each rank its shards; the newest `keep` stay. Collective.

    The step number is all the rest of the state there is: data order, options and sampling noise are functions of it.
    FloatingPointError, with all checkpoints as they were, if what would be saved is not finite.
    """
    moments = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [x.to_local() if isinstance(x, DTensor) else x for x in (*policy.parameters(), *moments)]
    broken = torch.stack([~x.isfinite().all() for x in tensors]).sum().to(next(policy.parameters()).device)
    dist.all_reduce(broken)
    if broken:
        raise FloatingPointError(f"the weights are not finite, so they were not saved; {CURE}")
    require_space(output_dir, policy)
    folder = output_dir / "checkpoints" / f"step_{step:06d}"
    on_rank_0(shutil.rmtree, folder, True)  # what a save that was killed has left
    dcp.save({"model": dcp_state.get_model_state_dict(policy),
              "optimizer": dcp_state.get_optimizer_state_dict(policy, optimizer)}, checkpoint_id=folder)
    files = [None] * dist.get_world_size()
    # Each rank reads back what it has written.
    dist.all_gather_object(files, {file.name: sha256(file) for file in folder.glob(f"__{dist.get_rank()}_*")})
    on_rank_0(seal_checkpoint, folder, {name: digest for part in files for name, digest in part.items()}, keep)


def seal_checkpoint(folder: Path, digests: dict[str, str], keep: int) -> None:
    """Writes SHA256SUMS, which makes a checkpoint whole (`sha256sum -c` reads it too), then removes older ones."""
    digests[".metadata"] = sha256(folder / ".metadata")
    write_whole(folder / "SHA256SUMS", "".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    # Later ones are damaged, or the run would have gone on from there.
    for old in sorted(path for path in folder.parent.glob("step_*") if path <= folder)[:-keep]:
        shutil.rmtree(old)


def checkpoint_files(folder: Path) -> list[tuple[Path, str]]:
    """(file, its checksum) for each file of a checkpoint; ValueError if its save was cut short."""
    try:
        lines = (folder / "SHA256SUMS").read_text().splitlines()
        return [(folder / name, digest) for digest, name in (line.split("  ") for line in lines)]
    except (OSError, ValueError):
        return [(folder / "SHA256SUMS", "")]


def damage_of(file: tuple[Path, str]) -> str:
    """What is wrong with a file of a checkpoint, or ""."""
    path, digest = file
    if not path.exists():
        return f"{path.name} is missing"
    return "" if sha256(path) == digest else f"{path.name} is not what was written"


def load_checkpoint(output_dir: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
    """Restores the newest whole checkpoint in place and returns its step; 0 if the run has none yet. Collective.

    Any number of ranks may resume what any other number has saved, as long as all see the folder (with several nodes: a
    shared file system). Load only checkpoints that you trust: the format holds pickles, so a checkpoint folder is code.
    """
    rank, ranks, step = dist.get_rank(), dist.get_world_size(), 0
    folders = sorted((output_dir / "checkpoints").glob("step_*"), reverse=True)
    for folder in folders:
        damage = [None] * ranks
        dist.all_gather_object(damage, [damage_of(file) for file in checkpoint_files(folder)[rank::ranks]])
        found = [text for part in damage for text in part if text]
        if not found:
            step = int(folder.name.removeprefix("step_"))
            break
        if rank == 0:
            print(f"{folder} is damaged: {'; '.join(found)}")
    if folders and not step:
        raise ValueError(f"--resume: no whole checkpoint in {output_dir / 'checkpoints'}; begin anew, without --resume")
    if rank == 0:
        print(f"resuming after step {step}" if step else "no checkpoint yet: from the first step")
    if step:
        state = {"model": dcp_state.get_model_state_dict(policy),
                 "optimizer": dcp_state.get_optimizer_state_dict(policy, optimizer)}
        dcp.load(state, checkpoint_id=folder)
        dcp_state.set_model_state_dict(policy, state["model"])
        dcp_state.set_optimizer_state_dict(policy, optimizer, state["optimizer"])
    on_rank_0(forget_after, output_dir, step)
    return step


def forget_after(output_dir: Path, step: int) -> None:
    """Cuts the logs where the run goes on: later steps are run, and logged, once more."""
    metrics, shown = output_dir / "metrics.jsonl", output_dir / "completions.txt"
    if metrics.exists():
        # A killed run may have torn its last line.
        lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
        write_whole(metrics, "".join(line for line in lines if json.loads(line)["step"] < step))
    if shown.exists():
        entries = re.split(r"^(?=\n--- step \d+)", shown.read_text(), flags=re.MULTILINE)
        write_whole(shown, "".join(e for e in entries if (n := re.match(r"\n--- step (\d+)", e)) and int(n[1]) < step))


if __name__ == "__main__":
    export_checkpoint(*map(Path, sys.argv[1:]))
