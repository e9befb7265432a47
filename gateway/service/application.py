"""The Serve application: a deployment for every router, and the gateway deployment in front of them.

A request's way: gateway (its own HTTP port, one event loop) -> `RouterPool` -> `ServeRouterClient` -> a small call to
submit, with all that came together -> `RouterDeployment` -> engine thread; and back in one stream of events for all
requests that the gateway has at that router.
"""

from __future__ import annotations

from typing import Any

from ray import serve

from cluster.resources import gateway_deployment_options, router_deployment_options
from gateway.service.bind_address import BindAddress
from gateway.service.gateway_replica import GatewayDeployment, GatewaySpec
from gateway.service.layout import Layout, context_length
from gateway.service.options import ServiceOptions
from gateway.service.router_replica import RouterDeployment, RouterSpec
from router.loading import EngineOptions
from router.model_config import ModelConfig

APP_NAME = "sage-moe"


def router_spec(options: ServiceOptions, engine: EngineOptions, layout: Layout) -> RouterSpec:
    return RouterSpec(
        store_root=str(options.store_root.resolve()),
        model_name=options.model_name,
        num_actors=len(layout.plan.actors) if options.is_placed else options.num_actors,
        engine=engine,
        memory=layout.memory,
        trace_folder=None if options.trace_folder is None else str(options.trace_folder.resolve()),
        is_trace_with_tokens=options.is_trace_with_tokens,
        is_capacity_auto=options.capacity == "auto",
        is_autoscaled=options.actor_range is not None,
        num_routers=options.num_routers,
        is_placed=options.is_placed,
    )


def gateway_spec(
    options: ServiceOptions, config: ModelConfig, engine: EngineOptions, address: BindAddress
) -> GatewaySpec:
    return GatewaySpec(
        store_root=str(options.store_root.resolve()),
        model_name=options.model_name,
        context_length=context_length(options, config),
        vocab_size=config.vocab_size,
        max_open_requests=options.num_routers * engine.limits.max_open,
        address=address.address,
        port=address.port,
        model_aliases=options.model_aliases,
        keys=options.keys,
        cors_origins=options.cors_origins,
        routing=options.routing,
        has_media=engine.has_media,
        has_speech=engine.has_speech,
        resume_timeout_s=options.resume_timeout_s,
    )


def build_application(
    routers: RouterSpec, gateway: GatewaySpec, node_id: str | None = None
) -> serve.Application:
    """node_id: of the node that has the store; None lets Ray choose."""
    deployment: Any = serve.deployment  # its overloads lose the type of what it returns
    options = router_deployment_options(node_id)
    bound = [
        deployment(RouterDeployment, name=name, **options).bind(routers, index)
        for index, name in enumerate(routers.names)
    ]
    front = deployment(GatewayDeployment, name="gateway", **gateway_deployment_options(node_id))
    app: serve.Application = front.bind(gateway, routers.names, *bound)
    return app
