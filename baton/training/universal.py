"""DeepSpeed's conversion of a ZeRO checkpoint into a universal one, as a program that dies with the one that started it.

    python -m baton.training.universal --input_folder FOLDER --output_folder FOLDER [--inject_missing_state]

What stays behind a killed training would write into the folder that the next one converts to.
"""

import os

from baton import program

if __name__ == "__main__":
    program.end_with_launcher()  # before DeepSpeed is imported, which takes seconds
    os.register_at_fork(after_in_child=program.die_with_parent)  # those that it divides the work among

    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(ds_to_universal.parse_arguments())
