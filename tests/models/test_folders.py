import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from tiny_networks import tiny_network

from lit_distill.diffusion import (
    ConsistencyDenoiser,
    EDMDenoiser,
    EpsilonDenoiser,
    FewSteps,
    FlowDenoiser,
    GaussianMixtureDenoiser,
    GuidedDenoiser,
    VelocityDenoiser,
    linear_betas,
    sample,
    seeded_noise,
)
from lit_distill.models import load_denoiser, save_denoiser

SETTINGS = {
    "edm": (EDMDenoiser, {"sigma_data": 0.75, "sigma_max": 50.0}),
    "edm_foreign": (EDMDenoiser, {"time_scale": 1.0, "sigma_min": 0.01}),
    "epsilon": (EpsilonDenoiser, {}),
    "epsilon_short": (EpsilonDenoiser, {"betas": linear_betas(400), "discrete": True}),
    "velocity": (VelocityDenoiser, {"betas": linear_betas(100).tolist()}),
    "flow": (FlowDenoiser, {}),
    "consistency": (ConsistencyDenoiser, {"num_timesteps": 18, "sigma_min": 0.004}),
}


def build(name, num_classes=None):
    kind, settings = SETTINGS[name]
    return kind(tiny_network(num_classes), **settings).eval()


def outputs(denoiser, condition=None):
    """Denoisings from the smallest to the largest level."""
    sigma = torch.tensor([denoiser.sigma_min, 0.1, 1.0, denoiser.sigma_max])
    x = seeded_noise((1, 8, 8), range(4)) * (1 + sigma[:, None, None, None])
    with torch.no_grad():
        return denoiser(x, sigma, condition)


def assert_same(loaded, original, condition=None):
    assert type(loaded) is type(original)
    assert torch.equal(outputs(loaded, condition), outputs(original, condition))
    assert loaded.fingerprint() == original.fingerprint()
    assert loaded.settings() == original.settings()
    assert loaded.few_steps == original.few_steps
    for name in ("sigma_min", "sigma_max", "image_shape", "num_classes", "null_label"):
        assert getattr(loaded, name) == getattr(original, name)
    assert torch.equal(loaded.sigmas(5), original.sigmas(5))


def files_below(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


@pytest.mark.parametrize("name", SETTINGS)
def test_a_denoiser_comes_back_with_the_same_bits(tmp_path, name):
    original = build(name)
    save_denoiser(original, tmp_path / "model")
    loaded = load_denoiser(tmp_path / "model")
    assert_same(loaded, original)
    assert not any(module.training for module in loaded.modules())
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    save_denoiser(loaded, tmp_path / "again")
    assert_same(load_denoiser(str(tmp_path / "again")), original)


@pytest.mark.parametrize("name", ["edm", "epsilon", "flow"])
def test_students_come_back_with_their_steps_classes_and_start(tmp_path, name):
    original = build(name, num_classes=3)
    original.start_from(2.5)
    original.few_steps = FewSteps((1, 4), [(2.5, 0.1)])
    save_denoiser(original, tmp_path / "model")
    labels = torch.tensor([0, 1, 2, 3])
    loaded = load_denoiser(tmp_path / "model")
    assert_same(loaded, original, labels)
    assert loaded.null_label == 3 and loaded.few_steps.trained == (1, 4)
    assert torch.equal(loaded.null(labels), torch.full((4,), 3))


def test_a_student_of_an_early_version_does_not_pass_for_a_teacher(tmp_path):
    save_denoiser(build("edm"), tmp_path / "model")
    file = tmp_path / "model" / "lit_distill.json"
    sidecar = json.loads(file.read_text())
    del sidecar["few_steps"]
    file.write_text(json.dumps({**sidecar, "steps": [1]}))
    with pytest.raises(ValueError, match=r"student's of an early version.*export the folder again"):
        load_denoiser(tmp_path / "model")
    file.write_text(json.dumps({**sidecar, "steps": None}))  # and a teacher is still one
    assert load_denoiser(tmp_path / "model").few_steps is None


def test_the_folder_is_diffusers_own_without_pickles_or_paths(tmp_path):
    save_denoiser(build("edm"), tmp_path / "model")
    save_denoiser(load_denoiser(tmp_path / "model"), tmp_path / "again")
    assert files_below(tmp_path / "again") == [
        "lit_distill.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    for file in (tmp_path / "again").rglob("*.json"):
        assert str(tmp_path) not in file.read_text()
    assert (tmp_path / "again").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", [n for n in SETTINGS if n != "epsilon_short"])
def test_without_its_own_file_the_scheduler_says_the_same(tmp_path, name):
    # What only lit_distill.json can say: discrete times, steps, the null class.
    original = build(name)
    save_denoiser(original, tmp_path / "model")
    (tmp_path / "model" / "lit_distill.json").unlink()
    loaded = load_denoiser(tmp_path / "model")
    noise = seeded_noise((1, 8, 8), range(3))
    with torch.no_grad():
        assert torch.allclose(loaded.start(noise), original.start(noise), rtol=1e-5)
        ours = sample(original, noise, steps=1)
        # betas of float32, and EDM's scalings by way of the consistency model's
        atol = 1e-5 * original.sigma_max if "epsilon" in name else 1e-5
        assert torch.allclose(sample(loaded, noise, steps=1), ours, rtol=0, atol=atol)


def test_an_older_export_is_replaced(tmp_path):
    save_denoiser(build("edm"), tmp_path / "model")
    (tmp_path / "model" / "old.txt").touch()
    save_denoiser(build("epsilon"), tmp_path / "model")
    assert isinstance(load_denoiser(tmp_path / "model"), EpsilonDenoiser)
    assert "old.txt" not in files_below(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]


def test_parents_are_made_and_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "a" / "model").mkdir(parents=True)
    save_denoiser(build("edm"), tmp_path / "a" / "model")
    save_denoiser(build("edm"), tmp_path / "b" / "c" / "model")
    assert load_denoiser(tmp_path / "b" / "c" / "model").fingerprint() == (
        load_denoiser(tmp_path / "a" / "model").fingerprint()
    )


def test_a_failure_while_writing_leaves_the_old_folder_and_no_litter(tmp_path, monkeypatch):
    original = build("edm")
    save_denoiser(original, tmp_path / "model")

    def fails_half_way(self, folder, **options):
        self.unet.save_pretrained(Path(folder) / "unet")
        raise OSError("No space left on device")

    monkeypatch.setattr(DiffusionPipeline, "save_pretrained", fails_half_way)
    for target in ("model", "new"):
        with pytest.raises(OSError, match="No space left"):
            save_denoiser(build("epsilon"), tmp_path / target)
    assert os.listdir(tmp_path) == ["model"]
    assert_same(load_denoiser(tmp_path / "model"), original)


def test_a_failure_while_renaming_brings_the_old_folder_back(tmp_path, monkeypatch):
    original = build("edm")
    save_denoiser(original, tmp_path / "model")
    rename, calls = os.replace, []

    def fails_at_the_second(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError("Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fails_at_the_second)
    with pytest.raises(OSError, match="Input/output"):
        save_denoiser(build("epsilon"), tmp_path / "model")
    assert len(calls) == 3 and os.listdir(tmp_path) == ["model"]
    assert_same(load_denoiser(tmp_path / "model"), original)


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "precious.txt").write_text("results")
    (tmp_path / "file").write_text("results")
    for name in ("runs", "file"):
        with pytest.raises(ValueError, match=f"{name} exists and is not a diffusers folder"):
            save_denoiser(build("edm"), tmp_path / name)
    assert files_below(tmp_path) == ["file", "runs/precious.txt"]


@pytest.mark.parametrize(
    "denoiser",
    [
        GaussianMixtureDenoiser(torch.zeros(1, 2), 1.0),
        GuidedDenoiser(EDMDenoiser(nn.Linear(2, 2)), 2),
        EDMDenoiser(nn.Linear(2, 2)),
    ],
)
def test_what_diffusers_has_no_format_for_is_refused(tmp_path, denoiser):
    with pytest.raises(ValueError, match=type(denoiser).__name__):
        save_denoiser(denoiser, tmp_path / "model")
    assert not os.listdir(tmp_path)


# --- Damaged folders -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    save_denoiser(build("edm"), folder)
    return folder


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = {
    "no model_index.json": lambda f: (f / "model_index.json").unlink(),
    "has no unet/config.json": lambda f: shutil.rmtree(f / "unet"),
    "config.json is damaged": lambda f: (f / "unet" / "config.json").write_text('{"a":'),
    "it holds no object": lambda f: (f / "unet" / "config.json").write_text("[1]"),
    "is a UNet3DConditionModel": lambda f: rewrite(
        f / "unet" / "config.json", _class_name="UNet3DConditionModel"
    ),
    "has no vae/config.json": lambda f: rewrite(
        f / "unet" / "config.json", _class_name="UNet2DConditionModel"
    ),
    "does not fit its config.json": lambda f: rewrite(
        f / "unet" / "config.json", block_out_channels=[16, 16]
    ),
    "lit_distill.json is damaged": lambda f: (f / "lit_distill.json").write_text(""),
    "has the format 2": lambda f: rewrite(f / "lit_distill.json", format=2),
    "names the denoiser 'Magic'": lambda f: rewrite(f / "lit_distill.json", denoiser="Magic"),
    "is no description of a EDMDenoiser": lambda f: rewrite(
        f / "lit_distill.json", settings={"magic": 1}
    ),
    r"no description of a EDMDenoiser \(trained=\[0\] are no": lambda f: rewrite(
        f / "lit_distill.json", few_steps={"trained": [0]}
    ),
    r"no description of a EDMDenoiser \(.*'int' object": lambda f: rewrite(
        f / "lit_distill.json", few_steps={"trained": 1}
    ),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_damaged_folders_are_refused_with_a_sentence(tmp_path, good, sentence):
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    DAMAGES[sentence](folder)
    with pytest.raises(ValueError, match=sentence) as caught:
        load_denoiser(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_weights_that_cannot_be_read_are_named(tmp_path, good, damage):
    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:5000])
    else:
        file.unlink()
    with pytest.raises(FileNotFoundError, match=r"weights in .*unet cannot be read"):
        load_denoiser(folder)


def test_weights_with_a_hole_are_not_filled_with_random_numbers(tmp_path, good):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(good, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.weight"]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack conv_in\.weight"):
        load_denoiser(folder)


@pytest.mark.parametrize("name", ["runs/digits/none", "/nowhere/model", "./a/b", "nothing"])
def test_a_missing_folder_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"There is no folder {name}"):
        load_denoiser(name)


def test_a_hub_id_without_a_network_is_named(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(FileNotFoundError, match=r"google/ddpm-cifar10-32.*could not be fetched"):
        load_denoiser("google/ddpm-cifar10-32")


def test_a_hub_id_is_fetched_without_its_other_components(monkeypatch, good):
    asked = {}

    def fetch(name, allow_patterns, ignore_patterns=()):
        asked[name] = allow_patterns
        return str(good)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert_same(load_denoiser("someone/model"), load_denoiser(good))
    wanted = {"unet/*", "scheduler/*", "conditions/*", "model_index.json", "lit_distill.json"}
    assert wanted <= set(asked["someone/model"])
    assert not {"*", "*.safetensors", "*.bin"} & set(asked["someone/model"])
