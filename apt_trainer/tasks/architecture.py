"""What kind of model a config describes, as far as tasks care. Not for how models are built: that is ``models``."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

ENCODER, DECODER, ENCODER_DECODER = "encoder", "decoder", "encoder-decoder"
IMAGE = "encoder of images"


def architecture_of(config: Any) -> str:
    """ "encoder", "decoder", "encoder-decoder" or "encoder of images".

    Encoders are the models that transformers offers for masked language modelling. Some of them also have a head for
    causal language modelling, whose tokens would see what they are to predict.
    """
    if config.is_encoder_decoder:
        return ENCODER_DECODER
    model_type = getattr(config, "apt_base_model_type", None) or config.model_type
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return ENCODER
    return IMAGE if model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES else DECODER
