"""MLflow: runs, figures, registry. Nothing else in the project imports mlflow."""

from pathlib import Path


def pyfunc_path() -> Path:
    """The file that is stored with every registered SAE and runs it."""
    return Path(__file__).parent / "pyfunc_sae.py"
