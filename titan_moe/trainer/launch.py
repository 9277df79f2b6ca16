"""torchrun, and a last line that says which rank failed and why: ``launch.py [torchrun's arguments]``.

torchrun's report is a page per rank, and may take a rank that lost its peer for the cause, since it goes by
the clocks of the ranks, in whole seconds. run_train.sh calls this file by its path: torchrun itself needs
no torchtitan.
"""

import glob
import re
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from os.path import getmtime

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

# What the others raise when a rank is gone.
_LOST_PEER = r"gloo|NCCL|Dist(Network|Backend|Store)Error|TCPStore|Connection (reset|closed)|Broken pipe"
_ENDED_BY_OTHERS = (signal.SIGTERM, signal.SIGABRT)  # torchrun's to the others; what losing a peer can end in
_TORCHRUN_KILLS_AFTER_S = 30  # those that do not answer its SIGTERM


def main(argv: Sequence[str]) -> None:
    """Exits with torchrun's status."""
    logs = tempfile.mkdtemp(prefix="titan_moe_")
    try:
        run.main(["--log-dir", logs, *argv])
    except ChildFailedError as error:
        rank, failure = _culprit(error.failures)
        found = glob.glob(f"{logs}/*/attempt_*/{failure.local_rank}/stderr.log")
        log = max(found, default=logs, key=getmtime)
        line = f"titan_moe: rank {rank} on {socket.gethostname()} {_fate(failure)} (its log: {log})"
        print(f"{error}\n{line}", file=sys.stderr)
        sys.exit(1)


def _culprit(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    first = min(failure.timestamp for failure in failures.values())
    early = {r: f for r, f in failures.items() if f.timestamp < first + _TORCHRUN_KILLS_AFTER_S - 5}
    return min(early.items(), key=lambda item: (_order(item[1]), item[1].timestamp))


def _order(failure: ProcessFailure) -> int:
    """0 for what surely was a cause, 3 for what surely was a consequence."""
    if failure.exitcode < 0 and -failure.exitcode not in _ENDED_BY_OTHERS:
        return 0
    if said := _said(failure):
        return 3 if re.search(_LOST_PEER, said) else 1
    return 2


def _fate(failure: ProcessFailure) -> str:
    said = _said(failure)
    if said and _order(failure) != 0:
        return f"failed: {said}"
    if failure.exitcode < 0:
        return f"was killed by signal {-failure.exitcode} ({failure.signal_name()})"
    return f"ended with status {failure.exitcode}"


def _said(failure: ProcessFailure) -> str:
    """The first line of the exception, where it was recorded."""
    told = failure.message["message"] if isinstance(failure.message, dict) else ""
    return (told.strip().splitlines() or [""])[0]


if __name__ == "__main__":
    main(sys.argv[1:])
