"""Looking at every facility before a job is spent."""
