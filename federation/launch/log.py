"""What the processes of a server or client print: lines for people, on the terminal, and all lines, in a log file."""

import json
import logging
import re
import sys
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import IO, NoReturn

from tqdm import tqdm

from federation.app.console import CONTROL, PREFIX, without_colours

REMEMBERED = 1000  # lines, among which the reason of a failure is looked for
LEVEL = re.compile(r"(?:\d\S+Z )?(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b *:? *")  # as Flower or uvicorn begins a line
ERROR = re.compile(r"\w(Error|Exception)\b|^the run failed: ")


@dataclass
class Style:
    """How this process prints lines: as its command line has asked for."""

    as_json: bool = False
    verbose: bool = False  # all lines on the terminal, not only those for people

    def set(self, log_format: str, verbose: bool) -> None:
        self.as_json, self.verbose = log_format == "json", verbose

    @property
    def shows_progress(self) -> bool:
        return sys.stderr.isatty() and not self.as_json and not self.verbose


style = Style()


class Form(logging.Formatter):
    """A line with its time, in ISO 8601 with milliseconds, and its level."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="milliseconds")
        if style.as_json:
            line = {"time": time, "level": record.levelname, "message": record.getMessage()}
            return json.dumps(line, ensure_ascii=False)
        return f"{time} {record.levelname} {record.getMessage()}"


form = Form()


def read(line: str) -> logging.LogRecord:
    """Return a printed line without its colours, level and time: these are in the record."""
    text = without_colours(line).rstrip().removeprefix(PREFIX)
    found = LEVEL.match(text)
    level = logging.DEBUG if text.startswith(CONTROL) else logging.ERROR if ERROR.search(text) else logging.INFO
    if found:
        level = logging.getLevelNamesMapping()[found[1]]
        text = text if line.startswith(PREFIX) else text[found.end() :]
    return logging.LogRecord("federation", level, "", 0, text, None, None)


def say(line: str) -> None:
    """Print a line for people."""
    print(form.format(read(PREFIX + line)) if style.as_json else line.rstrip("\n"), flush=True)


class Progress:
    """A bar below the lines of a process. It appears with the first count: most processes never have one."""

    bar: "tqdm[NoReturn] | None" = None

    def show(self, done: int, total: int, doing: str) -> None:
        if self.bar is None and style.shows_progress:
            self.bar = tqdm(leave=False, bar_format="{desc} {bar} {n}/{total}", initial=done, total=total, desc=doing)
        elif self.bar is not None:
            self.bar.n, self.bar.total = done, total
            self.bar.set_description_str(doing)

    def clear(self) -> None:
        """Make room for a line; the bar comes back with the next count."""
        if self.bar is not None:
            self.bar.clear()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Log:
    """A log file. What cannot be written is left out: where a disk is full, the run itself says so, better."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.name = file, file.name
        self.handler = logging.StreamHandler(file)
        self.handler.setFormatter(form)
        self.handler.handleError = lambda record: None  # type: ignore[method-assign]
        self.last: deque[logging.LogRecord] = deque(maxlen=REMEMBERED)

    def write(self, line: str) -> None:
        """Add a line that a process has printed."""
        record = read(line)
        if not record.msg:
            return
        self.handler.handle(record)
        self.last.append(record)
        if style.verbose and not line.startswith((PREFIX, CONTROL)):
            print(form.format(record), flush=True)

    def flush(self) -> None:
        with suppress(OSError):
            self.file.flush()

    def clear(self) -> None:
        """Forget all lines, in the file, too."""
        self.file.seek(0)
        self.file.truncate()
        self.last.clear()

    def last_error(self) -> str:
        """Return what the log says last, without the frames that Flower puts around it."""
        lines = [(record.levelno, record.getMessage().strip(" │")) for record in self.last]
        lines = [(level, text) for level, text in lines if text and text[0] not in "╭╰"]
        named = [text for _, text in lines if ERROR.search(text)]
        errors = named or [text for level, text in lines if level >= logging.ERROR]
        return f"{(errors or [text for _, text in lines] or ['it printed nothing'])[-1]} (all is in {self.name})"
