"""What may be chosen about trust, and the ledger on this machine that follows from it.

Imports no PyTorch: the supervisor keeps trust for its routers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from experts.trust import TrustSettings
from experts.trust_ledger import TrustIdentity, TrustLedger, ledger_path

LAYERS_A_LOOK = 48
"""Of so many layers that are computed one is looked at, but no more than one a pass. To look at one takes longer than
the layer of a small model; this is the share that a model of 48 layers is looked at with every pass."""


@dataclass(frozen=True)
class TrustOptions:
    """What a user may choose about trust."""

    state_folder: str
    """Where ledgers are kept."""
    settings: TrustSettings = field(default_factory=TrustSettings)
    layers_a_look: int = LAYERS_A_LOOK
    """How seldom a layer is looked at."""


def open_local_ledger(identity: TrustIdentity, options: TrustOptions) -> TrustLedger:
    """Raises LedgerBusy or LedgerUnusable."""
    return TrustLedger(
        ledger_path(Path(options.state_folder), identity.store_hash), identity, options.settings
    )
