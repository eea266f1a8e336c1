"""S-VAM: a shortcut video-action model. Start with the README, then `dvc.yaml`, then one stage."""
