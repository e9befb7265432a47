"""`make demo` and `make demo-kill`."""
