"""The finished runs of a study in a JSON file, so that it goes on where it was interrupted."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from federation.app.run_folder import write_atomically

FOLDER = Path("runs/benchmarks")  # for the results


def load_cells(path: Path) -> dict[str, Any]:
    """Return the finished cells of a study by name; none if it has not begun."""
    return dict(json.loads(path.read_text("utf-8"))) if path.exists() else {}


def save_cells(path: Path, cells: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(cells, indent=1) + "\n"
    write_atomically(path, lambda unfinished: unfinished.write_text(text, "utf-8"))
