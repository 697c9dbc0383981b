"""What people watch and read."""
