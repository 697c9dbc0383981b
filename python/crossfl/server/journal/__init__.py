"""Finished rounds on disk, so that a run goes on."""
