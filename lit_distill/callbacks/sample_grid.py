"""Pictures of what a model makes while it trains, always from the same noise."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lit_distill.callbacks.pictures import draw_rows, tile
from lit_distill.callbacks.sampling import Draw, data_of, generative
from lit_distill.datamodules import LatentTextDataModule, PairsDataModule
from lit_distill.diffusion import Condition
from lit_distill.metrics.figures import to_uint8


class SampleGrid(Callback):
    """Writes ``samples/step-000500.png`` and TensorBoard images as the training goes on.

    At the start, every ``every_n_steps`` steps and at the end, the module's
    ``preview(noise, condition) -> dict[str, Tensor]`` is called on the first process (so it must
    not talk to others) with the same noise and labels; each entry becomes one block of rows. Modes
    and random state are left as they were found, so the training's numbers do not change.

    Args:
        num_images: Images of each block; image ``i`` has the label ``i % num_classes``.
        every_n_steps: Steps between pictures.
        seed: Image ``i`` has the noise of seed ``seed + i``.
        columns: Images in a row.

    Raises:
        ValueError: If a number is not positive.
    """

    def __init__(
        self, num_images: int = 20, every_n_steps: int = 500, seed: int = 0, columns: int = 10
    ) -> None:
        if min(num_images, every_n_steps, columns) < 1:
            raise ValueError(
                "SampleGrid takes num_images, every_n_steps and columns of at least 1, not "
                f"{num_images}, {every_n_steps} and {columns}."
            )
        self.num_images, self.every_n_steps = num_images, every_n_steps
        self.seed, self.columns = seed, columns
        self._drawn_at: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what the training starts from."""
        self._drawn_at = None
        self._draw(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: object, **kwargs: object
    ) -> None:
        """Draw every ``every_n_steps`` steps, or right after: a batch may be several steps."""
        if trainer.global_step // self.every_n_steps > (self._drawn_at or 0) // self.every_n_steps:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what came out."""
        self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        # Accumulated gradients leave the step where it was for several batches.
        if not trainer.is_global_zero or step == self._drawn_at:
            return
        self._drawn_at = step
        rows = preview(pl_module, self._noise(trainer, pl_module), self.seed)
        path = Path(trainer.default_root_dir) / "samples" / f"step-{step:06d}.png"
        draw_rows(rows, path, self.columns, f"step {step:,}")
        for logger in trainer.loggers:
            add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
            if add_image is not None:
                for name, images in rows.items():
                    add_image(f"samples/{name}", tile(images, self.columns), step)

    def _noise(self, trainer: Trainer, module: LightningModule) -> tuple[Tensor, Condition]:
        data, classes = data_of(trainer, self), generative(module).student.num_classes
        draw = Draw(data.image_shape, classes, self.num_images, self.seed, self.num_images)
        noise, labels = draw.batch(0)
        prompts = data.data if isinstance(data, PairsDataModule) else data
        if not isinstance(prompts, LatentTextDataModule):
            return noise, labels
        captions = torch.arange(self.num_images) % len(prompts.source.captions)
        return noise, {"prompt_embeds": prompts.embeddings(captions)}


def preview(
    module: LightningModule, batch: tuple[Tensor, Condition], seed: int
) -> dict[str, Tensor]:
    """Call a module's ``preview`` in eval mode, without a trace on modes or random state.

    Args:
        module: A module with ``preview(noise, condition) -> dict[str, Tensor]``.
        batch: Noise (B, C, H, W) and a condition or None, on any device.
        seed: Of the global random state, for previews that draw noise of their own.

    Returns:
        The images of each entry, (B, C, H, W) uint8 on the CPU.
    """
    noise, condition = apply_to_collection(batch, Tensor, lambda tensor: tensor.to(module.device))
    modes: dict[nn.Module, bool] = {part: part.training for part in module.modules()}
    module.eval()
    try:
        precision = module.trainer.precision_plugin.forward_context()
        with isolate_rng(), torch.no_grad(), precision:
            torch.manual_seed(seed)
            rows = generative(module).preview(noise, condition)
    finally:
        for part, training in modes.items():
            part.training = training  # not by train(), which a module may have overridden
    decode = generative(module).student.decode
    return {name: to_uint8(decode(images.float())).cpu() for name, images in rows.items()}
