"""A configuration is right or refused in one sentence that names field, value and what is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from components.run.config import RunConfig, flattened, load_config, parse_config, shipped_configs
from components.settings import UserError, digest


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return str(path)


def test_every_shipped_configuration_is_valid():
    assert "quickstart" in shipped_configs()
    for name in shipped_configs():
        assert isinstance(load_config(name), RunConfig)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("trainig: {}", ["trainig", "no such field", "training"]),
        ("training: {token: 5}", ["training.token", "no such field", "tokens"]),
        ("training: {tokens: many}", ["training.tokens", "'many'", "integer"]),
        ("sae: {d_sae: 0}", ["sae.d_sae", "0", "greater than or equal to 1"]),
        ("sae: {d_sae: 8, expansion_factor: 2}", ["sae.d_sae", "expansion_factor"]),
        ("corpus: {source: files}", ["corpus.paths", "files"]),
        ("corpus: {held_out_fraction: 1.5}", ["corpus.held_out_fraction", "1.5", "less than 1"]),
        ("activations: {dtype: float8}", ["activations.dtype", "float8", "bfloat16"]),
        ("tracking: {uri: 'http://user:secret@host'}", ["tracking.uri", "password"]),
        ("- a list", ["mapping"]),
        ("name: [", ["not YAML"]),
        ("training: 5", ["training", "5"]),
    ],
)
def test_bad_input_is_one_sentence_with_the_field(tmp_path: Path, text: str, parts: list[str]):
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text))
    message = str(caught.value)
    assert "\n" not in message
    assert "secret" not in message
    for part in parts:
        assert part in message


def test_a_missing_file_names_what_ships():
    with pytest.raises(UserError, match=r"nowhere\.yaml.*quickstart"):
        load_config("nowhere.yaml")


def test_overrides_reach_nested_fields_with_yaml_values(tmp_path: Path):
    path = write(tmp_path, "training: {tokens: 5}")
    config = load_config(
        path, ["training.tokens=2_000_000", "training.learning_rate=1e-4", "activations.hook_points=[mlp_out.0]"]
    )
    assert config.training.tokens == 2_000_000
    assert config.training.learning_rate == 1e-4
    assert config.activations.hook_points == ("mlp_out.0",)


@pytest.mark.parametrize("override", ["training.tokens", "=5", "name.x.y=1", "training.tokens=[1"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str):
    with pytest.raises(UserError):
        load_config(write(tmp_path, "name: x"), [override])


def test_every_field_has_a_line_of_documentation():
    def visit(model, path=""):
        for name, field in model.model_fields.items():
            nested = field.annotation if isinstance(field.annotation, type) else None
            if nested is not None and hasattr(nested, "model_fields"):
                visit(nested, f"{path}{name}.")
            else:
                assert field.description, f"{path}{name} says nothing of what it means"

    visit(RunConfig)


def test_flattened_names_every_leaf_once():
    leaves = flattened(RunConfig().model_dump(mode="json"))
    assert leaves["sae.sparsity_coefficient"] == 5.0
    assert leaves["activations.hook_points"] == ["resid_post.1"]
    assert parse_config({}).training.tokens == leaves["training.tokens"]


def test_a_digest_depends_on_content_and_not_on_order():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})


def test_the_language_model_was_trained_with_the_default_split():
    from components.language_model.pretraining import HELD_OUT_FRACTION

    assert RunConfig().corpus.held_out_fraction == HELD_OUT_FRACTION
    assert load_config("quickstart").corpus.held_out_fraction == HELD_OUT_FRACTION


def test_a_configuration_on_an_object_store_without_keys_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"'nowhere/config.yaml': there are no keys for the object store.*AWS_ACCESS_KEY_ID"):
        load_config("s3://nowhere/config.yaml")


@pytest.mark.parametrize("source", ["s3://", "github://a:b@c/d", "n" * 5_000, "/dev/zero", "/dev/null/x", "a\nb", ""])
def test_what_is_no_configuration_is_one_sentence(source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError) as refused:
        load_config(source)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 2_100


def test_runs_of_one_name_have_different_titles():
    quickstart = load_config("quickstart")
    assert quickstart.title.startswith("quickstart: batchtopk x8 k 12, resid_post.1, 2,000,000 tokens, ")
    changes = ["sae.k=13", "seed=1", "training.learning_rate=1e-3", "corpus.train_tokens=5", "sae.auxk=3", "rerun=again"]
    titles = [load_config("quickstart", [change]).title for change in changes]
    assert len({quickstart.title, *titles}) == 1 + len(changes)
    # where it is stored and which machine does it is no other configuration
    assert load_config("quickstart", ["storage.root=elsewhere", "device=cpu", "execution.workers=2"]).title == quickstart.title
