"""The register of keys: the same as the folder, whatever comes into it and whatever leaves. `flwr` is played."""

import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from federation.launch import key_registry
from federation.launch.key_registry import KeyRegistry

FLWR = """#!/bin/sh
# Registers a key ending in a number as the node of that number, as Flower does: by what the file says, not its name.
echo "$*" >> "$CALLS"
[ ! -e "$DOWN" ] || { echo "cannot connect" >&2; exit 1; }
gone='{"success": false, "error-message": "Node ID not found for account."}'
[ "$2 $3" != "unregister 404" ] || { echo "$gone"; exit 1; }
[ "$2" != unregister ] || { echo "{\\"success\\": true, \\"node-id\\": $3}"; exit; }
read -r kind key comment < "$3"
case "$kind $key" in
  ecdsa*) echo "{\\"success\\": true, \\"node-id\\": ${key#AAAA}}";;
  odd*) echo "not what was expected:"; echo "  no JSON" >&2;;
  *) echo '{"success": false, "error-message": "Invalid public key"}'; exit 1;;
esac
"""


class Played:
    """A folder of keys, a register of it, and the calls of `flwr` since the last look at them."""

    def __init__(self, root: Path) -> None:
        self.folder, self.calls, self.down = root / "clients", root / "calls", root / "down"
        self.folder.mkdir()
        (root / "bin").mkdir()
        (root / "bin" / "flwr").write_text(FLWR)
        (root / "bin" / "flwr").chmod(stat.S_IRWXU)
        path = f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "CALLS": str(self.calls), "DOWN": str(self.down)}
        self.register = KeyRegistry(SimpleNamespace(environment=environment), self.folder)  # type: ignore[arg-type]

    def put(self, name: str, key: str) -> Path:
        path = self.folder / f"{name}.pub"
        path.write_text(f"{key} {name}\n")
        return path

    def update(self) -> list[str]:
        """Let the register look into the folder; return which calls it made, in any order."""
        self.calls.write_text("")
        self.register.update()
        calls = self.calls.read_text().splitlines()
        assert all(call.startswith("supernode ") and call.endswith(" ours --format json") for call in calls), calls
        short = (call.removeprefix("supernode ").removesuffix(" ours --format json") for call in calls)
        return sorted(call.replace(f"{self.folder}{os.sep}", "") for call in short)

    def known(self) -> set[int]:
        return {node for node in self.register.nodes.values() if node}


@pytest.fixture
def played(tmp_path: Path) -> Played:
    return Played(tmp_path)


def key(number: int) -> str:
    return f"ecdsa-sha2-nistp384 AAAA{number}"


def test_what_is_in_the_folder_is_registered_once(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(1, 8):
        played.put(f"client{number}", key(number))
    (played.folder / "ca.crt").write_text("no key, and not taken for one")
    assert played.update() == [f"register client{number}.pub" for number in range(1, 8)]
    assert played.update() == []
    assert played.known() == set(range(1, 8))
    played.register.show()
    assert capsys.readouterr().out == f"7 keys may join, of {played.folder}\n"


def test_what_comes_is_registered_and_what_leaves_is_removed(played: Played) -> None:
    berlin = played.put("berlin", key(11))
    assert played.update() == ["register berlin.pub"]
    berlin.unlink()
    played.put("paris", key(12))
    assert played.update() == ["register paris.pub", "unregister 11"]
    assert played.known() == {12}
    played.put("berlin", key(11))
    assert played.update() == ["register berlin.pub"], "it may come back"
    assert played.known() == {11, 12}


def test_a_key_that_is_replaced_may_not_join_any_more(played: Played) -> None:
    played.put("berlin", key(11))
    played.update()
    played.put("berlin", key(12))
    assert played.update() == ["register berlin.pub", "unregister 11"]
    assert played.known() == {12}


def test_a_key_is_known_by_what_it_is_and_not_by_its_file_or_its_comment(played: Played) -> None:
    path = played.put("berlin", key(11))
    played.update()
    path.rename(path.with_name("rome.pub")).write_text(f"  {key(11)}   another comment\n\n")
    assert played.update() == []
    assert played.known() == {11}


def test_two_files_with_the_same_key_count_once(played: Played, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("berlin", "paris"):
        played.put(name, key(11))
    assert len(played.update()) == 1
    played.register.show()
    assert capsys.readouterr().out == f"1 key may join, of {played.folder}\n"
    (played.folder / "paris.pub").unlink()
    assert played.update() == [], "the key is there still"
    (played.folder / "berlin.pub").unlink()
    assert played.update() == ["unregister 11"]


def undecodable(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00 no text")


def folder(path: Path) -> None:
    path.mkdir()


def gone(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_text("no key\n"), "Invalid public key"),
        (lambda path: path.touch(), "Invalid public key"),
        (lambda path: path.write_text("odd thing\n"), "not what was expected: no JSON"),
        (undecodable, "can't decode"),
        (folder, "Is a directory"),
        (gone, "No such file"),
    ],
    ids=["another text", "empty", "an odd answer", "no text", "a folder", "a broken link"],
)
def test_a_bad_key_is_reported_once_and_left_out_and_disturbs_no_other(
    played: Played, spoil: Callable[[Path], object], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = played.folder / "bad.pub"
    spoil(bad)
    good = played.put("good", key(11))
    played.update()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{bad} is skipped: ") and reason in line
    assert played.known() == {11}
    good.unlink()
    assert played.update() == ["unregister 11"], "it goes on to watch"
    bad.rename(bad.with_suffix(".old"))
    assert played.update() == [], "a key that was refused is not registered, and so not removed"
    played.put("bad", key(12))
    assert played.update() == ["register bad.pub"], "once it is a key, it is taken"
    assert capsys.readouterr().out == ""


def test_a_key_is_not_forgotten_before_it_is_removed(played: Played) -> None:
    """Or it could go on to join, although its file has left the folder."""
    berlin = played.put("berlin", key(11))
    played.update()
    berlin.unlink()
    played.down.touch()
    assert played.update() == ["unregister 11"]
    assert played.known() == {11}
    assert played.update() == ["unregister 11"], "it is tried again"
    played.down.unlink()
    assert played.update() == ["unregister 11"]
    assert played.known() == set()
    assert played.update() == []


def test_a_node_that_the_superlink_has_not_is_removed_once(played: Played) -> None:
    berlin = played.put("berlin", key(404))
    played.update()
    berlin.unlink()
    assert played.update() == ["unregister 404"]
    assert played.update() == []


def test_a_folder_that_is_gone_lets_nobody_join(played: Played) -> None:
    played.put("berlin", key(11))
    played.update()
    played.folder.rename(played.folder.with_name("moved"))
    assert played.update() == ["unregister 11"]


def test_who_watches_says_who_comes_and_goes_and_nothing_while_nobody_does(
    played: Played, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    berlin = played.put("berlin", key(11))
    meanwhile = [lambda: None, lambda: played.put("paris", key(12)), lambda: None, berlin.unlink, lambda: None]
    steps = iter(meanwhile)
    monkeypatch.setattr(key_registry, "time", SimpleNamespace(sleep=lambda _: next(steps)()))  # the time that passes
    played.register.update()
    with pytest.raises(StopIteration):
        played.register.watch()
    lines = [f"2 keys may join, of {played.folder}", f"1 key may join, of {played.folder}"]
    assert capsys.readouterr().out.splitlines() == lines
