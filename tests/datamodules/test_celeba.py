import os

import numpy as np
import pytest
import torch
from pictures import encoded, noise, plain, write_folder, write_zip
from PIL import Image

from lit_distill.datamodules import CelebADataModule

COUNT = 30


def faces(size=(109, 89)):
    """Thirty faces of one grey level each, their number."""
    return {
        f"img_align_celeba/{i:06d}.jpg": encoded(np.full((*size, 3), 8 * i, np.uint8), "jpeg")
        for i in range(COUNT)
    }


def numbers(data, split):
    images, labels = data.images(split)
    assert labels is None
    return [round(float(image.float().mean()) / 8) for image in images]


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("kind", ["folder", "img_align_celeba.zip", "celeba-10k-89x109.zip"])
def test_splits_by_number(tmp_path, kind, size):
    if kind == "folder":
        write_folder(tmp_path, faces())
    else:
        write_zip(tmp_path / kind, faces())
    data = CelebADataModule(root=str(tmp_path), image_size=size)
    data.setup("fit")
    assert data.image_shape == (3, size, size) == tuple(data.images("train")[0].shape[1:])
    assert data.num_classes is None
    assert numbers(data, "train") == list(range(24))
    assert numbers(data, "val") == [24, 25, 26] and numbers(data, "test") == [27, 28, 29]


def test_published_splits(tmp_path):
    write_folder(tmp_path, faces())
    rows = [f"{i:06d}.jpg {i % 3}\n" for i in range(COUNT - 1)]  # the last is not in the list
    (tmp_path / "list_eval_partition.txt").write_text("".join(rows))
    data = CelebADataModule(root=str(tmp_path), image_size=32)
    for place, split in enumerate(("train", "val", "test")):
        assert numbers(data, split) == list(range(place, COUNT - 1, 3))
    # A part of the data that lies in one split only.
    rows = [f"{i:06d}.jpg 0\n" for i in range(COUNT)]
    (tmp_path / "list_eval_partition.txt").write_text("".join(rows))
    data = CelebADataModule(root=str(tmp_path), image_size=32)
    assert numbers(data, "test") == [27, 28, 29]
    (tmp_path / "list_eval_partition.txt").write_text("202599\n")
    with pytest.raises(ValueError, match=r"list_eval_partition\.txt does not say the split"):
        CelebADataModule(root=str(tmp_path)).setup("fit")


def test_the_same_region_at_full_and_half_size(tmp_path):
    full = np.zeros((218, 178, 3), np.uint8)
    squares = noise(7)
    full[39:179, 19:159] = squares.repeat(20, 0).repeat(20, 1)  # 20x20 each, in the 140x140
    half = Image.fromarray(full).resize((89, 109), Image.Resampling.BOX)
    expected = torch.from_numpy(squares).permute(2, 0, 1).float()
    for name, picture in [("full", full), ("half", half)]:
        files = {f"{i}.jpg": encoded(picture, "jpeg", quality=100) for i in range(10)}
        write_folder(tmp_path / name / "img_align_celeba", files)
        data = CelebADataModule(root=str(tmp_path / name), image_size=28)
        middles = data.images("test")[0][0].float().unfold(1, 4, 4).unfold(2, 4, 4)[..., 1:3, 1:3]
        assert (middles.mean((-1, -2)) - expected).abs().mean() < 6


def test_missing_data(tmp_path, monkeypatch):
    monkeypatch.delenv("LIT_DISTILL_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"option root.*LIT_DISTILL_DATA.*mmlab") as error:
        CelebADataModule().setup("fit")
    assert "download: true" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"holds none of img_align_celeba, .*root.*mmlab"):
        CelebADataModule(root=str(tmp_path)).setup("fit")
    write_folder(tmp_path / "img_align_celeba", {"1.jpg": encoded(plain(0))})
    with pytest.raises(ValueError, match="has 1 images; for three splits 10 are needed"):
        CelebADataModule(root=str(tmp_path)).setup("fit")
    with pytest.raises(ValueError, match="image_size=0"):
        CelebADataModule(image_size=0)


@pytest.mark.skipif("LIT_DISTILL_DATA" not in os.environ, reason="LIT_DISTILL_DATA is not set")
def test_real_celeba(tmp_path):
    data = CelebADataModule(image_size=32, cache=str(tmp_path))
    images, _ = data.images("test")
    assert images.shape == (1_000, 3, 32, 32)
    faces = images.float().mean(0) / 255
    # The mean face: its eyes are darker than its nose, it has the colour of skin, left like right.
    assert faces[0, 16, 16] - faces[0, 16, [10, 20]].max() > 0.3
    assert faces[0].mean() > faces[2].mean() + 0.08
    assert (faces - faces.flip(-1)).abs().mean() < 0.03
    again = CelebADataModule(image_size=32, cache=str(tmp_path)).images("test")[0]
    assert torch.equal(images, again)
