"""Fixtures shared by several packages' tests."""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from cluster.resources import LOCAL_ONLY, ray_environment
from extraction.extract import extract
from gateway.demo import ports
from router.loading import EngineOptions, LoadedEngine
from tests.checkpoints import write_tiny, write_tiny_qwen3_moe
from tests.engines import open_engine
from tests.omni import Published
from tests.speech import PublishedSpeech

# What services learn in tests, and the token of their Ray, stay out of the user's folders.
_own = Path(tempfile.mkdtemp(prefix="sage-moe-tests-"))
atexit.register(shutil.rmtree, _own, ignore_errors=True)
os.environ["XDG_STATE_HOME"] = str(_own / "state")
_token = _own / "token"
_token.touch(mode=0o600)
_token.write_text(secrets.token_hex(32))
# Before anything imports Ray, which would else go by what the user's folder holds, or an earlier test has left there.
os.environ.update(ray_environment() | LOCAL_ONLY)
os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(_token)})
# A script's background job and nohup ignore these signals, and so would the commands that tests start and send them to.
# What is handled here is as new there.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)
settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")
REPOSITORY = Path(__file__).parent.parent
STORIES = REPOSITORY / "models" / "stories-moe"


@pytest.fixture(scope="session")
def stories_checkpoint() -> Path:
    """The bundled trained checkpoint."""
    return STORIES


@pytest.fixture(scope="session")
def stories_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled checkpoint, extracted."""
    root = tmp_path_factory.mktemp("stories") / "store"
    extract(STORIES, root)
    return root


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint with dense layers among its MoE layers."""
    return write_tiny_qwen3_moe(
        tmp_path_factory.mktemp("tiny") / "checkpoint",
        dtype=torch.float32,
        num_hidden_layers=3,
        mlp_only_layers=[1],
    )


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """The tiny checkpoint, extracted."""
    root = tmp_path_factory.mktemp("tiny-store") / "store"
    extract(tiny_checkpoint, root)
    return root


@pytest.fixture(scope="session")
def omni_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3-Omni, with chat template and control tokens."""
    path = tmp_path_factory.mktemp("omni") / "checkpoint"
    return write_tiny("qwen3_omni_moe", path, num_hidden_layers=3, max_position_embeddings=512)


@pytest.fixture(scope="session")
def omni_store(omni_checkpoint: Path) -> Path:
    """The small Qwen3-Omni, extracted."""
    root = omni_checkpoint.parent / "store"
    extract(omni_checkpoint, root)
    return root


@pytest.fixture(scope="session")
def omni(omni_store: Path) -> Iterator[LoadedEngine]:
    """It, loaded in float32."""
    loaded = open_engine(omni_store, EngineOptions(dtype="float32", has_media=True, has_speech=True))
    yield loaded
    loaded.close()


@pytest.fixture(scope="session")
def published(omni_checkpoint: Path) -> Published:
    """The same as `transformers` computes it."""
    return Published.load(omni_checkpoint)


@pytest.fixture(scope="session")
def published_speech(omni_checkpoint: Path) -> PublishedSpeech:
    """The same with what speaks."""
    return PublishedSpeech.load(omni_checkpoint)


@pytest.fixture
def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    return ports.free_port()


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port of the loopback address that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield int(listener.getsockname()[1])


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system of its own with the options given; again with `remount,...` to change them."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        if done.returncode != 0:
            pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
        return disk

    if shutil.which("mount") is None:
        pytest.skip("there is no mount command")
    try:
        yield mount
    finally:
        if disk.is_mount():
            subprocess.run(["umount", str(disk)], check=True, timeout=30)
