"""Which implementation runs: chosen once, in the public function."""

import functools
import importlib
import importlib.metadata
import os
import warnings

import torch

from fastelbo import _autograd, _extension, _library

_CPU_ISA = _library.define_helper("cpu_isa", "() -> int", lambda: 0)
_CPU_ISA_NAMES = ("portable", "AVX2", "AVX-512")
_CUDA_ERROR = _library.define_helper("cuda_error", "(int device) -> int", lambda device: 0)

#: Every backend, with what it is.
BACKENDS = {
    "reference": "plain torch",
    "cpu": "C++ with AVX2, AVX-512 or portable vectors",
    "triton": "Triton kernels; by default most convolutions on GPUs",
    "cuda": "CUDA C++ kernels; by default the Gaussian ops on GPUs, the sampler and first convolutions",
}

# The fastest first; "reference" runs wherever torch does. On an H200 large tensors take both backends for GPUs the same
# time, and a call costs CUDA C++ a third of the host's (docs/performance.md).
_ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_CONVOLUTIONS_ORDER = {**_ORDER, "cuda": ("triton", "cuda")}  # Triton's run on tensor cores

_DEVICE = {"cpu": "cpu", "triton": "cpu" if _library.INTERPRETED else "cuda", "cuda": "cuda"}

_OLDEST_TRITON = (3, 6)

# Read once: a call costs microseconds, and so would reading the environment.
OVERRIDE = os.environ.get("FASTELBO_BACKEND") or None
# "tma": Triton's convolutions take the kernels over TMA boxes where GPU and layer can. "block": the block of a Gated
# PixelCNN takes two launches of Triton's where it can.
CONVOLUTIONS = os.environ.get("FASTELBO_CONV") or None


def usable(name: str) -> "str | None":
    """None if the backend is installed, else why it is not, in one sentence.

    Args:
        name: of a backend.

    Returns:
        None or the sentence.

    Example:
        >>> fastelbo.backends.usable("reference") is None
        True
    """
    if name == "reference":
        return None
    if name == "triton":
        return _triton_missing()
    return _extension.load(name)


def _triton_missing() -> "str | None":
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "triton is not installed: pip install triton"
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST_TRITON:
        return f"triton is {version}, and fastelbo needs {'.'.join(map(str, _OLDEST_TRITON))} or newer"
    return None


def triton_import_error() -> "str | None":
    """Whether triton can be imported, which `usable` does not try: it takes long.

    Returns:
        None if it can, else why not, in one sentence.

    Example:
        >>> fastelbo.backends.triton_import_error()
    """
    try:
        importlib.import_module("triton")
    except Exception as error:
        reason = str(error).partition("\n")[0]
        return f"triton is installed, and importing it fails: {type(error).__name__}: {reason}"
    return None


def no_device(name: str) -> "str | None":
    """None if a device that the backend runs on is there, else a sentence.

    Args:
        name: of a backend.

    Returns:
        None or the sentence.

    Example:
        >>> fastelbo.backends.no_device("cpu") is None
        True
    """
    if name != "reference" and _DEVICE[name] == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def cpu_isa() -> str:
    """The instruction set that the cpu backend's kernels use; the environment's FASTELBO_CPU_ISA may lower it.

    Returns:
        "AVX-512", "AVX2" or "portable".

    Example:
        >>> fastelbo.backends.cpu_isa() in ("AVX-512", "AVX2", "portable")
        True
    """
    return _CPU_ISA_NAMES[_CPU_ISA()]


def why_not(name: str, device: torch.device) -> "str | None":
    """None if the backend can run tensors of the device, else why not, in one sentence.

    Args:
        name: of a backend.
        device: of the tensors.

    Returns:
        None or the sentence.

    Example:
        >>> fastelbo.backends.why_not("cpu", torch.device("meta"))
        'it runs tensors on cpu, these are on meta'
    """
    reason = _MISSING[name]
    if reason is None and name != "reference" and device.type != _DEVICE[name]:
        reason = f"it runs tensors on {_DEVICE[name]}, these are on {device}"
    if reason is None and name == "cuda" and torch.cuda.is_available():
        reason = _cannot_run(torch.cuda.current_device() if device.index is None else device.index)
    return reason


why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]  # of what torch.compile's guards cover


@functools.cache
def _cannot_run(index: int) -> "str | None":
    """None if the CUDA library has code for a GPU and its driver can run that, else why not."""
    error = _CUDA_ERROR(index)
    if error == 0:
        return None
    gpu = f"{torch.cuda.get_device_name(index)} (cuda:{index})"
    if error == 35:  # cudaErrorInsufficientDriver
        return f"the driver of {gpu} is older than _cuda.so needs"
    if error == 209:  # cudaErrorNoKernelImageForDevice
        return f"_cuda.so has no code for {gpu}: install fastelbo with it in TORCH_CUDA_ARCH_LIST"
    return f"_cuda.so does not run on {gpu}: CUDA error {error}"


def fastest(device: torch.device, convolution: bool = False) -> str:
    """The backend that runs by default.

    Args:
        device: of the tensors.
        convolution: whether the op is one, which is not the first of a network.

    Returns:
        Its name; "reference" where nothing else can run.

    Example:
        >>> fastelbo.backends.fastest(torch.device("cpu"))
        'cpu'
    """
    found = _FASTEST.get((device, convolution))
    if found is None:
        order = (_CONVOLUTIONS_ORDER if convolution else _ORDER).get(device.type, ())
        found = next((name for name in order if why_not(name, device) is None), "reference")
        _FASTEST[device, convolution] = found
    return found


fastest._dynamo_marked_constant = True  # type: ignore[attr-defined]  # of what torch.compile's guards cover

# Found once, at import: a function that is being traced cannot load a library.
_MISSING = {name: usable(name) for name in BACKENDS}
_FASTEST: "dict[tuple[torch.device, bool], str]" = {}


def choose(
    device: torch.device,
    backend: "str | None" = None,
    only_reference: "str | None" = None,
    convolution: bool = False,
) -> str:
    """The backend that a call runs on.

    Args:
        device: of the tensors.
        backend: the caller's explicit choice, or None.
        only_reference: why none but the reference can run this call, or None.
        convolution: as in fastest.

    Returns:
        The backend's name. Where backend is None: the reference if nothing else can run the call, FASTELBO_BACKEND's if
        that is set, or the fastest. A warning, once, says why plain torch runs where kernels of ours should.

    Raises:
        ValueError: for a name that is no backend.
        NotImplementedError: for a choice that cannot run this call, with each backend's reason.

    Example:
        >>> fastelbo.backends.choose(torch.device("cpu"), "reference")
        'reference'
    """
    wanted, setting = backend, "backend"
    if backend is None:
        if only_reference is not None:
            return "reference"
        if OVERRIDE is None:
            found = fastest(device, convolution)
            if found == "reference" and device.type in _ORDER:
                _say_why_slow(device)
            return found
        wanted, setting = OVERRIDE, "FASTELBO_BACKEND"
    if not isinstance(wanted, str) or wanted not in BACKENDS:
        raise ValueError(f"{setting} must be one of {', '.join(BACKENDS)}; got {wanted!r}")
    if wanted == "reference" or (only_reference is None and why_not(wanted, device) is None):
        return wanted
    reasons = "; ".join(
        f"{name}: {only_reference if name != 'reference' and only_reference else why_not(name, device) or 'can run it'}"
        for name in (wanted, *(name for name in BACKENDS if name != wanted))
    )
    raise NotImplementedError(f"{setting} {wanted!r} cannot run this input ({reasons})")


@functools.cache
def _warn_once(message):
    warnings.warn(message, RuntimeWarning, stacklevel=5)  # at the caller of the function that chose


def _say_why_slow(device):
    reasons = "; ".join(f"{name}: {why_not(name, device)}" for name in _ORDER[device.type])
    _warn_once(f"fastelbo runs in plain torch, slowly, on tensors of {device}, because its kernels cannot: {reasons}")


# As in _autograd.transformed: a function that is being traced says it while it is.
_say_why_slow._dynamo_marked_constant = True  # type: ignore[attr-defined]


def only_reference(noise: "torch.Tensor | None" = None) -> "str | None":
    """Why a call must run on the reference, or None.

    Args:
        noise: the noise that the call is given, or None.

    Returns:
        None or the reason: a noise that wants a gradient, torch.func, forward-mode differentiation, an export to ONNX.

    Example:
        >>> fastelbo.backends.only_reference(torch.zeros(3, requires_grad=True))
        'only the reference passes a gradient to noise'
    """
    if noise is not None and noise.requires_grad:
        return "only the reference passes a gradient to noise"
    if _autograd.transformed():
        return "torch.func transforms run on the reference"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation runs on the reference"
    if torch.compiler.is_exporting() and _autograd.exported_to_onnx():  # first what costs less, and is rare
        return "ONNX knows the reference's ops alone"
    return None
