"""Reads expert records, keeps them under a byte budget, and computes them, here or behind a socket."""
