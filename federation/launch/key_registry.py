"""Register the public keys in a folder with the SuperLink: the clients that have these keys may join."""

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from federation.launch.log import say
from federation.launch.process_group import ProcessGroup, find_program

LOOK = 2  # seconds after which the folder is read again


class KeyRegistry:
    """Keeps the SuperLink's registered public keys in sync with a folder of files NAME.pub."""

    def __init__(self, ours: ProcessGroup, folder: Path) -> None:
        self.ours, self.folder = ours, folder
        self.nodes: dict[str, int] = {}  # by public key; 0 for a key that was refused

    def update(self) -> None:
        """Register keys that were added to the folder, and unregister those that were removed."""
        keys = {_key(path): path for path in sorted(self.folder.glob("*.pub"))}
        new = [key for key in keys if key not in self.nodes]
        with ThreadPoolExecutor(4) as several:  # each call takes a second or two
            self.nodes |= zip(new, several.map(self.add, [keys[key] for key in new]), strict=True)
        for key in [key for key in self.nodes if key not in keys]:
            if self.remove(self.nodes[key]):  # otherwise it can still join, so try again next time
                del self.nodes[key]

    def show(self) -> None:
        known = sum(node != 0 for node in self.nodes.values())
        say(f"{known} {'key' if known == 1 else 'keys'} may join, of {self.folder}")

    def watch(self) -> None:
        """Update forever, and print the number of keys when it changes."""
        while True:
            time.sleep(LOOK)
            before = set(self.nodes)
            self.update()
            if self.nodes.keys() != before:
                self.show()

    def add(self, path: Path) -> int:
        try:
            path.read_text("utf-8")
        except (OSError, ValueError) as error:
            result: dict[str, Any] = {"error-message": error}
        else:
            result = self.flwr("register", str(path))
        if not result.get("success"):
            say(f"{path} is skipped: {result.get('error-message', 'it is not a public key')}")
        return int(result.get("node-id", 0))

    def remove(self, node: int) -> bool:
        result = self.flwr("unregister", str(node)) if node else {"success": True}
        return bool(result.get("success")) or "Node ID not found" in str(result.get("error-message"))

    def flwr(self, *command: str) -> dict[str, Any]:
        """Run `flwr supernode …` and return its result."""
        line = find_program(["flwr", "supernode", *command, "ours", "--format", "json"], self.ours.environment)
        result = subprocess.run(
            line, env=self.ours.environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        try:
            return dict(json.loads(result.stdout))
        except ValueError:
            return {"error-message": " ".join((result.stdout + result.stderr).split())}


def _key(path: Path) -> str:
    """Return a public key without its comment, or the path if the file cannot be read."""
    try:
        return " ".join(path.read_text("utf-8").split()[:2])
    except (OSError, ValueError):
        return str(path)
