"""TensorBoard: event files in the run folder."""

import struct
import sys
import time
from pathlib import Path
from typing import Any

from tensorboard.compat import tf
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from federation.tracking.run import Run

if "tensorflow" not in sys.modules:  # TensorBoard would import it, which takes seconds, only to write files
    sys.modules["tensorflow"] = None  # type: ignore[assignment]
    tf.io  # noqa: B018 (from now on, TensorBoard uses its stand-in)
    del sys.modules["tensorflow"]

PNG_SIZE = slice(16, 24)  # bytes of a PNG file: its width and height


class Tracker:
    """A folder of event files, named after the time when it was made."""

    def open(self, run: Run, known: str | None, sent: int) -> tuple[str, int]:
        known = known or time.strftime("%Y-%m-%dT%H-%M-%S")
        folder = run.folder / "tensorboard" / known
        self.where = f"tensorboard --logdir {run.folder}"
        self.writer = EventFileWriter(str(folder))
        # What was written after round `sent` and never noted is sent once more: TensorBoard then drops the first
        self._write(sent, session_log=SessionLog(status=SessionLog.START))
        self._write(sent, summary=hparams_pb(run.parameters, trial_id=run.identity))
        rows = (f"| {name} | {value} |" for name, value in run.parameters.items())
        self._write(sent, summary=text_pb("config", "\n".join(["| key | value |", "|---|---|", *rows])))
        return known, sent

    def send(self, number: int, values: dict[str, float], time: float) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(number, time, summary=Summary(value=scalars))
        self.writer.flush()

    def close(self, run: Run) -> None:
        last = len(run.rounds) - 1
        for path in run.pictures:
            self._write(last, summary=Summary(value=[Summary.Value(tag=path.stem, image=_image(path))]))
        models = "\n".join(f"- {path}" for path in run.models)
        self._write(last, summary=text_pb("models", models or "none"))
        self._write(last, summary=text_pb("status", run.status))
        self.writer.close()

    def _write(self, step: int, wall_time: float | None = None, **content: Any) -> None:
        self.writer.add_event(Event(wall_time=wall_time or time.time(), step=step, **content))


def _image(path: Path) -> Any:
    png = path.read_bytes()
    width, height = struct.unpack(">II", png[PNG_SIZE])
    return Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
