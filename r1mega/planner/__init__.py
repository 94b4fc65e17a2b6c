"""Arithmetic on architectures: what a model costs. Nothing here needs torch."""
