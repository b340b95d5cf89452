import gzip
import os
from pathlib import Path

import pytest
import torch

from lit_distill.datamodules import MNISTDataModule

SIZES = {"train": 40, "t10k": 10}


def idx(data: torch.Tensor) -> bytes:
    shape = b"".join(size.to_bytes(4, "big") for size in data.shape)
    return bytes([0, 0, 8, data.ndim]) + shape + data.numpy().tobytes()


def write_mnist(root: Path, packed: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    content = {}
    for part, size in SIZES.items():
        images = torch.randint(0, 256, (size, 28, 28), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 10, (size,), dtype=torch.uint8, generator=generator)
        content[part] = images, labels
        for name, data in [("images-idx3-ubyte", images), ("labels-idx1-ubyte", labels)]:
            blob = idx(data)
            path = raw / f"{part}-{name}{'.gz' if packed else ''}"
            path.write_bytes(gzip.compress(blob) if packed else blob)
    return content


@pytest.mark.parametrize("packed", [True, False])
def test_files_are_read_where_they_lie(tmp_path, packed):
    content = write_mnist(tmp_path, packed)
    before = sorted(tmp_path.rglob("*"))
    data = MNISTDataModule(root=str(tmp_path))
    data.prepare_data()
    data.setup("fit")
    (train, train_labels), (val, val_labels) = data.images("train"), data.images("val")
    assert train.shape == (36, 1, 28, 28) and val.shape == (4, 1, 28, 28)
    assert torch.equal(torch.cat([train, val])[:, 0], content["train"][0])
    assert torch.equal(torch.cat([train_labels, val_labels]), content["train"][1].long())
    test, labels = data.images("test")
    assert torch.equal(test[:, 0], content["t10k"][0])
    assert torch.equal(labels, content["t10k"][1].long()) and labels.dtype == torch.int64
    assert sorted(tmp_path.rglob("*")) == before


def test_environment_names_the_collection(tmp_path, monkeypatch):
    write_mnist(tmp_path / "mnist", packed=True)
    monkeypatch.setenv("LIT_DISTILL_DATA", str(tmp_path))
    assert len(MNISTDataModule().images("test")[0]) == 10


def test_missing_data_name_both_options(tmp_path, monkeypatch):
    monkeypatch.delenv("LIT_DISTILL_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"No folder .*option root.*LIT_DISTILL_DATA"):
        MNISTDataModule().setup("fit")
    with pytest.raises(FileNotFoundError, match=r"nowhere .* missing.*root.*LIT_DISTILL_DATA"):
        MNISTDataModule(root=str(tmp_path / "nowhere")).setup("fit")
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte.*root.*LIT_DISTILL_DATA"):
        MNISTDataModule(root=str(tmp_path)).setup("fit")


def test_wrong_and_damaged_files(tmp_path):
    content = write_mnist(tmp_path, packed=True)
    raw = tmp_path / "MNIST" / "raw"
    packed = raw / "train-images-idx3-ubyte.gz"
    whole = packed.read_bytes()
    for damaged in [whole[: len(whole) // 2], b"no gzip", whole[:5000] + b"x" * 9 + whole[5009:]]:
        packed.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz is damaged .*again"):
            MNISTDataModule(root=str(tmp_path)).setup("fit")
    images, labels = content["train"]
    for wrong in [idx(labels), idx(images)[:-1], idx(images) + b"x", b""]:
        (raw / "train-images-idx3-ubyte").write_bytes(wrong)
        with pytest.raises(ValueError, match="is not a whole MNIST file with 3 dimensions"):
            MNISTDataModule(root=str(tmp_path)).setup("fit")


def test_download_is_asked_for_only_where_files_are_missing(tmp_path, monkeypatch):
    import torchvision.datasets

    asked = []
    monkeypatch.setattr(
        torchvision.datasets, "MNIST", lambda root, download: asked.append((root, download))
    )
    MNISTDataModule(root=str(tmp_path / "new"), download=False).prepare_data()
    assert not asked
    MNISTDataModule(root=str(tmp_path / "new"), download=True).prepare_data()
    assert asked == [(tmp_path / "new", True)]
    write_mnist(tmp_path, packed=True)
    MNISTDataModule(root=str(tmp_path), download=True).prepare_data()
    assert len(asked) == 1


@pytest.mark.skipif("LIT_DISTILL_DATA" not in os.environ, reason="LIT_DISTILL_DATA is not set")
def test_real_mnist():
    data = MNISTDataModule()
    sizes = {split: len(data.images(split)[0]) for split in ("train", "val", "test")}
    assert sizes == {"train": 55_000, "val": 5_000, "test": 10_000}
    train, labels = data.images("train")
    assert labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # as published
    assert abs(train.float().mean() / 255 - 0.1307) < 1e-3
    assert data.images("test")[1][:5].tolist() == [7, 2, 1, 0, 4]
