"""Activations that are made while they are trained on, in generations: datasets that come and go."""
