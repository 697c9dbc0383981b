"""Which facilities take part in the next round, and what each is asked to do."""
