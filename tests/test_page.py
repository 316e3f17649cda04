"""docs/page.py: what it gathers, and the page itself in headless Chromium (`make test-page`)."""
import base64
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

import evaluate
import page
import toy
from data import load_questions
from evaluate import make_record

FILES = [f"annotations/validation_{level}.jsonl" for level in ("L1", "L2", "L3")]
EVIL = "</script><img src=x onerror=\"document.title='evil'\"> & <b>bold</b>"


def write_evaluation(folder, world, response_to, per_file=None, **changes):
    """An evaluation as evaluate.py writes it, of a model that says `response_to(question, options, gold)`."""
    settings = {"model": str(folder), "data_root": str(world), "eval_files": FILES, **changes}
    args, records = evaluate.Args(**evaluate.TOY | settings), []
    for file in FILES:
        for question in load_questions(file, world)[:per_file]:
            example = SimpleNamespace(question=question, options=question.options, gold=question.gold, error="")
            response = response_to(question, question.options, question.gold)
            records.append({"file": file, **make_record(example, response, len(response) // 4, False, args)})
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(vars(args)))
    (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def honest(question, options, gold):
    return toy.teach(question.progress, options["ABCDE".index(gold)], gold)


def always_a(question, options, gold):
    return f"<think>Whatever. {EVIL}</think><answer>A</answer>" if question.id.endswith("1") else "I do not know"


@pytest.fixture(scope="module")
def folders(tmp_path_factory, world):
    root = tmp_path_factory.mktemp("evaluations")
    return [write_evaluation(root / name / "full", world, answer, 20)
            for name, answer in (("honest", honest), ("a", always_a))]


def recorded(folders):
    """attention.json of the honest model on the questions of one file: token n looks at time step n % 8 alone."""
    model = json.loads((folders[0] / "args.json").read_text())["model"]
    records = [json.loads(line) for line in (folders[0] / "samples.jsonl").read_text().splitlines()]
    samples = []
    for record in records:
        if record["video"] and record["file"] == FILES[0]:
            tokens = re.findall(r"<[^>]+>|\W*\w+\W*", record["response"])
            assert "".join(tokens) == record["response"]
            weights = 250 * np.eye(8, dtype=np.uint8)[np.arange(len(tokens)) % 8]
            samples.append({"id": record["sample_id"], "tokens": tokens, "frames": {
                "shape": weights.shape, "scale": 0.004, "data": base64.b64encode(weights.tobytes()).decode()}})
    content = {"settings": {"eval_file": FILES[0], "video": "full"}, "models": [{"model": model, "samples": samples}]}
    (folders[0].parent / "attention.json").write_text(json.dumps(content))
    return page.read_attention(folders[0].parent / "attention.json")


def test_what_is_gathered(folders, world):
    content = page.gather(folders, {})
    assert content["models"] == ["honest/full", "a/full"] and len(content["questions"]) == 60
    ids = [int(q["id"]) for q in content["questions"] if q["file"] == "validation_L1"]
    assert ids == sorted(ids) and len(str(ids[0])) < len(str(ids[-1]))  # by number, not 1, 10, 2
    for question in content["questions"]:
        ours, theirs = question["answers"]
        assert ours["correct"] and ours["rewards"] == {"accuracy": 1, "format": 1, "agreement": 1,
                                                       "process": 1 if question["progress"] else None}
        assert ours["claims"] and all(holds for _, _, holds in ours["claims"])
        assert theirs["parsed"] in ("A", None) and theirs["correct"] == (theirs["parsed"] == question["gold"])
        video, image = (content["pictures"][question[kind]] if question[kind] is not None else None
                        for kind in ("video", "image"))
        assert image["frames"] == 1 and (video is None) == (not question["progress"])
        assert video is None or (video["frames"] == 16 and video["seconds"] == sorted(video["seconds"]))
    assert len(page.gather(folders, {}, num_questions=7)["questions"]) == 7


def test_a_question_that_one_model_was_not_asked(folders, tmp_path, world):
    fewer = write_evaluation(tmp_path / "fewer", world, honest, 2)
    content = page.gather([fewer, folders[1]], {})
    assert len(content["questions"]) == 60
    assert sum(question["answers"][0] is None for question in content["questions"]) == 54


def test_a_video_that_cannot_be_read_is_left_out(folders, tmp_path, world, capsys):
    root = tmp_path / "world"
    shutil.copytree(world / "annotations", root / "annotations")
    for question in [question for file in FILES for question in load_questions(file, world)[:5]]:
        for path in filter(None, (question.video, question.image)):
            (root / path.relative_to(world)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, root / path.relative_to(world))
    victim = next(q for q in load_questions(FILES[0], root) if q.video)
    victim.video.write_bytes(b"no video")
    folder = write_evaluation(tmp_path / "evaluation", root, honest, 5, frame_cache="")
    content = page.gather([folder], {})
    without = [q["id"] for q in content["questions"] if q["progress"] and q["video"] is None]
    assert victim.id in without and f"left out: {victim.video}" in capsys.readouterr().out


def test_folders_that_are_no_evaluations_are_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="give a folder that evaluate.py wrote"):
        page.read_evaluation(tmp_path)
    old = shutil.copytree(folders[0], tmp_path / "old")
    (old / "samples.jsonl").write_text(json.dumps({"file": "x", "sample_id": "1"}) + "\n")
    with pytest.raises(ValueError, match="earlier version"):
        page.read_evaluation(old)


# ----------------------------------------------------------------------------------------------------------------------
# In the browser.

@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"),
                                           args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """A function that writes a page, opens it offline, and returns it; at the end it must not have had an error."""
    context, errors = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True), []

    def open_page(content):
        page.write_page(content, tmp_path / "page.html")
        tab = context.new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.on("request", lambda request: errors.append(request.url) if request.url.startswith("http") else None)
        tab.goto(f"file://{tmp_path}/page.html")
        tab.wait_for_selector("article, #none")
        return tab

    yield open_page
    context.close()
    assert not errors


def shown(tab):
    """The numbers of the line that counts: (kept, all)."""
    return tuple(map(int, tab.inner_text("#count").split(":")[0].split(" of ")))


@pytest.mark.page
def test_it_opens_and_text_stays_text(open_page, folders):
    tab = open_page(page.gather(folders, {}))
    assert shown(tab) == (60, 60) and 10 <= tab.locator("article").count() < 60
    assert tab.title() == "What the models said" and tab.locator("article img, article b").count() == 0
    tab.fill("#text", "onerror")
    assert EVIL in tab.locator("article").first.text_content()
    frames = tab.locator("article").first.locator(".frame")
    assert frames.count() in (1, 17)
    # The picture is really there: its own size is that of all frames in a row.
    width = tab.evaluate("""async () => { const image = new Image();
        image.src = document.querySelector('.frame').style.backgroundImage.slice(5, -2);
        await image.decode(); return image.width; }""")
    assert width in (56, 16 * 56)


@pytest.mark.page
def test_filters(open_page, folders):
    content = page.gather(folders, {})
    tab = open_page(content)
    answers = [question["answers"][1] for question in content["questions"]]
    wanted = {"right": sum(a["correct"] for a in answers), "unparsed": sum(a["parsed"] is None for a in answers)}
    wanted["wrong"] = 60 - sum(wanted.values())
    assert all(wanted.values())
    tab.select_option("#model", label="a/full")
    for verdict, count in wanted.items():
        tab.select_option("#verdict", verdict)
        assert shown(tab) == (count, 60), verdict
        assert min(10, count) <= tab.locator("article").count() <= count
    tab.select_option("#model", label="honest/full")
    tab.select_option("#verdict", "wrong")
    assert shown(tab) == (0, 60) and "take a filter off" in tab.inner_text("main")
    tab.select_option("#verdict", "")
    tab.check("#disagree")
    assert shown(tab)[0] == sum(q["answers"][0]["parsed"] != q["answers"][1]["parsed"] for q in content["questions"])
    tab.uncheck("#disagree")
    tab.select_option("#level", "validation_L2")
    assert shown(tab) == (20, 60)
    tab.select_option("#level", "")
    goal = content["questions"][0]["goal"]
    tab.fill("#text", goal.upper())
    assert 0 < shown(tab)[0] < 60 and goal.lower() in tab.locator("article").first.text_content().lower()


@pytest.mark.page
def test_pointing_at_a_word_lights_up_its_frames(open_page, folders):
    attention = recorded(folders)
    tab = open_page(page.gather(folders, attention))
    tab.check("#attended")
    assert shown(tab)[0] == len(attention)
    first = tab.locator("article").first
    opacity = "frames => frames.map(frame => +getComputedStyle(frame).opacity)"
    frames = first.locator("figure:not(.image) .frame")
    assert first.locator(".token").count() > 9 and frames.count() == 16

    def lit():
        tab.wait_for_timeout(150)  # the change of brightness
        return [i for i, value in enumerate(frames.evaluate_all(opacity)) if value > 0.9]

    assert lit() == list(range(16))
    for n in (3, 9):
        first.locator(".token").nth(n).hover()
        assert lit() == [2 * (n % 8), 2 * (n % 8) + 1]
        assert first.locator("figcaption").nth(2 * (n % 8)).inner_text() == "100.0%"
    first.locator(".token").nth(5).click()
    tab.mouse.move(5, 700)
    assert lit() == [10, 11]  # held by the click
    first.locator(".token").nth(5).click()
    tab.mouse.move(5, 700)
    tab.keyboard.press("Escape")
    first.locator("h2").click()
    assert lit() == list(range(16)) and first.locator("figcaption").first.inner_text().endswith(" s")


@pytest.mark.page
def test_a_thousand_questions_are_small_and_scroll(open_page, tmp_path, world):
    folders = [write_evaluation(tmp_path / name, world, answer) for name, answer in (("b", honest), ("a", always_a))]
    content = page.gather(folders, {}, 1000)
    tab = open_page(content)
    assert len(content["questions"]) == 1000 and (tmp_path / "page.html").stat().st_size < 20e6
    # To the end, as fast as frames come: how long each took, in ms.
    times = tab.evaluate("""async () => { const times = []; let last = performance.now(), still = 0, before = -1;
        while (still < 5) { scrollBy(0, 900); await new Promise(requestAnimationFrame);
            const now = performance.now(); times.push(now - last); last = now;
            still = scrollY === before ? still + 1 : 0; before = scrollY; }
        return times; }""")
    assert tab.locator("article").count() == 1000
    # On a quiet machine 17 and 33 ms. Making all thousand cards at once takes seconds.
    assert np.median(times) < 50 and np.quantile(times, 0.95) < 250
