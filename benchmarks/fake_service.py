"""The real service over an engine without a model: ``bentoml serve benchmarks.fake_service:NanoVLLM``.

nanovllm_bento/bench/fake_engine.py says how it answers (NANOVLLM_FAKE_*). NANOVLLM_MODEL gives tokenizer and limits;
the demo's where it is not set.
"""

import os

os.environ.setdefault("NANOVLLM_MODEL", "demo")
os.environ["NANOVLLM_ENGINE_MODULE"] = "nanovllm_bento.bench.fake_engine"

from service import NanoVLLM  # the settings come first

__all__ = ["NanoVLLM"]
