"""Bringing a facility into a federation."""
