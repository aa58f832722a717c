"""MLflow runs. Nothing but tracking, registry and doctor imports mlflow."""
