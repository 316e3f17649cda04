"""Files as they come from strangers: cut clips, varying rates, playlists, pipes; a full cache; the workers."""
import errno
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import Example, PixelSettings, Question, VideoDataset

SMALL = PixelSettings(num_frames=8, image_size=56)
MILLISECONDS = Fraction(1, 1000)


def write_video(path, times, codec="libx264", size=(64, 48), rate=25, shift=0, time_base=MILLISECONDS, **options):
    """Flat frames of random levels, each shown from one of `times` on (in time_base); `shift` moves the packets."""
    level = random.Random(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={"sc_threshold": "0", **options})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = time_base

        def mux(packets):
            for packet in packets:
                if packet.pts is not None:
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                container.mux(packet)

        for pts in times:
            grey = np.full((size[1], size[0], 3), level.randrange(256), np.uint8)
            frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
            frame.pts, frame.time_base = pts, time_base
            mux(stream.encode(frame))
        mux(stream.encode())
    return path


def shown(path):
    """(times, levels) of the frames that a player shows, decoded in order."""
    with av.open(str(path)) as container:
        frames = [(float(frame.time), frame.to_ndarray(format="rgb24").mean()) for frame in container.decode(video=0)]
    return tuple(map(np.array, zip(*frames)))


def levels_of(path, settings=SMALL):
    pixels, _ = data.read_video(path, settings)
    assert pixels.std(axis=(1, 2)).max() < 3  # flat, and not a mixture
    return pixels.mean(axis=(1, 2, 3))


def formula(num_total, fps, settings):
    """How frames of a constant rate have always been chosen: as a plain loop."""
    count = int(num_total / fps * settings.fps) // 2 * 2
    count = min(max(count, settings.min_frames), settings.num_frames)
    return [round(i * ((num_total - 1) / (count - 1))) for i in range(count)]


# ----------------------------------------------------------------------------------------------------------------------
# Which frames.

@pytest.mark.parametrize("codec, options", [
    ("libx264", dict(bf="0", g="250")), ("libx264", dict(bf="3", g="250")),  # one key frame, far before the cut
    ("libx264", dict(bf="3", g="20")), ("libx264", dict(bf="0", g="7")), ("mpeg4", dict(g="100"))])
@pytest.mark.parametrize("settings", [SMALL, PixelSettings(num_frames=32, fps=20.0, image_size=56)])
def test_frames_before_a_cut_are_not_shown(tmp_path, codec, options, settings):
    """As `ffmpeg -ss 2.52 -c copy` leaves them: packets from the key frame on, with times below 0 before the cut."""
    path = write_video(tmp_path / "cut.mp4", range(0, 5000, 40), codec, shift=-2520, **options)
    times, levels = shown(path)
    assert len(levels) == 62 and times[0] == 0
    want = levels[formula(62, 25, settings)]
    assert np.abs(levels_of(path, settings) - want).max() < 2


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "avi"])
@pytest.mark.parametrize("count, step", [(2, 33), (3, 33), (3, 1000), (4, 100)])
def test_the_frames_of_a_very_short_clip_are_told_apart(tmp_path, suffix, count, step):
    """decord knows no times of an mkv of 3 frames or fewer, and gives 9e15 for each."""
    codec = "mpeg4" if suffix == "avi" else "libx264"
    path = write_video(tmp_path / f"clip.{suffix}", range(0, count * step, step), codec)
    _, levels = shown(path)
    got, (_, seconds) = levels_of(path), data.read_video(path, SMALL)
    assert np.abs(got[[0, -1]] - levels[[0, -1]]).max() < 2 and len(set(got.round())) == count
    assert seconds[0] == 0 and seconds[-1] >= seconds[-2] > 0


def test_a_cut_inside_a_frame(tmp_path):
    path = write_video(tmp_path / "cut.mp4", range(0, 5000, 40), shift=-2535, bf="2", g="12")
    _, levels = shown(path)
    assert len(levels) == 61
    assert np.abs(levels_of(path) - levels[formula(61, 25, SMALL)]).max() < 2


def varying(kind):
    rng = random.Random(1)
    steps = {"slower": [20] * 50 + [100] * 50, "still": [40] * 40 + [4000] + [40] * 20,
             "random": [rng.randrange(10, 200) for _ in range(80)]}[kind]
    return np.cumsum([0, *steps[:-1]]), sum(steps)


@pytest.mark.parametrize("suffix, codec", [("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx-vp9")])
@pytest.mark.parametrize("kind", ["slower", "still", "random"])
def test_a_varying_rate_is_spread_in_time(tmp_path, suffix, codec, kind):
    starts, end = varying(kind)
    path = write_video(tmp_path / f"clip.{suffix}", starts.tolist(), codec, g="30")
    times, levels = shown(path)
    assert np.abs(times - starts / 1000).max() < 1e-3
    settings = PixelSettings(num_frames=32, image_size=56)
    got, (_, seconds) = levels_of(path, settings), data.read_video(path, settings)
    assert abs(len(got) - end / 1000 * settings.fps) <= 2 and len(got) % 2 == 0
    for i, level in enumerate(got):  # what is on the screen then; within a millisecond of a change either frame will do
        now = i * times[-1] / (len(got) - 1)
        on_screen = {np.flatnonzero(times <= now + slack)[-1] for slack in (-1e-3 if i else 0, 1e-3)}
        assert min(abs(levels[k] - level) for k in on_screen) < 2, i
        assert min(abs(times[k] - seconds[i]) for k in on_screen) < 2e-3  # when it came on the screen, not `now`
    assert len(seconds) == len(got) + 1 and times[-1] < seconds[-1] < end / 1000 + 0.2


SETTINGS = [PixelSettings(), SMALL, PixelSettings(fps=1.0), PixelSettings(fps=7.3, num_frames=64),
            PixelSettings(min_frames=2, num_frames=2), PixelSettings(num_frames=768, fps=4.0)]


@pytest.mark.parametrize("fps", [1.0, 8.0, 15.0, 23.976, 24000 / 1001, 25.0, 29.97, 30000 / 1001, 30.0, 59.94, 120.0])
@pytest.mark.parametrize("unit", [0, 1e-3, 1 / 90000])  # exact, or rounded as mkv and MPEG do
def test_a_constant_rate_is_spread_as_ever(fps, unit):
    for n in [*range(1, 130), 237, 240, 1000, 1799, 30000, 107892]:
        begins = (np.arange(n + 1) / fps).astype(np.float32).astype(float)
        if unit:
            begins = np.round(begins / unit) * unit
        times = np.stack([begins[:-1], begins[1:]], axis=1)
        for settings in SETTINGS:
            want = formula(n, fps, settings)
            for given in (None, times):
                indices, seconds = data.sample_frames(n, fps, settings, given)
                assert indices.tolist() == want, (n, settings)
                # To the last digit, so that both halves of a tie are written as transformers writes them.
                assert seconds.tolist() == [i / fps for i in (*want, n)]


# decord 0.6.0 takes other frames than these in the middle of such files, or finds none: with either version of data.py.
DECORD_MISCOUNTS = [("clip.avi", "libx264"), ("clip.mpg", "mpeg2video"), ("clip.ts", "libx264"),
                    ("clip.m2ts", "libx264"), ("clip.wmv", "wmv2")]


@pytest.mark.parametrize("name, codec, rate", [
    ("clip.webm", "libvpx-vp9", Fraction(30000, 1001)), ("clip.mkv", "libx264", Fraction(24000, 1001)),
    ("clip.mp4", "libx264", Fraction(30000, 1001)), ("clip.avi", "libx264", 25), ("clip.mpg", "mpeg2video", 25),
    ("clip.ts", "libx264", 25), ("clip.m2ts", "libx264", 30), ("clip.flv", "libx264", 30), ("clip.wmv", "wmv2", 25),
    ("clip.mov", "mjpeg", 25), ("clip.mxf", "mpeg2video", 25), ("clip.avi", "mpeg4", 25)])
def test_containers_of_a_constant_rate(tmp_path, monkeypatch, name, codec, rate):
    """Times in milliseconds (mkv, webm, flv), in 1/90000 s (ts), and none at all, as these avi and mpg have them."""
    path, want, chosen = tmp_path / name, formula(100, float(rate), SMALL), []
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(100):
            grey = np.full((48, 64, 3), (40, 200, 90, 150)[i % 4] + i // 4, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    choose = data.sample_frames

    def chooses(*args):
        chosen.extend(choose(*args)[0].tolist())
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(data, "sample_frames", chooses)
        data.decode_video(path, SMALL)
    assert chosen == want
    assert data.CONTAINER.match(data.first_bytes(path))
    if (name, codec) not in DECORD_MISCOUNTS:
        _, levels = shown(path)
        assert len(levels) == 100 and np.abs(levels_of(path) - levels[want]).max() < 2


@pytest.mark.parametrize("size", [(16, 16), (2, 2), (16, 400), (400, 16), (24, 18), (48, 50), (72, 18), (18, 18)])
def test_narrow_videos(tmp_path, size):
    path = write_video(tmp_path / "clip.mp4", range(0, 2000, 40), size=size)
    _, levels = shown(path)
    assert np.abs(levels_of(path) - levels[formula(50, 25, SMALL)]).max() < 2


def test_the_columns_of_a_narrow_video(tmp_path):
    path = tmp_path / "clip.mp4"
    picture = np.repeat(np.array([20, 220], np.uint8), 8)[None, :, None].repeat(24, axis=0).repeat(3, axis=2)  # 24 x 16
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 24, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    pixels, _ = data.read_video(path, SMALL)
    assert abs(pixels[:, :, :20].mean() - 20) < 4 and abs(pixels[:, :, -20:].mean() - 220) < 4


# ----------------------------------------------------------------------------------------------------------------------
# Images.

@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(tmp_path, orientation):
    upright = Image.fromarray(np.array([[0, 80], [160, 240]], np.uint8)).resize((64, 64), Image.Resampling.NEAREST)
    T = Image.Transpose
    stored = {1: [], 2: [T.FLIP_LEFT_RIGHT], 3: [T.ROTATE_180], 4: [T.FLIP_TOP_BOTTOM], 5: [T.TRANSPOSE],
              6: [T.ROTATE_90], 7: [T.TRANSVERSE], 8: [T.ROTATE_270]}[orientation]
    image = upright
    for step in stored:
        image = image.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("x.jpg", "x.png"):
        image.save(tmp_path / name, exif=exif)
        pixels = data.read_image(tmp_path / name, SMALL)[0, :, :, 0]
        got = [[pixels[y, x] for x in (14, 42)] for y in (14, 42)]
        assert np.abs(np.array(got, float) - [[0, 80], [160, 240]]).max() < 4


# ----------------------------------------------------------------------------------------------------------------------
# What is no video, and what cannot be opened.

@pytest.fixture
def secret(tmp_path):
    return write_video(tmp_path / "secret.mkv", range(0, 2000, 40))


def playlists(secret):
    return {"hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2.0,\n{secret}\n#EXT-X-ENDLIST\n",
            "ffconcat": f"ffconcat version 1.0\nfile {secret}\n",
            "dash": '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
            "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9999 RTP/AVP 96\n",
            "text": "no video", "empty": ""}


@pytest.mark.parametrize("kind", ["hls", "ffconcat", "dash", "sdp", "text", "empty"])
def test_what_names_other_files_is_no_video(tmp_path, secret, kind, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_text(playlists(secret)[kind])
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("handed to decord"))
    with pytest.raises(ValueError, match="clip.mp4: begins with .*, as no video"):
        data.read_video(path, SMALL)


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket"])
@pytest.mark.parametrize("cache", ["", "cache"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, monkeypatch, kind, cache):
    path = tmp_path / "clip.mp4"
    if kind == "socket":
        monkeypatch.chdir(tmp_path)  # the name of a socket must be short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    else:
        os.mkfifo(path) if kind == "fifo" else path.mkdir()
    start = time.monotonic()
    settings = replace(SMALL, cache=cache and str(tmp_path / cache))
    for read in (data.cached_video, data.read_image):
        with pytest.raises(ValueError, match="clip.mp4: not a regular file"):
            read(path, settings)
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("cache", ["", "cache"])
@pytest.mark.parametrize("kind", ["name", "stat", "open"])
def test_what_we_may_not_open_is_a_bad_sample(tmp_path, monkeypatch, kind, cache):
    path, stat = write_video(tmp_path / "clip.mp4", range(0, 400, 40)), os.stat
    settings = replace(SMALL, cache=cache and str(tmp_path / cache))

    def denied(name, *args, **kwargs):
        if str(name) == str(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(name))
        return (stat if kind == "stat" else open)(name, *args, **kwargs)

    if kind == "name":
        path = tmp_path / ("x" * 300)
    elif kind == "stat":
        monkeypatch.setattr(os, "stat", denied)
    else:
        monkeypatch.setattr(data, "open", denied, raising=False)
    for read in (data.cached_video, data.read_image):
        with pytest.raises(ValueError, match="File name too long" if kind == "name" else "Permission denied"):
            read(path, settings)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
def test_what_this_machine_lacks_is_no_bad_sample(tmp_path, monkeypatch, number):
    def fails(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    video = Question("1", "q", write_video(tmp_path / "clip.mp4", range(0, 400, 40)), None)
    Image.new("L", (9, 9)).save(tmp_path / "now.png")
    image = Question("2", "q", None, tmp_path / "now.png")
    dataset = VideoDataset([video, image], None, None, SMALL, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", fails)
        with pytest.raises(OSError):
            dataset[0, 0]
    monkeypatch.setattr(data, "open", fails, raising=False)
    for i in range(2):
        with pytest.raises(OSError):
            dataset[0, i]


def test_a_codec_that_is_missing_is_named(tmp_path, monkeypatch):
    path = write_video(tmp_path / "clip.mp4", range(0, 400, 40), "libsvtav1", size=(64, 64))
    with pytest.raises(ValueError, match=r"clip.mp4: .*codec av1 \(Main\) is none that decord decodes$"):
        data.read_video(path, SMALL)
    monkeypatch.setitem(sys.modules, "av", None)  # not installed
    with pytest.raises(ValueError, match="clip.mp4: DECORDError: .*cannot find video stream"):
        data.read_video(path, SMALL)


def test_other_errors_are_not_blamed_on_the_codec(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise data.decord.DECORDError("Failed to measure duration")

    path = write_video(tmp_path / "clip.mp4", range(0, 400, 40))
    monkeypatch.setattr(data.decord, "VideoReader", fails)
    with pytest.raises(ValueError, match="clip.mp4: DECORDError: Failed to measure duration"):
        data.read_video(path, SMALL)


def test_sound_alone_is_no_codec_that_is_missing(tmp_path):
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match="clip.mp4: DECORDError: .*cannot find video stream"):
        data.read_video(tmp_path / "clip.mp4", SMALL)


# ----------------------------------------------------------------------------------------------------------------------
# The cache.

def twice(path, settings):
    """The pixels both times, and the warnings of each time."""
    said = []
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pixels, _ = data.cached_video(path, settings)
        assert np.array_equal(pixels, data.read_video(path, settings)[0])
        said.append([str(warning.message) for warning in caught])
    return said


def test_a_full_cache_warns_once(tmp_path):
    path, cache = write_video(tmp_path / "clip.mp4", range(0, 400, 40)), tmp_path / "cache"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))  # no file may become longer
    try:
        first, second = twice(path, replace(SMALL, cache=str(cache)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(first) == 1 and "the frame cache" in first[0] and str(cache) in first[0] and not second
    assert not list(cache.iterdir())


@pytest.mark.parametrize("kind", ["below a file", "read-only"])
def test_a_cache_that_cannot_be_written_warns_once(tmp_path, monkeypatch, kind):
    path, cache = write_video(tmp_path / "clip.mp4", range(0, 400, 40)), tmp_path / "cache"
    if kind == "below a file":
        cache.touch()
    else:
        cache.mkdir()

    def read_only(name, mode="r", *args, **kwargs):
        if "w" in mode and isinstance(name, Path):
            raise OSError(errno.EROFS, "Read-only file system", str(name))
        return open(name, mode, *args, **kwargs)

    monkeypatch.setattr(data, "open", read_only, raising=False)
    first, second = twice(path, replace(SMALL, cache=str(cache)))
    assert len(first) == 1 and ("Read-only" in first[0] or kind != "read-only") and not second


# ----------------------------------------------------------------------------------------------------------------------
# Workers.

class Large(torch.utils.data.Dataset):
    """Examples of 5 MB, far more than a pipe holds; the second one may kill its worker, the third one take minutes."""

    def __init__(self, fatal=False, busy=False):
        self.fatal, self.busy = fatal, busy

    def __getitem__(self, key):
        if self.busy and key[1] > 1:
            time.sleep(200)
        if self.fatal and key == (0, 1):
            time.sleep(1)  # until the first one has been passed on
            os.kill(os.getpid(), signal.SIGKILL)
        ids = torch.arange(key[1] + 1)
        return Example(Question(str(os.getpid()), "q", None, None), (), "", "", ids, ids.expand(3, -1),
                       torch.full((4000, 1176), key[1], dtype=torch.uint8), torch.tensor([[1, 2, 3]]))


def in_memory():
    """torch's names in /dev/shm, torch_(process)_..., and what this process maps of them, also if the name is gone."""
    maps = [line.split("/")[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/torch_" in line]
    return {name for name in [*os.listdir("/dev/shm"), *maps] if name.startswith("torch_")}


@pytest.mark.parametrize("fatal", [False, True])
def test_workers_use_no_shared_memory(fatal):
    kept, seen = [], set()
    loader = data.make_loader(Large(fatal), [[(0, i)] for i in range(6)], num_workers=1)
    try:
        for batch in loader:
            kept += batch
            seen |= in_memory()
    except RuntimeError as error:
        assert fatal and "worker" in str(error)
    assert len(kept) == (1 if fatal else 6)
    for i, example in enumerate(kept):
        assert torch.equal(example.prompt_ids, torch.arange(i + 1)) and example.position_ids.shape == (3, i + 1)
        assert torch.equal(example.pixel_values_videos, torch.full((4000, 1176), i, dtype=torch.uint8))
        assert example.video_grid_thw.tolist() == [[1, 2, 3]] and example.pixel_values is None
        example.pixel_values_videos.add_(1)  # memory of its own
    ours = {example.question.id for example in kept} | {str(os.getpid())}  # others may use torch on this machine
    assert not [name for name in seen | in_memory() if name.split("_")[1] in ours]


def test_workers_outlive_signals_to_the_group():
    loader = iter(data.make_loader(Large(), [[(0, i)] for i in range(8)], num_workers=1))
    worker = int(next(loader)[0].question.id)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker, number)
    assert [int(batch[0].question.id) for batch in loader] == [worker] * 7


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("busy", [False, True])  # else they hold batches that nobody will take, more than a pipe does
@pytest.mark.parametrize("ending, status", [("os.kill(os.getpid(), 9)", -9), ("sys.exit(3)", 3)])
def test_workers_end_with_the_trainer(tmp_path, ending, status, busy):
    script = tmp_path / "trainer.py"
    script.write_text(
        f"import os, sys, time\nsys.path[:0] = {[os.path.dirname(data.__file__), os.path.dirname(__file__)]}\n"
        "import data, test_videos\n"
        f"dataset, batches = test_videos.Large(busy={busy}), [[(0, i)] for i in range(50)]\n"
        "loader = iter(data.make_loader(dataset, batches, num_workers=2))\n"
        "print(*(next(loader)[0].question.id for _ in range(2)), flush=True)\n"
        f"time.sleep(1)\n{ending}\n")
    trainer = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    start = time.monotonic()
    try:
        assert len(set(workers)) == 2 and trainer.wait(30) == status
        while any(map(running, workers)):
            assert time.monotonic() - start < 30
            time.sleep(0.1)
    finally:
        for pid in filter(running, [trainer.pid, *workers]):
            os.kill(pid, signal.SIGKILL)
        trainer.stdout.close()


# ----------------------------------------------------------------------------------------------------------------------
# The command.

def check(root, *flags):
    done = subprocess.run([sys.executable, data.__file__, "x.jsonl", "--data_root", root, *flags], text=True,
                          capture_output=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def root(tmp_path):
    for folder in ("videos/s", "images/s"):
        (tmp_path / folder).mkdir(parents=True)
    write_video(tmp_path / "videos/s/a.mp4", range(0, 400, 40))
    Image.new("L", (9, 9)).save(tmp_path / "images/s/a.png")
    return tmp_path


def write_records(root, *names):
    """One question for each (video, image)."""
    (root / "x.jsonl").write_text("\n".join(json.dumps(
        {"sample_id": i, "video_source": "s", "task_goal": "g", "question": "q", "video_basename": video,
         "task_progress_metadata": [{"narration_text": "x"}] if video else [], "current_observation_basename": image,
         "answer": "yes", "negative_answers": ["no"]}) for i, (video, image) in enumerate(names)))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_command_reads_all_files_and_fills_the_cache(root, workers):
    write_records(root, ("a.mp4", "a.png"), ("", "a.png"), ("a.mp4", "a.png"))
    flags = ("--frame_cache", str(root / "cache"), "--image_size", "56", "--num_frames", "8", "--num_workers", workers)
    status, out, error = check(root, *flags)
    assert status == 0 and out.strip() == "3 questions, 2 with video, 3 with image; 0 unreadable", (out, error)
    (cached,) = (root / "cache").iterdir()
    want, _ = data.read_video(root / "videos/s/a.mp4", SMALL)
    with open(cached, "rb") as file:
        assert np.array_equal(np.load(file), want)
        end = file.tell()
    content = cached.read_bytes()
    cached.write_bytes(content[:end - 3] + b"\1\2\3" + content[end:])  # what training reads from then on
    again, _ = data.cached_video((root / "videos/s/a.mp4").resolve(), replace(SMALL, cache=str(root / "cache")))
    assert again[-1, -1, -1].tolist() == [1, 2, 3]


def test_the_command_lists_what_cannot_be_read(root):
    (root / "videos/s/b.mp4").write_text("#EXTM3U")
    write_records(root, ("a.mp4", "a.png"), ("b.mp4", "a.png"), ("a.mp4", "gone.png"))
    status, out, _ = check(root)
    assert status == 1
    assert out.splitlines()[0] == "3 questions, 3 with video, 3 with image; 2 unreadable"
    first, second = out.splitlines()[1:]
    assert first.startswith("1: ") and "b.mp4" in first and second.startswith("2: ") and "gone.png" in second


@pytest.mark.parametrize("text, flags, says", [
    ('{"a": 1}', (), "x.jsonl, line 1: the record has the keys ['a']"), ("{", (), "x.jsonl, line 1: is not JSON"),
    (None, (), "x.jsonl: cannot be read"), ("good", ("--image_size", "250"), "image_size is 250")])
def test_the_command_refuses_in_one_line(root, text, flags, says):
    if text == "good":
        write_records(root, ("a.mp4", "a.png"))
    elif text:
        (root / "x.jsonl").write_text(text)
    status, out, error = check(root, *flags)
    assert status == 1 and not out and len(error.splitlines()) == 1 and says in error
