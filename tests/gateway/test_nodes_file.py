"""The file of machines: what is taken, and one line for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.errors import FileUnusable, OptionInvalid
from gateway.planning.nodes_file import MAX_NODES, NodesFile, read_nodes

WHOLE = """
router: big
nodes:
  - name: small
    memory: 8GiB
  - name: big
    memory: 64GiB
    cores: 16
    gpus: [24GiB, 12GiB]
    bandwidth: 10Gb/s
    round-trip: 0.2ms
    speed: 40GB/s
    disk: 200GiB
    disk-speed: 2GB/s
    has-store: false
"""


def _read(tmp_path: Path, text: str) -> NodesFile:
    path = tmp_path / "nodes.yaml"
    path.write_text(text)
    return read_nodes(path)


def test_every_field_is_read_in_bytes_and_seconds(tmp_path: Path) -> None:
    file = _read(tmp_path, WHOLE)
    small, big = file.nodes
    assert file.router_name == "big"
    assert (small.memory, small.cores, small.gpus, small.speed, small.has_store) == (
        8 << 30,
        4,
        (),
        None,
        None,
    )
    assert (big.memory, big.cores, big.gpus) == (64 << 30, 16, (24 << 30, 12 << 30))
    assert (big.bandwidth, big.round_trip, big.speed) == (1.25e9, pytest.approx(2e-4), 4e10)
    assert (big.disk, big.disk_speed, big.has_store) == (200 << 30, 2e9, False)


def test_first_machine_runs_the_router_where_none_is_named(tmp_path: Path) -> None:
    assert _read(tmp_path, "nodes: [{name: a, memory: 1GiB}, {name: b, memory: 1GiB}]").router_name == "a"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nodes: []", "nodes must be a list of 1 to 64"),
        ("{}", "nodes is missing"),
        ("nodes: [{name: a}]", r"nodes\[0\]\.memory is missing"),
        (
            "nodes: [{name: a, memory: 8}]",
            r"nodes\[0\]\.memory must be a text with a unit, such as 24GiB, not '8'",
        ),
        ("nodes: [{name: a, memory: 8XB}]", r"nodes\[0\]\.memory has the unknown unit XB"),
        (
            "nodes: [{name: a, memory: 8GiB, cores: many}]",
            r"cores must be a whole number of cores .* not 'many'",
        ),
        ("nodes: [{name: a, memory: 8GiB, cores: 0}]", r"cores must be a whole number of cores from 1"),
        ("nodes: [{name: a, memory: 8GiB, gpu: 1}]", r"gpu is no field of a node; they are name, memory"),
        ("nodes: [{name: a, memory: 8GiB, gpus: [1]}]", r"gpus\[0\] must be a text with a unit"),
        ("nodes: [{name: a, memory: 8GiB, round-trip: 1h}]", r"round-trip must be a time such as 0.2ms"),
        ("nodes: [{name: a, memory: 8GiB, has-store: 'yes'}]", r"has-store must be true or false"),
        ("nodes: [{name: 'a b', memory: 8GiB}]", r"name must be a name of letters"),
        ("nodes: [{name: a, memory: 8GiB}, {name: a, memory: 1GiB}]", "a comes twice"),
        ("router: c\nnodes: [{name: a, memory: 8GiB}]", "router: c is no node"),
        ("nodes: {a: 8GiB}", "nodes must be a list"),
        ("nodes: [a]", r"nodes\[0\]"),
        ("[1]", "must be a mapping"),
    ],
)
def test_anything_else_is_one_line_that_names_the_field(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises((OptionInvalid, FileUnusable), match=complaint) as caught:
        _read(tmp_path, text)
    assert "\n" not in str(caught.value)
    assert "nodes.yaml" in str(caught.value)


def test_more_machines_than_can_be_planned_for_are_refused(tmp_path: Path) -> None:
    entries = ", ".join(f"{{name: n{number}, memory: 1GiB}}" for number in range(MAX_NODES + 1))
    with pytest.raises(OptionInvalid, match="list of 1 to 64"):
        _read(tmp_path, f"nodes: [{entries}]")


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileUnusable, match="absent"):
        read_nodes(tmp_path / "absent.yaml")
