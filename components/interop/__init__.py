"""Coders that leave the project, and coders that others made."""
