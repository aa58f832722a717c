"""What a finished training leaves: the coder in SAELens' format, and then the record that says that it is whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import sha256

import torch

from components import storage
from components.interop.saelens import WEIGHTS_NAME, saelens_files
from components.training.batches import Statistics
from components.training.job import Training, TrainingRecord, read_training_record, record_url
from components.training.step import CoderInTraining


def put_artifact(
    job: Training,
    training: CoderInTraining,
    reads: Sequence[Statistics],
    writes: Sequence[Statistics],
    device: torch.device,
    tokens_per_second: float | None,
    waiting_for_data: float | None,
    still_owned: Callable[[], None],
) -> TrainingRecord:
    """Put the artifact's files and then the record; the record that is there where another process was first."""
    folded = training.coder.cpu().folded([column.scale for column in reads], [column.scale for column in writes])
    files = saelens_files(folded, job.metadata)
    for name, content in files.items():
        still_owned()
        storage.put_bytes(content, storage.join(job.url, name))
    record = TrainingRecord(
        digest=job.digest,
        identity=job.identity,
        architecture=job.coder.architecture,
        d_in=folded.d_in,
        d_out=folded.d_out,
        d_sae=folded.d_sae,
        activation_scale=reads[0].scale,
        weights_sha256=sha256(files[WEIGHTS_NAME]).hexdigest(),
        steps=job.steps,
        tokens=job.steps * job.settings.batch_size,
        device=str(device),
        tokens_per_second=tokens_per_second,
        waiting_for_data=waiting_for_data,
        curves=training.curves,
    )
    still_owned()
    storage.put_json_once(record.model_dump(mode="json"), record_url(job.url))
    committed = read_training_record(job.url)
    assert committed is not None
    return committed
