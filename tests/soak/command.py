"""A training run by the command, disturbed: it must end with the bits of the run that nobody disturbed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from models.training import build, checkpoint
from models.training.run import CHECKPOINT, METRICS, WEIGHTS

ROOT = Path(__file__).parents[2]
NETWORKS = ("cnn18_thin", "resnet18_thin", "resnet_init18_thin", "rir18_thin")
DISTURBANCES = 6  # at most, then the run may end
ORDERLY, FAILED, INTERRUPTED = 0, 2, 130  # exit statuses
GARBAGE = b"\x00" * 100
LIMIT = 600  # seconds of one command


def live(chance, folder: Path, log, *, device: str, impl: str) -> None:
    """AssertionError where the run is not what it would have been."""
    arguments = [
        f"--model={chance.choice(NETWORKS)}",
        f"--recipe={chance.choice(('paper', 'fast'))}",
        f"--seed={chance.randrange(1000)}",
        "--option=depth=1,1,1",
        "--epochs=3",
        f"--impl={impl}",
        f"--device={device}",
        "--deterministic",
        *chance.choice(([], ["--no-augment"], ["--batch-size=48"], ["--quantize=W4A4"])),
    ]
    whole, disturbed = folder / "whole", folder / "disturbed"
    begin = time.monotonic()
    assert _status(_train(whole, *arguments)) == ORDERLY
    length = time.monotonic() - begin
    log("trained", seconds_whole=round(length, 1), arguments=arguments)

    place, first = (0, 0), True
    for _ in range(DISTURBANCES):
        process = _train(disturbed, *(arguments if first else ["--resume"]))
        what = chance.choice(("kill", "kill", "terminate", "interrupt"))
        _disturb(process, what, chance.uniform(0.2, 1.1) * length)
        status = _status(process)
        assert status in _STATUSES[what], f"{what}: exit status {status}"
        log(what, status=status)
        first = not (disturbed / CHECKPOINT).exists()
        if first:
            continue
        place = _look(disturbed, place, log)
        if chance.random() < 0.3:
            (disturbed / f"{CHECKPOINT}.part").write_bytes(GARBAGE)  # as a kill in the middle of a write leaves it
        if (disturbed / WEIGHTS).exists():
            break
    else:
        assert _status(_train(disturbed, *(arguments if first else ["--resume"]))) == ORDERLY
    _look(disturbed, place, log)
    assert (whole / WEIGHTS).read_bytes() == (disturbed / WEIGHTS).read_bytes(), "other weights than undisturbed"
    assert _lines(whole) == _lines(disturbed), "other metrics than undisturbed"
    log("same bits", place=place)


_STATUSES = {  # 0: it had come to its end before
    "kill": (-signal.SIGKILL, ORDERLY),
    "terminate": (INTERRUPTED, ORDERLY, -signal.SIGTERM),  # the last: before the command listened
    "interrupt": (INTERRUPTED, ORDERLY, -signal.SIGINT, 1),  # while Python was importing
}
_SIGNALS = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}


def _train(out, *arguments):
    argv = [sys.executable, "-m", "models.train", "--out", str(out), "--checkpoint-every=0", *arguments]
    return subprocess.Popen(
        argv,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    )


def _disturb(process, what, delay):
    try:
        process.wait(delay)
    except subprocess.TimeoutExpired:
        process.send_signal(_SIGNALS[what])


def _status(process):
    try:
        said, _ = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise AssertionError(f"the command did not end within {LIMIT} s") from None
    if process.returncode == FAILED:
        raise AssertionError(f"the command failed: {said.decode(errors='replace')[-2000:]}")
    return process.returncode


def _look(folder, before, log):
    """The checkpoint can be loaded and evaluated, and is not older than the one before; its place in the run."""
    facts = checkpoint.load_facts(folder / CHECKPOINT)
    place = facts["position"]["epoch"], facts["position"]["step"]
    assert place >= before, f"at {place} after {before}"
    assert len(facts["records"]) == place[0]
    model, _ = build.load(folder / CHECKPOINT)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values()), "weights that are not finite"
    log("looked at", place=place)
    return place


def _lines(folder):
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    for line in lines:
        del line["seconds"]
    return lines
