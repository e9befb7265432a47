"""What can go wrong with experts: computing them, reading them from a store, reaching them over the wire."""

from __future__ import annotations


class ExpertError(Exception):
    """Root of the experts' errors."""


# Computing


class BudgetTooSmall(ExpertError):
    """The budget cannot hold even one expert of this store."""

    def __init__(self, budget_bytes: int, expert_bytes: int) -> None:
        super().__init__(budget_bytes, expert_bytes)
        self.budget_bytes, self.expert_bytes = budget_bytes, expert_bytes

    def __str__(self) -> str:
        return f"budget of {self.budget_bytes} bytes is below one expert ({self.expert_bytes} bytes)"


class NotInGroup(ExpertError):
    """A worker was asked for an expert of another group."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"{self.key} does not belong to this worker's group"


class NotRowInvariant(ExpertError):
    """On this machine a row's bits depend on its neighbours, so exact output cannot be promised."""

    def __init__(self, kernel: str, dtype: str) -> None:
        super().__init__(kernel, dtype)
        self.kernel, self.dtype = kernel, dtype

    def __str__(self) -> str:
        return f"self-test failed: {self.kernel} in {self.dtype} gives a row other bits beside other rows"
