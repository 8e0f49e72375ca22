"""What FedProx and SCAFFOLD add to the gradients while a task's own train() runs, by hooks: the script stays as it is.

A hook sees a parameter's gradient in each backward pass, before any optimizer does. A script that makes several
backward passes for one step of its optimizer has the correction in each of them.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

Values = Mapping[str, NDArray[Any]]


def parameters(net: Any) -> dict[str, Any]:
    """Return the parameters of a torch.nn.Module that are trained, by name."""
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


@contextmanager
def proximal(net: Any, mu: float) -> Iterator[None]:
    """Add the gradient of mu / 2 * |w - w_0|^2 to that of each loss, where w_0 are the weights that `net` has now.

    This is the proximal term of FedProx (Li et al. 2020, equation 2).
    """
    with _removed([parameter.register_hook(_pull(parameter, mu)) for parameter in parameters(net).values()]):
        yield


@contextmanager
def _removed(handles: Iterable[Any]) -> Iterator[None]:
    """Remove hooks at the end of a block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _pull(parameter: Any, mu: float) -> Any:
    start = parameter.detach().clone()

    def hook(gradient: Any) -> Any:
        nonlocal start
        start = start.to(gradient.device)  # train() may have moved the net to a GPU since
        return gradient + mu * (parameter.detach() - start)

    return hook


class ControlVariates:
    """A client of SCAFFOLD, option II: trains with g - c_i + c, and makes the c_i of its next round.

    The paper's c_i+ = c_i - c + (x - y) / (K * eta), for K steps of plain SGD of the length eta, is the mean of the
    gradients g of these steps. That mean is taken here, so that the script's rate, momentum and weight decay, which the
    formula would mistake for gradients, need not be known.
    """

    def __init__(self, net: Any, server: Values, own: Values) -> None:
        """`server` is c by name; `own` is c_i, empty in a client's first round."""
        self.net, self.server = net, server
        self.own = {name: own.get(name, np.zeros_like(value)) for name, value in server.items()}
        self.sums: dict[str, Any] = {}
        self.steps: dict[str, int] = {}

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Correct the gradients of `net`. Raises ValueError where none has been computed."""
        torch = sys.modules["torch"]
        handles = []
        for name, parameter in parameters(self.net).items():
            if name in self.server:
                shift = torch.from_numpy(self.server[name] - self.own[name]).to(parameter.dtype)
                handles.append(parameter.register_hook(self._hook(name, shift)))
        with _removed(handles):
            yield
        if not self.steps:
            raise ValueError("train() has made no backward pass through the net that it was given")

    def _hook(self, name: str, shift: Any) -> Any:
        def hook(gradient: Any) -> Any:
            nonlocal shift
            shift = shift.to(gradient.device)
            self.sums[name] = self.sums[name] + gradient.detach() if name in self.sums else gradient.detach().clone()
            self.steps[name] = self.steps.get(name, 0) + 1
            return gradient + shift

        return hook

    def renewed(self) -> tuple[ArrayRecord, ArrayRecord]:
        """Return c_i+, the mean gradient, and c_i+ - c_i, which the server adds up.

        An entry without gradients, such as a buffer, keeps its zeros.
        """
        steps = max(self.steps.values())
        means = {name: (total / steps).float().cpu().numpy() for name, total in self.sums.items()}
        new = {name: means.get(name, old) for name, old in self.own.items()}
        return _record(new), _record({name: new[name] - old for name, old in self.own.items()})


def _record(values: Values) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(value)) for name, value in values.items()})
