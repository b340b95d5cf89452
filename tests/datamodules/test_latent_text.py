"""Captioned images, and the latents and prompts that are computed of them once."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from small_text import text_folder

from lit_distill.datamodules import (
    CaptionedDigits,
    CaptionedFolder,
    DigitsDataModule,
    LatentTextDataModule,
    to_signed,
)
from lit_distill.models import load_denoiser


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return text_folder(tmp_path_factory.mktemp("text") / "pipeline")


@pytest.fixture
def images(tmp_path):
    """Five images with captions, one of which occurs twice."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    lines = []
    for i, text in enumerate(["one", "two", "one", "a picture of three", "four"]):
        name = f"more/{i}.png" if i == 4 else f"{i}.png"
        Image.new("L", (20 + 4 * i, 24), 50 * i).save(folder / name)
        lines.append({"file_name": name, "text": text})
    write(folder, lines)
    return folder


def write(folder, lines):
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def module(source, pipeline, cache, **options):
    return LatentTextDataModule(
        source, pipeline, str(cache), **{"shard_size": 2, "batch_size": 2, **options}
    )


def ready(data):
    data.prepare_data()
    data.setup("fit")
    return data


def test_batches_hold_the_latents_and_the_prompts_of_the_images(images, pipeline, tmp_path):
    source = CaptionedFolder(str(images))
    data = ready(module(source, pipeline, tmp_path / "cache"))
    codec = load_denoiser(pipeline).codec
    batch = data._gather_items(torch.tensor([4, 0, 2]))
    pixels = torch.cat([source.images(range(i, i + 1), (1, 16, 16)) for i in (4, 0, 2)])
    torch.testing.assert_close(batch["image"], codec.encode(to_signed(pixels)))
    torch.testing.assert_close(batch["prompt_embeds"], codec.embed(["four", "one", "one"]))
    assert sorted(p.name for p in (tmp_path / "cache").glob("*")) == [
        *(f"latents-0000{i}.safetensors" for i in range(3)),
        "manifest.json",
        *(f"prompts-0000{i}.safetensors" for i in range(2)),  # four different captions
    ]
    assert sum(len(b["image"]) for b in data.train_dataloader()) == 4
    noise = next(iter(data.predict_dataloader()))
    assert noise["noise"].shape[1:] == (4, 4, 4) and noise["prompt_embeds"].shape[1:] == (8, 16)


def test_images_are_cut_at_their_centre(tmp_path):
    wide = Image.new("RGB", (30, 10))
    wide.paste((255, 0, 0), (10, 0, 20, 10))
    wide.save(tmp_path / "x.png")
    write(tmp_path, [{"file_name": "x.png", "text": "red"}])
    cut = CaptionedFolder(str(tmp_path)).images(range(1), (3, 10, 10))
    assert cut.shape == (1, 3, 10, 10) and cut[0, 0].min() == 255 and cut[0, 1:].max() == 0


def test_digits_have_captions_of_their_class():
    source = CaptionedDigits()
    images, labels = DigitsDataModule().images("train")
    assert source.captions[0] == "a handwritten zero" and source.captions[7] == "seven"
    assert len(set(source.captions)) == 40 and len(source.captions) == len(labels)
    large = source.images(range(3, 5), (1, 16, 16))
    assert torch.equal(large[:, :, ::2, ::2], images[3:5])
    assert torch.equal(large[:, :, 1::2, 1::2], images[3:5])
    with pytest.raises(ValueError, match="cannot be made 20x20"):
        source.images(range(1), (1, 20, 20))


def test_a_killed_run_goes_on_at_the_missing_shard(images, pipeline, tmp_path):
    cache = tmp_path / "cache"
    child = os.fork()
    if child == 0:  # it ends as a power cut would end it, within the second shard of latents
        data = module(CaptionedFolder(str(images)), pipeline, cache)
        encode = data._encoded
        data._encoded = lambda items, device: (
            os.kill(os.getpid(), signal.SIGKILL) if items.start else encode(items, device)
        )
        data.prepare_data()
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not json.loads((cache / "manifest.json").read_text())["complete"]
    (cache / "latents-00001.safetensors.part").write_bytes(b"half of it")
    data, computed = module(CaptionedFolder(str(images)), pipeline, cache), []
    encode = data._encoded
    data._encoded = lambda items, device: computed.append(items.start) or encode(items, device)
    whole = ready(module(CaptionedFolder(str(images)), pipeline, tmp_path / "whole"))
    assert ready(data) and computed == [2, 4]
    assert not list(cache.glob("*.part"))
    some = torch.arange(5)
    for name, tensor in whole._gather_items(some).items():
        assert torch.equal(data._gather_items(some)[name], tensor)
    again = module(CaptionedFolder(str(images)), pipeline, cache)
    again._encoded = None  # nothing is left to compute
    ready(again)


def test_a_cache_of_other_companions_or_captions_is_refused(images, pipeline, tmp_path):
    data = ready(module(CaptionedFolder(str(images)), pipeline, tmp_path / "cache"))
    other = text_folder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match=r"computed in another way \(vae: .*text_encoder: "):
        module(CaptionedFolder(str(images)), other, tmp_path / "cache").prepare_data()
    data.check_teacher(load_denoiser(pipeline))
    with pytest.raises(ValueError, match="with another VAE than the model's"):
        data.check_teacher(load_denoiser(other))
    lines = [json.loads(line) for line in (images / "metadata.jsonl").read_text().splitlines()]
    write(images, [{**lines[0], "text": "nine"}, *lines[1:]])
    with pytest.raises(ValueError, match="source: "):
        module(CaptionedFolder(str(images)), pipeline, tmp_path / "cache").prepare_data()


def test_an_image_that_was_replaced_is_noticed(images, pipeline, tmp_path):
    module(CaptionedFolder(str(images)), pipeline, tmp_path / "cache").prepare_data()
    Image.new("L", (30, 30), 200).save(images / "0.png")
    with pytest.raises(ValueError, match=r"computed in another way \(source: "):
        module(CaptionedFolder(str(images)), pipeline, tmp_path / "cache").prepare_data()


def test_damaged_shards_are_refused(images, pipeline, tmp_path):
    ready(module(CaptionedFolder(str(images)), pipeline, tmp_path / "cache"))
    shard = tmp_path / "cache" / "latents-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4] + b"oops")
    with pytest.raises(ValueError, match="missing, truncated or was altered"):
        ready(module(CaptionedFolder(str(images)), pipeline, tmp_path / "cache"))


def test_captions_alone_have_prompts_and_no_latents(pipeline, tmp_path):
    write(tmp_path, [{"text": "one"}, {"text": "two"}])
    with pytest.raises(ValueError, match=r"line 1 has a caption but names no image.*images: false"):
        CaptionedFolder(str(tmp_path))
    source = CaptionedFolder(str(tmp_path), images=False)
    batch = next(iter(ready(module(source, pipeline, tmp_path / "c")).train_dataloader()))
    assert batch["image"].shape == (2, 4, 4, 4) and batch["image"].isnan().all()
    assert batch["prompt_embeds"].shape == (2, 8, 16)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"], ids=ascii)
def test_a_caption_may_contain_any_separator(tmp_path, separator):
    text = f'{{"text": "one{separator}two"}}\r\n{{"text": "three"}}\n'
    (tmp_path / "metadata.jsonl").write_text(text, encoding="utf-8", newline="")
    found = CaptionedFolder(str(tmp_path), images=False).captions
    assert found == [f"one{separator}two", "three"]


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([{"file_name": "gone.png", "text": "x"}], "line 1 names the image gone.png"),
        ([{"file_name": "0.png"}], 'line 1 has no caption: give it a "text"'),
        ([{"file_name": "0.png", "text": "x"}], "4 images in .* have no caption .* first is 1.png"),
        ([], "holds no captions"),
    ],
)
def test_captions_that_do_not_fit_the_images_are_refused(images, lines, sentence):
    write(images, lines)
    with pytest.raises(ValueError, match=sentence):
        CaptionedFolder(str(images))


def test_a_folder_without_captions_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="each of its lines names an image"):
        CaptionedFolder(str(tmp_path))


def test_a_model_of_images_is_refused(images, pipeline, tmp_path):
    from tiny_networks import tiny_network

    from lit_distill.diffusion import EDMDenoiser

    data = ready(module(CaptionedFolder(str(images)), pipeline, tmp_path / "cache"))
    with pytest.raises(ValueError, match="this model works on images"):
        data.check_model(EDMDenoiser(tiny_network(channels=4, image_size=4)))
