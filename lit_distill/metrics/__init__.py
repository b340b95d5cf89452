"""What a set of generated images is worth and costs: extractors, figures, and all of them."""

from lit_distill.metrics.clip import ClipScore
from lit_distill.metrics.cost import Cost, Sampler, measure_cost
from lit_distill.metrics.evaluation import ImageSet, Measures, describe, measure
from lit_distill.metrics.extractors import (
    DigitsExtractor,
    Extractor,
    InceptionExtractor,
    MNISTExtractor,
    PixelExtractor,
)
from lit_distill.metrics.figures import (
    bootstrap_interval,
    class_entropy,
    coverage,
    coverage_interval,
    covered,
    frechet_distance,
    label_accuracy,
    nearest_images,
    pixel_distance,
    recall,
    to_uint8,
)
from lit_distill.metrics.resnet import ResNet56Extractor

__all__ = [
    "ClipScore",
    "Cost",
    "DigitsExtractor",
    "Extractor",
    "ImageSet",
    "InceptionExtractor",
    "MNISTExtractor",
    "Measures",
    "PixelExtractor",
    "ResNet56Extractor",
    "Sampler",
    "bootstrap_interval",
    "class_entropy",
    "coverage",
    "coverage_interval",
    "covered",
    "describe",
    "frechet_distance",
    "label_accuracy",
    "measure",
    "measure_cost",
    "nearest_images",
    "pixel_distance",
    "recall",
    "to_uint8",
]
