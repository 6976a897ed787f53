"""What a test leaves behind: records per item, comparisons, collected trajectories, controls."""
