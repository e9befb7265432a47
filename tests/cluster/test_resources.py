"""What is set in place of Ray's defaults, and the example cluster file."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.resources import (
    BUSY_SPIN_S,
    ONE_LOOP,
    SPIN_S,
    expert_actor_options,
    gateway_deployment_options,
    plan_spin_s,
    plan_threads,
    router_deployment_options,
    service_environment,
    start_ray,
    supervisor_options,
    weight_keeper_options,
)

LARGE_EXPERT = 2 * 768 * 2048
SMALL_EXPERT = 2 * 48 * 256


@pytest.mark.parametrize(
    ("cores", "actors", "elements", "router", "actor"),
    [
        (2, 0, LARGE_EXPERT, 2, 2),
        (2, 2, LARGE_EXPERT, 2, 1),
        (16, 2, LARGE_EXPERT, 16, 8),
        (2, 5, LARGE_EXPERT, 2, 1),
        (16, 2, SMALL_EXPERT, 1, 1),
    ],
)
def test_cores_are_shared_out_and_small_experts_get_one_thread(
    cores: int, actors: int, elements: int, router: int, actor: int
) -> None:
    plan = plan_threads(cores, actors, elements)
    assert (plan.router, plan.expert_actor) == (router, actor)


def test_routers_of_one_machine_share_its_cores() -> None:
    assert plan_threads(16, 2, LARGE_EXPERT, 4).router == 4
    assert plan_threads(2, 2, LARGE_EXPERT, 4).router == 1


def test_readers_look_for_answers_only_where_every_process_has_a_core() -> None:
    assert plan_spin_s(4, 2, 1, 2) == plan_spin_s(16, 2, 4, 2) == BUSY_SPIN_S
    assert plan_spin_s(8, 2, 4, 2) == SPIN_S
    assert plan_spin_s(3, 2, 1, 2) == plan_spin_s(8, 0, 1, 2) == 0.0


def test_dead_router_and_dead_gateway_are_noticed_within_a_second() -> None:
    assert router_deployment_options()["health_check_period_s"] == 1.0
    assert gateway_deployment_options()["health_check_period_s"] == 1.0


def test_nothing_of_ours_takes_a_whole_cpu() -> None:
    deployments = (router_deployment_options(), gateway_deployment_options())
    options = [deployment["ray_actor_options"] for deployment in deployments]
    options += [expert_actor_options("experts-0"), supervisor_options()]
    assert [option["num_cpus"] for option in options] == [0.0] * 4


def test_actors_outlive_their_creator_and_only_the_supervisor_is_restarted_by_ray() -> None:
    for options, restarts in ((expert_actor_options("experts-0"), 0), (supervisor_options(), -1)):
        assert (options["lifetime"], options["namespace"]) == ("detached", "sage-moe")
        assert options["max_restarts"] == restarts


def test_queues_are_bounded() -> None:
    options = router_deployment_options()
    assert 0 < options["max_ongoing_requests"] < 10_000
    assert 0 < options["max_queued_requests"] < 10_000


def test_processes_wait_passively_and_replicas_have_one_event_loop() -> None:
    environment = service_environment()
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment.items() >= ONE_LOOP.items()


def test_nothing_has_an_environment_of_its_own() -> None:
    """Ray would start its process twice over."""
    deployments = (router_deployment_options(), gateway_deployment_options())
    options = [deployment["ray_actor_options"] for deployment in deployments]
    options += [expert_actor_options("experts-0"), supervisor_options(), weight_keeper_options()]
    assert all("runtime_env" not in option for option in options)


@pytest.mark.ray
def test_ray_is_started_anew_where_an_address_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a Ray that died, which Ray would look for first."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    start_ray(num_cpus=1)
    try:
        assert ray.cluster_resources()["CPU"] == 1  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()


def test_example_cluster_file_fits_ray_s_schema() -> None:
    repository = Path(__file__).parent.parent.parent
    cluster = yaml.safe_load((repository / "ray_cluster.yaml").read_text(encoding="utf-8"))
    validate_config(prepare_config(cluster))
    starts = " ".join(cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"])
    assert starts.count("RAY_AUTH_MODE=token") == 2
    assert "--dashboard-host=127.0.0.1" in starts
    assert len(cluster["provider"]["worker_ips"]) == cluster["min_workers"] == cluster["max_workers"]


def test_cluster_document_explains_every_key_of_the_example() -> None:
    repository = Path(__file__).parent.parent.parent
    cluster = yaml.safe_load((repository / "ray_cluster.yaml").read_text(encoding="utf-8"))
    table = (repository / "docs" / "cluster.md").read_text(encoding="utf-8").split("## Line by line")[1]
    commands = {"head_start_ray_commands", "worker_start_ray_commands"}
    for key in cluster.keys() - commands:
        assert f"`{key}" in table, f"docs/cluster.md does not explain {key}"
    words = " ".join(line for key in commands for line in cluster[key]).split()
    for option in {word.split("=")[0] for word in words if word.startswith("--")} - {"--head", "--address"}:
        assert option in table or option == "--dashboard-port", f"docs/cluster.md does not explain {option}"
