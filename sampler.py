"""From prompts to completions: all rows of several groups decoded together, one token at a time.

`generate` is the seam where another engine goes: whatever returns `Completions` for the same arguments will do, if
    - it samples from softmax(logits / temperature) without the banned tokens, and from nothing narrower (no top-k, no
      top-p): the policy that is trained must be the one that sampled;
    - the end token is a part of the completion;
    - it touches no collective: ranks decode different lengths, and one that waited for another would wait forever;
    - completions stand at the positions from `prompts.next_position` on, which transformers 5 counts otherwise for long
      videos (`rope_positions` in data.py); it gets ids and patches, not frames;
    - its weights are renewed before the next rollout (`make_sampler` and `copy_weights` in runtime.py).
Its log-probs are only compared with the learner's (`sampler_gap`); the loss never reads them.

What makes it cheap (docs/performance.md): a prompt is encoded once for its G rows (`prefill`), its keys and values are
read once for them (`attend`), rows that have ended leave (`drop`), and a GPU waits for the CPU every sixteenth token.

Letters: B prompts, G completions per prompt, N = B * G rows, of which R are still decoded, P prompt tokens, C
completion tokens, V vocabulary, D hidden size, H heads of size d (keys and values: H_kv).
"""
import math
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import deltanet
from data import Example
from model import Packing, Prompts, attend_causally, embed_prompts, mask_from_lengths, text_states


class Completions(NamedTuple):
    """N = B * G rows: row b * G + g is completion g of prompt b."""
    ids: Tensor  # (N, C) int64, 0 behind the end
    lengths: Tensor  # (N,) int64, the end token included
    ended: Tensor  # (N,) bool; False: cut off at the most tokens allowed
    logps: Tensor  # (N, C), at least float32, of the drawn tokens, under temperature and ban; any value behind the end


@torch.no_grad()
def generate(sampler, prompts: Prompts, group_size: int, max_completion_length: int, temperature: float,
             seeds: list[int] | None, end_ids: Tensor, banned_ids: Tensor, caches: dict | None = None) -> Completions:
    """G completions for each of B prompts.

    Args: sampler, an unsharded model; temperature, 0 takes the likeliest token (and log-probs are those of
        temperature 1); seeds, one per prompt, so that what a prompt's group draws depends neither on its neighbours in
        the batch nor on the rank (None when greedy); end_ids, tokens that end a completion; banned_ids, tokens that are
        never drawn; caches, where those of `CapturedCache` stay from call to call, empty at first (None: none are kept,
        no CUDA graph).
    """
    B, G, C, device = len(prompts.lengths), group_size, max_completion_length, prompts.ids.device
    ids = torch.zeros(B * G, C, dtype=torch.int64, device=device)
    logps = torch.zeros(B * G, C, dtype=torch.promote_types(sampler.dtype, torch.float32), device=device)
    ended = torch.zeros(B * G, dtype=torch.bool, device=device)
    if temperature > 0:
        # All randomness of the rollout, drawn at once and on the CPU: the same on every device; in (0, 1].
        uniforms = 1 - torch.cat([torch.rand(G, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
                                  for seed in seeds]).to(device)  # (N, C)
    cache = open_cache(sampler, prompts, G, C, caches)
    hidden = cache.prefill(prompts)  # (N, D): the last state of each row
    rows = torch.arange(B * G, device=device)  # (R,): those that are still decoded
    for t in range(C):
        # In place, because at V = 152,064 each copy of the logits counts.
        logits = sampler.lm_head(hidden).to(logps.dtype).div_(temperature or 1.0).index_fill_(1, banned_ids, -torch.inf)
        # ABLATE: top-k or top-p would sample from another policy than the one whose log-probs are trained.
        probs = logits.softmax(-1)  # (R, V)
        token = draw(probs, uniforms[rows, t]) if temperature > 0 else logits.argmax(-1)  # (R,)
        ids[rows, t], logps[rows, t] = token, probs.gather(1, token[:, None])[:, 0].log()
        ended[rows] |= torch.isin(token, end_ids)
        if t + 1 == C:
            break
        if device.type == "cpu" or (t + 1) % 16 == 0:  # looking at `ended` is a CPU-GPU sync: on a GPU, every 16 tokens
            if ended.all():
                break
            kept = cache.drop(ended[rows])
            rows, token = rows[kept], token[kept]
        hidden = cache.feed(token)
    # Rows that have ended may have stayed in the batch and drawn on: what counts is their first end token.
    lengths = torch.where(ended, torch.isin(ids, end_ids).int().argmax(dim=1) + 1, C)
    return Completions(ids.masked_fill(~mask_from_lengths(lengths, C), 0), lengths, ended, logps)


def draw(probs: Tensor, u: Tensor, size: int = 128) -> Tensor:
    """One token of each row: probs (R, V), u (R,) float64 uniform in (0, 1] -> (R,) int64."""
    # The first token at which the cumulated probability reaches u: never one of probability 0, and without
    # torch.multinomial's CPU-GPU sync. First the block of tokens, then the token in it: so few numbers have to be
    # float64, without which tokens below 1e-7 would be drawn too seldom.
    padding = -probs.shape[1] % size  # none for the vocabularies of 2B and 7B; padding by 0 would copy
    blocks = (F.pad(probs, (0, padding)) if padding else probs).unflatten(1, (-1, size))  # (R, V / size, size)
    block_ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)  # (R, V / size)
    goal = u[:, None] * block_ends[:, -1:]
    block = torch.searchsorted(block_ends, goal).clamp_(max=blocks.shape[1] - 1)  # (R, 1); NaN is above all of them
    start, end = (ends.gather(1, block) for ends in (F.pad(block_ends, (1, 0)), block_ends))
    token_ends = blocks.gather(1, block[:, :, None].expand(-1, -1, size))[:, 0].cumsum(-1, dtype=torch.float64)
    share = (goal - start) / (end - start)  # of the block's probability: in (0, 1]
    token = torch.searchsorted(token_ends, share * token_ends[:, -1:]).clamp_(max=size - 1)
    return (block * size + token)[:, 0].clamp_(max=probs.shape[1] - 1)


def answer_texts(tokenizer, examples: list[Example], ids: Tensor, lengths: Tensor, ended: Tensor) -> list[str]:
    """N answers, G for each example: what its prompt has begun, and a completion of `ids` (N, C) without its end token.
    Other special tokens stay visible: they are mistakes."""
    owners = [example for example in examples for _ in range(len(ids) // len(examples))]
    return [example.begun + tokenizer.decode(row[:length - end].tolist(), skip_special_tokens=False)
            for example, row, length, end in zip(owners, ids, lengths.tolist(), ended.tolist())]


# ----------------------------------------------------------------------------------------------------------------------
# The cache: of each layer a prompt's keys and values once for the rows of its group, a completion's row by row.

class KeysAndValues:
    """Those of a layer: of B prompts, and of the R rows that continue them, in tensors of full size from the start."""

    def __init__(self, config, B: int, P: int, R: int, C: int, dtype: torch.dtype, device: torch.device):
        heads = config.num_key_value_heads
        d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # Zeros, not empty: a column that nobody has written has weight 0, and 0 * NaN is NaN.
        zeros = partial(torch.zeros, dtype=dtype, device=device)
        self.prompt_keys, self.prompt_values = zeros(B, heads, P, d), zeros(B, heads, P, d)
        self.own_keys, self.own_values = zeros(R, heads, C, d), zeros(R, heads, C, d)

    def keep(self, rows: Tensor, groups: Tensor) -> None:
        self.own_keys, self.own_values = self.own_keys[rows], self.own_values[rows]
        self.prompt_keys, self.prompt_values = self.prompt_keys[groups], self.prompt_values[groups]


class GroupCache:
    """What each layer keeps of B prompts and of G rows that continue each: keys and values, or of Qwen3.5 a state."""

    def __init__(self, sampler, B: int, P: int, G: int, C: int, device: torch.device):
        self.sampler, self.B, self.G = sampler, B, G  # both shrink when rows leave
        config = sampler.config.text_config
        self.column = torch.zeros(1, dtype=torch.int64, device=device)  # of a completion, where the next token goes
        self.columns = torch.arange(C, device=device)
        self.width = 0  # how many columns are read: those in use, or in a graph, which has one shape, all
        self.first_position = torch.zeros(B * G, dtype=torch.int64, device=device)
        self.prompt_mask = torch.zeros(B, P, dtype=torch.bool, device=device)
        kinds = {"full_attention": KeysAndValues, "linear_attention": deltanet.RowStates}
        self.layers = [kinds[kind](config, B, P, B * G, C, sampler.dtype, device)
                       for kind in deltanet.layer_kinds(config)]

    def prefill(self, prompts: Prompts) -> Tensor:
        """Encodes each prompt once; returns its last state for each of its G rows, (N, D)."""
        self.prompt_mask.copy_(mask_from_lengths(prompts.lengths, self.prompt_mask.shape[1]))
        self.first_position.copy_(prompts.next_position.repeat_interleave(self.G))
        self.column.zero_()
        self.width = 0
        packing = Packing(prompts.lengths)

        def attend_and_keep(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            out, key, value = attend_causally(packing, query, key, value)
            self.layers[layer].prompt_keys[:, :, :key.shape[2]] = key
            self.layers[layer].prompt_values[:, :, :key.shape[2]] = value
            return out

        embeds, position_ids = embed_prompts(self.sampler, prompts), prompts.position_ids
        hidden = text_states(self.sampler, embeds[None], position_ids[:, None], attend_and_keep,
                             lambda module, *x: self.layers[module.layer_idx].prefill(packing, self.G, module, *x))
        return hidden[0, packing.last].repeat_interleave(self.G, dim=0)

    def feed(self, token: Tensor) -> Tensor:
        """Appends a token (R,) to each row; returns the states (R, D) that predict the next. Waits for no value."""
        self.width = min(self.width + 1, len(self.columns))
        own = (self.columns[:self.width] <= self.column).expand(self.B, -1)  # (B, W); False in a graph alone
        unseen = ~torch.cat([self.prompt_mask, own], dim=1)[:, None, None]  # (B, 1, 1, P + W) bool
        positions = (self.first_position + self.column).expand(3, 1, -1)
        embeds = self.sampler.get_input_embeddings()(token)[None, :, None]  # (1, R, 1, D)
        hidden = text_states(self.sampler, embeds, positions, partial(self.attend, unseen=unseen),
                             lambda module, *x: self.layers[module.layer_idx].feed(module, *x))
        self.column += 1
        return hidden[0]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, unseen: Tensor) -> Tensor:
        """Each row's new token sees its prompt and its own completion: (H, R, d), (H_kv, R, d) twice -> (R, H, d)."""
        cache, (heads, R, d) = self.layers[layer], key.shape
        cache.own_keys.index_copy_(2, self.column, key.transpose(0, 1)[:, :, None])  # (R, H_kv, C, d)
        cache.own_values.index_copy_(2, self.column, value.transpose(0, 1)[:, :, None])
        query = query.view(heads, -1, R, d).permute(2, 0, 1, 3) / math.sqrt(d)  # (R, H_kv, H / H_kv, d)
        # To its prompt's keys the G rows of a group are so many queries of one matrix product: the keys are read once,
        # not G times. (In bf16 the scores are rounded, which fused kernels avoid; sampler_gap shows what that comes
        # to.)
        prompt_scores = self.rows_to_groups(query) @ cache.prompt_keys.mT  # (B, H_kv, G * H / H_kv, P)
        own_scores = self.rows_to_groups(query @ cache.own_keys[:, :, :self.width].mT)  # (.., W)
        probs = torch.cat([prompt_scores, own_scores], dim=-1).masked_fill_(unseen, -torch.inf).softmax(-1)
        prompt_probs, own_probs = probs.tensor_split([self.prompt_mask.shape[1]], dim=-1)
        out = (self.groups_to_rows(prompt_probs @ cache.prompt_values)
               + self.groups_to_rows(own_probs) @ cache.own_values[:, :, :self.width])  # (R, H_kv, H / H_kv, d)
        return out.flatten(1, 2)

    def rows_to_groups(self, x: Tensor) -> Tensor:
        """(R, H_kv, H / H_kv, ...) -> (B, H_kv, G * H / H_kv, ...)"""
        return x.unflatten(0, (self.B, self.G)).transpose(1, 2).flatten(2, 3)

    def groups_to_rows(self, x: Tensor) -> Tensor:
        """(B, H_kv, G * H / H_kv, ...) -> (R, H_kv, H / H_kv, ...)"""
        return x.unflatten(2, (self.G, -1)).transpose(1, 2).flatten(0, 1)

    def drop(self, ended: Tensor) -> Tensor | slice:
        """Rows that have ended leave, `ended` (R,) bool; returns which of the R stay, in their order. CPU-GPU sync.

        All groups keep as many rows as the one with the most that go on; the others are filled up with rows that have
        ended, whose further tokens nobody reads.
        """
        goes_on = ~ended.view(self.B, self.G)
        groups, G = goes_on.any(dim=1).nonzero()[:, 0], int(goes_on.sum(dim=1).max())  # groups (B,): those that stay
        too_few = ended.sum() < len(ended) / 4  # are not worth the copying
        if too_few or len(groups) * G == len(ended):
            return slice(None)
        order = goes_on[groups].int().argsort(dim=1, descending=True)[:, :G]  # (B, G)
        kept = (groups[:, None] * self.G + order).flatten()  # (R,)
        for cache in self.layers:  # one at a time, so that old and new are never there together
            cache.keep(kept, groups)
        self.first_position, self.prompt_mask = self.first_position[kept], self.prompt_mask[groups]
        self.B, self.G = len(groups), G
        return kept


# ----------------------------------------------------------------------------------------------------------------------
# For GPUs, and for nobody who reads the above: a token's kernels recorded once and launched together.

def open_cache(sampler, prompts: Prompts, G: int, C: int, caches: dict | None) -> GroupCache:
    """A cache for these prompts: a new one, or the one of this shape in `caches`."""
    B, P, device = len(prompts.lengths), int(prompts.lengths.max()), prompts.ids.device
    if caches is None:
        return GroupCache(sampler, B, P, G, C, device)
    P = math.ceil(P / 64) * 64  # a few shapes, and so a few graphs, serve all prompts
    shape = (B, P, G, C)
    if shape not in caches:
        caches[shape] = CapturedCache(sampler, *shape, device)
    return caches[shape]


class CapturedCache(GroupCache):
    """Replays `feed` as one CUDA graph: one launch for all layers, not hundreds. NEVER RUN: no GPU at hand."""

    graph = None

    def prefill(self, prompts: Prompts) -> Tensor:
        if self.graph is None:
            self.capture()
        hidden = super().prefill(prompts)
        self.width = len(self.columns)
        return hidden

    def drop(self, ended: Tensor) -> slice:
        return slice(None)  # the graph works on the tensors that it has recorded: all rows stay where they are

    def feed(self, token: Tensor) -> Tensor:
        self.token.copy_(token)
        self.graph.replay()
        return self.hidden

    def capture(self) -> None:
        # As the documentation of torch.cuda.graph asks: warm up on another stream first. `prefill` overwrites what it
        # leaves.
        self.token, self.width, side = torch.zeros_like(self.first_position), len(self.columns), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            super().feed(self.token)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.hidden = super().feed(self.token)
