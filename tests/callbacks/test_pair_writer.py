import json
import resource
import signal
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

sys.path.insert(0, str(Path(__file__).parent))
from alone import run_script
from pair_script import Sampler, data, predict

from lit_distill.datamodules import PairsDataModule
from lit_distill.datamodules.pairs_folder import read_manifest, sha256, shards_in
from lit_distill.diffusion import seeded_noise

SCRIPT = Path(__file__).with_name("pair_script.py")


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Bits are promised at equal thread counts only."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of pairs that one process wrote without a break."""
    folder = tmp_path_factory.mktemp("pairs") / "whole"
    predict(folder, Sampler(), data())
    return folder


def test_shards_hold_what_the_module_returned(whole):
    manifest = read_manifest(whole)
    assert sorted(content(whole)) == ["manifest.json", *manifest.files]
    for number, shard in enumerate(manifest.shards):
        pairs = safetensors.torch.load_file(whole / shard.file)
        indices = list(range(8 * number, min(8 * number + 8, 42)))
        assert pairs["index"].tolist() == indices and shard.count == len(indices)
        assert torch.equal(pairs["noise"], seeded_noise((1, 8, 8), indices))
        assert pairs["label"].tolist() == [i % 10 for i in indices]
        image = Sampler().predict_step({n: pairs[n] for n in ("index", "noise", "label")}, 0)
        assert torch.allclose(pairs["image"], image["image"])
        assert {t.dtype for t in pairs.values()} == {torch.int64, torch.float32}


def test_pairs_can_be_trained_on(whole):
    pairs = PairsDataModule(data(), str(whole), batch_size=42)
    pairs.setup("fit")
    batch = next(iter(pairs.train_dataloader()))
    assert sorted(batch["index"].tolist()) == list(range(42))
    assert torch.equal(batch["noise"], seeded_noise((1, 8, 8), batch["index"].tolist()))


def test_manifest_names_the_settings_and_checksums(whole):
    manifest = json.loads((whole / "manifest.json").read_text())
    shards = manifest.pop("shards")
    assert manifest == {
        "format": 1, "teacher": "a" * 64, "solver": "heun", "guidance": 1.0,
        "steps": 18, "nfe": 35,
        "sigma_min": 0.002, "sigma_max": 80.0, "seed": 0, "dtype": "float32",
        "image_shape": [1, 8, 8], "num_classes": 10, "num_pairs": 42, "shard_size": 8,
        "complete": True, "trajectory": None,
    }  # fmt: skip
    assert [shard["file"] for shard in shards] == [f"shard-0000{i}.safetensors" for i in range(6)]
    for shard in shards:
        assert shard["sha256"] == sha256((whole / shard["file"]).read_bytes())


def test_states_on_the_way_are_stored_beside_their_end(tmp_path):
    class OnTheWay(Sampler):
        def predict_step(self, batch, batch_idx):
            pairs = super().predict_step(batch, batch_idx)
            states = torch.stack([2.0 * pairs["noise"], pairs["image"]], 1).double()
            return {**pairs, "trajectory": states}

    how = {"sigmas": [2.0, 0.1], "substeps": 3}
    predict(tmp_path, OnTheWay(trajectory=how), data(), limit_predict_batches=2)
    predict(tmp_path, OnTheWay(trajectory=how), data())  # goes on
    manifest = read_manifest(tmp_path)
    assert manifest.complete and manifest.trajectory == how
    shard = safetensors.torch.load_file(tmp_path / manifest.files[-1])
    assert shard["trajectory"].shape == (2, 2, 1, 8, 8)
    assert shard["trajectory"].dtype == torch.float32
    assert torch.equal(shard["trajectory"][:, 0], 2 * shard["noise"])
    assert torch.equal(shard["trajectory"][:, 1], shard["image"])
    pairs = PairsDataModule(data(), str(tmp_path), batch_size=42)
    assert pairs.trajectory is None  # not read yet
    pairs.setup("fit")
    assert pairs.trajectory == how
    batch = next(iter(pairs.train_dataloader()))
    assert torch.equal(batch["trajectory"][:, 1], batch["image"])
    with pytest.raises(ValueError, match=r"made in another way .*'substeps': 3.*not .*: 4"):
        predict(tmp_path, OnTheWay(trajectory={**how, "substeps": 4}), data())


def test_a_killed_run_goes_on_at_the_first_missing_shard(tmp_path, whole):
    folder = tmp_path / "pairs"
    assert run_script(SCRIPT, folder, "--kill-at", 3).returncode == -signal.SIGKILL
    assert shards_in(folder) == {0, 1, 2}
    assert not read_manifest(folder).complete and not read_manifest(folder).shards
    (folder / "shard-00003.safetensors.part").write_bytes(b"half a shard")
    kept = (folder / "shard-00002.safetensors").stat().st_mtime_ns
    sampler = Sampler()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        predict(folder, sampler, data())
    assert not [str(w.message) for w in caught if "LeafSpec" not in str(w.message)]  # torch's own
    assert sampler.items == [3, 4, 5]
    assert (folder / "shard-00002.safetensors").stat().st_mtime_ns == kept
    assert content(folder) == content(whole)  # the leftover is gone, the rest is the same


def test_a_run_that_is_asked_to_end_ends_after_the_shard_in_hand(tmp_path, whole):
    folder = tmp_path / "pairs"
    with pytest.raises(SIGTERMException):
        predict(folder, Sampler(kill_at=2, by=signal.SIGTERM), data())
    assert shards_in(folder) == {0, 1, 2}
    assert not read_manifest(folder).complete
    predict(folder, Sampler(), data())
    assert content(folder) == content(whole)


def test_two_processes_write_the_same_bytes_even_if_one_is_left_without_a_shard(tmp_path, whole):
    folder = tmp_path / "pairs"
    result = run_script(SCRIPT, folder, "--devices", 2, "--again", 4, processes=2)
    assert result.returncode == 0, result.stderr
    first = folder / "shard-00004.first"
    assert first.read_bytes() == (whole / "shard-00004.safetensors").read_bytes()
    first.unlink()
    assert content(folder) == content(whole)


def test_complete_pairs_are_left_alone_and_no_warning_is_given(whole):
    before = content(whole)
    sampler, numbers = Sampler(), data()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        predict(whole, sampler, numbers)
    assert sampler.items == []
    assert content(whole) == before
    assert not [str(w.message) for w in caught if "LeafSpec" not in str(w.message)]  # torch's own
    assert numbers.skip_predict == set()  # a later predict without the writer goes through all


def test_a_limited_run_stays_incomplete(tmp_path, whole):
    folder = tmp_path / "pairs"
    predict(folder, Sampler(), data(), limit_predict_batches=2)
    assert shards_in(folder) == {0, 1} and not read_manifest(folder).complete
    predict(folder, Sampler(), data())
    assert content(folder) == content(whole)


def test_an_altered_shard_is_found_when_another_is_written_again(tmp_path):
    predict(tmp_path, Sampler(), data())
    (tmp_path / "shard-00001.safetensors").unlink()
    altered = tmp_path / "shard-00004.safetensors"
    altered.write_bytes(altered.read_bytes()[:-1] + b"x")
    with pytest.raises(
        ValueError, match=r"shard-00004.safetensors is truncated or was alt.*Delete"
    ):
        predict(tmp_path, Sampler(), data())
    altered.unlink()
    predict(tmp_path, Sampler(), data())
    assert read_manifest(tmp_path).complete


def test_a_shard_written_anew_may_differ_in_its_last_bits(tmp_path):
    class OtherMachine(Sampler):
        def predict_step(self, batch, batch_idx):
            pairs = super().predict_step(batch, batch_idx)
            return {**pairs, "image": pairs["image"] * (1 + 1e-6)}

    predict(tmp_path, Sampler(), data())
    first = read_manifest(tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    predict(tmp_path, OtherMachine(), data())
    second = read_manifest(tmp_path)
    assert second.complete
    changed = [a != b for a, b in zip(first.shards, second.shards, strict=True)]
    assert changed == [False, True, False, False, False, False]


@pytest.mark.parametrize(
    ("record", "options", "difference"),
    [
        ({"teacher": "b" * 64}, {}, "teacher: aaa.*not bbb"),
        ({"solver": "euler", "nfe": 18}, {}, "solver: heun, not euler; nfe: 35, not 18"),
        ({}, {"predict_seed": 1}, "seed: 0, not 1"),
        ({}, {"predict_samples": 43}, "num_pairs: 42, not 43"),
        ({}, {"predict_batch_size": 16}, "shard_size: 8, not 16"),
    ],
)
def test_other_settings_are_refused(whole, record, options, difference):
    before = content(whole)
    with pytest.raises(ValueError, match=f"made in another way .*{difference}.*another folder"):
        predict(whole, Sampler(**record), data(**options))
    assert content(whole) == before


def test_shards_of_unknown_origin_are_refused(tmp_path):
    predict(tmp_path, Sampler(), data())
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "shard-00000.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds shards but no manifest.json"):
        predict(tmp_path, Sampler(), data())


def test_random_solvers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"solver=churn adds random noise.*deterministic solver"):
        predict(tmp_path / "new", Sampler(solver="churn", deterministic=False), data())
    assert not (tmp_path / "new").exists()


def test_infinite_images_are_refused(tmp_path):
    class Broken(Sampler):
        def predict_step(self, batch, batch_idx):
            pairs = super().predict_step(batch, batch_idx)
            pairs["image"][-1, 0, 0, 0] = float("nan" if batch_idx == 1 else 0)
            return pairs

    with pytest.raises(ValueError, match="images 8 to 15 hold NaN"):
        predict(tmp_path, Broken(), data())
    assert shards_in(tmp_path) == {0}


def test_a_full_disk_leaves_no_half_shard(tmp_path, whole):
    class Filling(Sampler):
        """Lets no file grow beyond 1,000 bytes once two shards are written."""

        def predict_step(self, batch, batch_idx):
            if batch_idx == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
            return super().predict_step(batch, batch_idx)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(
            OSError, match=r"shard-00002.* could not be written .*same command again"
        ):
            predict(tmp_path, Filling(), data())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(content(tmp_path)) == ["manifest.json"] + [
        f"shard-0000{i}.safetensors" for i in (0, 1)
    ]
    predict(tmp_path, Sampler(), data())
    assert content(tmp_path) == content(whole)


def test_what_is_needed_of_module_and_data(tmp_path):
    class Plain(Sampler):
        sampling_record = None

    with pytest.raises(ValueError, match="Plain has no sampling_record"):
        predict(tmp_path, Plain(), data())
    with pytest.raises(ValueError, match="needs one of lit_distill's image data modules"):
        predict(tmp_path, Sampler(), torch.utils.data.DataLoader([{"index": torch.zeros(1)}]))
