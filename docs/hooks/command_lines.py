"""Make the page of the command lines from what `federate --help` and its commands print."""

import sys
from pathlib import Path

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the project, which need not be installed

from federation.__main__ import NAME, command_line

URI = "reference/commands.md"
ABOUT = """# Command lines

What each command prints with `--help`. They can also be called [without being
installed](../your_own_script.md#check-your-script-and-run-it), and end with an [exit
status](../failures.md#exit-status).
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page."""
    command = command_line()
    with click.Context(command, info_name=NAME, **command.context_settings) as context:
        sections = [_section(NAME, command.get_help(context))]
        for name in command.list_commands(context):
            one = command.commands[name]
            with click.Context(one, context, info_name=name, terminal_width=100) as below:
                sections.append(_section(f"{NAME} {name}", one.get_help(below)))
    files.append(File.generated(config, URI, content="\n".join([ABOUT, *sections])))
    return files


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text}\n```\n"
