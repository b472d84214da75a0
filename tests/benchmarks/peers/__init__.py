"""What ``compare.py`` is made of: workloads, contenders, machines, and what is measured of them."""
