"""Turns a published checkpoint into an expert store. Imports nothing of the other packages."""
