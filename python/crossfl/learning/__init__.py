"""Models, data and the training loop."""
