"""One GRPO step of TRL's GRPOTrainer and one of ours, in turn, in one process: B5 of bench.py, which runs this script
in an environment that has trl and torchvision beside this project's packages.

Both train the toy world's base in float32: B prompts of nine images (729 of about 900 tokens: TRL takes no video), G
completions of exactly C tokens, one update, no KL, no vLLM. A step is sampling, rewards (made up), log-probs, backward,
AdamW.
"""
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

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
import toy  # noqa: E402
from bench import count, table_row  # noqa: E402
from data import Example, patchify, rope_positions  # noqa: E402
from grpo_video import group_advantages, grpo_token_loss, token_weights  # noqa: E402
from model import collate_prompts, vision_token_ids  # noqa: E402
from runtime import copy_weights, load_policy, make_sampler, setup  # noqa: E402
from sampler import generate  # noqa: E402

B, G, C, LEARNING_RATE = 2, 8, 64, 1e-6
REWARDS = torch.arange(B * G) % 2  # half of each group is right


class Interleave(TrainerCallback):
    """After each of TRL's steps, one of ours."""

    def __init__(self):
        self.step, self.seconds = None, {"TRL": [], "ours": []}

    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds["TRL"].append(time.perf_counter() - self.start)
        start = time.perf_counter()
        self.step()
        self.seconds["ours"].append(time.perf_counter() - start)


def our_step(examples):
    """A call that makes one step of ours, and the two models that take part: the policy and the sampler."""
    device = setup()[2]
    policy = load_policy(SimpleNamespace(model=str(toy.BASE), dtype="float32", gradient_checkpointing=False), device)
    sampler = make_sampler(policy, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    banned, no_end = vision_token_ids(sampler, device), torch.tensor([], dtype=torch.int64)
    prompts = collate_prompts(examples, device)

    def step():
        ids = generate(sampler, prompts, G, C, 1.0, list(range(B)), no_end, banned).ids
        assert ids.shape == (B * G, C)
        mask = torch.ones_like(ids, dtype=torch.bool)
        advantages = group_advantages(REWARDS.float().view(B, G)).flatten()
        weights = token_weights(mask, "sequence_mean", B * G, B * G * C, C)
        for b in range(B):  # a group at a time
            rows = slice(b * G, (b + 1) * G)
            prompt, row_prompt = collate_prompts([examples[b]], device), torch.zeros(G, dtype=torch.int64)
            logps, _ = policy(prompt, row_prompt, ids[rows], mask[rows], 1.0, banned)
            loss, _, _ = grpo_token_loss(logps, logps.detach(), None, advantages[rows], 0.2, 0.2, 0.0)
            (loss * weights[rows]).sum().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        copy_weights(policy, sampler)
    return step, policy, sampler


def main(rounds: int) -> None:
    torch.manual_seed(0)
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
    with tempfile.TemporaryDirectory() as folder:
        config = trl.GRPOConfig(
            output_dir=folder, per_device_train_batch_size=B * G, num_generations=G, max_completion_length=C,
            max_steps=rounds + 1, learning_rate=LEARNING_RATE, beta=0.0, temperature=1.0, top_k=0, top_p=1.0,
            use_vllm=False, bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none",
            save_strategy="no", disable_tqdm=True, shuffle_dataset=False, dataloader_num_workers=0,
            generation_kwargs={"min_new_tokens": C})
        model = Qwen2VLForConditionalGeneration.from_pretrained(toy.BASE, dtype=torch.float32)
        trainer = trl.GRPOTrainer(
            model, reward_funcs=lambda completions, **_: REWARDS[:len(completions)].float().tolist(), args=config,
            train_dataset=dataset, processing_class=processor, callbacks=[turns])
        # Our prompts are the tokens that TRL's processor makes; patches and positions are ours.
        examples = []
        for nine in images:
            content = [*({"type": "image", "image": image} for image in nine), {"type": "text", "text": text}]
            ids = processor.apply_chat_template(
                [[{"role": "user", "content": content}]], add_generation_prompt=True, tokenize=True,
                return_dict=True, return_tensors="pt")["input_ids"][0]
            patches, grids = zip(*(patchify(np.asarray(image)[None]) for image in nine))
            positions = rope_positions(ids, list(grids), model.config.image_token_id, model.config.video_token_id)
            examples.append(Example(None, (), "", "", ids, positions, pixel_values=torch.cat(patches),
                                    image_grid_thw=torch.cat(grids)))
        turns.step, policy, sampler = our_step(examples)
        trainer.train()
        batch = next(iter(trainer.get_train_dataloader()))
        counts = {"TRL": count(lambda: trainer.training_step(trainer.model, batch, B * G), model),
                  "ours": count(turns.step, sampler, policy.qwen)}
    for side in counts.values():
        del side["logits"]  # TRL does not take all of its logits from the lm_head module, where they could be counted
    seconds = {name: values[1:] for name, values in turns.seconds.items()}  # the first round warms up
    ratios = [a / b for a, b in zip(seconds["TRL"], seconds["ours"])]
    what = f"whole step, {B} x {G} rows x {C} tokens, P = {len(examples[0].prompt_ids)}"
    row = table_row("B5", what, seconds, ratios=ratios, aim=3, counts=counts)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__}
    print(json.dumps({**row, "versions": versions}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
