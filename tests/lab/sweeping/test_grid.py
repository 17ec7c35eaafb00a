import pytest
from lab.sweeping.grid import expand, seeds_of, values_in


def test_all_combinations_in_order():
    found = expand(
        {"neuron": ["lif", "dlif"], "norm,rho": [["l2", 1.0], ["l1", 3.0]], "seedless": [None]}
    )
    seen = [(one["neuron"], one["norm"], one["rho"]) for one in found]
    assert seen == [
        ("lif", "l2", 1.0),
        ("lif", "l1", 3.0),
        ("dlif", "l2", 1.0),
        ("dlif", "l1", 3.0),
    ]
    for one in found:
        assert one["seedless"] is None
    assert expand({}) == [{}]
    each_once = {"mode": ["none", "at"], "eps": [1, 2]}
    seen = values_in(expand({"mode,eps": [["none", 1], ["at", 1], ["at", 2]]}))
    assert seen == each_once


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ({"rho": 1}, r"needs a list of values for every option, got rho: 1; write \[1\]"),
        ({"rho": []}, r"needs a list of values for every option, got rho: \[\]; give one or more"),
        ({"rho": "at"}, "needs a list"),
        (
            {"norm,rho": [["l1", 3], ["l2"]]},
            r"norm,rho needs 2 values in each of its entries, got \['l2'\]",
        ),
        ({"norm,rho": [["l1", 3]], "rho": [1]}, "rho occurs twice"),
        ({1: [2]}, "needs names of options, got 1"),
    ],
)
def test_wrong_grids(grid, message):
    with pytest.raises(ValueError, match=message):
        expand(grid)


def test_seeds():
    assert seeds_of(2) == [0, 1]
    assert seeds_of([5, 3]) == [5, 3]
    for wrong in (0, [], [1, 1], [-1], ["a"], [0.5]):
        with pytest.raises(ValueError, match="seeds must be"):
            seeds_of(wrong)
