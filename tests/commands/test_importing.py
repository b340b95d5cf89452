from pathlib import Path

import torch
from ended import Command
from public_mnist import public_checkpoint

from lit_distill.models import load_denoiser


def test_a_public_checkpoint_becomes_a_folder_to_sample(command: Command, tmp_path: Path) -> None:
    torch.save(public_checkpoint(8), tmp_path / "model.pth")
    ended = command("import", "mnist-ddpm", tmp_path / "model.pth", "runs/original")
    assert ended.status == 0, ended.err
    assert "10 classes, 400 noise levels up to 15.0" in ended.out
    assert load_denoiser("runs/original").num_classes == 10
    options = ("--num-images", 4, "--steps", 2, "--guidance", 1.5, "--solver", "ddim")
    drawn = command("sample", "runs/original", *options, "--out", "x.png")
    assert drawn.status == 0, drawn.err
    assert "NFE 4" in drawn.out


def test_a_file_of_another_network_is_one_sentence(command: Command, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.pth")
    ended = command("import", "mnist-ddpm", tmp_path / "model.pth", "out")
    assert ended.status == 1
    assert "is a checkpoint of another network than the conditional MNIST U-Net" in ended.error
    assert not Path("out").exists()


def test_an_unknown_kind_is_a_wrong_command_line(command: Command) -> None:
    ended = command("import", "celeba-ddpm", "x.pth", "out")
    assert ended.status == 2
    assert "mnist-ddpm" in ended.error


def test_a_folder_of_something_else_is_not_replaced(command: Command, tmp_path: Path) -> None:
    torch.save(public_checkpoint(8), tmp_path / "model.pth")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    ended = command("import", "mnist-ddpm", tmp_path / "model.pth", "own")
    assert ended.status == 1 and "is not replaced" in ended.error
    assert (tmp_path / "own" / "notes.txt").read_text() == "mine"
