import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch

from lit_distill.datamodules import DigitsDataModule, PairsDataModule
from lit_distill.datamodules.pairs_folder import (
    Manifest,
    Shard,
    read_manifest,
    sha256,
    shard_name,
    write_atomically,
)

TEACHER = "c" * 64


def write_pairs(folder, labelled=True, **settings):
    """42 pairs in shards of 8; pixel (0, 0) of noise and image carries the index."""
    manifest = Manifest(
        **{
            "teacher": TEACHER, "solver": "heun", "steps": 18, "nfe": 35, "sigma_min": 0.002,
            "sigma_max": 80.0, "dtype": "float32", "seed": 0, "image_shape": [1, 8, 8],
            "num_classes": 10, "num_pairs": 42, "shard_size": 8, **settings,
        }
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    for number, file in enumerate(manifest.files):
        index = torch.arange(8 * number, 8 * number + manifest.count(number))
        image = torch.zeros(len(index), *manifest.image_shape)
        image[:, 0, 0, 0] = index
        pairs = {"index": index, "noise": image + 1000, "image": image, "label": index % 10}
        if not labelled:
            del pairs["label"]
        blob = safetensors.torch.save(pairs)
        (folder / file).write_bytes(blob)
        manifest.shards.append(Shard(file, sha256(blob), len(index)))
    manifest.complete = True
    manifest.write(folder)
    return manifest


def pairs_of(folder, **options):
    return PairsDataModule(DigitsDataModule(), str(folder), **{"batch_size": 10, **options})


def test_training_batches_are_rows_of_the_pairs(tmp_path):
    write_pairs(tmp_path)
    data = pairs_of(tmp_path)
    data.setup("fit")
    loader = data.train_dataloader()
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    seen = torch.cat([batch["index"] for batch in batches])
    assert len(seen.unique()) == 40
    for batch in batches:
        assert set(batch) == {"index", "noise", "image", "label"}
        assert torch.equal(batch["image"][:, 0, 0, 0], batch["index"].float())
        assert torch.equal(batch["noise"], batch["image"] + 1000)
        assert torch.equal(batch["label"], batch["index"] % 10)
    again = torch.cat([batch["index"] for batch in loader])
    assert torch.equal(seen, again)
    other = pairs_of(tmp_path, seed=1)
    other.setup("fit")
    assert not torch.equal(seen, torch.cat([batch["index"] for batch in other.train_dataloader()]))


def test_unconditional_pairs_have_no_labels(tmp_path):
    write_pairs(tmp_path, labelled=False)
    data = pairs_of(tmp_path)
    data.setup("fit")
    assert set(next(iter(data.train_dataloader()))) == {"index", "noise", "image"}


def test_real_images_are_those_of_the_data(tmp_path):
    data, digits = pairs_of(tmp_path / "absent"), DigitsDataModule(batch_size=10)
    assert (data.name, data.image_shape, data.num_classes) == ("digits", (1, 8, 8), 10)
    for stage in ("validate", "test", "predict"):
        data.setup(stage)  # needs no pairs
    for split in ("train", "val", "test"):
        assert torch.equal(data.images(split)[0], digits.images(split)[0])
    for ours, theirs in zip(data.test_dataloader(), digits.test_dataloader(), strict=True):
        assert torch.equal(ours["image"], theirs["image"])


def test_too_few_pairs_and_flip(tmp_path):
    write_pairs(tmp_path)
    data = pairs_of(tmp_path, batch_size=43)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"batch_size=43 needs at least 43 .* there are 42"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="flip: true cannot be used with pairs"):
        pairs_of(tmp_path, flip=True)


def teacher(fingerprint):
    known = {"image_shape": (1, 8, 8), "num_classes": 10, "original": None}
    return SimpleNamespace(**known, fingerprint=lambda: fingerprint)


def test_pairs_of_another_teacher(tmp_path):
    write_pairs(tmp_path)
    data = pairs_of(tmp_path)
    data.check_teacher(teacher("d" * 64))  # without training the pairs do not matter
    data.setup("fit")
    data.check_teacher(teacher(TEACHER))
    with pytest.raises(ValueError, match=r"another teacher than the one given .*dddd.*cccc"):
        data.check_teacher(teacher("d" * 64))
    with pytest.raises(ValueError, match="The teacher knows 3 classes"):
        data.check_teacher(SimpleNamespace(image_shape=None, num_classes=3))


def test_folder_without_pairs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no manifest.json in .*lit-distill predict"):
        pairs_of(tmp_path).setup("fit")
    for text in ["{", "[]", '{"shards": []}', '{"shards": [{}]}']:
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"manifest.json is not a manifest of noise-image pairs"
        ):
            pairs_of(tmp_path).setup("fit")
    write_pairs(tmp_path, format=2)
    with pytest.raises(ValueError, match=r"has format 2, but this version .* reads format 1"):
        pairs_of(tmp_path).setup("fit")


def test_incomplete_pairs(tmp_path):
    manifest = write_pairs(tmp_path)
    for number in (1, 4):
        (tmp_path / shard_name(number)).unlink()
    with pytest.raises(
        ValueError, match=r"incomplete: 2 of 6 shards are missing, the first is shard-00001.*again"
    ):
        pairs_of(tmp_path).setup("fit")
    write_pairs(tmp_path)
    manifest.complete, manifest.shards = False, []
    manifest.write(tmp_path)
    with pytest.raises(ValueError, match=r"incomplete: manifest.json lacks the checksums.*again"):
        pairs_of(tmp_path).setup("fit")


@pytest.mark.parametrize("damage", ["truncated", "altered", "empty"])
def test_damaged_shards_are_named(tmp_path, damage):
    write_pairs(tmp_path)
    path = tmp_path / "shard-00003.safetensors"
    blob = path.read_bytes()
    flipped = blob[:-1] + bytes([blob[-1] ^ 1])
    path.write_bytes({"truncated": blob[:-40], "altered": flipped, "empty": b""}[damage])
    with pytest.raises(
        ValueError, match=r"shard-00003.safetensors is truncated or was altered.*Delete this file"
    ):
        pairs_of(tmp_path).setup("fit")


def test_a_shard_that_was_bad_from_the_start(tmp_path):
    manifest = write_pairs(tmp_path)
    blob = b"no safetensors at all"
    (tmp_path / "shard-00000.safetensors").write_bytes(blob)
    manifest.shards[0].sha256 = sha256(blob)
    manifest.write(tmp_path)
    with pytest.raises(ValueError, match=r"shard-00000.safetensors is truncated or was altered"):
        pairs_of(tmp_path).setup("fit")
    (tmp_path / "shard-00000.safetensors").write_bytes(
        (tmp_path / "shard-00001.safetensors").read_bytes()
    )
    manifest.shards[0].sha256 = manifest.shards[1].sha256
    manifest.write(tmp_path)
    with pytest.raises(ValueError, match="are not numbered from 0 on"):
        pairs_of(tmp_path).setup("fit")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_shape": [3, 8, 8]},
            r"shape \(3, 8, 8\), but the data set 'digits' has \(1, 8, 8\)",
        ),
        ({"num_classes": None}, "classes of None, but the data set 'digits' has 10"),
    ],
)
def test_pairs_must_fit_the_data(tmp_path, settings, message):
    write_pairs(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        pairs_of(tmp_path).setup("fit")


def test_manifest_is_read_as_it_was_written(tmp_path):
    manifest = write_pairs(tmp_path, sigma_min=0.1 + 0.2)
    assert read_manifest(tmp_path) == manifest
    assert json.loads((tmp_path / "manifest.json").read_text())["sigma_min"] == 0.1 + 0.2
    assert not list(tmp_path.glob("*.part"))


def test_writing_to_a_missing_folder_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="x could not be written"):
        write_atomically(tmp_path / "absent" / "x", b"content")
    assert not list(tmp_path.iterdir())
