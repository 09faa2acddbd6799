"""Choose which axis lies in the lanes, and Toom-Cook along rows where that is the batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from graphc.ir import Graph, Node, Value
from graphc.ops.registry import apply
from graphc.ops.toom_cook import conv2d_by_rows
from passes.base import Pass, note

BATCH, CHANNELS = "batch", "channels"
# The most interpolation points: with 9 the error stays within a few 1e-6 of the largest output.
MOST_POINTS = 9
# And of a patch along each axis: 7 x 7 points round no more than 9 along rows.
MOST_PATCH_POINTS = 7
# Predicted cost relative to the direct convolution below which a rewrite is worth its transforms.
WORTH = 0.85
# Multiply-adds that a core makes while it reads a transformed weight from memory, or from the cache
# that the cores share, where those of a layer fit it, or makes it in each step.
_WEIGHT, _NEAR, _MADE = 18.0, 3.0, 20.0
_SHARED_CACHE = 4_000_000  # bytes
# Of patches of a batch that meet weights from memory, all are away when the next image's come.
_AWAY = 1.25
# While a value is transformed, by points of an axis: of an image, of a product.
_IMAGE, _PRODUCT = 2.8, 1.8
# Of patches of an image that the shared cache does not hold all go through memory twice.
_FAR_IMAGE = 2.5
# Bytes of the patches and products of a strip, and of the transformed weights that all strips of an
# image meet, which a core's own cache holds together.
_STRIP, _STRIP_WEIGHTS = 250_000, 200_000
# And while the two transforms of patches are launched, with a barrier each.
_LAUNCHES = 50_000.0
# With channels in the lanes, sums over so many channels take twice their multiply-adds: what is
# done around a short sum is no shorter.
_SHORT = 2.5
# With the batch in the lanes, what writing and reading a value costs where those of one vector of
# images take more bytes than a level of the caches keeps.
_FAR = ((1_500_000, 12.0), (8_000_000, 44.0))

# (convolution, predicted cost of each algorithm, what lies in the lanes) -> the algorithm to take.
Choose = Callable[[Node, dict[str, float], str], str]


def predicted_best(node: Node, costs: dict[str, float], mode: str) -> str:
    """The algorithm of the lowest cost; the direct one, unless another is clearly cheaper."""
    best = min(costs, key=costs.__getitem__)
    return best if costs[best] <= WORTH * costs["direct"] else "direct"


@dataclass(frozen=True)
class ChooseConvolutions(Pass):
    """Choose which axis lies in the lanes, and rewrite convolutions by predicted cost.

    Requires: int dimensions; runs before autodiff, so that the chain rule differentiates the
    products and the backward pass saves as much. Ensures: results equal up to rounding (a few 1e-6
    of the largest). Convolutions of more taps than their stride may become
    - with the batch in the lanes and stride 1: `F(m,r) rows`, Toom-Cook along rows, whose
      transforms are then a handful of vector operations without shuffles: here;
    - in either case, where there are channels enough to pay for its transforms: `F(m,r) patches`,
      Winograd: by the pass `winograd_convolutions`, after autodiff.
    `annotations["layout_mode"]` is the cheaper of both as a whole, or `mode`;
    `annotations["convolutions"]` has the predicted costs by layer. `choose` decides for each layer.
    """

    lanes: int
    training: bool = False
    choose: Choose = predicted_best
    mode: str | None = None

    def run(self, graph: Graph) -> Graph:
        convolutions = [n for n in graph if n.op == "conv2d"]
        modes = {m: self._predicted(graph, convolutions, m) for m in (BATCH, CHANNELS)}
        totals = {
            m: sum(min(c.values()) for c in costs.values())
            for m, costs in modes.items()
            if costs is not None
        }
        if not self.mode and not (convolutions and totals):
            return graph
        mode = self.mode or min(totals, key=totals.__getitem__)
        costs = modes[mode] or {}

        def visit(new: Graph, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...] | None:
            if mode == CHANNELS or len(costs.get(node.name, ())) < 2:
                return None
            best = self.choose(node, costs[node.name], mode)
            if not best.endswith("rows"):
                return None
            note(new, f"{node.name}: {best}")
            return (_rewritten(node, inputs, tile_size(best)),)

        new = graph.rebuild(visit)
        new.annotations["convolutions"] = costs
        new.annotations["layout_mode"] = mode
        return new

    def _predicted(
        self, graph: Graph, nodes: list[Node], mode: str
    ) -> dict[str, dict[str, float]] | None:
        """Costs by layer and algorithm, in vector multiply-adds for the whole batch."""
        batch = graph.annotations.get("batch")
        if mode == BATCH and (not batch or batch % self.lanes):
            return None
        result = {}
        for node in nodes:
            costs = {"direct": _direct(node, mode, self.lanes)}
            images = node.types[0].sizes[0]
            oc, ic, taps, _, oh, ow = _sizes(node)
            if is_short(node) and mode == BATCH:
                costs |= _by_rows(node, self.lanes)
                costs |= by_split_patches(oc, ic, taps, oh, ow, self.lanes)
            elif mode == CHANNELS and is_short(node, strided=True) and oc >= self.lanes:
                size = phases(node, oc, ic, taps)
                costs |= by_patches(*size, oh, ow, images, not self.training)
            result[node.name] = {k: images * c for k, c in costs.items()}
        return result


def tile_size(algorithm: str) -> int:
    """The m of "F(m,r) rows" or "F(m,r) patches"."""
    return int(algorithm[2 : algorithm.index(",")])


def is_short(node: Node, strided: bool = False) -> bool:
    """Whether a convolution or a gradient of one has a square kernel of 2 or more taps for each
    pixel of its stride, which is 1 unless it may be `strided`."""
    weight = node.types[0] if node.op == "conv2d_weight_grad" else node.inputs[1].type
    a, taps = node.attrs, weight.sizes[2:]
    stride = a["stride"][0]
    plain = a["stride"] == (stride, stride) and a["dilation"] == (1, 1) and a["groups"] == 1
    square = taps[0] == taps[1] and taps[0] > stride
    return plain and square and (stride == 1 or strided)


def phases(node: Node, oc: int, ic: int, taps: int) -> tuple[int, int, int]:
    """(output channels, input channels, taps) of the convolution of stride 1 over phases."""
    stride = node.attrs["stride"][0]
    return oc, ic * stride**2, -(-taps // stride)


def _sizes(node: Node) -> tuple[int, ...]:
    """(output channels, input channels, taps high, taps wide, output height, output width)."""
    _, _, oh, ow = node.types[0].sizes
    return (*node.inputs[1].sizes, oh, ow)


def _direct(node: Node, mode: str, lanes: int) -> float:
    oc, ic, kh, kw, oh, ow = _sizes(node)
    work = float(oc * ic * kh * kw * oh * ow)
    if mode == BATCH:
        values = _values(node)
        return work + values * _far(values, lanes)
    # Below the lanes' width channels waste lanes; for wide layers a block of the batch is too large
    # for the caches.
    grouped = 4.0 if node.attrs["groups"] > 1 else 1.0
    return work * grouped * (-(-oc // lanes) * lanes / oc) * 0.95


def _values(node: Node) -> int:
    """Elements of one image that a convolution reads and writes."""
    return (node.inputs[0].type.size + node.types[0].size) // node.types[0].sizes[0]


def _far(values: int, lanes: int) -> float:
    """Cost of a value of an image, where a vector of images has so many each."""
    return max((cost for size, cost in _FAR if values * lanes * 4 > size), default=0.0)


def _by_rows(node: Node, lanes: int) -> dict[str, float]:
    """F(m, taps) for each m.

    Moving a transformed value through memory counts as a few operations."""
    oc, ic, kh, kw, oh, ow = _sizes(node)
    values = _values(node)
    moved = values * _far(values, lanes)
    costs = {}
    for m in range(2, ow + 1):
        points = m + kw - 1
        if points > MOST_POINTS:
            break
        tiles = -(-ow // m)
        products = oc * ic * kh * oh * tiles * points
        images = ic * (oh + kh - 1) * tiles * points * (points + 3)
        outputs = oc * oh * tiles * m * (points + 6)
        costs[f"F({m},{kw}) rows"] = float(products + images + outputs + moved)
    return costs


def by_patches(
    oc: int, ic: int, taps: int, oh: int, ow: int, images: int, prepared: bool
) -> dict[str, float]:
    """F(m x m, taps x taps) for each m: products for each point, and what is read and written.

    Transformed weights are read once a call: where there are few tiles they are what counts. Unless
    they are `prepared` they are also made and written in each call. So are the launches of the
    transforms, which a direct convolution does not have."""
    costs = {}
    for m in range(2, MOST_PATCH_POINTS + 2 - taps):
        points = m + taps - 1
        patches = points**2 * -(-oh // m) * -(-ow // m)
        weights = oc * ic * points**2
        far = 4 * weights > _SHARED_CACHE
        products = oc * ic * patches * (1 + _SHORT / ic) * (_AWAY if far and images > 1 else 1.0)
        read = weights * (_WEIGHT if far else _NEAR) / images
        transforms = patches * points * (_IMAGE * ic + _PRODUCT * oc)
        if 4 * patches * (ic + oc) > _SHARED_CACHE and strip_count(oc, ic, taps, m, oh, ow) == 1:
            transforms *= _FAR_IMAGE
        made = 0.0 if prepared else weights * _MADE / images
        ragged = oc * oh * ow * 3.0 if oh % m or ow % m else 0.0
        multiplied = max(products, read) + 0.1 * min(products, read)
        cost = multiplied + transforms + ragged + made + _LAUNCHES / images
        costs[f"F({m},{taps}) patches"] = cost
    return costs


def strip_count(oc: int, ic: int, taps: int, m: int, oh: int, ow: int) -> int:
    """Into how many strips the patches of an image are cut, to stay in a core's own cache.

    A strip is some rows of patches or an equal part of one; 1 where weights would not stay too."""
    points, rows, columns = (m + taps - 1) ** 2, -(-oh // m), -(-ow // m)
    patches = 4 * points * (ic + oc) * rows * columns
    if patches <= 4 * _STRIP or 4 * points * ic * oc > _STRIP_WEIGHTS:
        return 1
    counts = [s for s in range(1, rows) if rows % s == 0]
    counts += [rows * s for s in range(1, columns) if columns % s == 0]
    return next((s for s in counts if patches <= s * _STRIP), 1)


def by_split_patches(oc: int, ic: int, taps: int, oh: int, ow: int, lanes: int) -> dict[str, float]:
    """F(m x m, taps x taps) for each m with the batch in the lanes, an image.

    A patch is transformed in registers, which do not hold all of it."""
    costs = {}
    for m in (2, 4):
        points = (m + taps - 1) ** 2
        if m + taps - 1 > 6:
            break
        values = points * -(-oh // m) * -(-ow // m)
        far = _far((ic + oc) * values, lanes)
        cost = values * (oc * ic + (10 + far) * ic + (6 + far) * oc)
        costs[f"F({m},{taps}) patches"] = cost
    return costs


def framed(x: Value, before: tuple[int, int], size: tuple[int, int]) -> Value:
    """Images x with `before` zeros above and beside (below 0: without so many of their pixels),
    then zeros or a cut up to `size`."""
    if min(before) < 0:
        x = x[:, :, max(-before[0], 0) :, max(-before[1], 0) :]
        before = max(before[0], 0), max(before[1], 0)
    after = tuple(max(s - d - b, 0) for s, d, b in zip(size, x.sizes[2:], before, strict=True))
    padding = ((0, 0), (0, 0), (before[0], after[0]), (before[1], after[1]))
    if any(any(p) for p in padding):
        x = apply("pad", x, padding=padding, value=0.0)[0]
    return cut(x, size)


def cut(y: Value, size: tuple[int, ...]) -> Value:
    """The first pixels of images y, of height and width `size`."""
    return y if y.sizes[2:] == tuple(size) else y[:, :, : size[0], : size[1]]


def _rewritten(node: Node, inputs: tuple[Value, ...], m: int) -> Value:
    x, weight = inputs
    _, _, kh, kw, oh, ow = _sizes(node)
    (top, _), (left, _) = node.attrs["padding"]
    x = framed(x, (top, left), (oh + kh - 1, -(-ow // m) * m + kw - 1))
    return cut(conv2d_by_rows(x, weight, m, name=node.name), (oh, ow))
