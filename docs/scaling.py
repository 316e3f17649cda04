"""What a GRPO step costs on GPUs, by arithmetic: prints the tables of docs/scaling.md.

    python docs/scaling.py                           # as on that page
    python docs/scaling.py --network 100 --nodes 8   # other networks (Gb/s into each node), other numbers of nodes

Nothing here was measured on a GPU. A floor is counted FLOPs or bytes over the data sheet's rate, with all collectives
of learning hidden behind it: this code cannot be faster. An estimate is the same over the rates assumed below, with
nothing hidden.
"""
import argparse
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import bench  # noqa: E402

# From data sheets: dense bf16 FLOP/s (NVIDIA prints the double, with sparsity), bytes/s of memory, bytes of memory,
# bytes/s of NVLink or PCIe in one direction (NVIDIA prints the sum of both).
GPU = namedtuple("GPU", "flops bandwidth memory link")
GPUS = {"H200": GPU(989e12, 4.8e12, 141e9, 450e9),  # NVIDIA H200 data sheet, SXM
        "H100": GPU(989e12, 3.35e12, 80e9, 450e9),  # NVIDIA H100 data sheet, SXM
        "A100": GPU(312e12, 2.04e12, 80e9, 300e9),  # NVIDIA A100 data sheet, SXM 80 GB
        "RTX 4090": GPU(165e12, 1.01e12, 24e9, 32e9)}  # NVIDIA Ada architecture paper (float32 sums); PCIe 4.0 x16
# Assumed.
MFU = 0.4  # of dense FLOP/s in prefill, scoring and learning: reports of training large models say 0.3 to 0.5
STREAM = 0.7  # of the memory's bandwidth in decoding, AdamW and copies: long reads reach 0.8 to 0.9, short ones less
LINK = 0.7  # of links and network: one layer (0.5 GB in bf16) at a time
OPERATOR = 15e-6  # seconds to launch an operator from Python: B1 of bench.json says 17 on a CPU, its work included
OPERATORS = 1500  # of a decode step: docs/decode_bytes.py counts them
USABLE = 0.9  # of a GPU's memory: the rest is CUDA's, NCCL's, and gaps in the allocator

# The defaults of grpo_video.py, where they cost most: all completions C long, all groups learned. P = 900 prompt
# tokens, 729 of them vision: 9 images (8 pairs of frames, one image) of 18 x 18 patches, 4 to a token. A node: 8 GPUs.
P, G, C, IMAGES, PATCHES, NODE = 900, 8, 256, 9, 18 * 18, 8
# As in the README's letters; E is the width of the vision tower, whose MLPs and merger are 4 E wide.
Shape = namedtuple("Shape", "D F H H_kv V tied layers depth E")
SHAPES = {name: Shape(*bench.SHAPES[name].values(), layers=28, depth=32, E=1280) for name in ("2B", "7B")}


def matrices(s: Shape) -> tuple[int, int, int, int]:
    """Weights in the matrix products of a decoder layer, a vision block, the patch embedding, the merger."""
    return s.D * (2 * s.D + 2 * s.H_kv * s.D // s.H + 3 * s.F), 12 * s.E**2, 1176 * s.E, 4 * s.E * (4 * s.E + s.D)


def weights(s: Shape) -> tuple[int, int, int]:
    """All weights; those of the vision tower; those of FSDP's root unit: embedding, lm_head, last norm."""
    layer, block, embed, merger = matrices(s)
    layer += s.D + 2 * s.H_kv * s.D // s.H + 2 * s.D  # biases of q, k, v; two norms
    vision = s.depth * (block + 13 * s.E) + embed + merger + 6 * s.E + s.D
    root = s.V * s.D * (1 if s.tied else 2) + s.D
    return s.layers * layer + vision + root, vision, root


def decoded(s: Shape) -> int:
    """Weights that a decode step reads: the layers' and lm_head's."""
    total, vision, root = weights(s)
    return total - vision - root + s.V * s.D


def flop(s: Shape, rows: int = G, C: int = C, P: int = P, images: int = IMAGES, patches: int = PATCHES,
         causal: float = 0.5) -> float:
    """FLOPs of the matrix products of one forward pass over a group: its prompt once, `rows` completions of C tokens.
    `causal` is the share of a square of scores that attention computes: half if it skips what lies ahead."""
    layer, block, embed, merger = matrices(s)
    vision = 2 * images * patches * (s.depth * block + embed + merger / 4) + 4 * s.E * s.depth * images * patches**2
    pairs = causal * P**2 + rows * C * (P + causal * C)
    return vision + s.layers * (2 * layer * (P + rows * C) + 4 * s.D * pairs) + 2 * rows * C * s.D * s.V


def cache_bytes(s: Shape, groups: int, own: int) -> int:
    """Keys and values in bf16: of each group's prompt once, of each of its G rows `own` tokens."""
    return 2 * 2 * s.layers * s.H_kv * s.D // s.H * groups * (P + G * own)


def memory(s: Shape, W: int, groups: int, together: int = 1) -> dict[str, float]:
    """Bytes on a GPU, by part: sharded over W, `groups` decoded together, `together` of them in a micro-batch."""
    total, vision, root = weights(s)
    layer, tokens = (total - vision - root) / s.layers, P + G * C
    # bf16 weights and gradients of the root until the end, and what comes on top: float32 of the root's gradients, or a
    # layer with both and the next one's weights (of the vision tower, too, each layer is gathered by itself).
    gathered = 4 * root + max(4 * root, 10 * layer)
    saved = 2 * (s.layers * s.D * tokens + s.depth * s.E * IMAGES * PATCHES)  # one activation a layer or block
    layer_at_work = 2 * tokens * (3 * s.F + 8 * s.D) + 2 * 2 * G * (P + C) * s.D  # and its keys, values for every head
    return {"masters, gradients, Adam": 16 * total / W, "sampler": 2 * total, "reference": 2 * total / W,
            "gathered": gathered, "activations": together * (saved + layer_at_work),
            "logits": 512 * s.V * (2 + 3 * 4), "caches": cache_bytes(s, groups, C)}  # 512: bf16, three times float32


def traffic(s: Shape, nodes: int, W: int, replicas: bool, micro: int = 1, kl: bool = True) -> dict:
    """Bytes that arrive at each GPU, and from other nodes at each node: of learning a step, and of copy_weights.

    Flat mesh: a ring over W ranks enters each node once and carries (W - 1) / W of all bytes. Replicas: weights are
    gathered and gradients scattered inside a node, then nodes sum what each GPU holds: 2 (nodes - 1) / nodes of it.
    """
    total, _, root = weights(s)
    gathered = 2 * total * kl + 2 * total + 2 * (total - root)  # bf16: score, forward; backward still has the root
    learn, inside = micro * (gathered + 4 * total), W // nodes if replicas else W
    ring, flat = (inside - 1) / inside, nodes > 1 and not replicas
    across = ring * learn * flat + replicas * micro * 2 * (nodes - 1) / nodes * 4 * total
    return {"learn": (ring * learn, across), "copy": (ring * 2 * total, ring * 2 * total * flat)}


def seconds(s: Shape, gpu: GPU, groups: int = 1, nodes: int = 1, W: int = NODE, replicas: bool = False, C: int = C,
            network: float = 400, together: int = 1, floor: bool = False, graph: bool = False) -> dict[str, float]:
    """A step by phase: `groups` on each of W GPUs, `together` in a micro-batch; `network` in Gb/s into a node."""
    mfu, stream, link = (1, 1, 1) if floor else (MFU, STREAM, LINK)
    compute, bandwidth, launch = mfu * gpu.flops, stream * gpu.bandwidth, 0 if floor or graph else OPERATORS * OPERATOR
    total, inside, forward = weights(s)[0], W // nodes if replicas else W, groups * flop(s, C=C) / compute
    decode = sum(max(launch, 2 * groups * G * decoded(s) / compute,  # a graph has one width
                     (2 * decoded(s) + cache_bytes(s, groups, C if graph else t)) / bandwidth) for t in range(C))
    # A flat ring is as slow as its slowest part; with replicas one part follows the other.
    moved = {name: (sum if replicas else max)((at_gpu / gpu.link / link, at_node / (network * 1e9 / 8) / link))
             for name, (at_gpu, at_node) in traffic(s, nodes, W, replicas, -(-groups // together)).items()}
    # A backward pass with checkpointing is 3 forward passes. AdamW reads 16 bytes and writes 12, clipping 12 in all;
    # the copy casts the shard (6), takes it out of the gathered buffer (4), into the sampler (4).
    phase = {"sampling": groups * flop(s, rows=0) / compute + decode, "scoring": forward,
             "update": 4 * forward + 40 * total / inside / bandwidth, "collectives": moved["learn"],
             "copy": moved["copy"] + (6 / inside + 8) * total / bandwidth}
    hidden = min(phase["scoring"] + phase["update"], phase["collectives"]) if floor else 0
    return {**phase, "step": sum(phase.values()) - hidden}


def table(*lines: list) -> str:
    lines = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(x if isinstance(x, str) else f"{x:.4g}" for x in line) + " |" for line in lines)


def tables(networks=(400, 3200), node_counts=(2, 4)) -> dict[str, str]:
    out, big, h200, kinds = {}, SHAPES["7B"], GPUS["H200"], ({"floor": True}, {}, {"graph": True})
    t0, t1, t2, t3, t4, t5 = [], [], [], [], [], []
    for name, s in SHAPES.items():
        t0.append([name, *(f"{x / 1e9:.3f}" for x in weights(s)), *(f"{flop(s, rows) / 1e12:.1f}" for rows in (0, G)),
                   f"{2 * decoded(s) / 1e9:.1f}", *(f"{cache_bytes(s, 1, own) / 1e6:.0f}" for own in (0, C))])
        for W in (1, 8) if name == "2B" else (1, 2, 4, 8, 16):
            parts = memory(s, W, max(1, 8 // W))
            needs = sum(parts.values())
            fits = [gpu_name for gpu_name, gpu in GPUS.items() if needs < USABLE * gpu.memory]
            t2.append([f"{name}, {W}", *(f"{x / 1e9:.1f}" for x in parts.values()), f"{needs / 1e9:.0f}",
                       ", ".join(fits) or "none"])
            for gpu_name in fits if W == NODE else ():
                low, high, graph = (seconds(s, GPUS[gpu_name], 8 // W, W=W, **kind) for kind in kinds)
                t1.append([f"{name}, {W} x {gpu_name}", *(f"{low[x]:.2f} / {high[x]:.2f}" for x in low),
                           f"{graph['step']:.2f}", f"{high['sampling'] / high['step']:.0%}",
                           f"{graph['sampling'] / graph['step']:.0%}"])
    out["T0"] = table(["", "10^9 weights", "vision", "root", "TFLOP, prompt", "group", "GB of weights a token",
                       "cache, MB: prompt", "group"], *t0)
    out["T1"] = table(["", *low, "step, graph", "sampling's share", "graph"], *t1)
    out["T2"] = table(["model, GPUs", *parts, "sum", "fits"], *t2)

    for nodes in node_counts:
        at_node = [sum(x for _, x in traffic(big, nodes, nodes * NODE, replicas, kl=kl).values())
                   for replicas, kl in ((False, True), (False, False), (True, True))]
        more = [(16 + 2 * kl) * weights(big)[0] * (1 / NODE - 1 / nodes / NODE) for kl in (True, False)]
        t3.append([nodes, *(f"{x / 1e9:.1f}" for x in at_node + more)])
    out["T3"] = table(["nodes", "flat mesh", "KL off", "replicas", "replicas' memory, a GPU", "KL off"], *t3)

    for nodes in (1, *node_counts):
        for groups, together in ((1, 1), *([(2, 1)] if nodes == 1 else []), (8, 1), (8, 8)):
            run = partial(seconds, big, h200, groups, nodes, nodes * NODE, together=together)
            steps = [[run(network=network, graph=graph, replicas=replicas)["step"]
                      for replicas in ((False, True) if nodes > 1 else (False,))]
                     for graph in (False, True) for network in networks]
            rows = groups * nodes * NODE * G
            t4.append([nodes, rows // G, together * G, *(" / ".join(f"{x:.1f}" for x in pair) for pair in steps),
                       *(f"{rows / min(steps[i]):.0f}" for i in (0, len(networks)))])
    head = [f"{how}, {network:g} Gb/s" for how in ("eager", "graph") for network in networks]
    out["T4"] = table(["nodes", "prompts", "micro-batch", *head, "completions/s", "graph"], *t4)

    for groups, tokens in ((1, 256), (8, 256), (1, 2048), (8, 2048)):
        low, high, graph = (seconds(big, h200, groups, C=tokens, together=groups, **kind) for kind in kinds)
        gains = [x["step"] / (x["step"] - x["sampling"] + low["sampling"]) for x in (high, graph)]
        t5.append([groups * G, tokens, f"{cache_bytes(big, groups, tokens) / 1e9:.1f}",
                   *(f"{x['sampling']:.1f}" for x in (low, graph, high)), f"{high['step']:.1f}", f"{graph['step']:.1f}",
                   *(f"{x:.1f}x" for x in gains)])
    out["T5"] = table(["rows", "C", "caches, GB", "floor", "graph", "eager", "step, eager", "graph", "gain over eager",
                       "over graph"], *t5)
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", nargs="+", type=float, default=[400, 3200], help="Gb/s into each node; assumed")
    parser.add_argument("--nodes", nargs="+", type=int, default=[2, 4], help="besides 1")
    args = parser.parse_args()
    for name, lines in tables(args.network, args.nodes).items():
        print(f"{name}\n\n{lines}\n")
