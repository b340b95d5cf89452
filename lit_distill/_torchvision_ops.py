"""Lets torchvision be imported where its compiled extension does not fit the installed torch.

A CPU build of torch beside the default build of torchvision is a common pair (it saves gigabytes).
There the extension is not loaded, so that the operators it would define are unknown, and
``import torchvision`` (hence torchmetrics, lightning and lpips) dies with
``operator torchvision::nms does not exist``. Nothing here detects boxes: declaring the operators'
schemas, without kernels, is all that the import needs.
"""

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
_library: torch.library.Library | None = None


def define_missing_torchvision_ops() -> None:
    """Declare ``torchvision::nms`` and ``qnms`` if the compiled extension cannot define them.

    Does nothing where torchvision was imported already or its extension loads.
    """
    global _library
    if _library is not None or _extension_loads():
        return
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS.values():
        _library.define(schema)


def _extension_loads() -> bool:
    """Whether torchvision's own extension defines its operators."""
    from importlib.util import find_spec

    spec = find_spec("torchvision")  # finds the package without importing it
    if spec is None or spec.submodule_search_locations is None:
        return True  # no torchvision at all: nothing to repair
    if _is_defined("nms"):
        return True
    from pathlib import Path

    folder = Path(next(iter(spec.submodule_search_locations)))
    extensions = [*folder.glob("_C*.so"), *folder.glob("_C*.pyd")]
    try:
        for extension in extensions:
            torch.ops.load_library(extension)
    except (OSError, RuntimeError):
        return False
    return _is_defined("nms")


def _is_defined(name: str) -> bool:
    """Whether ``torchvision::name`` is a known operator."""
    return hasattr(torch.ops.torchvision, name)
