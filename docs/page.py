"""What models answered, as one HTML file to look at: frames, options, answers with their reasoning, rewards, claims.

    python docs/page.py out/demo/base/full out/demo/grpo_seed0/full          any folders that evaluate.py wrote
    python docs/page.py ... --attention out/attention/attention.json         and where the reasoning looked

The file stands alone: no network, no other file. It can be filtered (right, wrong, unparsed; level; models disagree;
words), and where attention was recorded, pointing at a word of the reasoning lights up the frames by weight. What it
looks like is in page.html; here its data are gathered. Questions are matched by file and id, as --compare does.
"""
import argparse
import base64
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import PixelSettings, Question, cached_video, load_questions, read_image  # noqa: E402
from toy import RECIPES, check_claims  # noqa: E402

SIDE = 84  # pixels of a thumbnail, at most
QUALITY = 45  # of WebP: 16 frames of a kitchen are about 25 KB


def read_evaluation(folder: Path) -> tuple[dict, list[dict]]:
    """(settings, records) of a folder that evaluate.py wrote; ValueError if it is none."""
    if not ((folder / "args.json").exists() and (folder / "samples.jsonl").exists()):
        raise ValueError(f"{folder}: no args.json and samples.jsonl there; give a folder that evaluate.py wrote")
    records = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    if any(name not in record for record in records for name in ("format", "agreement", "process")):
        raise ValueError(f"{folder}: made by an earlier version of evaluate.py; evaluate again")
    return json.loads((folder / "args.json").read_text()), records


def picture(frames: np.ndarray, seconds: list[float]) -> dict:
    """All frames (F, H, W, 3) uint8 of a video, or the one of an image, in a row as one WebP."""
    side = min(SIDE, frames.shape[1])
    row = np.concatenate([np.array(Image.fromarray(frame).resize((side, side), Image.Resampling.LANCZOS))
                          for frame in frames], axis=1)
    Image.fromarray(row).save(file := io.BytesIO(), "webp", quality=QUALITY, method=4)
    return {"frames": len(frames), "seconds": [round(float(second), 2) for second in seconds],
            "webp": base64.b64encode(file.getvalue()).decode()}


def read_pictures(questions: list[Question], settings: dict) -> dict[Path, dict]:
    """Path of a video or image -> `picture`; those that cannot be read are left out, and named on screen."""
    names = ("fps", "min_frames", "num_frames", "image_size", "frame_cache")
    pixels, found = PixelSettings(*(settings[name] for name in names)), {}
    videos = {q.video for q in questions} - {None}
    for path in tqdm(sorted(videos | {q.image for q in questions} - {None}), desc="reading pixels", dynamic_ncols=True):
        try:
            if path in videos:
                frames, seconds = cached_video(path, pixels)
                found[path] = picture(frames, seconds[:-1])
            else:
                found[path] = picture(read_image(path, pixels), [0.0])
        except ValueError as error:
            tqdm.write(f"left out: {error}")
    return found


def make_answer(record: dict, attention: dict | None) -> dict:
    """What the page shows of one model's answer to a question; `attention` if it is that of this very answer."""
    response, claims = record["response"], []
    no_ascii = re.compile(r"[^ -~]")  # of a character in several tokens, tokens have no part
    said = re.sub(r"<\|\w+\|>$", "", "".join(attention["tokens"])) if attention else ""  # but for the end token
    if no_ascii.sub("", said) != no_ascii.sub("", response):
        attention = None
    if record["goal"].lower() in RECIPES:  # of the toy world, where what holds is known
        claims = check_claims(response, record["goal"], tuple(record["progress"]), tuple(record["options"]))
    judged = {name: record[name] for name in ("format", "agreement", "process")}
    rewards = {"accuracy": float(record["correct"]), **judged}
    return {"response": response, "rewards": rewards, "claims": claims, "attention": attention,
            **{name: record[name] for name in ("parsed", "correct", "truncated", "error")}}


def gather(folders: list[Path], attention: dict, num_questions: int = 0) -> dict:
    """All that the page shows. `attention` is what `read_attention` returns, or empty."""
    evaluations = [read_evaluation(folder) for folder in folders]
    answers = [{(r["file"], r["sample_id"]): r for r in records} for _, records in evaluations]
    records = {key: r for of_model in reversed(answers) for key, r in of_model.items()}
    files = list(dict.fromkeys(file for file, _ in records))
    keys = sorted(records, key=lambda key: (files.index(key[0]), len(key[1]), key[1]))[:num_questions or None]
    for (file, sample_id), record in records.items():
        sides = [of_model[file, sample_id] for of_model in answers if (file, sample_id) in of_model]
        if any(side[name] != record[name] for side in sides for name in ("gold", "options")):
            raise ValueError(f"question {sample_id!r} of {file} has not the same options in all of these evaluations; "
                             "evaluate with one --seed")
    asked = {}
    for (settings, _), of_model in zip(evaluations, answers):
        for file in {file for file, _ in of_model}:
            asked = {(file, question.id): question for question in load_questions(file, settings["data_root"])} | asked
    pictures = read_pictures([asked[key] for key in keys], evaluations[0][0])
    place = {path: n for n, path in enumerate(pictures)}
    questions = []
    for file, sample_id in keys:
        record, question, given = records[file, sample_id], asked[file, sample_id], []
        for (settings, _), of_model in zip(evaluations, answers):
            seen = attention.get((settings["model"], file, sample_id)) if settings["video"] == "full" else None
            given.append(make_answer(of_model[file, sample_id], seen) if (file, sample_id) in of_model else None)
        questions.append({"id": sample_id, "file": Path(file).stem, "part": record["part"], "goal": record["goal"],
                          "text": record["question"], "options": record["options"], "gold": record["gold"],
                          "progress": record["progress"], "answers": given,
                          "video": place.get(question.video), "image": place.get(question.image)})
    names = [name if settings["video"] == "full" else f"{name} (saw --video {settings['video']})"
             for name, (settings, _) in zip(names_of(folders), evaluations)]
    return {"models": names, "pictures": list(pictures.values()), "questions": questions}


def names_of(folders: list[Path]) -> list[str]:
    """The folders' names without what they begin with alike: base/full and grpo_seed0/full."""
    parts = [folder.resolve().parts for folder in folders]
    while len(parts) > 1 and len({part[0] for part in parts}) == 1 and min(map(len, parts)) > 1:
        parts = [part[1:] for part in parts]
    return ["/".join(part[-2:] if len(parts) == 1 else part) for part in parts]


def read_attention(path: Path) -> dict[tuple[str, str, str], dict]:
    """(model, file, sample_id) -> what attention.py kept of where the tokens of the answer looked."""
    try:
        content = json.loads(path.read_text())
        settings, models = content["settings"], content["models"]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"--attention {path}: not there, or not written by attention.py") from None
    if settings["video"] != "full":
        return {}
    return {(model["model"], settings["eval_file"], sample["id"]): {
        "tokens": sample["tokens"], "steps": sample["frames"]["shape"][1], "scale": sample["frames"]["scale"],
        "weights": sample["frames"]["data"]} for model in models for sample in model["samples"]}


def write_page(content: dict, path: Path) -> None:
    template = (Path(__file__).parent / "page.html").read_text()
    # A model may have written </script>.
    text = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(template.replace(">DATA<", f">{text}<"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("evaluations", nargs="+", type=Path, help="folders that evaluate.py wrote, one a model")
    parser.add_argument("--attention", type=Path, help="attention.json, as attention.py writes it")
    parser.add_argument("--output", type=Path, default=Path("out/page.html"))
    parser.add_argument("--num_questions", type=int, default=0, help="the first so many; 0: all")
    args = parser.parse_args()
    try:
        attention = read_attention(args.attention) if args.attention else {}
        content = gather(args.evaluations, attention, args.num_questions)
    except ValueError as error:
        sys.exit(str(error))
    write_page(content, args.output)
    size = args.output.stat().st_size / 1e6
    print(f"{len(content['questions'])} questions, {size:.1f} MB; open it in a browser: {args.output.resolve()}")


if __name__ == "__main__":
    main()
