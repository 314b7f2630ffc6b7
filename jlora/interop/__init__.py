"""Adapters that others have trained, read onto jlora's models."""
