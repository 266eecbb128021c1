"""The page of a report: parsed, it holds the report's numbers, and nothing a run said is markup."""

import json
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from row_models import llama_folder, llava_folder
from typer.testing import CliRunner

from dare_hf import DareReport, apply_dare, last_report
from dare_hf.cli import app
from dare_hf.errors import DareInputError
from dare_hf.generation.feature_grid import picture_grids
from dare_hf.testing import tiny_inputs, tiny_model
from dare_hf.visualize import SeenImage

HOSTILE = '</pre><script>alert("x")</script><img src=https://example.org/x onerror=y>'
VOID = {"meta", "rect", "path", "use", "image", "img", "br"}


class Page(HTMLParser):
    """Tags, attributes and texts of a page; refuses tags that do not close where they opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.texts, self.values = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "data":
            self.values.append(int(dict(attributes)["value"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> where another is open"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def names(self) -> set[str]:
        return {tag for tag, _ in self.tags}

    def of(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


@pytest.fixture(scope="module")
def report() -> DareReport:
    model = tiny_model("llava")
    apply_dare(model)
    model.generate(**tiny_inputs(model), max_new_tokens=4, do_sample=False)
    found = last_report(model)
    found.notes.append(HOSTILE)
    return found


def _seen(grid: tuple[int, int], layers: int = 4, hops: tuple[int, ...] = (1, 2)) -> SeenImage:
    held = {hop: np.ones((layers, *grid), dtype=bool) for hop in hops}
    held[hops[-1]][:, 0] = False
    return SeenImage(Image.new("RGB", (40, 20), (9, 90, 200)), HOSTILE, held)


def test_numbers_are_the_reports(report: DareReport) -> None:
    page = Page(report.to_html())
    flops, full = report.flops, report.flops_baseline
    costs = [(flops[p], full[p]) for p in ("prefill", "decode")]
    costs += [(sum(flops.values()), sum(full.values()))]
    costs += [(report.kv_bytes, report.kv_bytes_baseline)]
    wanted = [number for pair in costs for number in pair]
    assert page.values[: len(wanted)] == wanted
    shares = {text for text in page.texts if ", layer " in text}
    for layer, held in enumerate(report.retention[0]):
        for name, share in held.items():
            assert f"hop 0, layer {layer}, {name}: {share!r}" in shares
    assert "hop 1, layer 0, vision" not in "".join(shares), "hop 1 begins as hop 0 ends"
    assert f"{report.seconds:.2f} s" in "".join(page.texts)


def test_what_a_run_said_is_text(report: DareReport) -> None:
    page = Page(report.to_html(answer=HOSTILE, images=[_seen((2, 4))], title=HOSTILE))
    assert not page.names() & {"script", "img", "link", "iframe", "object"}
    assert not [name for _, a in page.tags for name in a if name.startswith("on")]
    assert page.texts.count(HOSTILE) == 5, "title, heading, answer, caption, note"
    outside = [a.get(k) for _, a in page.tags for k in ("src", "href") if k in a]
    assert all(link.startswith(("data:image/png;base64,", "#picture")) for link in outside)


def test_pictures_are_there_once_and_covered_where_nothing_is_held(report: DareReport) -> None:
    page = Page(report.to_html(images=[_seen((2, 4)), _seen((3, 1), hops=(2,))]))
    assert len(page.of("image")) == 2
    assert len(page.of("use")) == 3 * (2 + 1), "three groups of layers at each hop"
    covers = page.of("path")
    assert len(covers) == 3 + 3, "the last hop of each holds less"
    assert covers[0]["d"] == "M0 0h1v1h-1zM1 0h1v1h-1zM2 0h1v1h-1zM3 0h1v1h-1z"
    assert "late layer" in "".join(page.texts) or "late" in page.texts


def test_a_picture_whose_tokens_lie_nobody_knows_where_says_so(report: DareReport) -> None:
    page = Page(report.to_html(images=[SeenImage(Image.new("RGB", (300, 500)), "a")]))
    assert "not known for this model" in "".join(page.texts)
    assert not page.of("use")


def test_held_of_another_shape_is_refused(report: DareReport) -> None:
    seen = SeenImage(Image.new("RGB", (4, 4)), "a", {1: np.ones((4, 4), dtype=bool)})
    with pytest.raises(DareInputError, match=r"images\[0\].held\[1\].*\[4, 4\]"):
        report.to_html(images=[seen])


def test_an_empty_report_is_a_page_too() -> None:
    assert "0 hops" in "".join(Page(DareReport().to_html()).texts)


def test_light_and_dark_are_both_there(report: DareReport) -> None:
    assert "prefers-color-scheme:dark" in report.to_html()


def test_repr_is_one_line_and_str_tells_hop_1_once(report: DareReport) -> None:
    assert "\n" not in repr(report)
    assert "0.0" not in repr(report).split("FLOPs")[1]
    hop0, hop1 = [line for line in str(report).splitlines() if line.startswith("hop ")]
    assert "as after the prompt" in hop1
    assert " of vision" in hop0
    assert " of vision" not in hop1


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    files = [tmp_path / "a<b>.png", tmp_path / "c.png"]
    for number, file in enumerate(files):
        Image.new("RGB", (30, 20), (90 * number, 9, 9)).save(file)
    return [part for file in files for part in ("--image", str(file))]


def test_report_of_ones_own_model(tmp_path: Path, photos: list[str]) -> None:
    model, out = llava_folder(tmp_path / "model"), tmp_path / "new" / "page.html"
    run = ["report", str(model), *photos, "--prompt", "what is <image> and <image> red"]
    done = CliRunner().invoke(app, [*run, "--out", str(out), "--max-new-tokens", "3", "--json"])
    assert done.exit_code == 0, done.output
    assert done.stdout.count("\n") == 1
    found = json.loads(done.stdout)
    page = Page(out.read_text(encoding="utf-8"))
    assert page.values[-2:] == [found["kv_bytes"], found["kv_bytes_baseline"]]
    assert found["kv_bytes"] < found["kv_bytes_baseline"]
    assert found["answer"] in page.texts
    assert "image 1: a<b>.png" in page.texts
    assert found["tokens"]["vision"][0] == 18
    held = [float(t.split(": ")[1].split("%")[0]) / 100 for t in page.texts if "% held" in t]
    vision = [layer["vision"] for layer in found["retention"][0]]
    groups = [np.mean(vision[:2]), vision[2], vision[3]]  # of 4 layers
    # Two pictures of 3 x 3 patches: what the thumbnails show is what the report counted.
    assert np.mean([held[:3], held[3:]], axis=0) == pytest.approx(groups, abs=0.001)


def test_plot_of_ones_own_model(tmp_path: Path, photos: list[str]) -> None:
    model, out = llava_folder(tmp_path / "model"), tmp_path / "plots"
    run = ["plot", str(model), *photos, "--prompt", "what <image> <image>", "--out", str(out)]
    done = CliRunner().invoke(app, [*run, "--max-new-tokens", "2"])
    assert done.exit_code == 0, done.output
    assert {f.name for f in out.iterdir()} == {"retention.png", "retention_by_hop.png"}
    assert all(file.stat().st_size > 1000 for file in out.iterdir())


def test_a_language_model_has_a_page_without_pictures(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    run = ["report", str(llama_folder(tmp_path / "model")), "--prompt", "a cat", "--out", str(out)]
    assert CliRunner().invoke(app, run).exit_code == 0
    assert not Page(out.read_text()).of("image")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["anole", "--image", "x.png"], "--prompt"),
        (["some/model"], "Held-out items are there for"),
        (["anole", "--config", "nothing"], "dare-lh"),
        (["anole", "--prompt", "x", "--image", "nowhere.png"], "nowhere.png"),
        (["anole", "--out", "."], "expected a file"),
    ],
)
def test_what_cannot_be_reported_is_one_line(more: list[str], told: str) -> None:
    done = CliRunner().invoke(app, ["report", *more])
    assert done.exit_code == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert told in done.stderr


def test_report_of_a_held_out_item(tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", "volcano", "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    found, page = json.loads(done.stdout), Page(out.read_text())
    assert found["answer"] in page.texts
    assert {"the scene", "look 1"} <= set(page.texts)
    assert found["hops"] >= 3


GRID_CASES = {
    "patches merged by two": ("qwen2_vl", {"image_grid_thw": [[1, 4, 8]]}, 1, 8, [(2, 4)]),
    "two of other shapes": (
        "qwen2_vl",
        {"image_grid_thw": [[1, 4, 8], [1, 2, 2]]},
        2,
        9,
        [(2, 4), (1, 1)],
    ),
    "frames": ("qwen2_vl", {"image_grid_thw": [[2, 4, 4]]}, 1, 8, None),
    "tokens that are missing": ("qwen2_vl", {"image_grid_thw": [[1, 4, 8]]}, 1, 7, None),
    "squares": ("vipllava", {"pixel_values": [[[[0.0] * 6] * 6]]}, 2, 18, [(3, 3), (3, 3)]),
    "no square picture": ("vipllava", {"pixel_values": [[[[0.0] * 6] * 4]]}, 1, 9, None),
    "no square number": ("vipllava", {"pixel_values": [[[[0.0] * 6] * 6]]}, 1, 8, None),
    "a model nobody checked": ("idefics3", {}, 1, 9, None),
}


@pytest.mark.parametrize("case", GRID_CASES)
def test_grids_are_what_the_processor_says_or_unknown(case: str) -> None:
    kind, inputs, pictures, tokens, wanted = GRID_CASES[case]
    config = SimpleNamespace(
        model_type=kind, vision_config=SimpleNamespace(spatial_merge_size=2, patch_size=4)
    )
    tensors = {name: torch.tensor(value) for name, value in inputs.items()}
    assert picture_grids(config, tensors, pictures, tokens) == wanted
