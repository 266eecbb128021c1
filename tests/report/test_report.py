"""The report: what the builder counts is what it tells, and it is plain data."""

import json

import pytest

from dare_hf.report import DareReport
from dare_hf.report.builder import ReportBuilder
from dare_hf.report.flops import LayerShape

SHAPE = LayerShape(linear_macs=100, q_heads=2, kv_heads=1, qk_dim=4, v_dim=4)


def _builder() -> ReportBuilder:
    builder = ReportBuilder([SHAPE, SHAPE], hidden=8, vocab=10, itemsize=2)
    builder.forward([[6], [3]], [[6], [3]], [6], [6], "prefill")
    builder.scorer(7, "prefill")
    builder.head(1, "prefill")
    builder.forward([[1], [1]], [[7], [4]], [1], [7], "decode")
    builder.set_tokens([[[2, 4], [1, 0]]])
    for layer, kept in enumerate((4, 1)):
        builder.retention(0, layer, 1, kept, 4)
        builder.retention(0, layer, 0, 2, 2)
        builder.retention(1, layer, 1, kept, 4)
    builder.kv(176, [[7], [4]], [7])
    builder.seconds(0.25)
    return builder


def test_flops_are_counted_by_phase() -> None:
    report = _builder().snapshot()
    head = 2 * 8 * 10
    assert report.flops["prefill"] == 2 * (9 * 100 + (36 + 9) * 16) + 7 + head
    assert report.flops_baseline["prefill"] == 2 * (12 * 100 + 72 * 16) + head
    assert report.flops["decode"] == 2 * (2 * 100 + (7 + 4) * 16)
    assert report.flops_baseline["decode"] == 2 * (2 * 100 + 14 * 16)


def test_bytes_tokens_and_retention() -> None:
    report = _builder().snapshot()
    assert report.kv_bytes == report.kv_bytes_predicted == 11 * 8 * 2
    assert report.kv_bytes_baseline == 14 * 8 * 2
    assert report.tokens == {"vision": [4, 0], "text": [2, 1]}
    assert report.hops == 2
    assert report.retention[0] == [{"text": 1.0, "vision": 1.0}, {"text": 1.0, "vision": 0.25}]
    assert report.retention[1][1] == {"text": None, "vision": 0.25}


def test_report_is_json_and_independent_of_the_builder() -> None:
    builder = _builder()
    report = builder.snapshot()
    assert DareReport(**json.loads(json.dumps(report.to_dict()))) == report
    builder.head(3, "decode")
    builder.note("layer 0 keeps everything")
    builder.note("layer 0 keeps everything")
    assert not report.notes
    assert builder.snapshot().notes == ["layer 0 keeps everything"]
    assert builder.snapshot().flops["decode"] == report.flops["decode"] + 3 * 2 * 8 * 10


def test_text_tells_amounts_and_ratios() -> None:
    builder = _builder()
    builder.note("a note")
    builder.skipped(1, 3)
    text = str(builder.snapshot())
    assert "2 hops, 0.25 s" in text
    assert "176 B" in text
    assert "0.79" in text, "11 of 14 tokens stored"
    assert "hop 0: 4 vision + 2 text tokens; held after the prompt: 0.62 of vision" in text
    assert "hop 1: 0 vision + 1 text tokens; held at its begin: 0.62 of vision (layers" in text
    assert "note: a note" in text
    assert "skipped by sampled tokens: 3" in text
    assert "predicted" not in text


def test_empty_report_prints() -> None:
    assert "0 hops" in str(DareReport())


@pytest.mark.parametrize("count", [0, 999, 1000, 999_700, 123456, 2.5e9, 4e17])
def test_amounts_stay_narrow(count: float) -> None:
    lines = str(DareReport(kv_bytes=int(count), kv_bytes_predicted=int(count))).splitlines()
    assert len(lines[5]) <= 46
    assert "e+" not in lines[5]
