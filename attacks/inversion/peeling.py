"""A network peeled from its end: what each image of a batch was inside it, layer by layer, as far as gradients tell."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp
from torch.fx import GraphModule, Interpreter, Node, symbolic_trace
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from flpriv.attacks.inversion.head import take_apart
from flpriv.attacks.inversion.inverses import INVERSES
from flpriv.attacks.inversion.patches import Convolution, design, meetings
from flpriv.attacks.inversion.switches import corrected, discover, least_squares

_BITS = 18
_UNKNOWNS = 4096
_RELUS = (functional.relu, torch.relu, "relu", "relu_")
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")


@dataclass(frozen=True, kw_only=True)
class Network:
    """A model as a graph of operations.

    Args:
        graph: of float64, in eval mode.
        shapes: of what each operation puts out for one image.
        sizes: results that are no tensors, e.g. the size of a batch.
        images: for how many images the sizes hold.
    """

    graph: GraphModule
    shapes: Mapping[Node, tuple[int, ...]]
    sizes: Mapping[Node, object]
    images: int

    @property
    def nodes(self) -> list[Node]:
        """The operations in the order they run."""
        return list(self.graph.graph.nodes)

    def module(self, node: Node) -> nn.Module | None:
        """The module that an operation runs."""
        return self.graph.get_submodule(str(node.target)) if node.op == "call_module" else None

    def run(self, node: Node, *tensors: Tensor) -> Tensor:
        """One operation on other tensors than in the graph."""
        given = iter(tensors)

        def replaced(argument: object) -> object:
            if isinstance(argument, Node):
                return next(given) if argument in self.shapes else self.sizes[argument]
            if isinstance(argument, list | tuple):
                return type(argument)(map(replaced, argument))
            return argument

        arguments = [replaced(argument) for argument in node.args]
        named = {name: replaced(argument) for name, argument in node.kwargs.items()}
        module = self.module(node)
        if module is not None:
            out: Tensor = module(*arguments, **named)
        elif isinstance(node.target, str):
            out = getattr(arguments[0], node.target)(*arguments[1:], **named)
        else:
            out = node.target(*arguments, **named)
        return out

    def inputs(self, node: Node) -> list[Node]:
        """The tensors an operation takes in, in order, as often as it takes them."""
        found: list[Node] = []

        def look(argument: object) -> None:
            if isinstance(argument, Node) and argument in self.shapes:
                found.append(argument)
            elif isinstance(argument, list | tuple):
                for one in argument:
                    look(one)

        for argument in (*node.args, *node.kwargs.values()):
            look(argument)
        return found

    def affine(self, node: Node) -> bool:
        """Whether an operation is affine in its tensors, tried on random ones."""
        one, other = self._random(node, seed=1), self._random(node, seed=2)
        ends = self.run(node, *one) + self.run(node, *other)
        middle = self.run(node, *[(a + b) / 2 for a, b in zip(one, other, strict=True)])
        return torch.allclose(2 * middle, ends, rtol=1e-9, atol=1e-9)

    def rearranges(self, node: Node) -> bool:
        """Whether an operation puts out what it took in, in another shape at most."""
        given = self._random(node, seed=1)
        if len(given) != 1:
            return False
        out = self.run(node, *given)
        return out.numel() == given[0].numel() and torch.equal(out.flatten(), given[0].flatten())

    def back(self, node: Node, slopes: Tensor) -> list[Tensor]:
        """The slopes in what an affine operation took in."""
        zeros = [torch.zeros(self.images, *self.shapes[one], dtype=torch.float64) for one in self.inputs(node)]
        return list(vjp(lambda *given: self.run(node, *given), *zeros)[1](slopes))

    def _random(self, node: Node, *, seed: int) -> list[Tensor]:
        rng = torch.Generator().manual_seed(seed)
        return [torch.randn(self.images, *self.shapes[one], generator=rng, dtype=torch.float64) for one in self.inputs(node)]


@dataclass(frozen=True, kw_only=True)
class Inside:
    """What an operation put out for each image.

    Args:
        value: ``(N, *shape)`` float64.
        error: part of the gradient that told it left unexplained; near the rounding of float32 where all went well.
    """

    value: Tensor
    error: float


def network(model: nn.Module, shape: tuple[int, ...], *, images: int) -> Network | None:
    """``model`` in float64 as a graph; ``None`` where it cannot be traced.

    Args:
        model: in eval mode, on the CPU; hooks are left out. Its precision changes.
        shape: of one image.
        images: in a batch.
    """
    try:
        graph = symbolic_trace(model.double().requires_grad_(False))
    except Exception:  # whatever a model's forward method does to a tensor that is none
        return None
    recorder = _Recorder(graph)
    recorder.run(torch.zeros((images, *shape), dtype=torch.float64))
    tensors = {node: value for node, value in recorder.results.items() if isinstance(value, Tensor)}
    return Network(
        graph=graph,
        shapes={node: tuple(value.shape[1:]) for node, value in tensors.items()},
        sizes={node: value for node, value in recorder.results.items() if node not in tensors},
        images=images,
    )


class _Recorder(Interpreter):
    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self.results: dict[Node, object] = {}

    def run_node(self, n: Node) -> Any:
        self.results[n] = super().run_node(n)
        return self.results[n]


def peel(net: Network, moved: Mapping[str, Tensor], labels: Tensor) -> dict[Node, Inside]:
    """What operations put out for each image, as far as it is told, in the order of the graph; empty without a dense end.

    The last dense layer is taken apart (:mod:`.head`). Slopes then go down through the operations; each convolution or dense
    layer whose slopes are known gives up what it took in, as the solution of a linear system, if that determines it; and what a
    ReLU put out tells which slopes go on. It ends where systems are open, and at operations like max pooling whose slopes
    depend on inputs nobody knows.

    Args:
        net: see :func:`network`.
        moved: gradient of the mean loss in each parameter, float64, up to scale.
        labels: ``(N,)``.
    """
    return _Peeling(net=net, moved=moved).run(labels)


@dataclass(kw_only=True)
class _Peeling:
    net: Network
    moved: Mapping[str, Tensor]
    known: dict[Node, Inside] = field(default_factory=dict)
    slopes: dict[Node, Tensor] = field(default_factory=dict)
    lost: set[Node] = field(default_factory=set)

    def run(self, labels: Tensor) -> dict[Node, Inside]:
        net, nodes = self.net, self.net.nodes
        last = nodes[-1].args[0]
        if not isinstance(last, Node) or not self._start(last, labels):
            return {}
        for node in reversed(nodes[: nodes.index(last)]):
            if node.op in ("placeholder", "get_attr") or node not in net.shapes:
                continue
            if node in self.lost or node not in self.slopes:
                self.lost.update(net.inputs(node))
            else:
                self._through(node)
        return {node: self.known[node] for node in nodes if node in self.known}

    def _start(self, last: Node, labels: Tensor) -> bool:
        """Take the last layer apart."""
        layer, name = self.net.module(last), str(last.target)
        if not isinstance(layer, nn.Linear) or not {f"{name}.weight", f"{name}.bias"} <= self.moved.keys():
            return False
        head = take_apart(layer.weight, layer.bias, self.moved[f"{name}.weight"], self.moved[f"{name}.bias"], labels)
        if head is None or head.error > 1e-3:
            return False
        (below,) = self.net.inputs(last)
        self.known[below] = Inside(value=head.features, error=head.error)
        self._give(below, head.slopes @ layer.weight)
        return True

    def _give(self, node: Node, slopes: Tensor) -> None:
        if node not in self.lost:
            self.slopes[node] = self.slopes[node] + slopes if node in self.slopes else slopes

    def _through(self, node: Node) -> None:
        """From the slopes in what an operation put out to those in what it took in, and to that itself."""
        net, module, slopes = self.net, self.net.module(node), self.slopes[node]
        activation = self._activation(node)
        if activation is not None:
            (below,) = net.inputs(node)
            steep = self._steep(node, activation)
            if steep is None:
                self.lost.add(below)
            else:
                self._give(below, slopes * steep)
            return
        if not net.affine(node):
            self.lost.update(net.inputs(node))
            return
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            (below,) = net.inputs(node)
            if below not in self.known and (solved := self._solved(node, module, slopes)) is not None:
                self.known[below] = solved
        elif node in self.known and net.rearranges(node):
            (below,) = net.inputs(node)
            known = self.known[node]
            self.known.setdefault(below, replace(known, value=known.value.view(net.images, *net.shapes[below])))
        for below, given in zip(net.inputs(node), net.back(node, slopes), strict=True):
            self._give(below, given)

    def _activation(self, node: Node) -> nn.Module | None:
        module = self.net.module(node)
        if type(module) in INVERSES:
            return module
        return nn.ReLU() if node.target in _RELUS else None

    def _steep(self, node: Node, activation: nn.Module) -> Tensor | None:
        """The slope of an activation for each of its outputs."""
        rectifies = isinstance(activation, nn.ReLU)
        if node in self.known:
            out = self.known[node].value
            if not rectifies:
                inside, told = INVERSES[type(activation)](activation, out)
                if not bool(told.all()):
                    return None
                slope: Tensor = jvp(lambda value: activation(value.clone()), (inside,), (torch.ones_like(inside),))[1]
                return slope
            steep = (out > 2 * out.clamp_max(0).abs().max()).double()
        elif rectifies:
            steep = None
        else:
            return None
        return self._told_under(node, steep)

    def _told_under(self, node: Node, steep: Tensor | None) -> Tensor | None:
        """The switches of a ReLU, put right or found by the gradient of the first convolution under it."""
        waiting = [(below, self.slopes[node]) for below in self.net.inputs(node)]
        for place, slopes in waiting:
            module, name = self.net.module(place), str(place.target)
            if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and f"{name}.weight" in self.moved:
                met = _met(module, self.net.shapes[self.net.inputs(place)[0]])
                if met is None:
                    continue
                moved = self.moved[f"{name}.weight"].flatten(2)
                inputs = prod(self.net.shapes[self.net.inputs(place)[0]][1:])
                if steep is not None and self.net.images * inputs > _UNKNOWNS:
                    return steep
                if steep is not None:
                    return corrected(steep.flatten(2), slopes.flatten(2), moved, met, inputs=inputs).view(slopes.shape)
                found = discover(slopes.flatten(2), moved, met, inputs=inputs, bits=_BITS)
                return found.view(slopes.shape) if found is not None else None
            if isinstance(module, _BatchNorm | nn.Identity) or place.target in _SUMS:
                waiting += zip(self.net.inputs(place), self.net.back(place, slopes), strict=True)
        return steep

    def _solved(self, node: Node, layer: nn.Module, slopes: Tensor) -> Inside | None:
        """What a layer took in."""
        net, moved = self.net, self.moved.get(f"{node.target}.weight")
        shape = net.shapes[net.inputs(node)[0]]
        if moved is None or (isinstance(layer, nn.Linear) and len(shape) > 1):
            return None
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            met, size = _met(layer, shape), prod(shape[1:])
            if met is None or net.images * size > min(_UNKNOWNS, len(moved) * len(met)):
                return None
            system, wanted = design(slopes.flatten(2), met, size), moved.flatten(2).transpose(1, 2).flatten(0, 1)
        else:
            system, wanted = slopes.T, moved
        solved = least_squares(system, wanted)
        if solved is None:
            return None
        error = float((system @ solved - wanted).norm() / wanted.norm().clamp_min(1e-300))
        return Inside(value=solved.T.reshape(shape[0], net.images, *shape[1:]).transpose(0, 1), error=error)


def _met(layer: Convolution, shape: tuple[int, ...]) -> Tensor | None:
    try:
        return meetings(layer, shape[1:])
    except ValueError:
        return None
