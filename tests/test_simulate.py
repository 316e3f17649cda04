"""The memory that simulate.py says a step takes, against what the same step really takes on a CPU."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch.profiler import ProfilerActivity, profile

TEXT = dict(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2)
# shape -> the text model, the vision tower, flags
SHAPES = {
    # 37 million weights and short prompts: weights, gradients and moments are nearly all
    "weights": (dict(hidden_size=512, intermediate_size=2048, vocab_size=16384, **TEXT),
                dict(depth=4, embed_dim=256, num_heads=4),
                dict(num_frames=2, image_size=56, max_completion_length=16)),
    # 34 million of its 35 million weights in embedding and lm_head
    "vocabulary": (dict(hidden_size=256, intermediate_size=256, vocab_size=65536, **TEXT),
                   dict(depth=2, embed_dim=256, num_heads=4),
                   dict(num_frames=2, image_size=56, max_completion_length=16)),
    # a frozen model, whole on each rank, and little that learns
    "adapters": (dict(hidden_size=512, intermediate_size=2048, vocab_size=2048, **TEXT),
                 dict(depth=4, embed_dim=256, num_heads=4),
                 dict(num_frames=2, image_size=56, max_completion_length=16, lora_rank=8)),
    # 9 million weights and prompts of 576 tokens: what is kept from forward to backward is most
    "activations": (dict(hidden_size=256, intermediate_size=1024, vocab_size=1024, **TEXT),
                    dict(depth=4, embed_dim=256, num_heads=4),
                    dict(num_frames=8, image_size=252, max_completion_length=48, gradient_checkpointing=False)),
}


def write_config(folder: Path, text: dict, vision: dict) -> None:
    tokens = dict(image_token_id=500, video_token_id=501, vision_start_token_id=502, vision_end_token_id=503)
    quarter = text["hidden_size"] // text["num_attention_heads"] // 4
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [quarter, quarter // 2, quarter // 2]}
    transformers.Qwen2VLConfig(
        text_config={**text, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={**vision, "hidden_size": text["hidden_size"]}, **tokens).save_pretrained(folder)


def really(argv: list[str]) -> dict:
    """Phase -> bytes that the CPU's allocator has given, beyond those at its start: at its end, and at most."""
    import simulate  # first: it knows where the others are
    from simulate import grpo_video, runtime

    def random_qwen(model, dtype):
        return transformers.Qwen2VLForConditionalGeneration._from_config(runtime.load_config(model), dtype=dtype)

    def mark(name):
        profilers[-1].__exit__(None, None, None)
        total = peak = 0
        for event in profilers[-1].profiler.kineto_results.events():
            if event.name() == "[memory]":
                total += event.nbytes()
                peak = max(peak, total)
        phases[names[-1]] = {"end": total, "peak": peak}
        names.append(name)
        profilers.append(profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__())

    torch.set_num_threads(1)
    runtime.read_qwen = random_qwen
    _, ranks, _ = runtime.setup()
    args, = transformers.HfArgumentParser(grpo_video.Args).parse_args_into_dataclasses(argv)
    phases, names = {}, ["load"]
    profilers = [profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()]
    simulate.run_step(args, runtime.load_config(args.model), ranks, mark)
    profilers[-1].__exit__(None, None, None)
    return phases


# Both in processes of their own: their process groups differ, and here Hugging Face's layers are lifted to float64.
@pytest.mark.parametrize("shape", SHAPES)
def test_simulated_peaks_are_those_of_a_real_step(shape, tmp_path):
    text, vision, sizes = SHAPES[shape]
    write_config(tmp_path, text, vision)
    flags = dict(model=tmp_path, dtype="bfloat16", rollout_prompts=2, prompts_per_step=2, **sizes)
    flags = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    commands = ([str(Path(__file__).with_name("simulate.py")), "--json", "--ranks", "1"], [__file__])
    both = [subprocess.Popen([sys.executable, *command, *flags], stdout=-1, stderr=-1, text=True)
            for command in commands]
    outputs = [process.communicate() for process in both]
    assert not any(process.returncode for process in both), outputs
    simulated, real = (json.loads(out.splitlines()[-1]) for out, _ in outputs)
    assert simulated["load"]["end"] == pytest.approx(real["load"]["end"], rel=0.01)
    for phase in ("sampling", "update"):
        added = simulated[phase]["peak"] - simulated[phase]["start"]
        print(f"{shape}, {phase}: {added:,} bytes simulated, {real[phase]['peak']:,} real, {simulated[phase]['where']}")
        assert added == pytest.approx(real[phase]["peak"], rel=0.01)


if __name__ == "__main__":
    print(json.dumps(really(sys.argv[1:])))
