#!/usr/bin/env bash
# Builds, tests and times fastelbo on a machine with an NVIDIA GPU, in eight minutes.

set -u -o pipefail

usage() {
    cat <<'HELP'
usage: tools/gpu.sh [--quick] [--skip-build] [--skip-tests] [--skip-sanitizer] [--skip-benchmarks]
                     [--wheel FILE] [--out DIR] [--commit ID]

Installs fastelbo from this checkout into the current Python without network, tests every backend on the GPU, Gaussian
ops and convolutions alike, times every op against its rivals, runs compute-sanitizer on a short list of calls, and
prints the tables, what is slower than a rival, and each stage's verdict last. Beside the tests it counts memory and
compiles what the timings need; those run alone. Every stage has its own time limit, and a stage that fails does not
keep later ones from running. With 16 CPU cores all of it takes eight minutes at most, where there is a wheel.

  --quick            the tests that need a GPU and a few timings, to see that everything works
  --skip-build       use the fastelbo that is installed
  --skip-tests       no tests; the rows of the timings then say that they are unverified
  --skip-sanitizer   no compute-sanitizer
  --skip-benchmarks  no timings and no memory
  --wheel FILE       install this wheel rather than the checkout; needs no nvcc
  --out DIR          where rows (cuda.csv, conv_cuda.csv, memory_cuda.csv) are appended and the log is put; default:
                     benchmarks/results
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
LIMIT=475     # seconds for everything but the tables
TESTS=195     # of them for the tests
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
quick= build=1 tests=1 sanitizer=1 benchmarks=1 wheel= out=$root/benchmarks/results commit=${FASTELBO_COMMIT:-}

while [ $# -gt 0 ]; do
    case $1 in
    -h | --help)
        usage
        exit 0
        ;;
    --quick) quick=1 ;;
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
trap 'kill $(jobs -p) 2>/dev/null; rm -rf "$scratch"' EXIT
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
declare -A pid

note() {
    echo "$*" | tee -a "$log"
}

# judge NAME STATUS TIME: the verdict on a command that has ended. The log has all of its output; here the end of it is
# shown, and more where it fails.
judge() {
    local verdict lines=25
    case $2 in
    0) verdict="ok|" lines=3 ;;
    124 | 137) verdict="FAILED|stopped, " ;;
    *) verdict="FAILED|exit status $2, " ;;
    esac
    [ "$2" = 0 ] || failed=1
    note ""
    note "== $1"
    cat "$scratch/$1" >>"$log"
    tail -n "$lines" "$scratch/$1" | cut -c1-200
    stages+=("$1|$verdict$3")
    return "$2"
}

# stage NAME LIMIT RESERVE COMMAND...: runs a command for at most LIMIT seconds, and leaves RESERVE for what comes after.
stage() {
    local name=$1 limit=$2 left=$((LIMIT - SECONDS - $3)) began=$SECONDS
    shift 3
    [ "$limit" -lt "$left" ] || limit=$left
    if [ "$limit" -lt 10 ]; then
        stages+=("$name|FAILED|no time left to run it")
        failed=1
        return 1
    fi
    echo "+ $*" | tee -a "$log" | cut -c1-150
    # an interrupt, so that pytest still writes what it has
    timeout --signal=INT --kill-after=15 "$limit" "$@" >"$scratch/$name" 2>&1
    judge "$name" $? "$((SECONDS - began)) s"
}

# begin NAME LIMIT COMMAND...: starts a command beside others. It would ignore an interrupt, and is terminated.
begin() {
    local name=$1 limit=$2
    shift 2
    echo "+ $* &" | tee -a "$log" | cut -c1-150
    timeout --kill-after=5 "$limit" "$@" >"$scratch/$name" 2>&1 &
    pid[$name]=$!
}

# finish NAME: waits for what began.
finish() {
    wait "${pid[$1]}"
    judge "$1" $? "beside others"
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
    stage "install" 170 200 bash -c install
fi
stage "backends" 40 200 "$python" -c '
import sys, torch, fastelbo, fastelbo.__main__
print(fastelbo.__main__.report())
print(fastelbo.__file__)
reasons = {name: fastelbo.backends.why_not(name, torch.device("cuda")) for name in ("triton", "cuda")}
sys.exit("; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason) or 0)
'

# tests, and beside them what need not be alone

cores=$(nproc)
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
    workers=(-n "$cores" --dist worksteal) # most of the time goes to compiling kernels, on the host
fi
export TORCHINDUCTOR_COMPILE_THREADS=1 # else each process starts as many more as there are cores
pytest=("$python" -m pytest -q -p no:cacheprovider --tb=short)
options=(--device cuda --results "$out")
sizes=(--shape large --shape rows --shape tiny --shape medium)
convolutions=(benchmarks/test_convolutions.py --dtype bfloat16)
if [ -n "$quick" ]; then
    options+=(--quick)
    sizes=()
    convolutions+=(--rival eager --rival crop)
fi
if [ -n "$quick" ] || ! command -v compute-sanitizer >/dev/null; then
    [ -z "$sanitizer" ] || [ -n "$quick" ] || stages+=("compute-sanitizer|NOT RUN|it is not installed")
    sanitizer=
fi
[ -z "$benchmarks" ] || begin "memory" 200 "${pytest[@]}" benchmarks/test_memory.py "${options[@]}"

warm=()
# compile NAME COMMAND...: has caches filled beside the tests, for what must not wait for a compiler later
compile() {
    warm+=("compiling for $1")
    begin "compiling for $1" $((TESTS + 15)) "${@:2}"
}
verdict=(--unverified)
if [ -n "$tests" ] && [ -z "$quick" ]; then
    once=("${pytest[@]}" --device cuda --no-save --unverified --rounds 1 --rival compile --rival compile_checkpoint)
    if [ -n "$benchmarks" ]; then
        compile "large tensors" "${once[@]}" benchmarks/test_speed.py --shape large --shape rows
        compile "small tensors" "${once[@]}" benchmarks/test_speed.py --shape tiny --shape medium
        compile "both passes" "${once[@]}" "${convolutions[@]}" -k forward_backward
        compile "single passes" "${once[@]}" "${convolutions[@]}" -k "not forward_backward"
    fi
    [ -z "$sanitizer" ] || compile "compute-sanitizer" "$python" tools/sanitize.py --few
fi
if [ -n "$tests" ]; then
    files=(tests/test_gpu.py)
    if [ -z "$quick" ]; then
        # files with tests of a backend on a GPU; not those that build, or that run CUDA code on a CPU
        for name in masked_conv2d gated_block memory noise scale rows raw_ops torch_integration sampling sampling_networks \
            sampling_check bad_input defaults elbo flops backends; do
            files+=("tests/test_$name.py")
        done
        files+=(tests/test_gaussian_*.py)
    fi
    only="test_gpu or cuda or triton"
    # what is not run by then fails, for an interrupt may lose the record of all that was
    seconds=$TESTS
    [ -z "$quick" ] || seconds=90
    export FASTELBO_TESTS_END=$(($(date +%s) + seconds))
    stage "tests" $((seconds + 60)) 120 "${pytest[@]}" -m "not slow" -k "$only" "${workers[@]}" \
        --junitxml "$scratch/tests.xml" "${files[@]}"
    # of an op whose tests fail the rows say that they are unverified; after an interruption those of all do
    [ $? -gt 1 ] || [ ! -f "$scratch/tests.xml" ] || verdict+=(--verdict "$scratch/tests.xml")
    unset FASTELBO_TESTS_END
fi
for name in "${warm[@]}"; do
    kill "${pid[$name]}" 2>/dev/null # what is not compiled by now the timings compile
    wait "${pid[$name]}"
    echo "$name: exit status $?" >>"$log"
    cat "$scratch/$name" >>"$log"
done
[ -z "$benchmarks" ] || finish "memory"

# timings, alone on the machine

if [ -n "$benchmarks" ]; then
    after=10
    [ -z "$sanitizer" ] || after=60
    stage "timings of the ops" 170 $((after + 75)) \
        "${pytest[@]}" benchmarks/test_speed.py "${options[@]}" "${sizes[@]}" "${verdict[@]}"
    stage "timings of convolutions" 130 $after "${pytest[@]}" "${convolutions[@]}" "${options[@]}" "${verdict[@]}"
fi

# compute-sanitizer, which sees accesses out of bounds only where each tensor is an allocation of its own

if [ -n "$sanitizer" ]; then
    left=$((LIMIT - SECONDS))
    for tool in memcheck racecheck; do
        begin "$tool" $((left > 15 ? left : 15)) env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" tools/sanitize.py --few
        sleep 3 # each finds a free port for itself
    done
    for tool in memcheck racecheck; do
        failed_before=$failed
        if finish "$tool"; then
            continue
        fi
        if line=$(grep -iEm1 "device not supported|failed to initialize|LibraryNotLoaded" "$scratch/$tool"); then
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
        found=()
        for rows in "$out"/cuda.csv "$out"/conv_cuda.csv "$out"/memory_cuda.csv; do
            [ ! -f "$rows" ] || found+=("$rows")
        done
        # a script's own folder is on its path
        [ ${#found[@]} = 0 ] || env -u PYTHONSAFEPATH "$python" benchmarks/report.py "${found[@]}"
        [ ${#found[@]} = 0 ] || env -u PYTHONSAFEPATH "$python" benchmarks/report.py --slower "${found[@]}"
    fi
    printf '%s\n' "${stages[@]}" | while IFS='|' read -r name state detail; do
        printf '%-24s %-8s %s\n' "$name" "$state" "$detail"
    done
    echo "all of it took $SECONDS s; log: $log"
} 2>&1 | tee -a "$log"
exit $failed
