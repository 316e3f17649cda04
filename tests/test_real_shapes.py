"""Evaluation with all rewards, attention and the page on what real data and models look like: a folder as it lies on
the hub (config of transformers 4.41, weights in two files), 16 frames of 252 pixels. Two layers, random weights."""
import json
import tracemalloc

import pytest

import attention
import evaluate
import page
import tiny

FILES = ["annotations/validation_L1.jsonl", "annotations/validation_L3.jsonl"]


@pytest.mark.slow
def test_all_of_it_at_the_real_shape(tmp_path, world, capsys):
    model = str(tiny.write_as_on_the_hub(tmp_path / "model"))
    flags = dict(model=model, data_root=str(world), image_size=252, num_workers=0, max_completion_length=24)
    table = evaluate.main(evaluate.Args(**flags, eval_files=FILES, max_questions=3, output_dir=str(tmp_path / "eval")))
    assert "16 frames of 252 x 252 pixels (648 vision tokens), image of 252 x 252 pixels (81 vision tokens)" in (
        capsys.readouterr().out)
    assert [line["n"] for line in table if not line["part"]] == [3, 3]
    records = [json.loads(line) for line in (tmp_path / "eval/samples.jsonl").read_text().splitlines()]
    assert all(record["agreement"] is not None and (record["process"] is None) == (not record["progress"])
               for record in records)

    flags |= dict(model=[model], eval_file=FILES[0], num_questions=3, output_dir=str(tmp_path / "attention"))
    tables = attention.main(attention.Args(**flags))
    file = tmp_path / "attention/attention.json"
    samples = tables[0]["samples"]
    assert 1 <= len(samples) <= 3 and all(sample["frames"]["shape"][1] == 8 for sample in samples)
    assert file.stat().st_size / len(samples) < 100e3  # bytes a question

    tracemalloc.start()
    content = page.gather([tmp_path / "eval"], page.read_attention(file))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6  # a video at a time: 16 frames of 252 pixels are 3 MB
    recorded = [question for question in content["questions"] if question["answers"][0]["attention"]]
    assert len(recorded) == len(samples)
    page.write_page(content, tmp_path / "page.html")
    # A thousand such questions, of which 32 have their attention: toy videos are noise, which kitchens are not.
    pictures = sum(len(picture["webp"]) for picture in content["pictures"]) / len(content["questions"])
    attended = max(len(json.dumps(question["answers"][0]["attention"])) for question in recorded)
    assert 1000 * (pictures + 3000) + 32 * attended < 60e6
