"""Renders chat templates in a process of its own, with hard limits on time and memory. See
`gateway.text.template_process`, which runs there, and `gateway.text.confined`. Called by `gateway.text.chat_template`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gateway.errors import LimitBroken, TemplateStuck
from gateway.text.confined import ConfinedProcess, Confinement

TASK = Path(__file__).with_name("template_process.py")


@dataclass(frozen=True)
class RenderLimits:
    """What one rendering may take."""

    timeout_s: float = 2.0
    max_memory_bytes: int = 512 * 1024 * 1024
    """Address space of the whole process."""
    max_chars: int = 4 * 1024 * 1024
    """Of the rendered text."""

    @property
    def confinement(self) -> Confinement:
        """JSON writes a character in at most two escapes of six bytes."""
        return Confinement(self.timeout_s, self.max_memory_bytes, 12 * self.max_chars + 65536)


class TemplateRenderer:
    """Compiled templates. Safe to use from several threads, one request at a time."""

    def __init__(self, sources: Mapping[str, str], limits: RenderLimits | None = None) -> None:
        """sources: templates by name."""
        self.limits = limits or RenderLimits()
        setup = {"templates": dict(sources), "max_chars": self.limits.max_chars}
        self.confined = ConfinedProcess(TASK, setup, self.limits.confinement)

    def compile(self) -> dict[str, str]:
        """Why templates cannot be used, by name; nothing for those that can. Raises TemplateStuck."""
        try:
            return self.confined.start()
        except LimitBroken as error:
            raise TemplateStuck(str(error)) from error

    def render(self, name: str, variables: Mapping[str, Any]) -> dict[str, str]:
        """What `template_process.render` answers. Raises TemplateStuck when a limit was broken, PreparationBusy when
        renderings of others did not leave time."""
        try:
            return self.confined.ask({"name": name, "variables": dict(variables)})
        except LimitBroken as error:
            raise TemplateStuck(str(error)) from error

    def close(self) -> None:
        """End the process. Another rendering would start it again."""
        self.confined.close()
