"""Prefect flows and the command `sae`: wiring only. What they call is in `components`."""
