"""What training costs, and what it shows."""
