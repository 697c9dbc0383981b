"""Warm steps: a process that has the imports forks a step on this machine, in place of a new one.

Importing torch, transformers and numba takes seconds, more than a small round. The engine starts
one server for all its local deployments. The `crossfl` command hands its arguments, environment,
folder and streams to it, over a socket in a folder that is its user's alone, and waits. Where the
two do not fit, or there is no server, the command runs the step itself, as without one.
"""
