"""How a run goes on after a failure."""
