"""A Ray beyond loopback that asks strangers for no token: no service or batch goes there, and no machine joins it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import joining
from cluster.errors import ClusterRefused
from cluster.local_ray import LocalRay
from cluster.node_start import NodeOptions
from gateway.batch import ray_shell as batch_ray
from gateway.operations.join_command import _check
from gateway.service import launch
from tests.cluster.fake_head import FakeHead, listening

OUTWARD = "192.0.2.5"
Enter = Callable[[str], None]


def _serve(address: str) -> None:
    options: Any = SimpleNamespace(ray_address=address)
    launch._reach_ray(options)


def _join(address: str) -> None:
    _check(NodeOptions(address, None, None, None, None, {}, None))


def _batch(address: str) -> None:
    with batch_ray.ray_session(address):
        pass


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The clusters that were connected to, none of them really."""
    connected: list[str] = []
    monkeypatch.setattr(joining, "connect", lambda running, *_: connected.append(running.node.head))
    monkeypatch.setattr(batch_ray, "_stop_ray", lambda: None)
    for variable in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(variable, raising=False)
    return connected


def _node_of(monkeypatch: pytest.MonkeyPatch, address: str, node_ip: str) -> None:
    monkeypatch.setattr(joining, "local_rays", lambda: [LocalRay(address, node_ip)])


@pytest.mark.parametrize("enter", [_serve, _join, _batch])
def test_everybody_keeps_away_from_an_open_cluster(
    enter: Enter, entered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # a wish, and no fact
    with listening(FakeHead(None)) as address:
        _node_of(monkeypatch, address, OUTWARD)
        with pytest.raises(
            ClusterRefused, match=r"Ray's token authentication is off.*get-auth-token --generate"
        ):
            enter(address)
    assert entered == []


@pytest.mark.parametrize("enter", [_serve, _batch])
def test_open_cluster_that_only_this_machine_reaches_is_used(
    enter: Enter, entered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening(FakeHead(None)) as address:
        _node_of(monkeypatch, address, "127.0.0.1")
        enter(address)
    assert entered == [address]


@pytest.mark.parametrize("enter", [_serve, _join, _batch])
def test_cluster_with_another_token_is_left_alone(
    enter: Enter, entered: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with listening(FakeHead("right")) as address:
        _node_of(monkeypatch, address, OUTWARD)
        with pytest.raises(ClusterRefused, match="is not the cluster's"):
            enter(address)
    assert entered == []


def test_ray_of_our_own_is_closed_and_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `serve` and `batch` start where no address is given."""
    from cluster import resources

    started: dict[str, Any] = {}
    fake: Any = SimpleNamespace(init=lambda **options: started.update(options))
    environment: dict[str, str] = {}
    modules = {name: module for name, module in sys.modules.items() if name != "ray"}
    monkeypatch.setattr(resources, "os", SimpleNamespace(environ=environment))
    monkeypatch.setattr(resources, "sys", SimpleNamespace(modules=modules))
    monkeypatch.setitem(sys.modules, "ray", fake)
    resources.start_ray()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert started["include_dashboard"] is False and started["address"] == "local"
