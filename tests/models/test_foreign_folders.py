"""Folders that diffusers wrote by itself."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    ScoreSdeVeScheduler,
)

sys.path.insert(0, str(Path(__file__).parent))
from public import ddpm_cifar10
from tiny_networks import stock_unet

from lit_distill.diffusion import (
    ConsistencyDenoiser,
    EDMDenoiser,
    EpsilonDenoiser,
    FewSteps,
    FlowDenoiser,
    VelocityDenoiser,
    sample,
    seeded_noise,
    solve,
)
from lit_distill.models import load_denoiser, save_denoiser

FULL = {"clip_sample": False}
V = {"prediction_type": "v_prediction"}
SEEDS = range(3)


def stock_folder(folder, scheduler, pipeline=DDPMPipeline, **arguments):
    pipeline(stock_unet(**arguments), scheduler).save_pretrained(folder)
    return folder


def stock_images(folder, **options):
    """Images in [-1, 1] by the folder's own pipeline; image i has seed i."""
    pipeline = DDPMPipeline.from_pretrained(folder)
    kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    pipeline = {"DDIMPipeline": DDIMPipeline, "ConsistencyModelPipeline": ConsistencyModelPipeline}[
        kind
    ](**pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(i) for i in SEEDS]
    images = pipeline(
        batch_size=len(SEEDS), generator=generator, output_type="np", return_dict=False, **options
    )[0]
    return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1


@torch.no_grad()
def own_images(folder, **options):
    denoiser = load_denoiser(folder)
    return sample(denoiser, seeded_noise((1, 8, 8), SEEDS), **options).clamp(-1, 1)


SCHEDULERS = {
    "ddpm": (DDPMScheduler(**FULL), EpsilonDenoiser),
    "ddim": (DDIMScheduler(**FULL, beta_schedule="scaled_linear"), EpsilonDenoiser),
    "cosine": (DDPMScheduler(**FULL, beta_schedule="squaredcos_cap_v2"), EpsilonDenoiser),
    "velocity": (DDPMScheduler(**FULL, **V), VelocityDenoiser),
    "zero_snr": (DDIMScheduler(**FULL, rescale_betas_zero_snr=True, **V), VelocityDenoiser),
    "dpm": (DPMSolverMultistepScheduler(), EpsilonDenoiser),
    "euler": (EulerDiscreteScheduler(num_train_timesteps=400), EpsilonDenoiser),
    "edm": (EDMEulerScheduler(sigma_data=0.6, sigma_max=50), EDMDenoiser),
    "flow": (FlowMatchEulerDiscreteScheduler(shift=3.0), FlowDenoiser),
    "consistency": (
        CMStochasticIterativeScheduler(sigma_min=0.004, clip_denoised=False),
        ConsistencyDenoiser,
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_scheduler_says_which_denoiser_it_is(tmp_path, name):
    scheduler, kind = SCHEDULERS[name]
    folder = stock_folder(tmp_path / "model", scheduler)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is clipped
        denoiser = load_denoiser(folder)
    assert type(denoiser) is kind
    assert denoiser.image_shape == (1, 8, 8)
    assert denoiser.num_classes is None and denoiser.null_label is None
    few = FewSteps((1, 2), gamma=1.0) if kind is ConsistencyDenoiser else None
    assert denoiser.few_steps == few and not denoiser.training
    if hasattr(denoiser, "table"):
        stock = scheduler.alphas_cumprod.double().clamp_min(1e-9)
        assert torch.allclose(denoiser.table, ((1 - stock) / stock).sqrt(), rtol=1e-2)
        assert len(denoiser.table) == scheduler.config.num_train_timesteps
    out = sample(denoiser, seeded_noise((1, 8, 8), SEEDS), steps=2, solver="euler")
    assert out.isfinite().all()
    save_denoiser(denoiser, tmp_path / "own")
    assert load_denoiser(tmp_path / "own").fingerprint() == denoiser.fingerprint()


def test_edm_folders_keep_their_levels_and_times(tmp_path):
    denoiser = load_denoiser(stock_folder(tmp_path / "model", SCHEDULERS["edm"][0]))
    assert denoiser.settings() == {
        "sigma_min": 0.002,
        "sigma_max": 50,
        "sigma_data": 0.6,
        "time_scale": 1,
    }


def test_consistency_folders_keep_their_levels(tmp_path):
    scheduler = CMStochasticIterativeScheduler(
        num_train_timesteps=18, sigma_min=0.01, sigma_max=40, sigma_data=0.7, clip_denoised=False
    )
    denoiser = load_denoiser(stock_folder(tmp_path / "model", scheduler))
    assert denoiser.settings() == {
        "sigma_min": 0.01,
        "sigma_max": 40,
        "sigma_data": 0.7,
        "time_scale": 1000,
        "num_timesteps": 18,
    }


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(),
        DDIMScheduler(),
        DDPMScheduler(**FULL, thresholding=True),
        CMStochasticIterativeScheduler(),
    ],
)
def test_clipping_schedulers_are_named_in_a_warning(tmp_path, scheduler):
    folder = stock_folder(tmp_path / "model", scheduler)
    with pytest.warns(UserWarning, match="clips its estimates") as caught:
        load_denoiser(folder)
    assert str(folder) in str(caught[0].message)
    assert caught[0].filename == __file__  # points at the caller


def test_a_setting_that_a_config_leaves_out_has_diffusers_default(tmp_path):
    folder = stock_folder(tmp_path / "model", DDPMScheduler())
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    for key in ("clip_sample", "beta_end"):
        del config[key]
    file.write_text(json.dumps(config))
    with pytest.warns(UserWarning, match="clips its estimates"):
        assert load_denoiser(folder).sigma_max == pytest.approx(157.4, rel=1e-3)


# --- The same images as the stock pipeline -------------------------------------------------------


def test_ddim_of_a_foreign_v_prediction_teacher_is_the_stock_pipelines(tmp_path):
    scheduler = DDIMScheduler(**FULL, timestep_spacing="trailing", **V)
    folder = stock_folder(tmp_path / "model", scheduler, DDIMPipeline)
    expected = stock_images(folder, num_inference_steps=10)
    assert expected.abs().mean() < 0.9
    found = own_images(folder, steps=10, solver="ddim")
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)


def test_one_step_of_a_foreign_consistency_model_is_the_stock_pipelines(tmp_path):
    scheduler = CMStochasticIterativeScheduler(clip_denoised=False)
    folder = stock_folder(tmp_path / "model", scheduler, ConsistencyModelPipeline)
    expected = stock_images(folder, num_inference_steps=1)
    assert expected.abs().mean() < 0.9
    assert torch.allclose(own_images(folder, steps=1), expected, rtol=0, atol=1e-4)


def test_euler_on_a_foreign_edm_model_is_its_schedulers(tmp_path):
    scheduler = EDMEulerScheduler()
    folder = stock_folder(tmp_path / "model", scheduler)
    denoiser, unet = load_denoiser(folder), stock_unet().eval()
    scheduler.set_timesteps(8)
    x = start = denoiser.start(seeded_noise((1, 8, 8), SEEDS))
    with torch.no_grad():
        for time in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x, time)
            x = scheduler.step(unet(scaled, time).sample, time, x).prev_sample
        found = solve(denoiser, start, scheduler.sigmas, solver="euler")
    assert torch.allclose(found, x, rtol=0, atol=1e-4)


def test_files_at_the_root_are_read_as_on_old_hub_pages(tmp_path):
    folder = stock_folder(tmp_path / "model", DDPMScheduler(**FULL))
    expected = own_images(folder, steps=3)
    for component in ("unet", "scheduler"):
        for file in (folder / component).iterdir():
            shutil.move(file, folder / file.name)
        (folder / component).rmdir()
    assert torch.equal(own_images(folder, steps=3), expected)


def test_the_cifar10_model_of_the_hub_loads_by_its_name(tmp_path, monkeypatch):
    """``google/ddpm-cifar10-32`` from the hub's own cache."""
    import huggingface_hub.constants

    cached, unet = tmp_path / "models--google--ddpm-cifar10-32", ddpm_cifar10()
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(cached / "snapshots" / "0123abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0123abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="clips its estimates"):
        denoiser = load_denoiser("google/ddpm-cifar10-32")
    assert sum(p.numel() for p in denoiser.parameters()) == 35_746_307
    assert type(denoiser) is EpsilonDenoiser and denoiser.image_shape == (3, 32, 32)
    assert len(denoiser.table) == 1000 and denoiser.num_classes is None
    x, time = torch.randn(1, 3, 32, 32), torch.tensor([37.0])
    with torch.no_grad():
        found = denoiser.network(x, time)
        assert torch.equal(found, unet.eval()(x, time).sample)


def test_half_precision_weights_become_full(tmp_path):
    DDPMPipeline(stock_unet().half(), DDPMScheduler(**FULL)).save_pretrained(tmp_path)
    denoiser = load_denoiser(tmp_path)
    assert {p.dtype for p in denoiser.parameters()} == {torch.float32}


def test_class_conditional_folders_keep_their_classes(tmp_path):
    folder = stock_folder(tmp_path / "model", DDPMScheduler(**FULL), num_class_embeds=5)
    denoiser = load_denoiser(folder)
    assert (denoiser.num_classes, denoiser.null_label) == (5, None)


# --- What cannot be read -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "sentence"),
    [
        (ScoreSdeVeScheduler(), "ScoreSdeVeScheduler .* is none that says"),
        (FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler .* is none"),
        (DDPMScheduler(prediction_type="sample", **FULL), "prediction_type='sample'"),
        (EDMEulerScheduler(**V), "prediction_type='v_prediction'; 'epsilon'"),
        (FlowMatchEulerDiscreteScheduler(num_train_timesteps=100), "num_train_timesteps=100; 1000"),
    ],
)
def test_schedulers_that_say_something_else_are_refused(tmp_path, scheduler, sentence):
    folder = stock_folder(tmp_path / "model", scheduler)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_denoiser(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["NoScheduler", "UNet2DModel", None])
def test_what_is_no_scheduler_is_refused(tmp_path, name):
    folder = stock_folder(tmp_path / "model", DDPMScheduler())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))
    with pytest.raises(ValueError, match=f"The scheduler {name or '.none.'} in"):
        load_denoiser(folder)


def test_a_folder_without_a_scheduler_is_refused(tmp_path):
    folder = stock_folder(tmp_path / "model", DDPMScheduler())
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(ValueError, match=r"has no scheduler/scheduler_config\.json"):
        load_denoiser(folder)


def test_networks_that_learned_their_variance_are_refused(tmp_path):
    scheduler = DDPMScheduler(variance_type="learned")
    folder = stock_folder(tmp_path / "model", scheduler, out_channels=2)
    with pytest.raises(ValueError, match="2 of output"):
        load_denoiser(folder)
