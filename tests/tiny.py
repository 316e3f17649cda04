"""Tiny random models of each family, in folders as `save_pretrained` writes them, with the toy world's tokenizer.

Small, but not so small that a mistake would not show: the text model's heads are not hidden size / number of heads wide
where the family has a head_dim, windows of the vision tower are smaller than the grid, and what its layers add behind
text layers (deepstack) is added behind more than one.
"""
import copy
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

import toy

VISION = {
    "qwen2_vl": dict(depth=3, embed_dim=48, hidden_size=64, num_heads=3, mlp_ratio=2),
    # Windows of 56 pixels are 2 x 2 tokens; the middle layer sees all of a time step.
    "qwen2_5_vl": dict(depth=3, hidden_size=48, out_hidden_size=64, num_heads=3, intermediate_size=80, window_size=56,
                       fullatt_block_indexes=[1], tokens_per_second=2),
    "qwen3_vl": dict(depth=4, hidden_size=48, out_hidden_size=64, num_heads=3, intermediate_size=80,
                     num_position_embeddings=64, deepstack_visual_indexes=[0, 2]),
    "qwen3_5": dict(depth=3, hidden_size=48, out_hidden_size=64, num_heads=3, intermediate_size=80,
                    num_position_embeddings=64),
}
LIKE_QWEN3 = "qwen3_vl", "qwen3_5"  # tokens of 32 pixels and not of 28, timestamps, no system line
TEXT = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=4096)
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def write(folder: Path, model_type: str, tied: bool = True, seed: int = 0, opening: str = r"<think>\n") -> Path:
    """Writes the folder and returns it. Weights are normal with a deviation of 0.1, so that no logits are all alike.

    `opening`: with what the chat template of Qwen3.5 begins an answer, as that of its releases from 4B on.
    """
    tokenizer = AutoTokenizer.from_pretrained(toy.BASE)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{token}|>") for name, token in (
        ("image_token_id", "image_pad"), ("video_token_id", "video_pad"), ("vision_start_token_id", "vision_start"),
        ("vision_end_token_id", "vision_end"))}
    text = dict(TEXT, vocab_size=len(tokenizer), rope_parameters=dict(ROPE, mrope_section=[2, 3, 3]))
    text |= {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
             for name, token in (("bos", "<|endoftext|>"), ("eos", "<|im_end|>"), ("pad", "<|endoftext|>"))}
    if model_type == "qwen3_vl":
        text |= dict(head_dim=24, rope_parameters=dict(ROPE, mrope_section=[4, 4, 4], mrope_interleaved=True))
    if model_type == "qwen3_5":  # a quarter of each head is rotated: 8 of 32; the last layer of four has attention
        text |= dict(head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
                     linear_value_head_dim=12)
        text["rope_parameters"] = dict(ROPE, mrope_section=[2, 1, 1], mrope_interleaved=True,
                                       partial_rotary_factor=0.25)
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=copy.deepcopy(VISION[model_type]),
                                  tie_word_embeddings=tied, **ids)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    if model_type in LIKE_QWEN3:
        lines = tokenizer.chat_template.split("\n")
        tokenizer.chat_template = "\n".join(line for line in lines if "system" not in line)
    if model_type == "qwen3_5":
        header = r"<|im_start|>assistant\n"
        tokenizer.chat_template = tokenizer.chat_template.replace(header, header + opening)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_as_on_the_hub(folder: Path, num_layers: int = 2) -> Path:
    """A Qwen2-VL as it lies on the hub: weights in several files, and a config.json of transformers 4.41, in which the
    text model's fields stand at the top and the names of some are others."""
    write(folder, "qwen2_vl", tied=False)
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    config |= {name: text[name] for name in text if name not in ("dtype", "layer_types", "model_type", "use_cache")}
    config |= {"rope_theta": rope["rope_theta"], "num_hidden_layers": num_layers, "torch_dtype": "float32",
               "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
               "transformers_version": "4.41.2"}
    vision = config["vision_config"]
    config["vision_config"] = {name: vision[name] for name in ("depth", "embed_dim", "hidden_size", "mlp_ratio",
                                                                "num_heads", "patch_size", "spatial_merge_size",
                                                                "temporal_patch_size")} | {"in_chans": 3}
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    # Names as they were then: `model.layers` for the text model, `visual` beside it.
    renamed = {}
    for name, tensor in weights.items():
        name = name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")
        if not any(name.startswith(f"model.layers.{n}.") for n in range(num_layers, TEXT["num_hidden_layers"])):
            renamed[name] = tensor
    files = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(renamed))}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in renamed.items() if files[name] == file}, folder / file,
                  metadata={"format": "pt"})
    size = sum(tensor.nbytes for tensor in renamed.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {"total_size": size}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
