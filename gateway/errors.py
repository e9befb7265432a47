"""What can go wrong in the gateway, and its HTTP shape. The only package that knows HTTP codes."""

from __future__ import annotations

import math
import re

HEADERS_BY_STATUS = {401: {"WWW-Authenticate": "Bearer"}, 408: {"Connection": "close"}}
"""After 408 the rest of a body may still come; the connection cannot be used again."""


class GatewayError(Exception):
    """Root of the gateway's errors."""


class ApiError(GatewayError):
    """A request gets this answer. Every field is shown to the client, so none may hold internals."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(status, message, type, param, code, retry_after_s)
        self.status, self.message, self.type = status, message, type
        self.param, self.code, self.retry_after_s = param, code, retry_after_s

    def __str__(self) -> str:
        return f"{self.status} {self.type}: {self.message}"

    def body(self) -> dict[str, object]:
        """The answer in OpenAI's shape."""
        fields = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": fields}

    def headers(self) -> dict[str, str]:
        headers = dict(HEADERS_BY_STATUS.get(self.status, {}))
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return headers


class RouterBusy(GatewayError):
    """The router's queue is full."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"the router's queue is full; try again in {self.retry_after_s:.0f} s"


class RouterUnavailable(GatewayError):
    """The router cannot take or finish a request. `detail` is for logs; clients get a fixed text."""

    def __init__(self, detail: str) -> None:
        super().__init__(detail)
        self.detail = detail

    def __str__(self) -> str:
        return f"the router is unavailable: {self.detail}"


class RouterSilent(RouterUnavailable):
    """A router did not answer a call: nobody knows whether it has taken what was in it."""


class RouterLost(RouterUnavailable):
    """A router that had taken a request will not finish it: it died, or is taken for dead."""

    def __str__(self) -> str:
        return f"the router was lost: {self.detail}"


class GatewayStopped(GatewayError):
    """The gateway has closed its port, though nobody has asked it to."""


class GenerationFailed(GatewayError):
    """The router gave up on one request. `reason` is the router's own text, safe to show."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"generation failed: {self.reason}"


class ChatFailed(GatewayError):
    """A chat got no answer. `reason` may quote a server."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


class ClientGone(GatewayError):
    """The client closed its connection; nobody reads the answer."""


class StoreNotFound(GatewayError):
    """What a user named is neither a store nor a checkpoint nor a bundled model."""

    def __init__(self, source: str, bundled: tuple[str, ...]) -> None:
        super().__init__(source, bundled)
        self.source, self.bundled = source, bundled

    def __str__(self) -> str:
        return f"{self.source} is no store or checkpoint folder; bundled models: {', '.join(self.bundled)}"


class CheckpointIsStore(GatewayError):
    """A command that reads a published checkpoint was given what extraction made of one."""

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.source = source

    def __str__(self) -> str:
        return f"{self.source} is an expert store; name the checkpoint that it was extracted from"


class OptionInvalid(GatewayError):
    """An option or a key of the config file cannot be used. `name` is as the user wrote it."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} {self.reason}"


class FileUnusable(GatewayError):
    """A file that a user named cannot be read, or is not what it should be."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"


class KeysRefused(GatewayError):
    """API keys cannot be taken. `source` is where they are from; no key is in the message."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason

    def __str__(self) -> str:
        return f"{self.source} {self.reason}"


class SecretRefused(GatewayError):
    """A file holds no secret that closes anything. The secret is in no message."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path} {self.reason}"


class SyncStopped(GatewayError):
    """Nobody gives any more of a store's records."""

    def __init__(self, reason: str, done: int, total: int) -> None:
        super().__init__(reason, done, total)
        self.reason, self.done, self.total = reason, done, total

    def __str__(self) -> str:
        return f"{self.done} of {self.total} experts are here; the same command goes on with the rest: {self.reason}"


class BindNeedsKey(GatewayError):
    """A service without API keys would be reached by other machines."""

    def __init__(self, host: str) -> None:
        super().__init__(host)
        self.host = host

    def __str__(self) -> str:
        return (
            f"{self.host} can be reached from other machines, which needs an API key; "
            "give --api-key-file FILE, or bind to 127.0.0.1"
        )


class StorePartial(GatewayError):
    """A store leaves out parts of its model, so that it cannot compute a token."""

    def __init__(self, root: str, left_out: str) -> None:
        super().__init__(root, left_out)
        self.root, self.left_out = root, left_out

    def __str__(self) -> str:
        return (
            f"{self.root} is a partial store without {self.left_out}; extract all of the checkpoint to run it"
        )


class PortTaken(GatewayError):
    """Somebody else listens where the service was to listen."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(host, port)
        self.host, self.port = host, port

    def __str__(self) -> str:
        return f"port {self.port} of {self.host} is in use; choose another with --port"


class AddressUnusable(GatewayError):
    """The address to listen on is none of this machine's."""

    def __init__(self, host: str, reason: str) -> None:
        super().__init__(host, reason)
        self.host, self.reason = host, reason

    def __str__(self) -> str:
        return f"cannot listen on {self.host}: {self.reason}"


class ServeTaken(GatewayError):
    """The cluster's Ray Serve, which is one for all, runs other applications."""

    def __init__(self, applications: tuple[str, ...]) -> None:
        super().__init__(applications)
        self.applications = applications

    def __str__(self) -> str:
        names = ", ".join(self.applications)
        return f"Ray Serve runs other applications on this cluster ({names}): delete them, or take another cluster"


class DeploymentFailed(GatewayError):
    """Ray Serve could not start the router or the gateway. `reason` is Serve's text with the replica's stack."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        """The last lines say what was raised; those before are Ray's way there."""
        lines = [line.strip() for line in self.reason.splitlines() if line.strip()]
        raised = [
            line for line in lines if re.match(r"[\w.]*(Error|Exception|[a-z]\w*\.errors\.\w+): ", line)
        ]
        reason = (raised or lines or ["no reason given"])[-1]
        if reason == "ActorDiedError()":  # nothing was raised: its process was ended
            reason = "a router or the gateway was killed while it started"
        return f"the service could not be deployed: {reason}"


class ModelFileInvalid(GatewayError):
    """A tokenizer, chat template or generation config of a model cannot be used."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


class TemplateStuck(GatewayError):
    """A chat template was not rendered within its limits of time and memory."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the chat template was not rendered: {self.reason}"


class LimitBroken(GatewayError):
    """Work in a process of its own was not done within its limits of time and memory."""

    def __init__(self, limits: str) -> None:
        super().__init__(limits)
        self.limits = limits

    def __str__(self) -> str:
        return f"it broke a limit of {self.limits}"


class GrammarRefused(GatewayError):
    """A grammar that a request brings, or a schema that it is made of, cannot be followed."""

    def __init__(self, reason: str, part: str | None = None) -> None:
        """part: the name of the one to blame, where several were brought."""
        super().__init__(reason, part)
        self.reason, self.part = reason, part

    def __str__(self) -> str:
        return self.reason


class PreparationBusy(GatewayError):
    """Other requests took the time in which one was to be prepared."""


class ExtraMissing(GatewayError):
    """A command needs an optional dependency."""

    def __init__(self, extra: str, package: str) -> None:
        super().__init__(extra, package)
        self.extra, self.package = extra, package

    def __str__(self) -> str:
        return f"{self.package} is not installed; pip install 'sage-moe[{self.extra}]'"


class ComparisonRefused(GatewayError):
    """A checkpoint and a store cannot be compared. `subject` is an option, a path or a program."""

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(subject, reason)
        self.subject, self.reason = subject, reason

    def __str__(self) -> str:
        return f"{self.subject} {self.reason}"


class BatchInputInvalid(GatewayError):
    """A batch's input file cannot be used as a whole; a bad row is an error in its row instead."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(file, reason)
        self.file, self.reason = file, reason

    def __str__(self) -> str:
        return f"{self.file}: {self.reason}"


class BatchOutputRefused(GatewayError):
    """The output folder belongs to something else, or is not as it was left."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class BatchFailed(GatewayError):
    """The work stopped before its end. What was written stays, and the same command goes on from there."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"the batch stopped: {self.reason}; run the same command again to go on"


class EvaluationFailed(GatewayError):
    """A text could not be scored, or a picture not drawn."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


def to_api_error(error: GatewayError) -> ApiError:
    """The answer that a client gets for an error of the gateway or the router."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RouterBusy):
        message = "The service has too many requests waiting. Please try again later."
        return ApiError(429, message, "rate_limit_error", None, "queue_full", error.retry_after_s)
    if isinstance(error, PreparationBusy):
        message = "Too many requests are being prepared. Please try again later."
        return ApiError(503, message, "server_error", None, "unavailable", 1.0)
    if isinstance(error, RouterUnavailable):
        message = "The model is not available at the moment. Please try again later."
        return ApiError(503, message, "server_error", None, "unavailable", 1.0)
    if isinstance(error, GenerationFailed):
        return ApiError(500, f"Generation failed: {error.reason}", "server_error", None, "generation_failed")
    return ApiError(500, "Internal error.", "server_error", None, "internal_error")


class ServiceUnreachable(GatewayError):
    """Nothing that is a service of ours answers there, at least not now."""

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason

    def __str__(self) -> str:
        return (
            f"no service answers at {self.url} ({self.reason}): start one with `sage-moe serve STORE`, or say where "
            "it is: `sage-moe status URL`"
        )


class ServiceRefuses(GatewayError):
    """A service wants a key that it was not given."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.url = url

    def __str__(self) -> str:
        return f"{self.url} wants an API key: --api-key @FILE, or SAGE_MOE_API_KEYS"
