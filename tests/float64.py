"""Float64 all the way through a model, which is what makes two ways of computing the same thing comparable to 1e-9.

    python tests/float64.py SCRIPT FLAGS ...      runs a script under it; the tests import `lift`

Hugging Face runs the norms and the vision tower's rotations in float32 whatever the weights are. Rounding there is
6e-8, and differs between a prompt's gradient summed over its rows before the norm's backward pass and after it. Float32
and bf16 models are computed as before.
"""
import inspect
import re
import runpy
import sys
import textwrap
from pathlib import Path

import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_vl import modeling_qwen3_vl


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(self, x):
    normed = wide(x) * torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * normed.to(x.dtype)


def rotate(q, k, cos, sin):
    cos, sin = wide(cos).unsqueeze(-2), wide(sin).unsqueeze(-2)
    return tuple((wide(x) * cos + modeling_qwen2_vl.rotate_half(wide(x)) * sin).to(x.dtype) for x in (q, k))


def widened(function, modeling):
    """The function as its source has it, but where that says float32, float64 if so are the weights."""
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    source = source[source.index("def "):]  # without decorators
    source = re.sub(r"([\w.]+)\.float\(\)", r"wide(\1)", source)
    if name := re.search(r"(\w+_dtype) = \w+\.dtype", source):
        source = source.replace("torch.float32", f"torch.promote_types({name[1]}, torch.float32)")
    found = {}
    exec(source, vars(modeling), found)
    return found[function.__name__]


def lift() -> None:
    for norm in (modeling_qwen2_vl.Qwen2VLRMSNorm, modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm,
                 modeling_qwen3_vl.Qwen3VLTextRMSNorm):
        norm.forward = rms_norm
    for modeling in (modeling_qwen2_vl, modeling_qwen2_5_vl, modeling_qwen3_vl, modeling_qwen3_5):
        modeling.apply_rotary_pos_emb_vision = rotate
    if hasattr(modeling_qwen3_5, "wide"):
        return  # lifted already: what is there now has no source to be read
    for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
        setattr(modeling_qwen3_5, name, widened(getattr(modeling_qwen3_5, name), modeling_qwen3_5))
    for module in (modeling_qwen3_5.Qwen3_5GatedDeltaNet, modeling_qwen3_5.Qwen3_5RMSNormGated,
                   modeling_qwen3_5.Qwen3_5RMSNorm):
        module.forward = widened(module.forward, modeling_qwen3_5)
    modeling_qwen3_5.wide = wide


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    lift()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
