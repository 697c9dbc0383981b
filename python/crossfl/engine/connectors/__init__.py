"""How the engine reaches a facility."""
