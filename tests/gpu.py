"""What only a GPU can tell, in about half an hour on one GPU of 80 GB: nine parts of at most 8 minutes each.

    python3 tests/gpu.py                 # all parts, the most telling first; their rows go into docs/gpu.json at once
    python3 tests/gpu.py --only a b      # these parts
    python3 tests/gpu.py --again         # also parts that are done for this GPU, driver, versions and commit
    python3 tests/gpu.py --dry-run       # the same code with tiny shapes on a CPU, two minutes, into a temporary file

Install first: torch built for the GPU's driver and the other wheels of requirements.txt, no more; the README says how.
No network and no weights are needed: models have random weights in the shapes of Qwen2-VL-2B and -7B or are tiny ones,
of each family, or the toy world's base. With torch, transformers and pillow alone (2.11 and 5.17 do) all parts run but
e, which reads videos with decord and av, and f, which needs these, trl, datasets and torchvision.

In a dry run no CUDA graph can be captured: its operators are run one by one, with the caches and the order of a replay.

Each part is a process of its own, so that one that fails, runs out of memory or hangs costs the others nothing. It is
FAILED, and the exit code 1, if it raises, takes more than 8 minutes, or if a number is not finite or beyond its limit.
Limits are never guesses about rounding: where two ways of computing the same thing are compared, either may be off
from a third, wider one by FACTOR times what Hugging Face's own forward pass in that dtype is off.
"""
import argparse
import functools
import gc
import hashlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

if "--dry-run" in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: a dry run is one on the CPU, on any machine
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is looked up

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import transformers  # noqa: E402

import gpu_parts  # noqa: E402
from gpu_parts import ROOT, Skip, runtime  # noqa: E402

LIMIT_S = 480  # of a part
RESULTS = ROOT / "docs/gpu.json"

# All that a dry run does differently. Counts: P tokens of a prompt, G completions of it, C tokens of each.
REAL = SimpleNamespace(
    shapes=("2B", "7B"), step_shape="2B", rounds=3,
    oracle=dict(frames=4, length=300, image_size=252), oracle_C=32, oracle_G=4,
    prompt=dict(frames=16, length=900, image_size=252), decode_prompts=(1, 8), decode_tokens=64, learn_C=256,
    step=dict(prompts_per_step=8, group_size=8, max_completion_length=256), steps=3, most=2 ** 20, traced_C=16,
    demo=dict(max_steps=240, save_every=50), questions=0, least_gain=0.2)
TINY = SimpleNamespace(
    shapes=("tiny",), step_shape="tiny", rounds=1,
    oracle=dict(frames=4, length=60, image_size=56), oracle_C=12, oracle_G=4,
    prompt=dict(frames=4, length=60, image_size=56), decode_prompts=(1, 2), decode_tokens=4, learn_C=4,
    step=dict(prompts_per_step=2, group_size=4, max_completion_length=6), steps=2, most=16, traced_C=4,
    demo=dict(max_steps=10, save_every=4), questions=16, least_gain=-0.25)


# ----------------------------------------------------------------------------------------------------------------------
# A part, its rows and the file.

class Part:
    """A part that is running: `sizes`, REAL or TINY; `device`; `folder`, for files that may go. Writes its own rows."""

    def __init__(self, letter: str, args):
        self.letter, self.args, self.sizes = letter, args, TINY if args.dry_run else REAL
        self.device, self.limit_s, self.failures = runtime.setup()[2], LIMIT_S, []
        self.folder = Path(tempfile.mkdtemp(prefix=f"gpu_{letter}_"))
        self.entry = {"title": PARTS[letter][0], "status": "running", "rows": []}

    def row(self, what: str, limit: float | None = None, value: float | None = None, **more) -> None:
        """Adds a row; a number that is not finite, or a `value` above its `limit`, makes the part fail."""
        if value is not None:
            more = {"value": value, **more}
        if limit is not None:
            more["limit"] = limit
        more = {name: x.item() if isinstance(x, torch.Tensor) else x for name, x in more.items() if x is not None}
        wrong = [name for name, x in more.items() if isinstance(x, float) and not math.isfinite(x)]
        more["ok"] = not wrong and not (limit is not None and more["value"] > limit)
        if not more["ok"]:
            self.failures.append(f"{what}: " + (f"{wrong[0]} is {more[wrong[0]]}" if wrong else
                                                f"{more['value']:.3g} is above its limit {limit:.3g}"))
            more |= {name: str(more[name]) for name in wrong}  # JSON has no NaN
        self.entry["rows"].append({"what": what, **more})
        self.save()
        print(f"{self.letter}  {what}: " + ", ".join(f"{name} {x:.4g}" if isinstance(x, float) else f"{name} {x}"
                                                     for name, x in more.items()), flush=True)

    def attempt(self, what: str, run, *args, **more) -> bool:
        """Whether run(self, *args, **more) has not raised; if it has, the part fails, and goes on with the next one."""
        worked = False
        try:
            run(self, *args, **more)
            worked = True
        except Skip:
            raise
        except Exception as error:
            traceback.print_exc()
            self.failures.append(f"{what} raised {type(error).__name__}: {str(error)[:300]}")
            self.entry["rows"].append({"what": f"{what}: raised {type(error).__name__}", "ok": False})
            self.save()
        gc.collect()  # models are cycles; what they held goes back before the next one is loaded
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return worked

    def fits(self, what: str, need: float) -> bool:
        """Whether `need` bytes are there; if not, a row says so. A twentieth stays free: fragments, other processes."""
        there = 0.95 * (torch.cuda.mem_get_info()[1] if self.device.type == "cuda" else
                        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        if need > there:
            self.row(f"{what}: skipped, too large for this GPU", bytes_needed=int(need), bytes_there=int(there))
        return need <= there

    def save(self) -> None:
        store(self.args, lambda parts: parts.update({self.letter: self.entry}))


def store(args, change) -> dict:
    """Applies `change` to the parts of this machine's run in the file, atomically; returns them, letter -> entry."""
    file, here = Path(args.output), machine()
    runs = json.loads(file.read_text())["runs"] if file.exists() else []
    run = next((run for run in runs if run["machine"] == here), None)
    if run is None:
        run = {"machine": here, "parts": {}}
        runs.append(run)
    change(run["parts"])
    text = json.dumps({"runs": runs}, indent=1, allow_nan=False) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    new.write_text(text)
    os.replace(new, file)  # whoever is killed here leaves the old file or the new one
    return run["parts"]


@functools.cache
def machine() -> dict:
    """What rows have to share to stand in one table. The commit is the last one that changed code.

    A part takes it from the command that started it: files may change while the others run.
    """
    if "GPU_MACHINE" in os.environ:
        return json.loads(os.environ["GPU_MACHINE"])

    def output(*command):
        try:
            return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    code = ("*.py", "assets")
    commit = output("git", "log", "-1", "--format=%h", "--", *code)
    changes = output("git", "diff", "HEAD", "--", *code)
    if changes := changes + output("git", "ls-files", "--others", "--exclude-standard", "--", *code):
        commit += f" with changes {hashlib.sha256(changes.encode()).hexdigest()[:8]}"
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
    return {"gpu": gpu.name if gpu else "none (dry run on the CPU)", "gpu_bytes": gpu.total_memory if gpu else 0,
            "driver": driver if gpu else "none", "cuda": torch.version.cuda or "none", "torch": torch.__version__,
            "transformers": transformers.__version__, "commit": commit}


# ----------------------------------------------------------------------------------------------------------------------
# The command.

PARTS = {  # letter: (title, what it does, what it needs, the function)
    "a": ("oracles", "Greedy and sampled decoding, log-probs, shared prompts and a whole step against Hugging Face's "
          "forward pass and explicit code, in float32 and bf16.", "73 GB for the 2B shape, 1 GB for the toy",
          gpu_parts.oracles),
    "b": ("decoding", "Decoding with and without the CUDA graph: equal tokens, seconds a token over the floor.",
          "23 GB at 7B, 12 at 2B", gpu_parts.decoding),
    "c": ("usual way", "Sampling against Hugging Face's generate, learning against plain rows.",
          "48 GB at 7B, 24 at 2B", gpu_parts.usual_way),
    "d": ("steps", "Whole GRPO steps at 2B: seconds by phase, peak memory, the largest group and completion.",
          "45 GB, and all there is for the largest", gpu_parts.whole_steps),
    "e": ("demo", "The toy's demo, killed on its way and resumed; accuracy before and after; nccl with one rank.",
          "1 GB, decord and av", gpu_parts.demo),
    "f": ("TRL", "A step of TRL's trainer and one of ours at 2B.", "55 GB; trl, datasets and torchvision",
          gpu_parts.against_trl),
    "g": ("trace", "A trace of one step at 2B: its longest kernels and the longest gaps between kernels.", "45 GB",
          gpu_parts.trace),
    "h": ("LoRA", "Adapters learn, and the merged export is the policy; steps at 2B and 7B with their peak memory.",
          "20 GB at 7B, 7 at 2B", gpu_parts.adapters),
    "i": ("families", "Tiny models of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5: the oracles of a, LoRA, steps in "
          "bf16, and the CUDA graph.", "2 GB", gpu_parts.families)}


def run_part(args) -> int:
    """The child: runs one part and leaves its entry in the file."""
    part, start = Part(args.part, args), time.perf_counter()
    part.save()
    status = "ok"
    try:
        PARTS[args.part][-1](part)
    except Skip as reason:
        status = f"skipped: {reason}"
    except Exception as error:
        traceback.print_exc()
        part.failures.append(f"{type(error).__name__}: {str(error)[:500]}")
    if part.failures:
        status = "FAILED"
        part.entry["failures"] = part.failures
    part.entry.update(status=status, seconds=round(time.perf_counter() - start, 1))
    part.save()
    dist.destroy_process_group()
    shutil.rmtree(part.folder, ignore_errors=True)
    return int(status == "FAILED")


def supervise(letter: str, args) -> str:
    """The parent's side of a part: starts it, waits for it at most its time, returns a phrase for the screen."""
    flags = ["--part", letter, "--output", args.output] + ["--dry-run"] * args.dry_run
    log = Path(args.output).with_suffix("").with_name(f"{Path(args.output).stem}_{letter}.log")
    log = log if args.dry_run else ROOT / "out" / log.name
    log.parent.mkdir(parents=True, exist_ok=True)
    start, late = time.perf_counter(), False
    # Before the child writes: one that dies at once must not be taken for the run before.
    store(args, lambda parts: parts.update({letter: {"title": PARTS[letter][0], "status": "running", "rows": []}}))
    with open(log, "w") as stream:
        child = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), *flags], stdout=stream,
                                 stderr=subprocess.STDOUT, start_new_session=True,
                                 env={**os.environ, "GPU_MACHINE": json.dumps(machine())})
        try:
            child.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            late = True
        finally:  # also on Ctrl-C: a part takes the processes that it has started with it
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
    entry = store(args, lambda parts: None)[letter]
    if entry["status"] == "running":  # it has died without a word
        entry["failures"] = [f"took more than {LIMIT_S} s" if late else f"its process ended with {child.returncode}"]
        entry.update(status="FAILED", seconds=round(time.perf_counter() - start, 1))
        store(args, lambda parts: parts.update({letter: entry}))
    told = entry["status"] if entry["status"] != "FAILED" else f"FAILED ({log}): " + "; ".join(entry["failures"])
    return f"{time.perf_counter() - start:.0f} s, {told}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--again", action="store_true", help="also parts that are done")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, into a temporary file")
    parser.add_argument("--output", help="the file of rows; default: docs/gpu.json, in a dry run a temporary file")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # a child of this very script
    args = parser.parse_args()
    args.output = args.output or (tempfile.mkdtemp(prefix="gpu_") + "/gpu.json" if args.dry_run else str(RESULTS))
    if args.dry_run and Path(args.output).resolve() == RESULTS:
        parser.error("a dry run leaves docs/gpu.json alone; give another --output")
    if args.part:
        return run_part(args)
    if not torch.cuda.is_available() and not args.dry_run:
        for letter, (title, sentence, needs, _) in PARTS.items():
            print(f"{letter}. {title}: {sentence} Needs {needs}.")
        print("\nThis needs a GPU, and torch sees none here (nvidia-smi shows whether there is one, and the CUDA "
              "version that its driver supports). --dry-run runs the same code with tiny shapes on the CPU.")
        return 2
    print(", ".join(f"{name} {value}" for name, value in machine().items()), flush=True)
    for letter in args.only:
        title = PARTS[letter][0]
        if store(args, lambda parts: None).get(letter, {}).get("status") == "ok" and not args.again:
            print(f"{letter}. {title} ... done before, skipped (--again runs it)")
            continue
        print(f"{letter}. {title} ... ", end="", flush=True)
        print(supervise(letter, args), flush=True)
    parts = {letter: entry for letter, entry in store(args, lambda parts: None).items() if letter in args.only}
    print(f"\n{'part':14}{'status':10}{'seconds':>8}{'rows':>6}")
    for letter, entry in parts.items():
        print(f"{letter}. {entry['title']:11}{entry['status'].split(':')[0]:10}{entry.get('seconds', 0):8.0f}"
              f"{len(entry['rows']):6}")
    print(f"rows in {args.output}")
    return int(any(entry["status"] == "FAILED" for entry in parts.values()))


if __name__ == "__main__":
    for wish in (signal.SIGINT, signal.SIGTERM):  # both, so that whoever ends this ends the part as well
        signal.signal(wish, signal.default_int_handler)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on with the parts that are not done")
        sys.exit(130)
