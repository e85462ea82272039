"""Graph nodes of a decode step, counted against mlx-lm's; and the arithmetic of the benchmarks."""

from collections import Counter

import mlx.core as mx

from benchmarks import contexts, graph_nodes, pairs


def test_unevaluated_primitives_are_counted():
    x = mx.ones(4)
    mx.eval(x)
    a, b = mx.split(mx.exp(x) + x, 2)
    assert graph_nodes.primitives([a * b]) == Counter(Exp=1, Add=1, Split=1, Multiply=1)
    compiled = mx.compile(lambda x: mx.exp(x) * 2)
    assert graph_nodes.primitives([compiled(compiled(x))]).total() == 2


def test_step_has_at_most_80_percent_of_mlx_lms_nodes():
    rows = graph_nodes.counted("gpu", vocabulary=2048)
    assert [row["sampling"] for row in rows] == ["recommended", "greedy"]
    for row in rows:
        assert row["nodes"]["mlx-lm"] > 40 * 25, "layers are missing from the count"
        assert row["ratio"] <= 0.8, row


def test_engines_take_turns_and_the_first_turn_is_not_counted():
    turns = list[str]()

    def engine(name: str) -> float:
        turns.append(name)
        return float(len(turns))

    found = pairs.in_turn({name: lambda name=name: engine(name) for name in "ab"}, 5)
    assert "".join(turns) == "ab" * 6
    assert found == {"a": [3, 5, 7, 9, 11], "b": [4, 6, 8, 10, 12]}
    ratio = pairs.ratio(found["b"], found["a"])
    assert (ratio["median"], ratio["lower_95"]) == (8 / 7, 12 / 11)


def test_a_fitted_line():
    slope, start, r2 = contexts.line([0, 1, 2], [1, 3, 5])
    assert (round(slope, 9), round(start, 9), round(r2, 9)) == (2, 1, 1)
