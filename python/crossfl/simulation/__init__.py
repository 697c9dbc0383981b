"""Federations without an engine."""
