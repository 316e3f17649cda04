"""One GRPO step of TRL's GRPOTrainer and one of ours, in turn, in one process: B5 of bench.py, which runs this script
in an environment that has trl and torchvision beside this project's packages.

Both train the toy world's base in float32: B prompts of nine images (729 of about 900 tokens: TRL takes no video), G
completions of exactly C tokens, one update, no KL, no vLLM. A step is sampling, rewards (made up), log-probs, backward,
AdamW.

gpu.py runs it for a larger shape, `bench_trl.py ROUNDS 2B TRL` and `bench_trl.py ROUNDS 2B ours`: random float32
weights, bf16 autocast on TRL's side, layers recomputed in the backward pass on both, each side in a process of its own,
because two models with their optimizers do not fit one GPU.
"""
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import datasets
import numpy as np
import torch
import transformers
import trl
from PIL import Image
from transformers import (
    AutoTokenizer,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    TrainerCallback,
)

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
import runtime  # noqa: E402
import toy  # noqa: E402
from bench import count, table_row  # noqa: E402
from data import FAMILIES, Example, patchify, rope_positions  # noqa: E402
from grpo_video import Args, group_advantages, grpo_token_loss, token_weights  # noqa: E402
from model import collate_prompts, vision_token_ids  # noqa: E402
from runtime import clock, copy_weights, load_policy, make_sampler, setup  # noqa: E402
from sampler import generate  # noqa: E402

B, G, C, LEARNING_RATE = 2, 8, 64, 1e-6
REWARDS = torch.arange(B * G) % 2  # half of each group is right


class Interleave(TrainerCallback):
    """After each of TRL's steps, one of ours."""

    def __init__(self):
        self.step, self.seconds = None, {"TRL": [], "ours": []}

    def on_step_begin(self, *args, **kwargs):
        self.start = clock()

    def on_step_end(self, *args, **kwargs):
        self.seconds["TRL"].append(clock() - self.start)
        if self.step:
            self.take_ours()

    def take_ours(self):
        start = clock()
        self.step()
        self.seconds["ours"].append(clock() - start)


def make_qwen(shape: str, dtype: torch.dtype):
    """The toy base as Hugging Face loads it, or random weights in another shape, with Hugging Face's attention."""
    if shape == "toy":
        return Qwen2VLForConditionalGeneration.from_pretrained(toy.BASE, dtype=dtype)
    from gpu_parts import load  # only here: it brings all of grpo_video.py's loop
    qwen = load(shape, dtype, setup()[2])
    qwen.model.language_model.config._attn_implementation = "sdpa"
    return qwen.train().requires_grad_(True)


def our_step(examples, shape: str):
    """A call that makes one step of ours, and the two models that take part: the policy and the sampler."""
    device, toy_shape = setup()[2], shape == "toy"
    args = Args(model=str(toy.BASE), dtype="float32" if toy_shape or device.type != "cuda" else "bfloat16",
                gradient_checkpointing=not toy_shape)
    with mock.patch.object(runtime, "load_qwen", lambda model, dtype: make_qwen(shape, dtype)):
        policy = load_policy(args, device)
    sampler = make_sampler(policy, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    banned, no_end = vision_token_ids(sampler, device), torch.tensor([], dtype=torch.int64, device=device)
    prompts = collate_prompts(examples, device)

    def step():
        ids, lengths, *_ = generate(sampler, prompts, G, C, 1.0, list(range(B)), no_end, banned)
        assert (lengths == C).all()
        mask = torch.ones_like(ids, dtype=torch.bool)
        advantages = group_advantages(REWARDS.float().view(B, G)).flatten().to(device)
        weights = token_weights(mask, "sequence_mean", B * G, B * G * C, C)
        for b in range(B):  # a group at a time
            rows = slice(b * G, (b + 1) * G)
            prompt = collate_prompts([examples[b]], device)
            row_prompt = torch.zeros(G, dtype=torch.int64, device=device)
            logps, _ = policy(prompt, row_prompt, ids[rows], mask[rows], 1.0, banned)
            loss, _, _ = grpo_token_loss(logps, logps.detach(), None, advantages[rows], 0.2, 0.2, 0.0)
            (loss * weights[rows]).sum().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        copy_weights(policy, sampler)
    return step, policy, sampler


def print_side(seconds: list[float]) -> None:
    """What gpu.py reads of one side; the peak is that of all it holds, weights and optimizer included."""
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    print(json.dumps({"seconds": seconds[1:], "peak_bytes": peak}))  # the first round warms up


def main(rounds: int, shape: str = "toy", side: str = "both") -> None:
    torch.manual_seed(0)
    device = setup()[2]
    tokenizer = AutoTokenizer.from_pretrained(toy.BASE)
    processor = Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(),
                                 chat_template=tokenizer.chat_template)
    rng = np.random.default_rng(0)
    images = [[Image.fromarray(rng.integers(0, 256, (252, 252, 3), dtype=np.uint8)) for _ in range(9)]
              for _ in range(B)]
    text = " ".join(["I see wash pot ."] * 24)
    dataset = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": text}], "images": nine}
                                          for nine in images])
    turns = Interleave()
    # Our prompts are the tokens that TRL's processor makes; patches and positions are ours.
    config = runtime.load_config(str(toy.BASE))
    examples = []
    for nine in images:
        content = [*({"type": "image", "image": image} for image in nine), {"type": "text", "text": text}]
        ids = processor.apply_chat_template(
            [[{"role": "user", "content": content}]], add_generation_prompt=True, tokenize=True,
            return_dict=True, return_tensors="pt")["input_ids"][0]
        patches, grids = zip(*(patchify(np.asarray(image)[None], FAMILIES["qwen2_vl"]) for image in nine))
        positions = rope_positions(ids, list(grids), 1, config.image_token_id, config.video_token_id)
        examples.append(Example(None, (), "", "", ids, positions, pixel_values=torch.cat(patches),
                                image_grid_thw=torch.cat(grids)))
    if side != "TRL":
        turns.step, policy, sampler = our_step(examples, shape)
    if side == "ours":
        for _ in range(rounds + 1):
            turns.take_ours()
        return print_side(turns.seconds["ours"])
    with tempfile.TemporaryDirectory() as folder:
        gpu = device.type == "cuda"
        config = trl.GRPOConfig(
            output_dir=folder, per_device_train_batch_size=B * G, num_generations=G, max_completion_length=C,
            max_steps=rounds + 1, learning_rate=LEARNING_RATE, beta=0.0, temperature=1.0, top_k=0, top_p=1.0,
            use_vllm=False, bf16=gpu, use_cpu=not gpu, gradient_checkpointing=shape != "toy", report_to="none",
            save_strategy="no", disable_tqdm=True, shuffle_dataset=False, dataloader_num_workers=0,
            generation_kwargs={"min_new_tokens": C})
        model = make_qwen(shape, torch.float32)
        trainer = trl.GRPOTrainer(
            model, reward_funcs=lambda completions, **_: REWARDS[:len(completions)].float().tolist(), args=config,
            train_dataset=dataset, processing_class=processor, callbacks=[turns])
        trainer.train()
        if side == "TRL":
            return print_side(turns.seconds["TRL"])
        batch = next(iter(trainer.get_train_dataloader()))
        counts = {"TRL": count(lambda: trainer.training_step(trainer.model, batch, B * G), model),
                  "ours": count(turns.step, sampler, policy.qwen)}
    for seen in counts.values():
        del seen["logits"]  # TRL does not take all of its logits from the lm_head module, where they could be counted
    seconds = {name: values[1:] for name, values in turns.seconds.items()}  # the first round warms up
    ratios = [a / b for a, b in zip(seconds["TRL"], seconds["ours"])]
    what = f"whole step, {B} x {G} rows x {C} tokens, P = {len(examples[0].prompt_ids)}"
    row = table_row("B5", what, seconds, ratios=ratios, aim=3, counts=counts)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    print(json.dumps({**row, "versions": versions}))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
