"""`python -m federation.check`: see tools/check.py."""

from federation.launch.command import run_command
from federation.tools.check import command

if __name__ == "__main__":
    run_command(command)
