"""The CLIP score, on a small random model that is saved on the spot."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))
from small_clip import by_hand, clip_folder

from lit_distill.metrics import ClipScore

PROMPTS = ["a handwritten seven", "two", "the digit nine", "one " * 20]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return clip_folder(tmp_path_factory.mktemp("clip"), seed=2)  # of a score above 0


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)


def test_it_is_the_mean_cosine_of_the_embeddings(folder, images):
    cosines = by_hand(folder, images, PROMPTS)
    assert cosines.mean() > 0.05 and cosines.std() > 0.05
    score = ClipScore(folder)
    score.update(images[:3], PROMPTS[:3])
    score.update(images[3:], PROMPTS[3:])
    assert score.compute() == pytest.approx(100 * float(cosines.mean()), rel=1e-4)
    score.update(images[1:2], PROMPTS[1:2])  # of another set: nothing is left of the first
    assert score.compute() == pytest.approx(100 * float(cosines[1]), rel=1e-4)
    score.update(images[:1], PROMPTS[:1])
    assert cosines[0] < 0 == score.compute()


def test_grey_images_are_taken(folder, images):
    score = ClipScore(folder)
    grey = images[:, :1]
    score.update(grey, PROMPTS)
    expected = 100 * by_hand(folder, grey.expand(-1, 3, -1, -1), PROMPTS).mean()
    assert score.compute() == pytest.approx(float(expected), rel=1e-4)


def test_a_model_that_cannot_be_had_is_named(monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(FileNotFoundError, match=r"folder some/clip .*model.safetensors.*option mo"):
        ClipScore("some/clip")


def test_the_hub_is_asked_for_safetensors_alone(folder, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, **options: asked.update(options, name=name) or folder,
    )
    assert ClipScore("some/clip").name == asked["name"] == "some/clip"
    assert asked["allow_patterns"] == ["*.json", "*.txt", "model.safetensors"]


def test_a_folder_of_something_else_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="holds no CLIP model that can be read"):
        ClipScore(str(tmp_path))
    part = tmp_path / "part"
    shutil.copytree(folder, part)
    weights = load_file(part / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, part / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack text_projection.weight"):
        ClipScore(str(part))


def test_a_pickle_is_not_read(folder, tmp_path):
    part = tmp_path / "pickled"
    shutil.copytree(folder, part)
    torch.save(load_file(part / "model.safetensors"), part / "pytorch_model.bin")
    (part / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no CLIP model that can be read"):
        ClipScore(str(part))
