"""`--trace`, `--mask-experts` and `--replay-routing`, as commands share them.

What they do is in `gateway.local.study`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

TraceOption = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads the annotation at run time
    typer.Option(metavar="FILE", help="Write every token's experts and weights to a Parquet file."),
]
MaskOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(metavar="L:E,L:E-E,...", help="Experts that are never chosen, by layer; not native then."),
]
ReplayOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(metavar="FILE", help="Route as this trace did, request by request; not native then."),
]
