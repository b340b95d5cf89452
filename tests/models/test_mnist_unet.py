"""The MNIST network of the public checkpoints, against a forward pass written from its description.

``down1.model.0`` and so on are the checkpoint's names. RCB = two of (conv 3x3, batch norm, GELU).
"""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parent))
from public_mnist import public_checkpoint, schedule

from lit_distill.diffusion import EDMDenoiser, EpsilonDenoiser, LogNormalSigma
from lit_distill.methods import DMD, DiffusionTeacher
from lit_distill.models import (
    LoRA,
    MNISTUNet,
    UNet,
    adapted,
    add_inputs,
    load_denoiser,
    read_mnist_ddpm,
    save_denoiser,
)


def reference(state, x, time, context, width=8):
    """The noise at ``time`` (B, 1) in [0, 1] with a context (B, 10), by the description."""
    w = {name.removeprefix("nn_model."): tensor for name, tensor in state.items()}

    def conv(x, name):
        return functional.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)

    def block(x, name):
        x = conv(x, f"{name}.0")
        mean, variance = w[f"{name}.1.running_mean"], w[f"{name}.1.running_var"]
        x = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
        x = x * w[f"{name}.1.weight"][:, None, None] + w[f"{name}.1.bias"][:, None, None]
        return functional.gelu(x)

    def rcb(x, name, residual=False):
        first = block(x, f"{name}.conv1")
        second = block(first, f"{name}.conv2")
        return (first + second) / 1.414 if residual else second

    def embed(v, name):
        hidden = functional.gelu(v @ w[f"{name}.model.0.weight"].T + w[f"{name}.model.0.bias"])
        out = hidden @ w[f"{name}.model.2.weight"].T + w[f"{name}.model.2.bias"]
        return out[:, :, None, None]

    def transposed(x, name, side):
        return functional.conv_transpose2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride=side)

    def norm(x, name):
        return functional.group_norm(x, 8, w[f"{name}.weight"], w[f"{name}.bias"])

    def up(x, name):
        x = transposed(x, f"{name}.model.0", 2)
        return rcb(rcb(x, f"{name}.model.1"), f"{name}.model.2")

    start = rcb(x, "init_conv", residual=True)
    d1 = functional.max_pool2d(rcb(start, "down1.model.0"), 2)
    d2 = functional.max_pool2d(rcb(d1, "down2.model.0"), 2)
    assert d2.shape[1:] == (2 * width, 7, 7)
    u = functional.gelu(d2.mean((2, 3), keepdim=True))
    u = functional.relu(norm(transposed(u, "up0.0", 7), "up0.1"))
    c1, t1 = embed(context, "contextembed1"), embed(time, "timeembed1")
    u = up(torch.cat([c1 * u + t1, d2], 1), "up1")
    c2, t2 = embed(context, "contextembed2"), embed(time, "timeembed2")
    u = up(torch.cat([c2 * u + t2, d1], 1), "up2")
    u = functional.relu(norm(conv(torch.cat([u, start], 1), "out.0"), "out.1"))
    return conv(u, "out.3")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small checkpoint in the public format, with statistics that are not those of a new one."""
    path = tmp_path_factory.mktemp("public") / "model_39.pth"
    torch.save(public_checkpoint(8), path)
    return path


def test_the_default_is_the_public_network():
    with torch.device("meta"):
        network = MNISTUNet()
    assert sum(p.numel() for p in network.parameters()) == 6_585_601
    assert len(network.state_dict()) == 128
    expected = public_checkpoint(128, device="meta")
    found = {f"nn_model.{name}": v.shape for name, v in network.state_dict().items()}
    assert found == {k: v.shape for k, v in expected.items() if k.startswith("nn_model.")}


def test_an_imported_network_is_the_described_one(checkpoint):
    state, network = torch.load(checkpoint), read_mnist_ddpm(checkpoint).network
    x = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([1, 2, 200, 400])
    labels = torch.tensor([3, 0, 9, 10])  # the last is no class
    context = torch.zeros(4, 10)
    context[[0, 1, 2], labels[:3]] = -1
    with torch.no_grad():
        expected = reference(state, x, steps[:, None] / 400, context)
        found = network(x, (steps - 1).float(), labels)
    assert expected.std() > 0.1
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert (found[0] - reference(state, x, steps[:, None] / 400, -context)[0]).abs().max() > 1e-3


def test_the_denoiser_speaks_of_images_in_minus_one_to_one(checkpoint):
    """At every trained time, D is 2 y0 - 1 of the DDPM's own estimate y0 in [0, 1]."""
    state, denoiser = torch.load(checkpoint), read_mnist_ddpm(checkpoint)
    assert (denoiser.num_classes, denoiser.null_label) == (10, 10)
    assert denoiser.image_shape == (1, 28, 28) and len(denoiser.betas) == 400
    labels, context = torch.tensor([4, 4, 4]), torch.zeros(3, 10)
    context[:, 4] = -1
    t = torch.tensor([1, 137, 400])
    kept = state["alphabar_t"].double()[t].view(-1, 1, 1, 1)
    y = torch.rand(3, 1, 28, 28)
    noise = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    y_t = (kept.sqrt() * y + (1 - kept).sqrt() * noise).float()
    sigma = 2 * ((1 - kept) / kept).sqrt()
    with torch.no_grad():
        eps = reference(state, y_t, t[:, None] / 400, context)
        found = denoiser((2 * y - 1) + sigma.float() * noise, sigma.flatten(), labels)
    estimate = (y_t - (1 - kept).sqrt() * eps) / kept.sqrt()
    assert torch.allclose(found.double(), 2 * estimate - 1, rtol=1e-3, atol=2e-4)
    # Sampling begins where the DDPM does: at unit noise, which is its state at t = 400.
    start = denoiser.start(noise)
    own = (start + 1) / 2 * kept[-1].sqrt()
    assert torch.allclose(own.float(), noise, atol=1e-5)
    assert denoiser.sigma_max == pytest.approx(float(sigma[-1]), rel=1e-5)


def test_a_folder_keeps_all_of_it(checkpoint, tmp_path):
    denoiser = read_mnist_ddpm(checkpoint)
    save_denoiser(denoiser, tmp_path / "folder")
    again = load_denoiser(tmp_path / "folder")
    assert again.fingerprint() == denoiser.fingerprint()
    assert (again.image_range, again.null_label) == ((0, 1), 10)
    assert {f.name for f in (tmp_path / "folder" / "unet").iterdir()} == {
        *("config.json", "mnist_unet.py", "diffusion_pytorch_model.safetensors")
    }


def normalisations(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def test_batch_normalisation_never_uses_a_batch(checkpoint):
    denoiser = read_mnist_ddpm(checkpoint)
    for module in (DMD(denoiser, distance="l2"), DiffusionTeacher(denoiser)):
        module.train()
        found = normalisations(module)
        assert len(found) >= 2 * 14 and not any(m.training for m in found)
    before = {k: v.clone() for k, v in denoiser.state_dict().items() if "running" in k}
    denoiser.train()
    denoiser(torch.randn(2, 1, 28, 28), torch.ones(2), torch.tensor([1, 2]))
    assert all(torch.equal(v, denoiser.state_dict()[k]) for k, v in before.items())


def test_labels_of_no_class_are_the_default():
    network, x = MNISTUNet(8, 1, 8, 4).eval(), torch.randn(2, 1, 8, 8)
    none = network(x, 3.0, torch.tensor([3, 3])).sample
    assert torch.equal(network(x, torch.tensor(3.0)).sample, none)
    assert not torch.allclose(network(x, 3.0, torch.tensor([0, 1])).sample, none)


def test_an_adapter_fits_it(checkpoint):
    student = adapted(read_mnist_ddpm(checkpoint), LoRA(2))
    out = student(torch.randn(2, 1, 28, 28), torch.ones(2), torch.tensor([1, 2]))
    out.square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in student.parameters())


def test_it_has_no_place_for_further_inputs(checkpoint):
    with pytest.raises(ValueError, match="MNISTUNet has no place for to_sigma"):
        add_inputs(read_mnist_ddpm(checkpoint), ("to_sigma",))


def test_other_widths_and_schedules_are_read(tmp_path):
    state = public_checkpoint(16, classes=7, steps=100)
    torch.save(state, tmp_path / "wide.pth")
    denoiser = read_mnist_ddpm(tmp_path / "wide.pth")
    assert denoiser.num_classes == 7 and len(denoiser.betas) == 100
    assert denoiser.network.unet.num_timesteps == 100


def changed(change):
    """A checkpoint with one thing wrong."""
    state = public_checkpoint(8)
    change(state)
    return state


def longer(state):
    state |= {name: tensor for name, tensor in schedule(500).items() if name == "sqrtab"}


def other_alphas(state):
    state["alpha_t"] = state["alpha_t"] - 0.1


def last_layer(state):
    state["nn_model.out.3.weight"] = torch.zeros(3, 8, 3, 3)


def not_a_number(state):
    state["nn_model.out.3.bias"] = torch.full((1,), torch.nan)


BAD = {
    "no schedule": (lambda s: s.pop("sqrt_beta_t"), "it has no schedule sqrt_beta_t"),
    "part of a schedule": (lambda s: s.pop("sqrtmab"), r"its schedule lacks sqrtmab \(401,\)"),
    "two lengths": (longer, r"its schedule lacks sqrtab \(401,\)"),
    "two schedules": (other_alphas, "contradicts itself: alpha_t and sqrt_beta_t"),
    "no network": (lambda s: s.pop("nn_model.init_conv.conv1.0.weight"), "no nn_model.init_conv"),
    "a missing layer": (lambda s: s.pop("nn_model.up0.1.bias"), r"nn_model.up0.1.bias \(16,\) is"),
    "a larger layer": (last_layer, r"nn_model.out.3.weight \(1, 8, 3, 3\) is of shape \(3, 8,"),
    "a further layer": (
        lambda s: s.update({"nn_model.attention.weight": torch.zeros(1)}),
        "it also has nn_model.attention.weight",
    ),
    "not a number": (not_a_number, "hold NaN or infinite values"),
}


@pytest.mark.parametrize("name", BAD)
def test_checkpoints_of_other_networks_are_refused(tmp_path, name):
    change, sentence = BAD[name]
    torch.save(changed(change), tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=sentence) as caught:
        read_mnist_ddpm(tmp_path / "bad.pth")
    assert str(tmp_path / "bad.pth") in str(caught.value)


class _Stranger:
    def __reduce__(self):
        return exit, (3,)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (_Stranger(), "no file of tensors .* save the model's state_dict"),
        ([torch.zeros(2)], "holds no state_dict"),
        ({"epoch": 3}, "holds no state_dict"),
    ],
)
def test_what_is_no_state_dict_is_refused_unopened(tmp_path, content, sentence):
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=sentence):
        read_mnist_ddpm(tmp_path / "bad.pth")


def test_a_text_file_and_no_file_are_refused(tmp_path):
    (tmp_path / "bad.pth").write_text("weights")
    with pytest.raises(ValueError, match="no file of tensors"):
        read_mnist_ddpm(tmp_path / "bad.pth")
    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_mnist_ddpm(tmp_path / "none.pth")


def test_it_is_a_network_of_any_denoiser():
    """For training from scratch, with another objective."""
    network = UNet.wrap(MNISTUNet(8, 1, 8, 4), num_classes=3, null_label=3)
    module = DiffusionTeacher(EDMDenoiser(network), LogNormalSigma(), label_dropout=0.1)
    assert isinstance(module.student, EDMDenoiser) and not isinstance(
        module.student, EpsilonDenoiser
    )
    assert module.student.image_shape == (1, 8, 8)
