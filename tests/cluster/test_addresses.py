"""Where expert actors listen, and which clusters are one machine alone."""

from __future__ import annotations

import pytest

from cluster.addresses import LOOPBACK, data_plane_host, is_local_only, is_loopback
from cluster.errors import NodeAddressInvalid


@pytest.mark.parametrize("address", ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1"])
def test_only_this_machine_reaches_loopback(address: str) -> None:
    assert is_loopback(address)


@pytest.mark.parametrize("address", ["10.0.0.1", "192.0.2.7", "0.0.0.0", "::", "fe80::1", "2001:db8::1"])
def test_others_reach_other_addresses(address: str) -> None:
    assert not is_loopback(address)


def test_one_node_with_an_address_of_its_own_makes_the_cluster_open() -> None:
    assert is_local_only(["127.0.0.1", "::1"])
    assert not is_local_only(["127.0.0.1", "192.0.2.7"])
    assert not is_local_only(["192.0.2.7"])


def test_loopback_address_with_which_ray_listens_everywhere_is_not_local() -> None:
    assert not is_local_only(["127.0.0.2"])


def test_actors_listen_on_their_node_s_address_or_on_loopback_where_all_is_local() -> None:
    assert data_plane_host("192.0.2.7", is_local_only=False) == "192.0.2.7"
    assert data_plane_host("127.0.0.2", is_local_only=False) == "127.0.0.2"
    assert data_plane_host("192.0.2.7", is_local_only=True) == LOOPBACK


@pytest.mark.parametrize("address", ["", "node-7", "0.0.0.0", "::", "224.0.0.1", "10.0.0.1:80", "10.0.0"])
def test_what_is_no_node_s_address_is_refused_by_name(address: str) -> None:
    with pytest.raises(NodeAddressInvalid, match="is no node's IP address"):
        data_plane_host(address, is_local_only=False)
