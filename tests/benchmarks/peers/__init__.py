"""What ``compare.py`` is made of: workloads, contenders, machines, and what is measured of them."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # PEFT would ask for the model's page when it saves an adapter
