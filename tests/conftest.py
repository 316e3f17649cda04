"""What several test files share: the toy world, its base model, and a batch of examples of different shapes."""
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch: these tests are about CPUs, on any machine
os.environ["USE_HUB_KERNELS"] = "NO"  # before transformers, whose kernels have no source for float64.py to read

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "assets/toy_base"), str(ROOT / "docs")]

import float64  # noqa: E402
import toy  # noqa: E402
from data import FAMILIES, PixelSettings, VideoDataset, load_questions  # noqa: E402
from runtime import load_tokenizer, setup  # noqa: E402

# One thread: a tiny model gains nothing from two, and two crawl when another process wants a core.
torch.set_num_threads(1)

float64.lift()


def pytest_configure(config):
    """Builds the toy world before there are workers (pytest-xdist), which would build it at the same time."""
    if not hasattr(config, "workerinput"):
        toy.build()


QWEN2_VL = FAMILIES["qwen2_vl"]  # the family of the toy world's base
# 4 or 6 frames of the toy world's videos of 8 or 12 s, so that prompts are ragged.
PIXELS = PixelSettings(fps=0.5, image_size=56)


@pytest.fixture(autouse=True)
def survive(monkeypatch):
    """The end of a script that runs in this process is not that of the tests."""
    monkeypatch.setattr("runtime.end", sys.exit)


@pytest.fixture(scope="session")
def world():
    """The data root of the toy world."""
    return toy.build()


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(str(toy.BASE))


@pytest.fixture(scope="session")
def device():
    return setup()[2]


@pytest.fixture(scope="session")
def dataset(world, tokenizer):
    return VideoDataset(load_questions("annotations/training_6k.jsonl", world), tokenizer, QWEN2_VL, PIXELS, seed=0)


@pytest.fixture(scope="session")
def ragged(dataset):
    """Four examples of different lengths: image only, and videos of 4 and 6 frames; goals of few and of many words."""
    examples, drawn = [], [dataset[0, i] for i in range(40)]
    for grid_t in (None, 2, 3, 3):
        of_size = [e for e in drawn if (e.video_grid_thw is None) == (grid_t is None)
                   and (grid_t is None or e.video_grid_thw[0, 0] == grid_t)]
        lengths = {len(other.prompt_ids) for other in examples}
        examples.append(next(e for e in of_size if len(e.prompt_ids) not in lengths))
    assert len({len(e.prompt_ids) for e in examples}) == 4 and not any(e.error for e in examples)
    return examples


def same_gradients(model_a, model_b, rtol):
    """Compares all gradients by norm: elementwise, tiny entries would drown in rounding."""
    for (name, a), (_, b) in zip(model_a.named_parameters(), model_b.named_parameters(), strict=True):
        if a.grad is None and b.grad is None:
            continue
        difference = torch.linalg.vector_norm((a.grad - b.grad).double()).item()
        size = torch.linalg.vector_norm(b.grad.double()).item()
        assert difference <= rtol * size + 1e-12, f"{name}: {difference} against {size}"
