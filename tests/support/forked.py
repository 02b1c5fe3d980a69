"""Programs in processes of their own, which begin where torch was imported and nothing else: that
takes seconds, and is done once for all of them."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVER = """
import json, os, sys, traceback, torch

for line in sys.stdin:
    program, said, errors = json.loads(line)
    if (child := os.fork()) == 0:
        for number, path in ((1, said), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        status = 1
        try:
            exec(program, {"__name__": "__main__"})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    def __init__(self, path: str) -> None:
        """path: in front of PYTHONPATH."""
        path = os.pathsep.join((path, os.environ.get("PYTHONPATH", "")))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": path},
        )

    def run(self, program: str) -> str:
        """Returns what the program printed. It has to end well."""
        with tempfile.TemporaryDirectory() as folder:
            said, errors = (Path(folder) / name for name in ("said", "errors"))
            self._process.stdin.write(json.dumps([program, str(said), str(errors)]) + "\n")
            self._process.stdin.flush()
            status = self._process.stdout.readline()
            assert status == "0\n", f"exit status {status}{errors.read_text()}"
            return said.read_text()

    def close(self) -> None:
        self._process.communicate()
