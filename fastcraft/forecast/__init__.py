"""What an optimiser step will take, before it is run, on any machine."""
