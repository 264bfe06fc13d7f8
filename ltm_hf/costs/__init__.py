"""What a model costs, in closed form: FLOPs (flops.py), and a run of training (planner.py)."""
