"""S-VAM: a shortcut video-action model. Start with the README, then `dvc.yaml`, then one stage."""

import os

# Read by OpenMP when torch is imported, hence here, before any module of ours can import it; worker processes inherit it.
# By default OpenMP's threads spin while they wait, and beside another busy process training takes many times as long; where
# they never spin (a count of 0), a step takes 1.4 times as long on a quiet machine. Of the counts between, 2,000 is the lowest
# at which a step of the video model takes as long there as at 10,000 (0.36 s; at 1,000 it is 0.41, at 500 0.47), and beside
# another training it takes 0.9 s (at 10,000: 2.1 s; two cores with AVX-512, in pairs).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
