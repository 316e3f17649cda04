"""How far has training moved a model? The forward KL divergence from the base, on prompts of the training file.

    python docs/distance.py --trained out/toy_grpo/final --output_file out/distance.json
    python docs/distance.py --model Qwen/Qwen2-VL-7B-Instruct --trained out/grpo/final --data_root DIR

KL(base || trained) = E_{o ~ base} [log base(o | q) - log trained(o | q)], in nats per completion: the mean over G
completions sampled from the base for each of 64 questions; the standard error is that of the means of questions. It is
what RL's Razor (arXiv 2509.04259) found to tell how much is forgotten. One process; both models are in memory.
"""
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo_video  # noqa: E402
import runtime  # noqa: E402
from data import make_loader  # noqa: E402
from grpo_video import logps_without_grad, sample_groups  # noqa: E402
from model import end_token_ids, vision_token_ids  # noqa: E402
from run import write_whole  # noqa: E402
from runtime import arg  # noqa: E402


@dataclass
class Args(grpo_video.Args):
    """`model` is the base."""
    trained: str = arg("", "the folder of the trained model")
    num_questions: int = arg(64, "of the training file, the first ones", least=2)
    output_file: str = arg("out/distance.json", "the numbers")


def forward_kl(logps_base: torch.Tensor, logps_trained: torch.Tensor, group_size: int) -> tuple[float, float]:
    """(mean, standard error) in nats per completion; log-probs (N, C) of completions that the base sampled, 0 outside
    their mask, G of each question one after another."""
    of_completion = (logps_base - logps_trained).double().sum(dim=1)
    of_question = of_completion.view(-1, group_size).mean(dim=1)
    return of_question.mean().item(), (of_question.std() / math.sqrt(len(of_question))).item()


def main(args: Args) -> None:
    _, world_size, device = runtime.setup()
    if world_size > 1:
        raise ValueError(f"{world_size} processes: this script is one; start it with python, not with torchrun")
    args = runtime.resolve(args, device)
    tokenizer = runtime.load_tokenizer(args.model)
    dataset, _ = runtime.load_training_set(args, tokenizer, for_sft=False)
    base, trained = (runtime.load_policy(replace(args, model=model), device, frozen=True)
                     for model in (args.model, args.trained))
    sampler = runtime.make_sampler(base, device)
    end_ids, banned_ids = end_token_ids(sampler, tokenizer, device), vision_token_ids(sampler, device)
    places = [(0, i) for i in range(min(args.num_questions, len(dataset)))]
    batches = [places[i:i + args.prompts_per_step] for i in range(0, len(places), args.prompts_per_step)]
    logps = []
    for examples in tqdm(make_loader(dataset, batches, args.num_workers), total=len(batches)):
        rollout = sample_groups(sampler, [e for e in examples if not e.error], 0, args, end_ids, banned_ids)
        rows = runtime.micro_batches(torch.arange(len(rollout.lengths), device=device), args.micro_batch_size)
        of_base, of_trained = (logps_without_grad(model, rollout, rows) for model in (base, trained))
        mask = rollout.completion_mask
        logps.append((of_base * mask, of_trained * mask))
    mean, error = forward_kl(*(torch.cat(part) for part in zip(*logps)), args.group_size)
    print(f"KL(base || trained) = {mean:.3f} +- {error:.3f} nats per completion")
    Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
    completions = sum(len(of_base) for of_base, _ in logps)
    numbers = {"forward_kl": mean, "standard_error": error, "completions": completions}
    write_whole(Path(args.output_file), json.dumps(numbers) + "\n")


if __name__ == "__main__":
    runtime.launch(main, Args, grpo_video.TOY)
