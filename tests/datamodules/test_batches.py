import json
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

sys.path.insert(0, str(Path(__file__).parent))
from alone import run_script
from counted import CountedData, Recorder, numbers_of, trainer

from lit_distill.datamodules.batches import BatchOrder, TrainLoader, even_share


def order(**options):
    epoch = options.pop("epoch", 0)
    return BatchOrder(**{"num_items": 44, "batch_size": 8, **options}).epoch(epoch)


def test_epoch_is_a_permutation_without_its_remainder():
    indices = order()
    assert indices.shape == (5, 8)
    assert len(set(indices.flatten().tolist())) == 40
    assert indices.min() >= 0 and indices.max() < 44


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    torch.manual_seed(1)
    first = order()
    torch.manual_seed(2)
    assert torch.equal(first, order())
    assert not torch.equal(first, order(seed=1))
    assert not torch.equal(first, order(seed=2**32))  # beyond the 32 bits of torch's generator
    assert not torch.equal(first, order(epoch=1))
    assert not torch.equal(order(seed=1), order(epoch=1))  # as seed + epoch would make it


def test_loader_leaves_the_global_random_state_alone():
    loader = CountedData(batch_size=8).train_dataloader()
    before = torch.get_rng_state()
    list(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_processes_share_the_global_batches_of_one_process():
    whole = order(batch_size=8)
    parts = [order(batch_size=4, rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(whole, torch.cat(parts, dim=1))


def test_too_few_images_for_a_batch():
    with pytest.raises(ValueError, match=r"batch_size=45 needs at least 45 .* there are 44"):
        CountedData(batch_size=45).train_dataloader()
    with pytest.raises(ValueError, match="on 2 processes needs at least 60"):
        BatchOrder(44, 30, world_size=2)


@pytest.mark.parametrize("num_items", [5, 8, 9, 16, 17, 44])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_even_share_holds_each_item_once(num_items, world_size):
    shares = [even_share(num_items, 8, rank, world_size) for rank in range(world_size)]
    assert sorted(torch.cat([torch.cat(share) for share in shares]).tolist()) == list(
        range(num_items)
    )
    assert len({len(share) for share in shares}) == 1
    assert max(len(batch) for share in shares for batch in share) <= 8


def test_loader_goes_on_after_the_batches_that_were_trained_on():
    data = CountedData(batch_size=8)
    loader = data.train_dataloader()
    whole = [numbers_of(batch) for batch in loader]
    assert len(loader) == len(whole) == 5
    assert [numbers_of(batch) for batch in loader] == whole
    later = TrainLoader(loader.gather, loader.order, lambda: 3)
    batches = [numbers_of(batch) for batch in later]
    assert batches[:2] == whole[3:]
    assert batches[2:] == order(epoch=1)[:3].tolist()


@pytest.mark.parametrize("workers", [1, 3, 20])
def test_threads_make_the_same_batches_in_the_same_order(workers):
    loader = CountedData(batch_size=8).train_dataloader()
    ahead = CountedData(batch_size=8, workers=workers).train_dataloader()
    for _ in range(2):
        assert [numbers_of(b) for b in ahead] == [numbers_of(b) for b in loader]
    later = TrainLoader(loader.gather, loader.order, lambda: 3, workers)
    assert [numbers_of(batch) for batch in later][:2] == [numbers_of(b) for b in loader][3:]


def test_threads_are_ahead_and_end_with_the_epoch():
    made = []

    def gather(indices):
        made.append(threading.current_thread())
        if len(made) == 4:
            raise ValueError("this batch cannot be made")
        return {"index": indices}

    before = threading.active_count()
    batches = iter(TrainLoader(gather, BatchOrder(44, 4), workers=2))
    next(batches)
    while len(made) < 3:  # the two after it are made by themselves
        time.sleep(1e-3)
    assert threading.main_thread() not in made
    batches.close()
    assert threading.active_count() == before
    made.clear()
    with pytest.raises(ValueError, match="this batch cannot be made"):
        list(TrainLoader(gather, BatchOrder(44, 4), workers=2))
    assert threading.active_count() == before
    with pytest.raises(ValueError, match="workers=-1"):
        CountedData(workers=-1)


LIMITS = [{"max_epochs": 3}, {"max_steps": 13}]


def run(folder, callbacks, ckpt_path=None, workers=0, **options):
    recorder = Recorder()
    data = CountedData(batch_size=8, seed=3, workers=workers)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(folder, callbacks=callbacks, devices=1, num_sanity_val_steps=0, **options).fit(
            recorder, data, ckpt_path=ckpt_path
        )
    said = [str(w.message) for w in caught if "dataloader" in str(w.message)]
    assert not said
    return recorder


@pytest.mark.parametrize("limits", LIMITS, ids=["epochs", "steps"])
def test_resuming_at_any_step_goes_on_with_the_same_batches(tmp_path, limits):
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    unbroken = run(tmp_path, [saver], **limits)
    steps = len(unbroken.seen["train"])
    assert steps == limits.get("max_steps", 15)
    for step in range(1, steps):
        resumed = run(tmp_path, [], tmp_path / f"step={step}.ckpt", **limits)
        assert resumed.seen["train"] == unbroken.seen["train"][step:], f"resumed at step {step}"
        assert torch.equal(resumed.weight, unbroken.weight)


@pytest.mark.parametrize("limits", LIMITS, ids=["epochs", "steps"])
@pytest.mark.parametrize(
    "when",
    [
        {"every_n_epochs": 1},  # saved after the validation at the end of an epoch
        {"every_n_epochs": 1, "save_on_train_epoch_end": True},
        {"every_n_train_steps": 5},
    ],
    ids=["validation", "epoch", "step"],
)
def test_resuming_at_an_end_of_an_epoch_starts_the_next(tmp_path, when, limits):
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, **when)
    unbroken = run(tmp_path, [saver], **limits)
    for step in (5, 10):
        resumed = run(tmp_path, [], tmp_path / f"step={step}.ckpt", **limits)
        assert resumed.seen["train"] == unbroken.seen["train"][step:], f"resumed at step {step}"


def test_resuming_twice_and_after_a_validation_within_the_epoch(tmp_path):
    options = {"max_epochs": 3, "val_check_interval": 2}
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    unbroken = run(tmp_path, [saver], **options)
    first = run(tmp_path, [], tmp_path / "step=2.ckpt", **options)
    assert first.seen["train"] == unbroken.seen["train"][2:]
    again = ModelCheckpoint(tmp_path / "again", "{step}", every_n_train_steps=1, save_top_k=-1)
    run(tmp_path, [again], tmp_path / "step=4.ckpt", **options)
    second = run(tmp_path, [], tmp_path / "again" / "step=8.ckpt", **options)
    assert second.seen["train"] == unbroken.seen["train"][8:]


def test_resuming_with_threads(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    unbroken = run(tmp_path, [saver], max_steps=13, workers=2)
    for step, workers in [(3, 2), (5, 1), (12, 0)]:
        path = tmp_path / f"step={step}.ckpt"
        resumed = run(tmp_path, [], path, workers, max_steps=13)
        assert resumed.seen["train"] == unbroken.seen["train"][step:]
        assert torch.equal(resumed.weight, unbroken.weight)


def test_overfitting_gives_the_same_batches_in_every_epoch(tmp_path):
    recorder = run(tmp_path, [], max_epochs=2, overfit_batches=2, enable_checkpointing=False)
    assert recorder.seen["train"][:2] == recorder.seen["train"][2:]


def test_limited_epochs_differ(tmp_path):
    recorder = run(tmp_path, [], max_epochs=2, limit_train_batches=2, enable_checkpointing=False)
    assert len(recorder.seen["train"]) == 4
    assert recorder.seen["train"][:2] != recorder.seen["train"][2:]


def test_a_batch_of_mnist_size_costs_well_under_a_millisecond():
    images = torch.randint(0, 256, (20_000, 1, 28, 28), dtype=torch.uint8)

    class Big(CountedData):
        image_shape = (1, 28, 28)

        def load(self, split):
            return images, torch.zeros(len(images), dtype=torch.int64)

    loader = Big().train_dataloader()
    assert isinstance(loader, TrainLoader)
    times = []
    for _ in range(3):
        start = time.process_time()  # other work on the machine is no cost
        count = sum(1 for _ in loader)
        times.append((time.process_time() - start) / count)
    assert min(times) < 0.5e-3, f"{min(times) * 1e3:.2f} ms a batch"


def test_two_processes_share_the_data(tmp_path):
    script = Path(__file__).with_name("counted.py")
    result = run_script(script, tmp_path, processes=2)
    assert result.returncode == 0, result.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for epoch in range(2):
        together = [a + b for a, b in zip(ranks[0]["train"], ranks[1]["train"], strict=True)]
        assert together[2 * epoch : 2 * epoch + 2] == order(batch_size=16, epoch=epoch).tolist()
    validated = [number for rank in ranks for batch in rank["val"] for number in batch]
    assert sorted(validated) == sorted(2 * list(range(9)))  # two epochs
    assert ranks[0]["predict"] == [[0, 1, 2], [6, 7, 8], [6, 7, 8]]
    assert ranks[1]["predict"] == [[3, 4, 5], [9]]
    assert "DistributedSampler" not in result.stderr
