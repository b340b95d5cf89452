import os

import pytest
import torch

from lit_distill.metrics.cache import cache_file, hash_tensors, read_cache, write_cache

KEY = {"solver": "heun", "steps": 18}


def test_what_is_written_is_read(tmp_path):
    path = cache_file(tmp_path / "new", "teacher", KEY)
    tensors = {"images": torch.arange(24, dtype=torch.uint8).view(2, 3, 4).mT}
    write_cache(path, KEY, tensors)
    assert torch.equal(read_cache(path, KEY)["images"], tensors["images"])
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_another_key_is_another_file_and_not_read(tmp_path):
    other = {**KEY, "steps": 17}
    path = cache_file(tmp_path, "teacher", KEY)
    assert path != cache_file(tmp_path, "teacher", other)
    write_cache(path, KEY, {"x": torch.zeros(1)})
    assert read_cache(path, other) is None


@pytest.mark.parametrize("content", [None, b"", b"abc", b"\0" * 100])
def test_absent_or_damaged_files_are_nothing(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert read_cache(path, KEY) is None


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = cache_file(tmp_path, "teacher", KEY)
    write_cache(path, KEY, {"x": torch.zeros(1)})

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_cache(path, KEY, {"x": torch.ones(1)})
    assert read_cache(path, KEY)["x"] == 0


def test_hashes_see_values_names_shapes_and_types():
    x = torch.arange(6.0)
    layer = torch.nn.Linear(2, 3)
    hashes = [hash_tensors(x), hash_tensors(x.view(2, 3)), hash_tensors(x.double())]
    hashes += [hash_tensors(x + 1), hash_tensors(layer), hash_tensors(layer.bfloat16())]
    assert len(set(hashes)) == len(hashes)
    assert hash_tensors(x) == hash_tensors(x.clone())
