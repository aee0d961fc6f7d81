"""Triton kernels in Triton's interpreter, on the CPU, against their references.

TRITON_INTERPRET is read when a kernel is decorated, so these tests have a pytest process of their own (`make test`
starts it); in any other they are not collected.
"""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
