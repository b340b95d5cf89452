"""Opens exported folders in plain diffusers; a process of its own, without lit_distill.

As a script: stock_process.py JOBS.json OUT.npz
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch


def main(jobs: str, out: str) -> None:
    # A CPU torch cannot import the default torchvision, and diffusers does without. Where the two
    # fit each other, this line is not needed.
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    from diffusers import DiffusionPipeline

    torch.set_num_threads(1)
    images = {}
    for name, job in json.loads(Path(jobs).read_text()).items():
        pipeline = DiffusionPipeline.from_pretrained(job["folder"])
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in job["seeds"]]
        images[name] = pipeline(
            generator=generators, output_type="np", return_dict=False, **job["options"]
        )[0]
        images[f"{name}/pipeline"] = type(pipeline).__name__
    assert not any(name.partition(".")[0] == "lit_distill" for name in sys.modules)
    np.savez(out, **images)


if __name__ == "__main__":
    main(*sys.argv[1:])
