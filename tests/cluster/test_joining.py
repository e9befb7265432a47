"""Which running clusters a service uses: the cluster is asked, not the environment."""

from __future__ import annotations

import pytest

from cluster import joining
from cluster.errors import ClusterRefused
from cluster.joining import check_usable, find_running_ray
from cluster.local_ray import LocalRay
from cluster.ray_token import Token
from tests.cluster.fake_head import FakeHead, listening

TOKEN = Token("right", "a test")
OUTWARD, LOOPBACK = "192.0.2.5", "127.0.0.1"


def _seen(monkeypatch: pytest.MonkeyPatch, address: str, node_ip: str) -> None:
    """This machine is a node of the cluster at an address."""
    monkeypatch.setattr(joining, "local_rays", lambda: [LocalRay(address, node_ip)])
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_closed_cluster_that_takes_our_token_is_used_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(FakeHead("right")) as address:
        _seen(monkeypatch, address, OUTWARD)
        running = find_running_ray("auto", TOKEN)
    check_usable(running)
    assert running.environment == {"RAY_AUTH_MODE": "token"}


@pytest.mark.parametrize("mode", ["token", "disabled"])
def test_open_cluster_beyond_loopback_is_refused_whatever_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with listening(FakeHead(None)) as address:
        _seen(monkeypatch, address, OUTWARD)
        running = find_running_ray("auto", TOKEN)
    with pytest.raises(ClusterRefused, match=r"token authentication is off.*ray get-auth-token --generate"):
        check_usable(running)


def test_open_cluster_on_loopback_is_used_without_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(FakeHead(None)) as address:
        _seen(monkeypatch, address, LOOPBACK)
        running = find_running_ray("auto", TOKEN)
    check_usable(running)
    assert running.environment["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" in running.environment


def test_cluster_with_another_token_or_gone_is_refused_also_on_loopback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with listening(FakeHead("other")) as address:
        _seen(monkeypatch, address, LOOPBACK)
        refused = find_running_ray("auto", TOKEN)
    gone = find_running_ray("auto", TOKEN)
    for running, reason in ((refused, "is not the cluster's"), (gone, "does not answer")):
        with pytest.raises(ClusterRefused, match=reason):
            check_usable(running)
