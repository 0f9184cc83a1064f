"""The model's parts, as users freeze them and give them learning rates."""

PARTS = ("vision", "projector", "decoder", "embeddings", "head")
"""vision: CLIP; projector: img_projection and the two separators; decoder: layers and final norm; embeddings:
embed_tokens; head: lm_head."""

VISION_TOWER = "vision_embed_tokens.img_processor."


def part_of(parameter_name: str) -> str:
    """Names the part of a parameter, also under PEFT's prefixes.

    >>> part_of("model.vision_embed_tokens.sub_GN"), part_of("base_model.model.lm_head.lora_A.default.weight")
    ('projector', 'head')

    Raises:
        ValueError: not a parameter of this model.
    """
    if VISION_TOWER in parameter_name:
        return "vision"
    if "vision_embed_tokens." in parameter_name:
        return "projector"
    if "embed_tokens." in parameter_name:
        return "embeddings"
    if "lm_head." in parameter_name:
        return "head"
    if ".layers." in parameter_name or "model.norm." in parameter_name:
        return "decoder"
    raise ValueError(f"{parameter_name} is not a parameter of Phi-3-vision")


def is_never_used(parameter_name: str, num_vision_layers: int) -> bool:
    """Says whether a parameter stays in the file but takes no part in the computation.

    CLIP's features are taken before its last layer, so that layer and ``post_layernorm`` never get a gradient.
    """
    return VISION_TOWER in parameter_name and (
        "post_layernorm" in parameter_name or f"encoder.layers.{num_vision_layers - 1}." in parameter_name
    )
