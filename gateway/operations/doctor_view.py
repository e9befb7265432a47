"""What `sage-moe doctor` found out, as lines for people and as JSON. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cluster.findings import Finding, Level
from cluster.head_probe import HeadFacts
from cluster.node_report import NodeReport
from extraction.errors import one_line

MARKS: dict[Level, str] = {"ok": "ok", "warning": "warning", "failure": "FAILURE"}


@dataclass(frozen=True)
class Examination:
    """head and nodes: where a cluster was found."""

    findings: tuple[Finding, ...]
    head: HeadFacts | None = None
    nodes: Sequence[NodeReport] = ()

    @property
    def has_failed(self) -> bool:
        """Whether something would keep the service from working."""
        return bool(self._count("failure"))

    def _count(self, level: Level) -> int:
        return sum(finding.level == level for finding in self.findings)

    def summary(self) -> str:
        failed, warned = self._count("failure"), self._count("warning")
        if not failed and not warned:
            return "all is well"
        return f"{_number(failed, 'failure')}, {_number(warned, 'warning')}"

    def as_json(self) -> dict[str, Any]:
        head = None
        if self.head is not None:
            with_token = self.head.with_token
            head = asdict(self.head) | {
                "without_token": self.head.without_token.value,
                "with_token": with_token.value if with_token else None,
            }
        return {
            "has_failed": self.has_failed,
            "findings": [asdict(finding) for finding in self.findings],
            "head": head,
            "nodes": [asdict(node) for node in self.nodes],
        }


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def render(examination: Examination) -> str:
    """A line for each finding, and one below it with the mend. Names come from other machines and are made safe."""
    return "".join(f"{line}\n" for line in _lines(examination))


def _lines(examination: Examination) -> Iterator[str]:
    width = max((len(one_line(finding.where)) for finding in examination.findings), default=0)
    for finding in examination.findings:
        yield f"{MARKS[finding.level]:8}{one_line(finding.where):{width}}  {one_line(finding.what)}"
        if finding.mend:
            yield f"{'':8}{'':{width}}  -> {one_line(finding.mend)}"
    yield examination.summary()
