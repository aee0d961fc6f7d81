"""nanovllm_bento: a compact LLM inference engine served with BentoML.

``LLM`` and ``SamplingParams`` are loaded on first use, so that importing a leaf of this package (an HTTP worker does)
never imports torch.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "ScoreOutput", "__version__"]

if TYPE_CHECKING:
    from nanovllm_bento.llm import LLM
    from nanovllm_bento.outputs import CompletionOutput, RequestOutput, ScoreOutput
    from nanovllm_bento.sampling_params import SamplingParams


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from nanovllm_bento.llm import LLM

        return LLM
    if name == "SamplingParams":
        from nanovllm_bento.sampling_params import SamplingParams

        return SamplingParams
    if name in ("RequestOutput", "CompletionOutput", "ScoreOutput"):
        from nanovllm_bento import outputs

        return getattr(outputs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
