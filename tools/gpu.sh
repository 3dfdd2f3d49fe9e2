#!/usr/bin/env bash
# Builds, tests and times fastelbo on a machine with an NVIDIA GPU, in under nine minutes.

set -u -o pipefail

usage() {
    cat <<'HELP'
usage: tools/gpu.sh [--convolutions] [--quick] [--skip-build] [--skip-tests] [--skip-sanitizer] [--skip-benchmarks]
                     [--wheel FILE] [--out DIR] [--commit ID]

Installs fastelbo from this checkout into the current Python without network, tests every backend on the GPU, runs
compute-sanitizer on a short list of calls, counts memory, times every op against its rivals, and prints the tables
last. Every stage has its own time limit, and a stage that fails does not keep later ones from running.

  --convolutions     the masked convolutions in place of the Gaussian ops, which have other tests, timings and rows; tests
                     that are no op's run with the Gaussian ops
  --quick            the tests that need a GPU and a few timings, to see that everything works
  --skip-build       use the fastelbo that is installed
  --skip-tests       no tests; the rows of the timings then say that they are unverified
  --skip-sanitizer   no compute-sanitizer
  --skip-benchmarks  no timings and no memory
  --wheel FILE       install this wheel rather than the checkout; needs no nvcc
  --out DIR          where rows (cuda.csv, memory_cuda.csv, conv_cuda.csv) are appended and the log is put; default: benchmarks/results
  --commit ID        of the checkout, where git cannot tell

Environment: PYTHON (default python3), CUDA_HOME (default /usr/local/cuda), TORCH_CUDA_ARCH_LIST (default: only the GPU's
own), MAX_JOBS.

Exit status: 0 all well; 1 some stage failed; 2 nothing was done, because this machine has no GPU, no nvcc or too little
free GPU memory, or the arguments are wrong.
HELP
}

refuse() {
    echo "gpu.sh: $*" >&2
    exit 2
}

MEMORY_GIB=12 # what the eager rival allocates at most at 2^26 elements, with its copies
LIMIT=515     # seconds for everything
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
quick= convolutions= build=1 tests=1 sanitizer=1 benchmarks=1 wheel= out=$root/benchmarks/results commit=${FASTELBO_COMMIT:-}

while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    --quick) quick=1 ;;
    --convolutions) convolutions=1 ;;
    --skip-build) build= ;;
    --skip-tests) tests= ;;
    --skip-sanitizer) sanitizer= ;;
    --skip-benchmarks) benchmarks= ;;
    --wheel | --out | --commit)
        [ $# -gt 1 ] || refuse "$1 needs a value"
        case $1 in --wheel) wheel=$2 ;; --out) out=$2 ;; --commit) commit=$2 ;; esac
        shift
        ;;
    *) refuse "unknown argument $1 (see --help)" ;;
    esac
    shift
done

# Everything that can refuse comes before anything is written.
python=$(command -v "$python") && python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ||
    refuse "there is no ${PYTHON:-python3}"
if [ -n "$wheel" ]; then
    [ -f "$wheel" ] || refuse "there is no wheel $wheel"
    wheel=$(cd "$(dirname "$wheel")" && pwd)/$(basename "$wheel")
fi
reason=$("$python" - "$MEMORY_GIB" 2>/dev/null <<'PY'
import sys

try:
    import torch
except ImportError:
    sys.exit(print("this Python has no torch"))
if not torch.cuda.is_available():
    sys.exit(print("this machine has no GPU that torch can use"))
free, total = (count / 2**30 for count in torch.cuda.mem_get_info())
if free < float(sys.argv[1]):
    print(f"the GPU has {free:.1f} GiB of {total:.1f} GiB free, and the benchmarks need {sys.argv[1]} GiB")
PY
) || refuse "$python cannot look for a GPU"
[ -z "$reason" ] || refuse "$reason"
[ ! -d "${CUDA_HOME-/usr/local/cuda}/bin" ] || PATH=$PATH:${CUDA_HOME-/usr/local/cuda}/bin
if [ -n "$build" ] && [ -z "$wheel" ] && ! command -v nvcc >/dev/null; then
    refuse "there is no nvcc to build the CUDA C++ kernels with (--wheel FILE or --skip-build does without)"
fi

cd "$root" || exit 1
mkdir -p "$out" || exit 1
out=$(cd "$out" && pwd)
log=$out/gpu_$(date -u +%Y%m%dT%H%M%SZ).log
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
# A wheel's package must not be hidden by the checkout's, which has no libraries.
[ -z "$wheel" ] || export PYTHONSAFEPATH=1
if [ -z "$commit" ]; then
    commit=$(git describe --always 2>/dev/null) || commit=unknown
    # rows that are not committed yet do not make a commit dirty
    changed=$(git status --porcelain --untracked-files=no -- . ':(exclude)benchmarks/results' 2>/dev/null)
    [ -z "$changed" ] || commit=$commit-dirty
fi
export FASTELBO_COMMIT=$commit PYTHONUNBUFFERED=1

stages=() failed=0

note() {
    echo "$*" | tee -a "$log"
}

# stage NAME LIMIT RESERVE COMMAND...: runs a command for at most LIMIT seconds, and leaves RESERVE for what comes after.
# The log has all of its output; here the end of it is shown, and more where it fails.
stage() {
    local name=$1 limit=$2 reserve=$3 began=$SECONDS status verdict lines=3
    shift 3
    local left=$((LIMIT - SECONDS - reserve))
    [ "$limit" -lt "$left" ] || limit=$left
    note ""
    note "== $name"
    if [ "$limit" -lt 10 ]; then
        stages+=("$name|FAILED|no time left to run it")
        failed=1
        return 1
    fi
    echo "+ $*" >>"$log"
    # an interrupt, so that pytest still writes what it has
    timeout --signal=INT --kill-after=10 "$limit" "$@" >"$scratch/output" 2>&1
    status=$?
    cat "$scratch/output" >>"$log"
    case $status in
    0) verdict=ok ;;
    124 | 137) verdict="FAILED|stopped after $limit s" lines=25 ;;
    *) verdict="FAILED|exit status $status" lines=25 ;;
    esac
    tail -n "$lines" "$scratch/output" | cut -c1-200
    case $verdict in
    ok) stages+=("$name|ok|$((SECONDS - began)) s") ;;
    *)
        stages+=("$name|$verdict, $((SECONDS - began)) s")
        failed=1
        ;;
    esac
    return $status
}

note "fastelbo $commit, $(date -u '+%Y-%m-%d %H:%M UTC'), log $log"
"$python" - 2>&1 <<'PY' | tee -a "$log"
import importlib.metadata
import os
import platform

import torch

device = torch.cuda.get_device_properties(0)
print(f"{device.name}, sm_{device.major}{device.minor}, {device.multi_processor_count} multiprocessors,", end=" ")
print(f"{device.total_memory / 2**30:.0f} GiB, L2 {getattr(device, 'L2_cache_size', 0) / 2**20:.0f} MiB;", end=" ")
print(f"{os.cpu_count()} CPU cores, {platform.machine()}")
names = ("triton", "numpy", "setuptools", "pytest", "pytest-xdist")
for name in names:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    print(f"{name} {version}", end=", ")
print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}")
PY
{
    nvidia-smi
    nvcc --version
} >>"$log" 2>&1

# install

install() {
    if [ -n "$wheel" ]; then
        "$python" -m pip install --no-index --no-deps --force-reinstall "$wheel"
        return
    fi
    if [ -z "${TORCH_CUDA_ARCH_LIST:-}" ]; then
        TORCH_CUDA_ARCH_LIST=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
    fi
    export TORCH_CUDA_ARCH_LIST FASTELBO_CUDA=1
    # editable, because the tests and benchmarks of the checkout run beside its package
    "$python" -m pip install --no-index --no-build-isolation --no-deps --verbose --editable "$root"
}
if [ -n "$build" ]; then
    export -f install
    export python wheel root
    stage "install" 170 230 bash -c install
fi
stage "backends" 40 230 "$python" -c '
import sys, torch, fastelbo, fastelbo.__main__
print(fastelbo.__main__.report())
print(fastelbo.__file__)
reasons = {name: fastelbo.backends.why_not(name, torch.device("cuda")) for name in ("triton", "cuda")}
sys.exit("; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason) or 0)
'

# tests

workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
    workers=(-n 8 --dist worksteal) # most of the time goes to compiling kernels, on the host
fi
pytest=("$python" -m pytest -q -p no:cacheprovider --tb=short)
verdict=(--unverified)
if [ -n "$tests" ]; then
    only="not masked_conv2d and not convolution and not tuned"
    [ -z "$convolutions" ] || only="masked_conv2d or convolution or tuned"
    stage "tests that need a GPU" 90 250 "${pytest[@]}" -m "not slow" -k "$only" --maxfail 50 tests/test_gpu.py
    if [ -z "$quick" ] && [ -n "$convolutions" ]; then
        # every layer's sizes are constants of its kernels: most of the time goes to compiling them
        stage "tests of the convolutions" 200 110 "${pytest[@]}" -m "not slow" "${workers[@]}" \
            --junitxml "$scratch/tests.xml" tests/test_masked_conv2d.py tests/test_nn.py
        status=$?
        if [ $status -le 1 ] && [ -f "$scratch/tests.xml" ]; then
            verdict=(--verdict "$scratch/tests.xml")
        fi
    elif [ -z "$quick" ]; then
        ops=() others=()
        for file in tests/test_*.py; do
            case $file in
            tests/test_gpu.py | tests/test_masked_conv2d.py | tests/test_nn.py) ;;
            *) if [ -f "fastelbo/ops/${file#tests/test_}" ]; then ops+=("$file"); else others+=("$file"); fi ;;
            esac
        done
        stage "tests of the ops" 120 240 "${pytest[@]}" -m "not slow" "${workers[@]}" --junitxml "$scratch/tests.xml" \
            "${ops[@]}"
        status=$?
        # after an interruption nobody knows which tests would have failed: the rows say unverified
        if [ $status -le 1 ] && [ -f "$scratch/tests.xml" ]; then
            verdict=(--verdict "$scratch/tests.xml")
        fi
        stage "other tests" 120 230 "${pytest[@]}" -m "not slow" "${workers[@]}" "${others[@]}"
    fi
fi

# benchmarks

if [ -n "$benchmarks" ] && [ -n "$convolutions" ]; then
    options=(--device cuda --dtype bfloat16 --results "$out" --rounds 7)
    [ -z "$quick" ] || options+=(--quick --rival eager --rival crop)
    stage "timings" 250 10 "${pytest[@]}" benchmarks/test_convolutions.py "${options[@]}" "${verdict[@]}"
elif [ -n "$benchmarks" ]; then
    options=(--device cuda --results "$out")
    [ -z "$quick" ] || options+=(--quick)
    stage "memory" 70 160 "${pytest[@]}" benchmarks/test_memory.py "${options[@]}"
    reserve=10
    [ -z "$sanitizer" ] || [ -n "$quick" ] || reserve=50
    stage "timings" 250 $reserve "${pytest[@]}" benchmarks/test_speed.py "${options[@]}" "${verdict[@]}"
fi

# compute-sanitizer, which sees accesses out of bounds only where each tensor is an allocation of its own

if [ -n "$sanitizer" ] && [ -z "$quick" ]; then
    for tool in memcheck racecheck; do
        if ! command -v compute-sanitizer >/dev/null; then
            stages+=("$tool|NOT RUN|compute-sanitizer is not installed")
            continue
        fi
        failed_before=$failed
        if stage "$tool" 60 10 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" tools/sanitize.py; then
            continue
        fi
        if grep -qiE "device not supported|failed to initialize|LibraryNotLoaded" "$scratch/output"; then
            line=$(grep -iEm1 "device not supported|failed to initialize|LibraryNotLoaded" "$scratch/output")
            unset 'stages[-1]'
            failed=$failed_before
            stages+=("$tool|NOT RUN|it refuses this machine: ${line#=========}")
        fi
    done
fi

# the tables

{
    echo
    if [ -n "$benchmarks" ]; then
        shown=("$out"/cuda.csv "$out"/memory_cuda.csv)
        [ -z "$convolutions" ] || shown=("$out"/conv_cuda.csv)
        for rows in "${shown[@]}"; do
            # a script's own folder is on its path
            [ ! -f "$rows" ] || env -u PYTHONSAFEPATH "$python" benchmarks/report.py "$rows"
        done
    fi
    printf '%s\n' "${stages[@]}" | while IFS='|' read -r name state detail; do
        printf '%-24s %-8s %s\n' "$name" "$state" "$detail"
    done
    echo "all of it took $SECONDS s; log: $log"
} 2>&1 | tee -a "$log"
exit $failed
