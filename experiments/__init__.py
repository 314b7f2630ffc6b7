"""Experiments: configs in, numbers, tables and plots out. Nothing in `jlora` imports from here."""
