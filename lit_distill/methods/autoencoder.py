"""Training of the VAE of a small text-to-image model, the stage before its teacher."""

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lit_distill.diffusion import EpsilonDenoiser
from lit_distill.methods.base import Batch, DistillationModule, Trained
from lit_distill.models import LatentCodec, TextUNet, small_text_to_image


class Autoencoder(DistillationModule):
    """Trains the VAE of :func:`~lit_distill.models.small_text_to_image` on images.

    The loss is the mean absolute error plus a small Kullback-Leibler term (Kingma & Welling 2014),
    as in Rombach et al. 2022 without its perceptual and adversarial parts. At the end the VAE's
    ``scaling_factor`` is set so that latents have unit variance. What is exported is the whole
    pipeline, its U-Net untrained: the model that :class:`DiffusionTeacher` goes on from.

    Under DDP use ``strategy: ddp``.

    Args:
        words: What the tokenizer takes its words from.
        kl_weight: Weight of the Kullback-Leibler divergence, per number of a latent.
        pipeline: Further arguments of :func:`~lit_distill.models.small_text_to_image`.
        base: Arguments of :class:`DistillationModule`.
    """

    def __init__(
        self,
        words: list[str],
        kl_weight: float = 1e-3,
        pipeline: dict[str, Any] | None = None,
        **base: Any,
    ) -> None:
        made = small_text_to_image(words, **(pipeline or {}))
        codec = LatentCodec(
            made.vae, made.text_encoder, made.tokenizer, made.unet.config.sample_size
        )
        network = TextUNet(made.unet, codec)
        super().__init__(EpsilonDenoiser(network, betas=made.scheduler.betas), **base)
        self.save_hyperparameters(logger=False)
        self.codec, self.kl_weight = codec, kl_weight
        self.vae = codec.vae.requires_grad_(True)  # here it is a part of the module's weights
        self.train()

    def setup(self, stage: str) -> None:
        """Check the images' shape.

        Raises:
            ValueError: If they are not what the VAE was made for.
        """
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is not None and tuple(data.image_shape) != self.codec.image_shape:
            raise ValueError(
                f"The data set {data.name!r} has images of shape {tuple(data.image_shape)}, and "
                f"the VAE takes {self.codec.image_shape}: set image_size and channels of the "
                "option pipeline."
            )
        self.prepare_networks()

    def compiled_modules(self) -> list[nn.Module]:
        """The VAE's halves: it is not called itself."""
        return [self.vae.encoder, self.vae.decoder]

    def trained_modules(self) -> list[Trained]:
        """The VAE."""
        return [Trained("vae", self.vae, self.optimizer, self.lr_scheduler)]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Reconstruct a batch of images."""
        images = batch["image"]
        latents = self.vae.encode(images).latent_dist
        rebuilt = self.vae.decode(latents.sample()).sample
        error = functional.l1_loss(rebuilt, images)
        loss = error + self.kl_weight * latents.kl().mean() / latents.mean[0].numel()
        self.watch(loss)
        self.log("loss/reconstruction", error, prog_bar=True)
        return loss

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Scale latents to unit variance, as measured on some batches of the training images."""
        loader: Any = self.trainer.train_dataloader
        some = [batch["image"].to(self.device) for batch in islice(loader, 8)]
        latents = torch.cat([self.vae.encode(images).latent_dist.mean for images in some])
        self.vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
