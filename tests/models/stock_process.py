"""Opens exported folders in plain diffusers: run as a script, it never imports lit_distill.

    python stock_process.py JOBS.json OUT.npz
"""

import sys

# A CPU torch beside the default torchvision cannot import it, and diffusers does without. Where the
# two fit each other, this line is not needed.
sys.modules["torchvision"] = None  # type: ignore[assignment]

import json

import numpy as np
import torch
from diffusers import DiffusionPipeline


def main(jobs: str, out: str) -> None:
    torch.set_num_threads(1)
    images = {}
    for name, job in json.load(open(jobs)).items():
        pipeline = DiffusionPipeline.from_pretrained(job["folder"])
        pipeline.set_progress_bar_config(disable=True)
        if "seeds" in job:
            generator = [torch.Generator().manual_seed(seed) for seed in job["seeds"]]
        else:
            generator = torch.Generator().manual_seed(job["seed"])
        options = {"generator": generator, "output_type": "np", "return_dict": False}
        images[name] = pipeline(**options, **job["options"])[0]
        images[f"{name}/pipeline"] = type(pipeline).__name__
    assert not any(name.partition(".")[0] == "lit_distill" for name in sys.modules)
    np.savez(out, **images)


if __name__ == "__main__":
    main(*sys.argv[1:])
