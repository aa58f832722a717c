"""Arithmetic that a training step needs and no more: products over the features that fire."""
