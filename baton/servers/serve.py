"""A vLLM server whose processes all end with it, and it with the program that BATON_PARENT names: `serve.py OPTIONS OF VLLM`.

vLLM's engine processes would outlive `kill -9` of their server, and hold its GPUs.
"""

import os
import runpy

from baton import program


def fork_engine_on_cpu() -> None:
    """Let vLLM fork its engine from the server on a CPU too, as it does on a GPU.

    There it starts the engine by spawn, for thread settings that apply to new processes alone, and which servers of Baton are
    started with (`processes.cpu_variables`). The engine would import everything again: 12 s of a core, at each start.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    platform = type(current_platform)
    check = platform.check_and_update_config

    def check_and_fork(config) -> None:
        check(config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    platform.check_and_update_config = staticmethod(check_and_fork)


if __name__ in ("__main__", "__mp_main__"):  # the server, and an engine process that it starts by spawn
    program.start_faster()  # vLLM leaves what it has started with alone ever after
    os.register_at_fork(after_in_child=program.die_with_parent)

if __name__ == "__mp_main__":
    program.die_with_parent()

if __name__ == "__main__":
    program.end_with_launcher()
    fork_engine_on_cpu()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
