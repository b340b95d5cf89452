import sys
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from tiny_networks import stock_unet, tiny_network

from lit_distill.diffusion import EDMDenoiser
from lit_distill.models import UNet

CONFIGS = Path(__file__).parents[2] / "configs"


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def test_the_cifar10_network_has_the_published_number_of_parameters():
    # google/ddpm-cifar10-32
    with torch.device("meta"):
        network = UNet(
            image_size=32,
            block_out_channels=[128, 256, 256, 256],
            attention_levels=[1],
            options={
                "downsample_padding": 0,
                "flip_sin_to_cos": False,
                "freq_shift": 1,
                "norm_eps": 1e-6,
                "attention_head_dim": None,
            },
        )
    assert parameters(network) == 35_746_307
    assert network.unet.config.down_block_types == (
        "DownBlock2D",
        "AttnDownBlock2D",
        "DownBlock2D",
        "DownBlock2D",
    )
    assert network.unet.config.up_block_types[2] == "AttnUpBlock2D"


def test_the_digits_network_is_of_the_promised_size():
    config = yaml.safe_load((CONFIGS / "digits" / "teacher.yaml").read_text())
    denoiser = config["model"]["init_args"]["denoiser"]
    with torch.device("meta"):
        network = UNet(**denoiser["init_args"]["network"]["init_args"])
    assert 150_000 <= parameters(network) <= 700_000


def test_a_conditional_network_has_one_class_more_for_no_label():
    network = tiny_network(num_classes=3)
    assert network.unet.config.num_class_embeds == 4
    assert (network.num_classes, network.null_label) == (3, 3)
    assert network.image_shape == (1, 8, 8)
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 500.0])
    out = network(x, time, torch.tensor([0, 3]))
    assert out.shape == x.shape
    assert not torch.allclose(out, network(x, time, torch.tensor([1, 0])))
    named = network(x, time, {"label": torch.tensor([0, 3])})
    assert torch.equal(out, named)


def test_each_sample_has_its_own_time():
    network = tiny_network().eval()
    x = torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1)
    out = network(x, torch.tensor([1.0, 500.0]))
    assert not torch.allclose(out[0], out[1])
    assert torch.allclose(out[1:], network(x[1:], torch.tensor([500.0])), atol=1e-5)


def test_a_conditional_network_asks_for_labels():
    with pytest.raises(ValueError, match="3 classes and got no labels"):
        tiny_network(num_classes=3)(torch.randn(1, 1, 8, 8), torch.ones(1))


def test_an_unconditional_network_ignores_labels():
    network, x = tiny_network().eval(), torch.randn(2, 1, 8, 8)
    assert (network.num_classes, network.null_label) == (None, None)
    labelled = network(x, torch.ones(2), torch.tensor([0, 1]))
    assert torch.equal(labelled, network(x, torch.ones(2)))


def test_squares_of_pixels_are_channels_to_the_network():
    network = tiny_network(num_classes=3, patch_size=2).eval()
    assert network.unet.config.in_channels == network.unet.config.out_channels == 4
    assert (network.unet.config.sample_size, network.image_shape) == (4, (1, 8, 8))
    x, time, labels = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 2.0]), torch.tensor([0, 3])
    patches = x.view(2, 4, 2, 4, 2).permute(0, 2, 4, 1, 3).flatten(1, 2)
    expected = network.unet(patches, time, class_labels=labels).sample
    expected = expected.view(2, 2, 2, 4, 4).permute(0, 3, 1, 4, 2).reshape(2, 1, 8, 8)
    assert torch.equal(network(x, time, labels), expected)
    again = UNet.wrap(network.unet, 3, 3, patch_size=2)
    assert again.image_shape == (1, 8, 8)
    assert torch.equal(again(x, time, labels), expected)
    with pytest.raises(ValueError, match="4 channels takes no squares of patch_size=3"):
        UNet.wrap(network.unet, patch_size=3)


def test_squares_of_pixels_stay_when_inputs_are_added():
    network, x = tiny_network(patch_size=2).eval(), torch.randn(2, 1, 8, 8)
    before = network(x, torch.ones(2))
    network.add_inputs(("steps",))
    assert torch.allclose(network(x, torch.ones(2), {"steps": torch.ones(2)}), before, atol=1e-6)


def test_options_win():
    network = tiny_network(options={"block_out_channels": (8, 8), "act_fn": "gelu"})
    assert network.unet.config.block_out_channels == (8, 8)
    assert network.unet.config.act_fn == "gelu"


def test_a_foreign_network_is_wrapped_with_all_its_classes():
    network = UNet.wrap(stock_unet(num_class_embeds=5))
    assert (network.num_classes, network.null_label) == (5, None)
    assert network.image_shape == (1, 8, 8)
    assert UNet.wrap(stock_unet(sample_size=(8, 16))).image_shape == (1, 8, 16)
    assert UNet.wrap(stock_unet(sample_size=None)).image_shape is None


def test_denoisers_know_what_their_network_knows():
    denoiser = EDMDenoiser(tiny_network(num_classes=3))
    assert (denoiser.image_shape, denoiser.num_classes, denoiser.null_label) == ((1, 8, 8), 3, 3)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"image_size": 28, "block_out_channels": [32] * 4}, "image_size=28 cannot be halved 3"),
        ({"patch_size": 3}, "image_size=8 cannot be cut into squares of patch_size=3"),
        (
            {"block_out_channels": [8, 8, 8, 8], "patch_size": 2},
            "image_size=8 cannot be halved 3 times after patch_size=2",
        ),
        ({"block_out_channels": [8, 12]}, r"\[8, 12\] must be multiples of norm_num_groups=8"),
        (
            {"block_out_channels": [4, 4], "norm_num_groups": 4},
            r"last of .*\[4, 4\] is less than attention_head_dim=8",
        ),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        UNet(**({"image_size": 8, "norm_num_groups": 8} | arguments))


def test_a_network_without_attention_may_be_narrow():
    options = {"add_attention": False}
    network = UNet(8, 1, None, [4, 4], layers_per_block=1, norm_num_groups=4, options=options)
    assert network(torch.randn(1, 1, 8, 8), torch.ones(1)).shape == (1, 1, 8, 8)
