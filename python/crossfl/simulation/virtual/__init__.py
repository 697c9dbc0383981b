"""A federation in virtual time: queues, jobs and the server's own decisions, without waiting."""
