"""From prompts to log-probs: Qwen2-VL, Qwen2.5-VL, Qwen3-VL or Qwen3.5 under plain torch.

From top to bottom: a batch of prompts, the log-prob of a token, the policy (first the plain way, a row for each
completion), the same with each prompt in the sequence once, and the seam where attention is changed. Nothing of
training is here, and nothing of sampling, which is in sampler.py.

Letters: B prompts, N rows (completions), P prompt tokens, C completion tokens, V vocabulary, S vision patches, D hidden
size, H heads of size d (keys and values: H_kv). Packed, that is without padding: M tokens of all completions, T in all.
K is 0, or of Qwen3-VL the number of text layers behind which there is more to see (DeepStack, arXiv 2406.04334).
"""
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import deltanet
from data import FAMILIES, Example, normalise, patchify

# ----------------------------------------------------------------------------------------------------------------------
# A batch of prompts on the device.

@dataclass
class Prompts:
    """B prompts, one after the other, without padding."""
    ids: Tensor  # (tokens of all prompts,) int64
    lengths: Tensor  # (B,) int64
    position_ids: Tensor  # (3, tokens) int64: time, height, width of M-RoPE
    next_position: Tensor  # (B,) int64: the position of the first completion token, on all three axes
    pixel_values: Tensor  # (S, 1176) uint8 (Qwen3-VL: 1536): the patches of all prompts, in the order of their tokens
    grid_thw: Tensor  # (videos and images, 3) int64: patches in time, height and width


def collate_prompts(examples: list[Example], device: torch.device) -> Prompts:
    """Concatenates prompts and their patches (a prompt's video before its image, as in its text).

    Of no examples it makes a stand-in, a prompt of one token: every rank has to run the model as often as the others.
    """
    pixels = [(values, grid) for e in examples
              for values, grid in ((e.pixel_values_videos, e.video_grid_thw), (e.pixel_values, e.image_grid_thw))
              if values is not None]
    pixels = pixels or [(torch.zeros(0, 1176, dtype=torch.uint8), torch.zeros(0, 3, dtype=torch.int64))]
    prompt_ids = [e.prompt_ids for e in examples] or [torch.zeros(1, dtype=torch.int64)]
    position_ids = [e.position_ids for e in examples] or [torch.zeros(3, 1, dtype=torch.int64)]
    batch = Prompts(
        ids=torch.cat(prompt_ids),
        lengths=torch.tensor([len(ids) for ids in prompt_ids]),
        position_ids=torch.cat(position_ids, dim=1),
        # Not the length: Qwen2-VL's positions advance by 9 over a video of 648 tokens (its grid's largest side).
        next_position=torch.stack([positions.max() + 1 for positions in position_ids]),
        pixel_values=torch.cat([values for values, _ in pixels]),
        grid_thw=torch.cat([grid for _, grid in pixels]))
    return Prompts(**{name: tensor.to(device) for name, tensor in vars(batch).items()})


def embed_prompts(qwen: PreTrainedModel, prompts: Prompts) -> Tensor:
    """Token embeddings, those of vision tokens from the vision tower: (tokens of all prompts, 1 + K, D)."""
    family, patches, grid_thw = FAMILIES[qwen.config.model_type], prompts.pixel_values, prompts.grid_thw
    if not len(patches):  # The tower has to run on every rank: on a token's patches that no prompt has a place for.
        square = np.zeros((1, family.token_size, family.token_size, 3), np.uint8)
        patches, grid_thw = (x.to(prompts.ids.device) for x in patchify(square, family))
    # One pass for videos and images alike: to the tower an image is a video of one temporal patch.
    vision = qwen.model.visual(normalise(patches, family), grid_thw=grid_thw)
    vision = torch.stack([vision.pooler_output, *getattr(vision, "deepstack_features", [])], dim=1)  # (S / 4, 1 + K, D)
    is_vision = (prompts.ids == qwen.config.image_token_id) | (prompts.ids == qwen.config.video_token_id)
    text = qwen.get_input_embeddings()(prompts.ids)[:, None]
    embeds = F.pad(text, (0, 0, 0, vision.shape[1] - 1))  # zeros, which layers may add
    return embeds.masked_scatter(is_vision[:, None, None], vision.to(embeds.dtype))


def append_text(embeds: Tensor, text: Tensor) -> Tensor:
    """Embeddings (tokens, 1 + K, D) and behind them those of text, (M, D), to which no layer adds anything."""
    return torch.cat([embeds, F.pad(text[:, None], (0, 0, 0, embeds.shape[1] - 1))])


def end_token_ids(qwen: PreTrainedModel, tokenizer, device: torch.device) -> Tensor:
    """Tokens that end a completion: the turn's end, <|im_end|>, and whatever else the generation config names.

    This list is all that is ever taken from the generation config. Qwen2-VL ships top_k=1 in it: code that inherits its
    sampling options draws G identical completions and every advantage is 0.
    """
    ends = qwen.generation_config.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    return torch.tensor(sorted({tokenizer.convert_tokens_to_ids("<|im_end|>"), *ends}), device=device)


def vision_token_ids(qwen: PreTrainedModel, device: torch.device) -> Tensor:
    """Tokens that stand for pixels. A completion with one of them has no pixels for it and crashes the next forward."""
    config = qwen.config
    return torch.tensor([config.image_token_id, config.video_token_id, config.vision_start_token_id,
                         config.vision_end_token_id], device=device)


def mask_from_lengths(lengths: Tensor, num_columns: int) -> Tensor:
    """(rows,) lengths -> (rows, columns) bool. A completion's length includes its end token.

    Masks come from lengths, never from `ids != pad`: pad may be an end token.
    """
    return torch.arange(num_columns, device=lengths.device) < lengths[:, None]


# ----------------------------------------------------------------------------------------------------------------------
# The policy: log-probs of completions, and nothing else.

LOGITS_CHUNK = 512  # completion tokens whose (chunk, V) logits exist at one time: 512 x 152,064 float32 is 0.3 GB


def token_logps(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
                banned_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log softmax(weight @ hidden / temperature)[target] and the entropy of that distribution, chunk by chunk.

    The (M, V) logits never exist at once, neither forward nor backward (each chunk is recomputed there): V is 152,064,
    and one group of 8 x 512 tokens would take 2.5 GB in float32, several times over. Softmax runs in float32 at least:
    in bf16 the log-prob of a likely token is off by more than one update moves it.

    Args: hidden (M, D), the states that predict; weight (V, D) of lm_head; targets (M,) int64; `temperature` > 0 and
        `banned_ids` exactly as in sampling, or the trained policy is not the one that sampled.
    Returns: logps (M,) and entropy (M,), nats, float32 (float64 for float64 input); the entropy carries no gradient.
    """
    def one_chunk(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight)  # (chunk, V)
        # In place and under one name, because each tensor of this size takes 0.3 GB.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).div_(temperature)
        if banned_ids is not None:
            logits = logits.index_fill_(1, banned_ids, -torch.inf)
        logits = logits.log_softmax(-1)
        probs = logits.detach().exp()
        # ABLATE: entropy bonus. Detached as it is, `loss - c * entropy` teaches nothing: see docs/variants.md.
        entropy = torch.special.entr(probs, out=probs).sum(-1)  # entr(p) = -p log p, and 0 at p = 0
        return logits.gather(-1, targets[:, None])[:, 0], entropy

    chunks = [checkpoint(one_chunk, h, t, use_reentrant=False, preserve_rng_state=False)
              for h, t in zip(hidden.split(LOGITS_CHUNK), targets.split(LOGITS_CHUNK))]
    logps, entropy = zip(*chunks)
    return torch.cat(logps), torch.cat(entropy)


class Policy(nn.Module):
    """pi_theta: the FSDP root around a model. All that must run on gathered weights happens inside its one forward."""

    def __init__(self, qwen: PreTrainedModel, compute_dtype: torch.dtype, naive: bool = False):
        super().__init__()
        self.qwen, self.compute_dtype, self.naive = use_our_attention(qwen), compute_dtype, naive

    def forward(self, prompts: Prompts, row_prompt: Tensor, completion_ids: Tensor, completion_mask: Tensor,
                temperature: float = 1.0, banned_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log pi(o_t | q, o_<t) for every completion token, teacher-forced.

        Args: row_prompt (N,) int64, which prompt each row continues; completion_ids (N, C) int64, padded on the right;
            completion_mask (N, C) bool, True up to and including the end token; temperature and banned_ids as in
            `token_logps`.
        Returns: logps (N, C) and entropy (N, C), float32 (float64 for float64 weights), 0 where the mask is False.
        Collective under FSDP: every rank calls it equally often, a rank that has nothing to learn with no rows.
        """
        if len(row_prompt) == 0:  # a pass like any other, on a completion of one token, of which only the graph is left
            token = prompts.ids.new_zeros(1, 1)
            logps, entropy = self.forward(prompts, token[0], token, token == 0, temperature)
            none = logps.new_zeros(completion_ids.shape)  # (0, C)
            return none + logps[:0], none + entropy[:0]
        predictors = self.plain_states if self.naive else self.shared_states
        hidden = predictors(prompts, row_prompt, completion_ids, completion_mask)  # (M, D)
        targets = completion_ids[completion_mask]  # (M,)
        logps, entropy = token_logps(hidden, self.qwen.lm_head.weight, targets, temperature, banned_ids)
        zeros = torch.zeros(completion_mask.shape, dtype=logps.dtype, device=logps.device)
        return zeros.masked_scatter(completion_mask, logps), zeros.masked_scatter(completion_mask, entropy)

    def plain_states(self, prompts: Prompts, row_prompt: Tensor, completion_ids: Tensor,
                     completion_mask: Tensor) -> Tensor:
        """The states (M, D) that predict the completions' tokens, rows in their order, tokens in theirs.

        The plain way, for --naive and as the oracle: N sequences [q | o_n], padded on the right; vision runs once.
        """
        prompt_embeds = embed_prompts(self.qwen, prompts).split(prompts.lengths.tolist())
        prompt_positions = prompts.position_ids.split(prompts.lengths.tolist(), dim=1)
        embeds, position_ids = [], []
        for n, b in enumerate(row_prompt.tolist()):
            ids = completion_ids[n, completion_mask[n]]
            # Token t of a completion is at its prompt's next_position + t on all three axes.
            own_positions = prompts.next_position[b] + torch.arange(len(ids), device=ids.device)
            embeds.append(append_text(prompt_embeds[b], self.qwen.get_input_embeddings()(ids)))
            position_ids.append(torch.cat([prompt_positions[b], own_positions.expand(3, -1)], dim=1).T)
        embeds = pad_sequence(embeds, batch_first=True)  # (N, P + C, 1 + K, D)
        position_ids = pad_sequence(position_ids, batch_first=True).permute(2, 0, 1)  # (3, N, P + C)
        hidden = text_states(self.qwen, embeds, position_ids)  # (N, P + C, D)
        # The state at a column predicts the next token: prompt tokens get no logits and no gradient of their own.
        before = prompts.lengths[row_prompt] - 1
        return torch.cat([row[i:i + m] for row, i, m in zip(hidden, before.tolist(), completion_mask.sum(1).tolist())])

    def shared_states(self, prompts: Prompts, row_prompt: Tensor, completion_ids: Tensor,
                      completion_mask: Tensor) -> Tensor:
        """The same states, up to rounding, from one sequence with each prompt in it once."""
        shared = SharedPrompts(prompts.lengths, completion_mask.sum(1), row_prompt)
        offsets = torch.arange(completion_ids.shape[1], device=completion_ids.device)
        own_positions = (prompts.next_position[row_prompt, None] + offsets)[completion_mask].expand(3, -1)  # (3, M)
        own_embeds = self.qwen.get_input_embeddings()(completion_ids[completion_mask])  # (M, D)
        embeds = append_text(embed_prompts(self.qwen, prompts), own_embeds)[None]  # (1, T, 1 + K, D)
        position_ids = torch.cat([prompts.position_ids, own_positions], dim=1)[:, None]  # (3, 1, T)
        hidden = text_states(self.qwen, embeds, position_ids, shared.attend, partial(deltanet.continue_prompts, shared))
        return hidden[0].index_select(0, shared.predictors)


# ----------------------------------------------------------------------------------------------------------------------
# Shared prompts: the same log-probs, three times cheaper at P = 900, G = 8 and C = 256.

class SharedPrompts:
    """B prompts and the N completions that continue them as one sequence, [q_1 | .. | q_B | o_1 | .. | o_N], unpadded.

    Everything in the model but attention treats tokens one by one. So it runs on sum |q_b| + sum |o_n| tokens, 2,948
    and not the 9,248 of N (P + C). Attention is split in two: prompts see themselves, completions see their prompt and
    themselves. A completion starts at the position after its prompt, exactly as in a row of its own, so values and
    gradients are those of N separate rows (the prompt's gradient is their sum).
    """

    def __init__(self, prompt_lengths: Tensor, completion_lengths: Tensor, row_prompt: Tensor):
        self.prompts, self.completions = Packing(prompt_lengths), Packing(completion_lengths)
        self.row_prompt = row_prompt
        self.sizes = [len(self.prompts.slots), len(self.completions.slots)]
        (N, C), device = self.completions.mask.shape, row_prompt.device
        own = torch.ones(C, C, dtype=torch.bool, device=device).tril()
        seen = self.prompts.mask[row_prompt]  # (N, P)
        # (N, 1, C, P + C): True where a completion's token (row) sees one of its prompt or of its own (column)
        self.mask = torch.cat([seen[:, None].expand(-1, C, -1), own.expand(N, -1, -1)], dim=2)[:, None]
        # The state that predicts a token is the one before it: for a completion's first token, its prompt's last.
        before = torch.arange(self.sizes[1], device=device) + self.sizes[0] - 1
        first = self.completions.last + 1 - completion_lengths
        self.predictors = before.index_copy(0, first, self.prompts.last[row_prompt])  # (M,) packed indices

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Split attention over the packed sequence: (H, T, d) and (H_kv, T, d) twice -> (T, H, d)."""
        prompt_query, own_query = query.split(self.sizes, dim=1)
        prompt_key, own_key = key.split(self.sizes, dim=1)
        prompt_value, own_value = value.split(self.sizes, dim=1)
        prompt_out, prompt_key, prompt_value = attend_causally(self.prompts, prompt_query, prompt_key, prompt_value)
        own_query, own_key, own_value = (self.completions.pad(x) for x in (own_query, own_key, own_value))
        key = torch.cat([prompt_key.index_select(0, self.row_prompt), own_key], dim=2)  # (N, H_kv, P + C, d)
        value = torch.cat([prompt_value.index_select(0, self.row_prompt), own_value], dim=2)
        own_out = F.scaled_dot_product_attention(own_query, *repeat_heads(own_query, key, value), attn_mask=self.mask)
        return torch.cat([prompt_out, self.completions.pack(own_out)])


class Packing:
    """Rows of different lengths: packed, one after the other, for all layers; padded on the right, for attention."""

    def __init__(self, lengths: Tensor):
        """lengths (rows,) int64, each >= 1."""
        self.mask = mask_from_lengths(lengths, int(lengths.max()))  # (rows, columns) bool; CPU-GPU sync
        self.slots = self.mask.flatten().nonzero()[:, 0]  # (tokens,): where in the padded form each packed token is
        self.last = lengths.cumsum(0) - 1  # (rows,): where in the packed form each row's last token is

    def pad(self, packed: Tensor) -> Tensor:
        """(heads, tokens, d) -> (rows, heads, columns, d)"""
        heads, _, d = packed.shape
        padded = packed.new_zeros(heads, self.mask.numel(), d).index_copy(1, self.slots, packed)
        return padded.view(heads, *self.mask.shape, d).transpose(0, 1)

    def pack(self, padded: Tensor) -> Tensor:
        """(rows, heads, columns, d) -> (tokens, heads, d)"""
        return padded.transpose(1, 2).flatten(0, 1).index_select(0, self.slots)


def attend_causally(rows: Packing, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each token sees its row up to itself. Packed (heads, tokens, d) -> packed (tokens, H, d), padded key, value."""
    query, key, value = rows.pad(query), rows.pad(key), rows.pad(value)
    # Padding stands on the right, where no token looks, so the kernel needs no mask.
    out = F.scaled_dot_product_attention(query, *repeat_heads(query, key, value), is_causal=True)
    return rows.pack(out), key, value


def repeat_heads(query: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Grouped-query attention: gives keys or values (rows, H_kv, columns, d) as many heads as the query has."""
    # Not enable_gqa: with a mask it leaves the fast kernels (14 times slower on a CPU).
    return [x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in tensors]


# ----------------------------------------------------------------------------------------------------------------------
# The seam. Hugging Face's layers do all that is done token by token (projections, rotations, MLPs); which token sees
# which is decided by `attend(layer, query, key, value)`, the place to record or change attention. There are three:
# SharedPrompts.attend (learning), GroupCache.attend (a new token) and attend_causally (prompts, in both). Layers of
# Qwen3.5 that have no attention ask `delta`, all about which is in deltanet.py.

def text_states(qwen: PreTrainedModel, embeds: Tensor, position_ids: Tensor, attend=None, delta=None) -> Tensor:
    """The text model's last states (N, T, D) of N rows of T tokens, embeds (N, T, 1 + K, D) at position_ids (3, N, T).

    A token sees its row up to itself (padding stands on the right, so there is no mask). With `attend` N is 1, and it
    sees what that lets it: `attend(layer, query, key, value)` is called in each layer, with (H, T, d) and (H_kv, T, d)
    twice, rotated to their positions, and returns (T, H, d); `delta` is for Qwen3.5 what `attend` is (deltanet.py).
    RuntimeError where another implementation was set in the meantime: it would ignore `attend`.
    """
    found = qwen.model.language_model.config._attn_implementation
    if found != "shared_prompts":
        raise RuntimeError(f"the attention of this model was set to {found!r}, which does not know which rows share a "
                           "prompt; to record or change attention, write into `attend` (model.py)")
    embeds, *deepstack = embeds.unbind(2)
    # To text zeros are added: less to carry around than which tokens are vision.
    everywhere = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    extra = {"deepstack_visual_embeds": [x.flatten(0, 1) for x in deepstack],
             "visual_pos_masks": everywhere} if deepstack else {}
    return qwen.model.language_model(inputs_embeds=embeds, position_ids=position_ids, use_cache=False, attend=attend,
                                     delta=delta, **extra).last_hidden_state


def attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, attend=None, **kwargs):
    """What the text model's layers call: `attend`, if it was called with one, else Hugging Face's attention."""
    if kwargs.get("output_attentions") or module.config.output_attentions:
        raise RuntimeError("output_attentions: no weights are kept to be returned; record in `attend` (model.py)")
    if attend is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    return attend(module.layer_idx, query[0], key[0], value[0])[None], None


def use_our_attention(qwen: PreTrainedModel) -> PreTrainedModel:
    """Makes the text model's layers call `attention`; the vision tower keeps its own."""
    ALL_ATTENTION_FUNCTIONS.register("shared_prompts", attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("shared_prompts", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    qwen.model.language_model.config._attn_implementation = "shared_prompts"
    deltanet.add_seam(qwen)
    return qwen
