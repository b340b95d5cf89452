"""Adapters of several networks on one backbone."""

import copy
import os

import peft
import pytest
import torch
from diffusers import UNet2DModel
from tiny_networks import tiny_network

from lit_distill.diffusion import EDMDenoiser
from lit_distill.models import LoRA, adapted, load_denoiser, merged, save_adapter, save_denoiser

LABEL = torch.tensor([0, 2, 1])


def moved(denoiser, seed=0):
    """The same model, whose adapter changes its output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in denoiser.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return denoiser


def output(denoiser, x):
    return denoiser(x, torch.full((len(x),), 2.0), LABEL)


@pytest.fixture
def teacher():
    return EDMDenoiser(tiny_network(num_classes=3)).eval().requires_grad_(False)


@pytest.fixture
def x():
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_at_first_nothing_changes(teacher, x):
    before, known_as = output(teacher, x), teacher.fingerprint()
    student = adapted(teacher, LoRA(rank=2))
    assert torch.equal(output(student, x), before)
    assert torch.equal(output(teacher, x), before)
    assert teacher.original == known_as and student.original is None


def test_each_has_numbers_of_its_own(teacher, x):
    before = output(teacher, x)
    student, fake = adapted(teacher, LoRA(rank=2)), adapted(teacher, LoRA(rank=2))
    ours, theirs = output(moved(student, 0), x), output(moved(fake, 1), x)
    assert not torch.allclose(ours, before) and not torch.allclose(theirs, ours)
    assert torch.equal(output(student, x), ours)
    assert torch.equal(output(teacher, x), before)
    again = copy.deepcopy(student)
    moved(student, 2)
    assert torch.equal(output(again, x), ours)
    assert again.network.backbone is teacher.network


def test_gradients_reach_every_adapter_tensor_and_no_other(teacher, x):
    """Also when another adapter, and none, have run since the pass."""
    student, fake = (moved(adapted(teacher, LoRA(rank=2)), seed) for seed in (0, 1))
    loss = output(student, x).square().mean()
    with torch.no_grad():
        output(fake, x)
        output(teacher, x)
    loss.backward()
    for parameter in student.parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in fake.parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_its_gradient_is_that_of_the_merged_weights(teacher, x):
    student = moved(adapted(teacher, LoRA(rank=2, alpha=3)))
    x = x.requires_grad_()
    gradients = []
    for model in (student, merged(student)):
        gradients.append(torch.autograd.grad(output(model, x).square().sum(), x)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_merged_it_is_a_plain_network_and_a_folder(teacher, x, tmp_path):
    student = moved(adapted(teacher, LoRA(rank=2)))
    plain = merged(student)
    assert plain.network.unet.config == teacher.network.unet.config
    assert set(plain.state_dict()) == set(EDMDenoiser(tiny_network(num_classes=3)).state_dict())
    torch.testing.assert_close(output(plain, x), output(student, x), rtol=1e-4, atol=1e-5)
    save_denoiser(student, tmp_path / "student")
    loaded = load_denoiser(tmp_path / "student")
    torch.testing.assert_close(output(loaded, x), output(plain, x))


def test_its_adapter_opens_in_peft(teacher, x, tmp_path):
    save_denoiser(teacher, tmp_path / "teacher")
    student = moved(adapted(teacher, LoRA(rank=2, alpha=3)))
    save_adapter(student, tmp_path / "adapter")
    save_adapter(student, tmp_path / "adapter")  # again, in its place
    unet = UNet2DModel.from_pretrained(tmp_path / "teacher" / "unet")
    with_adapter = peft.PeftModel.from_pretrained(unet, tmp_path / "adapter").eval()
    sigma = torch.full((3,), 2.0)
    c_skip, c_out, c_in = teacher.scalings(sigma[0])
    with torch.no_grad():
        time = teacher.time(sigma)
        found = with_adapter(c_in * x, time, class_labels=LABEL, return_dict=False)[0]
        torch.testing.assert_close(
            c_skip * x + c_out * found, output(student, x), rtol=1e-4, atol=1e-5
        )


def test_a_failure_while_renaming_brings_the_old_adapter_back(teacher, tmp_path, monkeypatch):
    student = moved(adapted(teacher, LoRA(rank=2)))
    save_adapter(student, tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    before, failures = weights.read_bytes(), []

    def fails_once(rename):
        def renamed(source, target):
            if os.path.basename(target) == "adapter" and not failures:
                failures.append(source)
                raise OSError("Input/output error")
            rename(source, target)

        return renamed

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, fails_once(getattr(os, name)))
    with pytest.raises(OSError, match="Input/output"):
        save_adapter(moved(student, 1), tmp_path / "adapter")
    assert weights.read_bytes() == before and os.listdir(tmp_path) == ["adapter"]


def test_on_a_backbone_of_bfloat16_the_adapter_stays_precise(teacher, x):
    teacher.to(torch.bfloat16)
    student = moved(adapted(teacher, LoRA(rank=2)))
    assert all(parameter.dtype == torch.float32 for parameter in student.parameters())
    assert torch.allclose(output(student, x), output(merged(student), x), atol=0.05)


@pytest.mark.parametrize("names", [["conv1"], ["resnets.0.conv1", "to_q"]])
def test_layers_may_be_chosen(teacher, names):
    student = adapted(teacher, LoRA(rank=2, target_modules=names))
    assert all(
        any(f"{n.replace('.', '/')}/lora" in p for n in names)
        for p, _ in student.named_parameters()
    )


def test_names_that_match_nothing(teacher):
    with pytest.raises(ValueError, match=r"\['q_proj'\] match no layer.*conv1.*to_q"):
        adapted(teacher, LoRA(target_modules=["q_proj"]))


def test_a_rank_of_nothing():
    with pytest.raises(ValueError, match="rank=0"):
        LoRA(rank=0)


def test_what_is_no_adapter_is_left_alone(teacher, tmp_path):
    (tmp_path / "something").mkdir()
    with pytest.raises(ValueError, match="option lora"):
        save_adapter(teacher, tmp_path / "adapter")
    student = adapted(teacher, LoRA(rank=2))
    with pytest.raises(ValueError, match="no adapter's folder"):
        save_adapter(student, tmp_path / "something")
