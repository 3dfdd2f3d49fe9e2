"""The types that a user's checker sees."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RIGHT = """
import torch

import fastelbo

mean, s = torch.zeros(2, 3), torch.zeros(2, 3)
z = fastelbo.gaussian_rsample(mean, 0.0, scale=fastelbo.Scale("softplus"), seed=0, num_samples=2)
z, kl = fastelbo.gaussian_rsample_kl(mean, s, 0.0, 1.0, scale_p="std", reduction="mean", generator=torch.Generator())
elbo = fastelbo.gaussian_elbo(z, mean, 1.0, mean, s, beta=kl).elbo.sum().item()
y = fastelbo.masked_conv2d(mean, s, mask_type="A", activation="relu").shape
"""
WRONG = {
    'fastelbo.gaussian_kl("mean", s)': 'Argument 1 to "gaussian_kl" has incompatible type "str"',
    "fastelbo.gaussian_kl(mean, s, scale=1.0)": 'Argument "scale" to "gaussian_kl" has incompatible type "float"',
    "fastelbo.gaussian_rsample(mean, s).kl": '"Tensor" has no attribute "kl"',
    "fastelbo.causal_conv2d(mean, s)": 'Missing named argument "stack" for "causal_conv2d"',
    'fastelbo.Scale("std", clamp=1.0)': 'Argument "clamp" to "Scale" has incompatible type "float"',
}


@pytest.mark.parametrize("name", ["right", "wrong"])
def test_a_users_program_is_checked(tmp_path, name):
    program = tmp_path / "program.py"
    program.write_text(RIGHT + ("\n".join(WRONG) if name == "wrong" else ""))
    command = [sys.executable, "-m", "mypy", str(program)]  # with our settings, and so with the cache of make typecheck
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    first = RIGHT.count("\n") + 1
    for line, error in enumerate(WRONG.values(), first):
        reported = f"program.py:{line}: error: {error}" in found.replace(str(tmp_path) + "/", "")
        assert reported == (name == "wrong"), found
    assert found.count("error:") == (len(WRONG) if name == "wrong" else 0), found
