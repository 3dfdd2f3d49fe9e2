"""Runs programs in processes forked of one that has imported torch, or what else they need: an import takes seconds.

They find nothing of ours imported by default. As `python -c` does, but that what torch reads of the environment at its
import is not read again.
"""

import atexit
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path


def run(code, *arguments, cwd=".", check=True, imported="torch", **environment):
    """What a program printed, as a subprocess.CompletedProcess; an environment's None takes a variable out.

    imported: the module that its process has imported; another than torch is looked for where pytest finds the tests'.
    """
    environment = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder, name) for name in ("stdout", "stderr")]
        wanted = [code, ["-c", *map(str, arguments)], str(Path(cwd).absolute()), environment, list(map(str, streams))]
        server = _server(imported)
        server.stdin.write(json.dumps(wanted) + "\n")
        server.stdin.flush()
        status = os.waitstatus_to_exitcode(int(server.stdout.readline()))
        done = subprocess.CompletedProcess(wanted[1], status, *(stream.read_text() for stream in streams))
    assert not check or status == 0, done.stderr
    return done


@functools.cache
def _server(imported):
    environment = os.environ if imported == "torch" else os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, __file__, imported], env=environment, **streams)
    atexit.register(server.stdin.close)
    return server


def _serve(imported):
    importlib.import_module(imported)
    for line in sys.stdin:
        wanted = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_become(*wanted))
        print(os.waitpid(child, 0)[1], flush=True)


def _become(code, arguments, cwd, environment, streams):
    """Runs a program; returns its exit status."""
    for descriptor, stream in enumerate((os.devnull, *streams)):
        os.dup2(os.open(stream, os.O_RDWR | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = arguments
    sys.path[0:1] = ["", *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]  # for this file's folder
    status = 0
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as exit:
        if not isinstance(exit.code, int | None):
            print(exit.code, file=sys.stderr)
        status = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    _serve(sys.argv[1])
