"""Fixtures that every test shares."""

import pytest
import torch

import fastelbo


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    """Every backend that can run on this machine's CPU; "cpu" must."""
    reason = fastelbo.backends.usable(request.param)
    assert reason is None, reason
    return request.param


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
