"""Training in a process of its own, or in several that torch.distributed.elastic starts: the one place that starts it.

A process can be stopped for certain: by a time limit, by a cancelled run, by the death of whoever waits for it. Asked to
stop, it finishes its step, puts a checkpoint and ends.

Between the two: the work as one line of JSON on standard input, which stays open for as long as the parent lives and says which
coders are given up; messages as lines of JSON on standard output; the log on standard error.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from pydantic import TypeAdapter

from components.settings import UserError
from components.threads import with_patient_threads
from components.training.job import Outcome, Point, Pruned, Training, TrainingRecord
from components.training.loop import Stopped, train_together
from components.training.parallel.ranks import joined
from components.training.settings import RankSettings

GRACE_SECONDS = 5.0
"""What a training that was asked to stop has beyond `training.stop_seconds`, which is for its last checkpoint; then it is
killed. Together 25 s by default: under the 30 after which Prefect kills a cancelled run."""

CONTINUE = 75
"""Exit code of a training that was asked to stop and left a checkpoint: start it again (EX_TEMPFAIL of sysexits.h)."""

_MODULE = "components.training.process"
_LEVEL_END = ": "

logger = logging.getLogger(__name__)


class TrainingTimeout(TimeoutError):
    """Training took longer than it was given; it has been stopped and left a checkpoint."""


def launch(
    work: Training,
    device: torch.device,
    on_points: Callable[[list[Point]], None] = lambda points: None,
    timeout_seconds: float | None = None,
    ranks: RankSettings | None = None,
) -> TrainingRecord:
    """`loop.train` in a process of its own, or in as many as `ranks` says: the record of the finished training.

    Raises what the training raised where it is a UserError or a FloatingPointError, TrainingTimeout after
    `timeout_seconds`, and RuntimeError where the process failed in another way or was killed. One that somebody else asked
    to stop, and that left a checkpoint, is started again. However this call ends, the process has ended before it.
    """
    (outcome,) = launch_together([work], device, lambda _, points: on_points(points), timeout_seconds, ranks)
    if not isinstance(outcome, TrainingRecord):
        raise outcome
    return outcome


def launch_together(
    works: Sequence[Training],
    device: torch.device,
    on_points: Callable[[int, list[Point]], bool | None] = lambda place, points: None,
    timeout_seconds: float | None = None,
    ranks: RankSettings | None = None,
) -> list[Outcome]:
    """`loop.train_together` in a process of its own, see `launch`; what each training came to, in the order of `works`."""
    order: dict[str, Any] = {"works": [json.loads(_TRAINING.dump_json(work)) for work in works], "device": str(device)}
    if ranks is not None and ranks.size > 1:
        order["ranks"] = ranks.model_dump()
    deadline, reached = None if timeout_seconds is None else time.monotonic() + timeout_seconds, -1
    while True:
        try:
            return _launched(order, on_points, deadline, timeout_seconds)
        except _Interrupted as stopped:
            if stopped.step <= reached:  # it gets nowhere
                raise RuntimeError(f"training failed: {stopped}") from None
            reached = stopped.step
            logger.warning("train: %s; it goes on in a new process", stopped)


def _stop_seconds(order: dict[str, Any]) -> float:
    """How long it may take to end once it is asked to."""
    return max(float(work["settings"]["stop_seconds"]) for work in order["works"]) + GRACE_SECONDS


class _Interrupted(Exception):
    """The process was asked to stop, and not by this one."""

    def __init__(self, text: str, step: int) -> None:
        super().__init__(text)
        self.step = step


def _launched(
    order: dict[str, Any],
    on_points: Callable[[int, list[Point]], bool | None],
    deadline: float | None,
    timeout_seconds: float | None,
) -> list[Outcome]:
    own_terminal = sys.stderr.isatty()  # then the progress bar goes there
    process = subprocess.Popen(
        [sys.executable, "-m", _MODULE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if own_terminal else subprocess.PIPE,
        text=True,
        env=with_patient_threads(os.environ),
        start_new_session=True,  # Ctrl-C is the parent's to handle
    )
    assert process.stdin is not None
    assert process.stdout is not None
    last, seconds = dict[str, Any](), _stop_seconds(order)
    try:
        if process.stderr is not None:
            # In this thread's context, by which Prefect knows whose log it is.
            forward = partial(copy_context().run, forward_log, process.stderr)
            threading.Thread(target=forward, name="training-log", daemon=True).start()
        with suppress(BrokenPipeError):  # it ended at once; its exit code says more
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        with _stopped_at(process, deadline, seconds) as overdue:
            for line in process.stdout:
                message = _read(line)
                if message is None:
                    continue
                last = message
                if "points" in last and on_points(last["place"], last["points"]):
                    with suppress(BrokenPipeError):
                        process.stdin.write(json.dumps({"give_up": last["place"]}) + "\n")
                        process.stdin.flush()
            process.wait()
    finally:
        _end(process, seconds)
    if "outcomes" in last:
        return [_outcome(found) for found in last["outcomes"]]
    if overdue.is_set():
        assert timeout_seconds is not None
        raise TrainingTimeout(f"training took more than {timeout_seconds / 60:g} minutes; it continues from its checkpoint")
    if process.returncode == CONTINUE:
        raise _Interrupted(last.get("text", "it was asked to stop"), last.get("step", 0))
    _raise(last, process.returncode)


_TRAINING: TypeAdapter[Training] = TypeAdapter(Training)


def _read(line: str) -> dict[str, Any] | None:
    """A message; None for a line that is cut off where its process was killed."""
    try:
        message: dict[str, Any] = json.loads(line)
    except json.JSONDecodeError:
        return None
    return message


def _outcome(found: dict[str, Any]) -> Outcome:
    for kind in (FloatingPointError, Pruned):
        if kind.__name__ in found:
            return kind(found[kind.__name__])
    return TrainingRecord.model_validate(found)


def _message(outcome: Outcome) -> dict[str, Any]:
    return outcome.model_dump(mode="json") if isinstance(outcome, TrainingRecord) else {type(outcome).__name__: str(outcome)}


@contextmanager
def _stopped_at(process: subprocess.Popen[str], deadline: float | None, seconds: float) -> Iterator[threading.Event]:
    """Stops the process at `deadline` (`time.monotonic`), within `seconds`; the event says that it came to that."""
    overdue = threading.Event()
    if deadline is None:
        yield overdue
        return

    def stop() -> None:
        overdue.set()
        _end(process, seconds)

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), stop)
    timer.daemon = True
    timer.start()
    try:
        yield overdue
    finally:
        timer.cancel()


def _end(process: subprocess.Popen[str], seconds: float) -> None:
    """Ask it to stop, wait for its checkpoint, then make sure."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        logger.warning("train: no end %g s after it was asked to stop; it is killed", seconds)
        process.kill()
        process.wait()


def _raise(message: dict[str, Any], code: int) -> NoReturn:
    kind, text = message.get("error"), message.get("text", "")
    for known in (UserError, FloatingPointError):
        if kind == known.__name__:
            raise known(text)
    if kind is not None:
        raise RuntimeError(f"training failed: {kind}: {text}")
    if code == -signal.SIGKILL:
        raise RuntimeError("the training process was killed (SIGKILL), by hand or because memory ran out")
    raise RuntimeError(f"the training process ended with exit code {code} and said nothing")


def forward_log(stream: IO[str]) -> None:
    """Lines `LEVEL: text` into this process's log; a line without a level belongs to the one before it."""
    level = logging.INFO
    for line in stream:
        name, end, text = line.rstrip("\n").partition(_LEVEL_END)
        if end and name in logging.getLevelNamesMapping():
            level = logging.getLevelNamesMapping()[name]
        else:
            text = line.rstrip("\n")
        logger.log(level, "%s", text)


def main() -> None:
    """The other side."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if sys.stderr.isatty():
        logging.basicConfig(level=logging.WARNING)
    else:
        logging.basicConfig(level=logging.INFO, format=f"%(levelname)s{_LEVEL_END}%(message)s", stream=sys.stderr)
    if len(sys.argv) > 1:
        order = json.loads(Path(sys.argv[1]).read_text())
    else:
        order = json.loads(sys.stdin.readline())
        if "ranks" in order:
            sys.exit(_run_ranks(order))
    given_up: set[int] = set()
    threading.Thread(target=_listen, args=(stop, given_up), name="parent", daemon=True).start()

    # What libraries print (NCCL_DEBUG) is no message: it goes to the log.
    sys.stdout.flush()
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(**message: Any) -> None:
        # A parent that is gone cannot listen; the checkpoint is still wanted.
        with suppress(BrokenPipeError):
            print(json.dumps(message), file=messages, flush=True)

    works, device = [_TRAINING.validate_python(work) for work in order["works"]], torch.device(order["device"])
    speaks = True

    def told(place: int, points: list[Point]) -> bool:
        if speaks:
            say(place=place, points=points)
        return place in given_up

    try:
        with ExitStack() as stack:
            mesh = None
            if "ranks" in order:
                mesh, device = stack.enter_context(joined(RankSettings.model_validate(order["ranks"]), device))
                speaks = mesh.leads
                if not speaks:
                    logging.getLogger().setLevel(logging.ERROR)
                threading.Thread(
                    target=_end_when_stopped, args=(stop, _stop_seconds(order)), name="watchdog", daemon=True
                ).start()
            outcomes = train_together(works, device, told, stop.is_set, mesh)
    except Stopped as stopped:
        if speaks:
            say(error=type(stopped).__name__, text=str(stopped), step=stopped.step)
        sys.exit(CONTINUE)
    except Exception as error:
        if not speaks:
            sys.exit(1)
        if not isinstance(error, UserError | FloatingPointError):
            logger.exception("train: failed")
        say(error=type(error).__name__, text=str(error))
        sys.exit(1)
    if speaks:
        say(outcomes=[_message(outcome) for outcome in outcomes])


def _run_ranks(order: dict[str, Any]) -> int:
    """The processes of a parallel training, each of which is `main` with the order in a file; their exit code."""
    from components.training.parallel.launch import RankFailed, run_ranks

    size = RankSettings.model_validate(order["ranks"]).size
    seconds = _stop_seconds(order) - GRACE_SECONDS / 2
    try:
        return run_ranks(_MODULE, json.dumps(order), size, CONTINUE, seconds)
    except RankFailed as failure:
        # On a line of its own: who was killed may have been in the middle of one.
        print("\n" + json.dumps({"error": type(failure).__name__, "text": str(failure)}), flush=True)
        return 1


def _end_when_stopped(stop: threading.Event, seconds: float) -> None:
    """Stop when what started this process is gone. One that waits for another that is gone, in an exchange that does not end,
    ends here."""
    parent = os.getppid()
    while not stop.wait(1.0):
        if os.getppid() != parent:
            stop.set()
    time.sleep(seconds)
    os._exit(1)


def _listen(stop: threading.Event, given_up: set[int]) -> None:
    """What the parent says meanwhile. Standard input ends when the parent does, however that came about."""
    heard = b""
    while more := os.read(sys.stdin.fileno(), 4096):  # not `sys.stdin`, whose lock would be held when the interpreter ends
        *lines, heard = (heard + more).split(b"\n")
        given_up.update(json.loads(line)["give_up"] for line in lines)
    stop.set()


if __name__ == "__main__":
    main()
