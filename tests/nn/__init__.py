"""The drop-in modules."""
