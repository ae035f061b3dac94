"""Methods over methods: what they pass on, and whose a parameter of a combination is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import diffpatch
from diffpatch import BadParameter, Dense, Linear, Method, Neighborhood, Radial, Temporal, Window
from diffpatch.methods.base import Attended, AttentionCall
from diffpatch.methods.wrapper import Wrapper

GRID = diffpatch.TokenGrid(3, 6, 8, text_after=5)


@dataclass(frozen=True)
class Plain(Wrapper):
    """Changes nothing."""

    name = "plain"


@pytest.mark.parametrize(
    "method",
    [
        Radial(),
        Neighborhood(window=0.5, sharpen=1.2, layers=(0.5, 0.3)),
        Linear(kept=0.3),
        Temporal(over=Window(), mode="skip"),
        Temporal(over=Window(), mode="mask", budget_gib=1),
    ],
)
def test_a_wrapper_that_says_nothing_is_what_it_wraps(method: Method) -> None:
    plain = Plain(method)
    facts = [name for name, value in vars(Method).items() if isinstance(value, property)]
    assert len(facts) >= 8
    for fact in facts:
        assert getattr(plain, fact) == getattr(method, fact), fact
    variant = plain.variant(1, 2)
    assert variant == method.variant(1, 2)
    pattern = method.pattern(GRID, variant)
    assert torch.equal(plain.pattern(GRID, variant).dense(), pattern.dense())
    assert plain.softmax_factor() == method.softmax_factor()
    assert plain.kept_at(pattern, 1) == method.kept_at(pattern, 1)
    assert plain.work(pattern, 1, "torch") == method.work(pattern, 1, "torch")
    assert plain.at_most(pattern) == method.at_most(pattern)
    assert plain.state_size(pattern, 2, 16) == method.state_size(pattern, 2, 16)
    assert plain.state_limit() == method.state_limit()
    assert plain.with_kept(0.4) == Plain(method.with_kept(0.4))
    q, k, v = torch.randn(3, 1, GRID.num_tokens, 2, 16).double()
    out, expected = (m.attend(q, k, v, AttentionCall(pattern)).out for m in (plain, method))
    assert torch.equal(out, expected)


def test_every_public_method_of_a_method_is_passed_on() -> None:
    """Whoever gives `Method` something to override gives it to `Wrapper`, too."""
    own = {n for n in vars(Method) if not n.startswith("_") and n not in ("name", "complete")}
    # `plot` draws what `pattern` gives.
    assert own - {"check", "validate", "plot"} <= vars(Wrapper).keys()


@pytest.mark.parametrize(
    ("name", "params", "expected"),
    [
        ("radial+temporal", {"kept": 0.2}, Temporal(over=Radial(kept=0.2))),
        ("radial+temporal", {"kept": 0.2, "mode": "skip"}, Temporal(Radial(kept=0.2), mode="skip")),
        (
            "radial+temporal",
            {"kept": 0.2, "mode": "mask"},
            Temporal(over=Radial(), mode="mask", kept=0.2),
        ),
        ("dense+temporal", {"kept": 0.2, "mode": "mask"}, Temporal(Dense(), mode="mask", kept=0.2)),
        (["window", "temporal"], {"window": 0.5, "refresh": 3}, Temporal(Window(0.5), refresh=3)),
    ],
)
def test_a_parameter_of_both_goes_where_it_means_something(
    name: Any, params: dict[str, Any], expected: Method
) -> None:
    assert diffpatch.make_method(name, **params) == expected


def test_a_combination_says_itself_what_it_is_over() -> None:
    with pytest.raises(BadParameter, match="no parameter 'over'"):
        diffpatch.make_method("radial+temporal", over=Window())
    assert diffpatch.make_method("temporal", over=Window()) == Temporal(over=Window())


def test_an_object_has_its_parameters_inside() -> None:
    with pytest.raises(BadParameter, match=r"decay=1\.0 inside it, or give the name 'radial'"):
        diffpatch.make_method(Radial(decay=0.5), decay=1.0)
    with pytest.raises(BadParameter, match=r"Radial is a class: give Radial\(\)"):
        diffpatch.make_method(Radial)  # type: ignore[arg-type]
    with pytest.raises(BadParameter, match="None must be a method's name or object"):
        diffpatch.make_method(None)  # type: ignore[arg-type]


def test_who_attends_in_another_way_says_whether_it_only_skips() -> None:
    def attend(self: Any, q: Any, k: Any, v: Any, call: Any) -> Attended:
        return Attended(q, 1.0, "none")

    with pytest.raises(TypeError, match="only_skips = False"):
        type("Silent", (Method,), {"attend": attend})
    told: Any = dataclasses.dataclass(frozen=True)(
        type("Told", (Method,), {"attend": attend, "only_skips": False})
    )
    assert not told().only_skips and Window().only_skips and not Linear().only_skips


def test_the_methods_are_a_module_to_import() -> None:
    import diffpatch.methods as m

    assert m.Radial is Radial and m.__name__ == "diffpatch.methods"
