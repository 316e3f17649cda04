"""Float64 all the way through a model, which is what makes two ways of computing the same thing comparable to 1e-9.

    python tests/float64.py SCRIPT FLAGS ...      runs a script under it; the tests import `lift`

Hugging Face runs the norms and the vision tower's rotations in float32 whatever the weights are. Rounding there is
6e-8, and differs between a prompt's gradient summed over its rows before the norm's backward pass and after it. Float32
and bf16 models are computed as before.
"""
import runpy
import sys
from pathlib import Path

import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl


def wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(self, x):
    normed = wide(x) * torch.rsqrt(wide(x).pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * normed.to(x.dtype)


def rotate(q, k, cos, sin):
    cos, sin = wide(cos).unsqueeze(-2), wide(sin).unsqueeze(-2)
    return tuple((wide(x) * cos + modeling_qwen2_vl.rotate_half(wide(x)) * sin).to(x.dtype) for x in (q, k))


def lift() -> None:
    for norm in (modeling_qwen2_vl.Qwen2VLRMSNorm, modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm,
                 modeling_qwen3_vl.Qwen3VLTextRMSNorm):
        norm.forward = rms_norm
    for modeling in (modeling_qwen2_vl, modeling_qwen2_5_vl, modeling_qwen3_vl):
        modeling.apply_rotary_pos_emb_vision = rotate


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    lift()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
