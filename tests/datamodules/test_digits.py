import pytest
import torch
from sklearn.datasets import load_digits

from lit_distill.datamodules import DigitsDataModule


def test_digits_are_all_1797_split_by_blocks():
    data = DigitsDataModule()
    parts = [data.images(split) for split in ("train", "val", "test")]
    assert [len(images) for images, _ in parts] == [1100, 297, 400]
    images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    original = torch.from_numpy(load_digits().images)
    assert images.dtype == torch.uint8 and images.shape == (1797, 1, 8, 8)
    assert torch.equal(images[:, 0], (original * 255 / 16).round().to(torch.uint8))
    assert torch.equal((images[:, 0].double() * 16 / 255).round(), original)  # nothing is lost
    assert labels.tolist() == load_digits().target.tolist()


def test_a_pixel_becomes_a_square():
    large, _ = DigitsDataModule(scale=3).images("val")
    small, _ = DigitsDataModule().images("val")
    assert torch.equal(large, small.repeat_interleave(3, 2).repeat_interleave(3, 3))
    with pytest.raises(ValueError, match="scale=0"):
        DigitsDataModule(scale=0)


def test_batches_of_digits():
    loader = DigitsDataModule().train_dataloader()
    batch = next(iter(loader))
    assert len(loader) == 8  # 1,100 images in batches of 128
    assert batch["image"].shape == (128, 1, 8, 8)
    assert batch["image"].min() == -1 and batch["image"].max() == 1
    assert batch["label"].unique().tolist() == list(range(10))
