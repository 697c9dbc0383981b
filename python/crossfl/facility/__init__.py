"""What happens where the data is."""
