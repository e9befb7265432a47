"""Points in the product's own processes at which a test can end, stop or cut them off, without a line for it there.

`tests/chaos/in_processes/sitecustomize.py` installs them in each process of a cluster: as soon as one of the modules
below is imported, the functions named here are wrapped. A test arms one deed at a time, by a file that says which
point, which processes and how many passings to let go; whoever takes the file away does the deed. A process that
passes a point looks whether the file is there, and that is all it costs; but for the data plane, which Python carries
alone in these processes, since points are functions of Python. Kills at any time, without points, meet it as it is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.machinery
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

VARIABLE = "SAGE_MOE_TEST_FAILPOINTS"
"""In the environment: the folder of the two files below. Must exist."""
ARMED, FIRED = "armed.json", "fired.json"

Deed = Literal["kill", "stop", "cut", "kill half-way", "lose node"]
"""kill: SIGKILL. stop: SIGSTOP. cut: shut the socket at hand down. kill half-way: SIGKILL after half of the frame at
hand is sent. lose node: SIGKILL the raylet and everything below it, this process too."""

POINTS: dict[str, tuple[str, str, Literal["before", "after"]]] = {
    # Of an expert actor
    "actor starts": ("experts.actor", "ExpertActor.identity", "before"),
    "actor loads": ("experts.cache", "ExpertCache.first_that_fit", "before"),
    "actor is connected to": ("experts.listener", "welcome", "before"),
    "actor has welcomed": ("experts.listener", "welcome", "after"),
    "actor has a call": ("experts.server", "ExpertServer._answer", "before"),
    "actor computes": ("experts.worker", "ExpertWorker.compute", "before"),
    "actor has computed": ("experts.worker", "ExpertWorker.compute", "after"),
    "actor answers": ("experts.channel", "Channel.send", "before"),
    "actor has answered": ("experts.channel", "Channel.send", "after"),
    "actor is asked how it does": ("experts.actor", "ExpertActor.pulse", "before"),
    # Of a router
    "router asks": ("experts.connection", "ExpertConnection.start", "before"),
    "router waits": ("experts.connection", "ExpertConnection.finish", "before"),
    "router has rows": ("experts.connection", "ExpertConnection.finish", "after"),
    "router has a token": ("router.arrivals", "Arrivals.put", "before"),
    "router sends a token": ("router.service", "RouterService._deliver", "after"),
    # Of the supervisor
    "supervisor looks": ("cluster.supervisor", "Supervisor._look", "before"),
    "supervisor has created": ("cluster.actor_pool", "ActorPool.create", "after"),
    "supervisor publishes": ("cluster.fleet", "Fleet._publish", "before"),
}
"""Name -> module, function, and whether the deed comes before or after it."""
PLANE = "experts.native_plane"


@dataclass(frozen=True)
class Armed:
    """What is to happen."""

    point: str
    deed: Deed
    pids: tuple[int, ...] = ()
    """Of the processes in question; none means those that are born later."""
    skip: int = 0
    """Passings, of one process, before it."""


# In the test's process


def arm(folder: Path, armed: Armed) -> None:
    disarm(folder)
    aside = folder / "armed.new"
    aside.write_text(json.dumps({**asdict(armed), "at": time.time()}))
    aside.rename(folder / ARMED)


def disarm(folder: Path) -> None:
    for name in (ARMED, FIRED):
        (folder / name).unlink(missing_ok=True)


def fired(folder: Path) -> dict[str, Any] | None:
    """What was done, and by which process; None while nothing was."""
    try:
        told: dict[str, Any] = json.loads((folder / FIRED).read_text())
    except (FileNotFoundError, json.JSONDecodeError):  # nothing yet, or half of it
        return None
    return told


# In the processes of the cluster


class _Post:
    """One process's side of it."""

    def __init__(self, folder: Path) -> None:
        self._armed, self._fired = str(folder / ARMED), folder / FIRED
        self.born_at = time.time()
        """When this process became what it is: Ray starts some before it knows what for."""
        self._seen: dict[float, int] = {}
        """Passings since the file of that time."""

    def passes(self, point: str, arguments: Sequence[Any]) -> None:
        try:
            since = os.stat(self._armed).st_mtime
            armed = json.loads(Path(self._armed).read_text())
        except OSError:
            return
        if armed["point"] != point or not self._is_meant(armed):
            return
        if point.startswith("actor") and point.endswith(("answers", "answered")) and _is_short(arguments):
            return  # a handshake, not an answer
        self._seen = {since: self._seen.get(since, 0) + 1}
        if self._seen[since] <= armed["skip"]:
            return
        if self._claim(armed):
            _do(armed["deed"], arguments)

    def _is_meant(self, armed: dict[str, Any]) -> bool:
        return os.getpid() in armed["pids"] if armed["pids"] else self.born_at > float(armed["at"])

    def _claim(self, armed: dict[str, Any]) -> bool:
        aside = f"{self._armed}.{os.getpid()}"
        try:
            os.rename(self._armed, aside)
        except FileNotFoundError:  # another thread or process was first
            return False
        told = {**armed, "pid": os.getpid(), "parent": os.getppid(), "at": time.time()}
        Path(aside).write_text(json.dumps(told))
        os.rename(aside, self._fired)
        return True


def _is_short(arguments: Sequence[Any]) -> bool:
    return len(arguments) < 3 or not memoryview(arguments[2]).nbytes


def _do(deed: Deed, arguments: Sequence[Any]) -> None:
    match deed:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "cut":
            channel = next(a for a in (_channel_of(argument) for argument in arguments) if a is not None)
            with contextlib.suppress(OSError):
                channel._socket.shutdown(socket.SHUT_RDWR)
        case "kill half-way":
            channel, head, body = arguments[0], arguments[1], arguments[2]
            frame = bytes(head) + bytes(memoryview(body).cast("B"))
            channel._socket.sendall(frame[: len(frame) // 2])
            time.sleep(0.02)  # for the half to be read by the other end
            os.kill(os.getpid(), signal.SIGKILL)
        case "lose node":
            _lose_node()


def _channel_of(argument: Any) -> Any:
    if hasattr(argument, "receive_header"):
        return argument
    return getattr(argument, "_channel", None)


def _lose_node() -> None:
    import psutil

    raylet = next(parent for parent in psutil.Process().parents() if parent.name() == "raylet")
    lost = [raylet, *raylet.children(recursive=True)]
    raylet.suspend()  # so that it sees none of the others die
    for process in sorted(lost, key=lambda each: each.pid == os.getpid()):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


class _Wrapper(importlib.abc.MetaPathFinder):
    """Wraps functions of modules right after they were imported."""

    def __init__(self, post: _Post) -> None:
        self._post = post

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        points = {name: point for name, point in POINTS.items() if point[0] == fullname}
        if not points and fullname != PLANE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_wrap(module: ModuleType) -> None:
            run(module)
            self._post.born_at = time.time()
            if fullname == PLANE:
                vars(module)["plane"] = lambda: None
            for name, (_, function, when) in points.items():
                _wrap(module, function, when, functools.partial(self._post.passes, name))

        spec.loader.exec_module = run_and_wrap  # type: ignore[method-assign]
        return spec


def _wrap(module: ModuleType, path: str, when: str, passes: Callable[[Sequence[Any]], None]) -> None:
    owner: Any = module
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def wrapped(*arguments: Any, **more: Any) -> Any:
        if when == "before":
            passes(arguments)
            return inner(*arguments, **more)
        result = inner(*arguments, **more)
        passes(arguments)
        return result

    setattr(owner, name, wrapped)


def install() -> None:
    """Called once, before anything of ours is imported."""
    sys.meta_path.insert(0, _Wrapper(_Post(Path(os.environ[VARIABLE]))))
