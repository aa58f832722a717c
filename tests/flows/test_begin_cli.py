"""The first minutes: a configuration that is made for a model and a corpus, and what is there afterwards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from components import steps
from components.run.config import load_config, parse_config
from components.run.specification import resolve
from flows.cli import app


def called(capfd: pytest.CaptureFixture, *arguments: str, code: int = 0, answers: str | None = None) -> str:
    result = CliRunner().invoke(app, list(arguments), input=answers)
    out, err = capfd.readouterr()
    assert result.exit_code == code, (out, err, result.output)
    return out + err + result.output


def test_a_first_configuration_fits_its_model_and_says_what_it_takes(
    tiny_model: str, text_corpus: str, tmp_path: Path, capfd: pytest.CaptureFixture
):
    file = tmp_path / "My first one.yaml"
    said = called(capfd, "init", str(file), "--model", tiny_model, "--corpus", text_corpus)
    assert f"sae run {file}" in said.replace("\n", "")
    config = load_config(str(file))
    assert (config.name, config.corpus.paths) == ("my-first-one", (text_corpus,))
    run = resolve(config)
    assert run.hook_point == "resid_post.1"  # of two blocks
    assert run.d_sae == 8 * 32
    ours, best = (
        one.sae.model_dump(exclude={"k", "expansion_factor", "decoder_bias_init"})
        for one in (config, load_config("quickstart"))
    )
    assert ours == best  # how features begin, above all
    assert config.sae.decoder_bias_init == "geometric_median"
    assert config.corpus.context_length <= (run.model.longest_text or 256)
    assert "there already" in called(capfd, "init", str(file), "--model", tiny_model, "--corpus", text_corpus, code=2)


def test_what_is_not_given_is_asked_for(tmp_path: Path, capfd: pytest.CaptureFixture):
    called(capfd, "init", str(tmp_path / "asked.yaml"), answers="\n\n")
    config = load_config(str(tmp_path / "asked.yaml"))
    assert (config.language_model.name, config.corpus.source) == ("builtin/stdlib-llama", "standard_library")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--model", "builtin/none", "--corpus", "."], "there is no 'builtin/none'"),
        (["--model", "builtin/stdlib-llama", "--corpus", "/nowhere/*.txt"], "corpus.paths"),
        (["--model", "builtin/stdlib-llama", "--corpus", "/nowhere/*.txt", "--budget", "huge"], "--budget: 'huge'"),
        (["--model", "builtin/stdlib-llama", "--corpus", "x", "--hook-point", "resid_post.9"], "layers 0 to 5"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_file(
    options: list[str], sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture
):
    assert sentence in called(capfd, "init", str(tmp_path / "my.yaml"), *options, code=2)
    assert not (tmp_path / "my.yaml").exists()


def test_runs_are_listed_whatever_became_of_them(tiny_tree: dict, capfd: pytest.CaptureFixture):
    root = tiny_tree["storage"]["root"]
    assert "no SAE" in called(capfd, "runs", "--root", root)
    run = resolve(parse_config(tiny_tree))
    steps.extract(run)
    record = steps.train(run)
    (row,) = json.loads(CliRunner().invoke(app, ["runs", "--root", root, "--json"]).stdout or capfd.readouterr().out)["saes"]
    assert (row["state"], row["d_sae"], row["tokens"], row["metrics"]) == ("trained", 64, record.tokens, {})
    measured = steps.evaluate(run)
    said = called(capfd, "runs", "--root", root)
    assert "evaluated" in said
    assert f"{measured.metrics['l0']:.4g}" in said
    (Path(run.sae_url) / "training.json").write_text("{")
    said = called(capfd, "runs", "--root", root)
    assert f"{run.sae_url}/training.json is damaged" in said
