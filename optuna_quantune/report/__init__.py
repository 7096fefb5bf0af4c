"""What a person sees: progress, tables of trials, results."""
