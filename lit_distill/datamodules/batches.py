"""Loaders of whole batches, gathered at once from tensors in memory, with an exact place in them.

A ``torch.utils.data.DataLoader`` would fetch single images to collate them, draw from the global
random state at every epoch, and be rebuilt by Lightning with a sampler of its own under DDP and in
``predict``. These loaders do none of that.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

Batch = dict[str, Tensor]


class BatchOrder:
    """The training batches of one process, in an order that seed and epoch alone determine.

    All processes cut the same permutation into the same global batches and take one part of each.
    What does not fill a global batch is left out; it is something else in each epoch.

    Args:
        num_items: Number of training items.
        batch_size: Items a batch and process.
        seed: Seed of the order.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        ValueError: If the items do not fill one batch.
    """

    def __init__(
        self, num_items: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        if num_items < batch_size * world_size:
            processes = f" on {world_size} processes" if world_size > 1 else ""
            raise ValueError(
                f"batch_size={batch_size}{processes} needs at least {batch_size * world_size} "
                f"training images, but there are {num_items}: lower batch_size."
            )
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        return self.num_items // (self.batch_size * self.world_size)

    def epoch(self, number: int) -> Tensor:
        """The indices of an epoch's batches on this process: ``(len(self), batch_size)``, int64."""
        # torch's generator uses 32 bits of its seed, so the two numbers are mixed into one of 32.
        mixed = np.random.SeedSequence((self.seed, number)).generate_state(1)
        generator = torch.Generator().manual_seed(int(mixed[0]))
        order = torch.randperm(self.num_items, generator=generator)
        used = order[: len(self) * self.world_size * self.batch_size]
        return used.view(len(self), self.world_size, self.batch_size)[:, self.rank]


class TrainLoader:
    """Shuffled batches as one endless sequence, of which an epoch takes the next ``len``.

    Which batch comes next follows from the number of batches trained on, which every checkpoint
    of Lightning holds: a resumed run goes on with the very next one, wherever it was stopped.
    Lightning's own ways to resume a loader would not do. It restores a loader's state in mid-epoch
    only, and when training is limited by ``max_steps`` it counts one epoch too many after a
    checkpoint from the end of an epoch (lightning 2.6), so the order cannot hang on its epochs.

    Args:
        gather: Makes a batch of the items ``(B,)``.
        order: Says which items.
        trained_on: Number of batches trained on before; asked when the first batch is due.
        workers: Threads that make the next batches meanwhile, one each; 0 for none.
    """

    def __init__(
        self,
        gather: Callable[[Tensor], Batch],
        order: BatchOrder,
        trained_on: Callable[[], int] = lambda: 0,
        workers: int = 0,
    ) -> None:
        self.gather = gather
        self.order = order
        self.trained_on = trained_on
        self.workers = workers

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        return _made_ahead(self.gather, self._items(self.trained_on()), self.workers)

    def _items(self, first: int) -> Iterator[Tensor]:
        for number in range(first, first + len(self)):
            epoch, place = divmod(number, len(self))
            if place == 0 or number == first:
                indices = self.order.epoch(epoch)
            yield indices[place]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the trainer holds the place. Lightning takes the method as "can be resumed"."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The counterpart of :meth:`state_dict`."""


class FixedLoader:
    """The same batches in the same order every time.

    Args:
        gather: Makes a batch of the items ``(B,)``.
        items: The indices of each batch.
    """

    def __init__(self, gather: Callable[[Tensor], Batch], items: Sequence[Tensor]) -> None:
        self.gather = gather
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.gather, self.items)


def _made_ahead(
    gather: Callable[[Tensor], Batch], items: Iterator[Tensor], workers: int
) -> Iterator[Batch]:
    """The batches of items in order, of which the next ``workers`` are made meanwhile."""
    if workers == 0:
        yield from map(gather, items)
        return
    threads = ThreadPoolExecutor(workers, "batches")
    try:
        begun = deque(threads.submit(gather, item) for item in islice(items, workers))
        while begun:
            batch = begun.popleft().result()
            begun.extend(threads.submit(gather, item) for item in islice(items, 1))
            yield batch
    finally:  # also where an epoch is limited, or training stops
        threads.shutdown(cancel_futures=True)


def even_share(num_items: int, batch_size: int, rank: int, world_size: int) -> Sequence[Tensor]:
    """One process's batches of ``num_items``: each item once over all processes, no padding.

    Every process gets the same number of batches, as collective operations need, of sizes that
    differ by one at most and stay within ``batch_size``.

    Args:
        num_items: Number of items.
        batch_size: Largest size of a batch.
        rank: Number of this process.
        world_size: Number of processes.

    Returns:
        Indices ``(B,)`` of each batch, ascending.
    """
    num_batches = math.ceil(num_items / (batch_size * world_size))
    return torch.arange(num_items).tensor_split(world_size)[rank].tensor_split(num_batches)
