"""Networks whose first weights are overwritten at once, built without drawing them."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_DRAWS = (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default)


class Undrawn(TorchDispatchMode):
    """``with Undrawn():`` weights that would be drawn are zeros.

    Drawing them takes a second for the backbone of LPIPS, and moves the random state.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, unless it fills a tensor with random numbers."""
        return args[0].zero_() if func in _DRAWS else func(*args, **(kwargs or {}))
