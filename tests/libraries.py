"""What the programs of this environment import, imported once for all that tests run: see `programs.py`."""

from importlib import import_module
from importlib.util import find_spec

MODULES = ["pytest", "transformers.models.llama.modeling_llama"]
if find_spec("vllm"):
    from generation.engine import prepare_environment

    prepare_environment()  # as the programs do, before vLLM and torch are imported
    MODULES += ["transformers.pipelines", "vllm.entrypoints.llm", "vllm.model_executor.models.llama"]
    MODULES += ["vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker"]
else:
    MODULES += ["trl.trainer.dpo_trainer", "trl.trainer.kto_trainer", "trl.trainer.reward_trainer", "trl.trainer.sft_trainer"]

for module in MODULES:
    import_module(module)
