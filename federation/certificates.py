"""`python -m federation.certificates`: see security/certificates.py."""

from federation.launch.command import run_command
from federation.security.certificates import command

if __name__ == "__main__":
    run_command(command)
