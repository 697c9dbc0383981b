"""What PBS and Slurm answer about a job: typed records with limits, for the VM and the facility."""
