"""S-VAM: a shortcut video-action model. Start with the README, then `dvc.yaml`, then one stage."""

import os

# Read by OpenMP when torch is imported, hence here, before any module of ours can import it; worker processes inherit it.
# By default OpenMP's threads spin while they wait, and beside another busy process training takes eight times as long. Where
# they never spin (a count of 0), a step takes 1.4 times as long on a quiet machine. At this count it takes as long there as
# with the default, and twice as long beside another training (U-Net of the default params, two cores without AVX-512, in
# pairs). On two cores with AVX-512, where the U-Net computes in bfloat16, a step beside another training took 11 times as long
# as alone (4.6 s against .42): nine tenths of it in a barrier that oneDNN compiles, spins, and no setting of OpenMP reaches. In
# float32 it took 1.4 times as long (.70 s against .50).
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
