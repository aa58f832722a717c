"""The SAE as MLflow loads it: this file goes into the registered model and runs there, without this project.

Input: activations `[n, d_in]`, as the language model makes them. Output: `features` `[n, d_sae]` and `reconstruction`
`[n, d_in]`.
"""

import json
from pathlib import Path

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel
from safetensors.numpy import load_file


class SAE(PythonModel):
    def load_context(self, context):
        folder = Path(context.artifacts["sae"])
        config = json.loads((folder / "cfg.json").read_text())
        assert config["architecture"] == "standard", config
        assert not config["apply_b_dec_to_input"], config
        self.weights = load_file(folder / "sae_weights.safetensors")

    def predict(self, context, model_input: np.ndarray, params=None):
        x = np.asarray(model_input, dtype=np.float32)
        features = np.maximum(x @ self.weights["W_enc"] + self.weights["b_enc"], 0.0)
        return {"features": features, "reconstruction": features @ self.weights["W_dec"] + self.weights["b_dec"]}


mlflow.models.set_model(SAE())
