"""`python -m federation.compare`: see tools/compare.py."""

from federation.launch.command import run_command
from federation.tools.compare import command

if __name__ == "__main__":
    run_command(command)
