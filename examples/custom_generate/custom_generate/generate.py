"""`generate` with DARE for the time of one call.

Called by transformers: `model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True)`.
"""

from dare_hf import DareConfig, dare_applied


def generate(model, dare="safe", dare_fields=None, **kwargs):
    """The model's own generate, its tokens routed.

    Args:
        model: A supported model of transformers without DARE on it.
        dare: A preset, a DareConfig, or a folder or hub id of an adapter.
        dare_fields: Fields of DareConfig over the preset, e.g. {"vision_retention": 0.4}.
        kwargs: As generate takes them.

    Returns:
        What generate returns.
    """
    config = DareConfig.preset(dare, **dare_fields) if dare_fields else dare
    with dare_applied(model, config):
        return model.generate(**kwargs)
