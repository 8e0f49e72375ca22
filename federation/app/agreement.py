"""Whether the clients, whose partitions make up the server's test set, find of a model what the server finds."""

from collections.abc import Mapping

LOSS = 1e-3  # relative; other hardware, or sums in another order, make less of a difference
ACCURACY = 1e-3  # of all samples, and more than one of them: so many are close enough to two classes to change sides


def disagreement(clients: Mapping[str, float], server: Mapping[str, float], samples: int) -> str:
    """Return a warning if "loss" or "accuracy" on the same `samples` differ by more than rounding, else "".

    Of other metrics, nobody knows whether their mean over clients is their value on all samples.
    """
    names = [name for name in ("loss", "accuracy") if name in clients and name in server]
    apart = {name: abs(clients[name] - server[name]) for name in names}
    if apart["loss"] <= LOSS * abs(server["loss"]) and apart.get("accuracy", 0) <= max(ACCURACY, 1.5 / samples):
        return ""
    found = ", ".join(f"{name} {clients[name]:.4f} and {server[name]:.4f}" for name in apart)
    return (f"warning: clients and server differ on the same {samples:,} test samples: {found}. Does a client run "
            "another script, or hold other data? Or does test() depend on what else is tested (BatchNorm without "
            "net.eval(), a loss that is a sum)?")  # fmt: skip
