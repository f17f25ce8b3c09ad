"""Figures from plain data."""

from bapo.ui.charts import drift_figure


def lines(figure):
    return {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data}


def test_one_line_per_adapter_and_a_zero_line():
    figure = drift_figure({"dpo": [-1.0, -3.0], "bapo": [0.5, 0.25]}, ["a", " b"])
    assert lines(figure) == {"DPO": ([1, 2], [-1.0, -3.0]), "BAPO": ([1, 2], [0.5, 0.25])}
    zero = figure.layout.shapes[0]
    assert (zero.y0, zero.y1) == (0, 0)
    assert figure.data[0].line.dash != figure.data[1].line.dash, "not by colour alone"
    assert [note.text for note in figure.layout.annotations] == ["<b>DPO</b> -3.0", "<b>BAPO</b> +0.2"]


def test_the_axis_holds_every_value_and_zero():
    low, high = drift_figure({"dpo": [-40.0], "bapo": [2.0]}, ["a"]).layout.yaxis.range
    assert low < -40
    assert high > 2
    low, high = drift_figure({"dpo": [-0.01]}, ["a"]).layout.yaxis.range
    assert (low, high) == (-1, 1), "noise is shown small"


def test_labels_of_close_lines_stand_apart():
    close = drift_figure({"dpo": [-10.0], "bapo": [-9.9]}, ["a"]).layout.annotations
    assert close[1].yshift - close[0].yshift == 18
    far = drift_figure({"dpo": [-10.0], "bapo": [0.0]}, ["a"]).layout.annotations
    assert {note.yshift for note in far} == {0}


def test_an_empty_chart_and_hostile_tokens():
    assert lines(drift_figure({}, [])) == {}
    assert lines(drift_figure({"dpo": []}, [])) == {"DPO": ([], [])}
    figure = drift_figure({"dpo": [-1.0]}, ["<img src=x>\n"])
    assert list(figure.data[0].customdata) == ["&lt;img src=x>↵"]
