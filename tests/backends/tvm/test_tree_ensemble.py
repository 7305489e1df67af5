"""Tree kernels against a plain walk in numpy, and against the libraries the trees come from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlec.backends.tvm.compat import IRModule, tirx, tvm
from mlec.backends.tvm.kernels.tree_ensemble import Plan, TreeEnsemble, TreeSchedule, build, prepare
from mlec.backends.tvm.target import TargetInfo
from mlec.errors import LoweringError
from tests.backends.tvm.kernel_helpers import by_threads

INFO = TargetInfo.host()
PLAIN_STORAGE = {"tirx.disable_storage_rewrite": True}  # as the backend compiles
ROWS = (0, 1, 2, 5, 63, 64, 65, 1000)


def reference(e: TreeEnsemble, x: np.ndarray) -> np.ndarray:
    """Tree by tree: each node sends its rows on, as the op is defined."""
    out = np.repeat(e.base[None], len(x), axis=0)
    for root, column in zip(e.roots, e.output, strict=True):
        waiting = [(root, np.arange(len(x)))]
        while waiting:
            at, rows = waiting.pop()
            if at < 0:
                out[rows, column : column + e.width] += e.values[~at]
            elif len(rows):
                left = goes_left(e, at, x[rows, e.feature[at]])
                waiting += [(e.left[at], rows[left]), (e.right[at], rows[~left])]
    return out


def goes_left(e: TreeEnsemble, node: int, x: np.ndarray) -> np.ndarray:
    flags = int(e.flags[node])
    missing = np.isnan(x)
    if len(e.category) and e.category[node] >= 0:
        known = (x > -1) & (x < 32 * e.categories.shape[1])
        c = np.where(known, x, 0).astype(np.int64)
        left = known & (e.categories[e.category[node], c >> 5] >> (c & 31) & 1 == 1)
    else:
        if flags & 2:
            x = np.where(missing, 0, x)
            missing = np.isnan(x)
        if flags & 4:
            missing |= np.abs(x) <= np.float32(1e-35)
        left = x < e.threshold[node] if e.compare == "lt" else x <= e.threshold[node]
    return np.asarray(np.where(missing, bool(flags & 1), left))


class Grower:
    """Collects trees node by node."""

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype = dtype
        self.nodes: list[list[float]] = []  # feature, threshold, left, right, flags, category
        self.leaves: list[np.ndarray] = []
        self.roots: list[int] = []

    def leaf(self, value: Any) -> int:
        self.leaves.append(np.atleast_1d(value))
        return ~(len(self.leaves) - 1)

    def node(self, feature: int, threshold: float, flags: int = 0, category: int = -1) -> int:
        self.nodes.append([feature, threshold, 0, 0, flags, category])
        return len(self.nodes) - 1

    def link(self, node: int, left: int, right: int) -> int:
        self.nodes[node][2:4] = [left, right]
        return node

    def ensemble(
        self, features: int, *, output: Any = None, base: Any = None, compare: Any = "lt", categories: Any = None,
        values: str | None = None,
    ) -> TreeEnsemble:  # fmt: skip
        columns = list(zip(*self.nodes, strict=True)) or [()] * 6
        feature, threshold, left, right, flags, category = (np.asarray(c) for c in columns)
        leaves = np.stack(self.leaves).astype(values or self.dtype)
        return TreeEnsemble(
            features,
            feature.astype(np.int32),
            threshold.astype(self.dtype),
            left.astype(np.int32),
            right.astype(np.int32),
            flags.astype(np.uint8),
            category.astype(np.int32) if categories is not None else np.zeros(0, np.int32),
            np.zeros((0, 0), np.int32) if categories is None else categories,
            np.asarray(self.roots, np.int32),
            np.zeros(len(self.roots), np.int32) if output is None else np.asarray(output, np.int32),
            leaves,
            np.zeros(leaves.shape[1], leaves.dtype) if base is None else np.asarray(base, leaves.dtype),
            compare,
        )


def random_ensemble(
    seed: int, trees: int = 7, features: int = 5, depth: int = 5, dtype: str = "float32", *, values: str | None = None,
    width: int = 1, outputs: int = 1, compare: str = "lt", flags: tuple[int, ...] = (0, 1), categorical: float = 0.0,
    full: bool = False, thresholds: Any = None,
) -> TreeEnsemble:  # fmt: skip
    """Trees of random shape; thresholds are taken from a small grid, so that many rows meet them exactly."""
    rng = np.random.default_rng(seed)
    grower = Grower(dtype)
    grid = np.concatenate([np.round(rng.normal(size=20), 1), [0.0, -0.0, np.inf, -np.inf]])
    grid = grid if thresholds is None else np.asarray(thresholds)

    def grow(levels: int) -> int:
        if levels == 0 or (not full and levels < depth and rng.random() < 0.25):
            return grower.leaf(rng.normal(size=width))
        member = int(rng.integers(6)) if rng.random() < categorical else -1
        node = grower.node(int(rng.integers(features)), rng.choice(grid), int(rng.choice(flags)), member)
        return grower.link(node, grow(levels - 1), grow(levels - 1))

    for _ in range(trees):
        grower.roots.append(grow(depth))
    return grower.ensemble(
        features,
        output=rng.integers(0, outputs - width + 1, trees),
        base=rng.normal(size=outputs),
        compare=compare,
        categories=rng.integers(-(2**31), 2**31, (6, 3)).astype(np.int32) if categorical else None,
        values=values,
    )


def sample_rows(e: TreeEnsemble, n: int, seed: int = 1) -> np.ndarray:
    """Rows at the thresholds, one ulp beside them, at zeros, infinities, NaN and categories."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, e.features)).astype(e.dtype)
    if e.nodes:
        at = rng.choice(e.threshold, size=x.shape)
        beside = np.nextafter(at, rng.choice([-np.inf, np.inf], size=x.shape).astype(e.dtype))
        x = np.select([rng.random(x.shape) < 0.3, rng.random(x.shape) < 0.3], [at, beside], x)
    odd = np.array([np.nan, np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-35, -1e-36, 2e-35, 1e30, 5e-324], e.dtype)
    x = np.where(rng.random(x.shape) < 0.25, rng.choice(odd, size=x.shape), x)
    if len(e.categories):
        codes = rng.choice([0, 1, 5, 31, 32, 63, 64, 95, 96, -1, -0.5, 7.9, 95.5, 1e9, -1e9], size=x.shape)
        x = np.where(rng.random(x.shape) < 0.5, codes, x)
    return np.ascontiguousarray(x, e.dtype)


class Kernel:
    """A compiled plan, called with numpy arrays."""

    def __init__(
        self, e: TreeEnsemble, plan: Plan | None = None, info: TargetInfo = INFO, n: int | None = None
    ) -> None:
        self.ensemble = e
        self.plan = plan or prepare(e, info)
        rows = tirx.Var("n", "int64") if n is None else n
        func = build(self.plan, rows, info)
        with tvm.transform.PassContext(config=PLAIN_STORAGE):
            self.run = tvm.compile(IRModule({"tree_ensemble": func}), target=info.tvm_target())["tree_ensemble"]
        self.packed = [tvm.runtime.tensor(a) for a in self.plan.packed.values()]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        out = tvm.runtime.tensor(np.full((len(x), self.ensemble.outputs), np.nan, self.ensemble.value_dtype))
        self.run(tvm.runtime.tensor(x), *self.packed, out)
        return np.asarray(out.numpy())


def check(e: TreeEnsemble, rows: tuple[int, ...] = ROWS, strategies: tuple[str, ...] = ("walk", "sliced")) -> None:
    """Single rows go by walks with the one strategy for blocks, by walks over ranks with the other."""
    x = sample_rows(e, max(rows))
    expected = reference(e, x)
    for strategy in strategies:
        kernel = Kernel(e, prepare(e, INFO, strategy, ranked=strategy == "sliced"))
        assert kernel.plan.strategy == strategy
        assert (kernel.plan.ranked is not None) == (strategy == "sliced")
        for n in rows:
            np.testing.assert_array_equal(kernel(x[:n]), expected[:n], err_msg=f"{n} rows; {kernel.plan.explain()}")


@pytest.mark.parametrize("compare", ["lt", "le"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_numbers_and_missing_values(dtype: str, compare: str) -> None:
    check(random_ensemble(0, dtype=dtype, compare=compare, thresholds=[-1.5, 0.0, -0.0, 0.25, np.inf, -np.inf, np.nan]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("compare", ["lt", "le"])
def test_all_flags_and_categories(dtype: str, compare: str) -> None:
    check(random_ensemble(1, trees=12, dtype=dtype, compare=compare, flags=tuple(range(8)), categorical=0.4))


def test_only_categories() -> None:
    check(random_ensemble(2, categorical=1.0), (5, 65))


@pytest.mark.parametrize(("dtype", "values"), [("float32", "float64"), ("float64", "float32")])
def test_leaves_of_another_dtype_than_the_rows(dtype: str, values: str) -> None:
    check(random_ensemble(3, dtype=dtype, values=values), (1, 65))


def test_several_outputs_and_vector_leaves() -> None:
    check(random_ensemble(4, trees=9, outputs=3), (1, 65))
    check(random_ensemble(5, trees=9, outputs=5, width=5), (1, 65))
    check(random_ensemble(6, trees=9, outputs=7, width=3), (1, 65))


def test_one_feature_one_split() -> None:
    check(random_ensemble(7, trees=1, features=1, depth=1))


@pytest.mark.parametrize("trees", [1, 3, 8, 17])
def test_single_leaf_trees(trees: int) -> None:
    grower = Grower()
    grower.roots = [grower.leaf(np.float32(0.1 * i)) for i in range(trees)]
    check(grower.ensemble(2), (0, 1, 9))


def test_single_leaf_trees_among_others() -> None:
    e = random_ensemble(8, trees=20, depth=3)
    roots = e.roots.copy()
    roots[::3] = -1 - np.arange(len(roots[::3]))
    grower_free = TreeEnsemble(**{**vars_of(e), "roots": roots})
    check(grower_free, (1, 65))


def vars_of(e: TreeEnsemble) -> dict[str, Any]:
    return {name: getattr(e, name) for name in TreeEnsemble.__dataclass_fields__}


def test_no_tree() -> None:
    e = random_ensemble(9, trees=3, outputs=2)
    none = np.zeros(0, np.int32)
    np.testing.assert_array_equal(
        Kernel(TreeEnsemble(**{**vars_of(e), "roots": none, "output": none}))(sample_rows(e, 20)),
        np.repeat(e.base[None], 20, axis=0),
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_chains(side: str) -> None:
    """Depth 30, one node a level."""
    grower = Grower()
    for tree in range(3):
        below = grower.leaf(np.float32(tree))
        for level in range(30):
            node = grower.node(level % 2, 0.1 * level - 1.5, level % 2)
            leaf = grower.leaf(np.float32(level))
            grower.link(node, *((below, leaf) if side == "left" else (leaf, below)))
            below = node
        grower.roots.append(below)
    check(grower.ensemble(2), (1, 5, 100))


def test_deep_sparse_trees() -> None:
    """Far from complete, depth 30 and more: mostly the leaf that was made last is split."""
    rng = np.random.default_rng(24)
    grower = Grower()
    for _ in range(13):
        root = grower.node(0, 0.0)
        grower.roots.append(root)
        ends = [(root, 2), (root, 3)]
        for _ in range(90):
            parent, side = ends.pop(-1 if rng.random() < 0.9 else int(rng.integers(len(ends))))
            node = grower.node(int(rng.integers(3)), np.round(rng.normal(), 1), int(rng.integers(2)))
            grower.nodes[parent][side] = node
            ends += [(node, 2), (node, 3)]
        for parent, side in ends:
            grower.nodes[parent][side] = grower.leaf(rng.normal())
    e = grower.ensemble(3)
    assert e.layout.depth.mean() > 30
    check(e, (1, 2, 5, 130))


def test_thousands_of_features() -> None:
    """More columns than the caches hold of a full block, some of them without a split."""
    e = random_ensemble(25, trees=90, features=2000, depth=6)
    assert 1000 < e.columns.count < 4000
    check(e, (1, 5, 300))


@pytest.mark.parametrize("flags", range(8))
def test_columns_side_by_side(flags: int) -> None:
    """Each kind of column copied in vectors, with a feature between them that no split asks for."""
    e = random_ensemble(27, trees=40, features=37, depth=5, flags=(flags,), thresholds=[-1.5, 0.0, 0.25, 1.5])
    e = replace(e, feature=np.where(e.feature == 7, 8, e.feature))
    [(_kind, *columns)] = e.columns.ranges()
    assert columns == [0, 37]
    assert e.columns.consecutive(0, 37)
    check(e, (1, 5, 65), ("walk",))


@pytest.mark.parametrize("strategy", ["walk", "sliced"])
def test_the_number_of_threads_changes_no_bit(strategy: str) -> None:
    """Neither that of the processor, by which rows are shared out, nor that at work."""
    e = random_ensemble(26, trees=40, depth=5, outputs=3)
    x = sample_rows(e, 999)
    expected = reference(e, x)
    for cores in (1, 3):
        info = replace(INFO, cores=cores)
        kernel = Kernel(e, prepare(e, info, strategy), info)
        assert kernel.plan.parallel_rows < len(x)
        for threads, got in by_threads(lambda threads, kernel=kernel: kernel(x)).items():
            np.testing.assert_array_equal(got, expected, err_msg=f"{threads} threads, {cores} cores")


def test_a_thousand_trees() -> None:
    e = random_ensemble(10, trees=1000, features=20, depth=4)
    check(e, (1, 65))


def test_static_batch() -> None:
    e = random_ensemble(11)
    x = sample_rows(e, 70)
    for n in (1, 70):
        np.testing.assert_array_equal(Kernel(e, n=n)(x[:n]), reference(e, x[:n]))


@pytest.mark.skipif("avx2" not in INFO.features, reason="needs AVX2")
@pytest.mark.parametrize("mcpu", ["x86-64", "haswell"])
def test_shorter_vectors(mcpu: str) -> None:
    info = TargetInfo.for_cpu(mcpu, INFO.triple)
    assert info.vector_bits < 512
    for dtype in ("float32", "float64"):
        e = random_ensemble(15, trees=8, depth=6, dtype=dtype, flags=tuple(range(8)), categorical=0.1)
        x = sample_rows(e, 150)
        for strategy in ("walk", "sliced"):
            kernel = Kernel(e, prepare(e, info, strategy, ranked=strategy == "sliced"), info)
            for n in (3, 150):
                np.testing.assert_array_equal(kernel(x[:n]), reference(e, x[:n]))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_complete_trees_of_every_depth(dtype: str) -> None:
    """Depth 1 to 8 in one ensemble, enough thresholds to need two bytes per rank in one of them."""
    parts = [random_ensemble(d, trees=2, features=2, depth=d, dtype=dtype, full=True) for d in range(1, 9)]
    check(joined(parts), (1, 60, 200), ("sliced",))
    thresholds = np.random.default_rng(0).normal(size=2000)
    e = random_ensemble(9, trees=6, features=1, depth=8, dtype=dtype, full=True, thresholds=thresholds)
    check(e, (60, 200), ("sliced",))
    assert "uint16" in prepare(e, INFO, "sliced").explain()
    check(random_ensemble(10, trees=2, depth=9, dtype=dtype, full=True), (60,), ("sliced",))


def joined(parts: list[TreeEnsemble]) -> TreeEnsemble:
    """The trees of several ensembles that differ in nothing else."""
    nodes = np.cumsum([0, *(p.nodes for p in parts)])
    leaves = np.cumsum([0, *(p.leaves for p in parts)])

    def shifted(codes: np.ndarray, i: int) -> np.ndarray:
        return np.where(codes >= 0, codes + nodes[i], codes - leaves[i]).astype(np.int32)

    moved = {
        k: np.concatenate([shifted(getattr(p, k), i) for i, p in enumerate(parts)]) for k in ("left", "right", "roots")
    }
    same = {
        k: np.concatenate([getattr(p, k) for p in parts]) for k in ("feature", "threshold", "flags", "output", "values")
    }
    return TreeEnsemble(**{**vars_of(parts[0]), **moved, **same})


def test_many_thresholds_and_ranks_at_the_edge_of_a_byte() -> None:
    for count in (15, 16, 255, 256):
        grower = Grower()
        for i in range(count):
            node = grower.node(0, float(i), i % 2)
            grower.roots.append(grower.link(node, grower.leaf(1.0), grower.leaf(0.0)))
        e = grower.ensemble(1)
        x = np.concatenate([np.arange(-1, count + 1, 0.5), [np.nan, np.inf, -np.inf]]).astype(np.float32)[:, None]
        np.testing.assert_array_equal(Kernel(e, prepare(e, INFO, "sliced"))(x), reference(e, x))


@pytest.mark.parametrize("compare", ["lt", "le"])
def test_single_rows_by_wide_ranks(compare: str) -> None:
    """Two bytes for a rank, then as many columns as one byte counts and more."""
    thresholds = np.random.default_rng(0).normal(size=2000)
    fine = random_ensemble(18, trees=14, features=2, depth=8, compare=compare, full=True, thresholds=thresholds)
    wide = random_ensemble(19, trees=60, features=200, depth=6, compare=compare)
    assert Kernel(wide).ensemble.columns.count > 255
    for e in (fine, wide):
        kernel = Kernel(e, replace(prepare(e, INFO, ranked=True), block_rows=10**6))
        assert kernel.plan.ranked is not None
        assert kernel.plan.ranked.field == 16
        x = sample_rows(e, 40)
        np.testing.assert_array_equal(kernel(x), reference(e, x))


def test_many_outputs() -> None:
    """More values to a leaf than are kept in registers; leaves that add to some of the sums."""
    check(random_ensemble(20, trees=5, outputs=150, width=150), (1, 65))
    check(random_ensemble(21, trees=5, outputs=40, width=19, values="float64"), (1, 65))


@pytest.mark.parametrize("width", [1, 3])
def test_leaves_are_packed_once(width: int) -> None:
    e = random_ensemble(23, trees=9, width=width, outputs=width, values="float64")
    for strategy in ("walk", "sliced"):
        for ranked in (True, False):
            packed = prepare(e, INFO, strategy, ranked).packed
            tables = {name for name, a in packed.items() if str(a.dtype) == "float64" and a.size >= e.values.size}
            assert tables == ({"leaves", "ranked_values"} if ranked and width == 1 else {"leaves"})


@pytest.mark.parametrize("width", [1, 3])
def test_few_distinct_leaves(width: int) -> None:
    """They are packed once each, by their bits; what no tree uses is not packed."""
    e = random_ensemble(24, trees=9, width=width, outputs=width)
    kinds = np.array([[0.25], [0.0], [-0.0], [3.0]], np.float32).repeat(width, axis=1)
    used = np.random.default_rng(0).integers(0, 3, e.leaves)
    e = replace(e, values=np.concatenate([kinds[used], kinds[3:]]))
    check(e, (1, 65, 300))
    for strategy in ("walk", "sliced"):
        packed = prepare(e, INFO, strategy).packed
        if strategy == "walk" or width > 1:
            assert sorted(packed["leaves"].view(np.int32)[:, 0]) == sorted(kinds[:3].view(np.int32)[:, 0])
        assert ("leaf_row" in packed) == (strategy == "sliced" and width > 1)


def test_many_distinct_leaves_stay_beside_each_other() -> None:
    """More than the first-level cache has room for."""
    e = random_ensemble(25, trees=40, depth=8, full=True, width=2, outputs=2)
    kinds = np.random.default_rng(0).normal(size=(e.leaves // 3, 2)).astype(np.float32)
    e = replace(e, values=np.resize(kinds, e.values.shape))
    small = replace(INFO, l1_bytes=4 * kinds.nbytes)
    assert "leaf_row" not in prepare(e, small, "sliced").packed
    assert "leaf_row" in prepare(e, replace(INFO, l1_bytes=8 * kinds.nbytes), "sliced").packed


def test_chooses_by_expected_time() -> None:
    shallow = random_ensemble(16, trees=100, features=10, depth=6)
    deep = random_ensemble(17, trees=5, features=10, depth=10, full=True)
    assert prepare(shallow, INFO).strategy == "sliced"
    assert prepare(deep, INFO).strategy == "walk"
    assert prepare(shallow, INFO).ranked is not None
    many_columns = random_ensemble(22, trees=1, features=40, depth=5, full=True, flags=(0,))
    assert prepare(many_columns, INFO).ranked is None


def test_many_rows_on_all_threads() -> None:
    e = random_ensemble(12, trees=30)
    kernel = Kernel(e)
    n = kernel.plan.parallel_rows + 3 * kernel.plan.block_rows + 1
    x = sample_rows(e, 500)
    np.testing.assert_array_equal(kernel(np.resize(x, (n, e.features))), np.resize(reference(e, x), (n, 1)))


def test_arrays_that_contradict_each_other() -> None:
    e = random_ensemble(13)
    for change in (
        {"feature": e.feature + 5},
        {"left": e.left + e.nodes},
        {"output": e.output + 1},
        {"base": e.base.astype(np.float64)},
        {"right": np.zeros_like(e.right)},
    ):
        with pytest.raises(LoweringError, match="tree_ensemble"):
            prepare(TreeEnsemble(**{**vars_of(e), **change}), INFO)


def test_explanation_names_what_was_picked_and_what_each_candidate_would_take() -> None:
    e = random_ensemble(16, trees=100, features=10, depth=6)
    for sliced in (True, False):
        for ranked in (True, False):
            plan = prepare(e, INFO, "sliced" if sliced else "walk", ranked)
            blocks, alone, *facts = plan.explain().split("; ")
            networks = f"bit-sliced networks {'(expected ' * sliced}{plan.sliced_ns:.0f} ns"
            walks = f"interleaved walks {'(expected ' * (not sliced)}{plan.walk_ns:.0f} ns"
            assert networks in blocks
            assert walks in blocks
            assert blocks.startswith((networks if sliced else walks)[:17])
            chosen = "walks over ranks" if ranked else "walks"
            assert f"one by one: {chosen} (expected {plan.ranked_ns if ranked else plan.number_ns:.0f} ns" in alone
            assert f"{plan.number_ns if ranked else plan.ranked_ns:.0f} ns)" in alone
            assert any("100 trees" in fact for fact in facts)


def test_more_thresholds_than_ranks_can_count() -> None:
    stumps = 1 << 16
    one, none = random_ensemble(0, trees=1, depth=1, features=1, flags=(0,)), np.zeros(stumps, np.int32)
    e = replace(
        one,
        feature=none,
        threshold=np.arange(stumps, dtype=np.float32),
        left=none - 1,
        right=none - 2,
        flags=none.astype(np.uint8),
        roots=np.arange(stumps, dtype=np.int32),
        output=none,
        values=np.array([[1.0], [0.0]], np.float32),
        base=np.zeros(1, np.float32),
    )
    plan = prepare(e, INFO)
    assert plan.schedule == TreeSchedule("walk", False, plan.block)
    assert "bit-sliced networks are impossible" in plan.explain()
    assert "walks over ranks are impossible" in plan.explain()
    x = np.array([[-1], [34_999.5], [stumps - 1], [np.nan]], np.float32)
    np.testing.assert_array_equal(Kernel(e, plan)(x)[:, 0], [stumps, stumps - 35_000, 0, 0])
