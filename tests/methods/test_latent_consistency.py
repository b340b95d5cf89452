"""The loss of latent consistency distillation against the formulas, in diffusers' coordinate."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from small_text import text_folder
from tiny import denoiser, epsilon

from lit_distill.diffusion import GuidedDenoiser, jump
from lit_distill.methods import LatentConsistencyDistillation
from lit_distill.models import LoRA, load_denoiser

PROMPTS = ["one", "a handwritten two", "three", "zero", "four", "five", "the digit six", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return text_folder(tmp_path_factory.mktemp("text") / "teacher")


def method(folder, **options):
    torch.manual_seed(0)
    module = LatentConsistencyDistillation(folder, **options)
    for weight in module.student.parameters():
        weight.data += 0.03 * torch.randn_like(weight)
    module.log = lambda *args, **kwargs: None
    return module


def guidance_embedding(w, width):
    """Sinusoids of 1000 w, as the stock pipeline embeds ``guidance_scale - 1``."""
    half = width // 2
    frequencies = torch.exp(-torch.arange(half) * torch.log(torch.tensor(10000.0)) / (half - 1))
    angles = 1000 * w[:, None] * frequencies[None]
    return torch.cat([angles.sin(), angles.cos()], 1)


def reference_loss(teacher, student, alphas, x0, prompts, empty, draws, told):
    """Luo et al. 2023, Algorithm 1, on the variance-preserving states of diffusers' script.

    ``teacher`` and ``student`` are called as ``f(x, t, prompt[, w])`` and give the noise.
    """
    index, scale, noise = draws
    w = scale - 1
    grid = torch.arange(1, 51) * 20 - 1
    t = grid[index]
    s = (t - 20).clamp_min(0)

    def at(values, x):
        return values.view(-1, 1, 1, 1).to(x.dtype)

    def f(x, t, extra):
        eps = student(x, t.float(), prompts, extra)
        a = alphas[t]
        x0_hat = (x - at((1 - a).sqrt(), x) * eps) / at(a.sqrt(), x)
        scaled = 10.0 * t
        c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
        return at(c_skip, x) * x + at(c_out, x) * x0_hat

    x = at(alphas[t].sqrt(), x0) * x0 + at((1 - alphas[t]).sqrt(), x0) * noise
    eps_c, eps_u = teacher(x, t.float(), prompts), teacher(x, t.float(), empty)
    eps = eps_c + at(w, x) * (eps_c - eps_u)
    x0_hat = (x - at((1 - alphas[t]).sqrt(), x) * eps) / at(alphas[t].sqrt(), x)
    below = at(alphas[s].sqrt(), x) * x0_hat + at((1 - alphas[s]).sqrt(), x) * eps
    extra = guidance_embedding(w, 256) if told else None
    difference = f(x, t, extra) - f(below, s, extra)
    return ((difference**2 + 0.001**2).sqrt() - 0.001).mean()


@pytest.mark.parametrize("adapters", [False, True])
def test_the_loss_is_that_of_the_formulas(folder, adapters):
    lora = LoRA(rank=4, target_modules=["to_q", "conv1"]) if adapters else None
    module = method(folder, guidance=(2.0, 6.0), lora=lora)
    codec = module.student.codec
    batch = {"image": torch.randn(8, 4, 4, 4), "prompt_embeds": codec.embed(PROMPTS)}
    torch.manual_seed(5)
    draws = torch.randint(50, (8,)), 2 + 4 * torch.rand(8), torch.randn(8, 4, 4, 4)
    assert draws[0].unique().numel() > 4

    def teacher(x, t, prompts):
        return module.teacher.network(x, t, {"prompt_embeds": prompts})

    def student(x, t, prompts, extra):
        if adapters:
            return module.student.network(x, t, {"prompt_embeds": prompts})
        unet = module.student.network.unet
        return unet(x, t, prompts, timestep_cond=extra, return_dict=False)[0]

    alphas = (1 - module.student.betas).cumprod(0)
    empty = codec.null(batch["prompt_embeds"])
    with torch.no_grad():
        expected = reference_loss(
            *(teacher, student, alphas, batch["image"], batch["prompt_embeds"], empty, draws),
            told=not adapters,
        )
        torch.manual_seed(5)
        found = module.training_step(batch, 0)
    assert float(expected) > 1e-3
    assert float(found) == pytest.approx(float(expected), rel=2e-4)


def test_a_guided_step_of_the_teacher_is_that_of_the_stock_scheduler(folder):
    module = method(folder, guidance=(2.0, 6.0))
    teacher, codec = module.teacher, module.student.codec
    scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    scheduler.set_timesteps(50)
    assert torch.equal(scheduler.timesteps, module.times.flip(0))  # the same grid
    condition = codec.condition(["a handwritten two"])
    x, table = torch.randn(1, 4, 4, 4), module.table
    for t in (999, 499, 39):
        sigma, below = table[t].reshape(1), table[t - 20].reshape(1)
        scale = (1 + sigma**2).sqrt()
        with torch.no_grad():
            c = teacher.network(x, torch.tensor([t]), condition)
            u = teacher.network(x, torch.tensor([t]), teacher.null(condition))
            expected = scheduler.step(u + 4.5 * (c - u), t, x).prev_sample
            ve = (scale * x).float()
            guided = module.guided(ve, sigma, condition, torch.tensor([4.5]))
            same = GuidedDenoiser(teacher, 4.5)(ve, sigma, condition)
        torch.testing.assert_close(guided, same)
        found = jump(ve, guided, sigma, below) / (1 + below**2).sqrt()
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


def test_the_estimate_at_time_0_is_the_state_itself(folder):
    module = method(folder, guidance=(2.0, 6.0))
    x, sigma = torch.randn(2, 4, 4, 4), module.table[:1].expand(2)
    condition = module.student.codec.condition(["one", "two"])
    with torch.no_grad():
        found = module.student(x, sigma, condition)
    torch.testing.assert_close(found, (x / (1 + sigma[0] ** 2).sqrt()).float())


def test_v_prediction_gives_the_same_student_as_the_noise():
    from lit_distill.diffusion import LatentConsistencyDenoiser, VelocityDenoiser

    class Knows(torch.nn.Module):
        """Knows the noise (or v) of a fixed image."""

        def __init__(self, kind):
            super().__init__()
            self.kind = kind

        def forward(self, x, time, condition):
            betas = VelocityDenoiser(torch.nn.Identity()).betas
            a = (1 - betas).cumprod(0)[time.long()].view(-1, 1, 1, 1).float()
            noise = (x - a.sqrt() * 0.3) / (1 - a).sqrt()
            return noise if self.kind == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * 0.3

    x, sigma = torch.randn(3, 1, 4, 4), LatentConsistencyDenoiser(Knows("")).table[[19, 499, 999]]
    for kind in ("epsilon", "v_prediction"):
        model = LatentConsistencyDenoiser(Knows(kind), prediction=kind)
        torch.testing.assert_close(model(x, sigma), torch.full_like(x, 0.3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"guidance": (4.0, 4.0)}, "has no width"),
        ({"guidance": (6.0, 2.0)}, "no range of scales"),
        ({"grid_steps": 0}, "the grid has 1 to 1000 times"),
        ({"lora": LoRA(rank=2), "student": "x"}, "leave student out"),
        ({"target": "x"}, "choose stop_gradient or ema"),
        ({"teacher_precision": "float16"}, "choose float32 or bfloat16"),
    ],
)
def test_impossible_settings_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        LatentConsistencyDistillation(epsilon(), **options)


def test_adapters_may_be_trained_at_one_scale():
    LatentConsistencyDistillation(epsilon(), guidance=(4.0, 4.0), lora=LoRA(rank=2))


@pytest.mark.parametrize("adapters", [None, LoRA(rank=2)], ids=["full", "lora"])
def test_a_teacher_in_bfloat16_trains_a_student_in_float32(folder, adapters):
    plain, rounded = (
        method(folder, lora=adapters, teacher_precision=precision)
        for precision in ("float32", "bfloat16")
    )
    assert {p.dtype for p in rounded.teacher.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in rounded.student.parameters()} == {torch.float32}
    assert rounded.teacher.original == load_denoiser(folder).fingerprint()
    embeds = plain.teacher.codec.embed(PROMPTS)
    batch = {"image": torch.randn(8, *plain.teacher.image_shape), "prompt_embeds": embeds}
    losses = []
    for module in (plain, rounded):
        torch.manual_seed(1)
        losses.append(module.training_step(batch, 0))
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.1, atol=0)
    losses[1].backward()
    assert all(p.grad is not None for p in rounded.student.parameters() if p.requires_grad)


def test_a_teacher_without_a_table_is_refused():
    with pytest.raises(ValueError, match="this one is a EDMDenoiser"):
        LatentConsistencyDistillation(denoiser())
