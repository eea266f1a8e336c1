"""What all tests share: one thread each, so that results do not depend on the machine, and nothing that reaches the network."""

from __future__ import annotations

import os

# Before torch or any library with an own thread pool is imported.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DVC_NO_ANALYTICS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
