"""Triton kernels, installed as fastelbo.kernels."""

if __name__ != "fastelbo.kernels":
    raise ImportError("import fastelbo.kernels, not kernels: a second copy would register every op twice")
