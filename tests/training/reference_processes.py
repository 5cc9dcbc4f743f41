"""Run in several processes by test_resume_layouts.py: reference log-probabilities on CPU, with a death in the middle.

    torchrun --nproc_per_node N reference_processes.py FOLDER RUN [BATCHES]

FOLDER holds `model/` and `rows.json`. Process R writes the number of batches that it computed to `RUN-R.computed`. With
BATCHES, each process kills itself when it has so many of its own on disk. Processes see different keys, as where one of them
gets another answer from the hub.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
from accelerate import PartialState
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from baton import program
from baton.training.reference import kept_reference_logps

TOKENS_PER_ROW = 120


def main() -> None:
    folder, run, survives = Path(sys.argv[1]), sys.argv[2], int((*sys.argv[3:], "1000000")[0])
    PartialState(cpu=True)
    pairs = json.loads((folder / "rows.json").read_text())
    computed = folder / f"{run}-{program.rank()}.computed"
    computed.write_text("0")

    def count(*_):
        done = int(computed.read_text())
        if done == survives:
            os.kill(os.getpid(), signal.SIGKILL)
        computed.write_text(str(done + 1))

    def load():
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
        model.model.register_forward_pre_hook(count)
        return model

    key = [f"the model as process {program.rank()} sees it"]
    logps = kept_reference_logps(pairs, load, folder / "kept", key, folder / "parts", TOKENS_PER_ROW)
    np.save(folder / f"{run}-{program.rank()}.npy", logps)


if __name__ == "__main__":
    main()
