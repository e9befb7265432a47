"""Trust as people and programs read it: rows of experts, the table that is shown, and the exported files."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from experts.trust import ASPECTS, TrustSettings, TrustTable, aspect_scores, trust_scores
from experts.trust_ledger import TrustIdentity
from extraction.errors import one_line
from gateway.errors import OptionInvalid


class TrustRow(NamedTuple):
    """One expert: scores in [0, 1], 0.5 where nothing was observed, and how many observations there were."""

    component: str
    layer: int
    expert: int
    trust: float
    convergence: float
    stability: float
    efficiency: float
    convergence_observations: int
    stability_observations: int
    efficiency_observations: int

    @property
    def num_observations(self) -> int:
        return self.convergence_observations + self.stability_observations + self.efficiency_observations


def trust_rows(table: TrustTable, settings: TrustSettings) -> list[TrustRow]:
    """All experts, by layer and number."""
    shape = (len(ASPECTS), -1)
    trust_N = trust_scores(table, settings).ravel().tolist()
    scores_AN = aspect_scores(table, settings).reshape(shape).tolist()
    counts_AN = table.counts_ALE.reshape(shape).tolist()
    places = ((layer, expert) for layer in table.layers for expert in range(table.num_experts))
    columns = zip(places, trust_N, *scores_AN, *counts_AN, strict=True)
    return [TrustRow(table.component, *place, *numbers) for place, *numbers in columns]


def render_trust(path: Path, table: TrustTable, rows: list[TrustRow], num_shown: int) -> RenderableType:
    """The most and the least trusted of the experts that were observed."""
    seen = sorted((row for row in rows if row.num_observations), key=lambda row: -row.trust)
    head = f"{path}\n{table.component}: {len(seen)} of {len(rows)} experts observed over {table.num_tokens} tokens"
    lines: list[RenderableType] = [Text("\n".join(map(one_line, head.split("\n"))))]
    if not seen:
        return Group(*lines, "Every expert is at 0.5: nothing was learned yet.")
    lines += ["", _table("Most trusted", seen[:num_shown])]
    if len(seen) > num_shown:
        lines += ["", _table("Least trusted", seen[: -num_shown - 1 : -1])]
    return Group(*lines)


def _table(title: str, rows: list[TrustRow]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("layer", "expert", "trust", *ASPECTS, "observations"):
        table.add_column(column, justify="right")
    for row in rows:
        scores = (f"{score:.3f}" for score in (row.trust, row.convergence, row.stability, row.efficiency))
        table.add_row(str(row.layer), str(row.expert), *scores, str(row.num_observations))
    return table


def trust_as_json(identity: TrustIdentity, table: TrustTable, rows: list[TrustRow]) -> dict[str, Any]:
    return {
        "store_hash": identity.store_hash,
        "quantisation": identity.quantisation,
        "tokens": table.num_tokens,
        "experts": [row._asdict() for row in rows],
    }


def encode_trust(file_name: str, identity: TrustIdentity, table: TrustTable, rows: list[TrustRow]) -> bytes:
    """The bytes of an export, in the format that the file's name ends with. Raises OptionInvalid for another."""
    suffix = Path(file_name).suffix.lower()
    if suffix == ".json":
        return (json.dumps(trust_as_json(identity, table, rows), indent=1) + "\n").encode()
    if suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(TrustRow._fields)
        writer.writerows(rows)
        return text.getvalue().encode()
    if suffix == ".parquet":
        columns = {
            name: np.array(values)
            for name, values in zip(TrustRow._fields, zip(*rows, strict=True), strict=True)
        }
        metadata = {"store_hash": identity.store_hash, "quantisation": identity.quantisation}
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(columns).replace_schema_metadata(metadata), sink)
        return bytes(sink.getvalue().to_pybytes())
    raise OptionInvalid("OUTPUT", f"must end with .json, .csv or .parquet, not {suffix or 'nothing'!r}")
