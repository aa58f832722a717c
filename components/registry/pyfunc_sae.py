"""The coder as MLflow loads it: this file goes into the registered model and runs there, without this project.

Input: activations `[n, d_in]`, as the language model makes them. Output: `features` `[n, d_sae]` and `reconstruction`
`[n, d_out]`. `cfg.json` names the architecture as SAELens does: how features are read, and for a coder that writes elsewhere
also `skip` and `transcoder` or `crosscoder`.
"""

import json
from pathlib import Path

import mlflow
import numpy as np
from mlflow.pyfunc import PythonModel
from safetensors.numpy import load_file

ARCHITECTURES = ("standard", "topk", "jumprelu", "gated")
ELSEWHERE = ("skip", "transcoder", "crosscoder")
PLAIN = {"apply_b_dec_to_input": False, "normalize_activations": "none", "rescale_acts_by_decoder_norm": False}


class SAE(PythonModel):
    def load_context(self, context):
        folder = Path(context.artifacts["sae"])
        self.config = json.loads((folder / "cfg.json").read_text())
        kinds = [part for part in self.config["architecture"].split("_") if part not in ELSEWHERE] or ["standard"]
        if len(kinds) > 1 or kinds[0] not in ARCHITECTURES:
            accepted = ", ".join((*ARCHITECTURES, *ELSEWHERE))
            raise ValueError(f"cfg.json: architecture is '{self.config['architecture']}'; accepted is {accepted}")
        self.kind = kinds[0]
        for name, value in PLAIN.items():
            # SAELens takes the bias away from the input unless it is told not to.
            if self.config.get(name, name == "apply_b_dec_to_input" or value) != value:
                raise ValueError(f"cfg.json: {name} is {self.config.get(name)!r}; accepted is {value!r}")
        self.weights = load_file(folder / "sae_weights.safetensors")

    def predict(self, context, model_input: np.ndarray, params=None):
        x = np.asarray(model_input, dtype=np.float32)
        features = self.encode(x)
        written = features @ self.weights["W_dec"] + self.weights["b_dec"]
        if "W_skip" in self.weights:
            written = written + x @ self.weights["W_skip"].T
        return {"features": features, "reconstruction": written}

    def encode(self, x):
        weights, architecture = self.weights, self.kind
        if architecture == "gated":
            before = x @ weights["W_enc"]
            magnitudes = np.maximum(before * np.exp(weights["r_mag"]) + weights["b_mag"], 0.0)
            return np.where(before + weights["b_gate"] > 0, magnitudes, np.float32(0.0))
        before = x @ weights["W_enc"] + weights["b_enc"]
        features = np.maximum(before, 0.0)
        if architecture == "jumprelu":
            return np.where(before > weights["threshold"], features, np.float32(0.0))
        if architecture == "topk":
            k = min(self.config["k"], before.shape[1])
            places = np.argpartition(before, before.shape[1] - k, axis=1)[:, before.shape[1] - k :]
            kept = np.zeros_like(features)
            np.put_along_axis(kept, places, np.take_along_axis(features, places, axis=1), axis=1)
            return kept
        return features


mlflow.models.set_model(SAE())
