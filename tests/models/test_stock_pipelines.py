"""Exported folders in stock pipelines, in a process that never imports lit_distill."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from stock_process import images_of
from tiny_networks import tiny_network

from lit_distill.diffusion import (
    ConsistencyDenoiser,
    EDMDenoiser,
    EpsilonDenoiser,
    FewSteps,
    FlowDenoiser,
    VelocityDenoiser,
    drawn_noise,
    linear_betas,
    sample,
    seeded_generators,
    seeded_noise,
    solve,
)
from lit_distill.models import load_denoiser, save_denoiser

SEEDS = [7, 8, 9, 2**33]
LABELS = [0, 2, 1, 3]  # the last is the null class
# A table that ends at sigma = 0.8, where an untrained network's images are not all clipped.
SHORT = linear_betas(50)


def student(denoiser, steps=(1,), generator_sigma=None, **sampling):
    if generator_sigma is not None:
        denoiser.start_from(generator_sigma)
    denoiser.few_steps = FewSteps(steps, **sampling)
    return denoiser.eval()


def models():
    """Name: model, steps, and whether it is asked with labels."""
    conditional, plain = tiny_network(num_classes=3), tiny_network()
    grey, colour = tiny_network(seed=2), tiny_network(channels=3, seed=3)
    return {
        "edm": (student(EDMDenoiser(conditional, sigma_data=0.75)), 1, True),
        "edm_lower": (student(EDMDenoiser(colour), generator_sigma=2.5), 1, False),
        "epsilon": (student(EpsilonDenoiser(plain, betas=SHORT)), 1, False),
        "epsilon_lower": (student(EpsilonDenoiser(colour), generator_sigma=0.9), 1, False),
        "epsilon_teacher": (EpsilonDenoiser(grey, betas=SHORT).eval(), 10, False),
        "velocity_teacher": (VelocityDenoiser(plain).eval(), 10, False),
        "flow": (student(FlowDenoiser(plain)), 1, False),
        "progressive": (progressive(plain), 10, False),
        "consistency": (consistency(conditional), 1, True),
    }


def progressive(network):
    denoiser = VelocityDenoiser(network)
    halved = denoiser.sigmas(20)[::2].tolist()  # the trailing levels, though written out
    return student(denoiser, (10,), grids=[halved], only=True)


def consistency(network):
    return student(ConsistencyDenoiser(network, sigma_min=0.02), (1, 2), gamma=1.0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("export")
    for name, (model, _, _) in models().items():
        save_denoiser(model, root / name)
    return root


@pytest.fixture(scope="module")
def stock(folders):
    """Images ``(N, H, W, C)`` in [0, 1] that the stock pipelines made, by name."""
    jobs = {}
    for name, (_, steps, labelled) in models().items():
        options = {"batch_size": len(SEEDS), "num_inference_steps": steps}
        if labelled:
            options["class_labels"] = LABELS
        jobs[name] = {"folder": str(folders / name), "seeds": SEEDS, "options": options}
    jobs["flow_steps"] = {
        **jobs["flow"],
        "options": {"batch_size": len(SEEDS), "num_inference_steps": 5},
    }
    jobs["consistency_steps"] = {
        "folder": str(folders / "consistency"),
        "seeds": SEEDS,
        "options": {**jobs["consistency"]["options"], "num_inference_steps": 3},
    }
    return images_of(jobs, folders)


def noise_for(denoiser):
    return seeded_noise(denoiser.image_shape, SEEDS)


def assert_equal(found, images):
    found = (found / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    images = torch.from_numpy(images)
    # Clipped pixels agree for free.
    assert float(((images > 0) & (images < 1)).float().mean()) > 0.3
    assert float((images[0] - images[1]).abs().mean()) > 1e-3
    assert torch.allclose(found, images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", models())
def test_the_stock_pipeline_gives_the_same_images_as_sample(folders, stock, name):
    _, steps, labelled = models()[name]
    denoiser = load_denoiser(folders / name)
    condition = torch.tensor(LABELS) if labelled else None
    with torch.no_grad():
        solver = "ddim" if denoiser.few_steps is None else None
        found = sample(
            denoiser, noise_for(denoiser), steps=steps, solver=solver, condition=condition
        )
    assert_equal(found, stock[name])


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("edm", "ConsistencyModelPipeline"),
        ("consistency", "ConsistencyModelPipeline"),
        ("epsilon", "DDIMPipeline"),
        ("velocity_teacher", "DDIMPipeline"),
        ("progressive", "DDIMPipeline"),
        ("flow", "DDPMPipeline"),
    ],
)
def test_the_folder_names_its_stock_pipeline(stock, name, pipeline):
    assert str(stock[f"{name}/pipeline"]) == pipeline


def test_a_flow_is_sampled_on_the_stock_schedulers_grid(folders, stock):
    denoiser = load_denoiser(folders / "flow")
    # FlowMatchEulerDiscreteScheduler goes from t = 1 to 1/1000, then to 0.
    t = torch.cat([torch.linspace(1, 1e-3, 5, dtype=torch.float64), torch.zeros(1).double()])
    grid = (t / (1 - t)).clamp(max=denoiser.sigma_max)
    with torch.no_grad():
        found = solve(denoiser, denoiser.start(noise_for(denoiser)), grid, solver="euler")
    assert_equal(found, stock["flow_steps"])


def test_several_steps_of_a_consistency_model_are_the_stock_pipelines(folders, stock):
    denoiser = load_denoiser(folders / "consistency")
    generators = seeded_generators(SEEDS)
    noise = drawn_noise(denoiser.image_shape, generators)
    labels = torch.tensor(LABELS)
    with torch.no_grad(), pytest.warns(UserWarning, match="not for 3"):
        found = sample(denoiser, noise, steps=3, condition=labels, generator=generators)
    assert_equal(found, stock["consistency_steps"])


def test_labels_matter_to_the_exported_student(folders):
    denoiser = load_denoiser(folders / "edm")
    noise = noise_for(denoiser)
    with torch.no_grad():
        one, other = (
            sample(denoiser, noise, steps=1, condition=torch.full((len(SEEDS),), label))
            for label in (0, 1)
        )
    assert float((one - other).abs().max()) > 1e-2
