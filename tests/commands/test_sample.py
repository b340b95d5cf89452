from pathlib import Path

import numpy as np
import pytest
import torch
from ended import Command
from PIL import Image
from small_teacher import export
from small_text import text_folder

from lit_distill.diffusion import (
    FewSteps,
    GuidedDenoiser,
    drawn_noise,
    sample,
    seeded_generators,
    seeded_noise,
)
from lit_distill.models import load_denoiser

JUMPS = FewSteps((2, 4), [(80.0, 2.0, 0.006)], gamma=0.3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exported")
    return {
        "teacher": export(root / "teacher"),
        "student": export(root / "student", few_steps=FewSteps((1,))),
        "jumps": export(root / "jumps", few_steps=JUMPS),
        "strict": export(root / "strict", few_steps=FewSteps((2, 4), only=True)),
        "unconditional": export(root / "unconditional", classes=None),
        "text": Path(text_folder(root / "text")),
    }


def drawn(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


@torch.no_grad()
def test_arrays_are_the_samples_of_the_seeds(command: Command, folders: dict[str, Path]) -> None:
    options = ("--num-images", 5, "--seed", 3, "--steps", 2, "--labels", "7,1", "--guidance", 2)
    ended = command("sample", folders["teacher"], *options, "--out", "a/x.npz")
    assert ended.status == 0, ended.err
    arrays = drawn(Path("a/x.npz"))
    assert arrays["labels"].tolist() == [7, 1, 7, 1, 7]
    assert arrays["seeds"].tolist() == [3, 4, 5, 6, 7]
    model = GuidedDenoiser(load_denoiser(folders["teacher"]), 2.0)
    noise = seeded_noise((1, 8, 8), arrays["seeds"])
    labels = torch.tensor(arrays["labels"])
    expected = sample(model, noise, steps=2, solver="heun", condition=labels)
    assert arrays["images"].dtype == np.float32
    assert arrays["images"].shape == (5, 8, 8, 1)
    found = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=0)
    assert expected.abs().max() > 0.1  # the comparison is of images, not of grey
    assert "NFE 6" in ended.out  # Heun: 3 evaluations for 2 steps, and guidance doubles them


@torch.no_grad()
def test_prompts_are_drawn_in_turn_and_decoded(command: Command, folders: dict[str, Path]) -> None:
    options = ("--prompts", "a handwritten seven", "zero", "--num-images", 3, "--steps", 2)
    options = (*options, "--guidance", 3, "--solver", "ddim", "--out", "x.npz")
    ended = command("sample", folders["text"], *options)
    assert ended.status == 0, ended.err
    model = load_denoiser(folders["text"])
    assert model.codec is not None
    condition = model.codec.condition(["a handwritten seven", "zero", "a handwritten seven"])
    noise = seeded_noise((4, 4, 4), range(3))
    x = sample(GuidedDenoiser(model, 3.0), noise, steps=2, solver="ddim", condition=condition)
    found = torch.from_numpy(drawn(Path("x.npz"))["images"]).permute(0, 3, 1, 2)
    assert found.shape == (3, 1, 16, 16) and "NFE 4" in ended.out
    torch.testing.assert_close(found, (model.decode(x) / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_an_image_does_not_depend_on_the_batch_it_is_in(
    command: Command, folders: dict[str, Path]
) -> None:
    for size, out in [(7, "whole.npz"), (3, "parts.npz")]:
        options = ("--num-images", 7, "--steps", 2, "--batch-size", size)
        assert command("sample", folders["teacher"], *options, "--out", out).status == 0
    whole, parts = drawn(Path("whole.npz")), drawn(Path("parts.npz"))
    np.testing.assert_allclose(whole["images"], parts["images"], atol=1e-6)
    assert whole["labels"].tolist() == list(range(7))


def test_a_student_jumps_as_it_was_trained(command: Command, folders: dict[str, Path]) -> None:
    ended = command("sample", folders["student"], "--num-images", 2, "--out", "x.npz")
    assert "by 1 step (its own jumps), NFE 1," in ended.out and not ended.err
    ended = command("sample", folders["student"], "--num-images", 2, "--solver", "heun")
    assert "by 1 step (heun), NFE 1," in ended.out


@torch.no_grad()
@pytest.mark.parametrize("gamma", [None, 0.0, 0.9])
@pytest.mark.parametrize("guidance", [1, 3])
def test_a_students_jumps_noise_and_guidance(
    command: Command, folders: dict[str, Path], gamma: float | None, guidance: int
) -> None:
    options = ["--num-images", 5, "--seed", 3, "--batch-size", 2, "--guidance", guidance]
    options += [] if gamma is None else ["--gamma", gamma]
    ended = command("sample", folders["jumps"], *options, "--out", "x.npz")
    assert ended.status == 0, ended.err
    assert f"by 2 steps (its own jumps), NFE {4 if guidance > 1 else 2}," in ended.out
    arrays, model = drawn(Path("x.npz")), load_denoiser(folders["jumps"])
    assert model.few_steps == JUMPS
    if gamma is not None:
        model.few_steps = FewSteps(JUMPS.trained, JUMPS.grids, gamma=gamma)
    generators = seeded_generators(range(3, 8))
    expected = sample(
        GuidedDenoiser(model, guidance),
        drawn_noise((1, 8, 8), generators),
        steps=2,
        condition=torch.tensor(arrays["labels"]),
        generator=generators,
    )
    found = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, (expected / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_an_untrained_number_of_steps_is_told_once_in_one_line(
    command: Command, folders: dict[str, Path]
) -> None:
    options = ("--num-images", 5, "--batch-size", 2, "--steps", 3, "--out", "x.npz")
    for _ in range(2):  # each run tells it
        ended = command("sample", folders["jumps"], *options)
        assert ended.status == 0 and "by 3 steps" in ended.out
        note = "lit-distill: note: This student was trained for 2, 4 step(s), not for 3."
        assert ended.err.splitlines() == [note]


def test_a_teacher_takes_heun_with_35_evaluations(
    command: Command, folders: dict[str, Path]
) -> None:
    ended = command("sample", folders["unconditional"], "--num-images", 1, "--out", "x.npz")
    assert "by 18 steps (heun), NFE 35," in ended.out
    assert "labels" not in drawn(Path("x.npz"))


def test_a_grid_has_a_column_for_each_class_and_large_pixels(
    command: Command, folders: dict[str, Path]
) -> None:
    options = ("--num-images", 8, "--labels", "0,1,2")
    assert command("sample", folders["student"], *options, "--out", "x.png").status == 0
    picture = Image.open("x.png")
    assert picture.mode == "L"
    assert picture.size == ((3 * 9 - 1) * 7, (3 * 9 - 1) * 7)  # 3 columns, 3 rows, gaps of 1
    pixels = np.asarray(picture)
    assert (pixels[-56:, -56:] == 255).all()  # the ninth place is empty
    assert (pixels[:7, :7] == pixels[0, 0]).all()  # nearest neighbour
    assert pixels[:56, :56].std() > 0


def test_nothing_but_the_file_is_written(command: Command, folders: dict[str, Path]) -> None:
    command("sample", folders["student"], "--num-images", 1, "--out", "x.png")
    assert [path.name for path in Path().iterdir()] == ["x.png"]


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("student", ["--out", "x.jpg"], "--out x.jpg: the name must end in .png"),
        ("student", ["--steps", "0"], "--steps 0: it must be at least 1"),
        ("student", ["--num-images", "0"], "--num-images 0: it must be at least 1"),
        ("student", ["--batch-size", "0"], "--batch-size 0: it must be at least 1"),
        ("student", ["--seed", "-1"], "--seed -1: it must not be negative"),
        ("student", ["--labels", "10"], "this model has the classes 0 to 9"),
        ("student", ["--labels", "one"], "--labels one: give numbers"),
        ("student", ["--device", "nonsense"], "--device nonsense: it cannot be used here"),
        ("strict", ["--steps", "3"], "samples in 2, 4 step(s) only"),
        ("strict", ["--steps", "3", "--solver", "heun"], "samples in 2, 4 step(s) only"),
        ("teacher", ["--gamma", "0.5"], "--gamma 0.5: this folder holds a teacher"),
        ("jumps", ["--gamma", "1.5"], "--gamma 1.5: a share of noise lies between 0 and 1"),
        ("jumps", ["--gamma", "1", "--solver", "heun"], "--solver heun takes their place"),
        ("unconditional", ["--labels", "all"], "this model is unconditional"),
        ("unconditional", ["--guidance", "2"], "this model is unconditional"),
        ("text", [], "This is a text-to-image model: say what to draw"),
        ("text", ["--labels", "1", "--prompts", "zero"], "this model is unconditional"),
        ("teacher", ["--prompts", "zero"], "--prompts: this model takes no prompts"),
        ("nowhere/at/all", [], "There is no folder nowhere/at/all"),
    ],
)
def test_bad_input_is_one_sentence(
    command: Command, folders: dict[str, Path], model: str, options: list[str], words: str
) -> None:
    ended = command("sample", folders.get(model, model), *options)
    assert ended.status == 1
    assert words in ended.error
    assert not list(Path().glob("*.png"))


@pytest.mark.parametrize(
    "options", [[], ["f", "--bogus"], ["f", "--solver", "rk4"], ["f", "--steps", "x"]]
)
def test_a_wrong_command_line_ends_with_2(command: Command, options: list[str]) -> None:
    ended = command("sample", *options)
    assert ended.status == 2
    assert ended.error.startswith("lit-distill: error: ")


def test_help(command: Command) -> None:
    ended = command("sample", "--help")
    assert ended.status == 0
    assert "--guidance" in ended.out
