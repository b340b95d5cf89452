"""Extractors: accuracy on data never trained on, checks of the input, and their weight files."""

import dataclasses
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch import Tensor, nn

from lit_distill.metrics import extractors, train_extractors
from lit_distill.metrics.extractors import (
    WEIGHTS_FOLDER,
    ClassifierExtractor,
    DigitsExtractor,
    Extractor,
    InceptionExtractor,
    MNISTExtractor,
)

CLASSIFIERS = [DigitsExtractor, MNISTExtractor]


@pytest.fixture(params=CLASSIFIERS, ids=lambda c: c.name)
def classifier(request: pytest.FixtureRequest) -> ClassifierExtractor:
    return request.param()


def digits(block: slice) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits, read without the package's own code."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images[block]) * 255 / 16
    return images.round().to(torch.uint8).unsqueeze(1), torch.tensor(data.target[block])


def random_images(extractor: Extractor, count: int = 33) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, *(extractor.image_shape or (3, 20, 24)))
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def test_digits_accuracy_on_new_writers() -> None:
    images, labels = digits(slice(1397, 1797))
    assert len(images) == 400
    correct = DigitsExtractor().logits(images).argmax(1) == labels
    assert correct.double().mean() >= 0.97


def test_larger_digits_are_seen_as_their_own_size() -> None:
    images, _ = digits(slice(0, 20))
    large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(DigitsExtractor(scale=2)(large), DigitsExtractor()(images))
    with pytest.raises(ValueError, match="scale=0"):
        DigitsExtractor(scale=0)


def test_mnist_accuracy() -> None:
    if not os.environ.get("LIT_DISTILL_DATA"):
        pytest.skip("LIT_DISTILL_DATA does not name a folder with mnist/")
    from lit_distill.datamodules import MNISTDataModule

    images, labels = MNISTDataModule().images("test")
    assert len(images) == 10_000 and labels is not None
    assert train_extractors.accuracy(MNISTExtractor(), images, labels) >= 0.99


@pytest.mark.parametrize("name", [c.name for c in CLASSIFIERS])
def test_weight_files_are_small(name: str) -> None:
    assert (WEIGHTS_FOLDER / f"{name}.safetensors").stat().st_size <= 300_000


def test_features_and_logits(classifier: ClassifierExtractor) -> None:
    images = random_images(classifier)
    features, logits = classifier.features_and_logits(images)
    assert features.shape == (33, 64) == (33, classifier.num_features)
    assert logits.shape == (33, 10)
    assert features.dtype == logits.dtype == torch.float32
    assert torch.equal(classifier(images), features)
    assert torch.equal(classifier.logits(images), logits)
    assert classifier.classifies
    assert classifier(images[:0]).shape == (0, 64)


def test_same_features_in_any_batch(classifier: ClassifierExtractor) -> None:
    images = random_images(classifier)
    whole = classifier(images)
    assert torch.equal(classifier(images), whole)
    for size in (1, 7, 32):
        parts = torch.cat([classifier(part) for part in images.split(size)])
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_any_image_has_finite_features(classifier: ClassifierExtractor) -> None:
    shape = classifier.image_shape
    black, white = torch.zeros(shape), torch.full(shape, 255.0)
    stripes = white * (torch.arange(shape[-1]) % 2)
    images = torch.stack([black, white, stripes]).to(torch.uint8)
    images = torch.cat([images, random_images(classifier)])
    features, logits = classifier.features_and_logits(images)
    assert features.isfinite().all() and logits.isfinite().all()
    assert features.abs().max() < 100


def test_one_grey_level_moves_digits_features_little() -> None:
    """Smooth: rounding to uint8 must not decide a distance."""
    extractor = DigitsExtractor()
    images = digits(slice(1397, 1797))[0].clamp(1, 254)
    generator = torch.Generator().manual_seed(0)
    step = torch.randint(0, 2, images.shape, generator=generator, dtype=torch.uint8)
    moved = extractor(images + step) - extractor(images)
    spread = extractor(images).var(0).sum()
    assert 0 < moved.square().sum(1).mean() < 1e-3 * spread


def test_stays_frozen(classifier: ClassifierExtractor) -> None:
    parent = nn.ModuleList([classifier]).train()
    assert parent.training and not any(m.training for m in classifier.modules())
    assert not any(p.requires_grad for p in classifier.parameters())
    assert not classifier(random_images(classifier)).requires_grad


def test_autocast_does_not_reach_in(classifier: ClassifierExtractor) -> None:
    images = random_images(classifier)
    expected = classifier(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classifier(images), expected)


def test_building_leaves_the_random_state(classifier: ClassifierExtractor) -> None:
    before = torch.get_rng_state()
    type(classifier)()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_other_types_are_refused(classifier: ClassifierExtractor, dtype: torch.dtype) -> None:
    images = random_images(classifier).to(dtype)
    with pytest.raises(ValueError, match=f"{classifier.name} extractor takes uint8 images"):
        classifier(images)
    with pytest.raises(ValueError, match="uint8"):
        classifier.logits(images)


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 9, 8), (1, 8, 8), (2, 1, 28, 27)])
def test_other_shapes_are_refused(classifier: ClassifierExtractor, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes images of shape \(N, 1, ") as error:
        classifier(torch.zeros(shape, dtype=torch.uint8))
    assert str(shape) in str(error.value)


def test_missing_weights_name_the_script(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train_extractors mnist"):
        MNISTExtractor(tmp_path / "none.safetensors")


def test_torchmetrics_takes_it_without_a_probe() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(DigitsExtractor())  # a probe of 3x299x299 would raise
    images = digits(slice(1100))[0]
    blurred = nn.functional.avg_pool2d(images.float(), 3, 1, 1).to(torch.uint8)
    metric.update(images[::2], real=True)
    metric.update(images[1::2], real=False)
    floor = metric.compute()
    metric.reset()
    metric.update(images[::2], real=True)
    metric.update(blurred[1::2], real=False)
    assert metric.compute() > 5 * floor > 0


# Inception: the real weights are a download, so the network stands here with random ones.


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(nn.Module, "load_state_dict", lambda *_: None)
        network = inception.FeatureExtractorInceptionV3("x", ["2048"])
    torch.save(network.state_dict(), path)
    return path


def test_inception(inception_file: Path) -> None:
    before = torch.get_rng_state()
    extractor = InceptionExtractor(inception_file)
    assert torch.equal(torch.get_rng_state(), before)
    read = extractor.network.state_dict()
    for name, weight in torch.load(inception_file, weights_only=True).items():
        assert torch.equal(read[name], weight), name
    assert extractor.name == "inception" and not extractor.classifies
    colour = random_images(extractor, 1)
    features, logits = extractor.features_and_logits(colour)
    assert features.shape == (1, 2048) == (1, extractor.num_features)
    assert logits.shape == (1, 1008)
    assert torch.equal(extractor.network(colour)[0], features)  # torch-fidelity's own answer
    assert torch.equal(extractor(colour[:, :1]), extractor(colour[:, [0, 0, 0]]))
    for wrong, words in [(colour.float(), "uint8"), (colour[:, :2], "1 or 3 channels")]:
        with pytest.raises(ValueError, match=words):
            extractor(wrong)


def test_inception_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(extractors, "load_state_dict_from_url", fail)
    with pytest.raises(FileNotFoundError, match=r"no network.*option weights") as error:
        InceptionExtractor()
    assert "weights-inception-2015-12-05-6726825d.pth" in str(error.value)


def test_inception_file_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.pth"):
        InceptionExtractor(tmp_path / "none.pth")


class _Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_inception_file_of_something_else(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    files = {name: tmp_path / f"{name}.pth" for name in ("empty", "text", "trap", "other")}
    files["empty"].touch()
    files["text"].write_text("<html>not found</html>")
    files["trap"].write_bytes(pickle.dumps(_Trap(trap), protocol=2))
    torch.save({"weight": torch.zeros(2)}, files["other"])
    for path in files.values():
        with pytest.raises(ValueError, match="does not hold the weights") as error:
            InceptionExtractor(path)
        assert str(path) in str(error.value)
    assert not trap.exists()


# The training script.


@pytest.fixture(autouse=True)
def number_of_threads() -> Iterator[None]:
    threads = torch.get_num_threads()  # the script sets it
    yield
    torch.set_num_threads(threads)


def test_training_is_seeded_and_writes_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = dataclasses.replace(train_extractors.RECIPES["digits"], epochs=1)
    monkeypatch.setitem(train_extractors.RECIPES, "digits", recipe)
    for name, seed in [("a", "0"), ("b", "0"), ("c", "1")]:
        path = tmp_path / f"{name}.safetensors"
        train_extractors.main(["digits", "--seed", seed, "--out", str(path)])
    contents = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert len(contents) == 3  # nothing unfinished is left
    assert contents[0] == contents[1] != contents[2]
    assert capsys.readouterr().out.count("accuracy on test: ") == 3


def test_only_the_training_block_is_learned_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Tensor] = {}

    def train(network: nn.Module, images: Tensor, labels: Tensor, *_: object) -> dict[str, Tensor]:
        seen.update(images=images, labels=labels)
        return network.state_dict()

    monkeypatch.setattr(train_extractors, "train", train)
    train_extractors.main(["digits", "--out", str(tmp_path / "x.safetensors")])
    images, labels = digits(slice(1100))
    torch.testing.assert_close(seen["images"], images.float() / 127.5 - 1)
    assert torch.equal(seen["labels"], labels)


def test_distort() -> None:
    images = digits(slice(50))[0].float() / 127.5 - 1
    still = dataclasses.replace(
        train_extractors.RECIPES["digits"], shift=0.0, affine=0.0, elastic=0.0, contrast=0.0
    )
    generator = torch.Generator().manual_seed(0)
    unmoved = train_extractors.distort(images, still, generator)
    torch.testing.assert_close(unmoved, images, rtol=0, atol=1e-5)
    shifted = train_extractors.distort(images, dataclasses.replace(still, shift=1.0), generator)
    # A shift of standard deviation s moves the centre of the ink by s (a bit less at the edge).
    place = torch.arange(8.0)

    def centre(x: Tensor) -> Tensor:
        ink = (x + 1).sum(dim=(1, 2))
        return (ink * place).sum(1) / ink.sum(1)

    assert 0.7 < (centre(shifted) - centre(images)).std() < 1.2


@pytest.mark.full
def test_the_digits_recipe_still_works(tmp_path: Path) -> None:
    path = tmp_path / "digits.safetensors"
    train_extractors.main(["digits", "--seed", "1", "--out", str(path)])
    images, labels = digits(slice(1397, 1797))
    assert train_extractors.accuracy(DigitsExtractor(path), images, labels) >= 0.97
