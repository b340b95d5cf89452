"""The VAE of the small text-to-image model."""

import functools

import pytest
import torch
from tiny import adam, trainer
from torch import nn

from lit_distill.datamodules import DigitsDataModule
from lit_distill.methods import Autoencoder
from lit_distill.models import load_codec, save_denoiser

SMALL = {"image_size": 16, "vae_widths": [8, 16, 16], "unet_widths": [16, 16], "text_width": 16}


def test_latents_have_unit_variance_and_the_folder_holds_the_trained_vae(tmp_path):
    module = Autoencoder(["zero one"], pipeline=SMALL, optimizer=adam)
    before = {k: v.clone() for k, v in module.vae.state_dict().items()}
    unet = {k: v.clone() for k, v in module.student.state_dict().items()}
    trainer(tmp_path, max_steps=3).fit(module, DigitsDataModule(scale=2, batch_size=64))
    assert all(torch.equal(v, unet[k]) for k, v in module.student.state_dict().items())
    assert any(not torch.equal(v, before[k]) for k, v in module.vae.state_dict().items())
    save_denoiser(module.network, tmp_path / "pipeline")
    codec = load_codec(tmp_path / "pipeline")
    assert codec.vae_hash() == module.codec.vae_hash()
    images = DigitsDataModule(scale=2).images("train")[0][:500].float() / 127.5 - 1
    assert float(codec.encode(images).std()) == pytest.approx(1, rel=0.05)


def test_options_for_speed_reach_the_vae(tmp_path, monkeypatch):
    """By dynamo and autograd alone, whose passes leave the numbers as they were."""
    backend = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", backend)
    losses = []
    for fast in (False, True):
        torch.manual_seed(0)
        module = Autoencoder(["zero"], pipeline=SMALL, compile=fast, channels_last=fast)
        run = trainer(tmp_path, max_steps=1)
        run.fit(module, DigitsDataModule(scale=2, batch_size=8))
        for half in (module.vae.encoder, module.vae.decoder):
            assert (half._compiled_call_impl is not None) == fast
            weight = half.conv_out.weight
            assert weight.is_contiguous(memory_format=torch.channels_last) == fast
        losses.append({k: float(v) for k, v in run.callback_metrics.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0]


def test_images_of_another_size_are_refused(tmp_path):
    module = Autoencoder(["zero one"], pipeline=SMALL)
    with pytest.raises(ValueError, match=r"the VAE takes \(1, 16, 16\)"):
        trainer(tmp_path, max_steps=1).fit(module, DigitsDataModule())


def test_sizes_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match="image_size=20 must be a multiple of 8"):
        Autoencoder(["zero"], pipeline={**SMALL, "image_size": 20})
