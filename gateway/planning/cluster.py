"""`sage-moe plan --address`: the plan that `serve` would make on a running cluster, by `serve`'s own code.

Called by `gateway.planning.command`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from extraction.quantised_parts import NOT_QUANTISED
from gateway.errors import OptionInvalid
from gateway.http.api_keys import NO_KEYS
from gateway.planning.nodes import Workload
from gateway.planning.report import ServeChoices, serve_options
from gateway.planning.source import PlannedModel
from gateway.service.option_values import merge_values
from gateway.service.options import compose_options
from gateway.stores.source import model_name, resolve_runnable

if TYPE_CHECKING:
    from gateway.service.placing import Placed


def plan_on_cluster(model: PlannedModel, workload: Workload, choices: ServeChoices) -> Placed:
    """Raises OptionInvalid where there is no store yet, or what `serve --dry-run` raises."""
    from gateway.service.launch import ask_cluster

    if model.quantised != NOT_QUANTISED and not model.is_quantised:
        raise OptionInvalid("--quantize", "goes with --nodes: on a cluster machines are asked for a store")
    kv_bytes = model.sizes.kv_bytes(workload.context, workload.num_streams)
    given: dict[str, object] = dict(serve_options(model, workload, kv_bytes, choices))
    for name in ("max-model-len", "max-num-seqs"):
        given[name] = int(str(given[name]))
    given["speech"] = model.has_speech
    values = merge_values(given, {}, "")
    root = resolve_runnable(model.source, announce=lambda line: None)
    options = compose_options(values, root, model_name(model.source), NO_KEYS)
    return ask_cluster(options)
