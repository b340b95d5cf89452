"""Students that no stock pipeline samples, in a process that never imports lit_distill."""

import ast
import json
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from stock_process import images_of
from tiny_networks import perturbed, tiny_network

import lit_distill.models
from lit_distill.diffusion import (
    ConsistencyDenoiser,
    EDMDenoiser,
    EpsilonDenoiser,
    FewSteps,
    FlowDenoiser,
    GuidedDenoiser,
    VelocityDenoiser,
    drawn_noise,
    linear_betas,
    rho_grid,
    sample,
    seeded_generators,
)
from lit_distill.models import MNISTUNet, UNet, add_inputs, load_denoiser, save_denoiser

SEEDS = [7, 8, 9, 2**33]
LABELS = [0, 2, 1, 3]  # the last is the null class
SHORT = linear_betas(50)  # ends at sigma = 0.8, where an untrained network's images are not clipped


def small_mnist_unet():
    torch.manual_seed(0)
    unet = MNISTUNet(8, 1, 8, 4, num_timesteps=20)
    unet.out[3].bias.data.fill_(-1)  # grey images, which are not clipped
    return UNet.wrap(unet, num_classes=3, null_label=3)


def student(
    kind, classes=None, inputs=(), lower=None, sampling=None, network=None, patch_size=1, **settings
):
    """A student whose further conditions matter."""
    made = tiny_network(classes, patch_size=patch_size) if network is None else network()
    denoiser = kind(made, **settings)
    if lower is not None:
        denoiser.start_from(lower)
    add_inputs(denoiser, inputs)
    perturbed(denoiser.network)
    denoiser.few_steps = FewSteps(**sampling)
    return denoiser.eval()


def students():
    """Name: how it is made, and the runs to compare: steps, guidance."""
    both = ("to_sigma", "steps")
    flow_grid = FlowDenoiser(torch.nn.Identity()).sigmas(3).tolist()
    return {
        # SFD-v: grids that end at sigma_min, a first step by a formula
        "sfd": (
            {
                "kind": EDMDenoiser,
                "classes": 3,
                "inputs": ("steps",),
                "sigma_data": 0.75,
                "sampling": {
                    "trained": (3, 2),
                    "grids": [rho_grid(n + 1, 0.006, 80.0).tolist() for n in (2, 3)],
                    "analytical_first_step": True,
                },
            },
            [(3, 1.0), (2, 2.5), (5, 1.0)],  # 5 is not trained: its own levels
        ),
        "ctm": (
            {
                "kind": EDMDenoiser,
                "inputs": ("to_sigma",),
                "sampling": {
                    "trained": (4,),
                    "grids": [rho_grid(4, 0.002, 80.0, end=0.0).tolist()],
                    "gamma": 0.4,
                },
            },
            [(4, 1.0)],
        ),
        "edm_fresh_noise": (
            {"kind": EDMDenoiser, "classes": 3, "sampling": {"trained": (2,), "gamma": 1.0}},
            [(2, 1.0), (2, 3.0), (1, 1.0)],
        ),
        "edm_foreign": (
            {"kind": EDMDenoiser, "time_scale": 1.0, "sampling": {"trained": (1, 3)}},
            [(1, 1.0), (3, 1.0)],
        ),
        "boundaries": (
            {
                "kind": ConsistencyDenoiser,
                "sigma_min": 0.02,
                "classes": 3,
                "sampling": {"trained": (2,), "grids": [(80.0, 1.5, 0.0)], "only": True},
            },
            [(2, 1.0), (2, 0.5)],
        ),
        # A floor that matters, and levels of its own
        "consistency": (
            {
                "kind": ConsistencyDenoiser,
                "sigma_min": 0.3,
                "num_timesteps": 18,
                "inputs": both,
                "sampling": {"trained": (3,), "gamma": 0.8},
            },
            [(3, 1.0), (1, 1.0), (5, 1.0)],
        ),
        "epsilon_labels": (
            {"kind": EpsilonDenoiser, "classes": 3, "betas": SHORT, "sampling": {"trained": (1,)}},
            [(1, 1.0), (1, 2.0)],
        ),
        "epsilon": (
            {
                "kind": EpsilonDenoiser,
                "betas": SHORT,
                "inputs": both,
                "sampling": {"trained": (7, 4), "gamma": 0.5},
            },
            [(7, 1.0), (4, 1.0)],  # 7 does not divide 50
        ),
        # Levels between those of the table, asked at whole times
        "epsilon_discrete": (
            {
                "kind": EpsilonDenoiser,
                "betas": SHORT,
                "discrete": True,
                "inputs": ("to_sigma",),
                "sampling": {"trained": (3,), "grids": [(0.7, 0.31, 0.05, 0.0)]},
            },
            [(3, 1.0)],
        ),
        "velocity": (
            {
                "kind": VelocityDenoiser,
                "classes": 3,
                "inputs": both,
                "lower": 0.9,
                "sampling": {"trained": (3,), "analytical_first_step": True},
            },
            [(3, 1.0), (2, 1.7)],
        ),
        "flow": (
            {
                "kind": FlowDenoiser,
                "inputs": both,
                "sampling": {"trained": (3,), "grids": [flow_grid], "gamma": 0.2},
            },
            [(3, 1.0), (4, 1.0)],
        ),
        "flow_labels": (
            {"kind": FlowDenoiser, "classes": 3, "sampling": {"trained": (1, 2)}},
            [(1, 1.0), (2, 4.0)],
        ),
        # A mean flow whose network wants t itself
        "flow_scale": (
            {
                "kind": FlowDenoiser,
                "classes": 3,
                "inputs": ("to_sigma",),
                "time_scale": 1.0,
                "sampling": {"trained": (1, 2), "grids": [flow_grid]},
            },
            [(1, 1.0), (3, 1.0)],
        ),
        # DMD2 of three steps
        "edm_own_levels": (
            {
                "kind": EDMDenoiser,
                "classes": 3,
                "sampling": {"trained": (3,), "grids": [(80.0, 9.7, 0.5, 0.0)], "gamma": 1.0},
            },
            [(3, 1.0)],
        ),
        "flow_lower": (
            {"kind": FlowDenoiser, "lower": 3.0, "sampling": {"trained": (1,)}},
            [(1, 1.0), (2, 1.0)],
        ),
        # A network of squares of pixels
        "patches": (
            {
                "kind": EDMDenoiser,
                "classes": 3,
                "patch_size": 2,
                "sampling": {"trained": (1, 2), "gamma": 1.0},
            },
            [(1, 1.0), (2, 3.0)],
        ),
        # Networks that were trained on images in another range than [-1, 1]
        "mnist_unet": (
            {
                "kind": EpsilonDenoiser,
                "classes": 3,
                "network": small_mnist_unet,
                "betas": linear_betas(20),
                "image_range": (0, 1),
                "sampling": {"trained": (1, 2), "gamma": 0.5},
            },
            [(1, 1.0), (2, 2.0)],
        ),
        "epsilon_range": (
            {
                "kind": EpsilonDenoiser,
                "betas": SHORT,
                "inputs": both,
                "image_range": (0, 1),
                "sampling": {
                    "trained": (2,),
                    "grids": [(1.1, 0.6, 0.2, 0.0)],
                    "analytical_first_step": True,
                },
            },
            [(2, 1.0), (3, 1.0)],
        ),
        "velocity_range": (
            {
                "kind": VelocityDenoiser,
                "betas": SHORT,
                "image_range": (-3, 1),
                "sampling": {"trained": (1, 3)},
            },
            [(1, 1.0), (3, 1.0)],
        ),
    }


RUNS = [(name, *run) for name, (_, runs) in students().items() for run in runs]


def job(folder, **options):
    asked = {"batch_size": len(SEEDS), **options}
    loading = {"custom_pipeline": str(folder), "trust_remote_code": True}
    return {"folder": str(folder), "seeds": SEEDS, "options": asked, "loading": loading}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("students")
    for name, (made, _) in students().items():
        save_denoiser(student(**made), root / name)
    return root


BAD = {
    "only": ("boundaries", {"class_labels": LABELS, "num_inference_steps": 3}),
    "none": ("ctm", {"num_inference_steps": 0}),
    "levels": ("consistency", {"num_inference_steps": 19}),
    "times": ("epsilon", {"num_inference_steps": 51}),
    "no labels": ("sfd", {}),
    "labels": ("ctm", {"class_labels": 1}),
    "few labels": ("sfd", {"class_labels": [1, 2]}),
    "classes": ("sfd", {"class_labels": [0, 1, 2, 4]}),
    "guidance": ("ctm", {"guidance_scale": 2.0}),
    "output": ("ctm", {"output_type": "jpg"}),
}


@pytest.fixture(scope="module")
def stock(folders):
    """What the stock process made, by name."""
    jobs = {}
    for name, steps, guidance in RUNS:
        options = {"num_inference_steps": steps, "guidance_scale": guidance}
        if students()[name][0].get("classes"):
            options["class_labels"] = LABELS
        jobs[f"{name}-{steps}-{guidance}"] = job(folders / name, **options)
    jobs |= {
        f"bad-{name}": job(folders / model, **options) for name, (model, options) in BAD.items()
    }
    jobs["defaults"] = job(folders / "sfd", class_labels=1)
    for kind in ("pil", "pt"):
        jobs[kind] = job(folders / "ctm", output_type=kind)
    jobs["alone"] = {**job(folders / "ctm"), "loading": {"trust_remote_code": True}}
    return images_of(jobs, folders)


@torch.no_grad()
def own_images(folder, steps, guidance=1.0, labels=LABELS):
    """(N, H, W, C) in [0, 1] by ``sample``."""
    denoiser = load_denoiser(folder)
    generators = seeded_generators(SEEDS)
    condition = None if denoiser.num_classes is None else torch.tensor(labels)
    with warnings.catch_warnings(action="ignore"):
        x = sample(
            GuidedDenoiser(denoiser, guidance),
            drawn_noise(denoiser.image_shape, generators),
            steps=steps,
            condition=condition,
            generator=generators,
        )
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(("name", "steps", "guidance"), RUNS)
def test_the_pipeline_gives_the_same_images_as_sample(folders, stock, name, steps, guidance):
    run = f"{name}-{steps}-{guidance}"
    images, expected = stock[run], own_images(folders / name, steps, guidance)
    assert str(stock[f"{run}/pipeline"]) == "FewStepPipeline"
    # Clipped pixels agree for free.
    assert float(((images > 0) & (images < 1)).mean()) > 0.3
    assert np.abs(images[0] - images[1]).mean() > 1e-3
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-4)


def test_what_is_left_out_has_the_students_defaults(folders, stock):
    expected = own_images(folders / "sfd", 3, labels=[1, 1, 1, 1])
    np.testing.assert_allclose(stock["defaults"], expected, rtol=0, atol=1e-4)


def test_images_come_in_the_three_forms_of_diffusers(folders, stock):
    expected = own_images(folders / "ctm", 4)
    assert stock["pt"].shape == (4, 1, 8, 8) and stock["pil"].dtype == np.uint8
    np.testing.assert_allclose(stock["pt"].transpose(0, 2, 3, 1), expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(stock["pil"], 255 * expected[..., 0], rtol=0, atol=0.51)


def test_the_folder_names_its_pipeline_itself(stock, folders):
    assert str(stock["alone/pipeline"]) == "FewStepPipeline"
    np.testing.assert_allclose(stock["alone"], own_images(folders / "ctm", 4), rtol=0, atol=1e-4)


def test_untrained_numbers_of_steps_are_named_in_a_warning(stock):
    warning = str(stock["sfd-5-1.0/warning"])
    assert warning.startswith("This student was trained for 3, 2 step(s), not for 5.")
    assert "(stock_process.py)" in warning  # it points at the caller
    assert "sfd-3-1.0/warning" not in stock


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("only", "num_inference_steps=3: this student jumps between the levels it was trained for"),
        ("none", "num_inference_steps=0: sampling needs at least one step"),
        ("levels", "19 steps are more than the 18 levels"),
        ("times", "51 steps are more than the 50 times"),
        ("no labels", "This student is conditional on 3 classes: give class_labels"),
        ("labels", "This student is unconditional: leave class_labels out"),
        ("few labels", "2 class_labels are given for a batch_size of 4"),
        ("classes", "class_labels has 4; this student has the classes 0 to 2"),
        ("guidance", "guidance_scale=2.0: this student is unconditional"),
        ("output", "output_type='jpg' is unknown; choose pil, np or pt"),
    ],
)
def test_bad_arguments_are_refused_with_a_sentence(stock, name, sentence):
    assert sentence in str(stock[f"bad-{name}/error"])


# --- What the folder holds -----------------------------------------------------------------------


@pytest.mark.parametrize("name", students())
def test_a_student_comes_back_with_the_same_bits(folders, name):
    original, loaded = student(**students()[name][0]), load_denoiser(folders / name)
    assert type(loaded) is type(original) and loaded.inputs == original.inputs
    assert loaded.few_steps == original.few_steps
    assert loaded.fingerprint() == original.fingerprint()
    assert not any(module.training for module in loaded.modules())
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 0.3, 0.5, 0.7])
    condition = {"to_sigma": sigma / 2, "steps": torch.full((4,), 3)}
    if original.num_classes is not None:
        condition["label"] = torch.tensor(LABELS)
    with torch.no_grad():
        assert torch.equal(loaded(x, sigma, condition), original(x, sigma, condition))


def test_the_unet_stays_a_stock_one_and_no_path_is_told(folders, tmp_path):
    save_denoiser(load_denoiser(folders / "sfd"), tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["_class_name"] == ["pipeline", "FewStepPipeline"]
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert index["conditions"] == ["condition_embedding", "ConditionEmbedding"]
    files = sorted(str(f.relative_to(tmp_path / "again")) for f in tmp_path.rglob("*.*"))
    assert files == [
        "conditions/condition_embedding.py",
        "conditions/config.json",
        "conditions/diffusion_pytorch_model.safetensors",
        "lit_distill.json",
        "model_index.json",
        "pipeline.py",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    for file in (tmp_path / "again").rglob("*.json"):
        text = file.read_text()
        assert str(tmp_path) not in text and str(folders) not in text


def test_a_student_without_further_conditions_has_no_folder_for_them(folders):
    index = json.loads((folders / "boundaries" / "model_index.json").read_text())
    assert index["conditions"] == [None, None]
    assert not (folders / "boundaries" / "conditions").exists()


@pytest.mark.parametrize("name", ["few_step_pipeline.py", "condition_embedding.py"])
def test_the_folders_code_needs_torch_and_diffusers_only(name):
    source = Path(lit_distill.models.__file__).with_name(name).read_text()
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).partition(".")[0])
    # Text-to-image students need transformers; the import is passed over where it is absent.
    allowed = {"torch", "diffusers", "transformers"}
    assert {"torch", "diffusers"} <= imported - set(sys.stdlib_module_names) <= allowed


@pytest.mark.parametrize(
    ("sampling", "pipeline"),
    [
        ({"trained": (1,)}, "ConsistencyModelPipeline"),
        ({"trained": (1,), "gamma": 0.5}, "ConsistencyModelPipeline"),  # no jump to draw between
        ({"trained": (1,), "grids": [(80.0, 0.0)]}, "ConsistencyModelPipeline"),
        ({"trained": (1,), "grids": [(80.0, 0.0), (80.0, 1.0, 0.0)]}, "ConsistencyModelPipeline"),
        ({"trained": (1,), "grids": [(80.0, 0.006)]}, None),
        ({"trained": (1,), "grids": [(70.0, 0.0)]}, None),
        ({"trained": (1,), "analytical_first_step": True}, None),
        ({"trained": (1, 2)}, None),
        ({"trained": (2,), "gamma": 1.0}, None),
    ],
)
def test_a_stock_pipeline_is_named_where_it_samples_alike(tmp_path, sampling, pipeline):
    save_denoiser(student(EDMDenoiser, sampling=sampling), tmp_path / "model")
    name = json.loads((tmp_path / "model" / "model_index.json").read_text())["_class_name"]
    assert name == (pipeline or ["pipeline", "FewStepPipeline"])


def test_more_levels_than_a_class_has_of_its_own_are_no_reason_to_fail(tmp_path):
    grid = (80.0, 5.0, 1.0, 0.0)
    few = {"trained": (3,), "grids": [grid], "gamma": 1.0}
    save_denoiser(student(ConsistencyDenoiser, sampling=few, num_timesteps=2), tmp_path / "model")
    assert load_denoiser(tmp_path / "model").grid(3).tolist() == list(grid)


def test_a_model_that_takes_more_and_is_no_student_keeps_its_conditions(tmp_path):
    denoiser = student(EDMDenoiser, 3, ("to_sigma",), sampling={"trained": (1,)})
    denoiser.few_steps = None
    save_denoiser(denoiser, tmp_path / "model")
    loaded = load_denoiser(tmp_path / "model")
    assert loaded.few_steps is None and loaded.fingerprint() == denoiser.fingerprint()


def test_a_students_own_file_is_no_must(folders, tmp_path):
    shutil.copytree(folders / "sfd", tmp_path / "model")
    (tmp_path / "model" / "lit_distill.json").unlink()
    loaded = load_denoiser(tmp_path / "model")
    assert loaded.inputs == ("steps",) and loaded.num_classes == 4  # the null class is not told


# --- Damaged folders, and what is never run -------------------------------------------------------


def damaged(folders, tmp_path, damage):
    shutil.copytree(folders / "sfd", tmp_path / "model")
    damage(tmp_path / "model" / "conditions")
    return tmp_path / "model"


def rewrite(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = {
    r"has no conditions/config\.json, which this network needs": shutil.rmtree,
    "config.json is damaged": lambda f: (f / "config.json").write_text("{"),
    "are a Magic; ConditionEmbedding is what": lambda f: rewrite(
        f / "config.json", _class_name="Magic"
    ),
    r"does not fit its config\.json": lambda f: rewrite(f / "config.json", num_labels=9),
    "lack numbers": lambda f: rewrite(f / "config.json", inputs=["steps", "to_sigma"]),
    "weights in .*conditions cannot be read": lambda f: next(f.glob("*.safetensors")).unlink(),
    "conditions cannot be read": lambda f: next(f.glob("*.safetensors")).write_bytes(b"123"),
}


@pytest.mark.parametrize("sentence", DAMAGES)
def test_damaged_conditions_are_refused_with_a_sentence(folders, tmp_path, sentence):
    folder = damaged(folders, tmp_path, DAMAGES[sentence])
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as caught:
        load_denoiser(folder)
    assert str(folder) in str(caught.value)


def test_conditions_of_another_network_are_refused(folders, tmp_path):
    torch.manual_seed(0)
    wide = UNet(8, 1, 3, [16, 16], layers_per_block=1, norm_num_groups=4)
    denoiser = EDMDenoiser(wide)
    add_inputs(denoiser, ("steps",))
    denoiser.few_steps = FewSteps((1,))
    save_denoiser(denoiser, tmp_path / "wide")

    def swap(conditions):
        shutil.rmtree(conditions)
        shutil.copytree(tmp_path / "wide" / "conditions", conditions)

    with pytest.raises(ValueError, match="of width 64, and the network takes 32"):
        load_denoiser(damaged(folders, tmp_path, swap))


def test_a_folders_code_is_never_run(folders, tmp_path):
    def booby_trap(conditions):
        (conditions / "condition_embedding.py").write_text("raise SystemExit('run')")
        (conditions.parent / "pipeline.py").write_text("raise SystemExit('run')")

    folder = damaged(folders, tmp_path, booby_trap)
    assert load_denoiser(folder).fingerprint() == load_denoiser(folders / "sfd").fingerprint()
