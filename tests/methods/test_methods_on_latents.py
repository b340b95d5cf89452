"""The methods that are not made for latents in particular, on latents and prompts."""

import sys
from pathlib import Path

import pytest
import torch
from torchvision.models import squeezenet1_1

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from small_text import text_folder
from tiny import adam, trainer

from lit_distill.callbacks import PairWriter, SampleGrid
from lit_distill.datamodules import (
    CaptionedDigits,
    CaptionedFolder,
    LatentTextDataModule,
    PairsDataModule,
)
from lit_distill.diffusion import GuidedDenoiser, sample
from lit_distill.losses import L1, L2, LPIPS, Decoded, Huber
from lit_distill.methods import (
    DMD,
    DMD2,
    SFD,
    AdversarialDistillation,
    DiffusionTeacher,
    FlowDistillation,
    KnowledgeDistillation,
    LatentConsistencyDistillation,
    MultiBoundaryConsistencyDistillation,
    RectifiedFlow,
    Reflow,
    TrajectoryDistillation,
)
from lit_distill.methods.rectified_flow import as_flow
from lit_distill.models import LoRA, load_denoiser, save_denoiser

ROWS = {
    "teacher": lambda f, **o: DiffusionTeacher(f, label_dropout=0.5, **o),
    "flow": lambda f, **o: RectifiedFlow(as_flow(load_denoiser(f)), **o),
    "dmd": lambda f, **o: DMD(f, regression_weight=0.0, guidance=3.0, **o),
    "dmd_lora": lambda f, **o: DMD(
        f, regression_weight=0.0, guidance=3.0, lora=LoRA(rank=2, target_modules=["to_q"]), **o
    ),
    "dmd2": lambda f, **o: DMD2(f, guidance=3.0, **o),
    "kd": lambda f, **o: KnowledgeDistillation(
        f, distance="l2", online=True, teacher_steps=2, teacher_solver="ddim", **o
    ),
    "sfd": lambda f, **o: SFD(f, steps=2, teacher_substeps=1, **o),
    "multi_boundary": lambda f, **o: MultiBoundaryConsistencyDistillation(
        f, boundaries=2, num_nodes=6, distance="l2", guidance=3.0, **o
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return text_folder(tmp_path_factory.mktemp("text") / "teacher")


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    return LatentTextDataModule(CaptionedDigits(), folder, cache, batch_size=4)


PAIRED = {
    "kd": lambda f, **o: KnowledgeDistillation(f, distance="l2", **o),
    "dmd": lambda f, **o: DMD(f, distance="l2", **o),
    "reflow": Reflow,
    "instaflow": lambda f, **o: FlowDistillation(
        f, distance="l2", student=as_flow(load_denoiser(f)), **o
    ),
}


@pytest.fixture(scope="module")
def pairs(folder, data, tmp_path_factory):
    """Pairs of noise and the guided teacher's latents, with their prompts."""
    root = tmp_path_factory.mktemp("pairs")
    data.predict_samples, data.predict_batch_size = 8, 4
    teacher = DiffusionTeacher(folder, steps=3, solver="ddim", guidance=3.0)
    trainer(root, PairWriter(str(root / "pairs"))).predict(teacher, data)
    return PairsDataModule(data, str(root / "pairs"), batch_size=4)


def test_stored_pairs_are_the_guided_teachers(folder, data, pairs):
    pairs.setup("fit")
    batch = pairs._gather_pairs(torch.arange(8))
    teacher = load_denoiser(folder)
    condition = teacher.codec.condition(data.source.captions[:8])
    torch.testing.assert_close(batch["prompt_embeds"], condition["prompt_embeds"])
    with torch.no_grad():
        found = sample(
            GuidedDenoiser(teacher, 3.0),
            batch["noise"],
            steps=3,
            solver="ddim",
            condition=condition,
        )
    torch.testing.assert_close(batch["image"], found, rtol=1e-4, atol=1e-4)
    assert '"guidance": 3.0' in (pairs.folder / "manifest.json").read_text()


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_with_prompts_are_trained_on(name, folder, pairs, tmp_path):
    module = PAIRED[name](folder, optimizer=adam)
    trainer(tmp_path, SampleGrid(num_images=2, columns=2), max_steps=2).fit(module, pairs)
    assert sorted(p.stem for p in tmp_path.glob("samples/*.png")) == ["step-000000", "step-000002"]
    assert all(p.isfinite().all() for p in module.student.parameters())


@pytest.fixture
def captions(folder, tmp_path):
    """Captions without images."""
    (tmp_path / "metadata.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    source = CaptionedFolder(str(tmp_path), images=False)
    return LatentTextDataModule(source, folder, str(tmp_path / "cache"), batch_size=2)


@pytest.mark.parametrize("name", ["sfd", "dmd", "kd"])
def test_captions_alone_do_where_the_teacher_makes_the_targets(name, folder, captions, tmp_path):
    module = ROWS[name](folder, optimizer=adam)
    trainer(tmp_path, max_steps=1).fit(module, captions)
    assert all(p.isfinite().all() for p in module.student.parameters())


@pytest.mark.parametrize("name", ["teacher", "dmd2", "multi_boundary"])
def test_captions_alone_are_refused_by_methods_that_learn_from_images(
    name, folder, captions, tmp_path
):
    with pytest.raises(ValueError, match=r"learns from images.*has captions only"):
        trainer(tmp_path, max_steps=1).fit(ROWS[name](folder, optimizer=adam), captions)


@pytest.mark.parametrize("name", ROWS)
def test_a_method_trains_on_prompts_and_its_student_is_exported(name, folder, data, tmp_path):
    module = ROWS[name](folder, optimizer=adam)
    before = [p.detach().clone() for p in module.student.parameters()]
    trainer(tmp_path, max_steps=2).fit(module, data)
    assert any(
        not torch.equal(a, b) for a, b in zip(before, module.student.parameters(), strict=True)
    )
    module.eval()
    codec = module.network.codec
    noise, condition = torch.randn(2, 4, 4, 4), codec.condition(["one", "a handwritten two"])
    steps = 2 if name in ("sfd", "multi_boundary", "teacher", "flow") else 1
    latents = module.generate(noise, condition, steps)
    assert codec.decode(latents).shape == (2, 1, 16, 16)
    assert not torch.equal(latents, module.generate(noise, codec.condition(["zero"] * 2), steps))
    save_denoiser(module.network, tmp_path / "pipeline")
    again = load_denoiser(tmp_path / "pipeline")
    module.ema.module = again  # as another module would sample it
    torch.testing.assert_close(module.generate(noise, condition, steps), latents)


# --- Distances between images --------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """LPIPS's network with random weights."""
    path = tmp_path_factory.mktemp("lpips") / "squeeze.pth"
    torch.manual_seed(0)
    torch.save(squeezenet1_1(weights=None).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def lpips(backbone):
    return LPIPS("squeeze", resize=32, weights=backbone)


def test_lpips_compares_decoded_images(folder, lpips):
    teacher = load_denoiser(folder)
    distance = KnowledgeDistillation(teacher, distance=lpips).distance
    x, target = torch.randn(2, 2, 4, 4, 4).requires_grad_(True)
    found = distance(x, target)
    ours = x.detach().requires_grad_(True)
    images = teacher.codec.decode_with_gradient(ours)
    assert images.shape == (2, 1, 16, 16)
    expected = lpips(images, teacher.decode(target.detach()))
    torch.testing.assert_close(found, expected)
    (slope,) = torch.autograd.grad(expected.sum(), ours)
    leaf = torch.autograd.grad(found.sum(), [x, target], allow_unused=True)
    torch.testing.assert_close(leaf[0], slope)
    assert (slope != 0).any() and leaf[1] is None
    assert not any(p.requires_grad for p in teacher.codec.vae.parameters())


@pytest.mark.parametrize("distance", [L1(), L2(), Huber()])
def test_plain_distances_compare_latents(distance, folder):
    assert KnowledgeDistillation(folder, distance=distance).distance is distance


DECODED = {
    "trajectory": lambda f, **o: TrajectoryDistillation(f, steps=2, teacher_substeps=1, **o),
    "multi_boundary": lambda f, **o: MultiBoundaryConsistencyDistillation(
        f, boundaries=2, num_nodes=6, **o
    ),
    "adversarial": lambda f, **o: AdversarialDistillation(f, distillation_weight=1.0, **o),
    "lcm": LatentConsistencyDistillation,
    "sfd": lambda f, **o: SFD(f, steps=2, teacher_substeps=1, **o),
}


@pytest.mark.parametrize("name", DECODED)
def test_methods_train_through_the_decoder(name, folder, data, lpips, tmp_path):
    module = DECODED[name](folder, distance=lpips, optimizer=adam)
    trains_through_the_decoder(module, data, tmp_path)


PAIRED_DECODED = {
    "kd": KnowledgeDistillation,
    "dmd": lambda f, **o: DMD(f, cache_features=True, **o),
    "instaflow": lambda f, **o: FlowDistillation(f, student=as_flow(load_denoiser(f)), **o),
}


@pytest.mark.parametrize("name", PAIRED_DECODED)
def test_methods_on_pairs_train_through_the_decoder(name, folder, pairs, lpips, tmp_path):
    module = PAIRED_DECODED[name](folder, distance=lpips, optimizer=adam)
    trains_through_the_decoder(module, pairs, tmp_path)


def trains_through_the_decoder(module, data, tmp_path):
    codec = module.teacher.codec
    decoder = [p.clone() for p in codec.vae.parameters()]
    assert isinstance(module.distance, Decoded) and module.distance.codec is codec
    runner = trainer(tmp_path, max_steps=2)
    runner.fit(module, data)
    assert all(p.isfinite().all() for p in module.student.parameters())
    kept = zip(decoder, codec.vae.parameters(), strict=True)
    assert all(torch.equal(before, after) and after.grad is None for before, after in kept)
    runner.save_checkpoint(tmp_path / "last.ckpt")
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert not any(name.startswith("distance") for name in state)


def test_the_size_of_decoded_images_is_what_lpips_complains_of(folder, data, backbone, tmp_path):
    distance = LPIPS("squeeze", resize=None, weights=backbone)
    module = KnowledgeDistillation(folder, distance=distance, online=True, teacher_steps=1)
    with pytest.raises(ValueError, match=r"\(16, 16\) pixels: set .* `resize` to 32 or more"):
        trainer(tmp_path, max_steps=1).fit(module, data)
