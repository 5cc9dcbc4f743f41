"""Run under torchrun by test_tokenising.py: process 0 works for longer than the other may wait in a collective.

torchrun --nproc_per_node 2 rows_processes.py FOLDER
"""

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from transformers import TrainingArguments

from baton.training import layouts
from baton.training.rows import rows_on_disk

WAITS = timedelta(seconds=1)


def main() -> None:
    config = TrainingArguments(output_dir=sys.argv[1], use_cpu=True)
    assert config.world_size == 2
    torch.distributed.barrier()  # both are here
    torch.distributed.distributed_c10d._set_pg_timeout(WAITS)

    def rows():
        slow_until = time.monotonic() + 3 * WAITS.total_seconds()
        for number in range(3):
            while time.monotonic() < slow_until:
                hash(str(number) * 1000)
            yield {"number": number}

    sys.stdout.write(f"{len(rows_on_disk(rows, config, 'numbers'))} rows\n")

    def convert(checkpoint):
        time.sleep(3 * WAITS.total_seconds())
        (checkpoint / "latest_universal").touch()

    layouts.convert = convert
    sys.stdout.write(f"converted: {layouts._has_universal(Path(sys.argv[1]))}\n")


if __name__ == "__main__":
    main()
