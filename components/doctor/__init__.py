"""What a run relies on, as far as it can be checked without MLflow and Prefect. `sae doctor` runs it."""
