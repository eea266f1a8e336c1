"""S-VAM: a shortcut video-action model. Start with the README, then `dvc.yaml`, then one stage."""

import os

# Read by OpenMP when torch is imported, hence here, before any module of ours can import it; worker processes inherit it.
# OpenMP's threads otherwise spin while they wait, which makes training eight times slower beside another busy process.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
