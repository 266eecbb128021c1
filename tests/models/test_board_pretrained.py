"""dare-board as it ships, where its trained parts and the text model's package are."""

from typing import Any

import pytest
from huggingface_hub import constants

from dare_hf.assets import backbone, board
from dare_hf.demo import arms, embedded
from dare_hf.demo.comparison import compare
from dare_hf.errors import DareError
from dare_hf.evaluation.suite import TASKS
from dare_hf.tasks import board_run


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The pretrained one, put together anew."""
    if not board.is_shipped():
        pytest.skip("this tree has no trained weights of dare-board")
    try:
        backbone.gguf_file()
    except DareError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(tmp_path_factory.mktemp("home")))
        yield embedded.load_runner("board")


@pytest.mark.extras
def test_the_pretrained_model_answers_and_is_pruned(real: Any) -> None:
    items = real.sample(12, "easy", 0)
    arm = arms.demo_arm("board", real.processor, (), adapter=None, training_free=False)
    result = compare(real, items, arm)
    assert result.full.score.unparsed == 0
    assert result.full.score.accuracy > 0.5
    assert arm.name == "dare-lh", "the shipped adapter is not the default"
    assert result.dare.score.unparsed == 0
    assert result.dare.score.accuracy > 0.8
    assert result.to_dict()["kv_ratio"] < 0.6


@pytest.mark.extras
def test_a_blank_board_is_answered_by_chance(real: Any) -> None:
    items = real.sample(24, "easy", 0)
    shown = TASKS["board"].control("blank", items)
    found = board_run.score(board_run.solve(real.model, real.processor, items, 8, pictures=shown))
    assert found.accuracy < 0.5
