"""Find the attentions and the pairs of linear layers in what the labels of a forward say.

An attention is a softmax over a product of two values; its units are the entries that meet there.
The neurons of a pair are read whole by one linear weight, or by several, and by nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from ..types import Attribute, Kind
from .attention import HeadLayout
from .head_rows import check_reader, head_layout, owner_of, whole_width
from .labels import NOBODY, OUTPUT, Rows
from .products import EMBEDDED
from .reading import ACTIVATIONS, IrregularRows, Reading
from .steps import MEETS_NOBODY

TOGETHER = (
    "all values that it reads go together, since a norm, a product or the embeddings span them, so "
    "that none of them can go alone"
)
ACROSS = "{} is a norm across them, so that none of them can go without a change of the others"
UNREAD = (
    "no layer reads what its heads put out; a product with a parameter that is no layer's is "
    "not followed"
)
NO_LAYOUT = HeadLayout(0, 0, 0, (), ())
MATRIX = 2


@dataclass(frozen=True)
class Site:
    """Where heads or neurons were seen.

    Attributes:
        kind: What the units are.
        time: When the weight that reads them runs.
        reader: Name of that weight.
        core: Path of the module that runs the softmax; None for neurons.
        paths: Paths of all modules that take part.
        roots: Labels of the units and of the groups that they stand in; none where channels may
            have them.
        layout: The rows of the units, and of their groups.
        sizes: Sizes that no tensor repeats.
        also: Names of other weights that read all of the neurons, and nothing else.
        reason: Why they cannot be cut; "" if they can, as far as is known.
    """

    kind: Kind
    time: int = field(compare=False)
    reader: str
    core: str | None
    paths: tuple[str, ...]
    roots: frozenset[int] = field(compare=False)
    layout: HeadLayout = NO_LAYOUT
    sizes: tuple[Attribute, ...] = ()
    also: tuple[str, ...] = ()
    reason: str = ""

    @property
    def names(self) -> list[str]:
        """Modules and tensors that belong to it."""
        layout = self.layout
        tensors = [part.tensor for part in (*layout.head_slices, *layout.group_slices)]
        norms = [norm.module for norm in (*layout.norms, *layout.group_norms)]
        sizes = [size.module for size in self.sizes]
        found = [self.reader, self.core, *self.also, *self.paths, *tensors, *norms, *sizes]
        return [name for name in found if name]


def find_sites(reading: Reading, *, is_known: bool) -> list[Site]:
    """Attentions and pairs of linear layers in running order.

    Args:
        reading: What the labels say.
        is_known: The model is one of Transformers: only pairs count whose result joins a stream of
            values (or a gate) that other layers make too. Its heads, poolers and projectors are no
            sub-layers. In any other, what makes no regular pair may still be channels.
    """
    attentions = list(_attentions(reading))
    inside = frozenset(root for site in attentions for root in site.roots)
    heads = frozenset(root for site in attentions if not site.reason for root in site.roots)
    pairs = [
        site
        for site in _pairs(reading, inside)
        if (_joins(reading, site.reader, heads) if is_known else site.layout is not NO_LAYOUT)
    ]
    return sorted([*attentions, *pairs], key=lambda site: site.time)


def _attentions(reading: Reading) -> Iterator[Site]:
    met = {r for m in reading.labels.meetings for r in reading.labels.roots(m.labels)}
    for softmax in reading.labels.softmaxes:
        weights = set(reading.labels.roots(softmax.labels)) - {NOBODY}
        met |= weights if _weighs(reading, weights) else set()
    known: list[tuple[set[int], int]] = []
    for softmax in reading.labels.softmaxes:
        roots = set(reading.labels.roots(softmax.labels)) & met - {NOBODY}
        time = softmax.time
        for other in [entry for entry in known if entry[0] & roots]:
            known.remove(other)
            roots, time = roots | other[0], min(time, other[1])
        if roots:
            known.append((roots, time))
    for roots, time in known:
        yield _attention(reading, roots, time)


def _weighs(reading: Reading, roots: Set[int]) -> bool:
    """Whether a layer makes weights of what others make: one for several values of each head."""
    readers = [reading.rows[rows] for rows in _reading(reading, roots)]
    is_wide = any(len(entries.roots) > len(roots) for entries in readers)
    made = all(len(reading.makers.get(root, ())) > 1 for root in roots)
    return len(roots) > 1 and is_wide and made


def _attention(reading: Reading, roots: set[int], time: int) -> Site:
    """The attention whose softmax weighs the values of the roots."""
    core = reading.forward.running(time)
    if isinstance(reading.modules[core], ACTIVATIONS):
        core = core.rpartition(".")[0]
    groups = {reading.standing[root] for root in roots if root in reading.standing}
    every = frozenset(roots | groups)
    held = roots | groups if len(groups) > 1 else roots
    reasons = _reasons(reading, held, apart=(OUTPUT, EMBEDDED))
    readers = _reading(reading, roots)
    site = Site(Kind.HEADS, time, "", core, (core,), every)
    if not readers:
        return _told(site, reasons, UNREAD)
    reader = max(reversed(readers), key=lambda r: len(reading.rows[r].roots))
    path = owner_of(reading, reader.tensor)
    site = Site(Kind.HEADS, reading.readers[reader], reader.tensor, core, (core, path), every)
    others = [r for r in readers if r != reader]
    others += [r for r in _reading(reading, held - roots) if r not in readers]
    joined = _joined(reading, core, every, [reader, *others]) if others else ""
    if joined:
        return _told(replace(site, paths=(core,)), reasons, joined)
    try:
        layout, units, numbers = head_layout(reading, [reader, *others], roots, groups)
    except IrregularRows as error:
        return _told(site, reasons, str(error))
    met = [place for place in reading.norms if not every.isdisjoint(place[2].present)]
    places = [place for place in met if reading.mixes(place[0], place[2])]
    layout = replace(
        layout,
        norms=reading.taps(places, units),
        group_norms=reading.taps(places, numbers) if numbers else (),
    )
    sizes = reading.sizes_of(units, ":heads")
    return _told(replace(site, layout=layout, sizes=sizes), reasons, "")


def _reading(reading: Reading, roots: Set[int]) -> list[Rows]:
    """Weights that read any of the roots, in running order."""
    return [r for r in reading.readers if not reading.rows[r].present.isdisjoint(roots)]


def _joined(reading: Reading, core: str, roots: Set[int], readers: Sequence[Rows]) -> str:
    """Why heads that several weights read cannot be cut; "" if they stay inside of the attention.

    What others make too, before the attention or once they were read, is a stream of many layers.
    """
    has_weights = next(reading.modules[core].parameters(), None) is not None
    own = core if has_weights else core.rpartition(".")[0]
    inside = f".{own}." if own else "."

    def is_met(labels: Tensor) -> bool:
        return not roots.isdisjoint(reading.labels.roots(labels))

    last = max(softmax.time for softmax in reading.labels.softmaxes if is_met(softmax.labels))
    times = (reading.readers[rows] for rows in readers)
    read = min((time for time in times if time > last), default=0)
    makers = [made for made in reading.labels.made if is_met(made.labels)]
    if all(made.time < read and f".{made.weight}".startswith(inside) for made in makers):
        return ""
    return (
        "its heads, or their values, meet the stream of values that all layers share, with no "
        f"out-projection between ({readers[1].tensor} reads it too)"
    )


def _told(site: Site, reasons: Sequence[str], reason: str) -> Site:
    """The site with the first of all reasons why it cannot be cut."""
    return replace(site, reason=next(iter(reasons), reason))


def _reasons(reading: Reading, roots: Iterable[int], *, apart: Sequence[str] = ()) -> list[str]:
    """Why labels cannot be cut, but for some reasons."""
    names = [rows.tensor for rows in reading.touched(roots)]
    opaque = reading.opaque_owner(names)
    found = [f"{opaque} holds some of them, which is not cut by units"] if opaque else []
    return found + [
        why for root in sorted(roots) for why in reading.reasons.get(root, ()) if why not in apart
    ]


def _pairs(reading: Reading, inside: frozenset[int]) -> Iterator[Site]:
    """Linear weights that read what linear weights make, alone or together with others."""
    kept = {OUTPUT, EMBEDDED, MEETS_NOBODY}
    streams = {root for root, reasons in reading.reasons.items() if not kept.isdisjoint(reasons)}
    read_by: dict[int, list[str]] = {}
    for rows in reading.readers:
        present = reading.rows[rows].present
        for root in present if present.isdisjoint(streams) else ():
            read_by.setdefault(root, []).append(rows.tensor)
    normed = {
        root: path
        for path, _, entries in reading.norms
        if not entries.present <= streams and reading.mixes(path, entries)
        if not reading.is_elementwise(path)
        for root in entries.present
    }
    for reader, time in reading.readers.items():
        entries = reading.rows[reader]
        roots = entries.present
        if NOBODY in entries.roots or roots & inside:
            continue
        reason = TOGETHER if len(roots) == 1 < len(entries.roots) else ""
        reason = next((ACROSS.format(normed[root]) for root in roots & normed.keys()), reason)
        if reason and _is_read_once(reading, roots):
            owner, nothing = owner_of(reading, reader.tensor), frozenset[int]()
            yield Site(Kind.NEURONS, time, reader.tensor, None, (owner,), nothing, reason=reason)
        if reason or not roots.isdisjoint(streams) or len(roots) < MATRIX:
            continue
        tensors = [rows.tensor for rows in reading.touched(roots)]
        is_made = any(reading.makers.get(root) for root in roots)
        if is_made and not any(_convolves(reading, name) for name in tensors):
            others = {name for root in roots for name in read_by[root]} - {reader.tensor}
            yield from _pair(reading, reader, time, others)


def _is_read_once(reading: Reading, roots: Set[int]) -> bool:
    """Whether a weight makes these labels, and one alone reads them: a stream has many readers.

    No convolution is among them, whose channels are found otherwise.
    """
    readers = [rows for rows in reading.readers if reading.rows[rows].present & roots]
    is_made = any(reading.makers.get(root) for root in roots)
    tensors = [rows.tensor for rows in reading.touched(roots)]
    return is_made and len(readers) == 1 and not any(_convolves(reading, n) for n in tensors)


def _pair(reading: Reading, reader: Rows, time: int, others: Set[str]) -> Iterator[Site]:
    """The site of neurons that a weight reads; none where it is not the last of several.

    Args:
        reading: What the labels say.
        reader: The weight.
        time: When it runs.
        others: Names of other weights that read any of them.
    """
    entries = reading.rows[reader]
    roots, reasons = entries.present, _reasons(reading, entries.present)
    same = {r.tensor: r for r in reading.readers if reading.rows[r].present == roots}
    also = {name: rows for name, rows in same.items() if name in others}
    if also and not _owned_once(reading, (rows.tensor for rows in reading.touched(roots))):
        also = {}
    if len(also) == len(others) and reader.tensor != list(same)[-1]:
        return
    makers = {weight for root in roots for weight in reading.makers.get(root, ())}
    first, *more = (owner_of(reading, name) for name in (reader.tensor, *sorted({*makers, *also})))
    site = Site(Kind.NEURONS, time, reader.tensor, None, (first, *more), roots)
    if len(also) < len(others):
        site = replace(site, paths=(first,))
        yield _told(site, reasons, f"{min(others - also.keys())} reads them too")
        return
    units = {root: number for number, root in enumerate(dict.fromkeys(entries.roots))}
    try:
        for rows in (*also.values(), reader):
            check_reader(reading, rows)
            width = whole_width(reading.rows[rows], units)
        layout = HeadLayout(len(units), len(units), width, reading.slices(units), ())
        sizes = reading.sizes_of(units, ":neurons")
    except IrregularRows as error:
        yield _told(site, reasons, str(error))
    else:
        yield _told(replace(site, layout=layout, sizes=sizes, also=tuple(also)), reasons, "")


def _owned_once(reading: Reading, names: Iterable[str]) -> bool:
    """Whether each of these tensors belongs to one module alone."""
    held = [dict(module.named_parameters(recurse=False)) for module in reading.modules.values()]
    owners = Counter(id(parameter) for own in held for parameter in own.values())
    tensors = (name.rpartition(".") for name in names)
    return all(owners[id(getattr(reading.modules[path], leaf))] <= 1 for path, _, leaf in tensors)


def _convolves(reading: Reading, name: str) -> bool:
    """Whether a tensor belongs to a convolution, or has more dimensions than a matrix.

    The kernel of a depthwise convolution that is no call of its module follows the neurons: it has
    no output at which channels could be masked.
    """
    path, _, leaf = name.rpartition(".")
    module = reading.modules[path]
    if isinstance(module, _ConvNd) and path not in reading.forward.calls:
        return not module.groups == module.in_channels == module.out_channels
    long = sum(size > 1 for size in getattr(module, leaf).shape)
    return isinstance(module, _ConvNd) or long > MATRIX


def _joins(reading: Reading, reader: str, heads: frozenset[int]) -> bool:
    """Whether what a weight makes meets what others make, and is no head of an attention."""
    made = reading.made_by(reader)
    if made & heads:
        return False
    return any(
        reading.makers[root] - {reader} or set(reading.reasons.get(root, ())) - {OUTPUT}
        for root in made
    )
