"""Several processes on this machine, each with one device, through the real scripts: for the tests of what hosts do together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def one_device(folder):
    """An environment in which each process has one device and is quick to compile; its caches lie in a folder of the test's."""
    flags = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    caches = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "DDPM_JAX_CACHE": str(folder / "cache")}
    return os.environ | flags | caches | {"JAX_PLATFORMS": "cpu"}


def start(command, environment, processes, last=()):
    """One process of the command, or several joined ones, each with a cache of its own, as on machines of their own.

    last: further options of the last process.
    """
    if processes > 1:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            address = f"localhost:{s.getsockname()[1]}"
        command = [*command, "--distributed"]
        environment = environment | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, *command, *(last if i == processes - 1 else ())],
            cwd=ROOT,
            env=environment | {"JAX_PROCESS_ID": str(i), "DDPM_JAX_CACHE": f"{environment['DDPM_JAX_CACHE']}_{i}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]


def finish(running, code=0):
    outputs = [p.communicate(timeout=200)[0] for p in running]
    assert [p.returncode for p in running] == [code] * len(running), "\n".join(outputs)
    return outputs
