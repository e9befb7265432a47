"""What an operator of a cluster asks: `sage-moe join`, `doctor` and `status`."""
