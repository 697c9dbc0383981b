"""What a person asks of a run from another shell, and what is made of it."""
