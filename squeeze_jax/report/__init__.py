"""Tables and plots of a run's results and of a network's costs."""
