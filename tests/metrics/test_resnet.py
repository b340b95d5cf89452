"""The CIFAR-10 classifier: its accuracy on real test images, and files that are none of it."""

import os
from pathlib import Path

import pytest
import torch

from lit_distill.metrics import ResNet56Extractor, describe, label_accuracy
from lit_distill.metrics.resnet import ResNet56

FILE = Path(os.environ.get("LIT_DISTILL_DATA", ""), "weights", "resnet56-4bfd9763.th")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Random weights under the published names."""
    state = {f"module.{name}": t for name, t in ResNet56().state_dict().items()}
    state = {name: t for name, t in state.items() if "num_batches" not in name}
    assert len(state) == 277
    torch.save({"best_prec1": 10.0, "state_dict": state}, tmp_path / "resnet56.th")
    return tmp_path / "resnet56.th"


def accuracy(count: int) -> float:
    if not os.environ.get("LIT_DISTILL_DATA") or not FILE.is_file():
        pytest.skip("LIT_DISTILL_DATA does not name a folder with weights/resnet56-4bfd9763.th")
    from lit_distill.datamodules import CIFAR10DataModule

    images, labels = CIFAR10DataModule().images("test")
    assert labels is not None
    found = describe(ResNet56Extractor(), images[:count], labels[:count])
    assert found.logits is not None and found.features.shape == (count, 64)
    return label_accuracy(found.logits, labels[:count])


@pytest.mark.full
def test_accuracy_on_all_test_images_is_the_published_one() -> None:
    assert accuracy(10_000) == pytest.approx(0.9339, abs=5e-4)


def test_the_network_has_the_published_size() -> None:
    assert sum(p.numel() for p in ResNet56().parameters()) == 853_018


def test_shortcuts_skip_pixels_and_add_empty_channels_on_both_sides() -> None:
    block = ResNet56().layer2[0].eval()
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)  # only the shortcut is left
    x = torch.rand(2, 16, 4, 4)
    out = block(x)
    assert out.shape == (2, 32, 2, 2)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


def test_it_is_a_frozen_extractor_of_cifar10_images(weights: Path) -> None:
    extractor = ResNet56Extractor(weights).train()
    assert extractor.name == "resnet56" and not extractor.training
    assert not any(p.requires_grad for p in extractor.parameters())
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    features, logits = extractor.features_and_logits(images)
    assert features.shape == (3, 64) and logits.shape == (3, 10)
    # Normalised as in its training, with the mean and deviation of a channel.
    scaled = (images / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
        [0.229, 0.224, 0.225]
    ).view(3, 1, 1)
    assert torch.allclose(extractor.network(scaled)[1], logits, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="takes images of shape"):
        extractor(images[..., :28])


def test_a_missing_file_says_where_it_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match="akamaster/pytorch_resnet_cifar10"):
        ResNet56Extractor(tmp_path / "none.th")
    monkeypatch.setenv("LIT_DISTILL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"weights/resnet56-4bfd9763\.th: fetch"):
        ResNet56Extractor()
    monkeypatch.delenv("LIT_DISTILL_DATA")
    with pytest.raises(FileNotFoundError, match="option weights of ResNet56Extractor"):
        ResNet56Extractor()


@pytest.mark.parametrize("content", [{"state_dict": {}}, {"weights": 1}, [1, 2], None])
def test_another_file_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.th")
    if content is None:
        (tmp_path / "x.th").write_text("no weights")
    with pytest.raises(ValueError, match="does not hold the weights of the CIFAR-10 ResNet-56"):
        ResNet56Extractor(tmp_path / "x.th")
