"""Options: the command line before the file before defaults, and what a refusal says."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.budget import FIT, BudgetRequest
from experts.errors import DeviceUnavailable
from experts.store_source import CacheSpec
from gateway.errors import FileUnusable, OptionInvalid
from gateway.http.api_keys import KeyRing
from gateway.service import options as service_options
from gateway.service.command import serve, without_option
from gateway.service.config_file import read_config
from gateway.service.option_values import MAX_ACTORS, OptionValues, merge_values, option_names
from gateway.service.options import ServiceOptions, compose_options

NAME = "serve.yaml"


def _options(
    command_line: dict[str, Any], file: dict[str, Any], keys: KeyRing | None = None
) -> ServiceOptions:
    values = merge_values(command_line, file, NAME)
    return compose_options(values, Path("store"), "stories", keys or KeyRing())


def test_nothing_given_is_the_dataclass_s_defaults() -> None:
    assert _options({}, {}) == ServiceOptions(Path("store"), "stories")


def test_command_line_goes_before_file_before_defaults() -> None:
    options = _options(
        {"port": 1, "kv-budget": None, "served-model-name": ["a", "b", "a"]},
        {"port": 2, "kv-budget": "512MiB", "served-model-name": "c", "actors": 3, "routers": 2},
    )
    assert (options.num_routers, options.shown()["routers"]) == (2, 2)
    assert (options.port, options.kv_budget_bytes, options.num_actors) == (1, 512 * 2**20, 3)
    assert (options.model_name, options.model_aliases) == ("a", ("b",))
    assert options.host == "127.0.0.1"


def test_every_option_of_the_command_is_one_of_the_file_and_the_other_way_round() -> None:
    own = {"store", "config", "dry_run", "as_json"}
    names = {name.replace("_", "-") for name in inspect.signature(serve).parameters if name not in own}
    assert names | {"node-budgets"} == set(option_names())


def test_number_of_actors_follows_the_load_from_none_to_those_of_the_start_unless_told_otherwise() -> None:
    assert _options({"actors": 2}, {}).actor_range is None
    assert _options({"actors": 2, "autoscale": True}, {}).actor_range == (0, 2)
    bounded = _options({"actors": 2, "autoscale": True}, {"min-actors": 1, "max-actors": 4})
    assert bounded.actor_range == (1, 4)
    assert bounded.shown()["max-actors"] == 4


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"actors": 2, "min-actors": 1}, "min-actors goes with autoscale"),
        ({"autoscale": True}, "autoscale goes with actors, .* or with address"),
        ({"autoscale": True, "actors": 2, "min-actors": 3}, r"\(2\) is not from min-actors \(3\)"),
        ({"autoscale": True, "actors": 3, "max-actors": 2}, r"to max-actors \(2\)"),
        ({"autoscale": True, "actors": 2, "max-actors": 65}, "from 1 to 64"),
    ],
)
def test_bounds_that_do_not_go_together_are_refused(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(OptionInvalid, match=complaint):
        _options(given, {})


def test_store_cache_is_a_folder_and_a_limit() -> None:
    options = _options({"store-cache": "/c", "actors": 1}, {"store-cache-limit": "40GiB"})
    assert options.store_cache == CacheSpec("/c", 40 * 2**30)
    assert (options.shown()["store-cache"], options.shown()["store-cache-limit"]) == ("/c", "40GiB")
    assert _options({"store-cache": "/c", "actors": 1}, {}).shown()["store-cache-limit"] is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"store-cache-limit": "1GiB", "actors": 1}, "store-cache-limit goes with store-cache"),
        ({"store-cache": "/c"}, "store-cache goes with actors or address"),
        ({"store-cache": "c", "actors": 1}, "must be an absolute path, the same on every machine, not 'c'"),
        ({"store-cache": "/c", "store-cache-limit": "1", "actors": 1}, "--store-cache-limit must be a size"),
    ],
)
def test_store_cache_that_cannot_be_meant_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionInvalid, match=words):
        _options(given, {})


def test_budgets_of_both_tiers_are_one_memory_and_none_is_fit() -> None:
    quarter, size = BudgetRequest(share=Fraction(1, 4)), BudgetRequest(num_bytes=2**31)
    assert _options({}, {}).expert_budgets == (FIT,)
    assert _options({"expert-budget": "25%"}, {"host-budget": "2GiB"}).expert_budgets == (quarter, size)
    assert _options({"host-budget": "2GiB"}, {}).expert_budgets == (size,)


def test_budgets_of_a_device_are_two_and_it_goes_with_one_router_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(service_options, "resolve_device", lambda word, option="device": torch.device(word))
    size = BudgetRequest(num_bytes=2**31)
    options = _options({"device": "cuda:1", "host-budget": "2GiB"}, {})
    assert (options.expert_budgets, options.host_budgets) == ((FIT,), (size,))
    assert options.shown()["device"] == "cuda:1"
    assert _options({"device": "cuda:1"}, {}).host_budgets == ()
    with pytest.raises(OptionInvalid, match=r"^device .cuda:1. goes with one router, not 2"):
        _options({"device": "cuda:1"}, {"routers": 2})
    with pytest.raises(OptionInvalid, match=r"^device .cuda:1. goes with address or with .*leave actors out"):
        _options({"device": "cuda:1", "address": "auto"}, {"actors": 2})
    for more in ({}, {"actors": 0}):
        assert _options({"device": "cuda:1", "address": "auto"}, more).has_cards


def test_actors_have_a_device_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_options, "resolve_device", lambda word, option="device": torch.device(word))
    quarter, size = BudgetRequest(share=Fraction(1, 4)), BudgetRequest(num_bytes=2**31)
    given = {"actors": 2, "expert-budget": "25%", "host-budget": "2GiB"}
    on_cards = _options({"expert-device": "cuda"}, given)
    assert (on_cards.expert_device, on_cards.device.type, on_cards.has_cards) == ("cuda", "cpu", True)
    assert (on_cards.expert_budgets, on_cards.host_budgets) == ((quarter,), (size,))
    assert on_cards.shown()["expert-device"] == "cuda"
    only_router = _options({"device": "cuda"}, given)
    assert (only_router.expert_device, only_router.has_cards) == ("cpu", True)
    assert only_router.expert_budgets == (quarter, size), "actors compute in host memory"
    assert _options({"device": "cuda", "expert-device": "cuda", "actors": 1}, {}).has_cards
    with pytest.raises(OptionInvalid, match=r"^expert-device .cuda. goes with actors"):
        _options({"expert-device": "cuda"}, {})
    with pytest.raises(OptionInvalid, match=r"^expert-device .cuda. goes with address or .*leave actors out"):
        _options({"expert-device": "cuda", "address": "auto"}, {"actors": 2})
    with pytest.raises(OptionInvalid, match="must be cpu, cuda or auto, not 'cuda:1'"):
        _options({"expert-device": "cuda:1"}, {"actors": 2})


def test_cards_of_other_machines_are_not_looked_for_here() -> None:
    given = {"address": "auto", "expert-budget": "25%", "host-budget": "2GiB"}
    placed = _options({"expert-device": "auto"}, given)
    assert (placed.expert_device, placed.device.type) == ("auto", "cpu")
    assert (len(placed.expert_budgets), len(placed.host_budgets)) == (1, 1)
    assert _options({}, given).host_budgets == (), "one memory"
    assert _options({"expert-device": "auto", "actors": 2}, {}).expert_device in ("cpu", "cuda")


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(OptionInvalid, match="must be cpu, cuda, cuda:N or auto, not 'gpu'"):
        _options({"device": "gpu"}, {})
    with pytest.raises(DeviceUnavailable, match="cuda:99"):
        _options({"device": "cuda:99"}, {})


@pytest.mark.parametrize("has_gpu", [False, True])
def test_what_goes_with_a_device_of_actors_does_not_depend_on_the_machine(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    for kind in ("auto", "cuda"):
        for more in ({}, {"actors": 0}):
            with pytest.raises(OptionInvalid, match=rf"^expert-device .{kind}. goes with actors"):
                _options({"expert-device": kind}, more)
        with pytest.raises(OptionInvalid, match=rf"^expert-device .{kind}. .*on a cluster leave actors out"):
            _options({"expert-device": kind, "address": "auto"}, {"actors": 2})
    assert _options({"expert-device": "auto"}, {"actors": 2}).has_cards == has_gpu


def test_refusal_names_the_option_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experts.devices.why_no_cuda", lambda: "none here")
    with pytest.raises(DeviceUnavailable, match=r"^--expert-device cuda: none here$"):
        _options({"expert-device": "cuda"}, {"actors": 2})
    with pytest.raises(DeviceUnavailable, match=r"^--device cuda: none here$") as caught:
        _options({"device": "cuda"}, {})
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_audit_share_is_a_number_whole_or_not() -> None:
    assert _options({}, {"audit-share": 0}).audit_share == 0.0
    assert _options({"audit-share": 0.25}, {"audit-share": 1}).audit_share == 0.25


def test_copies_of_the_store_and_capacity_are_what_was_given() -> None:
    options = _options({"store-copy": ["/b", "/c", "/b"]}, {"store-copy": "/d", "capacity": "auto"})
    assert options.store_copies == (Path("/b"), Path("/c"))
    assert options.capacity == "auto"
    assert options.shown()["store-copy"] == ["/b", "/c"]


def test_node_budgets_come_from_the_file_by_name_or_address(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("node-budgets: {node-7: 2GiB, 10.0.0.8: 25%, '::1': fit}\n")
    options = _options({}, read_config(tmp_path / NAME))
    assert options.node_budgets == {
        "node-7": BudgetRequest(num_bytes=2**31),
        "10.0.0.8": BudgetRequest(share=Fraction(1, 4)),
        "::1": FIT,
    }
    assert options.shown()["node-budgets"] == {"node-7": "2GiB", "10.0.0.8": "25%", "::1": "fit"}


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("prot", "did you mean port?"),
        ("max_num_seqs", "did you mean max-num-seqs?"),
        ("KV-Budget", "did you mean kv-budget?"),
        ("api-keys", "did you mean api-key?"),
        ("zzz", "options are host, port"),
    ],
)
def test_unknown_key_is_named_with_the_nearest_known_one(name: str, nearest: str) -> None:
    with pytest.raises(OptionInvalid) as caught:
        merge_values({}, {name: 1}, NAME)
    assert str(caught.value).startswith(f"{NAME}: {name} is no option; {nearest}")


@pytest.mark.parametrize(
    ("name", "value", "must_be"),
    [
        ("port", "8000", "must be a whole number from 1 to 65535, not '8000'"),
        ("port", 0, "must be a whole number from 1 to 65535, not '0'"),
        ("port", True, "must be a whole number"),
        ("port", 1.0, "must be a whole number"),
        ("port", None, "must be a whole number"),
        ("actors", -1, "from 0 to 64"),
        ("routers", 0, "from 1 to 16"),
        ("resume-timeout", -1, "from 0 to 3600"),
        ("host", "", "must be an address or host name"),
        ("host", ["a"], "must be an address or host name"),
        ("dtype", "int8", "must be float32 or bfloat16, not 'int8'"),
        ("kv-budget", 1024, "must be a size such as 512MiB or 2GiB"),
        ("kv-budget", "12 parsecs", "has the unknown unit parsecs"),
        ("expert-budget", 5, "must be a size such as 2GiB, a percentage such as 25%, or fit"),
        ("expert-budget", "120%", "must be above 0% and at most 100%, not '120%'"),
        ("host-budget", "-1GiB", "must be a size such as 2GiB"),
        ("node-budgets", ["2GiB"], "must be a mapping of node names or addresses to budgets"),
        ("node-budgets", {"a\x1b": "2GiB"}, "must be a mapping of node names or addresses to budgets"),
        ("node-budgets", {7: "2GiB"}, "must be a mapping of node names or addresses to budgets"),
        ("audit-share", 1.5, "must be a number from 0 to 1, not '1.5'"),
        ("audit-share", -0.1, "must be a number from 0 to 1"),
        ("audit-share", float("nan"), "must be a number from 0 to 1"),
        ("audit-share", "0.1", "must be a number from 0 to 1"),
        ("audit-share", True, "must be a number from 0 to 1"),
        ("max-model-len", 1, "must be a whole number of tokens"),
        ("max-num-seqs", 513, "from 1 to 512"),
        ("max-batch-tokens", 8193, "from 1 to 8192"),
        ("max-queue", -1, "from 0 to 65536"),
        ("served-model-name", [""], "must be a text or a list of texts"),
        ("served-model-name", ["a\x1b[2J"], "must be a text or a list of texts"),
        ("served-model-name", {"a": 1}, "must be a text or a list of texts"),
        ("cors-origin", "https://a.example/", "must be * or origins such as"),
        ("cors-origin", ["null"], "must be * or origins such as"),
        ("cors-origin", ["https://*.example"], "must be * or origins such as"),
    ],
)
def test_value_of_another_kind_names_key_and_what_it_must_be(name: str, value: Any, must_be: str) -> None:
    with pytest.raises(OptionInvalid) as caught:
        merge_values({}, {name: value}, NAME)
    assert str(caught.value).startswith(f"{NAME}: {name} ")
    assert must_be in str(caught.value)
    if value is not None:
        with pytest.raises(OptionInvalid, match=f"^--{name} "):
            merge_values({name: value}, {}, NAME)


def test_wrong_budget_of_a_node_names_the_node() -> None:
    with pytest.raises(OptionInvalid) as caught:
        merge_values({}, {"node-budgets": {"n1": "2GiB", "node-7": "12 parsecs"}}, NAME)
    assert str(caught.value).startswith(f"{NAME}: node-budgets: node-7 has the unknown unit parsecs")


def test_misplaced_key_is_not_repeated() -> None:
    with pytest.raises(OptionInvalid) as caught:
        merge_values({}, {"api-key": {"sk-canary": 1}}, NAME)
    assert "canary" not in str(caught.value)


def test_values_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(OptionInvalid, match=r"max-num-seqs \(64\) is above max-batch-tokens \(32\)"):
        _options({"max-batch-tokens": 32}, {})
    with pytest.raises(OptionInvalid, match=r"prefetch goes with no expert actors, not 2"):
        _options({"prefetch": True, "actors": 2}, {})
    with pytest.raises(OptionInvalid, match="without an API key lets every web page"):
        _options({"cors-origin": ["*"]}, {})
    assert _options({"cors-origin": ["*"]}, {}, KeyRing.of(["k"])).cors_origins == ("*",)


def test_shown_options_count_keys_only() -> None:
    options = replace(_options({}, {}), keys=KeyRing.of(["sk-canary", "b"]))
    shown = str(options.shown())
    assert "'api-keys': 2" in shown and "'kv-budget': '1GiB'" in shown
    assert "canary" not in shown + repr(options)


def test_option_is_taken_out_of_a_command_in_both_spellings() -> None:
    command = [
        "py",
        "-m",
        "x",
        "serve",
        "--api-key",
        "a",
        "--api-key=b",
        "--api-key-file",
        "f",
        "--api-key",
        "c",
    ]
    assert without_option(command, "--api-key") == ["py", "-m", "x", "serve", "--api-key-file", "f"]


def _read(tmp_path: Path, content: bytes) -> dict[str, Any]:
    path = tmp_path / NAME
    path.write_bytes(content)
    return read_config(path)


def test_config_file_is_a_mapping_of_plain_values(tmp_path: Path) -> None:
    assert _read(tmp_path, b"port: 8000 # here\nserved-model-name: [a, b]\n") == {
        "port": 8000,
        "served-model-name": ["a", "b"],
    }
    assert _read(tmp_path, b"# nothing\n") == {}


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [*{chr(97 + n)}, *{chr(97 + n)}]\n" for n in range(20)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LAUGHS.encode(), r"uses an alias \(\*a\)"),
        (b"base: &b {port: 1}\n<<: *b\n", "uses an alias"),
        (b"port: !!python/object/apply:os.system ['exit 1']", "not valid YAML at line 1"),
        (b"port: 1\nport: 2\n", "port comes twice"),
        (b"port: [1\n", "not valid YAML at line"),
        (b"- port\n", "must be a mapping"),
        (b"1: 2\n", "must be a mapping"),
        (b"port: 8000\n---\nport: 1\n", "not valid YAML"),
        (b"[" * 5000, "nested deeper than 4"),
        (b"a: [" + b"1," * 3000 + b"]", "more than 2000 values"),
        (b"#" * (64 * 1024 + 1), "larger than"),
        (b"port: \xff", "not UTF-8 at byte 6"),
        (b"port: " + b"9" * 5000, "not valid YAML"),
    ],
)
def test_hostile_config_file_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(FileUnusable, match=message) as caught:
        _read(tmp_path, content)
    assert "\n" not in str(caught.value)


def test_absent_config_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileUnusable, match="cannot be read: No such file"):
        read_config(tmp_path / "absent.yaml")
    with pytest.raises(FileUnusable, match="no regular file"):
        read_config(tmp_path)


def test_defaults_stand_in_one_place_only() -> None:
    """The model's and the dataclass's are compared by composing; this holds the units apart."""
    assert OptionValues().kv_budget == ServiceOptions(Path("s"), "m").kv_budget_bytes


def test_actors_are_placed_by_the_machines_on_a_cluster_unless_they_are_counted() -> None:
    assert not _options({}, {}).is_placed
    assert not _options({"address": "auto", "actors": 2}, {}).is_placed
    placed = _options({"address": "auto", "replicas": 3, "grouping": "layer"}, {"demand": "t.parquet"})
    assert placed.is_placed
    assert (placed.replicas, placed.grouping, placed.demand_trace) == (3, "layer", Path("t.parquet"))
    assert placed.shown()["actors"] == "placed by the machines"
    assert _options({"address": "auto", "store-cache": "/c"}, {}).store_cache is not None
    assert placed.actor_range is None
    assert _options({"address": "auto", "autoscale": True}, {}).actor_range == (0, MAX_ACTORS)
    bounded = _options({"address": "auto", "autoscale": True}, {"min-actors": 1, "max-actors": 4})
    assert bounded.is_placed and bounded.actor_range == (1, 4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replicas": 3}, "replicas goes with address and without actors"),
        ({"grouping": "layer", "address": "auto", "actors": 2}, "grouping goes with address and without"),
        ({"demand": "t"}, "demand goes with address"),
        ({"address": "auto", "prefetch": True}, "prefetch goes with no expert actors"),
        ({"address": "auto", "grouping": "both"}, "must be expert or layer, not 'both'"),
        ({"address": "auto", "autoscale": True, "min-actors": 3, "max-actors": 2}, r"\(3\) is above max"),
    ],
)
def test_options_of_a_placement_that_do_not_go_together_are_refused(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionInvalid, match=message):
        _options(given, {})
