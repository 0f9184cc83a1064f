"""How far rounding to 16 bit moves random models' logits: a merge's own rounding, and the one that sets its limit.

    python benchmarks/rounding.py                                # decoders of 4 to 32 layers: seconds on two CPU cores
    python benchmarks/rounding.py --layers 32 --gains 2 2.4 3    # larger weights: models that amplify rounding

A random bf16 base gets random LoRA adapters and is merged in memory, as ``phi3v export`` does. ``real`` is the relative
difference between the rounded model's logits and the adapter's, ``other`` the one that another rounding of the same
weights makes, ``merge`` the one before any rounding. A decoder layer's weights are multiplied by ``gain``.
"""

import argparse

import torch
from peft import LoraConfig, get_peft_model

from phi3v.export.comparison import relative_difference
from phi3v.export.rounding import move_within_rounding, names_to_round
from phi3v.model.checkpoint import merge_adapter
from phi3v.model.configuration_phi3_v import Phi3VConfig
from phi3v.model.modeling_phi3_v import Phi3VForCausalLM

HIDDEN = 128
TARGETS = r".*\.(qkv_proj|o_proj|gate_up_proj|down_proj)"
ADAPTER_SHARE = 0.05
"""Size of an adapter's second matrix beside its random start."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 32], metavar="N", help="decoder layers")
    parser.add_argument("--gains", type=float, nargs="+", default=[1.0], metavar="X", help="times a layer's weights")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16", help="format to round to")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print("layers  gain  adapter    merge     real    other  real/other  same top token")
    for layers in options.layers:
        for gain in options.gains:
            print(measure(layers, gain, dtype), flush=True)


@torch.no_grad()
def measure(layers: int, gain: float, dtype: torch.dtype) -> str:
    torch.manual_seed(0)
    model = Phi3VForCausalLM(
        Phi3VConfig(
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=HIDDEN // 16,
            rope_scaling={"type": "su", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8},
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
            },
        )
    ).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ".layers." in name:
            parameter.normal_(std=gain * parameter.shape[1] ** -0.5)
        elif parameter.ndim == 2:
            parameter.normal_(std=1.0 if "embed_tokens" in name else parameter.shape[1] ** -0.5)
    model = model.to(dtype).to(torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights=False))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.mul_(ADAPTER_SHARE * gain)
    ids = torch.randint(100, 30_000, (2, 48), generator=torch.Generator().manual_seed(1))
    trained = adapted(input_ids=ids).logits
    with adapted.disable_adapter():  # pyright: ignore[reportCallIssue]
        effect = relative_difference(adapted(input_ids=ids).logits, trained)
    merged = merge_adapter(adapted, torch.float32)  # pyright: ignore[reportArgumentType]
    merge = relative_difference(merged(input_ids=ids).logits, trained)
    names = names_to_round(merged, dtype)
    rounded = merged.to(dtype).to(torch.float32)
    of_rounded = rounded(input_ids=ids).logits
    move_within_rounding(rounded, names, dtype)
    real = relative_difference(of_rounded, trained)
    other = float((rounded(input_ids=ids).logits - of_rounded).norm() / trained.norm())
    same = float((of_rounded.argmax(-1) == trained.argmax(-1)).float().mean())
    differences = "  ".join(f"{value:7.1e}" for value in (effect, merge, real, other))
    return f"{layers:6}  {gain:4.1f}  {differences}  {real / other:10.2f}  {same:14.1%}"


if __name__ == "__main__":
    main()
