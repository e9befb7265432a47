"""One generation in this process, without Ray or HTTP."""
