"""What is collected here: the interpreted kernels only in the process that interprets them."""

import os

INTERPRETED = ["interpreted.py", "interpreted_nf4.py", "interpreted_normal_float.py"]
collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else INTERPRETED
