"""The StreamFlow plugin."""
