"""``models`` and ``doctor``: what is here, and what the engine would do with it."""

import platform
from collections.abc import Iterator
from typing import Any

from rich.table import Table

import nanovllm_bento
from nanovllm_bento.cli.terminal import console
from nanovllm_bento.config import EngineConfig
from nanovllm_bento.errors import NanoVLLMError

NAMING = (
    ("demo", "SmolLM2-135M-Instruct, fetched once (98 MB), for a first try"),
    ("a folder", "a Hugging Face checkpoint: config.json, tokenizer.json, *.safetensors"),
    ("a .gguf file", "tokenizer and chat template come from its metadata"),
    ("owner/name", "a model of the Hugging Face Hub, downloaded when it is not cached"),
    ("name:version", "a model of the BentoML model store"),
)


def models() -> None:
    """Supported architectures, how a model is named, and the models found on this machine."""
    from nanovllm_bento.models.registry import SUPPORTED_ARCHITECTURES

    console.print("[bold]Architectures[/bold]")
    for architecture in sorted(SUPPORTED_ARCHITECTURES):
        console.print(f"  {architecture}")
    table = Table(title="A model is named as", title_justify="left", title_style="bold", box=None, show_header=False)
    for name, text in NAMING:
        table.add_row(f"  {name}", text)
    console.print(table)
    console.print("[bold]Found here[/bold]")
    found = list(local_models())
    for name, where in found:
        console.print(f"  {name}  [dim]{where}[/dim]")
    if not found:
        console.print("  none yet")


def local_models() -> Iterator[tuple[str, str]]:
    """(name, which cache) of models that need no download: the demo, the Hub's cache and the BentoML model store."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    from nanovllm_bento.hub import DEMO_NAME, cache_dir

    if any((cache_dir() / DEMO_NAME).glob("*.gguf")):
        yield DEMO_NAME, "this package's cache"
    try:
        for repo in sorted(scan_cache_dir().repos, key=lambda repo: repo.repo_id):
            if repo.repo_type == "model":
                yield repo.repo_id, f"Hub cache, {repo.size_on_disk_str}"
    except CacheNotFound:
        pass
    import bentoml

    for stored in bentoml.models.list():
        yield str(stored.tag), "BentoML model store"


def doctor() -> None:
    """What this machine offers and what the engine would choose on it."""
    for name, value in diagnose():
        console.print(f"[bold]{name:<22}[/bold] {value}", highlight=False)


def diagnose() -> Iterator[tuple[str, str]]:
    """(subject, finding) of everything that decides how the engine runs here."""
    import torch

    from nanovllm_bento.bench.environment import cpu, gpu, package_versions
    from nanovllm_bento.kernels.attention import explain_backends, select_backend
    from nanovllm_bento.kernels.linear import best_cpu_dtype
    from nanovllm_bento.serving.resources import explain_devices

    yield "nanovllm_bento", nanovllm_bento.__version__
    yield "Python", platform.python_version()
    yield from package_versions().items()
    processor = cpu()
    yield "CPU", f"{processor['model']}, {processor['cores']} cores, {processor['memory_gib']} GiB"
    yield "CPU capability", f"{processor['torch_capability']} ({', '.join(processor['flags']) or 'no known features'})"
    yield "torch threads", str(processor["torch_threads"])
    for card in gpu():
        yield "GPU", f"{card['name']}, {card['memory_mib']} MiB, driver {card['driver']}"
    yield "GPUs for serving", explain_devices(EngineConfig.create())
    cuda = torch.cuda.is_available()
    yield "device", "cuda" if cuda else "cpu (torch sees no GPU)"
    # For 64 and 128, the head dims of most models; an engine says at its start what it took for its own.
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else best_cpu_dtype()
    yield "dtype", f"{dtype} (auto{', the checkpoint decides' if cuda else ', the faster one on this CPU'})"
    block_size = EngineConfig.model_fields["block_size"].default
    for kv_dtype in (dtype, torch.float8_e4m3fn) if cuda else (dtype,):
        for head_dim in (64, 128):
            case: dict[str, Any] = {
                "num_heads": 16,
                "num_kv_heads": 8,
                "head_dim": head_dim,
                "dtype": dtype,
                "kv_dtype": kv_dtype,
                "block_size": block_size,
                "device": device,
            }
            try:
                chosen = select_backend("auto", **case)
                found = f"{chosen.name} (auto)"
            except NanoVLLMError as error:
                found = str(error)
            kv = "" if kv_dtype == dtype else ", fp8 KV"
            yield f"attention, {head_dim}{kv}", found
            for name, reason in explain_backends(**case):
                if reason is not None:
                    yield "", f"not {name}: {reason}"
    yield "CUDA graphs", "decode steps, unless enforce_eager or the torch backend" if cuda else "none on a CPU"
