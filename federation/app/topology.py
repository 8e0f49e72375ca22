"""Who averages with whom where no server does: the graph of a round, and the weights of its mixing matrix."""

from collections.abc import Iterable, Sequence

import numpy as np

Graph = dict[int, set[int]]  # the neighbours of each client
Mixing = dict[int, dict[int, float]]  # a row of the matrix for each client: its own weight, and its neighbours'


def graph(topology: str, clients: Iterable[int], neighbours: int, seed: int, server_round: int) -> Graph:
    """Return the undirected graph of a round in which `clients` take part; who does not is no one's neighbour.

    "ring" joins each client to the next, "full" to all others. "random" is drawn anew for each round, from `seed`:
    each client has as many `neighbours` as asked for, or all others if there are not so many; where both this number
    and that of the clients are odd, one client has one less. Except for a single neighbour each, it is connected.
    """
    order = sorted(clients)
    most = len(order) - 1
    if topology == "ring":
        return _joined(order, 2, [])
    if topology == "full":
        return _joined(order, most, [])
    random = np.random.default_rng([seed, server_round])
    degree = min(neighbours, most)
    shuffled = [order[place] for place in random.permutation(len(order))]
    steps = random.permutation(np.arange(2, _half(len(order), degree) + 1))
    return _joined(shuffled, degree, [int(step) for step in steps])


def _half(count: int, degree: int) -> int:
    """Return the longest step round a circle of `count` that gives every client two neighbours of the same graph."""
    return (count - 1) // 2 - (degree % 2 and count % 2)  # with both odd, the longest one makes the pairs


def _joined(circle: Sequence[int], degree: int, steps: Sequence[int]) -> Graph:
    """Join each client to those that are 1 and some further `steps` away from it round a circle (a circulant graph).

    Without steps to choose from, these are 2, 3, and so on. An odd degree adds pairs across the circle.
    """
    count, joined = len(circle), {client: set[int]() for client in circle}
    lengths = [1, *(steps or range(2, count))][: degree // 2]
    edges = [(place, (place + length) % count) for length in lengths for place in range(count)]
    edges += [(place, place + count // 2) for place in range(count // 2)] if degree % 2 else []
    for one, other in edges:
        if one != other:
            joined[circle[one]].add(circle[other])
            joined[circle[other]].add(circle[one])
    return joined


def metropolis(graph: Graph) -> Mixing:
    """Return the mixing matrix W with W_ij = 1 / (1 + max(d_i, d_j)) for neighbours of d_i and d_j neighbours.

    W_ii is what is left of 1. So W is symmetric and doubly stochastic on every graph (Xiao and Boyd 2004, Metropolis
    weights): averaging keeps the mean of all models, and moves them towards it.
    """
    rows = {}
    for client, others in graph.items():
        row = {other: 1 / (1 + max(len(others), len(graph[other]))) for other in sorted(others)}
        rows[client] = {client: 1 - sum(row.values()), **row}
    return rows
