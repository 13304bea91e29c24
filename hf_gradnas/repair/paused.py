"""Forwards of one model that wait for each other: many batches, each as far as the same layer.

A forward runs in a greenlet of its own, and gives the control back wherever one of the gates is
reached. So a layer can be fitted on all batches before any of them goes on, whatever the code
around it is, and each batch runs through the model once. All run in one thread, one at a time.

Knows forwards and hooks; knows nothing of what is done at a gate, and of memory only whose it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any

from greenlet import greenlet
from torch import Tensor, nn

from ..running.hooks import add_hook, add_pre_hook
from ..running.lending import give, lender_of
from .first import Narrow
from .memory import Held, Memory
from .modes import Modes, seed
from .readers import Feed, Gate, Reader, applied, columns_of, late_readers, weight_of
from .repairs import lend_values

BEGIN = -1
"""Number of the gate that a forward is at before it starts."""


class Forward:
    """One forward of the model on one batch.

    Args:
        run: Runs the model.
        is_pruned: Whether it runs with masks.

    Attributes:
        gate: Number of the gate that it waits at; `BEGIN`: it has not started.
        tensor: The tensor at the gate ``(…, features)``, or of maps ``(batch, features, …)``.
        inputs: Per reader that has run, until it leaves the reader's gate, its kept inputs
            ``(…, kept)``; of pruned runs only.
        losses: Per reader that is compared alone, what its output lost.
        result: What `run` returned; None before.
        is_done: Whether it has returned.
        fed: Feeds of new weights that it has come to the input of, with how many of their layers
            are still to run.
        took: What it ran the new weights of, at all places that have them.
        settled: Readers of the gate whose new weights are in `tensor` already.
    """

    def __init__(self, run: Callable[[], Any], *, is_pruned: bool) -> None:
        self._green = greenlet(run)
        self._green.gr_context = copy_context()
        self.is_pruned = is_pruned
        self.gate = BEGIN
        self.tensor: Tensor | None = None
        self.inputs: dict[str, Tensor] = {}
        self.losses: dict[str, Tensor] = {}
        self.result: Any = None
        self.is_done = False
        self.settled = 0
        self.calls: dict[tuple[str, str], int] = {}
        self.unmasked: dict[str, Tensor] = {}
        self.fed: dict[Feed, int] = {}
        self.took: set[Reader | Feed] = set()
        self.held = Held()
        self.loading: list[Any] = []  # calls that it waits in, with the weights of their modules
        self._modes: Modes | None = None

    def go_on(self) -> None:
        """Run as far as the next gate, or to the end."""
        before = Modes.now()
        if self._modes is None:
            seed()
        else:
            self._modes.set()
        try:
            self.tensor, self.settled = None, 0
            result = self._green.switch()
            self._modes = Modes.now()
        finally:
            before.set()
        if self._green.dead:
            self.result, self.is_done = result, True

    def stop(self) -> None:
        """End it where it is; its ``finally`` blocks run."""
        if not self._green.dead and self._green:
            before = Modes.now()
            try:
                self._green.throw()
            finally:
                before.set()
        self.tensor, self.result, self.is_done = None, None, True
        self.inputs, self.losses, self.unmasked, self.fed = {}, {}, {}, {}


class Conductor:
    """Lets forwards of a model run from gate to gate.

    Args:
        model: The model.
        gates: In running order.
        memory_bytes: What waiting forwards may hold in memory; more is spilled.
        folder: Where it is spilled to; None: the system's folder for temporary files.
        narrow: Copies of weights that pruned forwards run with; None: there are none.
        may_wait: Whether the outputs of readers may be left out in pruned forwards, until they wait
            at the gate and the new weights are known: one product less for each.

    Attributes:
        late: Readers whose outputs are left out, with the number of their gate, by path.
        has_missed: Whether a forward went on without an output that was left out, since its layers
            do not run as those of the sample: then it must be run again, without `may_wait`.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: Sequence[Gate],
        *,
        memory_bytes: float,
        folder: str | Path | None = None,
        narrow: Narrow | None = None,
        may_wait: bool = True,
    ) -> None:
        self.model, self.gates = model, gates
        self.late = late_readers(gates) if may_wait else {}
        self.has_missed = False
        self.narrow = narrow or Narrow()
        self._copies, self._lender = self.narrow.given(model), lender_of(model)
        self._current: Forward | None = None
        self._forwards: list[Forward] = []
        self._weights: dict[Feed, Mapping[str, Tensor]] = {}
        self._memory = Memory(bound=memory_bytes, folder=folder)

    @property
    def is_pruned(self) -> bool:
        """Whether what runs now is a pruned forward: masks act in those only."""
        return self._current is not None and self._current.is_pruned

    @contextmanager
    def before_masks(self) -> Iterator[None]:
        """Note what readers that are compared alone are given, within the block."""
        alone = [reader for reader in self._readers() if reader.alone]
        with ExitStack() as stack:
            for reader in alone:
                add_pre_hook(stack, reader.module, partial(self._note_unmasked, reader))
            yield

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook into the model within the block; masks are put on before.

        All forwards end with the block, and what they spilled is removed.
        """
        with ExitStack() as stack:
            stack.callback(self._stop_all)
            for reader in self._readers():
                if reader.path in self.late:
                    add_pre_hook(stack, reader.module, partial(self._leave_out, reader))
                else:
                    add_hook(stack, reader.module, partial(self._note_inputs, reader))
            for path in {gate.place.path for gate in self.gates}:
                self._hook_places(stack, path)
            for gate in self.gates:
                for feed in gate.readers:
                    if isinstance(feed, Feed):
                        for _, module in feed.layers:
                            add_hook(stack, module, partial(self._end_feed, feed))
            yield

    def _readers(self) -> Iterator[Reader]:
        """Readers of all gates."""
        for gate in self.gates:
            yield from (reader for reader in gate.readers if isinstance(reader, Reader))

    def _hook_places(self, stack: ExitStack, path: str) -> None:
        """Watch for the gates at one module."""
        module = self.model.get_submodule(path)
        for side in ("input", "output"):
            numbers = [
                number
                for number, gate in enumerate(self.gates)
                if gate.place.path == path and gate.place.side == side
            ]
            if numbers and side == "input":
                hook = partial(self._enter, path, numbers)
                add_pre_hook(stack, module, hook, with_kwargs=True)
            elif numbers:
                add_hook(stack, module, partial(self._leave, path, numbers))

    def start(self, run: Callable[[], Any], *, is_pruned: bool) -> Forward:
        """A forward that has not begun."""
        forward = Forward(run, is_pruned=is_pruned)
        self._forwards.append(forward)
        self._memory.owners = len(self._forwards)
        return forward

    def go_on(self, forward: Forward) -> None:
        """Run a forward as far as the next gate, or to the end."""
        self.load(forward)
        for reader in self.gates[forward.gate].readers if forward.gate != BEGIN else ():
            forward.inputs.pop(reader.path, None)
            forward.losses.pop(reader.path, None)
        self._current = forward
        try:
            with self._memory.noting(forward.held), ExitStack() as undo:
                if forward.is_pruned:
                    for module, name, make in self._copies:
                        give(module, name, make, undo)
                    for path in self.late:
                        give(self.model.get_submodule(path), "weight", _no_inputs, undo)
                for feed in forward.fed:
                    lend_values(self.model, self._weights[feed], undo)
                undo.enter_context(self._lender.resumed(forward.loading))
                forward.go_on()
        finally:
            self._current = None
        for path in forward.inputs.keys() & self.late.keys():
            self.has_missed |= forward.is_done or self.late[path] < forward.gate

    def feed(self, feed: Feed, weights: Mapping[str, Tensor]) -> None:
        """Give new weights to the layers of a feed, in all pruned forwards that wait at its input.

        Args:
            feed: The feed.
            weights: New parameters by full name; let go of once no forward needs them.
        """
        waiting = [f for f in self._forwards if f.is_pruned and self._is_at(f, feed)]
        for forward in waiting:
            forward.fed[feed] = len(feed.layers)
        if waiting:
            parts = {name: self.narrow.part(name, value) for name, value in weights.items()}
            self._weights[feed] = parts

    def _is_at(self, forward: Forward, feed: Feed) -> bool:
        """Whether a forward waits at the input of a feed."""
        waits = not forward.is_done and forward.gate != BEGIN
        return waits and feed in self.gates[forward.gate].readers

    def rest(self, forward: Forward) -> None:
        """Let a forward wait; what all that wait hold beyond the bound goes to disk.

        Raises:
            RepairError: The disk is full.
        """
        self._memory.rest(forward.held)

    def load(self, forward: Forward) -> None:
        """Have in memory what a forward that waited holds."""
        self._memory.load(forward.held)

    def alone(self) -> AbstractContextManager[Any]:
        """Let the model run by itself within the block, while forwards wait."""
        return self._memory.noting(Held())

    # -- what happens in the forwards ----------------------------------------------------------

    def _note_unmasked(self, reader: Reader, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._current is not None and self._current.is_pruned:
            self._current.unmasked[reader.path] = args[0]

    def _note_inputs(
        self, reader: Reader, module: nn.Module, args: tuple[Any, ...], output: Tensor | None
    ) -> None:
        forward = self._current
        if forward is None or not forward.is_pruned:
            return
        x = args[0]
        is_narrow = not reader.is_conv and x.shape[-1] == len(reader.kept)
        forward.inputs[reader.path] = x if is_narrow else columns_of(x, reader.kept, reader)
        if reader.alone:
            given = forward.unmasked.pop(reader.path)
            forward.losses[reader.path] = applied(
                reader, columns_of(given, reader.lost, reader), weight_of(reader, reader.lost), None
            )

    def _leave_out(
        self, reader: Reader, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        """Keep the inputs of a reader, and give it none, so that it puts out its bias alone."""
        forward = self._current
        if forward is None or not forward.is_pruned:
            return None
        self.has_missed |= reader.path in forward.inputs
        self._note_inputs(reader, module, args, None)
        return (args[0][..., :0], *args[1:])

    def _end_feed(self, feed: Feed, module: nn.Module, args: Any, output: Any) -> None:
        """Note that a forward has come past one more layer of a feed, or the last."""
        forward = self._current
        if forward is None or feed not in forward.fed:
            return
        forward.fed[feed] -= 1
        if forward.fed[feed]:
            return
        del forward.fed[feed]
        forward.took.add(feed)
        if not any(feed in other.fed for other in self._forwards):
            del self._weights[feed]

    def _enter(
        self,
        path: str,
        numbers: Sequence[int],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> None:
        self._arrive(path, "input", numbers, {**dict(enumerate(args)), **kwargs})

    def _leave(
        self,
        path: str,
        numbers: Sequence[int],
        module: nn.Module,
        args: tuple[Any, ...],
        output: Any,
    ) -> None:
        values: Mapping[Any, Any] = {None: output}
        if isinstance(output, Mapping):
            values = output
        elif isinstance(output, tuple | list):
            values = dict(enumerate(output))
        self._arrive(path, "output", numbers, values)

    def _arrive(
        self, path: str, side: str, numbers: Sequence[int], values: Mapping[Any, Any]
    ) -> None:
        """Wait at the gates among some values, if this is the call that they are at."""
        forward = self._current
        if forward is None:
            return
        call = forward.calls.get((path, side), 0)
        forward.calls[path, side] = call + 1
        for number in numbers:
            place = self.gates[number].place
            if place.call == call and isinstance(values.get(place.key), Tensor):
                forward.gate, forward.tensor = number, values[place.key]
                greenlet.getcurrent().parent.switch()

    def _stop_all(self) -> None:
        for forward in self._forwards:
            forward.stop()
        self._forwards.clear()
        self._memory.close()


def _no_inputs(weight: Tensor) -> Tensor:
    """Weight of a linear layer that reads no inputs."""
    return weight[:, :0]
