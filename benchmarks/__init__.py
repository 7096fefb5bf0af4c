"""What is measured and how; results stand in `results/`, each with the command that made it."""
