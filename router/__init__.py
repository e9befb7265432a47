"""Holds the backbone and the KV cache, routes tokens to experts, and runs the engine's steps."""
