"""Text is shown as it is: brackets and colons in names, roots, templates and tokens are no markup of the terminal's."""

from __future__ import annotations

import json
import shlex
import traceback
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flows.cli import app, data, models, tables, terminal

ODD = "[/INST] [bold]x[/] :smile: [link=http://x]"
TEMPLATE = "{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"


def sae(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, "".join(traceback.format_exception(*result.exc_info))
    return result.output


def test_a_dataset_of_a_template_with_brackets_under_a_root_with_brackets_is_shown(
    tiny_tree: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "300")
    root = tmp_path / "ro[/ot] [red]"
    talks = [{"messages": [{"role": "user", "content": f"{number} [/INST] [x]"}]} for number in range(400)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, talks)))
    tiny_tree["storage"] = {"root": str(root)}
    tiny_tree["corpus"] |= {"paths": [str(tmp_path / "t.jsonl")], "messages_column": "messages", "chat_template": TEMPLATE}
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(tiny_tree))
    assert "ro[/ot]" in sae("plan", str(config))
    sae("extract", str(config))
    assert "ro[/ot]" in sae("data", "list", "--root", str(root))
    (dataset,) = (path.name for path in (root / "activations").iterdir() if path.is_dir())
    shown = sae("data", "show", dataset, "--root", str(root))
    assert "[/INST]" in shown
    assert "ro[/ot]" in shown
    assert "[red]" in shown
    sae("data", "check", dataset, "--root", str(root))


def test_what_is_printed_of_runs_checks_and_versions_is_text(capsys: pytest.CaptureFixture):
    metrics = dict.fromkeys(
        ("explained_variance", "l0", "loss_recovered", "dead_fraction", "ce_loss_clean", "ce_loss_sae", "ce_loss_mean",
         "ce_loss_zero", "kl_divergence"), 0.5)  # fmt: skip
    tables.print_summary({
        "name": ODD, "reused": False, "metrics": {**metrics, "evaluation_tokens": 5}, "paths": {"sae": ODD}, "seconds": {},
        "registered_model": ODD, "model_version": 1, "alias": None, "alias_reason": ODD, "mlflow_run": ODD,
        "optional": {},
    }, config="my.yaml --set 'name=a b'", root="s3://bucket/x y")  # fmt: skip
    data._print_check({"problems": [ODD], "strangers": [ODD]})
    models._print_gates({"champion": ODD, "gates": [
        {"gate": ODD, "passed": False, "measured": ODD, "required": ODD, "short_by": None}]})  # fmt: skip
    models._print_list({"models": [{"name": ODD, "versions": []}]})
    said = capsys.readouterr().out
    assert said.count("[/INST]") >= 10
    # what to do next, ready for a shell
    assert "sae ui my.yaml --set 'name=a b'\n" in said
    assert f"sae models show {shlex.quote(ODD)}/1 --root 's3://bucket/x y'\n" in said
    assert said.count(":smile:") >= 8


def test_every_command_prints_through_the_one_console():
    folder = Path(terminal.__file__).parent
    assert [path.name for path in sorted(folder.parent.rglob("*.py")) if "Console(" in path.read_text()] == ["terminal.py"]
