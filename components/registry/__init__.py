"""The model registry in MLflow: versions, gates, the history of champions, what is shown of them."""
