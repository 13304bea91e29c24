"""Places of axes in a model: one module of a kind each, which share what was found for the kind.

Data, and the names of axes from the root of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..surgery.rows import above
from ..types import Axis, Kind, Refusal
from .trace import Call


@dataclass(frozen=True)
class Template:
    """The axes of one kind of module, not proved yet; names relative to the module.

    Attributes:
        versions: The axes (KV groups before the heads that stand in them) in one or more
            versions, which differ in what must follow a cut; the first that is proved holds.
    """

    versions: tuple[tuple[Axis, ...], ...]

    @property
    def kind(self) -> Kind:
        """What the units are: heads (in KV groups or not) or neurons."""
        return self.versions[0][-1].kind

    @property
    def holder(self) -> str:
        """Path of the list whose modules are the units; "" where they are none of a list."""
        tap = self.versions[0][0].taps[0]
        return tap.owner if tap.side == "outputs" else ""


@dataclass(frozen=True)
class Place:
    """One module of a kind.

    Attributes:
        scope: Its path.
        template: Its kind.
        call: Its captured arguments.
        tied: The shared table that it takes a bias from; "" for none.
        runner: The module around it that takes rows out for it (`Tap.runner`); "" for none.
    """

    scope: str
    template: Template
    call: Call
    tied: str = ""
    runner: str = ""


@dataclass(frozen=True)
class Discovery:
    """What a forward shows.

    Attributes:
        places: Modules with heads or neurons in the order in which the model runs them.
        channels: Axes of channels in the order in which they are first made.
        refusals: What was seen but cannot be cut, of heads and neurons.
        channel_refusals: The same of channels.
        call: Arguments of the whole model.
        reasons: Why each parameter stays whole if no axis holds it, by name.
    """

    places: tuple[Place, ...]
    channels: tuple[Axis, ...]
    refusals: tuple[Refusal, ...]
    channel_refusals: tuple[Refusal, ...]
    call: Call
    reasons: Mapping[str, str] = field(default_factory=dict)


def move_axis(
    axis: Axis, scope: str, *, tied: str = "", runner: str = "", name: str | None = None
) -> Axis:
    """An axis whose names are relative to a module, with names from the root of the model.

    Args:
        axis: The axis.
        scope: Path of the module.
        tied: Key of `Axis.tied`.
        runner: The module that takes out rows for it (`Tap.runner`), from the root.
        name: Path that the axis is named after; None: the module.
    """
    removal, need = axis.removal, axis.adaptation
    prefix = scope if name is None else name

    def moved(path: str) -> str:
        return above(path, scope)

    return replace(
        axis,
        tied=tied,
        name=prefix + axis.name,
        module=moved(axis.module),
        slices=tuple(replace(s, tensor=moved(s.tensor)) for s in axis.slices),
        taps=tuple(
            replace(t, module=moved(t.module), runner=moved(t.runner) if t.runner else runner)
            for t in axis.taps
        ),
        norms=tuple(replace(n, module=moved(n.module)) for n in axis.norms),
        attributes=tuple(
            replace(
                a,
                module=moved(a.module),
                axis=prefix + a.axis,
                per=None if a.per is None else prefix + a.per,
            )
            for a in axis.attributes
        ),
        parent=None if axis.parent is None else prefix + axis.parent,
        removal=None if removal is None else replace(removal, module=moved(removal.module)),
        adaptation=None if need is None else replace(need, module=moved(need.module)),
    )


def axes_at(places: Sequence[Place]) -> list[Axis]:
    """The axes of places, named from the root of the model."""
    return [move_axis(axis, place.scope) for place in places for axis in place.template.versions[0]]
