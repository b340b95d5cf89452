import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import (
    EventAccumulator,
)
from toy import Toy, ToyData, trainer

from lit_distill.callbacks.pictures import draw_rows, tile
from lit_distill.callbacks.sample_grid import SampleGrid
from lit_distill.diffusion import seeded_noise


def fit(folder, *callbacks, module=None, **options):
    torch.manual_seed(0)
    module = module or Toy()
    options = {"max_steps": 5, **options}
    trainer(folder, *callbacks, **options).fit(module, ToyData(batch_size=40))
    return module


def pictures(folder):
    return sorted(path.name for path in (folder / "samples").iterdir())


def test_pictures_are_drawn_at_the_start_every_n_steps_and_at_the_end(tmp_path):
    fit(tmp_path, SampleGrid(num_images=6, every_n_steps=2))
    steps = ("000000", "000002", "000004", "000005")
    assert pictures(tmp_path) == [f"step-{step}.png" for step in steps]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_last_step_that_is_due_is_drawn_once(tmp_path):
    module = fit(tmp_path, SampleGrid(num_images=6, every_n_steps=5))
    assert pictures(tmp_path) == ["step-000000.png", "step-000005.png"]
    assert len(module.previews) == 2


def test_steps_are_counted_not_batches(tmp_path):
    module = fit(tmp_path, SampleGrid(every_n_steps=1), max_steps=2, accumulate_grad_batches=3)
    names = [f"step-{step:06d}.png" for step in range(3)]
    assert pictures(tmp_path) == names and len(module.previews) == 3


def test_noise_and_labels_are_always_the_same(tmp_path):
    module = fit(tmp_path, SampleGrid(num_images=7, every_n_steps=1, seed=30))
    assert len(module.previews) == 6
    for noise, labels in module.previews:
        assert torch.equal(noise, seeded_noise((1, 4, 4), range(30, 37)))
        assert labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_an_unconditional_model_gets_no_labels(tmp_path):
    module = Toy()
    module.student.num_classes = None
    fit(tmp_path, SampleGrid(), module=module, max_steps=1)
    assert module.previews[0][1] is None


class Still(Toy):
    """Does not learn, so that only the noise could change its pictures."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.0)


def test_a_model_that_does_not_change_gives_the_same_images(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(tmp_path, SampleGrid(every_n_steps=1), module=Still(), max_steps=3, logger=logger)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    for name in ("samples/student", "samples/noised"):  # noised draws its own noise
        images = events.Images(name)
        assert [image.step for image in images] == [0, 1, 2, 3]
        assert len({image.encoded_image_string for image in images}) == 1


def test_tensorboard_gets_the_images_at_their_steps(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    fit(tmp_path, SampleGrid(num_images=6, every_n_steps=2, columns=3), logger=logger)
    events = EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload()
    assert sorted(events.Tags()["images"]) == ["samples/noised", "samples/student"]
    images = events.Images("samples/student")
    assert [image.step for image in images] == [0, 2, 4, 5]
    assert (images[0].height, images[0].width) == (2 * 5 - 1, 3 * 5 - 1)
    assert images[0].encoded_image_string != images[-1].encoded_image_string  # it learned


def test_other_loggers_are_left_alone(tmp_path):
    fit(tmp_path, SampleGrid(), max_steps=1, logger=CSVLogger(tmp_path))
    assert len(pictures(tmp_path)) == 2


def test_training_is_the_same_to_the_bit_with_and_without(tmp_path):
    without = fit(tmp_path)
    with_grids = fit(tmp_path, SampleGrid(every_n_steps=1))
    assert without.student.bias.item() == with_grids.student.bias.item() != 0.1


def test_modes_are_left_as_they_were(tmp_path):
    class Modes(SampleGrid):
        def on_train_batch_end(self, trainer, pl_module, *args):
            pl_module.student.eval()  # what a method keeps frozen
            super().on_train_batch_end(trainer, pl_module, *args)
            assert pl_module.training and not pl_module.student.training
            pl_module.student.train()

    module = fit(tmp_path, Modes(every_n_steps=1))
    assert len(module.previews) == 6


def test_modes_come_back_after_an_error(tmp_path):
    class Broken(Toy):
        def preview(self, noise, condition):
            raise RuntimeError("broken preview")

    module = Broken()
    with pytest.raises(RuntimeError, match="broken preview"):
        fit(tmp_path, SampleGrid(), module=module)
    assert module.training and module.student.training


def test_only_the_first_process_draws(tmp_path, monkeypatch):
    run = trainer(tmp_path)
    monkeypatch.setattr(type(run), "is_global_zero", property(lambda self: False))
    module = Toy()
    SampleGrid().on_train_start(run, module)
    assert not module.previews and not (tmp_path / "samples").exists()


def test_a_data_module_is_asked_for(tmp_path):
    batch = {"image": torch.zeros(4, 1, 4, 4), "label": torch.zeros(4, dtype=torch.long)}
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    with pytest.raises(ValueError, match="SampleGrid needs a data module"):
        trainer(tmp_path, SampleGrid(), max_steps=1).fit(Toy(), loader)


@pytest.mark.parametrize("option", ["num_images", "every_n_steps", "columns"])
def test_bad_settings_are_refused(option):
    with pytest.raises(ValueError, match="of at least 1"):
        SampleGrid(**{option: 0})


def test_tiles_are_in_reading_order_with_white_between():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    grid = tile(images, columns=3)
    assert grid.shape == (3, 5, 8)
    assert grid[0, 0].tolist() == [0, 0, 255, 1, 1, 255, 2, 2]
    assert grid[0, 3].tolist() == [3, 3, 255, 4, 4, 255, 255, 255]
    assert (grid[:, 2] == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_show_each_block_with_square_pixels(tmp_path, channels):
    dark = torch.zeros(4, channels, 2, 2, dtype=torch.uint8)
    bright = torch.full((2, channels, 2, 2), 200, dtype=torch.uint8)
    path = tmp_path / "new" / "x.png"
    draw_rows({"dark": dark, "bright": bright}, path, columns=2, title="title")
    pixels = (255 * imread(path)[..., :3]).round()
    height, width = pixels.shape[:2]
    right = pixels[:, width - 30]  # through the last column of images
    black, grey = (right == 0).all(1).sum(), (right == 200).all(1).sum()
    assert black / grey == pytest.approx(2, rel=0.1) and grey > 50  # two rows against one
    assert height > black + grey  # and the title above


def test_a_title_longer_than_the_picture_is_wide_takes_two_lines(tmp_path):
    images = {"x": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}
    drawn = {}
    for name, title in (("short", "title"), ("long", "a title of several words " * 2)):
        draw_rows(images, tmp_path / f"{name}.png", columns=2, title=title)
        drawn[name] = imread(tmp_path / f"{name}.png")
    assert drawn["long"].shape[0] > drawn["short"].shape[0]
    left, right = drawn["long"][:40, :3], drawn["long"][:40, -3:]
    assert (left == 1).all() and (right == 1).all()
