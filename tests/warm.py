"""Python processes that start warm: forked from one, a server, that has imported what takes seconds to import.

``python()`` is the path of a program to be started in place of ``sys.executable``, where a test is about what the
process does and not about how Python starts or what is imported first. It is a real process: it takes ``-m MODULE``,
``-c CODE`` or a script with their words, an environment, a folder and open files; it passes on the signals that it
gets, dies with its child and ends as its child ends. ``python(LIBRARIES)`` starts where nothing of this project, of
transformers or of PEFT is imported. A test process has one server of each kind, which ends with it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.metadata
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from pathlib import Path

ALL = (
    "apt_trainer.runs.run",
    "datasets",
    "deepspeed",
    "matplotlib",
    "peft",
    "sklearn",
    "torch",
    "transformers.trainer",
)
LIBRARIES = (
    "accelerate",
    "datasets",
    "scipy.optimize",
    "sklearn.metrics",
    "torch._dynamo",
    "torch.distributed.tensor",
)
"""What transformers and PEFT import, without the two."""

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect({address!r})
    request = [sys.argv[1:], dict(os.environ), os.getcwd()]
    socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    child = int(server.recv(32) or sys.exit("The server of warm processes has ended."))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os.kill(child, number))
    code = int(server.recv(32) or -signal.SIGKILL)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@functools.cache
def python(imported: tuple[str, ...] = ALL, interpreter: str = sys.executable) -> str:
    """Path of the program; the first call starts the server, in the environment of that call.

    ``interpreter``: of another environment, whose processes see no path of this one.
    """
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    address = str(Path(folder.name) / "socket")
    client = Path(folder.name) / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(address)
    listening.listen(64)
    words = [interpreter, __file__, str(listening.fileno()), *imported]
    own = {name: value for name, value in os.environ.items() if interpreter == sys.executable or name != "PYTHONPATH"}
    server = subprocess.Popen(
        words, stdin=subprocess.PIPE, pass_fds=[listening.fileno()], start_new_session=True, env=own
    )
    listening.close()

    def end() -> None:
        server.communicate()
        folder.cleanup()

    atexit.register(end)
    return str(client)


def remember_what_is_installed() -> None:
    """accelerate asks at every unwrapping of a model whether DeepSpeed is installed, and reads its whole metadata."""
    importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)  # type: ignore[assignment]


# ---------------------------------------------------------------------- the server


def _serve(listening: socket.socket, imported: list[str]) -> None:
    """Fork a keeper for each client until standard input is closed."""
    for name in imported:
        importlib.import_module(name)
    remember_what_is_installed()
    gc.collect()
    gc.freeze()  # what was imported: runs collect garbage at every change of shape
    while True:
        ready, _, _ = select.select([listening, 0], [], [])
        if 0 in ready:
            return
        client, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            _keep(client)
        client.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _keep(client: socket.socket) -> None:
    """Fork the child that a client asks for, and tell how it ended; the child does not outlive its client."""
    request, files, _, _ = socket.recv_fds(client, 1 << 20, 3)
    words, environment, folder = json.loads(request)
    child = os.fork()
    if child == 0:
        client.close()
        for number, file in enumerate(files):
            os.dup2(file, number)  # which has a higher number, for the first three were in use
            os.close(file)
        os._exit(_run(words, environment, folder))
    for file in files:
        os.close(file)
    client.send(str(child).encode())
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, client], [], [])
    if ended not in ready:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(OSError):
        client.send(str(code).encode())
    os._exit(0)


def _run(words: list[str], environment: dict[str, str], folder: str) -> int:
    """What ``python *words`` does; returns its exit code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = ""  # in place of the folder of this file
    sys.path[1:1] = [path for path in environment.get("PYTHONPATH", "").split(":") if path not in sys.path]
    code: object = 0
    try:
        _main(words)
    except SystemExit as ended:
        code = ended.code
        if not (code is None or isinstance(code, int)):
            sys.stderr.write(f"{code}\n")
            code = 1
    except BaseException as error:
        traceback.print_exc()
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return int(code or 0)  # type: ignore[call-overload]


def _main(words: list[str]) -> None:
    what, *rest = words
    if what == "-m":
        sys.path[0], sys.argv = os.getcwd(), rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *rest[1:]]
        module = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    else:
        sys.path[0], sys.argv = str(Path(what).parent), words
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
