"""What a run needs and GRPO does not: skip this file on a first reading.

From top to bottom: arguments, processes, what goes wrong, loading and sharding, the copy that samples and the export,
what both training loops repeat. The folder of a run, its log and its checkpoints are in run.py.

Two copies of the weights, on purpose:

    policy    float32 masters, sharded by FSDP2, computes in bf16 on a GPU (float32 on a CPU). It learns.
    sampler   a plain Hugging Face module in the compute dtype, one whole copy per rank. It only samples.

(With --lora_rank both are one model in the compute dtype, whole on each rank, and masters are the adapters: lora.py.)

A sharded model must not sample token by token: each token would all-gather every layer (about 38 ms a token for 7B on
an H200, by arithmetic), and ranks whose completions differ in length would wait for each other forever. The sampler
touches no collective; renewing it once a step costs one all-gather per layer and 2 bytes of memory per weight.
"""
import atexit
import json
import math
import os
import select
import shutil
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as dcp_state
import transformers
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.utils import cached_file

import deltanet
import lora
from data import (
    FAMILIES,
    MERGE_SIZE,
    TEMPORAL_PATCH_SIZE,
    VIDEO,
    Example,
    Family,
    PixelSettings,
    Question,
    VideoDataset,
    encode_prompt,
    leave_out,
    load_questions,
)
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
    model: str = arg("toy", "folder or hub id of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5; 'toy': the tiny one here")
    data_root: str = arg("toy", "folder with annotations/, videos/, images/; 'toy' builds the toy world on first use")
    output_dir: str = arg("out/run", "what the run writes goes here; a run that is there already is moved aside")
    resume: bool = arg(False, "continue what is in output_dir; where there is nothing, begin")
    change: list[str] = arg([], "with --resume: flags that are meant to differ from the run's, such as learning_rate")
    max_questions: int = arg(0, "use the first so many questions of a file; 0: all", least=0)
    seed: int = arg(0, "of data order, options, sampling, and of --video random and shuffled", least=0)
    num_frames: int = arg(16, "most frames of a video, even", least=2)
    min_frames: int = arg(4, "fewest frames of a video, even", least=2)
    fps: float = arg(2.0, "frames a second to sample between those two bounds")
    image_size: int = arg(252, "frames and images are resized to this square; a multiple of 28 (Qwen3-VL, 3.5: 32)")
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
    # what learns
    freeze_vision: bool = arg(False, "the vision tower does not learn")
    lora_rank: int = arg(0, "r of LoRA adapters on the text layers, all else frozen; 0: every weight learns", least=0)
    lora_alpha: float = arg(32.0, "the adapters' change is weighted by lora_alpha / lora_rank", least=0)
    # how
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
    max_bad_frac: float = arg(0.05, "end the run when more of its questions, of 200 at least, are bad", least=0, most=1)
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
    models = args.model if isinstance(args.model, list) else [args.model]  # attention.py takes several
    small = all(map(is_small, models))
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
    result, raised, message = None, None, [""]
    if dist.get_rank() == 0:
        try:
            result = function(*args)
        except Exception as error:
            raised, message = error, [f"{type(error).__name__} of rank 0: {error}"]
    dist.broadcast_object_list(message)
    if message[0]:
        raise raised or ValueError(message[0])
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
# What this process is at: `Run` writes it, `where` and `watch` read it.
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
    except (Exception, CheckpointException) as error:  # the latter, of torch's saves, is no Exception
        place = traceback.extract_tb(error.__traceback__)[-1]
        ours = Path(place.filename).parent == Path(__file__).parent
        if not (ours and isinstance(error, (ValueError, ArithmeticError, OSError))):
            traceback.print_exc()
        cure = f"; {CURE}" if isinstance(error, FloatingPointError) and issubclass(args_class, TrainArgs) else ""
        leave(f"{type(error).__name__} ({where()}, {Path(place.filename).name}:{place.lineno}): {error}{cure}", 1)
    dist.destroy_process_group()
    end(0)


def leave(message: str, status: int) -> None:
    """Ends this process with a line, on screen and in torchrun's summary, which begins with whoever left first."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    sys.stderr.write(message + "\n")  # at once: print may write the line's end after another rank's line
    end(status)


def end(status: int) -> None:
    """Ends this process at once, and not through the interpreter's own end: there a thread of gloo that still holds a
    tensor aborts it, about once in 200 runs, after all work is done (pytorch/pytorch#179291)."""
    atexit._run_exitfuncs()  # all that is left of the usual end: the workers go, among others
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def require_finite(what: str, values: Tensor, examples: list[Example]) -> None:
    """FloatingPointError if `values` (rows, columns) are not finite, with the questions of these rows.

    NaN would become a token that does not exist (on a GPU an assert that kills the process), or a weight.
    """
    bad = (~values.isfinite()).any(dim=1).nonzero()[:, 0].tolist()  # CPU-GPU sync
    if bad:
        ids = sorted({examples[n].question.id for n in bad})
        raise FloatingPointError(f"{what} of question {', '.join(ids)} are not finite")


def watch(pipe: int) -> None:
    """A thread for what the main one does not see while it computes or waits for another rank.

    A second signal ends the process at once. So does the death of its torchrun: it would go on beside the run that
    takes its place. A phase that is about to time out is named.
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

OPENINGS = "<think>\n", "<think>\n\n</think>\n\n"


def load_config(model: str):
    """The config of --model; ValueError if it is another kind of model. No code from the hub is ever run."""
    try:
        config = transformers.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {model}: no folder of a model, and none on the hub: {str(error):.200}") from None
    if config.model_type not in FAMILIES:
        raise ValueError(f"--model {model}: its model_type is {config.model_type!r}; give one of {', '.join(FAMILIES)}")
    return config


def load_family(model: str) -> Family:
    """What the family of --model reads; ValueError if its patches or tokens are of another size than a release's.

    tokens_per_second is that of the config: transformers' class has 4, all releases 2. The opening is that of the chat
    template: Qwen3.5 has two.
    """
    config = load_config(model)
    family, vision = FAMILIES[config.model_type], config.vision_config
    found = vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size
    if found != (family.patch_size, TEMPORAL_PATCH_SIZE, MERGE_SIZE):
        raise ValueError(f"--model {model}: patches of {found[0]} pixels and {found[1]} frames, {found[2]} to a side "
                         f"of a token; a {config.model_type} must have {family.patch_size}, {TEMPORAL_PATCH_SIZE} and "
                         f"{MERGE_SIZE}, or a line of its own in FAMILIES (data.py)")
    opening = family.opening and read_opening(model)
    return replace(family, tokens_per_second=family.tokens_per_second and vision.tokens_per_second, opening=opening,
                   begun="" if "</think>" in opening else opening)


def read_opening(model: str) -> str:
    """With what the chat template of --model begins an answer; ValueError if it is neither of the two that we know.

    Qwen3.5 from 4B on opens a block for its thoughts. 0.8B and 2B close it at once, and answer without, or where the
    question asks for reasoning, as here, with a block of their own.
    """
    chat = render_chat(model, transformers.AutoTokenizer.from_pretrained(model))
    if not chat:
        raise ValueError(f"--model {model}: it has no chat template, which says how an answer begins; get it whole")
    opening = chat.rpartition("<|im_start|>assistant\n")[2]
    if opening not in OPENINGS:
        raise ValueError(f"--model {model}: its chat template begins an answer with {opening!r}; "
                         f"this code knows {' and '.join(map(repr, OPENINGS))}")
    return opening


def render_chat(model: str, tokenizer) -> str:
    """What the chat template of --model makes of "Hello"; "" without one, ValueError where it does not run."""
    if not tokenizer.chat_template:
        return ""
    try:
        return tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], add_generation_prompt=True,
                                             tokenize=False)
    except Exception as error:  # it is a program, and may raise whatever it likes
        raise ValueError(f"--model {model}: its chat template does not run: {error}") from error


def load_tokenizer(model: str):
    """The tokenizer of a local folder or hub id.

    ValueError if its vision tokens are not those of the model: then no pixel would arrive where the model expects it,
    and whole runs have been trained without a video that nobody missed (Qwen-VL-Series-Finetune#207). The same if its
    chat template is not that of `encode_prompt`: Qwen3-VL's -Thinking models, for one, begin their turns with <think>.
    """
    config, tokenizer = load_config(model), transformers.AutoTokenizer.from_pretrained(model)
    for token, wanted in (("<|image_pad|>", config.image_token_id), ("<|video_pad|>", config.video_token_id)):
        found = tokenizer.convert_tokens_to_ids(token)
        if found != wanted:
            raise ValueError(f"--model {model}: {token} is token {found} of its tokenizer and {wanted} of its config; "
                             "take both from one model")
    wanted = tokenizer.decode(encode_prompt(tokenizer, load_family(model), "Hello"))
    found = render_chat(model, tokenizer)
    if found not in ("", wanted):
        raise ValueError(f"--model {model}: its chat template writes {found!r}, and this code {wanted!r}; take an "
                         "-Instruct model")
    return tokenizer


def load_qwen(model: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model from a local folder or hub id (safetensors only), on the CPU, whole on rank 0 and *empty* elsewhere.

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


def read_qwen(model: str, dtype: torch.dtype) -> PreTrainedModel:
    """A model from a local folder or hub id; ValueError if its tensors are not just those of its config.

    The library fills what is missing with random numbers, and says so in a table among other lines.
    """
    load_config(model)  # refuses another kind of model
    qwen, loaded = AutoModelForImageTextToText.from_pretrained(model, dtype=dtype, use_safetensors=True,
                                                               output_loading_info=True)
    if wrong := {key: sorted(map(str, names))[:3] for key, names in loaded.items() if names}:
        raise ValueError(f"--model {model}: its files do not fit its config: {wrong}; get it whole")
    return qwen


def empty_qwen(config, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model whose weights hold no values yet. Building on "meta" skips minutes of random init for 7B."""
    with torch.device("meta"):
        qwen = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    qwen = qwen.to_empty(device=device)
    qwen.tie_weights()  # to_empty gives embedding and lm_head separate memory; 2B shares them, 7B does not
    return qwen


def shard(policy: Policy, device: torch.device) -> None:
    """FSDP2 in place: a unit for each layer, of the vision tower first, one for the rest of the tower, the root last.
    Collective.

    Masters keep the dtype they were loaded in (float32: AdamW at lr 1e-6 moves hardly any weight that is stored in
    bf16); weights are cast to the compute dtype when gathered, gradients are reduced in the masters' dtype. Where
    embedding and lm_head are one tensor, as in the 2B model, both stay in the root unit.
    With --lora_rank the adapters are the one unit, and all else stays whole on each rank.
    """
    qwen, full = policy.qwen, policy.state_dict()
    masters = [p for p in policy.parameters() if p.requires_grad]
    mixed = MixedPrecisionPolicy(param_dtype=policy.compute_dtype,
                                 reduce_dtype=torch.promote_types(policy.compute_dtype, torch.float32))
    # The tower hands its rotary angles to its layers in float32: cast to bf16, learner and sampler would differ by up
    # to 0.2 nats a token.
    uncast = replace(mixed, cast_forward_inputs=False)
    # ABLATE: replicas across nodes: (nodes, ranks per node), mesh_dim_names=("replicate", "shard"); docs/scaling.md.
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    whole = set()
    if lora.adapted(policy):
        whole = set(policy.to(device).parameters()) - set(masters)
    else:
        for unit in qwen.model.visual.blocks:
            fully_shard(unit, mesh=mesh, mp_policy=uncast)
        for unit in (qwen.model.visual, *qwen.model.language_model.layers):
            float32 = deltanet.float32_weights(unit)
            fully_shard(unit, mesh=mesh, mp_policy=mixed, ignored_params=float32)
            if float32:  # Qwen3.5: a unit that is not cast. After its layer, from which it would hide all its module.
                others = set(unit.linear_attn.parameters()) - float32
                fully_shard(unit.linear_attn, mesh=mesh, mp_policy=replace(uncast, param_dtype=None),
                            ignored_params=others)
        embedding = qwen.get_input_embeddings()
        # Gathered at each call, so that all ranks must call it equally often; --naive does so for each row.
        if embedding.weight is not qwen.lm_head.weight and not policy.naive:
            fully_shard(embedding, mesh=mesh, mp_policy=mixed).set_unshard_in_backward(False)  # needs no weights there
    # The root's weights stay gathered from forward to backward, unless there is no backward that would free them.
    fully_shard(policy, mesh=mesh, mp_policy=mixed, reshard_after_forward=not masters, ignored_params=whole)
    for weight in [weight for weight in policy.parameters() if weight in whole]:
        dist.broadcast(weight.detach(), 0)  # in place: there is no room for two models
    # Until here every rank has sharded its own copy, which is real on rank 0 only (adapters: on all of them).
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    if not whole:
        dcp_state.set_model_state_dict(policy, full if dist.get_rank() == 0 else {}, options=options)
    for buffer in policy.buffers():  # rotary frequencies: not part of a state dict, so empty beyond rank 0
        dist.broadcast(buffer, 0)


def load_policy(args, device: torch.device, frozen: bool = False, naive: bool = False) -> Policy:
    """The sharded policy of --model, ready to learn: masters in float32 (float64 where that is the compute dtype).

    What never learns is kept in the compute dtype, which masters would be cast to anyway: the reference (`frozen`), and
    with --lora_rank the model. `naive` runs prompt and completion as padded rows that share only the vision pass.
    """
    dtype = DTYPES[args.dtype]
    masters = torch.promote_types(dtype, torch.float32)
    qwen = load_qwen(args.model, dtype if frozen or args.lora_rank else masters)
    qwen.train(not frozen).requires_grad_(not frozen)
    if args.freeze_vision:
        qwen.model.visual.requires_grad_(False).to(dtype)
    if args.lora_rank:
        lora.add_adapters(qwen, args.lora_rank, args.lora_alpha, masters, args.seed)
    if args.gradient_checkpointing and not frozen:  # keeps one activation per layer, for a third more time
        # The method's new name; transformers 5.17 and older know the other one only.
        enable = getattr(qwen, "activation_checkpointing_enable", None) or qwen.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    policy = Policy(qwen, dtype, naive)
    shard(policy, device)
    return policy


def load_reference(args, policy: Policy, device: torch.device) -> Policy | None:
    """pi_ref, what the policy was before training; None without KL. With --lora_rank it costs no memory."""
    if args.kl_coef == 0:
        return None
    if args.lora_rank:
        return Policy(lora.share(policy.qwen, adapters=False), policy.compute_dtype, policy.naive)
    return load_policy(args, device, frozen=True, naive=policy.naive)


# ----------------------------------------------------------------------------------------------------------------------
# The sampler, and the way from shards to whole weights.

@torch.no_grad()
def copy_weights(policy: Policy, target: PreTrainedModel | None) -> None:
    """Gathers the weights, cast to the compute dtype first (half the traffic), into `target`; None only takes part.

    One all-gather for each unit of `shard`, as in a forward pass: 63 for 7B, not one for each of its 730 parameters.
    Collective. Writes in place: the sampler's addresses never move. A target without adapters gets merged weights.
    """
    own = {} if target is None else dict(target.named_parameters())
    for unit_name, unit in [item for item in policy.named_modules() if isinstance(item[1], FSDPModule)]:
        unit.unshard()
        for name, weight in unit.named_parameters():
            name = f"{unit_name}.{name}".removeprefix(".").removeprefix("qwen.")
            # Not a shard, which is of a unit inside; nor what the two share; nor an adapter where the target has none.
            if not isinstance(weight, DTensor) and own.get(name, weight) is not weight:
                own[name].copy_(weight)
        if own and not lora.adapted(target):
            lora.merge(policy.qwen, target)
        unit.reshard()


@torch.no_grad()
def plain_copy(policy: Policy, device: torch.device) -> PreTrainedModel:
    """An unsharded model in the compute dtype; `copy_weights` fills it. Rotary buffers stay float32."""
    qwen = empty_qwen(policy.qwen.config, policy.compute_dtype, device).eval().requires_grad_(False)
    for buffer, source in zip(qwen.buffers(), policy.qwen.buffers(), strict=True):
        buffer.copy_(source)
    qwen.generation_config = policy.qwen.generation_config
    return use_our_attention(qwen)


def make_sampler(policy: Policy, device: torch.device) -> PreTrainedModel:
    """The copy that samples, equal to the policy; `copy_weights` renews it before the next rollout. Collective."""
    sampler = lora.share(policy.qwen, adapters=True) if lora.adapted(policy) else plain_copy(policy, device)
    copy_weights(policy, sampler)
    return sampler


def load_sampler(args, device: torch.device) -> PreTrainedModel:
    """The model of --model as a sampler that nobody trains, for evaluation: each rank reads a whole copy for itself."""
    return use_our_attention(read_qwen(args.model, DTYPES[args.dtype])).to(device).eval().requires_grad_(False)


def export(policy: Policy, tokenizer, args, folder: Path) -> None:
    """Writes weights, configs, tokenizer and processor files that `from_pretrained` and other tools can read.
    Collective.

    Weights are saved in the compute dtype, which is what was sampled with. The processor files of --model are copied,
    since training does not change them. Adapters are merged: what is below half a step of bf16 is lost of their change.
    They are kept as they are in a folder beside it, for peft: in the same one transformers would add them once more.
    """
    whole = plain_copy(policy, torch.device("cpu")) if dist.get_rank() == 0 else None
    copy_weights(policy, whole)
    on_rank_0(write_model, whole, tokenizer, args.model, folder)
    if args.lora_rank:
        adapters = {name.removeprefix("qwen."): weight.full_tensor().cpu()
                    for name, weight in policy.named_parameters() if weight.requires_grad}
        on_rank_0(lora.save_adapters, adapters, args, folder.with_name("adapters"))


def write_model(qwen: PreTrainedModel, tokenizer, source: str, folder: Path) -> None:
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
    family, questions = load_family(args.model), leave_out(questions, args.leave_out)
    questions = [rest_of_response(question, family.begun) for question in questions]
    dataset = VideoDataset(questions, tokenizer, family, args.pixel_settings(), args.seed, args.video)
    longest = max((question.response for question in questions), key=len)
    check_length(args, dataset, len(tokenizer(longest)["input_ids"]) if for_sft else args.max_completion_length)
    if dist.get_rank() == 0:
        print(f"{args.train_file}: {dataset.describe_prompt()}")
    return dataset, args.max_steps or max(1, args.num_epochs * len(questions) // args.prompts_per_step)


def check_length(args, dataset: VideoDataset, completion_length: int) -> None:
    """ValueError if a prompt with its completion could be longer than what the model was made for."""
    limit = load_config(args.model).text_config.max_position_embeddings
    prompt_length = dataset.longest_prompt()
    if prompt_length + completion_length > limit:
        raise ValueError(f"--num_frames {args.num_frames} --image_size {args.image_size}: prompts of up to "
                         f"{prompt_length} tokens, and {completion_length} of a completion, are more than the {limit} "
                         f"that {args.model} was made for; take fewer frames, or smaller ones")


def rest_of_response(question: Question, begun: str) -> Question:
    """An SFT question with what is left of its response where the prompt has begun it, with <think>; ValueError if it
    begins otherwise."""
    if not (begun and question.response):
        return question
    before, tag, rest = question.response.partition(begun.strip())
    if before.strip() or not tag:
        raise ValueError(f"question {question.id}: the prompts of this model end in {begun!r}, so a response must "
                         f"begin with {begun.strip()!r}; this one begins with {question.response[:40]!r}")
    return replace(question, response=rest.lstrip())


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
        raise FloatingPointError(f"the gradient norm is {norm}")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm
