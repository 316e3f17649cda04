"""Qwen3.5, and what concerns no other family: three of four text layers have no keys and values but a state.

    S <- exp(g) S                       S (d_k, d_v), of each head: what is remembered decays, g <= 0
    S <- S + beta k (v - S^T k)^T       what it holds for the key k is replaced by the value v, to a share of beta
    o  = S^T q                          what it holds for the query q is read

Source: Gated DeltaNet, arXiv 2412.06464. The rule itself is transformers', for many tokens in chunks, and for one. q, k
and v come from a convolution over a token and the three before it. So S and three inputs of the convolution are all
that a layer knows of the past, however long that is: a prompt is run once, and its completions begin with its state.
But a state has no mask. Rows packed into one sequence would leak into each other, so they run apart, padded on the
right, where a token that is none neither decays nor writes anything: its g and beta are 0.

Letters: as in model.py; H heads of S, c channels of the convolution: q, k and v of all heads.
"""
import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen3_5

# Before a file is read: the library's own means to leave `float32_weights` in it as they are.
qwen3_5.Qwen3_5PreTrainedModel._keep_in_fp32_modules_strict = {"A_log", "dt_bias", "linear_attn.norm"}


def layer_kinds(config) -> list[str]:
    """Of each text layer: "linear_attention", as here, or "full_attention", as are all layers of other families."""
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


class GatedDeltaNet(qwen3_5.Qwen3_5GatedDeltaNet):
    """The layer with a seam: `delta(layer, qkv, g, beta)` decides what is remembered, as `attend` does what is seen.

    It gets qkv (T, c), before the convolution, g (T, H), at least float32, and beta (T, H); it returns what is read,
    (T, H, d_v).
    """

    def forward(self, hidden_states: Tensor, attend=None, delta=None, **kwargs) -> Tensor:
        if attend is None:  # rows, padded on the right
            return super().forward(hidden_states, **kwargs)
        if delta is None:
            raise RuntimeError("`attend` without `delta`: layers without attention would take all tokens for one row; "
                               "give text_states both")
        x = hidden_states[0]
        g = -wide(self.A_log).exp() * F.softplus(wide(self.in_proj_a(x)) + self.dt_bias)
        out = delta(self, self.in_proj_qkv(x), g, self.in_proj_b(x).sigmoid())
        return self.out_proj(self.norm(out, self.in_proj_z(x).view_as(out)).flatten(1)[None])


def add_seam(qwen: PreTrainedModel) -> None:
    """Gives these layers their seam, and `float32_weights` their dtype; other families are left alone."""
    for layer in qwen.modules():
        if type(layer) is qwen3_5.Qwen3_5GatedDeltaNet:
            layer.__class__ = GatedDeltaNet
            for weight in float32_weights(layer):
                weight.data = wide(weight.data)


def float32_weights(module: nn.Module) -> set[nn.Parameter]:
    """Those that releases have in float32. In bf16 they would move a tiny model's log-probs by 0.003 to 0.06 nats."""
    return {weight for layer in module.modules() if isinstance(layer, GatedDeltaNet)
            for weight in (layer.A_log, layer.dt_bias, layer.norm.weight)}


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def run_rows(layer, rows, qkv: Tensor, g: Tensor, beta: Tensor, inputs: Tensor | None = None,
             S: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Runs the rows of a Packing from what they remember, None: nothing. Returns what is read, (tokens, H, d_v), and
    what they remember at their ends: inputs of the convolution (rows, 3, c), S (rows, H, d_k, d_v) at least float32."""
    qkv, g, beta = (rows.pad(x[None])[:, 0] for x in (qkv, g, beta))  # (rows, columns, ...), 0 behind the end
    before = layer.conv_kernel_size - 1
    qkv = F.pad(qkv, (0, 0, before, 0)) if inputs is None else torch.cat([inputs, qkv], dim=1)
    out, S = apply_rule(qwen3_5.torch_chunk_gated_delta_rule, layer, qkv, g, beta, S)
    last = rows.mask.sum(1)[:, None] + torch.arange(before, device=qkv.device)  # (rows, 3)
    return rows.pack(out.transpose(1, 2)), qkv.take_along_dim(last[:, :, None], dim=1), S


def apply_rule(rule, layer, qkv: Tensor, g: Tensor, beta: Tensor, S: Tensor | None) -> tuple[Tensor, Tensor]:
    """qkv (rows, 3 + columns, c), g and beta (rows, columns, H), S -> what is read (rows, columns, H, d_v), and S."""
    if not qkv.is_cuda or qkv.dtype not in (torch.bfloat16, torch.float16):
        # Behind the rule's name are the kernels of flash-linear-attention, if that is installed. They refuse float32.
        rule = inspect.unwrap(rule)
        if not inspect.isfunction(rule):
            raise RuntimeError("the package `kernels` hides the rule in plain torch: export USE_HUB_KERNELS=NO")
    qkv = F.silu(F.conv1d(qkv.mT, layer.conv1d.weight, groups=qkv.shape[2])).mT
    qkv = qkv.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=-1)
    *qk, value = (x.unflatten(2, (-1, d)) for x, d in zip(qkv, (layer.head_k_dim, layer.head_k_dim, layer.head_v_dim)))
    query, key = (x.repeat_interleave(value.shape[2] // x.shape[2], dim=2) for x in qk)  # grouped, as in attention
    return rule(query, key, value, g=g, beta=beta, initial_state=S, output_final_state=True,
                use_qk_l2norm_in_kernel=True)


def continue_prompts(shared, layer, *inputs: Tensor) -> Tensor:
    """`delta` of learning, over the sequence of SharedPrompts: completions go on from their prompt's state."""
    of_prompts, own = zip(*(x.split(shared.sizes) for x in inputs))
    prompt_out, *memory = run_rows(layer, shared.prompts, *of_prompts)
    own_out, *_ = run_rows(layer, shared.completions, *own, *(x.index_select(0, shared.row_prompt) for x in memory))
    return torch.cat([prompt_out, own_out])


class RowStates:
    """What a layer remembers of R rows that are sampled. S in bf16, rounded at each token, would be several times as
    far from what the learner computes."""

    def __init__(self, config, B: int, P: int, R: int, C: int, dtype: torch.dtype, device: torch.device):
        H, d_k, d_v = config.linear_num_value_heads, config.linear_key_head_dim, config.linear_value_head_dim
        c = 2 * config.linear_num_key_heads * d_k + H * d_v
        self.inputs = torch.zeros(R, config.linear_conv_kernel_dim - 1, c, dtype=dtype, device=device)
        self.S = wide(torch.zeros(R, H, d_k, d_v, dtype=dtype, device=device))

    def prefill(self, rows, group_size: int, layer, *inputs: Tensor) -> Tensor:
        """`delta` of prompts, each of which `group_size` rows go on from."""
        out, *memory = run_rows(layer, rows, *inputs)
        self.write(*(x.repeat_interleave(group_size, dim=0) for x in memory))
        return out

    def feed(self, layer, qkv: Tensor, g: Tensor, beta: Tensor) -> Tensor:
        """`delta` of one new token of each row."""
        qkv, rule = torch.cat([self.inputs, qkv[:, None]], dim=1), qwen3_5.torch_recurrent_gated_delta_rule
        out, S = apply_rule(rule, layer, qkv, g[:, None], beta[:, None], self.S)
        self.write(qkv[:, 1:], S)
        return out[:, 0]

    def write(self, inputs: Tensor, S: Tensor) -> None:
        self.inputs.copy_(inputs)  # in place, for the CUDA graph
        self.S.copy_(S)

    def keep(self, rows: Tensor, groups: Tensor) -> None:
        self.inputs, self.S = self.inputs[rows], self.S[rows]
