"""What a long command is doing: on a terminal one line that is written over, in a log one line per stage."""

import sys
import time
from typing import Self


class Progress:
    """Call it with ``"stage: detail"``."""

    def __init__(self) -> None:
        self.stage, self.start = "", time.monotonic()

    def __call__(self, line: str) -> None:
        stage, elapsed = line.split(":")[0], time.monotonic() - self.start
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[K{elapsed:4.0f} s  {line}")
        elif stage != self.stage:
            sys.stderr.write(f"{elapsed:4.0f} s  {stage}\n")
        sys.stderr.flush()
        self.stage = stage

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")
