"""Cross-facility federated learning of foundation models, as CWL steps."""

__version__ = "0.1.0"
