"""Real processes that start in milliseconds: a server imports everything once, and forks workers from itself.

The workers are what ``torchrun`` would start, down to the environment; they can be killed like any process.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


class Launcher:
    """Starts jobs of the embedding recipe, each with one or several processes."""

    def __enter__(self):
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=REPOSITORY, env=environment,
        )  # fmt: skip
        assert self._server.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *problem):
        self._server.stdin.close()
        self._server.wait(timeout=20)

    def _ask(self, **request):
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, arguments, log, world=1, **options):
        """Starts the recipe; `options` are those of `_child`."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = self._ask(do="start", arguments=arguments, log=str(log), world=world, port=port, **options)
        return Job(self, started["pids"], Path(log))

    def wait(self, pids, timeout):
        return self._ask(do="wait", pids=pids, timeout=timeout)["statuses"]


class Job:
    def __init__(self, launcher, pids, log):
        self.pids, self.log, self._launcher = pids, log, launcher

    def wait(self, timeout=120):
        """Exit statuses in the order of the ranks; a negative one is a signal. None: it still runs."""
        return self._launcher.wait(self.pids, timeout)

    def kill(self):
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self.wait()

    @property
    def said(self):
        return self.log.read_text(encoding="utf-8", errors="replace")


def _child(request, rank):
    world = request["world"]
    if world > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(request["port"]),
        )  # fmt: skip
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    if request.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"], resource.RLIM_INFINITY))
    if request.get("kill_before_rename") is not None:
        _kill_before_rename(request["kill_before_rename"])
    if request.get("fail_rank") == rank:
        _fail_after(request["fail_after"])
    arguments = [each.replace("RANK", str(rank)) for each in request["arguments"]]
    sys.argv = ["embed.py", *arguments]

    from xbt.config import run_recipe
    from xbt.embedding import EmbedConfig, embed

    run_recipe(embed, EmbedConfig)


def _kill_before_rename(number):
    """Files become visible by being renamed: these are all the moments between which a kill can differ."""
    rename, count = Path.replace, 0

    def replace(self, target):
        nonlocal count
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return rename(self, target)

    Path.replace = replace


def _fail_after(shards):
    """A bug in one process, after it has written some shards."""
    from xbt.store import StoreBuilder

    write, count = StoreBuilder.write, 0

    def failing(self, *arguments, **options):
        nonlocal count
        if count == shards:
            raise RuntimeError("a bug")
        count += 1
        return write(self, *arguments, **options)

    StoreBuilder.write = failing


def _start(request):
    pids = []
    for rank in range(request["world"]):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _child(request, rank)
                status = 0
            except SystemExit as ended:
                status = ended.code or 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        pids.append(pid)
    return {"pids": pids}


def _wait(request):
    deadline = time.monotonic() + request["timeout"]
    statuses = dict.fromkeys(request["pids"])
    while None in statuses.values() and time.monotonic() < deadline:
        for pid in [pid for pid, status in statuses.items() if status is None]:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return {"statuses": list(statuses.values())}


def _serve():
    import torch

    import xbt.embedding
    import xbt.encoders.open_clip  # noqa: F401

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = _start(request) if request["do"] == "start" else _wait(request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
