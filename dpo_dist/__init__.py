"""Multi-node direct preference optimization: prepare, reference, train, export, verify."""

__version__ = "0.1.0"
