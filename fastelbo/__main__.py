"""python -m fastelbo: what runs here, and in one sentence why something does not."""

import argparse
import importlib.metadata
import platform

import numpy
import torch

import fastelbo
from fastelbo import backends


def report() -> str:
    """Versions, devices and backends as text."""
    try:
        triton_version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton_version = "not installed"
    lines = [
        f"fastelbo {fastelbo.__version__}",
        f"python   {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch    {torch.__version__}",
        f"numpy    {numpy.__version__}",
        f"triton   {triton_version}",
        "",
        "devices",
        f"  cpu       {torch.get_num_threads()} threads",
    ]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        lines.append(f"  cuda:{index}    {torch.cuda.get_device_name(index)}, sm_{major}{minor}")
    lines += ["", "backends"]
    for name, description in backends.BACKENDS.items():
        reason = backends.usable(name)
        if name == "triton":
            reason = reason or backends.triton_import_error()
        reason = reason or backends.no_device(name)
        if name == "cuda":
            reason = reason or backends.why_not(name, torch.device("cuda"))
        if name == "cpu" and reason is None:
            description = f"C++, {backends.cpu_isa()}"
        lines.append(f"  {name:<9} {description if reason is None else 'not usable: ' + reason}")
    if backends.OVERRIDE:
        lines += ["", f"FASTELBO_BACKEND={backends.OVERRIDE} overrides the automatic choice"]
    return "\n".join(lines)


if __name__ == "__main__":
    argparse.ArgumentParser(prog="python -m fastelbo", description=__doc__).parse_args()
    print(report())
