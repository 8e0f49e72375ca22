"""`python -m federation.compare` and `federate compare`: see tools/compare.py."""

from typing import Annotated

import click

from federation.launch.command_line import misuse, options, run_script

Option = options()


def compare(
    task: Annotated[str | None, Option(metavar="MODULE", help="what to train (default: cifar)")] = None,
    data: Annotated[str | None, Option(metavar="DIR", help="its data (default: the script's own choice)")] = None,
    clients: Annotated[int | None, Option(metavar="N", help="(default: 10)")] = None,
    rounds: Annotated[int | None, Option(metavar="N", help="(default: 6)")] = None,
    run_config: Annotated[str, Option(metavar="'KEY=VALUE …'", help="any keys, as for server")] = "",
    strategies: Annotated[str, Option(metavar="'NAME, …'", help="further ones, each a row: 'fedprox, scaffold'")] = "",
    seeds: Annotated[int | None, Option(metavar="N", help="how often, with another seed each (default: 3)")] = None,
    out: Annotated[str | None, Option(metavar="DIR", help="for compare.json, .png (default: runs/compare)")] = None,
    quick: Annotated[bool, Option("--quick", help="embedded data, 2 clients, 2 rounds, 1 seed, no gap")] = False,
) -> int:
    """Compare centralized, local and federated training.

    Is it the same training? All of them train one task, side by side. A comparison that was interrupted is continued.

    \b
    federate compare --data DIR
    federate compare --quick          a taste of it, in about two minutes
    federate compare --strategies "fedprox proximal_mu=0.1, scaffold"
    """
    if seeds is not None and seeds < 1:
        raise click.UsageError(f"--seeds {seeds}: 1 or more is needed")
    from federation.app.config import parse, validate  # here, so that --help need not wait for Flower
    from federation.tools import compare as tool

    keys = {"task": task, "data": data, "num-clients": clients, "num-server-rounds": rounds, "out": out}
    with misuse():
        given = {key: value for key, value in keys.items() if value is not None} | parse(run_config)
        config = validate((tool.QUICK if quick else tool.FULL) | given)
        further = tool.read_strategies(config, strategies)
    return tool.compare(config, seeds or (1 if quick else 3), quick, further)


if __name__ == "__main__":
    run_script(compare)
