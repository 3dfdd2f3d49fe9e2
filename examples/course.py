"""Runs the course: every program, two at a time, then one table of all that they claim.

Each program stands alone, prints what it found beside what is true, and ends with 1 where the two differ. Their
pictures, and what each printed, are in folders of the output.

    python examples/course.py --output demo/course
"""

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

PROGRAMS = (  # in the order of the lectures
    "em",
    "em_to_vae",
    "missing_pixels",
    "functionals",
    "families",
    "flexible_posterior",
    "laplace",
    "posterior_of_weights",
    "density",
    "gan",
    "diffusion_as_vae",
    "diffusion_of_digits",
    "ring",
    "autoencoder_to_vae",
    "completion",
    "disentanglement",
    "pixelrnn",
    "tokens",
    "student_forcing",
    "sketch_to_digit",
    "decoder_variance",
    "family_tree",
)


def run(program: str, output: Path) -> tuple[str, int]:
    """What a program printed, and the code that it ended with."""
    command = [sys.executable, Path(__file__).with_name(f"{program}.py"), "--output", output]
    done = subprocess.run(command, capture_output=True, text=True)
    (output / "printed.txt").write_text(done.stdout + done.stderr)
    return done.stdout + done.stderr, done.returncode


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS, metavar="NAME", help="those to run (default: all)")
    add("--jobs", type=int, default=2, help="programs at a time (default: %(default)s)")
    add("--output", type=Path, default="demo/course", help="folder of their folders (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error("--jobs must be 1 or more")
    outputs = [args.output / program for program in args.programs]
    try:
        for output in outputs:
            output.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            results = pool.map(run, args.programs, outputs)
            ended = list(tqdm(results, "course", len(outputs), unit="program", disable=None))
    except OSError as error:
        parser.exit(2, f"{parser.prog}: --output: cannot write to {args.output}: {error.strerror or error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nInterrupted\n")
    claims = 0
    for program, (printed, code) in zip(args.programs, ended, strict=True):
        rows = [line for line in printed.splitlines() if line.startswith("|")]
        claims += max(len(rows) - 2, 0)
        print(
            f"\n{program}.py\n" + "\n".join(rows or [printed.strip()]) + ("" if code == 0 else f"\nended with {code}")
        )
    failed = [program for program, (_, code) in zip(args.programs, ended, strict=True) if code]
    if failed:
        parser.exit(1, f"{parser.prog}: not as they must be: {', '.join(failed)}\n")
    print(f"\nAll {claims} claims of {len(ended)} programs hold. Pictures: {args.output}")


if __name__ == "__main__":
    main()
