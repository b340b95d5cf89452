"""The single figures of an evaluation: pure functions of uint8 images, features and logits."""

import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn
from torch_fidelity.metric_prc import KEY_METRIC_RECALL, prc_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance

from lit_distill.datamodules import to_signed


def to_uint8(images: Tensor) -> Tensor:
    """Round images in [-1, 1] (values outside are clamped) to 0..255."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class _Given(nn.Module):
    """Stands in for torchmetrics' extractor where the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features  # without it torchmetrics probes with a 3x299x299 image

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Frechet distance between the Gaussians fitted to two sets of features.

    ``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` by torchmetrics' ``FrechetInceptionDistance``,
    in float64 on the CPU. The features go in as they are: an image is seen by the extractor once,
    for all figures.

    Args:
        real: (N, F) features, N at least 2.
        fake: (M, F) features, M at least 2.

    Returns:
        The distance, without the negative values that rounding makes of 0.

    Raises:
        ValueError: If a set has fewer than two images or the feature sizes differ.

    Source:
        Heusel et al., GANs trained by a two time-scale update rule (2017), Eq. 6.
    """
    if min(len(real), len(fake)) < 2 or real.shape[1] != fake.shape[1]:
        raise ValueError(
            "A Frechet distance takes two sets of at least 2 features of one size, not "
            f"{tuple(real.shape)} and {tuple(fake.shape)}: raise the number of samples, and use "
            "one extractor for both."
        )
    # Every process of a distributed run holds all images: adding up over them would be wrong.
    metric = FrechetInceptionDistance(_Given(real.shape[1]), sync_on_compute=False)
    for features, is_real in ((real, True), (fake, False)):
        for chunk in features.split(10_000):
            metric.update(chunk.double(), real=is_real)
    return max(float(metric.compute()), 0.0)


def bootstrap_interval(
    reference: Tensor,
    samples: Tensor,
    *,
    groups: tuple[Tensor | None, Tensor | None] = (None, None),
    resamples: int = 100,
    seed: int = 0,
) -> tuple[float, float]:
    """95% interval of a Frechet distance, for what other images of the same models would give.

    Both sets are drawn anew, with replacement. A resampled distance is larger by what the finite
    sets bring, so the resampled ones are moved by the difference of their mean to the distance.

    Args:
        reference: (N, F) features.
        samples: (M, F) features.
        groups: (N,) and (M,) int64, such as labels, where the size of each group was given and is
            no matter of chance; rows are then drawn within their groups. None: of all rows.
        resamples: Number of draws, at least 2. One takes 0.03 s for 10,000 x 64 features of each
            set, and some 10 s for 10,000 x 2,048, on a core.
        seed: Of the draws.

    Returns:
        Lower end, not below 0, and upper end.

    Raises:
        ValueError: If there are fewer than 2 resamples, or see :func:`frechet_distance`.
    """
    _check_resamples(resamples)
    distance = frechet_distance(reference, samples)
    generator = torch.Generator().manual_seed(seed)
    parts = [
        [rows] if group is None else [rows[group == g] for g in group.unique()]
        for rows, group in zip((reference, samples), groups, strict=True)
    ]
    values = []
    for _ in range(resamples):
        drawn = (torch.cat([_drawn(part, generator) for part in of_set]) for of_set in parts)
        (m1, s1), (m2, s2) = map(_moments, drawn)
        # tr (S1 S2)^(1/2) from symmetric matrices, which is several times as fast.
        levels, axes = torch.linalg.eigh(s1)
        root = (axes * levels.clamp_min(0).sqrt()) @ axes.T
        product = torch.linalg.eigvalsh(root @ s2 @ root).clamp_min(0).sqrt().sum()
        values.append(float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * product))
    low, high = _ends(torch.tensor(values, dtype=torch.float64), distance)
    return max(low, 0.0), high


def _check_resamples(resamples: int) -> None:
    if resamples < 2:
        raise ValueError(f"An interval takes at least 2 resamples, not {resamples}.")


def _drawn(rows: Tensor, generator: torch.Generator) -> Tensor:
    """As many rows, drawn with replacement."""
    return rows[torch.randint(len(rows), (len(rows),), generator=generator)]


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    rows = features.double()
    return rows.mean(0), rows.T.cov()


def _ends(values: Tensor, figure: float) -> tuple[float, float]:
    """The middle 95% of resampled figures, moved so that their mean is the figure itself."""
    moved = values + (figure - values.mean())
    low, high = moved.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def coverage(real: Tensor, fake: Tensor, *, neighbours: int = 5, maximum: int = 5_000) -> float:
    """Share of real images with a generated one within reach of their nearest real neighbours.

    The reach of a real image is the distance to its ``neighbours``-th nearest real image, found
    with scikit-learn's ``NearestNeighbors`` (by brute force, exact). More samples cover more, so
    both sets are drawn down to one size: that of the smaller, at most ``maximum``. The mean over
    disjoint draws of generated images is given, as many as ``maximum`` allows but at most 10. Two
    sets from one distribution then have about ``1 - 2^-neighbours`` (0.97).

    Args:
        real: (N, F) features.
        fake: (M, F) features.
        neighbours: The paper's k.
        maximum: Largest number of images of each set that are compared.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: If a set is not larger than ``neighbours``.

    Source:
        Naeem et al., Reliable fidelity and diversity metrics for generative models (2020), Eq. 9.
    """
    return float(covered(real, fake, neighbours=neighbours, maximum=maximum).double().mean())


def covered(real: Tensor, fake: Tensor, *, neighbours: int = 5, maximum: int = 5_000) -> Tensor:
    """Which real images are covered by each draw of generated ones, see :func:`coverage`.

    Args:
        real: (N, F) features.
        fake: (M, F) features.
        neighbours: The paper's k.
        maximum: Largest number of images of each set that are compared.

    Returns:
        (draws, images) bool.

    Raises:
        ValueError: If a set is not larger than ``neighbours``.
    """
    real, draws = _draw_alike(real, fake, neighbours, maximum)
    search = NearestNeighbors(n_neighbors=neighbours, algorithm="brute")
    reach = search.fit(real.numpy()).kneighbors()[0][:, -1]  # without X, a point is not its own
    found = []
    for draw in draws:
        nearest = search.fit(draw.numpy()).kneighbors(real.numpy(), n_neighbors=1)[0][:, 0]
        found.append(torch.from_numpy(nearest <= reach))
    return torch.stack(found)


def coverage_interval(
    found: Tensor, *, resamples: int = 1_000, seed: int = 0
) -> tuple[float, float]:
    """95% interval of a coverage: real images, and draws of generated ones, are drawn anew.

    Args:
        found: (draws, images) bool, by :func:`covered`. With one draw, the generated images'
            own share of the spread is left out.
        resamples: Number of draws, at least 2.
        seed: Of the draws.

    Returns:
        Lower and upper end, in [0, 1].

    Raises:
        ValueError: If there are fewer than 2 resamples.
    """
    _check_resamples(resamples)
    generator = torch.Generator().manual_seed(seed)
    rows = found.double()
    values = torch.stack(
        [_drawn(_drawn(rows, generator).mean(0), generator).mean() for _ in range(resamples)]
    )
    low, high = _ends(values, float(rows.mean()))
    return max(low, 0.0), min(high, 1.0)


def recall(real: Tensor, fake: Tensor, *, neighbours: int = 3, maximum: int = 5_000) -> float:
    """Share of real images within reach of a generated one's nearest generated neighbours.

    It sees what :func:`coverage` does not: one average image is near to many real ones, and covers
    them, but copies of it reach nothing. By torch-fidelity, in float64, on sets of one size as for
    :func:`coverage`.

    Args:
        real: (N, F) features.
        fake: (M, F) features.
        neighbours: The paper's k.
        maximum: Largest number of images of each set that are compared.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: If a set is not larger than ``neighbours``.

    Source:
        Kynkäänniemi et al., Improved precision and recall metric for assessing generative models
        (2019), Eq. 2.
    """
    real, draws = _draw_alike(real.double(), fake.double(), neighbours, maximum)
    options = {"prc_neighborhood": neighbours, "prc_batch_size": 2_000, "save_cpu_ram": True}
    found = [prc_features_to_metric(draw, real, verbose=False, **options) for draw in draws]
    return float(sum(figures[KEY_METRIC_RECALL] for figures in found) / len(found))


def _draw_alike(
    real: Tensor, fake: Tensor, neighbours: int, maximum: int
) -> tuple[Tensor, list[Tensor]]:
    """Real rows and disjoint draws of as many generated rows; random, always the same."""
    count = min(len(real), len(fake), maximum)
    if count <= neighbours:
        raise ValueError(
            f"Coverage and recall by {neighbours} neighbours take more than {neighbours} images of "
            f"each set, not {len(real)} real and {len(fake)} generated ones: raise the number of "
            "samples."
        )
    repeats = min(10, len(fake) // count, max(1, maximum // count))  # as long as it is cheap
    return subset(real, count), list(subset(fake, repeats * count).split(count))


def subset(rows: Tensor, count: int) -> Tensor:
    """Draw ``count`` rows (all, if there are fewer) at random; always the same ones."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:count]]


def label_accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of images, in [0, 1], that the classifier takes for their label.

    Args:
        logits: (N, K).
        labels: (N,) int64.
    """
    return float((logits.argmax(1) == labels).double().mean())


def class_entropy(logits: Tensor) -> float:
    """Entropy of the recognised classes over its maximum ``ln K``: 1 = all equally often.

    Args:
        logits: (N, K); an image counts for its most likely class.
    """
    classes = logits.shape[1]
    shares = logits.argmax(1).bincount(minlength=classes).double() / len(logits)
    return float(torch.special.entr(shares).sum() / torch.tensor(classes).double().log())


def nearest_images(images: Tensor, pool: Tensor, *, chunk: int = 1_000) -> tuple[Tensor, Tensor]:
    """The image of a pool that is nearest to each image, in pixels.

    Args:
        images: (N, C, H, W) uint8.
        pool: (M, C, H, W) uint8, such as the training images.
        chunk: Images of each kind whose distances are held at once, times 10 for the pool.

    Returns:
        L2 distances (N,) float32 in pixels of [-1, 1], and indices (N,) int64 into the pool.
    """
    queries, points = images.flatten(1), pool.flatten(1)
    indices = torch.cat([_nearest(part, points, 10 * chunk) for part in queries.split(chunk)])
    # The search multiplies matrices, which is fast but cannot tell 0 from 1e-3: measure again.
    distances = [
        torch.linalg.vector_norm(to_signed(part) - to_signed(points[index]), dim=1)
        for part, index in zip(queries.split(chunk), indices.split(chunk), strict=True)
    ]
    return torch.cat(distances), indices


def _nearest(queries: Tensor, points: Tensor, chunk: int) -> Tensor:
    """Index (B,) of the nearest of ``points`` (M, D) to each of ``queries`` (B, D), both uint8."""
    best = torch.full((len(queries),), -torch.inf)
    index = torch.zeros(len(queries), dtype=torch.int64)
    for first in range(0, len(points), chunk):
        part = to_signed(points[first : first + chunk])
        # |q - p|^2 / 2 is least where q p - |p|^2 / 2 is greatest
        scores = torch.addmm(-part.square().sum(1) / 2, to_signed(queries), part.T)
        score, at = scores.max(1)
        better = score > best
        best = torch.where(better, score, best)
        index = torch.where(better, at + first, index)
    return index


def pixel_distance(images: Tensor, others: Tensor) -> float:
    """Mean L2 distance, pixels in [-1, 1], between images (N, C, H, W) uint8 at equal places."""
    difference = to_signed(images) - to_signed(others)
    return float(torch.linalg.vector_norm(difference.flatten(1), dim=1).double().mean())
