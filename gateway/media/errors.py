"""What can be wrong with an image or a sound."""

from __future__ import annotations

from gateway.errors import GatewayError


class MediumRefused(GatewayError):
    """An image or a sound cannot be used. The reason is shown to whoever sent it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason
