"""The command and the environment with which a machine becomes a node."""

from __future__ import annotations

import pytest

from cluster.errors import ClusterRefused
from cluster.node_process import last_words
from cluster.node_start import NodeOptions, parse_labels, start_command, start_environment


def test_command_says_what_was_given_and_leaves_the_rest_to_ray() -> None:
    plain = start_command("ray", NodeOptions("192.0.2.1:6379"), is_blocking=True)
    assert plain == ["ray", "start", "--address=192.0.2.1:6379", "--object-store-memory=268435456", "--block"]
    options = NodeOptions("192.0.2.1:6379", 4, 0, 1 << 30, "192.0.2.5", {"disk": "nvme", "arch": "x"})
    command = start_command("ray", options, is_blocking=False)
    for word in (
        "--num-cpus=4",
        "--num-gpus=0",
        "--memory=1073741824",
        "--node-ip-address=192.0.2.5",
        "--labels=arch=x,disk=nvme",
    ):
        assert word in command
    assert "--block" not in command


def test_environment_demands_the_token_and_names_the_cache() -> None:
    variables = start_environment(NodeOptions("192.0.2.1:6379", store_cache="/data"), {"HOME": "/h"})
    assert variables["RAY_AUTH_MODE"] == "token"
    assert variables["RAY_USAGE_STATS_ENABLED"] == "0"
    assert variables["SAGE_MOE_STORE_CACHE"] == "/data"
    assert variables["HOME"] == "/h"


def test_second_node_of_a_machine_leaves_the_first_its_port() -> None:
    options = NodeOptions("127.0.0.2:6379")
    assert options.is_head_here and not NodeOptions("head:6379").is_head_here
    assert "--dashboard-agent-listen-port=0" in start_command("ray", options, is_blocking=True)


def test_labels_are_read_with_commas_and_repeated() -> None:
    assert parse_labels(["a=1,b=2", "example.com/c=x-y.z"]) == {"a": "1", "b": "2", "example.com/c": "x-y.z"}


@pytest.mark.parametrize(
    "word", ["", "a", "a=", "=b", "a=b c", "a=b=c", "a=-b", "a=" + "x" * 64, "ray.io/node-id=x"]
)
def test_labels_that_ray_would_not_take_are_refused(word: str) -> None:
    with pytest.raises(ClusterRefused, match="--labels"):
        parse_labels([word])


def test_last_words_of_ray_leave_out_its_stacks() -> None:
    lines = [
        "Local node IP: x",
        "Traceback (most recent call last):",
        '  File "a"',
        "RuntimeError: version",
        "",
        " ",
    ]
    assert last_words(lines) == "RuntimeError: version"
    assert last_words([]) == "Ray said nothing"
