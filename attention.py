"""Where does the reasoning look? Attention to the video, token by token, and what is lost without what it looks at.

    python attention.py                                                # the toy world's base
    python attention.py --question "Which steps does the video show?" --output_dir out/toy_attention_list
    python attention.py --model toy out/toy_grpo/final                 # two models side by side
    python attention.py --model out/grpo/final --data_root DIR         # real data, one GPU

A model answers greedily. One teacher-forced pass over prompt and completion then records, at the seam `attend` of
model.py, the attention with which each token was chosen: that of the state before it. Tokens are of three kinds:
    reasoning   between <think> and </think>
    answer      between <answer> and </answer>
    step        those of the reasoning that name a step that was done (`task_progress_metadata`)
Of each kind, layer by layer (means over heads, over a question's tokens, then over questions):
    vision      the share of attention on tokens of video and image; uniform_vision: the share that they would have if
                each token looked at all it can see equally
    frames      the share on each time step of the video (two frames); uniform_frames
    entropy     of the attention over vision tokens, nats; max_entropy: the log of their number
In the toy world, where it is known which time steps show which step:
    diagonal    what the words of a step give to the time steps that show it, as a share of what they give to those of
                all steps named; each step weighs the same, as a row and as a column. So a head that looks at the same
                place whatever is said, the last frame say, has exactly 1 / (number of steps): chance
    place       in these time steps, what verbs give to the upper half, where their sign is, and nouns to the lower,
                where their object is, both weighing the same; chance is 1/2
    picked      the mean over the 4 heads that are best at it on the other half of the questions
    other_video the diagonal of the same words and heads when another question's video is shown. What is left of it was
                had without seeing: by counting, as the n-th word looks at the n-th time step whatever it shows
    hiding      nats that each word of a step loses when no token of the completion may look at its time steps (own), or
                at as many others; and when another question's video is shown (other_video). Attention is not
                explanation (arXiv 1902.10186): these are the causal partners
Intervals are 95% bootstrap intervals over questions. Hiding does not undo what the prompt's text and later vision
tokens have read of a time step. With another --video than "full" the time steps are still those of the own video.

Written to --output_dir: attention.json, which has the words above for keys, and pictures (docs/attention_report.py).
`layers` is a list over layers, `heads` (layers, heads), `picked_heads` (layer, head) for either half. `samples` are the
first 32 questions with a video: tokens, token_kinds, `named` (token, index in `steps`, 1 behind a step's first word),
`shown` (the index of the step that each time step shows; null: not known), and the attention of each token on the time
steps, `frames`, and of the tokens `placed` on the places in them, `places` (tokens, F, height, width): means over the
heads picked by the diagonal, or else by the place, or else all (`samples_heads`), in base64 of uint8 of `shape`, times
`scale`.

Memory: of one layer's attention a chunk of 64 queries exists at a time, (H, 64, T) float32, about three times over;
kept are its sums over halves of time steps, (L, H, C, 2F + 1) float32, of one question. For 7B, 16 frames of 252 pixels
and 256 tokens that is 3 x 8 MB and 14 MB; all of its attention, (L, H, T, T), would be 4 GB.

Of Qwen3.5 the layers are those with attention, one of four. What the others remember of the video no share tells, and
nothing is hidden from them: `hiding` is then what is lost without attention, and less than all that was seen there.

Letters: L layers, H heads of size d, P prompt tokens, C completion tokens, T = P + C - 1, F time steps of the video.
"""
import base64
import json
import math
import random
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as nnf
import transformers
from torch import Tensor
from tqdm import tqdm

import deltanet
import runtime
from data import (
    ANSWER_BLOCK,
    NOT_DONE,
    Example,
    Question,
    VideoDataset,
    load_questions,
    make_loader,
    named_by_text,
    reasoning_clauses,
)
from model import (
    Packing,
    append_text,
    collate_prompts,
    embed_prompts,
    end_token_ids,
    text_states,
    token_logps,
    vision_token_ids,
)
from run import open_folder, write_whole
from runtime import RunArgs, arg
from sampler import generate

KINDS = ("reasoning", "answer", "step")
CHUNK = 64  # queries whose attention exists at a time
NUM_PICKED = 4  # heads
NUM_SAMPLES, MOST_PLACES = 32, 20_000  # questions that are written token by token; numbers of one in `places`


@dataclass
class Args(RunArgs):
    """One process."""
    model: list[str] = arg(["toy"], "one or more folders or hub ids, as in the other scripts; 'toy': the tiny one")
    eval_file: str = arg("annotations/validation_L1.jsonl", "under data_root: validation or training file")
    num_questions: int = arg(32, "look into the first so many questions of the file", least=1)
    question: str = arg("", "asked in place of each question and its options; empty: what the file asks")
    words: str = arg("own", "own: what the model answers; true: the toy world's teacher, the same for all models")
    output_dir: str = arg("out/attention", "attention.json and pictures go here")
    max_completion_length: int = arg(256, "most tokens of a completion, end token included", least=1)
    batch_size: int = arg(16, "prompts decoded together: memory against speed", least=1)

    def __post_init__(self):
        super().__post_init__()
        if self.words not in ("own", "true"):
            raise ValueError(f"--words {self.words!r}: must be own or true")

    @property
    def eval_files(self) -> list[str]:  # whose digest `open_folder` writes down
        return [self.eval_file]


TOY = dict(image_size=56, max_completion_length=64, batch_size=32, frame_cache="out/toy_frames",
           output_dir="out/toy_attention")


# ----------------------------------------------------------------------------------------------------------------------
# The recorder: one prompt and its completion, and what each token of the completion looks at.

class Recorder:
    """`attend` for `text_states`: causal attention that keeps sums of its weights, and hides what is to be hidden.

    first: the query that predicts the completion's first token, P - 1: those from here on are recorded.
    columns (T, n) bool: the groups of keys to sum over; none: nothing is kept. hidden (T,) bool: keys that no recorded
    query sees. heads (L, H): weights by which heads are summed at once, for a lower memory.
    """

    def __init__(self, first: int, columns: Tensor | None = None, hidden: Tensor | None = None,
                 heads: Tensor | None = None):
        self.first, self.columns, self.hidden, self.heads = first, columns, hidden, heads
        self.sums, self.entropies = defaultdict(list), defaultdict(list)  # layer -> its chunks
        self.numbers = {}  # layer -> its number among those with attention

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(H, T, d) and (H_kv, T, d) twice -> (T, H, d)."""
        layer = self.numbers.setdefault(layer, len(self.numbers))
        key, value = (x.repeat_interleave(len(query) // len(x), dim=0) for x in (key, value))
        # Nothing is hidden from the prompt. Four dimensions: of three the kernel would write down (H, P, P).
        prompt = [x[None, :, :self.first] for x in (query, key, value)]
        out = [nnf.scaled_dot_product_attention(*prompt, is_causal=True)[0]]
        wide = torch.promote_types(query.dtype, torch.float32)
        key, places = key.to(wide).mT / math.sqrt(query.shape[2]), torch.arange(key.shape[1], device=key.device)
        for chunk, rows in zip(query[:, self.first:].split(CHUNK, dim=1), places[self.first:].split(CHUNK)):
            unseen = places > rows[:, None]  # (64, T)
            if self.hidden is not None:
                unseen |= self.hidden
            weights = (chunk.to(wide) @ key).masked_fill_(unseen, -torch.inf).softmax(-1)  # (H, 64, T)
            out.append(weights.to(value.dtype) @ value)
            if self.columns is not None:
                self.keep(layer, weights)
        return torch.cat(out, dim=1).transpose(0, 1)

    def keep(self, layer: int, weights: Tensor) -> None:
        sums, seen = weights @ self.columns.to(weights.dtype), weights[:, :, self.columns.any(dim=1)]
        if self.heads is not None:
            sums = (self.heads[layer, :, None, None] * sums).sum(0, keepdim=True)
        self.sums[layer].append(sums)
        total = seen.sum(-1, keepdim=True).clamp(min=torch.finfo(seen.dtype).tiny)
        self.entropies[layer].append(torch.special.entr(seen / total).sum(-1))  # entr(p) = -p log p

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """The sums (L, H, C, n), with `heads` (L, 1, C, n), and the entropy over the keys of all columns (L, H, C)."""
        return tuple(torch.stack([torch.cat(chunks, dim=1) for chunks in kept.values()]).double().cpu().numpy()
                     for kept in (self.sums, self.entropies))


@torch.no_grad()
def forced_pass(sampler, example: Example, ids: Tensor, embeds: Tensor | None = None,
                **what) -> tuple[Tensor, Recorder]:
    """The log-probs (C,) of the completion `ids` (C,), nats, and a Recorder(**what) that has seen them computed.

    `embeds` (P, 1 + K, D) as `embed_prompts` returns them, where they are known already.
    """
    prompt = collate_prompts([example], sampler.device)
    embeds = embed_prompts(sampler, prompt) if embeds is None else embeds
    own = sampler.get_input_embeddings()(ids[:-1])  # the last token predicts nothing
    positions = (prompt.next_position + torch.arange(len(own), device=ids.device)).expand(3, -1)
    positions = torch.cat([prompt.position_ids, positions], dim=1)[:, None]  # (3, 1, T)
    what = {name: torch.as_tensor(value, device=sampler.device) for name, value in what.items()}
    recorder = Recorder(len(prompt.ids) - 1, **what)
    row = Packing(torch.tensor([positions.shape[2]], device=ids.device))
    hidden = text_states(sampler, append_text(embeds, own)[None], positions, recorder.attend,
                         lambda module, *inputs: deltanet.run_rows(module, row, *inputs)[0])[0, recorder.first:]
    logps, _ = token_logps(hidden, sampler.lm_head.weight, ids, banned_ids=vision_token_ids(sampler, ids.device))
    return logps.cpu(), recorder


# ----------------------------------------------------------------------------------------------------------------------
# What tokens are: where keys belong in the video, and what a completion's tokens say.

def key_groups(config, example: Example, num_keys: int) -> tuple[Tensor, tuple[int, int, int]]:
    """(T, 2F + 1) bool: the keys of the upper and the lower half of each time step, and last, of the image; and the
    grid of the video's tokens, (F, height, width), zeros without a video."""
    ids, grid = example.prompt_ids, example.video_grid_thw
    grid = [0, 0, 0] if grid is None else (grid[0] // torch.tensor([1, 2, 2])).tolist()
    columns = torch.zeros(num_keys, 2 * grid[0] + 1, dtype=torch.bool)
    # Video tokens come time step by time step, row by row: in one run or, of Qwen3-VL, in several.
    time, row, _ = torch.cartesian_prod(*map(torch.arange, grid)).T
    columns[(ids == config.video_token_id).nonzero()[:, 0], 2 * time + (2 * row >= grid[1])] = True
    columns[(ids == config.image_token_id).nonzero()[:, 0], -1] = True
    return columns, tuple(grid)


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds to those before it."""
    texts = [tokenizer.decode(ids[:i], skip_special_tokens=False) for i in range(len(ids) + 1)]
    return [after[len(before):] for before, after in zip(texts, texts[1:])]


def token_kinds(tokens: list[str], steps: tuple[str, ...]) -> tuple[dict[str, list[int]], list[tuple[int, int, int]]]:
    """Kind -> its tokens; and (token, index of the step that it names, 0 for the step's first word, else 1)."""
    text, ends = "".join(tokens), np.cumsum([len(token) for token in tokens])
    spans = [(end - len(token), end) for token, end in zip(tokens, ends.tolist())]
    begin = text.find("<think>") + len("<think>") if "<think>" in text else 0
    end = re.compile(r"</think>|<answer>|<\|\w+\|>|\Z").search(text, begin).start()
    blocks = [match.span(1) for match in ANSWER_BLOCK.finditer(text)]
    regions = {"reasoning": (begin, end), "answer": blocks[-1] if blocks else (0, 0)}
    kinds = {kind: [i for i, (b, e) in enumerate(spans) if b < e and begin <= (b + e - 1) / 2 < end]
             for kind, (begin, end) in regions.items()}
    named, place = [], begin
    blanked = text.replace("<think>", " " * len("<think>"))  # as `reasoning_clauses` reads it, all in its place
    for clause in reasoning_clauses(blanked[begin:end]):
        place = blanked.index(clause, place)
        for b, e, letter in [] if NOT_DONE.search(clause) else named_by_text(clause, steps):
            word_end = place + b + len(clause[b:e].split()[0])
            named += [(i, ord(letter) - ord("A"), int(spans[i][1] > word_end)) for i in kinds["reasoning"]
                      if spans[i][0] < place + e and spans[i][1] > place + b]
        place += len(clause)
    return kinds | {"step": sorted({i for i, *_ in named})}, sorted(named)


def shown_steps(args: Args) -> dict[str, list[str]]:
    """Question id -> the step that each time step of its video shows, where this is known: in the toy world, whose 8
    beats are the time steps of 16 frames."""
    text = (Path(args.data_root) / args.eval_file).read_text()
    if not (Path(args.data_root) / "pixels.sha256").is_file() or text.startswith("["):
        return {}
    import toy  # only here: whoever brings model and data never loads the toy world
    records = map(json.loads, text.splitlines())
    return {str(record["sample_id"]): toy.draw_visit(record)[2] for record in records if record.get("video_basename")}


# ----------------------------------------------------------------------------------------------------------------------
# What is measured of one question.

def diagonal(weights: np.ndarray, rows: list, columns: list) -> np.ndarray:
    """How far rows n look at columns n: weights (L, H, C, F), k lists of tokens and k of time steps -> (L, H).

    a_nm = mean over the tokens of row n of the sum over column m;  (1 / k) sum_n (a_nn / sum_m a_nm).
    Where all rows are alike, whatever they look at, that is sum_n a_n / sum_m a_m / k = 1 / k.
    """
    a = np.stack([np.stack([weights[:, :, n][..., m].sum(-1).mean(-1) for m in columns], -1) for n in rows], -2)
    a += 1e-12  # (L, H, k, k): who looks at none of them is at chance, too
    return (np.diagonal(a, axis1=-2, axis2=-1) / a.sum(-1)).mean(-1)


def measure(sampler, tokenizer, example: Example, ids: Tensor, shown: list[str], other: Example | None) -> dict:
    """All measures of one question and its completion `ids` (C,): arrays (L,), (L, H) and (L, F).

    shown: the step of each time step, [] if unknown. other: has a video of as many tokens, of other steps.
    `diagonal` is there where two steps are both named and shown; `hiding` has a pair of numbers for each such step.
    """
    steps, tokens = tuple(dict.fromkeys(example.question.progress)), token_texts(tokenizer, ids.tolist())
    kinds, named = token_kinds(tokens, steps)
    num_keys = len(example.prompt_ids) + len(ids) - 1
    columns, grid = key_groups(sampler.config, example, num_keys)
    embeds = embed_prompts(sampler, collate_prompts([example], sampler.device))
    logps, recorder = forced_pass(sampler, example, ids, embeds, columns=columns)
    sums, entropy = recorder.result()  # (L, H, C, 2F + 1), (L, H, C)
    halves = sums[..., :-1].reshape(*entropy.shape, grid[0], 2)  # (L, H, C, F, 2)
    counts = columns.sum(0).numpy()  # (2F + 1,): keys
    uniform = 1 / (recorder.first + 1 + np.arange(len(ids)))  # (C,): what a key gets where all seen get the same
    one = {"id": example.question.id, "video": str(example.question.video or ""), "grid": grid, "tokens": tokens,
           "token_kinds": kinds, "steps": steps, "named": named, "vision_tokens": int(counts.sum()), "kinds": {}}
    for kind, rows in kinds.items():
        if rows and counts.any():
            one["kinds"][kind] = {
                "tokens": len(rows), "vision": sums[:, :, rows].sum(-1).mean((1, 2)),
                "uniform_vision": counts.sum() * uniform[rows].mean(), "entropy": entropy[:, :, rows].mean((1, 2)),
                "frames": halves[:, :, rows].sum(-1).mean((1, 2)),
                "uniform_frames": counts[:-1].reshape(-1, 2).sum(1) * uniform[rows].mean()}
    if not shown or len(shown) != grid[0]:
        return one
    one["shown"] = [steps.index(step) for step in shown]
    frames = [[t for t, step in enumerate(one["shown"]) if step == i] for i in range(len(steps))]
    said = [i for i in range(len(steps)) if any(step == i for _, step, _ in named)]
    rows = [sorted({token for token, step, _ in named if step == i}) for i in said]
    places = [frames[i] for i in said]
    if len(said) > 1:
        one["chance"], one["diagonal"] = 1 / len(said), diagonal(halves.sum(-1), rows, places)
    if said and other is not None:  # its pixels in this prompt
        swapped = replace(example, pixel_values_videos=other.pixel_values_videos)
        without, recorder = forced_pass(sampler, swapped, ids, columns=columns)
        weights = recorder.result()[0][..., :-1].reshape(halves.shape).sum(-1)
        one["diagonal_other_video"] = diagonal(weights, rows, places)
        one["lost_other_video"] = np.mean([(logps - without)[tokens].mean().item() for tokens in rows])
    words = [[n for n, (_, _, word) in enumerate(named) if word == which] for which in (0, 1)]
    if all(words):  # (L, H, named, 2): upper and lower half of the time steps that show what is named
        own = np.stack([halves[:, :, token, frames[step]].sum(2) for token, step, _ in named], 2)
        one["place"] = diagonal(own, words, [[0], [1]])
    one["hiding"] = []
    for i, tokens in zip(said, rows):
        others = sorted(set(range(grid[0])) - set(frames[i]))
        if len(others) >= len(frames[i]):  # else there are not as many
            lost = []
            for times in (frames[i], random.Random(f"{one['id']}/{i}").sample(others, len(frames[i]))):
                hidden = columns[:, [2 * t + half for t in times for half in (0, 1)]].any(dim=1)
                without, _ = forced_pass(sampler, example, ids, embeds, hidden=hidden)
                lost.append((logps - without)[tokens].mean().item())
            one["hiding"].append(lost)
    return one


# ----------------------------------------------------------------------------------------------------------------------
# Over questions.

def interval(values, draws: int = 10_000) -> dict | None:
    """n, mean and the 95% percentile bootstrap interval of n numbers (Efron 1979); None of none."""
    values, n = np.asarray(values, float), len(values)
    if not n:
        return None
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws)  # how often each is drawn
    low, high = np.quantile(counts @ values / n, (0.025, 0.975))
    return {"n": n, "mean": float(values.mean()), "low": float(low), "high": float(high)}


def pick_heads(scores: np.ndarray) -> np.ndarray:
    """Scores (n, L, H) of n >= 2 questions -> weights of heads (2, L, H) for even and for odd questions, each chosen by
    the others: no question has a say in which heads it is measured by."""
    heads = []
    for half in (0, 1):
        mean = scores[1 - half::2].mean(0)
        best = mean >= np.sort(mean, axis=None)[-min(NUM_PICKED, mean.size)]
        heads.append(best / best.sum())
    return np.stack(heads)


def summarise_heads(found: list[dict], key: str) -> dict | None:
    """The measure `key`, "diagonal" or "place": by layer, by head, over all heads and over picked ones."""
    found = [one for one in found if key in one]
    if len(found) < 2:
        return None
    scores = np.stack([one[key] for one in found])  # (n, L, H)
    chance = np.array([one["chance"] if key == "diagonal" else 0.5 for one in found])
    heads = pick_heads(scores - chance[:, None, None])
    picked = np.array([(one[key] * heads[n % 2]).sum() for n, one in enumerate(found)])
    for n, one in enumerate(found):
        one["heads", key] = heads[n % 2]  # for `sample`
    return {"questions": len(found), "chance": float(np.mean(chance)), "layers": scores.mean((0, 2)).tolist(),
            "heads": scores.mean(0).tolist(), "all": interval(scores.mean((1, 2))), "picked": interval(picked),
            "picked_above_chance": interval(picked - chance),
            "other_video": interval([(one["diagonal_other_video"] * heads[n % 2]).sum() for n, one
                                     in enumerate(found) if key == "diagonal" and "diagonal_other_video" in one]),
            "picked_heads": [np.argwhere(weights).tolist() for weights in heads]}


def summarise(found: list[dict]) -> dict:
    """All of attention.json but samples, of one model."""
    lengths, table = [one["grid"][0] for one in found if one["grid"][0]], {"kinds": {}}
    time_steps = max(sorted(set(lengths)), key=lengths.count, default=0)  # the commonest: `frames` are of such videos
    for kind in KINDS:
        rows = [one["kinds"][kind] for one in found if kind in one["kinds"]]
        framed = [row for row in rows if len(row["uniform_frames"]) == time_steps > 0]
        if rows:
            of_kind = {"questions": len(rows), "tokens": sum(row["tokens"] for row in rows),
                       "vision_all_layers": interval([row["vision"].mean() for row in rows])}
            for key, some in (("vision", rows), ("uniform_vision", rows), ("entropy", rows), ("frames", framed),
                              ("uniform_frames", framed)):
                of_kind[key] = np.mean([row[key] for row in some], 0).tolist() if some else None
            table["kinds"][kind] = of_kind
    lost = np.array([np.mean(one["hiding"], 0) for one in found if one.get("hiding")])  # (n, 2)
    hiding = {key: interval(lost @ weights) for key, weights in (
        ("own", (1, 0)), ("others", (0, 1)), ("difference", (1, -1)))} if len(lost) else {}
    hiding["other_video"] = interval([one["lost_other_video"] for one in found if "lost_other_video" in one])
    return {"questions": len(found), "image_only": len(found) - len(lengths), "time_steps": time_steps,
            "time_steps_questions": lengths.count(time_steps), "max_entropy": math.log(max(
                [one["vision_tokens"] for one in found if one["vision_tokens"]], default=1)), **table,
            "diagonal": summarise_heads(found, "diagonal"), "place": summarise_heads(found, "place"),
            "hiding": hiding | {"steps": sum(len(one.get("hiding", ())) for one in found)}}


# ----------------------------------------------------------------------------------------------------------------------
# The run.

def answer(sampler, tokenizer, examples: list[Example], shown: dict[str, list[str]], args: Args) -> list[Tensor]:
    """The completion ids (C,) of each example: what the model says, greedily, or with --words true the teacher."""
    if not examples:
        return []
    if args.words == "own":
        ends, banned = end_token_ids(sampler, tokenizer, sampler.device), vision_token_ids(sampler, sampler.device)
        drawn = generate(sampler, collate_prompts(examples, sampler.device), 1, args.max_completion_length,
                         temperature=0.0, seeds=None, end_ids=ends, banned_ids=banned)
        runtime.require_finite("log-probs", drawn.logps, examples)
        return [ids[:length] for ids, length in zip(drawn.ids, drawn.lengths.tolist())]
    import toy
    texts = []
    for example in examples:
        beats, options = shown.get(example.question.id, []), dict(zip("ABCD", example.options))
        text = toy.teach(beats, options[example.gold], example.gold) if options else toy.say_seen(beats)
        texts.append(text.removeprefix(example.begun.strip()))  # what the prompt has begun is not said again
    return [torch.tensor(tokenizer(text + "<|im_end|>")["input_ids"], device=sampler.device) for text in texts]


def look(args: Args, questions: list[Question], shown: dict[str, list[str]], device: torch.device) -> dict:
    """All that attention.json says of the one model `args.model`."""
    tokenizer, family = runtime.load_tokenizer(args.model), runtime.load_family(args.model)
    dataset = VideoDataset(questions, tokenizer, family, args.pixel_settings(), args.seed, args.video)
    runtime.check_length(args, dataset, args.max_completion_length)
    print(f"{args.model}: {dataset.describe_prompt()}")
    sampler, pairs, places = runtime.load_sampler(args, device), [], range(len(questions))
    progress = tqdm(total=len(questions), desc=Path(args.model).name, dynamic_ncols=True)
    batches = [[(0, i) for i in places[n:n + args.batch_size]] for n in places[::args.batch_size]]
    for examples in make_loader(dataset, batches, args.num_workers):
        readable = [example for example in examples if not example.error]
        for n, (example, ids) in enumerate(zip(readable, answer(sampler, tokenizer, readable, shown, args))):
            # The next one in the batch with a video that is as long and shows none of its steps.
            steps = set(example.question.progress)
            other = next((e for e in readable[n + 1:] + readable[:n] if steps.isdisjoint(e.question.progress)
                          and str(e.video_grid_thw) == str(example.video_grid_thw)), None)
            one = measure(sampler, tokenizer, example, ids, shown.get(example.question.id, []), other)
            pairs.append((one, ids))
            progress.update()
        progress.update(len(examples) - len(readable))
    progress.close()
    if pairs and all(len(ids) < 2 for _, ids in pairs):
        raise ValueError(f"{args.model}: all {len(pairs)} answers are empty: there is no token to look at")
    if not any(one["kinds"] for one, _ in pairs):
        raise ValueError(f"{args.eval_file}: of {len(questions)} questions none could be read and has vision tokens; "
                         "`python data.py` says what cannot be read")
    table = {"model": args.model, "unreadable": len(questions) - len(pairs), **summarise([one for one, _ in pairs])}
    text, index = sampler.config.text_config, {question.id: i for i, question in enumerate(questions)}
    shape = deltanet.layer_kinds(text).count("full_attention"), text.num_attention_heads
    by = next((key for key in ("diagonal", "place") if table[key]), "all")
    picked = [one["heads", by] for one, _ in pairs if ("heads", by) in one] or [np.full(shape, 1 / math.prod(shape))]
    samples = [sample(sampler, dataset[0, index[one["id"]]], ids, one, one.get(("heads", by), np.mean(picked, 0)))
               for one, ids in [pair for pair in pairs if pair[0]["grid"][0]][:NUM_SAMPLES]]
    return table | {"samples_heads": by, "samples": samples}


def sample(sampler, example: Example, ids: Tensor, one: dict, heads: np.ndarray) -> dict:
    """What attention.json says of one question, by one more pass; `heads` (L, H) are the heads' weights."""
    video = (example.prompt_ids == sampler.config.video_token_id).nonzero()[:, 0]
    columns = nnf.one_hot(video, len(example.prompt_ids) + len(ids) - 1).T.bool()  # (T, vision tokens of the video)
    _, recorder = forced_pass(sampler, example, ids, columns=columns, heads=heads.astype(np.float32))
    places = recorder.result()[0].sum((0, 1)).reshape(-1, *one["grid"])  # (C, F, height, width)
    frames = places.sum((2, 3))
    # Where that would be long: the words of steps, or without such those of the reasoning that look most.
    few = one["token_kinds"]["step"] or sorted(one["token_kinds"]["reasoning"], key=lambda i: -frames[i].sum())
    placed = range(len(places)) if places.size <= MOST_PLACES else sorted(few[:MOST_PLACES // places[0].size])
    keys = ("id", "video", "tokens", "token_kinds", "steps", "named")
    return {**{key: one[key] for key in keys}, "shown": one.get("shown"), "frames": pack(frames),
            "placed": list(placed), "places": pack(places[list(placed)])}


def pack(values: np.ndarray) -> dict:
    """Numbers >= 0 as base64 of uint8, of which 255 is the largest: value = byte * scale."""
    scale = float(values.max(initial=0)) / 255 or 1.0
    data = base64.b64encode((values / scale).round().astype(np.uint8).tobytes()).decode()
    return {"shape": values.shape, "scale": scale, "data": data}


def main(args: Args) -> list[dict]:
    """Writes and prints all of it; returns a table per model."""
    _, world_size, device = runtime.setup()
    if world_size > 1:
        raise ValueError(f"{world_size} processes: this script is one; start it with python, not with torchrun")
    runs = [runtime.resolve(replace(args, model=model), device) for model in args.model]
    args = replace(runs[0], model=[run.model for run in runs])
    questions = load_questions(args.eval_file, args.data_root)[:args.num_questions][:args.max_questions or None]
    shown = shown_steps(args)
    if args.words == "true" and any(question.video and question.id not in shown for question in questions):
        raise ValueError("--words true: only the toy world has a teacher who knows what its videos show; take own")
    if args.question:
        asked = dict(text=args.question, options=(), gold="", answer="", negatives=(), response="")
        questions = [replace(question, **asked) for question in questions]
    for run in runs:
        runtime.load_tokenizer(run.model)  # before an earlier run is moved aside: a typo should touch nothing
    output_dir = open_folder(args)
    runtime.HERE.phase = "looking"
    tables = [look(run, questions, shown, device) for run in runs]
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    text = json.dumps({"settings": vars(args), "versions": versions, "models": tables})
    short = json.loads(text, parse_float=lambda number: float(f"{float(number):.5g}"))
    write_whole(output_dir / "attention.json", json.dumps(short) + "\n")
    from docs.attention_report import report  # only here, when the numbers are safe: it needs matplotlib
    report(output_dir)
    return tables


if __name__ == "__main__":
    runtime.launch(main, Args, TOY)
