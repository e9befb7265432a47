"""What can go wrong in the router. The gateway turns these into HTTP answers."""

from __future__ import annotations


class RouterError(Exception):
    """Root of the router's errors."""


class ConfigUnsupported(RouterError):
    """The model's configuration is damaged or asks for what the backbone does not compute."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(key, reason)
        self.key, self.reason = key, reason

    def __str__(self) -> str:
        return f"model configuration: {self.key}: {self.reason}"


class WeightMismatch(RouterError):
    """A backbone tensor does not have the shape that the configuration implies."""

    def __init__(self, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        super().__init__(name, shape, expected)
        self.name, self.shape, self.expected = name, shape, expected

    def __str__(self) -> str:
        return (
            f"backbone tensor {self.name} has shape {self.shape}, the configuration implies {self.expected}"
        )


class QueueFull(RouterError):
    """As many requests are open as the engine takes."""

    def __init__(self, num_open: int, retry_after_s: float) -> None:
        super().__init__(num_open, retry_after_s)
        self.num_open, self.retry_after_s = num_open, retry_after_s

    def __str__(self) -> str:
        return f"{self.num_open} requests are open already; try again in {self.retry_after_s:.0f} s"


class RequestTooLong(RouterError):
    """A request can never fit: its tokens exceed the context or the whole KV cache."""

    def __init__(self, num_tokens: int, limit: int) -> None:
        super().__init__(num_tokens, limit)
        self.num_tokens, self.limit = num_tokens, limit

    def __str__(self) -> str:
        return f"prompt and max_tokens come to {self.num_tokens} tokens; at most {self.limit} fit"


class PromptInvalid(RouterError):
    """The prompt is empty, or holds ids that the model does not know."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the prompt cannot be computed: {self.reason}"


class MediaFailed(RouterError):
    """An image or a sound could not be encoded, through no fault of the request."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return "an image or a sound could not be encoded"


class MediaUnwanted(RouterError):
    """The request has gone before all of its media were encoded."""


class SpeechFailed(RouterError):
    """A reply could not be spoken, through no fault of the request."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return "the reply could not be spoken"


class GrammarFailed(RouterError):
    """A grammar cannot be compiled or followed within its limits."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the answer's grammar cannot be followed: {self.reason}"


class KvExhausted(RouterError):
    """More KV blocks were asked for than are free."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(needed, free)
        self.needed, self.free = needed, free

    def __str__(self) -> str:
        return f"{self.needed} KV blocks needed, {self.free} free"


class StreamMissing(RouterError):
    """A gateway sent a request without an event stream that could carry the answer."""

    def __init__(self, gateway: str) -> None:
        super().__init__(gateway)
        self.gateway = gateway

    def __str__(self) -> str:
        return f"{self.gateway} has no event stream"


class EngineStopped(RouterError):
    """The engine's thread has ended; nothing more is computed."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the engine has stopped: {self.reason}"


class TraceFailed(RouterError):
    """A routing trace could not be written."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"the trace {self.path} cannot be written: {self.reason}"


class TraceInvalid(RouterError):
    """A file is no routing trace, or none of this model."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class RoutingMissing(RouterError):
    """A replay reached a token that the trace does not have."""

    def __init__(self, request: int, position: int, layer: int) -> None:
        super().__init__(request, position, layer)
        self.request, self.position, self.layer = request, position, layer

    def __str__(self) -> str:
        return (
            f"the replayed trace has no routing for position {self.position} of request {self.request} "
            f"in layer {self.layer}; give the same prompts and no more tokens than it was made with"
        )


class MaskInvalid(RouterError):
    """A list of masked experts cannot be read, or does not fit the model."""

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(part, reason)
        self.part, self.reason = part, reason

    def __str__(self) -> str:
        return f"masked experts {self.part[:80]!r}: {self.reason}"


class WeightsInvalid(RouterError):
    """The weights of the snarc policy cannot be used."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"snarc weights: {self.reason}"


class MeansUnusable(RouterError):
    """The file of mean outputs cannot be read or written."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"stand-ins in {self.path}: {self.reason}"


class MeansDamaged(MeansUnusable):
    """The file of mean outputs is not what was written."""
