"""What notebooks show of a plan, a report, a pattern, a method and attention errors."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

import diffpatch
from diffpatch import TokenGrid, Window, showing
from tests.tiny import wan

LOCAL = Window(window=(-1, 1, 2), shift="none")


@pytest.fixture(scope="module")
def shown() -> dict[str, Any]:
    """One of each kind, by its class."""
    tiny = wan()
    diffpatch.patch(tiny.pipe, LOCAL, dense_steps=1, dense_layers=0)
    with (
        diffpatch.attention_error(tiny.pipe) as errors,
        diffpatch.attention_maps(tiny.pipe, layer=1, step=1) as maps,
    ):
        tiny.run()
    plan = diffpatch.plan("wan-1.3b", "radial", height=480, width=832, num_frames=81)
    pattern = LOCAL.pattern(TokenGrid(3, 2, 4))
    found = (plan, diffpatch.report(tiny.pipe), pattern, diffpatch.Radial(), errors, maps)
    return {type(one).__name__: one for one in found}


@pytest.fixture
def axes() -> Iterator[Any]:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot.subplots()[1]
    pyplot.close("all")


NAMES = ("Plan", "Report", "BlockPattern", "Radial", "AttentionErrors", "AttentionMaps")


@pytest.mark.parametrize("name", NAMES)
def test_a_repr_is_a_line_that_says_what_it_is(shown: dict[str, Any], name: str) -> None:
    text = repr(shown[name])
    assert text.startswith(f"{name}(") and "\n" not in text and len(text) < 200


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_gets_a_picture_or_a_page(shown: dict[str, Any], name: str) -> None:
    one = shown[name]
    if name == "BlockPattern":
        with Image.open(io.BytesIO(one._repr_png_())) as picture:
            assert picture.format == "PNG"
        return
    page = one._repr_html_()
    assert "<table>" in page
    assert ("data:image/png;base64," in page) == (name != "Radial")
    if name == "Plan":
        assert ">by step</td>" in page


@pytest.mark.parametrize("name", NAMES)
def test_a_plot_is_a_figure_and_its_axes(shown: dict[str, Any], name: str, axes: Any) -> None:
    figure, ax = shown[name].plot()
    assert ax in figure.axes and ax.get_title()
    figure, ax = shown[name].plot(axes)
    assert ax is axes and figure is axes.get_figure()


def test_heat_maps_hold_the_numbers(shown: dict[str, Any], axes: Any) -> None:
    report = shown["Report"]
    report.plot(axes)
    assert axes.images[0].get_array().tolist() == report.kept_map == [[1.0, 1.0], [0.25, 0.25]]
    errors = shown["AttentionErrors"]
    [row] = errors.map  # step 0 was dense
    assert row == pytest.approx([errors.per_layer[f"transformer.{n}"] for n in range(2)])


def numbered(axis: Any) -> list[str]:
    """The numbers that are drawn along an axis."""
    axis.get_figure().canvas.draw()
    return [tick.get_text() for tick in axis.get_ticklabels() if tick.get_text()]


def test_steps_and_layers_have_whole_numbers(shown: dict[str, Any], axes: Any) -> None:
    shown["Report"].plot(axes)
    assert numbered(axes.yaxis) == ["0", "1"] and numbered(axes.xaxis) == ["0", "1"]
    _, ax = shown["AttentionErrors"].plot()
    assert numbered(ax.yaxis) == ["1"]  # step 0 was dense
    _, ax = showing.heat(None, [[0.5] * 40] * 3, "", ("a", "b", "c"), rows=[7, 9, 12])
    assert numbered(ax.yaxis) == ["7", "9", "12"]
    columns = [int(text) for text in numbered(ax.xaxis)]
    assert 5 < len(columns) <= 24 and 0 <= min(columns) < max(columns) < 40


def test_what_is_shown_is_escaped() -> None:
    report = diffpatch.Report("<i>&", 1.0, 0, 0, {}, {}, 0, 0, [], {}, [])
    assert "&lt;i&gt;&amp;" in report._repr_html_() and "<i>" not in report._repr_html_()
    with pytest.raises(diffpatch.DiffpatchError, match="run the pipeline"):
        report.plot()


def test_without_matplotlib_a_plot_says_what_to_install(
    shown: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(diffpatch.DiffpatchError, match=r"diffpatch\[plot\]"):
        shown["Report"].plot()
    assert shown["Report"]._repr_html_()
