"""What tests of a GPU have in common: they are marked `gpu`, and elsewhere skipped with the reason."""

from __future__ import annotations

import pytest

from experts.devices import why_no_cuda

WHY_NOT = why_no_cuda()
GPU = [pytest.mark.gpu, pytest.mark.skipif(WHY_NOT is not None, reason=f"needs a GPU: {WHY_NOT}")]
