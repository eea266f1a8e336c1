"""How good a policy is: closed loop in simulation, offline on held-out episodes, and its latency."""
