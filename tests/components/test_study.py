"""An Optuna study over a configuration: what it draws, that a kill repeats nothing, and whom pruning gives up."""

from __future__ import annotations

import optuna
import pytest

from components import steps, storage
from components.run.config import parse_config
from components.run.specification import Specification, resolve
from components.settings import UserError
from components.sweeps import study as studies
from components.sweeps.grid import SweepSettings, children
from components.sweeps.space import StudySettings, parse_space
from components.sweeps.work import in_a_process
from components.training.job import Pruned
from components.training.loop import train_together


@pytest.fixture
def base(tiny_tree: dict) -> Specification:
    tiny_tree["sae"] = {"architecture": "batchtopk", "expansion_factor": 2, "k": 4}
    tiny_tree["training"] |= {"tokens": 4_000, "learning_rate": 4e-3, "log_tokens": 256}
    tiny_tree["evaluation"] = {"tokens": 500, "baselines": []}
    return resolve(parse_config(tiny_tree))


class Here:
    """Trains in this process, and remembers what; killed before a child if asked to."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.trained: list[str] = []
        self.killed_at = killed_at

    def __call__(self, groups, give_up):
        for group in groups:
            for child in group:
                if len(self.trained) == self.killed_at:
                    raise KeyboardInterrupt
                self.trained.append(child.run.sae_digest)
                job = [child.run.training()]
                yield [child], train_together(job, child.run.device, lambda _, points, one=child: give_up(one, points))


def drawn(base: Specification, settings: StudySettings) -> list[optuna.trial.FrozenTrial]:
    url = studies.study_url(base, settings)
    place = settings.storage or f"sqlite:///{url}/study.db"
    return optuna.load_study(study_name=studies.study_digest(base, settings), storage=place).trials


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["seed=0..3"], ["seed", "sae and training"]),
        (["sae.kk=3..4"], ["sae.kk", "did you mean 'k'"]),
        (["sae.k=8..4"], ["8..4", "rise"]),
        (["sae.k=0..4:log"], ["0..4", "over 0"]),
        (["sae.k=4..8:linear"], ["low..high:log"]),
        (["sae.k"], ["--space", "field=low..high"]),
        (["sae.d_sae=8..16", "sae.expansion_factor=2,4"], ["d_sae", "expansion_factor"]),
        (["training.tokens=1000..2000"], ["pruner", "training.tokens", "same tokens"]),
    ],
)
def test_what_no_study_can_be_of_is_one_sentence(base: Specification, arguments: list[str], parts: list[str]):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        studies.check_study(base, StudySettings(space=parse_space(arguments), pruner="median"))
    for part in parts:
        assert part in str(error.value)


def test_a_grid_and_a_study_are_one_or_the_other_and_a_password_is_refused():
    for tree in ({}, {"grid": {"sae.k": [1]}, "study": {"space": {"sae.k": [1, 2]}}}):
        with pytest.raises(ValueError, match="a grid or a study"):
            SweepSettings.model_validate(tree)
    with pytest.raises(ValueError, match="PGPASSWORD"):
        StudySettings(space={"sae.k": (1, 2)}, storage="postgresql+psycopg2://me:secret@host/optuna")


def test_a_study_on_an_object_store_needs_a_database(base: Specification):
    moved = base.config.model_copy(update={"storage": base.config.storage.model_copy(update={"root": "s3://bucket/here"})})
    with pytest.raises(UserError, match=r"study\.storage.*postgresql"):
        studies.check_study(base.model_copy(update={"config": moved}), StudySettings(space={"sae.k": (2, 4)}))


def test_a_study_draws_from_its_space_and_knows_what_each_came_to(base: Specification):
    space = parse_space(["sae.k=2..6", "training.learning_rate=1e-3..1e-2:log", "training.adam_betas=[0.9,0.99],[0,0.99]"])
    settings = StudySettings(space=space, trials=3, together=2)
    url, record = studies.study(base, settings, train=Here())
    assert [point.status for point in record.points] == ["finished"] * 3
    for trial, point in zip(drawn(base, settings), record.points, strict=True):
        assert trial.value == point.loss
        assert trial.user_attrs["sae"] == point.sae_digest
        assert point.values["sae.k"] == trial.params["sae.k"] in range(2, 7)
        assert 1e-3 <= point.learning_rate <= 1e-2
        assert point.values["training.adam_betas"] in ([0.9, 0.99], [0, 0.99])
    again = Here()
    assert studies.study(base, settings, train=again) == (url, record)
    assert again.trained == []
    # more of the same study: what is there counts, and what comes is new
    _, more = studies.study(base, settings.model_copy(update={"trials": 4}), train=again)
    assert more.points[:3] == record.points
    assert len({point.sae_digest for point in more.points}) == 4


def test_a_killed_study_goes_on_with_what_it_had_drawn_and_repeats_nothing(base: Specification):
    settings = StudySettings(space=parse_space(["training.learning_rate=1e-3..1e-2:log"]), trials=3, together=2)
    first = Here(killed_at=1)
    with pytest.raises(KeyboardInterrupt):
        studies.study(base, settings, train=first)
    before = drawn(base, settings)
    assert [trial.state.is_finished() for trial in before] == [False, False]
    second = Here()
    _, record = studies.study(base, settings, train=second)
    after = drawn(base, settings)
    assert [trial.params for trial in after][:2] == [trial.params for trial in before]
    assert not set(first.trained) & set(second.trained)
    assert len(first.trained) + len(second.trained) == len(record.points) == 3
    assert all(trial.value is not None for trial in after)


def test_a_child_that_diverges_is_the_worst_there_is_and_the_study_goes_on(base: Specification):
    settings = StudySettings(space=parse_space(["training.learning_rate=4e-3,1e14"]), trials=6, together=3, sampler="random")
    _, record = studies.study(base, settings, train=Here())
    assert {point.learning_rate: point.status for point in record.points} == {4e-3: "finished", 1e14: "diverged"}
    states = {trial.params["training.learning_rate"]: trial.state.name for trial in drawn(base, settings)}
    assert states == {0: "COMPLETE", 1: "PRUNED"}


def test_a_training_that_promises_less_than_the_others_is_given_up(base: Specification, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(studies, "_STARTUP", 1)
    # The last two can only lose: they hardly learn.
    space = {"training.learning_rate": (2e-3, 4e-3, 1e-9, 2e-9)}
    settings = StudySettings(space=space, trials=4, together=1, pruner="median", sampler="random")
    monkeypatch.setattr(optuna.samplers.RandomSampler, "sample_independent", lambda self, study, trial, *_: trial.number)
    _, record = studies.study(base, settings, train=Here())
    assert [point.status for point in record.points] == ["finished", "finished", "pruned", "pruned"]
    assert "given up after" in str(record.points[2].reason)
    assert not storage.list_names(f"{record.points[2].sae_url}/checkpoints")
    again = Here()
    studies.study(base, settings, train=again)
    assert again.trained == []


def test_a_child_process_is_told_which_coder_is_given_up(base: Specification):
    steps.extract(base)
    pair = children(base, {"training.tokens": [400_000, 2_000]})

    def the_long_one(child, points):
        return child.run.config.training.tokens == 400_000

    long, short = in_a_process(pair, the_long_one)
    assert isinstance(long, Pruned)
    assert not isinstance(short, Exception)
