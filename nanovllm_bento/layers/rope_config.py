"""Settings of rotary position embeddings. A leaf without torch, so that a config can be read without it."""

from dataclasses import dataclass
from typing import Literal

RopeType = Literal["default", "linear", "llama3", "yarn", "factors"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions become angles; fields beyond ``theta`` matter only to the types that name them.

    linear: all frequencies divided by ``factor`` (Chen et al. 2023, position interpolation).
    llama3: low frequencies divided by ``factor``, high ones kept, a ramp between (Llama 3.1).
    yarn: NTK-by-parts with an attention factor on cos and sin (Peng et al. 2023, section 3.2-3.4).
    factors: frequency i divided by ``factors[i]``, head_dim / 2 of them (GGUF's rope_freqs.weight).
    original_max_position: context length, in tokens, that the model was trained on before scaling.
    """

    type: RopeType = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    factors: tuple[float, ...] = ()
