"""What the supervisor must not forget when it is restarted: the plan as it has become, and who was quarantined.

Kept in Ray's internal key-value store: it lives as long as the cluster whose actors it is about, and whichever node
the supervisor is restarted on can read it; a file beside the trust ledger would outlive the actors, and not follow the
supervisor. All else is found out again from the actors themselves. A Ray shell; called by `cluster.supervisor`.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field

from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_put

from cluster.plan import ServicePlan
from cluster.resources import NAMESPACE
from cluster.topology import Topology

KEY = "supervisor"


@dataclass(frozen=True)
class ServiceRecord:
    """What was decided since the start."""

    service: str
    """See `ActorSpec.service`: a record of another service is none."""
    plan: ServicePlan
    least_incarnation: int = 0
    quarantines: Mapping[str, int] = field(default_factory=dict)
    """Node id -> how many of its actors computed what is wrong."""
    is_begun: bool = False
    """Whether all actors of the plan have been there once."""
    topology: Topology | None = None
    """The machines that the plan was last made for; None where it follows none."""


def save_record(record: ServiceRecord) -> None:
    _internal_kv_put(KEY, pickle.dumps(record), namespace=NAMESPACE)


def load_record(service: str) -> ServiceRecord | None:
    """Of this service. What is read was written by who may start code in this cluster anyway."""
    stored = _internal_kv_get(KEY, namespace=NAMESPACE)
    record = pickle.loads(stored) if stored else None
    return record if isinstance(record, ServiceRecord) and record.service == service else None


def forget_record() -> None:
    _internal_kv_del(KEY, namespace=NAMESPACE)
