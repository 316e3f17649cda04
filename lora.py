"""LoRA: the model stays as it is, and each linear map of its text layers learns a change of low rank.

    y = W x + b + (alpha / r) B A x        A: (r, in), B: (out, r), B = 0 at first

So that a model of 7B learns on one card: no masters, gradients and moments of its weights, only of A and B. Each rank
holds the whole model in the compute dtype once. Policy, sampler and reference are three module trees on these same
tensors, the reference one without adapters. A and B alone are float32 masters, sharded like the masters of a full run
(`shard` in runtime.py). Only the text layers have adapters; the vision tower, embedding and lm_head are frozen.

Source: LoRA, arXiv 2106.09685; A starts as in peft. On how its rate differs from that of all weights, and why all
linear maps have an adapter: Schulman et al., LoRA Without Regret (2025).
"""
import copy
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel


class LoRALinear(nn.Linear):
    """A linear map with its adapter. `lora_A` and `lora_B` may be None: then it is the map that it was."""

    def __init__(self, linear: nn.Linear, scale: float, lora_A: nn.Parameter | None, lora_B: nn.Parameter | None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale
        self.lora_A, self.lora_B = lora_A, lora_B

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.lora_A is None:
            return y
        h = F.linear(x, self.lora_A).flatten(0, -2)  # (tokens, r)
        # Product, scale and sum in one kernel: what an adapter costs a token that is sampled are launches of kernels.
        return torch.addmm(y.flatten(0, -2), h, self.lora_B.T, alpha=self.scale).view_as(y)

    def merged(self) -> Tensor:
        """W + (alpha / r) B A in the dtype of W. Of a change, what is below half a step of that dtype is lost."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return (self.weight + self.scale * self.lora_B.to(dtype) @ self.lora_A.to(dtype)).to(self.weight.dtype)


def adapted(module: nn.Module) -> dict[str, LoRALinear]:
    """name -> linear map with an adapter; empty without --lora_rank."""
    return {name: child for name, child in module.named_modules() if isinstance(child, LoRALinear)}


def add_adapters(qwen: PreTrainedModel, rank: int, alpha: float, dtype: torch.dtype, seed: int) -> None:
    """Freezes the model and gives an adapter to each linear map of its text layers: q, k, v, o, gate, up and down.

    With one seed they are the same on every rank: nobody has to send them around.
    """
    qwen.requires_grad_(False)
    layers, generator = qwen.model.language_model.layers, torch.Generator().manual_seed(seed)
    for name, linear in [(name, child) for name, child in layers.named_modules() if isinstance(child, nn.Linear)]:
        lora_A = nn.Parameter(torch.empty(rank, linear.in_features, dtype=dtype))
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5), generator=generator)
        lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=dtype))
        layers.set_submodule(name, LoRALinear(linear, alpha / rank, lora_A, lora_B))


def share(qwen: PreTrainedModel, adapters: bool) -> PreTrainedModel:
    """Another module tree on the same weights, for evaluation, with adapters of its own, not yet filled, or none."""
    tensors = {id(tensor): tensor for tensor in (*qwen.parameters(), *qwen.buffers())}
    other = copy.deepcopy(qwen, tensors).eval()  # what is in `tensors` is not copied
    for module in adapted(other).values():
        for name in ("lora_A", "lora_B"):
            shape = getattr(module, name).shape
            setattr(module, name, nn.Parameter(module.weight.new_empty(shape), False) if adapters else None)
    return other


def merge(qwen: PreTrainedModel, target: PreTrainedModel) -> None:
    """Writes the weights of the linear maps that have an adapter, merged, into a model that has none."""
    for name, linear in adapted(qwen).items():
        target.get_submodule(name).weight.copy_(linear.merged())


def save_adapters(adapters: dict[str, Tensor], args, folder: Path) -> None:
    """Writes name -> A or B as a folder that peft's `PeftModel.from_pretrained` reads."""
    # By their whole names: maps of the vision tower of Qwen2.5-VL are a gate_proj, up_proj and down_proj too.
    maps = sorted({name.rpartition(".")[0] for name in adapters})
    config = {"peft_type": "LORA", "task_type": None, "base_model_name_or_path": args.model, "bias": "none",
              "r": args.lora_rank, "lora_alpha": args.lora_alpha, "lora_dropout": 0.0, "target_modules": maps}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    file = folder / "adapter_model.safetensors"
    save_file({f"base_model.model.{name}.weight": tensor for name, tensor in adapters.items()}, file,
              metadata={"format": "pt"})
    file.chmod((folder / "adapter_config.json").stat().st_mode)  # safetensors are written for their owner alone
