"""What runs a chain of programs in this process (chain.py): `python -m baton.launch.stages WORDS`, which the launcher starts.

A file of its own: in a process that a stage spawns, such as an engine's, Python reads the main file again, if it is no
`__main__.py`.
"""

import sys

from baton import program
from baton.launch import chain

if __name__ == "__mp_main__":  # such a process
    program.die_with_parent()

if __name__ == "__main__":
    program.run(lambda: chain.run(sys.argv[1:]))
