"""Imported by Ray in every process that it starts for a service, before it gives it work.

`cluster.resources` names it to Ray. Imports nothing that takes time.
"""

from __future__ import annotations

from cluster.light_start import start_lightly

start_lightly()
