import math
from urllib.error import URLError

import lpips
import pytest
import torch
import torchvision

from lit_distill.losses import DISTANCES, L1, L2, LPIPS, Distance, Huber, PseudoHuber, as_distance

ARCHITECTURES = {"alex": torchvision.models.alexnet, "squeeze": torchvision.models.squeezenet1_1}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    """Files of torchvision's layout, with random weights and without the classifier."""
    folder, files = tmp_path_factory.mktemp("backbones"), {}
    for net, build in ARCHITECTURES.items():
        torch.manual_seed(0)
        features = build(weights=None).features.state_dict()
        files[net] = folder / f"{net}.pth"
        torch.save({f"features.{name}": tensor for name, tensor in features.items()}, files[net])
    return files


@pytest.fixture(scope="module")
def squeeze(backbones):
    return LPIPS("squeeze", resize=32, weights=backbones["squeeze"])


def images(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# --- Plain distances -----------------------------------------------------------------------------


def test_plain_distances_are_their_formulas():
    x, y = images(4, 3, 5, 5), images(4, 3, 5, 5, seed=1)
    difference = (x - y).reshape(4, -1).double()
    squares, norm = difference.square().mean(1), difference.square().sum(1)
    c = 0.00054 * math.sqrt(75)
    assert torch.allclose(L2()(x, y).double(), squares)
    assert torch.allclose(L1()(x, y).double(), difference.abs().mean(1))
    assert torch.allclose(PseudoHuber()(x, y).double(), (norm + c**2).sqrt() - c)
    assert torch.allclose(PseudoHuber(0.5)(x, y).double(), (norm + 0.25).sqrt() - 0.5)
    each = ((difference.square() + 0.01).sqrt() - 0.1).mean(1)
    assert torch.allclose(Huber(0.1)(x, y).double(), each)


@pytest.mark.parametrize("distance", [L1(), L2(), Huber(), PseudoHuber(), PseudoHuber(10.0)])
@pytest.mark.parametrize("shape", [(3, 2), (3, 1, 8, 8)])
def test_plain_distances_are_distances(distance, shape):
    x, y = images(*shape), images(*shape, seed=1)
    assert distance(x, y).shape == (3,)
    assert (distance(x, y) > 0).all()
    assert torch.equal(distance(x, x), torch.zeros(3))
    assert torch.allclose(distance(x, y), distance(y, x))
    x.requires_grad_(True)
    distance(x, x.detach()).sum().backward()
    assert x.grad.isfinite().all()


def test_pseudo_huber_does_not_cancel_near_zero():
    # sqrt(d^2 + c^2) - c is 0 in float32 where |d| is below c / 3000.
    x = torch.full((1, 4), 1e-5)
    expected = 4e-10 / (2 * 0.5)
    assert float(PseudoHuber(0.5)(x, torch.zeros(1, 4))) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("c", [0.0, -1.0])
def test_pseudo_huber_without_a_constant_is_refused(c):
    with pytest.raises(ValueError, match=f"c={c}"):
        PseudoHuber(c)
    with pytest.raises(ValueError, match=f"c={c}"):
        Huber(c)


@pytest.mark.parametrize("distance", [L1(), L2(), PseudoHuber()])
def test_no_gradient_reaches_the_target(distance):
    x, y = images(2, 1, 4, 4).requires_grad_(True), images(2, 1, 4, 4, seed=1).requires_grad_(True)
    distance(distance_input := x * 1, y).sum().backward()
    assert distance_input.grad_fn is not None and (x.grad != 0).any()
    if type(distance) is L2:
        assert torch.allclose(x.grad, 2 * (x - y).detach() / 16)


def test_names_make_distances():
    assert as_distance("l2").__class__ is L2 and as_distance("pseudo_huber").c is None
    own = PseudoHuber(0.1)
    assert as_distance(own) is own
    assert {"lpips", "l2", "l1", "huber", "pseudo_huber"} == set(DISTANCES)
    assert all(issubclass(kind, Distance) for kind in DISTANCES.values())


def test_an_unknown_name_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"distance='ssim'.*lpips, l2, l1, huber, pseudo_huber"):
        as_distance("ssim")


# --- LPIPS ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
@pytest.mark.parametrize("net", ARCHITECTURES)
def test_lpips_is_the_packages(backbones, net):
    ours = LPIPS(net, resize=None, weights=backbones[net])
    stock = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    stock.net.load_state_dict(ours.model.net.state_dict())
    x, y = images(3, 3, 64, 64), images(3, 3, 64, 64, seed=1)
    expected = stock(x, y).flatten()
    assert (expected > 1e-3).all()
    assert torch.allclose(ours(x, y), expected, rtol=0, atol=1e-5)
    assert torch.allclose(ours(y, x), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning:torchvision")
@pytest.mark.parametrize("net", ARCHITECTURES)
def test_lpips_reads_all_given_weights_and_draws_none(backbones, net):
    state, before = torch.load(backbones[net], weights_only=True), torch.get_rng_state()
    model = LPIPS(net, weights=backbones[net]).model
    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in model.net.state_dict().items():
        assert torch.equal(weight, state["features." + name.split(".", 1)[1]]), name
    assert all(head.any() for head in model.lins.parameters())


def test_lpips_resizes_bilinearly_and_takes_grey_images(backbones, squeeze):
    x, y = images(2, 1, 8, 8), images(2, 1, 8, 8, seed=1)
    plain = LPIPS("squeeze", resize=None, weights=backbones["squeeze"])
    large = [
        torch.nn.functional.interpolate(i.expand(-1, 3, -1, -1), (32, 32), mode="bilinear")
        for i in (x, y)
    ]
    assert torch.allclose(squeeze(x, y), plain(*large), atol=1e-6)


def test_lpips_makes_no_graph_on_the_target_side_and_trains_nothing(squeeze):
    x, y = images(2, 3, 8, 8).requires_grad_(True), images(2, 3, 8, 8, seed=1).requires_grad_(True)
    squeeze(x, y).sum().backward()
    assert y.grad is None and x.grad.isfinite().all() and (x.grad != 0).any()
    assert not any(p.requires_grad for p in squeeze.parameters())
    grew = []
    squeeze.model.net.register_forward_hook(lambda *call: grew.append(call[2][0].requires_grad))
    squeeze(x, y)
    assert sorted(grew) == [False, True]


def test_features_of_targets_can_be_kept(squeeze):
    x, y = images(3, 3, 8, 8), images(3, 3, 8, 8, seed=1)
    kept = squeeze.features(y)
    assert all(len(stage) == 3 for stage in kept)
    assert torch.equal(squeeze.compare(squeeze.features(x), kept), squeeze(x, y))
    half = [stage.half().float() for stage in kept]
    assert torch.allclose(squeeze.compare(squeeze.features(x), half), squeeze(x, y), rtol=2e-3)


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0])
def test_gradients_on_constant_images_are_finite(squeeze, value):
    x = torch.full((2, 3, 32, 32), value, requires_grad=True)
    squeeze(x, images(2, 3, 32, 32)).sum().backward()
    assert x.grad.isfinite().all()


def test_nothing_is_nan_where_all_features_are_zero(backbones):
    dark = LPIPS("squeeze", resize=32, weights=backbones["squeeze"])
    for parameter in dark.model.net.parameters():
        parameter.zero_()
    x = images(2, 3, 8, 8).requires_grad_(True)
    distance = dark(x, images(2, 3, 8, 8, seed=1))
    distance.sum().backward()
    assert torch.equal(distance, torch.zeros(2)) and x.grad.isfinite().all()


def test_dropout_stays_off_in_training(squeeze):
    x, y = images(2, 3, 8, 8), images(2, 3, 8, 8, seed=1)
    squeeze.train()
    assert torch.equal(squeeze(x, y), squeeze(x, y))
    assert not any(m.training for m in squeeze.modules())


def test_building_warns_of_nothing(backbones, recwarn):
    LPIPS("squeeze", weights=backbones["squeeze"])
    assert not list(recwarn)


@pytest.mark.parametrize("resize", [None, 16])
def test_images_that_are_too_small_are_refused(backbones, resize):
    distance = LPIPS("squeeze", resize=resize, weights=backbones["squeeze"])
    with pytest.raises(ValueError, match="`resize`"):
        distance(images(1, 1, 8, 8), images(1, 1, 8, 8))


class TwiceAsLarge:
    """Decodes latents of 2 channels to grey images."""

    def decode_with_gradient(self, latents):
        return latents.mean(1, keepdim=True).repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_latents_are_decoded_for_distances_that_know_images_only(squeeze):
    x, y = images(2, 2, 8, 8).requires_grad_(True), images(2, 2, 8, 8, seed=1).requires_grad_(True)
    codec = TwiceAsLarge()
    distance = as_distance(squeeze, codec)
    decoded = [codec.decode_with_gradient(latents) for latents in (x, y)]
    assert torch.equal(distance(x, y), squeeze(*decoded))
    assert torch.equal(distance.compare(distance.features(x), distance.features(y)), distance(x, y))
    distance(x, y).sum().backward()
    assert y.grad is None and (x.grad != 0).any()
    assert as_distance("l2", codec).__class__ is L2 and as_distance(squeeze) is squeeze


def test_latents_without_a_decoder_are_refused(squeeze):
    with pytest.raises(ValueError, match="4 channels"):
        squeeze(images(1, 4, 32, 32), images(1, 4, 32, 32))


def test_an_unknown_backbone_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"net='resnet'.*vgg, alex, squeeze"):
        LPIPS("resnet")


def test_a_missing_weights_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth.*squeezenet1_1-b8a52dc0\.pth"):
        LPIPS("squeeze", weights=tmp_path / "nothing.pth")


def wrong_files(folder, good):
    """Damaged, another network's, of other shapes, no state_dict at all, empty."""
    content = good.read_bytes()
    (folder / "cut.pth").write_bytes(content[: len(content) // 2])
    torch.save({"features.0.weight": torch.zeros(1)}, folder / "other.pth")
    state = torch.load(good, weights_only=True)
    torch.save({name: torch.zeros(2, 2) for name in state}, folder / "shapes.pth")
    torch.save(torch.zeros(3), folder / "tensor.pth")
    (folder / "text.pth").write_text("not a checkpoint")
    (folder / "empty.pth").touch()
    return sorted(folder.glob("*.pth"))


def test_wrong_weights_files_are_refused(tmp_path, backbones):
    for file in wrong_files(tmp_path, backbones["squeeze"]):
        with pytest.raises(ValueError, match=f"{file.name}.*`weights`.*squeezenet1_1"):
            LPIPS("squeeze", weights=file)


def test_without_a_network_the_file_and_the_option_are_named(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", refuse)
    with pytest.raises(FileNotFoundError, match=r"squeezenet1_1-b8a52dc0\.pth.*`weights`"):
        LPIPS("squeeze")
