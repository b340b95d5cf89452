"""Stable Diffusion's folders: read, asked, sampled and written as diffusers does it."""

import copy
import json
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).parent))
from small_text import WORDS, text_folder, text_pipeline
from stock_process import images_of

from lit_distill.diffusion import (
    EpsilonDenoiser,
    FewSteps,
    GuidedDenoiser,
    LatentConsistencyDenoiser,
    drawn_noise,
    sample,
    seeded_generators,
)
from lit_distill.methods import (
    SFD,
    FlowDistillation,
    LatentConsistencyDistillation,
    MultiBoundaryConsistencyDistillation,
    Reflow,
)
from lit_distill.models import (
    LatentCodec,
    LoRA,
    TextUNet,
    load_denoiser,
    save_adapter,
    save_denoiser,
)

PROMPTS = ["a handwritten seven", "zero", "the digit two"]
SEEDS = [3, 4, 2**33]
# Students that bring their pipeline: steps and scale of guidance.
OWN = {"sfd": (2, 3.0), "multi_boundary": (2, 1.0), "reflow": (3, 2.0), "instaflow": (1, 1.0)}
LORA = LoRA(rank=4, alpha=2, target_modules=["to_q", "to_v", "conv1", "time_emb_proj"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return text_folder(tmp_path_factory.mktemp("text") / "teacher")


@pytest.fixture(scope="module")
def teacher(folder):
    return load_denoiser(folder)


def shaken(denoiser):
    """Weights that make a difference, also where they start at zero."""
    torch.manual_seed(1)
    for weight in denoiser.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return denoiser.eval()


@pytest.fixture(scope="module")
def exports(folder, tmp_path_factory):
    """Folders of students, and one of an adapter."""
    root = tmp_path_factory.mktemp("exports")
    full = LatentConsistencyDistillation(folder, guidance=(2.0, 6.0)).student
    save_denoiser(shaken(full), root / "full")
    adapted = shaken(LatentConsistencyDistillation(folder, lora=LORA).student)
    save_denoiser(adapted, root / "merged")
    save_adapter(adapted, root / "adapter")
    one_step = load_denoiser(folder)
    one_step.few_steps = FewSteps((1,))
    save_denoiser(shaken(one_step), root / "one_step")
    save_denoiser(shaken(SFD(folder, steps=2, teacher_substeps=1).student), root / "sfd")
    boundaries = MultiBoundaryConsistencyDistillation(
        folder, boundaries=2, num_nodes=6, distance="l2"
    )
    save_denoiser(shaken(boundaries.student), root / "multi_boundary")
    save_denoiser(shaken(Reflow(folder).student), root / "reflow")
    instaflow = FlowDistillation(folder, distance="l2", student=str(root / "reflow"))
    save_denoiser(instaflow.student, root / "instaflow")
    return root


def job(folder, steps, scale, **more):
    options = {"prompt": PROMPTS, "num_inference_steps": steps, "guidance_scale": scale}
    return {"folder": str(folder), "seeds": SEEDS, "options": options, **more}


@pytest.fixture(scope="module")
def stock(folder, exports, tmp_path_factory):
    adapter = {"adapter": str(exports / "adapter")}
    jobs = {
        "plain": job(folder, 5, 1.0),
        "guided": job(folder, 5, 3.0),
        "full_1": job(exports / "full", 1, 4.0),
        "full_4": job(exports / "full", 4, 2.5),
        "merged_1": job(exports / "merged", 1, 1.0),
        "merged_4": job(exports / "merged", 4, 1.0),
        "adapter_1": job(folder, 1, 1.0, **adapter),
        "adapter_4": job(folder, 4, 1.0, **adapter),
        "one_step": job(exports / "one_step", 1, 1.0),
    }
    for name, (steps, scale) in OWN.items():
        own = {"custom_pipeline": str(exports / name), "trust_remote_code": True}
        jobs[name] = job(exports / name, steps, scale, loading=own)
    return images_of(jobs, tmp_path_factory.mktemp("stock"))


def ours(denoiser, steps, scale=1.0, solver=None):
    generators = seeded_generators(SEEDS)
    noise = drawn_noise(denoiser.image_shape, generators)
    condition = denoiser.codec.condition(PROMPTS)
    if "guidance" in denoiser.inputs:
        condition["guidance"], scale = torch.full((len(SEEDS),), scale), 1.0
    model = GuidedDenoiser(denoiser, scale)
    with torch.no_grad():
        x = sample(
            model, noise, steps=steps, solver=solver, condition=condition, generator=generators
        )
    return (model.decode(x) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("name", "source", "steps", "scale", "solver"),
    [
        ("plain", None, 5, 1.0, "ddim"),
        ("guided", None, 5, 3.0, "ddim"),
        ("full_1", "full", 1, 4.0, None),
        ("full_4", "full", 4, 2.5, None),
        ("merged_1", "merged", 1, 1.0, None),
        ("merged_4", "merged", 4, 1.0, None),
        ("adapter_1", "merged", 1, 1.0, None),
        ("adapter_4", "merged", 4, 1.0, None),
        ("one_step", "one_step", 1, 1.0, None),
        *((name, name, *sampling, None) for name, sampling in OWN.items() if name != "reflow"),
        ("reflow", "reflow", *OWN["reflow"], "euler"),
    ],
)
def test_stock_diffusers_makes_the_same_pixels(
    folder, exports, stock, name, source, steps, scale, solver
):
    denoiser = load_denoiser(folder if source is None else exports / source)
    found, images = ours(denoiser, steps, scale, solver), torch.from_numpy(stock[name])
    pipeline = "FewStepPipeline" if name in OWN else "StableDiffusionPipeline"
    assert str(stock[f"{name}/pipeline"]) == pipeline
    assert f"{name}/warning" not in stock
    assert float((images[0] - images[1]).abs().mean()) > 1e-3
    assert float((found - images).abs().max()) < 1e-4


def test_the_jobs_are_different_ones(stock):
    assert abs(stock["plain"] - stock["guided"]).max() > 1e-2
    assert abs(stock["full_1"] - stock["merged_1"]).max() > 1e-2
    assert abs(stock["adapter_4"] - stock["adapter_1"]).max() > 1e-2


def test_a_denoiser_of_latents_is_read_and_written(folder, teacher, tmp_path):
    assert isinstance(teacher, EpsilonDenoiser)
    assert teacher.image_shape == (4, 4, 4) and teacher.codec.image_shape == (1, 16, 16)
    save_denoiser(teacher, tmp_path / "again")
    again = load_denoiser(tmp_path / "again")
    assert again.fingerprint() == teacher.fingerprint()
    assert again.codec.vae_hash() == teacher.codec.vae_hash()
    assert again.codec.text_hash() == teacher.codec.text_hash()


def test_an_lcm_folder_of_others_is_read_by_its_scheduler(exports, tmp_path):
    shutil.copytree(exports / "full", tmp_path / "foreign")
    (tmp_path / "foreign" / "lit_distill.json").unlink()
    denoiser = load_denoiser(tmp_path / "foreign")
    assert isinstance(denoiser, LatentConsistencyDenoiser)
    assert denoiser.few_steps.gamma == 1 and denoiser.inputs == ("guidance",)


def test_copies_share_what_is_frozen(teacher):
    assert copy.deepcopy(teacher).codec is teacher.codec
    assert not [name for name in teacher.state_dict() if "vae" in name or "text" in name]


def test_guidance_at_scale_1_is_none_and_the_empty_prompt_is_the_null_condition(teacher):
    condition = teacher.codec.condition(PROMPTS)
    empty = teacher.codec.condition(["", "", ""])["prompt_embeds"]
    assert torch.equal(teacher.null(condition)["prompt_embeds"], empty)
    x, sigma = torch.randn(3, 4, 4, 4), torch.tensor([0.1, 1.0, 10.0])
    with torch.no_grad():
        c, u = teacher(x, sigma, condition), teacher(x, sigma, teacher.null(condition))
        assert torch.equal(GuidedDenoiser(teacher, 1.0)(x, sigma, condition), c)
        torch.testing.assert_close(
            GuidedDenoiser(teacher, 3.0)(x, sigma, condition), u + 3.0 * (c - u)
        )
        with pytest.raises(ValueError, match="conditional on prompts"):
            teacher(x, sigma, None)


def test_embedding_the_guidance_changes_nothing_at_first(folder, teacher):
    student = LatentConsistencyDistillation(folder).student
    assert student.inputs == ("guidance",) and student.guidance == 11.0
    condition, x = teacher.codec.condition(PROMPTS), torch.randn(3, 4, 4, 4)
    time = torch.tensor([0.0, 19.0, 999.0])
    told = {**condition, "guidance": torch.tensor([2.0, 5.0, 9.0])}
    with torch.no_grad():
        one = teacher.network(x, time, condition)
        torch.testing.assert_close(student.network(x, time, told), one)
    with pytest.raises(ValueError, match="no place for steps"):
        student.network.add_inputs(("steps",))


def test_long_prompts_are_cut_with_one_warning():
    made = text_pipeline()
    codec = LatentCodec(made.vae, made.text_encoder, made.tokenizer, 4)
    long = " ".join(["seven"] * 20)
    with pytest.warns(UserWarning, match="more than 6 tokens are cut off there.*1 of these 2"):
        embeddings = codec.embed(["one", long])
    assert embeddings.shape == (2, 8, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = codec.embed([long + " eight"])
    torch.testing.assert_close(again[0], embeddings[1])


def test_words_are_tokens_and_others_are_spelled():
    tokenizer = text_pipeline().tokenizer
    for word in " ".join(WORDS).split():
        assert len(tokenizer(word).input_ids) == 3, word
    spelled = tokenizer("Zebra").input_ids
    assert len(spelled) == 7 and tokenizer.unk_token_id not in spelled[1:-1]


def test_of_a_hub_id_only_the_safe_weights_are_fetched(folder, monkeypatch):
    asked = []

    def fetch(name, allow_patterns, ignore_patterns=()):
        asked.append((allow_patterns, ignore_patterns))
        return folder

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    load_denoiser("someone/model")
    assert asked[0] == (["model_index.json"], ())
    wanted, left_out = (set(patterns) for patterns in asked[1])
    assert {"vae/*", "text_encoder/*", "tokenizer/*", "unet/*", "scheduler/*"} <= wanted
    assert {"*.bin", "*.fp16.*", "*non_ema*"} <= left_out and "*" not in wanted


@pytest.mark.parametrize("part", ["text_encoder", "vae", "tokenizer"])
def test_a_folder_without_a_part_is_refused(folder, part, tmp_path):
    shutil.copytree(folder, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / part)
    with pytest.raises(ValueError, match=f"has no {part}/.*a text-to-image model needs"):
        load_denoiser(tmp_path / "broken")


def test_a_network_for_inpainting_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    file = tmp_path / "other" / "unet" / "config.json"
    config = {**json.loads(file.read_text()), "in_channels": 9}  # as for inpainting
    text_pipeline().unet.from_config(config).save_pretrained(file.parent)
    with pytest.raises(ValueError, match=r"9 channels of input .* not for inpainting"):
        load_denoiser(tmp_path / "other")


def test_a_network_that_asks_for_more_than_a_prompt_is_refused(teacher):
    config = {**teacher.network.unet.config, "class_embed_type": "timestep"}
    unet = UNet2DConditionModel.from_config(config)
    with pytest.raises(ValueError, match="asks for more than a prompt"):
        TextUNet(unet, teacher.codec)


def test_a_lora_without_its_layers_is_refused(folder):
    with pytest.raises(ValueError, match=r"match no layer of this TextUNet.*to_q"):
        LatentConsistencyDistillation(folder, lora=LoRA(target_modules=["query"]))
