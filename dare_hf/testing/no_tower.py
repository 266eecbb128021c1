"""In the place of a tower that needs timm: nothing, since no pixels go through it."""

from transformers import AutoModel, Gemma3nVisionConfig, PreTrainedModel


class NoTowerConfig(Gemma3nVisionConfig):
    """Config of a Gemma 3n tower that is not built."""


class NoTower(PreTrainedModel):
    """Has no weights and no forward."""

    config_class = NoTowerConfig
    _supports_sdpa = True

    def __init__(self, config: NoTowerConfig) -> None:
        super().__init__(config)
        self.post_init()


AutoModel.register(NoTowerConfig, NoTower, exist_ok=True)
