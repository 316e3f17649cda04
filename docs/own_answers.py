"""Rejection sampling: an SFT file of a model's own right answers. GRPO's data without its pressure against wrong ones.

    python docs/own_answers.py --output_file out/own.jsonl                               # the toy world's base
    python sft_video.py --train_file ../own.jsonl                                        # seen from the data root
    torchrun --nproc_per_node 8 docs/own_answers.py --model Qwen/Qwen2-VL-7B-Instruct --data_root DIR --output_file FILE

Each question of the training file is answered `group_size` times, with the options, the temperature and the reward of
grpo_video.py, whose flags these are; of the right answers the first that ended is kept, without special tokens in its
text, which no training file may have. A question without one is left out, and so is one whose video cannot be read.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo_video  # noqa: E402
import runtime  # noqa: E402
from data import FORBIDDEN, Example, epoch_order, make_loader, user_text  # noqa: E402
from model import end_token_ids, vision_token_ids  # noqa: E402
from run import write_whole  # noqa: E402
from runtime import arg  # noqa: E402
from sampler import answer_texts  # noqa: E402


@dataclass
class Args(grpo_video.Args):
    output_file: str = arg("out/own.jsonl", "the SFT file")


def sft_record(example: Example, response: str, data_root: str) -> dict:
    """A record of the SFT shape: the prompt that was answered, media by their place below the data root."""
    root, question = Path(data_root).resolve(), example.question
    content = [{"type": kind, kind: path.relative_to(root).as_posix()}
               for kind, path in (("video", question.video), ("image", question.image)) if path]
    content.append({"type": "text", "text": user_text(question.text, example.options)})
    return {"sample_id": question.id, "prompt": [{"role": "user", "content": content}], "response": response}


def main(args: Args) -> None:
    rank, world_size, device = runtime.setup()
    args = runtime.resolve(args, device)
    tokenizer = runtime.load_tokenizer(args.model)
    dataset, _ = runtime.load_training_set(args, tokenizer, for_sft=False)
    sampler = runtime.load_sampler(args, device)
    end_ids, banned_ids = end_token_ids(sampler, tokenizer, device), vision_token_ids(sampler, device)
    order = epoch_order(len(dataset), args.seed, epoch=0)  # once through all questions, as GRPO's first epoch does
    steps = [order[i:i + args.prompts_per_step].tolist() for i in range(0, len(order), args.prompts_per_step)]
    loader = make_loader(dataset, [[(0, i) for i in step[rank::world_size]] for step in steps], args.num_workers)
    found, num_right = [], 0
    for step, examples in enumerate(tqdm(loader, total=len(steps), disable=rank != 0)):
        examples = [example for example in examples if not example.error]
        rollout = grpo_video.sample_groups(sampler, examples, step, args, end_ids, banned_ids)
        texts = answer_texts(tokenizer, examples, rollout.completion_ids, rollout.lengths, rollout.ended)
        for i, example in enumerate(examples):
            group = slice(i * args.group_size, (i + 1) * args.group_size)
            right = [text for text, ended in zip(texts[group], rollout.ended[group])
                     if ended and grpo_video.accuracy_reward(text, example)
                     and not FORBIDDEN.search(text)]
            num_right += len(right)
            if right:
                found.append(sft_record(example, right[0], args.data_root))
    gathered = [None] * world_size
    dist.all_gather_object(gathered, (found, num_right))
    if rank == 0:
        place = {dataset.questions[i].id: n for n, i in enumerate(order)}  # the same file whatever the number of ranks
        records = sorted((record for of_rank, _ in gathered for record in of_rank), key=lambda r: place[r["sample_id"]])
        Path(args.output_file).parent.mkdir(parents=True, exist_ok=True)
        write_whole(Path(args.output_file), "".join(json.dumps(record) + "\n" for record in records))
        answers = len(dataset) * args.group_size
        print(f"{args.output_file}: {len(records)} of {len(dataset)} questions have a right answer among "
              f"{args.group_size}; {sum(n for _, n in gathered) / answers:.1%} of all are right")


if __name__ == "__main__":
    runtime.launch(main, Args, grpo_video.TOY)
