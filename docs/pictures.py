"""Writes docs/images from what the examples draw: `make pictures`.

Runs those whose pictures are not in build/pictures yet, which takes some minutes; `make clean` takes them away.
"""

import runpy
import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
RUNS = {  # a command, and which of its pictures go where
    "train_vae.py": {"samples": "vae_samples", "reconstructions": "vae_reconstructions", "traversal": "vae_traversal"},
    "conditional_vae.py": {"samples": "conditional_vae_samples"},
    "hierarchical_vae.py": {"samples": "hierarchical_vae_samples", "kl": "hierarchical_vae_kl"},
    "bayesian_regression.py": {"predictions": "bayesian_regression"},
    "variational_fit.py": {"fits": "variational_fit"},
    "train_pixelcnn.py": {"samples": "pixelcnn_samples", "completions": "pixelcnn_completions"},
    "train_pixelcnn.py --data photographs": {"samples": "pixelcnn_photographs"},
}
COURSE = runpy.run_path(str(ROOT / "examples" / "course.py"))["PROGRAMS"]
RUNS |= {f"{name}.py": {name: f"course_{name}"} for name in COURSE}
COLOURS = 128

if __name__ == "__main__":
    IMAGES.mkdir(exist_ok=True)
    for run, pictures in RUNS.items():
        script, *options = run.split()
        output = ROOT / "build" / "pictures" / "_".join([Path(script).stem, *options[1:]])
        if not all((output / f"{name}.png").exists() for name in pictures):
            subprocess.run([sys.executable, ROOT / "examples" / script, *options, "--output", output], check=True)
        for name, target in pictures.items():
            picture = Image.open(output / f"{name}.png").convert("RGB")
            picture.quantize(COLOURS, dither=Image.Dither.NONE).save(IMAGES / f"{target}.png", optimize=True)
