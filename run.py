"""The life of a training run: a folder with one writer, steps and their log, checkpoints, and how it stops.

Nothing of the algorithm is here: skip this file on a first reading. What it promises, and how that is tested, is in
docs/reliability.md.

    python run.py out/grpo/checkpoints/step_000100 out/grpo_100     # a checkpoint -> a model that evaluate.py reads
"""
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import lora
import runtime
from data import Example
from model import Policy
from runtime import DTYPES, HERE, SIGNALS, STOPPED, TrainArgs, on_rank_0

# ----------------------------------------------------------------------------------------------------------------------
# The run, which goes from step to step.

class Run:
    """What a trainer has beside its algorithm: folder, steps, log, checkpoints, and a way to stop."""

    def __init__(self, args, policy: Policy, optimizer: torch.optim.Optimizer, num_steps: int, device: torch.device):
        """Claims the folder and, with --resume, restores policy and optimizer: when all else is ready. Collective."""
        self.args, self.policy, self.optimizer, self.device = args, policy, optimizer, device
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.output_dir = open_folder(args)
        on_rank_0(require_space, self.output_dir, policy)
        self.first_step = load_checkpoint(self.output_dir, policy, optimizer) if args.resume else 0
        self.seen = self.skipped = 0  # questions of all ranks; steps without any that could be read
        self.unreadable, self.bad = [], [0]  # questions of this rank with their errors; how many on each rank
        self.stop, self.logged, self.bad_before, self.seconds = False, False, 0, {}  # of the step
        self.progress = tqdm(total=num_steps, initial=self.first_step, desc=Path(sys.argv[0]).stem, dynamic_ncols=True,
                             disable=self.rank > 0)
        self.tensorboard = None
        if args.tensorboard and self.rank == 0:
            from torch.utils.tensorboard import SummaryWriter  # only here: it needs a package that nothing else does
            self.tensorboard = SummaryWriter(str(self.output_dir), purge_step=self.first_step)
        # Handlers that do nothing: `watch` hears the signals, and the run stops at the end of a step.
        HERE.signalled = None
        self.handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        HERE.timeout_s = 60 * args.timeout_minutes if self.ranks > 1 else math.inf
        dist.barrier()  # still with the hour that loading may take
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=args.timeout_minutes))

    def steps(self, loader: Iterable) -> Iterator[tuple[int, list[Example]]]:
        """(step, its examples on this rank). Between two steps come checkpoints, and the end if a signal asks for it.
        Collective."""
        HERE.phase, HERE.since, self.seconds = "data", runtime.clock(), {}
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
                runtime.leave(f"stopped by a signal after {step + 1} steps; to go on: {resume_command()}", STOPPED)
            HERE.phase, HERE.since, self.seconds = "data", runtime.clock(), {}

    def phase(self, name: str) -> None:
        """What follows is `name`: its seconds are logged as such, and an error or a timeout says so."""
        now = runtime.clock()
        self.seconds[HERE.phase] = now - HERE.since
        HERE.phase, HERE.since = name, now

    def keep_readable(self, examples: list[Example]) -> list[Example]:
        """The examples whose pixels could be read; the others are named on screen, and nothing takes their place."""
        for example in examples:
            if example.error:
                self.unreadable.append(f"question {example.question.id}: {example.error}")
                tqdm.write(f"step {HERE.step}: left out {self.unreadable[-1]}")
        return [example for example in examples if not example.error]

    def sum_over_ranks(self, values: dict) -> dict[str, float]:
        """That of runtime.py, and with it what all ranks must agree on: how much is unreadable, and whether to stop."""
        bad = {f"unreadable {rank}": len(self.unreadable) * (rank == self.rank) for rank in range(self.ranks)}
        total = runtime.sum_over_ranks({**values, **bad, "stop": HERE.signalled is not None}, self.device)
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
        if not all(map(math.isfinite, metrics.values())):
            raise FloatingPointError(verdict)
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
        HERE.phase, HERE.since = "export", runtime.clock()
        dist.distributed_c10d._set_pg_timeout(timedelta(hours=1))  # rank 0 writes the model, and the others wait
        on_rank_0(report, self.output_dir)
        runtime.export(self.policy, tokenizer, self.args, self.output_dir / "final")
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
# Its folder: one writer, and settings that say what is in it.

# Flags that may differ between a run and its resumption; any other would make it another run.
FREE_ON_RESUME = {"output_dir", "resume", "change", "num_workers", "print_every", "save_every", "keep_checkpoints",
                  "micro_batch_size", "rollout_prompts", "batch_size", "gradient_checkpointing", "frame_cache", "naive",
                  "cuda_graph", "tensorboard", "max_bad_frac", "timeout_minutes", "compare"}
WHAT_LEARNS = {"lora_rank", "lora_alpha", "freeze_vision"}
# What a run writes. A folder with anything else in it is never moved, but for evaluations inside that of their model.
OWN = re.compile(r"(lock|args\.json|metrics\.jsonl|completions\.txt|report\.json|checkpoints|final|adapters|"
                 r"results\.json|attention(\.json|(_\w+)?\.png)|"
                 r"samples(_rank\d+)?\.jsonl|events\.out\.tfevents.*)(\.part)?")
LOCKS = []  # open files: what closes them gives the folder free


def open_folder(args) -> Path:
    """Makes args.output_dir with args.json in it; called when all else is ready, so that a typo touches nothing.
    Collective.

    A run that is there already is moved aside, never overwritten. With --resume it is continued instead. ValueError if
    another process writes there, if files there are not a run's, or if the resumed run would be another one.
    """
    on_rank_0(claim_folder, args)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)  # on nodes that do not share their files
    return Path(args.output_dir)


def claim_folder(args) -> None:
    """`open_folder` on rank 0."""
    folder, settings = Path(args.output_dir), Path(args.output_dir) / "args.json"
    trains = isinstance(args, TrainArgs)
    files = [Path(args.data_root) / file for file in ([args.train_file] if trains else args.eval_files)]
    files += args.leave_out if trains else []
    now = {**vars(args), "sha256": {str(file): sha256(file) for file in files}}
    found = sorted(folder.iterdir()) if folder.exists() else []
    begun = [path for path in found if path.name not in ("lock", "args.json.part")]
    # A flag that is newer than the run has its default there.
    before = {**vars(type(args)()), **read_settings(settings)} if args.resume and begun else None
    foreign = [path for path in found if not OWN.fullmatch(path.name) and not (path / "args.json").exists()]
    if foreign and before is None:
        raise ValueError(f"--output_dir {folder}: {foreign[0].name} in it was not written by a run; give another")
    if found:
        take_lock(folder)
    if before is not None:
        check_resumed(before, now, settings)
    elif settings in found:
        models = args.model if isinstance(args.model, list) else [args.model]
        if any(Path(model).resolve().is_relative_to(folder.resolve()) for model in models):
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
    if learn := WHAT_LEARNS.intersection(changed):
        raise ValueError(f"--resume: {', '.join(sorted(learn))} cannot change, since a checkpoint holds what learns; "
                         "make it a model (python run.py CHECKPOINT FOLDER) and begin another run with that")
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
# Checkpoints.

def require_space(output_dir: Path, policy: Policy) -> None:
    """OSError if a checkpoint (masters and AdamW's two moments) would not fit on the disk."""
    need = 3 * sum(weight.numel() * weight.element_size() for weight in policy.parameters() if weight.requires_grad)
    free = shutil.disk_usage(output_dir).free
    if free < need:
        raise OSError(f"{output_dir}: a checkpoint needs {need / 1e9:.2f} GB of disk space and {free / 1e9:.2f} GB are "
                      "free; make room (an older checkpoint may go), and resume")


def save_checkpoint(output_dir: Path, step: int, policy: Policy, optimizer: torch.optim.Optimizer, keep: int) -> None:
    """Saves masters and optimizer state after `step` steps, each rank its shards; the newest `keep` stay. Collective.

    The step number is all the rest of the state there is: data order, options and sampling noise are functions of it.
    FloatingPointError, with all checkpoints as they were, if what would be saved is not finite.
    """
    moments = [value for state in optimizer.state.values() for value in state.values()]
    masters = [weight for weight in policy.parameters() if weight.requires_grad]
    tensors = [x.to_local() if isinstance(x, DTensor) else x for x in (*masters, *moments)]
    broken = torch.stack([~x.isfinite().all() for x in tensors]).sum().to(masters[0].device)
    dist.all_reduce(broken)
    if broken:
        raise FloatingPointError("the weights are not finite, so they were not saved")
    on_rank_0(require_space, output_dir, policy)
    folder = output_dir / "checkpoints" / f"step_{step:06d}"
    on_rank_0(shutil.rmtree, folder, True)  # what a save that was killed has left
    dcp.save(learned_state(policy, optimizer), checkpoint_id=folder)
    files = [None] * dist.get_world_size()
    # Each rank reads back what it has written.
    dist.all_gather_object(files, {file.name: sha256(file) for file in folder.glob(f"__{dist.get_rank()}_*")})
    on_rank_0(seal_checkpoint, folder, {name: digest for part in files for name, digest in part.items()}, keep)


def learned_state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict:
    """Masters and optimizer state, each rank its shards, by name. What is frozen is that of --model. Collective."""
    return {"model": {name: weight.detach() for name, weight in policy.named_parameters() if weight.requires_grad},
            "optimizer": dcp_state.get_optimizer_state_dict(policy, optimizer)}


def seal_checkpoint(folder: Path, digests: dict[str, str], keep: int) -> None:
    """Writes SHA256SUMS, which makes a checkpoint whole (`sha256sum -c` reads it too), then removes older ones."""
    digests[".metadata"] = sha256(folder / ".metadata")
    write_whole(folder / "SHA256SUMS", "".join(f"{digest}  {name}\n" for name, digest in digests.items()))
    newest = sorted(path.parent for path in folder.parent.glob("step_*/SHA256SUMS"))[-keep:]
    for old in folder.parent.glob("step_*"):
        if old not in newest:
            shutil.rmtree(old, ignore_errors=True)  # if it cannot go now, the next save tries again


def damage(folder: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """What is wrong with this rank's share of a checkpoint's files."""
    try:
        sums = [line.split("  ") for line in (folder / "SHA256SUMS").read_text().splitlines()]
        if sums[-1][1] != ".metadata":  # which comes last
            return ["SHA256SUMS is cut short"]
        return [f"{name} is not what was written" for digest, name in sums[rank::ranks]
                if sha256(folder / name) != digest]
    except (OSError, ValueError, IndexError) as error:
        return [str(error) or "SHA256SUMS is empty"]


def load_checkpoint(output_dir: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> int:
    """Restores the newest whole checkpoint in place and returns its step; 0 if the run has none yet. Collective.

    Any number of ranks may resume what any other number has saved, as long as all see the folder (with several nodes: a
    shared file system). Load only checkpoints that you trust: the format holds pickles, so a checkpoint folder is code.
    """
    rank, ranks, step = dist.get_rank(), dist.get_world_size(), 0
    # Without sums it is a save that was cut short. All ranks go by what rank 0 sees.
    sealed = [sorted((path.parent for path in output_dir.glob("checkpoints/step_*/SHA256SUMS")), reverse=True)]
    dist.broadcast_object_list(sealed)
    folders, damaged = sealed[0], []
    for folder in folders:
        found = [None] * ranks
        dist.all_gather_object(found, damage(folder, rank, ranks))
        if not sum(found, []):
            step = int(folder.name.removeprefix("step_"))
            break
        damaged.append(folder)
        if rank == 0:
            print(f"{folder} is damaged: {'; '.join(sum(found, []))}")
    if folders and not step:
        raise ValueError(f"--resume: no whole checkpoint in {output_dir / 'checkpoints'}; begin anew, without --resume")
    if rank == 0:
        print(f"resuming after step {step}" if step else "no checkpoint yet: from the first step")
    if step:
        state = learned_state(policy, optimizer)
        dcp.load(state, checkpoint_id=folder)  # the masters in place
        dcp_state.set_optimizer_state_dict(policy, optimizer, state["optimizer"])
        for path in damaged:  # from now on it counts for none of the newest
            (path / "SHA256SUMS").unlink(missing_ok=True)
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


def export_checkpoint(checkpoint: Path, folder: Path) -> None:
    """A checkpoint of a run, while it goes on or after, as a Hugging Face folder, by one process on a CPU."""
    settings = read_settings(checkpoint.parent.parent / "args.json")
    if problems := damage(checkpoint):
        raise ValueError(f"{checkpoint}: {'; '.join(problems)}")
    if folder.exists():
        raise ValueError(f"{folder} is there already; give another folder")
    dtype = DTYPES[settings["dtype"]]
    masters, rank = torch.promote_types(dtype, torch.float32), settings.get("lora_rank", 0)
    qwen = runtime.read_qwen(settings["model"], dtype if rank else masters)
    if rank:
        lora.add_adapters(qwen, rank, settings["lora_alpha"], masters, settings["seed"])
    if settings.get("freeze_vision"):
        qwen.model.visual.requires_grad_(False)
    # What was frozen is not in the checkpoint: it stays as the model has it.
    state = {"model": {f"qwen.{name}": weight.detach() for name, weight in qwen.named_parameters()
                       if weight.requires_grad}}
    dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    plain = lora.share(qwen.to(dtype), adapters=False)
    with torch.no_grad():
        lora.merge(qwen, plain)
    runtime.write_model(plain, runtime.load_tokenizer(settings["model"]), settings["model"], folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python run.py CHECKPOINT FOLDER")
    try:
        export_checkpoint(*map(Path, sys.argv[1:]))
    except ValueError as error:
        sys.exit(str(error))
