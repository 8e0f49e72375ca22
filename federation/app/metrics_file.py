"""The text of metrics.json: a line for each round, which is encoded once, however often the file is written."""

import json
from collections.abc import Mapping
from typing import Any

LONG = {"partitions", "roster", "now", "left_out"}  # each on a line of its own: they have an entry for each client


class MetricsText:
    """Encodes the metrics of one run, whose rounds only become more."""

    def __init__(self) -> None:
        self.rounds: list[str] = []

    def encode(self, metrics: Mapping[str, Any]) -> str:
        """Return metrics as JSON, one key per line at least."""
        entries = (f"  {json.dumps(key)}: {self._value(key, value)}" for key, value in metrics.items())
        return "{\n" + ",\n".join(entries) + "\n}\n"

    def _value(self, key: str, value: Any) -> str:
        if key == "rounds" and value:
            self.rounds += map(json.dumps, value[len(self.rounds) :])
            return "[\n    " + ",\n    ".join(self.rounds) + "\n  ]"
        return json.dumps(value) if key in LONG else json.dumps(value, indent=2).replace("\n", "\n  ")
