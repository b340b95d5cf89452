import sys
from pathlib import Path
from types import SimpleNamespace

import jsonargparse
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from counted import CountedData, numbers_of

from lit_distill.datamodules import ImageDataModule, PairsDataModule, to_signed
from lit_distill.diffusion import seeded_noise


def teacher(image_shape=None, num_classes=None):
    return SimpleNamespace(image_shape=image_shape, num_classes=num_classes)


def test_values_are_exact_in_the_signed_range():
    levels = torch.arange(256, dtype=torch.uint8)
    values = to_signed(levels)
    assert values.dtype == torch.float32
    assert values[0] == -1 and values[255] == 1
    assert torch.equal(values, levels.float() / 127.5 - 1)
    assert torch.equal(((values + 1) * 127.5).round().to(torch.uint8), levels)


def test_training_batches_hold_images_with_their_labels():
    data = CountedData(batch_size=8)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (8, 1, 2, 2) and batch["image"].dtype == torch.float32
    assert batch["label"].dtype == torch.int64
    assert batch["label"].tolist() == [number % 3 for number in numbers_of(batch)]


def test_flip_adds_each_mirrored_image_once():
    data = CountedData(batch_size=8, flip=True)
    loader = data.train_dataloader()
    assert len(loader) == 11  # 88 items
    pixels = torch.cat([((b["image"] + 1) * 127.5).round().long() for b in loader]).flatten(1)
    # An image ends with the pixels 0, 255; its mirror image with 255, 0 and a swapped number.
    plain = pixels[pixels[:, 3] == 255]
    mirrored = pixels[pixels[:, 2] == 255]
    assert sorted((plain[:, 0] * 256 + plain[:, 1]).tolist()) == list(range(44))
    assert sorted((mirrored[:, 1] * 256 + mirrored[:, 0]).tolist()) == list(range(44))
    assert len(data.val_dataloader().items) == 2  # evaluation sees real images only


def test_evaluation_goes_through_each_split_in_order():
    data = CountedData(batch_size=4)
    for loader, count in [(data.val_dataloader(), 9), (data.test_dataloader(), 5)]:
        batches = list(loader)
        assert [n for batch in batches for n in numbers_of(batch)] == list(range(count))
        assert max(len(batch["image"]) for batch in batches) <= 4


def test_predict_items_do_not_depend_on_batches_or_processes():
    data = CountedData(predict_samples=10, predict_batch_size=4, predict_seed=7)
    items = list(data.predict_dataloader())
    assert [item["index"].tolist() for item in items] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    noise = torch.cat([item["noise"] for item in items])
    assert torch.equal(noise, seeded_noise((1, 2, 2), range(7, 17)))
    assert torch.cat([item["label"] for item in items]).tolist() == [i % 3 for i in range(10)]
    shares = []
    for rank in range(2):
        part = CountedData(predict_samples=10, predict_batch_size=4, predict_seed=7)
        part.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        shares += list(part.predict_dataloader())
    shares.sort(key=lambda item: int(item["index"][0]))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(items, shares, strict=True) for k in a)


def test_predict_leaves_out_what_is_done():
    data = CountedData(predict_samples=10, predict_batch_size=4)
    data.skip_predict = {1}
    assert [int(item["index"][0]) for item in data.predict_dataloader()] == [0, 8]
    data.skip_predict = {0, 1, 2}
    assert list(data.predict_dataloader()) == []


def test_unlabelled_data_give_no_labels():
    class Unlabelled(CountedData):
        num_classes = None

        def load(self, split):
            return super().load(split)[0], None

    data = Unlabelled(batch_size=8)
    assert set(next(iter(data.train_dataloader()))) == {"image"}
    assert set(next(iter(data.predict_dataloader()))) == {"index", "noise"}
    with pytest.raises(ValueError, match="knows 3 classes, but the data set 'counted' has no lab"):
        data.check_teacher(teacher(num_classes=3))


def test_teacher_must_fit_the_data():
    data = CountedData()
    data.check_teacher(teacher())
    data.check_teacher(teacher((1, 2, 2), 3))
    with pytest.raises(ValueError, match=r"shape \(3, 2, 2\).*'counted' have shape \(1, 2, 2\)"):
        data.check_teacher(teacher((3, 2, 2)))
    with pytest.raises(ValueError, match=r"knows 10 classes.* has 3 classes.*option teacher"):
        data.check_teacher(teacher(num_classes=10))


@pytest.mark.parametrize("option", ["batch_size", "predict_samples", "predict_batch_size"])
def test_sizes_must_be_positive(option):
    with pytest.raises(ValueError, match=f"{option}=0: it must be at least 1"):
        CountedData(**{option: 0})


def test_unknown_split():
    with pytest.raises(ValueError, match="'valid' is no split"):
        CountedData().images("valid")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 1, 2, 2), torch.zeros(4).long(), "float32 of shape"),
        (torch.zeros(4, 3, 2, 2).byte(), torch.zeros(4).long(), r"shape \(4, 3, 2, 2\)"),
        (torch.zeros(0, 1, 2, 2).byte(), torch.zeros(0).long(), r"shape \(0, 1, 2, 2\)"),
        (torch.zeros(4, 1, 2, 2).byte(), None, "do not fit num_classes"),
        (torch.zeros(4, 1, 2, 2).byte(), torch.zeros(3).long(), "for each of its 4 images"),
        (torch.zeros(4, 1, 2, 2).byte(), torch.full((4,), 3), "one class below 3"),
    ],
)
def test_what_a_subclass_loads_is_checked(images, labels, message):
    class Wrong(CountedData):
        def load(self, split):
            return images, labels

    with pytest.raises(ValueError, match=message):
        Wrong().setup("test")


def test_a_stage_reads_only_what_it_needs():
    class Noting(CountedData):
        def load(self, split):
            read.append(split)
            return super().load(split)

    for stage, splits in [("fit", ["train", "val"]), ("test", ["test"]), ("predict", [])]:
        read: list[str] = []
        data = Noting(batch_size=8)
        data.setup(stage)
        data.setup(stage)
        assert read == splits


def test_options_of_the_base_reach_the_command_line():
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(ImageDataModule, "data")
    arguments = ["--data=lit_distill.datamodules.PairsDataModule", "--data.folder=pairs"]
    arguments += ["--data.data=lit_distill.datamodules.MNISTDataModule", "--data.data.root=here"]
    arguments += ["--data.batch_size=7", "--data.data.predict_seed=3", "--data.data.flip=true"]
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # before 4.49
    data = instantiate(parser.parse_args(arguments)).data
    assert isinstance(data, PairsDataModule)
    assert data.batch_size == 7
    assert (data.data.root, data.data.predict_seed, data.data.flip) == ("here", 3, True)
    assert "mnist" in str(data.data)
