"""What a decode step asks of the device, counted against mlx-lm: not timed, so it may be asserted."""

from collections import Counter

import mlx.core as mx

from benchmarks import graph_nodes


def test_primitives_are_counted_one_by_one_and_only_those_not_evaluated():
    x = mx.ones(4)
    mx.eval(x)
    a, b = mx.split(mx.exp(x) + x, 2)
    assert graph_nodes.primitives([a * b]) == Counter(Exp=1, Add=1, Split=1, Multiply=1)
    compiled = mx.compile(lambda x: mx.exp(x) * 2)
    assert graph_nodes.primitives([compiled(compiled(x))]).total() == 2


def test_a_step_has_at_most_four_fifths_of_mlx_lms_nodes():
    rows = graph_nodes.counted("gpu", vocabulary=2048)
    assert [row["sampling"] for row in rows] == ["recommended", "greedy"]
    for row in rows:
        assert row["nodes"]["mlx-lm"] > 40 * 25, "layers are missing from the count"
        assert row["ratio"] <= 0.8, row
