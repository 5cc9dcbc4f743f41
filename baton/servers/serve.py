"""A vLLM server whose processes all end with it, and it with the program that BATON_PARENT names: `serve.py OPTIONS OF VLLM`.

vLLM's engine processes would outlive `kill -9` of their server, and hold its GPUs.
"""

import os
import runpy

from baton import program

if __name__ in ("__main__", "__mp_main__"):  # the server, and an engine process that it starts by spawn
    program.start_faster()  # vLLM leaves what it has started with alone ever after
    os.register_at_fork(after_in_child=program.die_with_parent)

if __name__ == "__mp_main__":
    program.die_with_parent()

if __name__ == "__main__":
    program.end_with_launcher()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
