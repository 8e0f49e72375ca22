"""The clients' folder on a host: nobody else leads a client to a file of its user's."""

import os
import stat
from pathlib import Path

import pytest

from federation.launch.network import LaunchError
from federation.launch.place import place_on_host
from federation.launch.process_group import process_group


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the temporary folder of a machine, in which everybody may write."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def folder(temporary: Path) -> Path:
    return temporary / f"federation-clients-{os.getuid()}"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_folder_and_log_are_private_and_places_differ(temporary: Path) -> None:
    with place_on_host() as (first, log), place_on_host() as (second, other), process_group(log, warm_starts=False):
        assert (first[-2:], second[-2:]) == ("/0", "/1")
        assert log.parent == other.parent == folder(temporary)
        assert (mode(log.parent), mode(log)) == (0o700, 0o600)
    with place_on_host() as (again, _):
        assert again == first


def test_the_runtime_folder_of_a_user_is_taken_if_it_is_private(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(temporary / "user"))
    with place_on_host() as (_, log):
        assert log.parent == folder(temporary), "as after su or sudo: it is not there"
    (temporary / "user").mkdir(mode=0o700)
    with place_on_host() as (_, log):
        assert log.parent == temporary / "user" / "federation-clients" and mode(log.parent) == 0o700
    (temporary / "user").chmod(0o755)
    with place_on_host() as (_, log):
        assert log.parent == folder(temporary)


@pytest.mark.parametrize("kind", ["link", "file", "mode", "owner"])
def test_a_folder_that_others_have_a_hand_in_is_refused(temporary: Path, kind: str) -> None:
    planted = folder(temporary)
    if kind == "link":
        (temporary / "elsewhere").mkdir(mode=0o700)
        planted.symlink_to(temporary / "elsewhere")
    elif kind == "file":
        planted.touch(0o600)
    else:
        planted.mkdir(0o700)
    if kind == "mode":
        planted.chmod(0o770)
    elif kind == "owner":
        if os.getuid():
            pytest.skip("only root gives files away")
        os.chown(planted, 12345, 12345)
    with pytest.raises(LaunchError, match=f"^{planted} is not your own folder .* remove it"), place_on_host():
        pass
    assert [path.name for path in temporary.glob("*/*")] == []


def test_a_folder_that_others_could_only_read_is_closed_to_them(temporary: Path) -> None:
    folder(temporary).mkdir()
    folder(temporary).chmod(0o755)
    with place_on_host() as (_, log):
        assert log.parent == folder(temporary) and mode(log.parent) == 0o700


def test_no_log_is_opened_through_a_link(temporary: Path) -> None:
    victim = temporary / "victim"
    victim.write_text("precious")
    with place_on_host() as (_, log):
        log.symlink_to(victim)
        refused = pytest.raises(LaunchError, match=f"cannot open the log {log}: it is a symbolic link; remove it")
        with refused, process_group(log, warm_starts=False):
            pass
    assert victim.read_text() == "precious"


def test_what_jax_compiles_is_kept_for_a_run_unless_the_user_names_a_folder(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    with place_on_host() as (_, log), process_group(log, warm_starts=False) as ours:
        assert ours.environment["JAX_COMPILATION_CACHE_DIR"] == str(ours.home / "jax")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/mine")
    with place_on_host() as (_, log), process_group(log, warm_starts=False) as ours:
        assert ours.environment["JAX_COMPILATION_CACHE_DIR"] == "/mine"
