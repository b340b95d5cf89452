from dataclasses import fields

import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from lit_distill.datamodules import DigitsDataModule
from lit_distill.metrics import (
    DigitsExtractor,
    Extractor,
    bootstrap_interval,
    class_entropy,
    coverage,
    coverage_interval,
    covered,
    describe,
    frechet_distance,
    label_accuracy,
    measure,
    nearest_images,
    pixel_distance,
    recall,
    to_uint8,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def with_moments(mean, covariance, count=500, seed=0):
    """Features whose sample mean and covariance are exactly these."""
    raw = normal(count, len(mean), seed=seed)
    raw = raw - raw.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(raw.T.cov()), raw.T, upper=False)
    return mean + white.T @ torch.linalg.cholesky(covariance).T


class Pixels(Extractor):
    """The identity: features are the pixel values."""

    name, num_features = "pixels", 4

    def features_and_logits(self, images):
        return images.float().flatten(1), images.float().flatten(1)


# --- Frechet distance -----------------------------------------------------------------------------


def test_frechet_distance_of_gaussians_is_the_closed_form():
    means, factors = (normal(2, 6, seed=1), normal(2, 6, 6, seed=2))
    covariances = factors @ factors.mT + 0.1 * torch.eye(6)  # they do not commute
    real, fake = (with_moments(means[i], covariances[i], 300 + i, seed=i) for i in range(2))
    root = torch.from_numpy(sqrtm((covariances[0] @ covariances[1]).numpy()).real)
    expected = (means[0] - means[1]).square().sum() + (covariances.sum(0) - 2 * root).trace()
    assert frechet_distance(real, fake) == pytest.approx(float(expected), rel=1e-8)


def test_frechet_distance_through_an_identity_extractor():
    """Independent pixels: |m1 - m2|^2 + sum (s1 - s2)^2."""
    mean, std = torch.tensor([[100.0, 120, 90, 130], [104.0, 114, 90, 120]]), [12.0, 20.0]
    sets = []
    for i in range(2):
        values = mean[i] + std[i] * torch.randn(20_000, 4, generator=seeded(i))
        images = values.round().clamp(0, 255).to(torch.uint8).view(-1, 1, 2, 2)
        sets.append(describe(Pixels(), images, batch_size=3_000))
    expected = (mean[0] - mean[1]).square().sum() + 4 * (std[0] - std[1]) ** 2
    distance = frechet_distance(sets[0].features, sets[1].features)
    assert distance == pytest.approx(float(expected), rel=0.02)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    features = normal(200, 5)
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_is_symmetric_and_in_float64():
    real, fake = normal(11_000, 3).float(), normal(40, 3, seed=1).float() + 1000
    moments = [(x.double().mean(0), x.double().T.cov()) for x in (real, fake)]
    (m1, c1), (m2, c2) = moments
    root = torch.from_numpy(sqrtm((c1 @ c2).numpy()).real)
    expected = float((m1 - m2).square().sum() + (c1 + c2 - 2 * root).trace())
    assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(fake, real) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("shapes", [((1, 3), (9, 3)), ((9, 3), (1, 3)), ((9, 3), (9, 4))])
def test_frechet_distance_says_what_it_takes(shapes):
    with pytest.raises(ValueError, match="two sets of at least 2 features of one size"):
        frechet_distance(*(torch.zeros(shape) for shape in shapes))


@pytest.mark.parametrize("shift", [0.5, 1.5])
def test_intervals_hold_what_other_samples_give(shift):
    """95% of them the mean of the distances of as many samples; the rest is chance."""
    pairs = [
        (normal(250, 3, seed=2 * i), shift + normal(250, 3, seed=2 * i + 1)) for i in range(60)
    ]
    truth = sum(frechet_distance(*pair) for pair in pairs) / len(pairs)
    ends = [bootstrap_interval(*pair, resamples=40) for pair in pairs]
    assert sum(low <= truth <= high for low, high in ends) >= 0.85 * len(pairs)
    # And no wider than it must be.
    spread = torch.tensor([frechet_distance(*pair) for pair in pairs]).std()
    width = torch.tensor([high - low for low, high in ends]).mean()
    assert 0.7 < float(width / (4 * spread)) < 1.3


def test_an_interval_is_around_its_distance_and_the_same_each_time():
    real, fake = normal(300, 4).float(), (0.3 + normal(200, 4, seed=1)).float()
    low, high = bootstrap_interval(real, fake, resamples=30)
    assert 0 < low < frechet_distance(real, fake) < high
    assert (low, high) == bootstrap_interval(real, fake, resamples=30)
    assert (low, high) != bootstrap_interval(real, fake, resamples=30, seed=1)
    with pytest.raises(ValueError, match="at least 2 resamples, not 1"):
        bootstrap_interval(real, fake, resamples=1)


def test_labels_given_in_turn_are_no_part_of_the_interval():
    """Two far classes: what their shares add to the spread is not there if they are given."""
    labels = torch.arange(1_000) % 2
    place = torch.stack([20.0 * labels, 0.0 * labels], 1)

    def one_set(seed: int) -> Tensor:
        return place + normal(1_000, 2, seed=seed)

    others = [frechet_distance(one_set(2 * i), one_set(2 * i + 1)) for i in range(40)]
    spread = max(others) - min(others)

    def width(**groups) -> float:
        low, high = bootstrap_interval(one_set(0), one_set(1), resamples=60, **groups)
        return high - low

    assert width(groups=(labels, labels)) < 2 * spread < width()


def test_more_images_make_an_interval_narrower():
    widths = []
    for count in (100, 1600):
        low, high = bootstrap_interval(normal(count, 2), 1 + normal(count, 2, seed=1))
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.4)


def test_the_interval_of_a_coverage_is_that_of_a_share():
    found = (torch.rand(10, 2_000, generator=seeded()) < 0.8) & torch.tensor(True)
    fixed = found[:1].expand(10, -1)  # all draws cover the same images
    low, high = coverage_interval(fixed)
    share = float(fixed.double().mean())
    half = 1.96 * (share * (1 - share) / 2_000) ** 0.5
    assert (low, high) == pytest.approx((share - half, share + half), abs=0.1 * half)
    assert coverage_interval(torch.ones(1, 50, dtype=torch.bool)) == (1.0, 1.0)


def test_draws_that_differ_widen_the_interval_of_a_coverage():
    real, fake = normal(400, 2), normal(4_000, 2, seed=1)
    found = covered(real, fake)
    assert found.shape == (10, 400)
    assert coverage(real, fake) == pytest.approx(float(found.double().mean()))
    uneven = torch.arange(10)[:, None] < torch.full((1, 400), 5)  # all or nothing
    low, high = coverage_interval(uneven)
    assert high - low > 0.5


# --- Coverage and recall --------------------------------------------------------------------------


@pytest.mark.parametrize("share", [coverage, recall])
def test_a_set_covers_itself_and_a_far_one_nothing(share):
    real = normal(300, 8)
    assert share(real, real) == 1
    assert share(real, real + 100) == 0


@pytest.mark.parametrize("share", [coverage, recall])
def test_half_of_the_modes_is_half(share):
    modes = torch.tensor([[0.0], [50.0]])
    real = normal(400, 2) + modes.repeat(200, 2)
    assert share(real, normal(400, 2, seed=1)) == pytest.approx(0.5, abs=0.03)


def test_coverage_is_the_papers_formula():
    real, fake = normal(200, 3), 1.5 * normal(200, 3, seed=1) + 0.5
    among = torch.cdist(real, real).fill_diagonal_(torch.inf)
    reach = among.sort(1).values[:, 4]
    expected = (torch.cdist(real, fake).min(1).values <= reach).double().mean()
    assert 0.5 < expected < 0.99
    assert coverage(real, fake, neighbours=5) == pytest.approx(float(expected))


def test_recall_is_the_papers_formula():
    real, fake = normal(200, 3), 0.7 * normal(200, 3, seed=1) + 0.5
    among = torch.cdist(fake, fake).fill_diagonal_(torch.inf)
    reach = among.sort(1).values[:, 2]
    expected = (torch.cdist(real, fake) <= reach).any(1).double().mean()
    assert 0.3 < expected < 0.99
    assert recall(real, fake, neighbours=3) == pytest.approx(float(expected))


def test_coverage_of_a_good_model_is_known_and_free_of_sample_counts():
    """1 - 2^-k for equal distributions, however many samples there are of either."""
    for sizes in [(1000, 1000), (1000, 20_000), (20_000, 1000)]:
        real, fake = normal(sizes[0], 4), normal(sizes[1], 4, seed=1)
        assert coverage(real, fake) == pytest.approx(1 - 2**-5, abs=0.02)


def test_coverage_takes_at_most_so_many_and_is_the_same_each_time():
    real, fake = normal(3_000, 2), normal(3_000, 2, seed=1)
    few = coverage(real, fake, maximum=50)
    assert few == coverage(real, fake, maximum=50) != coverage(real, fake)
    assert round(10 * 50 * few, 9) % 1 == 0  # ten draws of fifty


def test_recall_sees_the_average_image_that_coverage_does_not():
    real, average = normal(300, 50), torch.zeros(300, 50)
    assert coverage(real, average) > 0.95
    assert recall(real, average) == 0


@pytest.mark.parametrize("share", [coverage, recall])
def test_too_few_images_are_refused(share):
    with pytest.raises(ValueError, match="raise the number of samples"):
        share(normal(100, 2), normal(3, 2), neighbours=3)


# --- Labels, pixels -------------------------------------------------------------------------------


def test_label_accuracy_counts():
    logits = torch.eye(4)[[0, 1, 2, 3, 3]]
    assert label_accuracy(logits, torch.tensor([0, 1, 2, 3, 0])) == 0.8


def test_class_entropy_is_one_for_equal_shares_and_zero_for_one_class():
    assert class_entropy(torch.eye(10).repeat(3, 1)) == pytest.approx(1)
    assert class_entropy(torch.eye(10)[[4, 4, 4]]) == 0
    assert class_entropy(torch.eye(4)[[0, 1]]) == pytest.approx(0.5)


def random_images(count, seed, shape=(3, 4, 4)):
    generator = seeded(seed)
    return torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)


def test_nearest_images_are_those_of_brute_force():
    images, pool = random_images(53, 0), random_images(211, 1)
    signed = [x.double().flatten(1) / 127.5 - 1 for x in (images, pool)]
    expected, where = (signed[0][:, None] - signed[1]).square().sum(2).sqrt().min(1)
    distances, indices = nearest_images(images, pool, chunk=7)  # several chunks of either
    assert torch.equal(indices, where)
    torch.testing.assert_close(distances.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_copy_is_at_distance_zero():
    pool = random_images(300, 0)
    order = torch.randperm(300, generator=seeded())
    distances, indices = nearest_images(pool[order], pool)
    assert torch.equal(indices, order) and distances.max() == 0


def test_pixel_distance_is_the_mean_norm_in_signed_pixels():
    black, white = torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, 1, 2, 2)
    white[0] = 255
    assert pixel_distance(black, white.to(torch.uint8)) == pytest.approx((4 * 4) ** 0.5 / 2)


def test_uint8_rounds_and_clamps():
    exact = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(exact.float() / 127.5 - 1), exact)
    assert to_uint8(torch.tensor([-3.0, 3.0, 0.0])).tolist() == [0, 255, 128]


# --- All figures ----------------------------------------------------------------------------------


def test_intervals_are_measured_when_asked_for():
    images = torch.randint(0, 256, (3, 60, 1, 2, 2), dtype=torch.uint8, generator=seeded())
    one, two, three = (describe(Pixels(), s) for s in images)
    measures = measure(one, test=two, teacher=three, resamples=20)
    for name in ("fd_test", "fd_teacher", "coverage"):
        low, high = getattr(measures, f"{name}_interval")
        assert low <= getattr(measures, name) <= high
    without = measure(one, test=two, teacher=three)
    assert without.fd_test == measures.fd_test and without.coverage == measures.coverage
    assert without.fd_test_interval is without.coverage_interval is None


def test_figures_without_a_reference_are_left_out():
    samples = describe(Pixels(), random_images(20, 0, (1, 2, 2)))
    assert all(getattr(measure(samples), field.name) is None for field in fields(measure(samples)))


def test_describe_does_not_depend_on_the_batch_size():
    images, labels = DigitsDataModule().images("val")
    whole = describe(DigitsExtractor(), images, labels, batch_size=1000)
    parts = describe(DigitsExtractor(), images, labels, batch_size=33)
    torch.testing.assert_close(whole.features, parts.features, atol=1e-5, rtol=1e-4)
    assert len(whole) == 297 and whole.labels is labels
    assert torch.equal(whole.logits, DigitsExtractor().logits(images))


class Digits:
    """Real digits: training, held-out test, and the validation block as a good model's samples."""

    def __init__(self):
        self.extractor, self.data = DigitsExtractor(), DigitsDataModule()
        self.train, self.test = (self.described(*self.data.images(s)) for s in ("train", "test"))
        self.good = self.measured(*self.data.images("val"))

    def described(self, images, labels):
        return describe(self.extractor, images, labels)

    def measured(self, images, labels):
        return measure(self.described(images, labels), train=self.train, test=self.test)


@pytest.fixture(scope="module")
def digits():
    return Digits()


def test_held_out_digits_are_a_good_model(digits):
    good = digits.good
    assert good.label_accuracy >= 0.97 and good.class_entropy > 0.99
    assert good.coverage > 0.65 and good.recall > 0.5 and good.nearest_train > 1


def test_a_memoriser_is_seen(digits):
    """It draws from the training set: only the nearest training image tells."""
    images, labels = digits.data.images("train")
    drawn = torch.randint(len(images), (10_000,), generator=seeded())
    copied = digits.measured(images[drawn], labels[drawn])
    assert copied.nearest_train < 0.05 * digits.good.nearest_train
    # which is why that figure is there:
    assert copied.fd_test < 1.05 * digits.good.fd_test
    assert copied.coverage > 0.9 * digits.good.coverage
    assert copied.label_accuracy >= digits.good.label_accuracy - 0.01


@pytest.mark.parametrize("count", [297, 10_000])
def test_a_memoriser_with_some_noise_is_seen(digits, count):
    images, labels = digits.data.images("train")
    drawn = torch.randint(len(images), (count,), generator=seeded())
    noise = torch.randint(-12, 13, (count, *images.shape[1:]), generator=seeded(1))
    noisy = (images[drawn] + noise).clamp(0, 255).to(torch.uint8)
    assert digits.measured(noisy, labels[drawn]).nearest_train < 0.3 * digits.good.nearest_train


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("count", [1_000, 10_000])
def test_a_collapse_to_20_images_a_class_is_seen(digits, split, count):
    images, labels = digits.data.images(split)
    few = torch.cat([(labels == digit).nonzero()[:20, 0] for digit in range(10)])
    drawn = few[torch.randint(len(few), (count,), generator=seeded())]
    collapsed = digits.measured(images[drawn], labels[drawn])
    assert collapsed.coverage < 0.85 * digits.good.coverage
    assert collapsed.recall < 0.75 * digits.good.recall
    # the labels see nothing of it:
    assert collapsed.label_accuracy > 0.97 and collapsed.class_entropy > 0.98


def test_blurred_digits_are_seen(digits):
    images, labels = digits.data.images("val")
    blurred = digits.measured(gaussian_blur(images, 3, 1.0), labels)
    assert blurred.fd_test > 5 * digits.good.fd_test
    assert blurred.coverage < 0.5 * digits.good.coverage
    assert blurred.recall < 0.5 * digits.good.recall


def test_shuffled_labels_are_seen(digits):
    images, labels = digits.data.images("val")
    order = torch.randperm(len(labels), generator=seeded())
    shuffled = digits.measured(images, labels[order])
    assert shuffled.label_accuracy < 0.3 * digits.good.label_accuracy
    assert shuffled.fd_test == digits.good.fd_test  # only the accuracy tells


def test_one_class_only_is_seen(digits):
    images, labels = digits.data.images("val")
    ones = digits.measured(images[labels == 1], labels[labels == 1])
    assert ones.class_entropy < 0.2 and ones.recall < 0.5 * digits.good.recall
    assert ones.fd_test > 5 * digits.good.fd_test


def test_the_average_digit_of_each_class_is_seen(digits):
    images, labels = digits.data.images("train")
    means = torch.stack([images[labels == digit].double().mean(0) for digit in range(10)])
    wanted = torch.arange(1_000) % 10
    averaged = digits.measured(means.round().to(torch.uint8)[wanted], wanted)
    assert averaged.recall < 0.1 and averaged.coverage < 0.5 * digits.good.coverage


# --- Its interval ---------------------------------------------------------------------------------


def test_the_interval_holds_what_new_samples_give():
    """Sets of the same two models, drawn anew, are within it about 19 times in 20."""
    shift = 0.3
    reference, samples = normal(400, 5, seed=1), normal(400, 5, seed=2) + shift
    low, high = bootstrap_interval(reference, samples, resamples=200)
    assert low < frechet_distance(reference, samples) < high
    others = [
        frechet_distance(normal(400, 5, seed=2 * i), normal(400, 5, seed=2 * i + 1) + shift)
        for i in range(2, 42)
    ]
    mean = sum(others) / len(others)
    spread = (sum((d - mean) ** 2 for d in others) / len(others)) ** 0.5
    assert 0.6 * 3.92 * spread < high - low < 1.6 * 3.92 * spread


def test_the_interval_is_the_same_again_and_takes_resamples():
    reference, samples = normal(50, 3, seed=1), normal(50, 3, seed=2)
    one = bootstrap_interval(reference, samples, resamples=10, seed=4)
    assert one == bootstrap_interval(reference, samples, resamples=10, seed=4)
    assert one != bootstrap_interval(reference, samples, resamples=10, seed=5)
    with pytest.raises(ValueError, match="at least 2 resamples"):
        bootstrap_interval(reference, samples, resamples=1)
