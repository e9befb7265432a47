"""Which cluster of this machine a user means."""

from __future__ import annotations

import pytest

from cluster.errors import ClusterRefused
from cluster.local_ray import (
    LocalRay,
    check_not_joined,
    choose_ray,
    is_alone,
    own_addresses,
    read_raylet,
)

ONE = LocalRay("192.0.2.1:6379", "192.0.2.5")
OTHER = LocalRay("127.0.0.1:7000", "127.0.0.1")


def test_auto_is_the_only_cluster_of_the_machine() -> None:
    assert choose_ray("auto", [ONE, LocalRay(ONE.head, "192.0.2.6")], {}) == ONE


def test_auto_is_the_cluster_that_the_environment_names() -> None:
    assert choose_ray("auto", [ONE, OTHER], {"RAY_ADDRESS": "127.0.0.1:7000"}) == OTHER


def test_auto_among_several_and_none_says_what_to_do() -> None:
    with pytest.raises(ClusterRefused, match=r"name one of 127.0.0.1:7000, 192.0.2.1:6379"):
        choose_ray("auto", [ONE, OTHER], {})
    with pytest.raises(ClusterRefused, match="no Ray runs on this machine"):
        choose_ray("auto", [], {})


def test_address_finds_the_node_through_which_this_machine_belongs_to_it() -> None:
    assert choose_ray("192.0.2.1", [OTHER, ONE], {}) == ONE
    assert choose_ray("localhost:7000", [ONE, OTHER], {}) == OTHER


def test_loopback_means_a_head_that_listens_on_an_address_of_this_machine() -> None:
    for own in own_addresses() - {"127.0.0.1", "::1"}:
        head = LocalRay(f"[{own}]:6379" if ":" in own else f"{own}:6379", own)
        assert choose_ray("127.0.0.1:6379", [head], {}) == head
    with pytest.raises(ClusterRefused, match="is no node of a Ray cluster"):
        choose_ray("127.0.0.1:6379", [ONE], {})


def test_machine_outside_of_the_cluster_is_told_how_to_join() -> None:
    with pytest.raises(ClusterRefused, match="`sage-moe join"):
        choose_ray("192.0.2.9:6379", [ONE], {})


def test_machine_joins_a_cluster_once_under_each_of_its_addresses() -> None:
    own = next(iter(own_addresses()))
    here = LocalRay("192.0.2.1:6379", own)
    for node_ip in (own, None):
        with pytest.raises(ClusterRefused, match=rf"is a node of 192.0.2.1:6379 already, as {own}.*ray stop"):
            check_not_joined("192.0.2.1:6379", node_ip, [OTHER, here])
    check_not_joined("192.0.2.1:6379", "192.0.2.99", [here])
    check_not_joined("192.0.2.2:6379", own, [here])
    check_not_joined(
        ONE.head, None, [ONE]
    )  # seen from another machine's network, though its processes are seen


def test_head_is_not_told_to_stop_the_cluster() -> None:
    own = sorted(own_addresses())[0]
    with pytest.raises(
        ClusterRefused, match="it is the head and takes part already; run this on the other machines"
    ):
        check_not_joined(f"{own}:6379", None, [LocalRay(f"{own}:6379", own)])


def test_cluster_is_alone_where_head_and_nodes_are_on_loopback() -> None:
    assert is_alone(OTHER, [ONE, OTHER])
    assert not is_alone(ONE, [ONE, OTHER])
    assert not is_alone(OTHER, [OTHER, LocalRay(OTHER.head, "192.0.2.5")])
    assert not is_alone(LocalRay("head:6379", "127.0.0.1"), [])
    assert not is_alone(LocalRay("127.0.0.2:6379", "127.0.0.2"), [])


def test_node_is_read_from_ray_s_process_and_no_other() -> None:
    options = ["--gcs-address=192.0.2.1:6379", "--node_ip_address=192.0.2.5", "--head"]
    assert read_raylet(["/opt/ray/raylet", *options]) == ONE
    assert read_raylet(["/usr/bin/vim", *options]) is None
    assert read_raylet(["/opt/ray/raylet", "--gcs-address=192.0.2.1:6379"]) is None
    assert read_raylet([]) is None
